#include "host/peers.h"

#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <climits>
#include <cstdio>
#include <cstring>
#include <ctime>
#include <thread>
#include <utility>

#include "common/errors.h"
#include "common/peer_text.h"

namespace moe_ep {
namespace {

using Clock = std::chrono::steady_clock;

constexpr auto kIdlePeriod = std::chrono::milliseconds(100);
constexpr int kSpinsWithOwnCore = 4000;

void futex_wait(std::uint32_t* word, std::uint32_t seen, std::chrono::nanoseconds longest) {
  timespec limit{};
  limit.tv_sec = static_cast<time_t>(longest.count() / 1000000000);
  limit.tv_nsec = static_cast<long>(longest.count() % 1000000000);
  syscall(SYS_futex, word, FUTEX_WAIT, seen, &limit, nullptr, 0);
}

void futex_wake(std::uint32_t* word) { syscall(SYS_futex, word, FUTEX_WAKE, INT_MAX, nullptr, nullptr, 0); }

inline void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

}  // namespace

Peers::Peers(int rank, HeapLayout layout, std::vector<std::uint8_t*> bases, std::vector<PeerProcess> processes,
             double timeout_s, std::function<void()> on_idle)
    : rank_(rank),
      layout_(layout),
      bases_(std::move(bases)),
      processes_(std::move(processes)),
      timeout_s_(timeout_s),
      on_idle_(std::move(on_idle)) {
  for (int i = 0; i < num_ranks(); ++i) {
    all_.push_back(i);
    watches_.emplace_back(i == rank_ ? 0 : processes_[static_cast<std::size_t>(i)].pid);
  }
  // Spinning only helps a rank that does not take the core from the peer that it waits for.
  spins_ = std::thread::hardware_concurrency() >= bases_.size() ? kSpinsWithOwnCore : 0;
}

OperationPost* Peers::post(int reader, std::uint64_t sequence, int source) const {
  return reinterpret_cast<OperationPost*>(base(reader) + layout_.post(sequence & 1, static_cast<std::size_t>(source)));
}

Grant* Peers::grant(int reader, std::uint64_t sequence, int source) const {
  return reinterpret_cast<Grant*>(base(reader) + layout_.grant(sequence & 1, static_cast<std::size_t>(source)));
}

std::uint64_t* Peers::flag(int reader, Step step, int source) const {
  return &reinterpret_cast<Flag*>(base(reader) + layout_.flag(step, static_cast<std::size_t>(source)))->value;
}

void Peers::ring(int reader) {
  auto* header = reinterpret_cast<HeapHeader*>(base(reader));
  __atomic_fetch_add(&header->doorbell, 1, __ATOMIC_SEQ_CST);
  if (__atomic_load_n(&header->sleepers, __ATOMIC_SEQ_CST) != 0) futex_wake(&header->doorbell);
}

void Peers::signal(int reader, Step step, std::uint64_t sequence) {
  __atomic_store_n(flag(reader, step, rank_), sequence, __ATOMIC_RELEASE);
  ring(reader);
}

void Peers::signal_all(Step step, std::uint64_t sequence) {
  // Starting behind oneself spreads the wake-ups, as every rank does this at about the same time.
  for (int i = 1; i <= num_ranks(); ++i) signal((rank_ + i) % num_ranks(), step, sequence);
}

void Peers::wait(Step step, std::uint64_t sequence, const std::vector<int>& sources, const char* operation) {
  const auto seen = [this, step](int source) { return __atomic_load_n(flag(rank_, step, source), __ATOMIC_ACQUIRE); };
  const auto reached = [&seen, sequence](int source) { return seen(source) >= sequence; };
  wait(Awaited{step, sequence, operation, reached, seen}, sources, Misses::kThrown);
}

void Peers::wait(const Awaited& awaited, const std::vector<int>& sources) { wait(awaited, sources, Misses::kThrown); }

std::vector<int> Peers::wait_or_miss(const Awaited& awaited, std::vector<int> sources) {
  return wait(awaited, std::move(sources), Misses::kReturned);
}

std::vector<int> Peers::wait(const Awaited& awaited, std::vector<int> sources, Misses misses) {
  auto* header = reinterpret_cast<HeapHeader*>(base(rank_));
  std::vector<int> missed;
  std::size_t next = 0;
  const auto all_reached = [&] {
    while (next < sources.size() && awaited.reached(sources[next])) ++next;
    return next == sources.size();
  };
  for (int spin = 0; spin <= spins_; ++spin) {
    if (all_reached()) return missed;
    relax();
  }
  const auto started = Clock::now();
  const auto deadline =
      started + std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(timeout_s_));
  auto next_check = started + kIdlePeriod;
  while (true) {
    __atomic_fetch_add(&header->sleepers, 1, __ATOMIC_SEQ_CST);
    const std::uint32_t seen = __atomic_load_n(&header->doorbell, __ATOMIC_SEQ_CST);
    const bool done = all_reached();
    if (!done) {
      const auto until = std::min(next_check, deadline) - Clock::now();
      if (until.count() > 0) futex_wait(&header->doorbell, seen, until);
    }
    __atomic_fetch_sub(&header->sleepers, 1, __ATOMIC_SEQ_CST);
    if (done || all_reached()) return missed;
    if (departed_.load()) throw Error(ErrorKind::kState, "the buffer was closed while an operation was in flight");
    const auto now = Clock::now();
    if (now < next_check && now < deadline) continue;
    next_check = now + kIdlePeriod;
    const bool late = now >= deadline;
    std::vector<int> expected;
    for (; next < sources.size(); ++next) {
      const int source = sources[next];
      const std::string why = gone(source);
      // A peer may have done its part and left right after: look again before blaming it.
      if ((why.empty() && !late) || awaited.reached(source)) {
        expected.push_back(source);
      } else if (misses == Misses::kReturned) {
        missed.push_back(source);
      } else {
        fail(awaited, source, !why.empty(), why.empty() ? "its process is alive" : why);
      }
    }
    sources = std::move(expected);
    next = 0;
    if (on_idle_) on_idle_();
  }
}

