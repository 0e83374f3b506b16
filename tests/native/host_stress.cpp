// Stress of the host protocol for ThreadSanitizer: ranks are threads of one process that share their heaps
// at the same addresses, so that every unordered pair of accesses is seen. Random routing, random delays
// between steps, leases held over random numbers of operations, low-latency halves around ordinary operations; every
// sum is checked exactly.
//
//   host_stress [operations] [ranks] [seed]
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <memory>
#include <random>
#include <set>
#include <thread>
#include <vector>

#include "host/communicator.h"

namespace {

using namespace moe_ep;

constexpr std::int64_t kHidden = 32;
constexpr std::int64_t kTopk = 3;
constexpr std::int64_t kExperts = 7;
constexpr std::int64_t kMaxTokens = 24;
constexpr std::int64_t kLowTokens = 8;

std::atomic<int> failures{0};

void expect(bool ok, const char* what, int rank, int operation) {
  if (ok) return;
  ++failures;
  std::fprintf(stderr, "rank %d operation %d: %s\n", rank, operation, what);
}

// One low-latency step of whole numbers after the other, each in its four halves; experts change nothing.
class LowSteps {
 public:
  LowSteps(LowLatency& low, RowLayout layout, const std::vector<std::int32_t>& expert_to_rank, int rank)
      : low_(low), layout_(layout), expert_to_rank_(expert_to_rank), rank_(rank) {}

  void send(std::mt19937& own) {
    ++number_;
    tokens_ = static_cast<std::int64_t>(own() % (kLowTokens + 1));
    x_.resize(static_cast<std::size_t>(tokens_ * kHidden));
    for (float& value : x_) value = static_cast<float>(static_cast<int>(own() % 17) - 8);
    ids_.assign(static_cast<std::size_t>(tokens_ * kTopk), -1);
    // No expert twice in a row, as there are slots for that only.
    for (std::size_t i = 0; i < ids_.size(); ++i) {
      const auto id = static_cast<std::int64_t>(own() % (kExperts + 1)) - 1;
      const auto row = ids_.begin() + static_cast<std::ptrdiff_t>(i - i % kTopk);
      if (std::find(row, row + kTopk, id) == row + kTopk) ids_[i] = id;
    }
    LowDispatchArguments arguments{};
    arguments.x = x_.data();
    arguments.element = Element::kFloat32;
    arguments.num_tokens = tokens_;
    arguments.hidden = kHidden;
    arguments.topk_idx = ids_.data();
    arguments.topk = kTopk;
    arguments.index = static_cast<std::size_t>(number_ % 2);
    routing_ = low_.send_dispatch(arguments);
  }

  void receive() {
    low_.receive_dispatch(*routing_);
    received_ = low_.received(routing_->operation.index);
  }

  void send_back(bool in_place) {
    rows_ = received_;
    if (in_place) {
      rows_ = low_.rows(routing_->operation.index);
      std::memcpy(rows_.data, received_.data, rows_.bytes);
    }
    y_.assign(x_.size(), -1e9f);
    lost_.assign(static_cast<std::size_t>(tokens_), -1e9f);
    LowCombineArguments arguments{};
    arguments.rows = rows_.data;
    arguments.element = Element::kFloat32;
    arguments.hidden = kHidden;
    arguments.routing = routing_;
    arguments.topk_idx = ids_.data();
    arguments.out = y_.data();
    arguments.lost_weights = lost_.data();
    combine_ = low_.send_combine(arguments);
  }

