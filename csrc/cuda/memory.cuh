// Memory operations by name, order and scope; the only file with inline PTX, but for a reciprocal in quantize.cuh.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace moe_ep {
namespace gpu {

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
#define MOE_EP_BULK_COPIES 1
#endif

__device__ __forceinline__ void store_relaxed_system(std::uint64_t* at, std::uint64_t value) {
  asm volatile("st.relaxed.sys.global.u64 [%0], %1;" ::"l"(at), "l"(value) : "memory");
}

// For many words at a time; a fence after the last of them acquires.
__device__ __forceinline__ std::uint64_t load_relaxed_system(const std::uint64_t* at) {
  std::uint64_t value;
  asm volatile("ld.relaxed.sys.global.u64 %0, [%1];" : "=l"(value) : "l"(at) : "memory");
  return value;
}

__device__ __forceinline__ std::uint64_t load_acquire_system(const std::uint64_t* at) {
  std::uint64_t value;
  asm volatile("ld.acquire.sys.global.u64 %0, [%1];" : "=l"(value) : "l"(at) : "memory");
  return value;
}

__device__ __forceinline__ std::uint32_t load_acquire_system(const std::uint32_t* at) {
  std::uint32_t value;
  asm volatile("ld.acquire.sys.global.u32 %0, [%1];" : "=r"(value) : "l"(at) : "memory");
  return value;
}

__device__ __forceinline__ std::uint32_t load_acquire_device(const std::uint32_t* at) {
  std::uint32_t value;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(at) : "memory");
  return value;
}

__device__ __forceinline__ void store_relaxed_device(std::uint32_t* at, std::uint32_t value) {
  asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" ::"l"(at), "r"(value) : "memory");
}

__device__ __forceinline__ void store_relaxed_device(std::uint64_t* at, std::uint64_t value) {
  asm volatile("st.relaxed.gpu.global.u64 [%0], %1;" ::"l"(at), "l"(value) : "memory");
}

__device__ __forceinline__ std::uint64_t load_relaxed_device(const std::uint64_t* at) {
  std::uint64_t value;
  asm volatile("ld.relaxed.gpu.global.u64 %0, [%1];" : "=l"(value) : "l"(at) : "memory");
  return value;
}

__device__ __forceinline__ std::uint32_t load_relaxed_device(const std::uint32_t* at) {
  std::uint32_t value;
  asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(at) : "memory");
  return value;
}

// Between what this thread knows of (its block's writes too, after a barrier) and its next stores, and between its
// last loads and what follows. Each costs about a microsecond after many writes, so there is one a signal.
__device__ __forceinline__ void fence_system() { asm volatile("fence.acq_rel.sys;" ::: "memory"); }
__device__ __forceinline__ void fence_device() { asm volatile("fence.acq_rel.gpu;" ::: "memory"); }

// Past the L1 cache, which another GPU's writes do not reach.
__device__ __forceinline__ std::int64_t load_cached_in_l2(const std::int64_t* at) {
  return static_cast<std::int64_t>(__ldcg(reinterpret_cast<const long long*>(at)));
}
__device__ __forceinline__ std::int32_t load_cached_in_l2(const std::int32_t* at) { return __ldcg(at); }
__device__ __forceinline__ float load_cached_in_l2(const float* at) { return __ldcg(at); }
__device__ __forceinline__ std::uint32_t load_cached_in_l2(const std::uint32_t* at) { return __ldcg(at); }
__device__ __forceinline__ uint4 load_cached_in_l2(const uint4* at) { return __ldcg(at); }

// Until what the stream has queued before this kernel is over: a kernel may have begun earlier, see launch_early().
__device__ __forceinline__ void wait_for_stream() {
#if defined(MOE_EP_BULK_COPIES)
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// The kernel that comes next in the stream may begin, as far as it calls wait_for_stream() later; once for all blocks.
__device__ __forceinline__ void let_next_begin() {
#if defined(MOE_EP_BULK_COPIES)
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// A barrier of some warps of a block; __syncthreads is number 0.
__device__ __forceinline__ void sync_some(int number, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(number), "r"(threads) : "memory");
}

__device__ __forceinline__ void prefetch_to_l2(const void* at) { asm volatile("prefetch.global.L2 [%0];" ::"l"(at)); }

__device__ __forceinline__ std::uint64_t nanoseconds() {
  std::uint64_t value;
  asm volatile("mov.u64 %0, %globaltimer;" : "=l"(value));
  return value;
}

// Vectors that are read once: they need not stay in L1.
__device__ __forceinline__ uint4 load_streaming(const uint4* at) { return __ldcs(at); }
__device__ __forceinline__ void store_streaming(uint4* at, const uint4& value) { __stcs(at, value); }

// Small values beside rows, a few bytes of a cache line at a time: the line is to stay in L2 until its other values
// have come, or memory would have to read it and write it for each.
__device__ __forceinline__ void store_gathered(float* at, float value) {
  std::uint64_t policy;
  asm volatile("createpolicy.fractional.L2::evict_last.b64 %0, 1.0;" : "=l"(policy));
  asm volatile("st.global.L2::cache_hint.f32 [%0], %1, %2;" ::"l"(at), "f"(value), "l"(policy) : "memory");
}
__device__ __forceinline__ void store_gathered(std::int64_t* at, std::int64_t value) {
  std::uint64_t policy;
  asm volatile("createpolicy.fractional.L2::evict_last.b64 %0, 1.0;" : "=l"(policy));
  asm volatile("st.global.L2::cache_hint.b64 [%0], %1, %2;" ::"l"(at), "l"(value), "l"(policy) : "memory");
}

__device__ __forceinline__ std::uint32_t shared_address(const void* at) {
  return static_cast<std::uint32_t>(__cvta_generic_to_shared(at));
}

// Words that others write meanwhile, into shared memory without waiting for them; past the L1 cache. Both addresses are
// multiples of 16 bytes.
__device__ __forceinline__ void copy_two_words(std::uint64_t* to_shared, const std::uint64_t* from_global) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(to_shared)), "l"(from_global)
               : "memory");
}
// Until this thread's have come.
__device__ __forceinline__ void wait_for_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// Bulk asynchronous copies: addresses and sizes are multiples of 16 bytes. One thread starts a copy.

