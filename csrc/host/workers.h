// A few threads that split a range of items between them; the caller works too.
#pragma once

#include <sys/types.h>

#include <condition_variable>
#include <cstddef>
#include <exception>
#include <functional>
#include <mutex>
#include <thread>
#include <utility>
#include <vector>

namespace moe_ep {

class Workers {
 public:
  // Fewer threads than asked for where the system refuses to start more.
  explicit Workers(std::size_t num_threads);
  ~Workers();
  Workers(const Workers&) = delete;
  Workers& operator=(const Workers&) = delete;

  // Calls `work(begin, end)` over parts of [0, items); returns, or throws what a part threw, when all are done.
  void split(std::size_t items, const std::function<void(std::size_t, std::size_t)>& work);

 private:
  void run(std::size_t index);
  // Does one part and keeps the first exception for `split` to throw.
  void do_part(const std::function<void(std::size_t, std::size_t)>& work, std::size_t items, std::size_t index);

  pid_t process_;
  std::vector<std::thread> threads_;
  std::mutex mutex_;
  std::condition_variable start_;
  std::condition_variable done_;
  const std::function<void(std::size_t, std::size_t)>* work_ = nullptr;
  std::size_t items_ = 0;
  std::size_t parts_ = 1;
  std::size_t round_ = 0;
  std::size_t running_ = 0;
  std::exception_ptr failure_;
  bool stopping_ = false;
};

}  // namespace moe_ep
