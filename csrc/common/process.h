// Whether another process of this machine still lives.
#pragma once

#include <poll.h>
#include <signal.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cerrno>
#include <cstdint>

namespace moe_ep {

// A process by its pid and, where the kernel has them, by a pidfd: readable once it has ended, zombie or not, and
// never another process that got the same number.
class ProcessWatch {
 public:
  // 0: no process to watch; it never ends.
  explicit ProcessWatch(std::int64_t pid) : pid_(pid) {
#if defined(SYS_pidfd_open)
    if (pid > 0) descriptor_ = static_cast<int>(syscall(SYS_pidfd_open, static_cast<pid_t>(pid), 0));
#endif
  }
  ProcessWatch(ProcessWatch&& other) noexcept : pid_(other.pid_), descriptor_(other.descriptor_) {
    other.descriptor_ = -1;
  }
  ProcessWatch(const ProcessWatch&) = delete;
  ProcessWatch& operator=(const ProcessWatch&) = delete;
  ~ProcessWatch() {
    if (descriptor_ >= 0) ::close(descriptor_);
  }

  bool ended() const {
    if (pid_ <= 0) return false;
    if (descriptor_ >= 0) {
      pollfd query{descriptor_, POLLIN, 0};
      return poll(&query, 1, 0) > 0 && (query.revents & POLLIN) != 0;
    }
    return kill(static_cast<pid_t>(pid_), 0) != 0 && errno == ESRCH;
  }

 private:
  std::int64_t pid_;
  int descriptor_ = -1;
};

}  // namespace moe_ep
