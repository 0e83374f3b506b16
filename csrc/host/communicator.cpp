// What dispatch and combine share: posts, agreement on them, room in the heap.
#include "host/communicator.h"

#include <cstring>
#include <new>
#include <utility>

#include "common/errors.h"
#include "common/index.h"
#include "common/peer_text.h"

namespace moe_ep {
namespace {

// Field `index` of the leading, compared ones.
std::int64_t compared_field(const OperationPost& post, int index) {
  std::int64_t value;
  std::memcpy(&value, reinterpret_cast<const std::uint8_t*>(&post) + sizeof(value) * at(index), sizeof(value));
  return value;
}

}  // namespace

Communicator::Communicator(std::shared_ptr<Pool> pool, std::unique_ptr<Peers> peers, CommunicatorOptions options)
    : pool_(std::move(pool)),
      peers_(std::move(peers)),
      placement_(options.expert_to_rank, peers_->num_ranks()),
      alignment_(options.alignment),
      two_stage_(options.two_stage),
      workers_(options.num_threads),
      kernels_(kernels()),
      low_latency_(pool_, *peers_, placement_, workers_, options.low_latency) {}

Block Communicator::lease(std::size_t bytes) {
  auto lease = pool_->allocate(bytes);
  if (lease == nullptr) return Block{};
  std::uint8_t* data = lease->data();
  return Block{data, bytes, std::move(lease)};
}

Block Communicator::own_memory(std::size_t bytes) const {
  auto* data = static_cast<std::uint8_t*>(::operator new(bytes == 0 ? 1 : bytes, std::align_val_t{kCacheLine}));
  std::shared_ptr<void> owner(data, [](void* memory) { ::operator delete(memory, std::align_val_t{kCacheLine}); });
  return Block{data, bytes, std::move(owner)};
}

Communicator::Room Communicator::find_room(std::size_t bytes) {
  Room room;
  room.lease = pool_->allocate(bytes);
  if (room.lease != nullptr) {
    room.offset = static_cast<std::int64_t>(room.lease->offset());
  } else if (bytes <= pool_->layout().overflow_bytes && pool_->commit_overflow(bytes) == 0) {
    room.offset = static_cast<std::int64_t>(pool_->layout().overflow());
  }
  return room;
}

void Communicator::publish(const OperationPost& post, const Counts* counts) {
  for (int reader = 0; reader < peers_->num_ranks(); ++reader) {
    OperationPost* slot = peers_->post(reader, sequence_, peers_->rank());
    std::memcpy(slot, &post, sizeof(post));
    if (counts == nullptr) continue;
    auto* numbers = reinterpret_cast<std::int32_t*>(slot + 1);
    std::memcpy(numbers, counts->per_expert.data(), counts->per_expert.size() * sizeof(std::int32_t));
    std::memcpy(numbers + counts->per_expert.size(), counts->per_rank.data(),
                counts->per_rank.size() * sizeof(std::int32_t));
  }
  peers_->signal_all(Step::kPost, sequence_);
}

void Communicator::compare_posts(const OperationPost& mine) const {
  for (int source = 0; source < peers_->num_ranks(); ++source) {
    const OperationPost* theirs = peers_->post(peers_->rank(), sequence_, source);
    for (int field = 0; field < kNumComparedFields; ++field) {
      const std::int64_t there = compared_field(*theirs, field);
      const std::int64_t here = compared_field(mine, field);
      if (there == here) continue;
      throw Error(ErrorKind::kMismatch,
                  describe_difference(source, peers_->rank(), sequence_, kComparedFields[field], there, here));
    }
  }
}

std::vector<Counts> Communicator::gather_counts() const {
  const std::size_t num_experts = placement_.rank_of_expert.size();
  const auto num_ranks = static_cast<std::size_t>(peers_->num_ranks());
  std::vector<Counts> counts;
  for (int source = 0; source < peers_->num_ranks(); ++source) {
    const auto* numbers = reinterpret_cast<const std::int32_t*>(peers_->post(peers_->rank(), sequence_, source) + 1);
    counts.push_back(
        Counts{{numbers, numbers + num_experts}, {numbers + num_experts, numbers + num_experts + num_ranks}});
  }
  return counts;
}

void Communicator::no_room(int rank, const char* operation, std::size_t own_bytes) const {
  std::string message =
      "rank " + std::to_string(rank) + " has no room for its rows in " + operation + " " + std::to_string(sequence_);
  if (rank == peers_->rank()) {
    const int failure = pool_->last_errno();
    message += " (" + std::to_string(own_bytes) + " bytes in " + pool_->segment().directory() + ": " +
               (failure != 0 ? std::strerror(failure) : "the pool is used up and they exceed the overflow region") +
               ")";
  }
  throw Error(ErrorKind::kCapacity, message +
                                        "; enlarge that tmpfs (docker run --shm-size) or pool_bytes, hold fewer "
                                        "received tensors, or use backend='collective'");
}

}  // namespace moe_ep
