// What ranks tell each other in low-latency mode, in the words of common/low_latency_layout.h, and which ranks are left
// out. An operation is published, its posts are awaited, and steps of it are signalled and awaited.
#pragma once

#include <cstdint>
#include <vector>

#include "common/heap_layout.h"
#include "common/low_latency_layout.h"
#include "host/peers.h"
#include "host/routing.h"

namespace moe_ep {

// What a post says beside counts and masks.
struct LowPost {
  Element element;
  std::int64_t topk;
  bool has_weights;
  std::size_t index;     // of the buffers that the operation uses
  std::uint32_t handle;  // sequence number of the dispatch that is combined
  bool gave_up;          // this rank has, that dispatch
  std::int64_t bad_route;
  std::int64_t bad_expert;
};

struct LowOperation {
  Operation kind;
  std::uint32_t sequence;
  std::size_t index;                  // of the buffers and words that it uses
  std::vector<std::uint32_t> header;  // as this rank has posted it
};

class LowExchange {
 public:
  LowExchange(Peers& peers, const LowLayout& layout, bool mask_on_timeout);

  // Begins the next operation: tells all ranks of it. A dispatch has counts.
  LowOperation publish(Operation kind, const LowPost& post, const Counts* counts);
  // The waits are for all ranks that are not masked. A rank that does not come is masked, or else the wait throws, as
  // the buffer's user has chosen; returns whether all have come.
  bool await_posts(const LowOperation& operation);
  // Masks also what peers' posts mask; returns whether all have this rank's own mask.
  bool adopt_masks(const LowOperation& operation);
  std::uint32_t posted(const LowOperation& operation, int source, LowWord which) const {
    return value(operation, source, static_cast<std::size_t>(which));
  }
  std::int64_t bad_expert(const LowOperation& operation, int source) const;
  // Of all ranks; nothing of masked ones.
  std::vector<Counts> counts(const LowOperation& operation) const;

  // This rank has written the rows that it sends in a dispatch, or sends none as it has given the dispatch up.
  void signal_arrival(const LowOperation& operation, bool gave_up);
  bool await_arrivals(const LowOperation& operation);
  // This rank has read what it needs of its peers' rows for a combine.
  void signal_read(const LowOperation& operation);
  bool await_reads(const LowOperation& operation);

  void mask(int rank) { masked_[static_cast<std::size_t>(rank)] = true; }
  bool masked(int rank) const { return masked_[static_cast<std::size_t>(rank)]; }
  int num_ranks() const { return peers_.num_ranks(); }
  int rank() const { return peers_.rank(); }

 private:
  std::uint64_t* post(int reader, LowKind kind, std::size_t index, int source) const;
  // Where `source` posts this operation, in this rank's heap.
  std::uint64_t* post_of(const LowOperation& operation, int source) const;
  // A post that has this operation's number but is of another one; null if there is none.
  std::uint64_t* odd_post(const LowOperation& operation, int source) const;
  // The word by which `source` tells `reader` of a step.
  std::uint64_t* step_word(int reader, const LowOperation& operation, Step step, int source) const;
  std::uint32_t value(const LowOperation& operation, int source, std::size_t index) const;
  bool post_is_here(const LowOperation& operation, int source) const;
  void compare(const LowOperation& operation, int source) const;
  std::uint32_t mask_word(std::size_t index) const;
  bool masks_this_rank(int source) const;
  std::vector<int> awaited_ranks() const;
  void signal(const LowOperation& operation, Step step, std::uint32_t value);
  bool await(const LowOperation& operation, Step step);
  bool await(const Awaited& awaited);

  Peers& peers_;
  LowLayout layout_;
  bool mask_on_timeout_;
  std::uint32_t sequence_ = 0;
  std::vector<bool> masked_;
};

}  // namespace moe_ep