std::string Peers::gone(int source) const {
  const auto* departure =
      reinterpret_cast<const Departure*>(base(rank_) + layout_.departure(static_cast<std::size_t>(source)));
  // The process first: what it said of its end is there when it has ended.
  const bool ended = watches_[static_cast<std::size_t>(source)].ended();
  const std::uint32_t state = __atomic_load_n(&departure->state, __ATOMIC_ACQUIRE);
  if (state == 1) return "it has closed its buffer";
  if (state == 2) return "it has failed: " + std::string(departure->text, strnlen(departure->text, kDepartureText));
  return ended ? "its process has ended" : "";
}

void Peers::fail(const Awaited& awaited, int source, bool lost, const std::string& why) const {
  const std::int64_t pid = processes_[static_cast<std::size_t>(source)].pid;
  const FailedWait wait{rank_, source,    pid, awaited.step, awaited.operation, awaited.sequence, awaited.seen(source),
                        !lost, timeout_s_};
  throw Error(lost ? ErrorKind::kLost : ErrorKind::kTimeout, describe(wait, why));
}

void Peers::depart(std::uint32_t state, const std::string& text) {
  departed_.store(true);
  ring(rank_);
  for (int reader = 0; reader < num_ranks(); ++reader) {
    if (reader == rank_) continue;
    auto* departure = reinterpret_cast<Departure*>(base(reader) + layout_.departure(static_cast<std::size_t>(rank_)));
    if (__atomic_load_n(&departure->state, __ATOMIC_RELAXED) != 0) continue;
    std::strncpy(departure->text, text.c_str(), kDepartureText - 1);
    __atomic_store_n(&departure->state, state, __ATOMIC_RELEASE);
    ring(reader);
  }
}

}  // namespace moe_ep
