// A few threads that split a range of items between them; the caller works too.
#pragma once

#include <condition_variable>
#include <cstddef>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

namespace moe_ep {

class Workers {
 public:
  explicit Workers(std::size_t num_threads);
  ~Workers();
  Workers(const Workers&) = delete;
  Workers& operator=(const Workers&) = delete;

  // Calls `work(begin, end)` over parts of [0, items) and returns when all are done. `work` must not throw.
  void split(std::size_t items, const std::function<void(std::size_t, std::size_t)>& work);

 private:
  void run(std::size_t index);
  static std::pair<std::size_t, std::size_t> part(std::size_t items, std::size_t index, std::size_t parts);

  std::vector<std::thread> threads_;
  std::mutex mutex_;
  std::condition_variable start_;
  std::condition_variable done_;
  const std::function<void(std::size_t, std::size_t)>* work_ = nullptr;
  std::size_t items_ = 0;
  std::size_t round_ = 0;
  std::size_t running_ = 0;
  bool stopping_ = false;
};

}  // namespace moe_ep