  void finish(int operation) {
    low_.receive_combine(*combine_);
    // Peers have read them, and nobody else reads what was received.
    std::memset(rows_.data, 0xff, rows_.bytes);
    for (std::int64_t token = 0; token < tokens_; ++token) {
      std::set<std::int32_t> ranks;
      int factor = 0;
      for (std::int64_t k = 0; k < kTopk; ++k) {
        const std::int64_t id = ids_[static_cast<std::size_t>(token * kTopk + k)];
        if (id < 0) continue;
        const bool first = ranks.insert(expert_to_rank_[static_cast<std::size_t>(id)]).second;
        factor += first || layout_ == RowLayout::kExpert;
      }
      expect(lost_[static_cast<std::size_t>(token)] == 0, "a weight was lost", rank_, operation);
      for (std::int64_t column = 0; column < kHidden; ++column) {
        const auto at = static_cast<std::size_t>(token * kHidden + column);
        expect(y_[at] == static_cast<float>(factor) * x_[at], "a low-latency sum is wrong", rank_, operation);
      }
    }
    received_ = rows_ = Block{};
    expect(!low_.held(routing_->operation.index), "a buffer is held", rank_, operation);
  }

 private:
  LowLatency& low_;
  RowLayout layout_;
  const std::vector<std::int32_t>& expert_to_rank_;
  int rank_;
  int number_ = 0;
  std::int64_t tokens_ = 0;
  std::vector<float> x_, y_, lost_;
  std::vector<std::int64_t> ids_;
  std::shared_ptr<LowRouting> routing_;
  std::shared_ptr<LowCombine> combine_;
  Block received_, rows_;
};

void run_rank(int rank, int num_ranks, int operations, unsigned seed, const std::vector<std::shared_ptr<Pool>>& pools,
              bool two_stage) {
  const RowLayout low_layout = two_stage ? RowLayout::kRank : RowLayout::kExpert;
  std::vector<std::uint8_t*> bases;
  for (const auto& pool : pools) bases.push_back(pool->segment().base());
  auto peers = std::make_unique<Peers>(rank, pools[0]->layout(), bases,
                                       std::vector<PeerProcess>(static_cast<std::size_t>(num_ranks), PeerProcess{0}),
                                       60.0, nullptr);
  std::vector<std::int32_t> expert_to_rank;
  for (std::int32_t expert = 0; expert < kExperts; ++expert) expert_to_rank.push_back((expert * 5 + 1) % num_ranks);
  Communicator communicator(pools[static_cast<std::size_t>(rank)], std::move(peers),
                            CommunicatorOptions{expert_to_rank, 4, two_stage, 2, {kLowTokens, low_layout, false}});
  LowSteps low(communicator.low_latency(), low_layout, expert_to_rank, rank);
  // What all ranks must do alike comes from `common`, the rest from `own`.
  std::mt19937 common(seed);
  std::mt19937 own(seed * 31 + static_cast<unsigned>(rank));
  const auto pause = [&own] {
    if (own() % 4 == 0) std::this_thread::sleep_for(std::chrono::microseconds(own() % 200));
  };
  std::deque<DispatchResult> held;
  for (int operation = 0; operation < operations; ++operation) {
    const auto layout = static_cast<RowLayout>(common() % 2);
    const bool weighted = common() % 2 == 0 && layout == RowLayout::kExpert;
    const auto tokens = static_cast<std::int64_t>(own() % (kMaxTokens + 1));
    std::vector<float> x(static_cast<std::size_t>(tokens * kHidden));
    for (float& value : x) value = static_cast<float>(static_cast<int>(own() % 17) - 8);
    std::vector<std::int64_t> ids(static_cast<std::size_t>(tokens * kTopk));
    for (auto& id : ids) id = static_cast<std::int64_t>(own() % (kExperts + 1)) - 1;
    std::vector<float> weights(ids.size());
    for (float& weight : weights) weight = static_cast<float>(own() % 3 + 1);

    DispatchArguments send{};
    send.x = x.data();
    send.element = Element::kFloat32;
    send.num_tokens = tokens;
    send.hidden = kHidden;
    send.topk_idx = ids.data();
    send.topk = kTopk;
    send.has_weights = true;
    send.weights = weights.data();
    send.layout = layout;
    send.max_recv_rows = -1;
    low.send(own);
    pause();
    DispatchResult out = communicator.dispatch(send);
    pause();
    low.receive();
    low.send_back(common() % 2 == 0);

    CombineArguments back{};
    back.rows = out.block.data;
    back.element = Element::kFloat32;
    back.hidden = kHidden;
    back.routing = out.routing;
    back.has_weights = weighted;
    back.has_values = true;
    back.weights = reinterpret_cast<const float*>(out.block.data + out.offsets.weights);
    back.values = reinterpret_cast<const float*>(out.block.data + out.offsets.weights);
    std::vector<float> copy;
    if (common() % 2 == 0) {
      const auto* rows = reinterpret_cast<const float*>(out.block.data);
      copy.assign(rows, rows + out.routing->num_rows * kHidden);
      back.rows = copy.data();
    }
    std::vector<float> y(x.size(), -1e9f);
    std::vector<float> values(ids.size(), -1e9f);
    back.out = y.data();
    back.values_out = values.data();
    communicator.combine(back);
    pause();
    low.finish(operation);

    for (std::int64_t token = 0; token < tokens; ++token) {
      float factor = 0;
      std::vector<bool> ranks(static_cast<std::size_t>(num_ranks), false);
      for (std::int64_t k = 0; k < kTopk; ++k) {
        const auto at = static_cast<std::size_t>(token * kTopk + k);
        expect(values[at] == (ids[at] < 0 ? 0.0f : weights[at]), "a value came back wrong", rank, operation);
        if (ids[at] < 0) continue;
        auto seen = ranks[static_cast<std::size_t>(expert_to_rank[static_cast<std::size_t>(ids[at])])];
        const bool counts = layout == RowLayout::kExpert || !seen;
        if (counts) factor += weighted ? weights[at] : 1.0f;
        ranks[static_cast<std::size_t>(expert_to_rank[static_cast<std::size_t>(ids[at])])] = true;
      }
      for (std::int64_t column = 0; column < kHidden; ++column) {
        const auto at = static_cast<std::size_t>(token * kHidden + column);
        expect(y[at] == factor * x[at], "a sum is wrong", rank, operation);
      }
    }
    held.push_back(std::move(out));
    while (held.size() > own() % 6) held.pop_front();
  }
  communicator.depart(1, "");
}

}  // namespace

