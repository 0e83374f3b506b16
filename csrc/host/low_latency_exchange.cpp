#include "host/low_latency_exchange.h"

#include <algorithm>

#include "common/errors.h"
#include "common/index.h"
#include "common/peer_text.h"

namespace moe_ep {
namespace {

constexpr std::size_t kMaskBits = 32;

std::uint64_t load_acquire(const std::uint64_t* word) { return __atomic_load_n(word, __ATOMIC_ACQUIRE); }
void store_release(std::uint64_t* word, std::uint64_t value) { __atomic_store_n(word, value, __ATOMIC_RELEASE); }

// Words are written in their order: while the last is missing, no other need be looked at.
bool all_here(const std::uint64_t* words, std::size_t count, std::uint32_t sequence) {
  while (count > 0 && low_lead(load_acquire(words + count - 1), sequence) >= 0) --count;
  return count == 0;
}

LowKind set_of(Operation kind) { return kind == Operation::kLowDispatch ? LowKind::kDispatch : LowKind::kCombine; }

std::uint64_t sequence_of(std::uint64_t word) { return word >> 32; }

}  // namespace

LowExchange::LowExchange(Peers& peers, const LowLayout& layout, bool mask_on_timeout)
    : peers_(peers), layout_(layout), mask_on_timeout_(mask_on_timeout), masked_(at(peers.num_ranks()), false) {}

std::uint64_t* LowExchange::post(int reader, LowKind kind, std::size_t index, int source) const {
  return reinterpret_cast<std::uint64_t*>(peers_.base(reader) + layout_.post(kind, index, at(source)));
}

std::uint64_t* LowExchange::post_of(const LowOperation& operation, int source) const {
  return post(rank(), set_of(operation.kind), operation.index, source);
}

std::uint64_t* LowExchange::odd_post(const LowOperation& operation, int source) const {
  for (LowKind kind : {LowKind::kDispatch, LowKind::kCombine}) {
    for (std::size_t index = 0; index < kLowBuffers; ++index) {
      std::uint64_t* words = post(rank(), kind, index, source);
      if (words == post_of(operation, source) || low_lead(load_acquire(words), operation.sequence) != 0) continue;
      if (all_here(words, layout_.header_words(), operation.sequence)) return words;
    }
  }
  return nullptr;
}

// A rank is one block and signals with its first word. The copies for a combine need no such signal here, as its post
// comes after them.
std::uint64_t* LowExchange::step_word(int reader, const LowOperation& operation, Step step, int source) const {
  const std::size_t offset = step == Step::kRead
                                 ? layout_.reads(operation.index, at(source))
                                 : layout_.arrivals(set_of(operation.kind), operation.index, at(source));
  return reinterpret_cast<std::uint64_t*>(peers_.base(reader) + offset);
}

std::uint32_t LowExchange::value(const LowOperation& operation, int source, std::size_t index) const {
  return low_value(load_acquire(post_of(operation, source) + index));
}

LowOperation LowExchange::publish(Operation kind, const LowPost& post, const Counts* counts) {
  LowOperation operation{kind, ++sequence_, post.index, {}};
  operation.header = {static_cast<std::uint32_t>(kind),
                      static_cast<std::uint32_t>(post.element),
                      static_cast<std::uint32_t>(post.topk),
                      static_cast<std::uint32_t>(post.has_weights),
                      static_cast<std::uint32_t>(post.index),
                      post.handle,
                      1,  // A rank is one block.
                      static_cast<std::uint32_t>(post.gave_up),
                      0,  // All rows are in the heap.
                      0,
                      static_cast<std::uint32_t>(post.bad_route),
                      static_cast<std::uint32_t>(post.bad_expert)};
  for (std::size_t i = 0; i < layout_.mask_words(); ++i) operation.header.push_back(mask_word(i));
  std::vector<std::uint32_t> words = operation.header;
  if (counts != nullptr) {
    words.insert(words.end(), counts->per_expert.begin(), counts->per_expert.end());
    words.insert(words.end(), counts->per_rank.begin(), counts->per_rank.end());
    // Nobody needs the counts then.
    if (post.bad_route != 0) words[layout_.header_words()] = static_cast<std::uint32_t>(post.bad_expert >> 32);
  }
  // Masked ranks too: one that lives finds out in this way. Starting behind oneself spreads the wake-ups.
  for (int i = 1; i <= num_ranks(); ++i) {
    const int reader = (rank() + i) % num_ranks();
    std::uint64_t* slot = this->post(reader, set_of(kind), operation.index, rank());
    for (std::size_t w = 0; w < words.size(); ++w) store_release(slot + w, low_word(operation.sequence, words[w]));
    peers_.ring(reader);
  }
  return operation;
}

// The post of a later operation stands for this one's: of a combine it is of the same dispatch and says the same.
bool LowExchange::post_is_here(const LowOperation& operation, int source) const {
  const bool has_counts = operation.kind == Operation::kLowDispatch;
  const std::size_t words = has_counts ? layout_.post_words() : layout_.header_words();
  return all_here(post_of(operation, source), words, operation.sequence) || odd_post(operation, source) != nullptr;
}

bool LowExchange::await_posts(const LowOperation& operation) {
  const auto here = [&](int source) { return post_is_here(operation, source); };
  const auto seen = [&](int source) {
    std::uint64_t last = 0;
    for (LowKind kind : {LowKind::kDispatch, LowKind::kCombine}) {
      for (std::size_t index = 0; index < kLowBuffers; ++index) {
        last = std::max(last, sequence_of(load_acquire(post(rank(), kind, index, source))));
      }
    }
    return last;
  };
  const Awaited awaited{Step::kPost, operation.sequence, operation_name(operation.kind), here, seen};
  const bool all_came = await(awaited);
  for (int source : awaited_ranks()) {
    if (masks_this_rank(source)) peers_.fail(awaited, source, true, "it has masked this rank");
    compare(operation, source);
  }
  return all_came;
}

void LowExchange::compare(const LowOperation& operation, int source) const {
  const std::uint64_t* odd = odd_post(operation, source);
  const std::uint64_t* words = odd == nullptr ? post_of(operation, source) : odd;
  for (std::size_t field = 0; field < kNumLowCompared; ++field) {
    const std::uint64_t word = load_acquire(words + field);
    const std::uint32_t here = operation.header[field];
    if (low_lead(word, operation.sequence) != 0 || low_value(word) == here) continue;
    throw Error(ErrorKind::kMismatch, describe_difference(source, rank(), operation.sequence, kLowComparedFields[field],
                                                          low_value(word), here));
  }
}

std::uint32_t LowExchange::mask_word(std::size_t index) const {
  std::uint32_t bits = 0;
  for (std::size_t bit = 0; bit < kMaskBits && index * kMaskBits + bit < masked_.size(); ++bit) {
    bits |= static_cast<std::uint32_t>(masked_[index * kMaskBits + bit]) << bit;
  }
  return bits;
}

// In any post: a masked rank stays masked.
bool LowExchange::masks_this_rank(int source) const {
  const std::size_t word = static_cast<std::size_t>(LowWord::kMask) + at(rank()) / kMaskBits;
  std::uint32_t bits = 0;
  for (LowKind kind : {LowKind::kDispatch, LowKind::kCombine}) {
    for (std::size_t index = 0; index < kLowBuffers; ++index) {
      bits |= low_value(load_acquire(post(rank(), kind, index, source) + word));
    }
  }
  return (bits >> (at(rank()) % kMaskBits) & 1) != 0;
}

bool LowExchange::adopt_masks(const LowOperation& operation) {
  bool alike = true;
  for (int source : awaited_ranks()) {
    for (int other = 0; other < num_ranks(); ++other) {
      const std::size_t index = static_cast<std::size_t>(LowWord::kMask) + at(other) / kMaskBits;
      const std::uint32_t bits = value(operation, source, index);
      alike = alike && bits == operation.header[index];
      if ((bits >> (at(other) % kMaskBits) & 1) != 0) mask(other);
    }
  }
  return alike;
}

std::int64_t LowExchange::bad_expert(const LowOperation& operation, int source) const {
  const std::uint64_t upper = value(operation, source, layout_.header_words());
  return static_cast<std::int64_t>(upper << 32 | posted(operation, source, LowWord::kBadExpert));
}

std::vector<Counts> LowExchange::counts(const LowOperation& operation) const {
  std::vector<Counts> counts;
  for (int source = 0; source < num_ranks(); ++source) {
    Counts of{std::vector<std::int32_t>(layout_.num_experts, 0), std::vector<std::int32_t>(layout_.num_ranks, 0)};
    if (!masked(source)) {
      std::size_t index = layout_.header_words();
      for (auto* numbers : {&of.per_expert, &of.per_rank}) {
        for (std::int32_t& number : *numbers) {
          number = static_cast<std::int32_t>(value(operation, source, index++));
        }
      }
    }
    counts.push_back(std::move(of));
  }
  return counts;
}

void LowExchange::signal_arrival(const LowOperation& operation, bool gave_up) {
  signal(operation, Step::kArrival, gave_up ? 1 | kLowGaveUp : 1);
}

bool LowExchange::await_arrivals(const LowOperation& operation) { return await(operation, Step::kArrival); }

void LowExchange::signal_read(const LowOperation& operation) { signal(operation, Step::kRead, 1); }

bool LowExchange::await_reads(const LowOperation& operation) { return await(operation, Step::kRead); }

void LowExchange::signal(const LowOperation& operation, Step step, std::uint32_t value) {
  for (int i = 1; i <= num_ranks(); ++i) {
    const int reader = (rank() + i) % num_ranks();
    store_release(step_word(reader, operation, step, rank()), low_word(operation.sequence, value));
    peers_.ring(reader);
  }
}

bool LowExchange::await(const LowOperation& operation, Step step) {
  const auto load = [&](int source) { return load_acquire(step_word(rank(), operation, step, source)); };
  const auto reached = [&](int source) { return low_lead(load(source), operation.sequence) >= 0; };
  const auto seen = [&](int source) { return sequence_of(load(source)); };
  return await(Awaited{step, operation.sequence, operation_name(operation.kind), reached, seen});
}

bool LowExchange::await(const Awaited& awaited) {
  if (!mask_on_timeout_) {
    peers_.wait(awaited, awaited_ranks());
    return true;
  }
  const std::vector<int> missed = peers_.wait_or_miss(awaited, awaited_ranks());
  for (int source : missed) mask(source);
  return missed.empty();
}

// A rank does not wait for itself.
std::vector<int> LowExchange::awaited_ranks() const {
  std::vector<int> ranks;
  for (int source = 0; source < num_ranks(); ++source) {
    if (source != rank() && !masked(source)) ranks.push_back(source);
  }
  return ranks;
}

}  // namespace moe_ep
