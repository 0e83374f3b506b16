// Flags between ranks: setting them in peers' heaps, and waiting for them in one's own, bounded.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "common/heap_layout.h"
#include "common/process.h"

namespace moe_ep {

struct PeerProcess {
  std::int64_t pid;  // 0: a thread of this process, as in the protocol's stress test
};

// What is waited for: a step of an operation by several peers.
struct Awaited {
  Step step;
  std::uint64_t sequence;
  const char* operation;
  std::function<bool(int source)> reached;        // acquires what the source wrote before
  std::function<std::uint64_t(int source)> seen;  // the operation whose step the source has done, for a message
};

// The heaps of all ranks as this rank sees them, and the waiting on them.
class Peers {
 public:
  // `bases` are the addresses of every rank's heap in this process, this rank's own among them.
  // `on_idle` is called about every tenth of a second of waiting; it may throw to break the wait.
  Peers(int rank, HeapLayout layout, std::vector<std::uint8_t*> bases, std::vector<PeerProcess> processes,
        double timeout_s, std::function<void()> on_idle);
  Peers(const Peers&) = delete;
  Peers& operator=(const Peers&) = delete;

  int rank() const { return rank_; }
  int num_ranks() const { return static_cast<int>(bases_.size()); }
  const HeapLayout& layout() const { return layout_; }
  std::uint8_t* base(int rank) const { return bases_[static_cast<std::size_t>(rank)]; }

  // The post that `source` made in `reader`'s heap, followed by its counts.
  OperationPost* post(int reader, std::uint64_t sequence, int source) const;
  Grant* grant(int reader, std::uint64_t sequence, int source) const;

  // Tells `reader` that this rank has done `step` of operation `sequence`; releases all earlier writes.
  void signal(int reader, Step step, std::uint64_t sequence);
  void signal_all(Step step, std::uint64_t sequence);

  // Waits until all `sources` have signalled `step` for `sequence` or a later one; acquires their writes.
  // Throws kTimeout or kLost, naming who waited for whom, in what, expected and seen.
  void wait(Step step, std::uint64_t sequence, const std::vector<int>& sources, const char* operation);
  void wait_all(Step step, std::uint64_t sequence, const char* operation) { wait(step, sequence, all_, operation); }

  // Waits until all `sources` have done what is awaited. Returns those of which no more is to be expected, where a
  // wait would throw; all of them where that is told by the timeout.
  std::vector<int> wait_or_miss(const Awaited& awaited, std::vector<int> sources);
  // The same, but throws.
  void wait(const Awaited& awaited, const std::vector<int>& sources);
  [[noreturn]] void fail(const Awaited& awaited, int source, bool lost, const std::string& why) const;

  // Wakes `reader` if it sleeps; call it after a store that it may wait for.
  void ring(int reader);

  // Tells all peers that this rank takes part in nothing more: state 1 closed, 2 failed. Ends a wait of this
  // rank in another thread.
  void depart(std::uint32_t state, const std::string& text);

 private:
  std::uint64_t* flag(int reader, Step step, int source) const;
  enum class Misses { kThrown, kReturned };
  std::vector<int> wait(const Awaited& awaited, std::vector<int> sources, Misses misses);
  // Why no more is to be expected of a source; empty: it may still do its part.
  std::string gone(int source) const;

  int rank_;
  HeapLayout layout_;
  std::vector<std::uint8_t*> bases_;
  std::vector<PeerProcess> processes_;
  std::vector<ProcessWatch> watches_;
  std::vector<int> all_;
  double timeout_s_;
  std::function<void()> on_idle_;
  int spins_;
  std::atomic<bool> departed_{false};
};

}  // namespace moe_ep
