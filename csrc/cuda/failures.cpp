// Waiting on the host, bounded, and turning what kernels and processes left behind into errors.
#include <chrono>
#include <cstring>
#include <thread>

#include "common/peer_text.h"
#include "cuda/check.h"
#include "cuda/communicator.h"

namespace moe_ep {
namespace gpu {
namespace {

using Clock = std::chrono::steady_clock;

constexpr auto kIdlePeriod = std::chrono::milliseconds(100);
// Kernels bound their waits themselves; this long after that the host stops believing in them.
constexpr double kGraceSeconds = 10.0;
constexpr unsigned kSpinsBetweenClocks = 1024;
constexpr std::uint32_t kDepartureClosed = 1;
constexpr std::uint32_t kDepartureFailed = 2;

template <class T>
T load_acquire(const T* at) {
  return __atomic_load_n(at, __ATOMIC_ACQUIRE);
}

inline void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

double seconds_since(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

const char* compared_field_name(Operation operation, int field) {
  const bool low = operation == Operation::kLowDispatch || operation == Operation::kLowCombine;
  return low ? kLowComparedFields[field] : kComparedFields[field];
}

}  // namespace

bool Communicator::await(std::uint64_t ticket, cudaStream_t stream) {
  struct Mark {
    explicit Mark(std::atomic<bool>& flag) : flag_(flag) { flag_ = true; }
    ~Mark() { flag_ = false; }
    std::atomic<bool>& flag_;
  } mark(awaiting_);
  auto next_check = Clock::now() + kIdlePeriod;
  auto began = Clock::now();
  for (unsigned spin = 1; !has_told(ticket); ++spin) {
    relax();
    if (spin % kSpinsBetweenClocks != 0) continue;
    throw_if_failed(true);
    const auto now = Clock::now();
    if (now < next_check) continue;
    next_check = now + kIdlePeriod;
    // Work that was queued before may take as long as it wants.
    if (load_acquire(&report_->started) != ticket) began = now;
    while_waiting(ticket, stream, seconds_since(began));
  }
  throw_if_failed(true);
  const auto outcome = static_cast<Outcome>(told(Word::kOutcome));
  if (outcome == Outcome::kNoRoom) return false;
  if (outcome != Outcome::kOk) throw_outcome(report_->call);
  // What an earlier operation left behind; all ranks find it at this same call.
  throw_if_failed(false);
  return true;
}

bool Communicator::has_told(std::uint64_t ticket) const {
  const std::uint64_t* words = words_of(report_);
  if (!has_tag(load_acquire(words + static_cast<int>(Word::kOutcome)), ticket)) return false;
  const auto outcome = static_cast<Outcome>(told(Word::kOutcome));
  if (outcome != Outcome::kOk && outcome != Outcome::kNoRoom) return true;
  for (int word = 0; word < num_words(); ++word) {
    if (!has_tag(load_acquire(words + word), ticket)) return false;
  }
  return true;
}

std::int64_t Communicator::told(Word word, int further) const {
  const std::uint64_t* words = words_of(report_);
  return static_cast<std::uint32_t>(load_acquire(words + static_cast<int>(word) + further));
}

void Communicator::while_waiting(std::uint64_t ticket, cudaStream_t stream, double waited_s) {
  if (on_idle_) on_idle_();
  const cudaError_t state = cudaStreamQuery(stream);
  if (state != cudaErrorNotReady) {
    MOE_EP_CUDA_CHECK(state);
    if (ticket != 0 && !has_told(ticket)) {
      throw_if_failed(true);
      throw Error(ErrorKind::kDevice, "rank " + std::to_string(rank_) + ": a dispatch ended without a report");
    }
    return;
  }
  for (std::size_t i = 0; i < watches_.size(); ++i) {
    if (!watches_[i].ended()) continue;
    if (options_.mask_on_timeout) {
      // It leaves the others waiting for nothing, and does not end their work.
      tell_departure(static_cast<int>(i));
      continue;
    }
    // The kernel ends its wait and says how far it was, unless the peer had done its part.
    __atomic_store_n(&report_->abort, 1u, __ATOMIC_RELEASE);
  }
  if (waited_s > options_.timeout_s + kGraceSeconds) {
    throw Error(ErrorKind::kTimeout, "rank " + std::to_string(rank_) + " waited " + std::to_string(waited_s) +
                                         " s for its own GPU, which does not answer");
  }
}

void Communicator::check() {
  if (departed_ || !has_run_) return;
  const DeviceGuard guard(pool_->device());
  auto next_check = Clock::now() + kIdlePeriod;
  while (cudaStreamQuery(last_stream_) == cudaErrorNotReady) {
    std::this_thread::sleep_for(std::chrono::microseconds(20));
    if (Clock::now() < next_check) continue;
    next_check = Clock::now() + kIdlePeriod;
    while_waiting(0, last_stream_, 0.0);
  }
  MOE_EP_CUDA_CHECK(wait_for_queued());
  throw_if_failed(false);
}

void Communicator::throw_if_failed(bool fatal_only) {
  if (load_acquire(&report_->failure_state) != 2) return;
  const ReportedOutcome failure = report_->failure;
  if (is_fatal(static_cast<Outcome>(failure.outcome))) throw_outcome(failure);
  if (fatal_only) return;
  __atomic_store_n(&report_->failure_state, 0u, __ATOMIC_RELEASE);
  throw_outcome(failure);
}

void Communicator::throw_outcome(const ReportedOutcome& reported) {
  const auto outcome = static_cast<Outcome>(reported.outcome);
  const auto operation = static_cast<Operation>(reported.operation);
  const auto* values = reported.values;
  const int rank = static_cast<int>(values[0]);
  const std::string where = std::string(operation_name(operation)) + " " + std::to_string(reported.sequence);
  switch (outcome) {
    case Outcome::kOk: break;
    case Outcome::kNoRoom:
      throw Error(ErrorKind::kCapacity, "rank " + std::to_string(rank) + " has no room for its rows in " + where +
                                            " (" + std::to_string(values[1]) + " bytes)" +
                                            "; raise pool_bytes, hold fewer received tensors, or use "
                                            "backend='collective'");
    case Outcome::kOverflow:
      throw Error(ErrorKind::kCapacity, describe_overflow(rank, values[1], values[2]) + " (" + where + ")");
    case Outcome::kTooMany:
      throw Error(ErrorKind::kCapacity, "rank " + std::to_string(rank) + " would receive " + std::to_string(values[1]) +
                                            " rows, but slots are 32-bit; dispatch fewer tokens at a time");
    case Outcome::kBadRoute:
      throw Error(ErrorKind::kConfig, "rank " + std::to_string(rank) + ": " +
                                          describe_bad_route(values[1], values[3], values[2], group_.num_experts) +
                                          " (" + where + ")");
    case Outcome::kFullSlots:
      throw Error(ErrorKind::kCapacity, describe_full_slots(rank, values[1], values[2]) + " (" + where + ")");
    case Outcome::kOtherRoute:
      throw Error(ErrorKind::kConfig, describe_other_route(values[1], values[3], values[2]) + " (" + where + ")");
    case Outcome::kMasked:
      throw Error(ErrorKind::kLost,
                  "rank " + std::to_string(rank) + " has masked rank " + std::to_string(rank_) + " (" + where + ")");
    case Outcome::kMismatch:
      throw Error(ErrorKind::kMismatch, describe_difference(rank, rank_, reported.sequence,
                                                            compared_field_name(operation, static_cast<int>(values[1])),
                                                            values[2], values[3]));
    case Outcome::kTimeout:
    case Outcome::kLost:
    case Outcome::kAborted: throw_failed_wait(reported);
  }
  throw Error(ErrorKind::kDevice, "an unknown outcome " + std::to_string(reported.outcome) + " of " + where);
}

void Communicator::throw_failed_wait(const ReportedOutcome& reported) {
  const auto outcome = static_cast<Outcome>(reported.outcome);
  const auto* values = reported.values;
  int source = static_cast<int>(values[0]);
  bool ended = watches_[static_cast<std::size_t>(source)].ended();
  if (outcome == Outcome::kAborted) {
    if (departed_) throw Error(ErrorKind::kState, "the buffer was closed while an operation was in flight");
    // The thread that gave up may have waited for another rank than the one that is gone.
    for (std::size_t i = 0; i < watches_.size() && !ended; ++i) {
      if (!watches_[i].ended()) continue;
      source = static_cast<int>(i);
      ended = true;
    }
  }
  const bool timed_out = outcome == Outcome::kTimeout && !ended;
  std::string why = ended ? "its process has ended" : "its process is alive";
  if (outcome == Outcome::kLost && values[3] == 1) why = "it has closed its buffer";
  if (outcome == Outcome::kLost && values[3] != 1) why = "it has failed: " + departure_text(source);
  const FailedWait wait{rank_,
                        source,
                        pids_[static_cast<std::size_t>(source)],
                        static_cast<Step>(values[1]),
                        operation_name(static_cast<Operation>(reported.operation)),
                        reported.sequence,
                        static_cast<std::uint64_t>(values[2]),
                        timed_out,
                        options_.timeout_s};
  throw Error(timed_out ? ErrorKind::kTimeout : ErrorKind::kLost, describe(wait, why));
}

// In the name of a rank that has ended without a word.
void Communicator::tell_departure(int rank) {
  if (has_departed(rank)) return;
  Departure departure{};
  departure.state = kDepartureFailed;
  std::strncpy(departure.text, "its process has ended", kDepartureText - 1);
  std::uint8_t* to = pool_->base() + pool_->layout().departure(static_cast<std::size_t>(rank));
  cudaMemcpyAsync(to + offsetof(Departure, text), departure.text, kDepartureText, cudaMemcpyHostToDevice, control_);
  cudaMemcpyAsync(to, &departure.state, sizeof(departure.state), cudaMemcpyHostToDevice, control_);
  cudaStreamSynchronize(control_);
}

bool Communicator::has_departed(int rank) {
  std::uint32_t state = 0;
  const std::uint8_t* from = pool_->base() + pool_->layout().departure(static_cast<std::size_t>(rank));
  return cudaMemcpyAsync(&state, from, sizeof(state), cudaMemcpyDeviceToHost, control_) == cudaSuccess &&
         cudaStreamSynchronize(control_) == cudaSuccess && state != 0;
}

std::string Communicator::departure_text(int rank) {
  Departure departure{};
  const std::uint8_t* from = pool_->base() + pool_->layout().departure(static_cast<std::size_t>(rank));
  if (cudaMemcpyAsync(&departure, from, sizeof(departure), cudaMemcpyDeviceToHost, control_) != cudaSuccess ||
      cudaStreamSynchronize(control_) != cudaSuccess) {
    return "its reason can't be read";
  }
  return std::string(departure.text, strnlen(departure.text, kDepartureText));
}

void Communicator::depart(std::uint32_t state, const std::string& text) {
  if (departed_.exchange(true)) return;
  const DeviceGuard guard(pool_->device());
  if (state == kDepartureClosed && !awaiting_) {
    // What is queued is finished first, or peers would miss this rank's part in it.
    if (has_run_) wait_for_queued();
  } else {
    __atomic_store_n(&report_->abort, 1u, __ATOMIC_RELEASE);
  }
  Departure departure{};
  departure.state = state;
  std::strncpy(departure.text, text.c_str(), kDepartureText - 1);
  for (int reader = 0; reader < num_ranks(); ++reader) {
    // One that has left may have given its heap back.
    if (reader == rank_ || has_departed(reader)) continue;
    std::uint8_t* to =
        bases_[static_cast<std::size_t>(reader)] + pool_->layout().departure(static_cast<std::size_t>(rank_));
    // The state comes after the text that it announces. Errors can't be told to anyone any more.
    cudaMemcpyAsync(to + offsetof(Departure, text), departure.text, kDepartureText, cudaMemcpyHostToDevice, control_);
    cudaMemcpyAsync(to, &departure.state, sizeof(departure.state), cudaMemcpyHostToDevice, control_);
  }
  cudaStreamSynchronize(control_);
  cudaGetLastError();
}

}  // namespace gpu
}  // namespace moe_ep
