// The machine instructions that the kernels use, one function each. tests/ptx runs what
// nvcc makes of them on a CPU.
#pragma once

#include <cstdint>

#define PSM_DEVICE __device__ __forceinline__

namespace psm::cuda {

struct BFloat16 {
    uint16_t bits;
};
struct Float16 {
    uint16_t bits;
};
struct alignas(16) Chunk {  // what one copy instruction moves
    uint32_t word[4];
};

template <class T>
constexpr bool kIsBFloat16 = false;
template <>
inline constexpr bool kIsBFloat16<BFloat16> = true;

PSM_DEVICE int thread_index() { return threadIdx.x; }
PSM_DEVICE int block_index() { return blockIdx.x; }
PSM_DEVICE int grid_size() { return gridDim.x; }
PSM_DEVICE int block_size() { return blockDim.x; }

// --- numbers ---

PSM_DEVICE float exp2_fast(float x) {  // 2 ulp, subnormal results become 0
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
PSM_DEVICE float exp2_subnormal(float x) {
    float y;
    asm("ex2.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
PSM_DEVICE uint32_t float_bits(float x) { return __float_as_uint(x); }
PSM_DEVICE float bits_float(uint32_t x) { return __uint_as_float(x); }
PSM_DEVICE double square_root(double x) { return __dsqrt_rn(x); }
PSM_DEVICE uint32_t to_uint32(float x) {  // truncates, saturates, NaN gives 0
    uint32_t y;
    asm("cvt.rzi.u32.f32 %0, %1;" : "=r"(y) : "f"(x));
    return y;
}
// floor(min(p, cap) 2^32). The exponent is raised and the cap taken in one integer instruction of
// sm_90; positive floats compare as integers, and NaN, then a negative one, gives 0.
PSM_DEVICE uint32_t scaled_threshold(float p, float cap) {
    constexpr int kExponent32 = 32 << 23;
    return to_uint32(bits_float(__viaddmin_s32(float_bits(p), kExponent32,
                                               float_bits(cap) + kExponent32)));
}
// x and one more kept if word < threshold, else -inf. By hand: the compiler adds a move per count.
PSM_DEVICE void keep_below(uint32_t word, uint32_t threshold, float& x, int& kept) {
    asm("{\n"
        ".reg .pred keep;\n"
        "setp.lt.u32 keep, %2, %3;\n"
        "@keep add.s32 %1, %1, 1;\n"
        "selp.f32 %0, %0, 0fFF800000, keep;\n"
        "}"
        : "+f"(x), "+r"(kept)
        : "r"(word), "r"(threshold));
}
PSM_DEVICE int bits_set(uint64_t x) { return __popcll(x); }
PSM_DEVICE int first_bit(uint32_t x) { return __ffs(int(x)) - 1; }
PSM_DEVICE int max_of_three(int x, int y, int z) { return __vimax3_s32(x, y, z); }  // 1 on sm_90
PSM_DEVICE float to_float(float x) { return x; }
PSM_DEVICE float to_float(BFloat16 x) { return __uint_as_float(uint32_t(x.bits) << 16); }
PSM_DEVICE float to_float(Float16 x) {
    float y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
    return y;
}
template <class T>
PSM_DEVICE uint32_t pack(float low, float high) {
    uint32_t y;
    if constexpr (kIsBFloat16<T>) {
        asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
    } else {
        asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
    }
    return y;
}

// --- threads of a warp and of a block ---

template <class V>
PSM_DEVICE V shuffle_xor(V x, int mask) {
    return __shfl_xor_sync(0xFFFFFFFFu, x, mask);
}
template <class V>
PSM_DEVICE V shuffle_down(V x, int delta) {
    return __shfl_down_sync(0xFFFFFFFFu, x, delta);
}
template <class V>
PSM_DEVICE V shuffle_from(V x, int lane) {
    return __shfl_sync(0xFFFFFFFFu, x, lane);
}
PSM_DEVICE uint32_t warp_uniform(uint32_t x) { return __shfl_sync(0xFFFFFFFFu, x, 0); }
// x, the same in the whole warp, in a uniform register, where it stays: the assembler does not know
// that threadIdx.y is 0, so that it can neither make x again nor share it with another `copy`.
PSM_DEVICE uint32_t keep_uniform(uint32_t x, int copy = 1) {
    return warp_uniform(x + threadIdx.y * copy);
}
PSM_DEVICE bool warp_any(bool x) { return __any_sync(0xFFFFFFFFu, x); }
PSM_DEVICE uint32_t warp_ballot(bool x) { return __ballot_sync(0xFFFFFFFFu, x); }
PSM_DEVICE void warp_sync() { __syncwarp(); }
PSM_DEVICE void block_sync() { __syncthreads(); }
// A barrier for some of the block's warps: who syncs waits until `threads` have come, who arrives
// goes on at once.
PSM_DEVICE void named_sync(int barrier, int threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}
PSM_DEVICE void named_arrive(int barrier, int threads) {
    asm volatile("bar.arrive %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}
// Ends the kernel. The host finds `what` at `place`, all of one thread: many may end at once.
PSM_DEVICE void end_with_error(void* place, Chunk what) {
    asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(place), "r"(what.word[0]),
                 "r"(what.word[1]), "r"(what.word[2]), "r"(what.word[3])
                 : "memory");
    __threadfence_system();
    __trap();
}
PSM_DEVICE int atomic_add(int* address, int value) { return atomicAdd(address, value); }
PSM_DEVICE int atomic_exchange(int* address, int value) { return atomicExch(address, value); }
// How many were counted before the caller, who sees what they stored before.
PSM_DEVICE int count_in(int* counter) {
    __threadfence();
    const int before = atomicAdd(counter, 1);
    __threadfence();
    return before;
}
PSM_DEVICE void atomic_or(uint32_t* address, uint32_t value) { atomicOr(address, value); }

// --- shared memory and asynchronous copies of sm_80 ---

PSM_DEVICE uint32_t shared_address(const void* p) { return uint32_t(__cvta_generic_to_shared(p)); }
PSM_DEVICE void store_shared(uint32_t address, Chunk x) {
    asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(x.word[0]),
                 "r"(x.word[1]), "r"(x.word[2]), "r"(x.word[3])
                 : "memory");
}
// 16 bytes, of which the first `bytes` are read and the rest are zero.
PSM_DEVICE void copy_async(uint32_t address, const void* source, int bytes) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(source),
                 "r"(bytes)
                 : "memory");
}
PSM_DEVICE void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kLeft>
PSM_DEVICE void copy_wait() {  // until at most kLeft groups of this thread are under way
    asm volatile("cp.async.wait_group %0;" ::"n"(kLeft) : "memory");
}

// --- tensor cores of sm_80 ---

// Four 8x8 matrices of 16-bit elements; lane l gives the address of row l % 8 of matrix l / 8.
PSM_DEVICE void load_matrices(uint32_t (&x)[4], uint32_t address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
                 : "r"(address)
                 : "memory");
}
PSM_DEVICE void load_matrices_transposed(uint32_t (&x)[4], uint32_t address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
                 : "r"(address)
                 : "memory");
}
// d (16, 8) += a (16, 16) b (16, 8)
template <class T>
PSM_DEVICE void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    if constexpr (kIsBFloat16<T>) {
        asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
            "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    } else {
        asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
            "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    }
}

}  // namespace psm::cuda