int main(int argc, char** argv) {
  const int operations = argc > 1 ? std::atoi(argv[1]) : 300;
  const int num_ranks = argc > 2 ? std::atoi(argv[2]) : 4;
  const unsigned seed = argc > 3 ? static_cast<unsigned>(std::atoi(argv[3])) : 1;
  for (bool two_stage : {false, true}) {
    // A pool that held leases use up at times, so that the overflow region is used too.
    const auto ranks_here = static_cast<std::size_t>(num_ranks);
    const std::size_t low_bytes = ranks_here * kLowTokens * kExperts * (kHidden + 2 * kTopk) * sizeof(float);
    const std::size_t region = LowLayout::make(0, ranks_here, kExperts, low_bytes, low_bytes).end();
    const HeapLayout layout = HeapLayout::make(ranks_here, kExperts, 48 << 10, 1 << 20, region);
    const LowLayout low = LowLayout::make(layout.low(), ranks_here, kExperts, low_bytes, low_bytes);
    std::vector<std::shared_ptr<Pool>> pools;
    for (int rank = 0; rank < num_ranks; ++rank) {
      pools.push_back(std::make_shared<Pool>(Segment::create("/dev/shm", layout.total_bytes()), layout, low));
    }
    std::vector<std::thread> ranks;
    for (int rank = 0; rank < num_ranks; ++rank) {
      ranks.emplace_back(run_rank, rank, num_ranks, operations, seed, std::cref(pools), two_stage);
    }
    for (std::thread& rank : ranks) rank.join();
  }
  std::printf("%d operations on %d ranks, direct and two-stage: %d failures\n", operations, num_ranks, failures.load());
  return failures.load() == 0 ? 0 : 1;
}
