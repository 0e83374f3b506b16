#include "host/workers.h"

#include <utility>

namespace moe_ep {

Workers::Workers(std::size_t num_threads) {
  for (std::size_t i = 1; i < num_threads; ++i) threads_.emplace_back([this, i] { run(i); });
}

Workers::~Workers() {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    stopping_ = true;
  }
  start_.notify_all();
  for (std::thread& thread : threads_) thread.join();
}

std::pair<std::size_t, std::size_t> Workers::part(std::size_t items, std::size_t index, std::size_t parts) {
  return {items * index / parts, items * (index + 1) / parts};
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
  const auto mine = part(items, 0, threads_.size() + 1);
  work(mine.first, mine.second);
  std::unique_lock<std::mutex> lock(mutex_);
  done_.wait(lock, [this] { return running_ == 0; });
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
    const auto mine = part(items, index, threads_.size() + 1);
    (*work)(mine.first, mine.second);
    std::lock_guard<std::mutex> lock(mutex_);
    if (--running_ == 0) done_.notify_one();
  }
}

}  // namespace moe_ep