__device__ __forceinline__ void barrier_init(std::uint64_t* barrier, std::uint32_t arrivals) {
#if defined(MOE_EP_BULK_COPIES)
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
#endif
}

// Makes initialised barriers visible to the copy engine.
__device__ __forceinline__ void fence_barrier_init() {
#if defined(MOE_EP_BULK_COPIES)
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
}

// The one arrival of a phase, which then ends when `bytes` have been copied.
__device__ __forceinline__ void barrier_arrive_expect(std::uint64_t* barrier, std::uint32_t bytes) {
#if defined(MOE_EP_BULK_COPIES)
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
#endif
}

__device__ __forceinline__ void barrier_wait(std::uint64_t* barrier, std::uint32_t parity) {
#if defined(MOE_EP_BULK_COPIES)
  std::uint32_t done = 0;
  while (done == 0) {
    asm volatile(
        "{\n"
        ".reg .pred p;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
        "selp.u32 %0, 1, 0, p;\n"
        "}\n"
        : "=r"(done)
        : "r"(shared_address(barrier)), "r"(parity)
        : "memory");
  }
#endif
}

__device__ __forceinline__ void bulk_load(void* to_shared, const void* from_global, std::uint32_t bytes,
                                          std::uint64_t* barrier) {
#if defined(MOE_EP_BULK_COPIES)
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                   shared_address(to_shared)),
               "l"(from_global), "r"(bytes), "r"(shared_address(barrier))
               : "memory");
#endif
}

// The same, for what is read once: its lines are the first to leave L2.
__device__ __forceinline__ void bulk_load_once(void* to_shared, const void* from_global, std::uint32_t bytes,
                                               std::uint64_t* barrier) {
#if defined(MOE_EP_BULK_COPIES)
  std::uint64_t policy;
  asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;" ::
          "r"(shared_address(to_shared)),
      "l"(from_global), "r"(bytes), "r"(shared_address(barrier)), "l"(policy)
      : "memory");
#endif
}

// A copy that will come soon: its lines are brought into L2.
__device__ __forceinline__ void bulk_prefetch(const void* from_global, std::uint32_t bytes) {
#if defined(MOE_EP_BULK_COPIES)
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(from_global), "r"(bytes) : "memory");
#endif
}

// What is stored is not read here again: its lines are the first to leave L2.
__device__ __forceinline__ void bulk_store(void* to_global, const void* from_shared, std::uint32_t bytes) {
#if defined(MOE_EP_BULK_COPIES)
  std::uint64_t policy;
  asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group.L2::cache_hint [%0], [%1], %2, %3;" ::"l"(to_global),
               "r"(shared_address(from_shared)), "r"(bytes), "l"(policy)
               : "memory");
#endif
}

// The same, for what is read soon: its lines stay in L2 as others do.
__device__ __forceinline__ void bulk_store_kept(void* to_global, const void* from_shared, std::uint32_t bytes) {
#if defined(MOE_EP_BULK_COPIES)
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(to_global),
               "r"(shared_address(from_shared)), "r"(bytes)
               : "memory");
#endif
}

__device__ __forceinline__ void bulk_commit() {
#if defined(MOE_EP_BULK_COPIES)
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
#endif
}

// Until at most `kPending` of this thread's groups of stores still read shared memory.
template <int kPending>
__device__ __forceinline__ void bulk_wait_read() {
#if defined(MOE_EP_BULK_COPIES)
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kPending) : "memory");
#endif
}

// Until all but the last `kPending` of this thread's groups of stores have been written.
template <int kPending>
__device__ __forceinline__ void bulk_wait_written() {
#if defined(MOE_EP_BULK_COPIES)
  asm volatile("cp.async.bulk.wait_group %0;" ::"n"(kPending) : "memory");
#endif
}

// Between ordinary accesses to shared memory and the copy engine's.
__device__ __forceinline__ void fence_shared_to_bulk() {
#if defined(MOE_EP_BULK_COPIES)
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

// Between the copy engine's accesses to global memory and ordinary ones.
__device__ __forceinline__ void fence_bulk_to_global() {
#if defined(MOE_EP_BULK_COPIES)
  asm volatile("fence.proxy.async.global;" ::: "memory");
#endif
}

}  // namespace gpu
}  // namespace moe_ep
