#include "host/workers.h"

#include <unistd.h>

#include <system_error>

namespace moe_ep {

Workers::Workers(std::size_t num_threads) : process_(getpid()) {
  try {
    for (std::size_t i = 1; i < num_threads; ++i) threads_.emplace_back([this, i] { run(i); });
  } catch (const std::system_error&) {
    // The caller's own thread does the rest.
  }
  parts_ = threads_.size() + 1;
}

Workers::~Workers() {
  if (getpid() != process_) {
    // A forked child has no such threads to wait for.
    for (std::thread& thread : threads_) thread.detach();
    return;
  }
  {
    std::lock_guard<std::mutex> lock(mutex_);
    stopping_ = true;
  }
  start_.notify_all();
  for (std::thread& thread : threads_) thread.join();
}

void Workers::do_part(const std::function<void(std::size_t, std::size_t)>& work, std::size_t items, std::size_t index) {
  try {
    work(items * index / parts_, items * (index + 1) / parts_);
  } catch (...) {
    std::lock_guard<std::mutex> lock(mutex_);
    if (failure_ == nullptr) failure_ = std::current_exception();
  }
}

void Workers::split(std::size_t items, const std::function<void(std::size_t, std::size_t)>& work) {
  if (threads_.empty() || items < 2) {
    work(0, items);
    return;
  }
  {
    std::lock_guard<std::mutex> lock(mutex_);
    work_ = &work;
    items_ = items;
    running_ = threads_.size();
    ++round_;
  }
  start_.notify_all();
  do_part(work, items, 0);
  std::unique_lock<std::mutex> lock(mutex_);
  done_.wait(lock, [this] { return running_ == 0; });
  if (failure_ != nullptr) std::rethrow_exception(std::exchange(failure_, nullptr));
}

void Workers::run(std::size_t index) {
  std::size_t seen = 0;
  while (true) {
    const std::function<void(std::size_t, std::size_t)>* work = nullptr;
    std::size_t items = 0;
    {
      std::unique_lock<std::mutex> lock(mutex_);
      start_.wait(lock, [&] { return stopping_ || round_ != seen; });
      if (stopping_) return;
      seen = round_;
      work = work_;
      items = items_;
    }
    do_part(*work, items, index);
    std::lock_guard<std::mutex> lock(mutex_);
    if (--running_ == 0) done_.notify_one();
  }
}

}  // namespace moe_ep
