// Instructions that sm_90a adds: mbarriers, bulk tensor copies (TMA), warpgroup products (wgmma).
#pragma once

#include "../common/primitives.cuh"

namespace psm::cuda {

// What cuTensorMapEncodeTiled writes, 128 opaque bytes.
struct alignas(64) TensorMap {
    uint64_t opaque[16];
};
struct TensorMaps {
    TensorMap query, bank;
};

// Descriptor of a 16-bit operand in shared memory, 128-byte swizzle, 1024-byte aligned atoms of
// 8 x 128 bytes. K-major (similarities: columns are summed over): `stride` between groups of 8
// rows, `leading` unused. MN-major (P . M: slots are summed over): `leading` between panels of 64
// columns, `stride` between groups of 8 slots (PTX ISA, "Matrix descriptor"; CUTLASS,
// mma_traits_sm90_gmma.hpp). Distances in it count 16 bytes.
//
// wgmma takes both descriptors from four neighbouring uniform registers. Halves that the assembler
// can make from a constant, or outside the loop, it copies there for every product: 4 issue slots
// instead of 2. So keep_uniform() and hide().
constexpr uint32_t kUnit = 16;
struct Descriptor {
    uint32_t low, high;
    PSM_DEVICE uint64_t at(uint32_t bytes) const {
        return uint64_t(high) << 32 | (low + bytes / kUnit);
    }
    PSM_DEVICE Descriptor moved(uint32_t units) const { return {low + units, high}; }
};
PSM_DEVICE Descriptor descriptor(uint32_t address, uint32_t leading, uint32_t stride) {
    return {address / kUnit | leading / kUnit << 16, stride / kUnit | 1u << 30};  // 1: 128 bytes
}
PSM_DEVICE Descriptor keep_uniform(Descriptor x, int copy) {
    return {keep_uniform(x.low, copy), keep_uniform(x.high, copy)};
}

// --- mbarriers ---

PSM_DEVICE void mbarrier_init(uint32_t barrier, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals)
                 : "memory");
}
PSM_DEVICE void mbarrier_arrive(uint32_t barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
PSM_DEVICE void mbarrier_arrive_expect(uint32_t barrier, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
                 : "memory");
}
// Is the phase of this parity complete? Waits a while for it.
PSM_DEVICE bool mbarrier_done(uint32_t barrier, uint32_t parity) {
    uint32_t done;
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%1], %2;\n"
        "selp.u32 %0, 1, 0, done;\n"
        "}"
        : "=r"(done)
        : "r"(barrier), "r"(parity)
        : "memory");
    return done != 0;
}
PSM_DEVICE uint32_t nanoseconds() {  // modulo 4.3 seconds
    uint64_t now;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
    return uint32_t(now);
}
// Until the phase of this parity is complete.
PSM_DEVICE void mbarrier_wait(uint32_t barrier, uint32_t parity) {
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "again:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@!done bra again;\n"
        "}" ::"r"(barrier),
        "r"(parity)
        : "memory");
}
// Orders this thread's ordinary shared-memory accesses before later ones of TMA and wgmma.
PSM_DEVICE void fence_proxy_async() {
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// --- bulk tensor copies ---

// The box at (column, row); what lies outside the matrix becomes zero.
PSM_DEVICE void tma_load(uint32_t target, const TensorMap* map, uint32_t barrier, int column,
                         int row) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes "
        "[%0], [%1, {%3, %4}], [%2];" ::"r"(target),
        "l"(map), "r"(barrier), "r"(column), "r"(row)
        : "memory");
}

// --- warpgroups ---

// Keeps the compiler from making the descriptor before the loop, see Descriptor.
PSM_DEVICE void hide(Descriptor& descriptor) { asm volatile("" : "+r"(descriptor.low)); }

template <int kRegisters>
PSM_DEVICE void take_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
PSM_DEVICE void give_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
PSM_DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
PSM_DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int kLeft>
PSM_DEVICE void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kLeft) : "memory");
}
// Keeps the compiler from moving uses of accumulators across the fences and waits around it.
template <int kTiles>
PSM_DEVICE void hold_accumulators(float (&d)[kTiles][4]) {
#pragma unroll
    for (int n = 0; n < kTiles; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) asm volatile("" : "+f"(d[n][i])::"memory");
}
// The same for A operands in registers: made before the fence, and not made anew before the wait.
template <int kSteps>
PSM_DEVICE void hold_operands(uint32_t (&a)[kSteps][4]) {
#pragma unroll
    for (int n = 0; n < kSteps; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) asm volatile("" : "+r"(a[n][i])::"memory");
}

#define PSM_D1(n) "+f"(d[n][0]), "+f"(d[n][1]), "+f"(d[n][2]), "+f"(d[n][3])
#define PSM_D8(n)                                                                            \
    PSM_D1(n), PSM_D1(n + 1), PSM_D1(n + 2), PSM_D1(n + 3), PSM_D1(n + 4), PSM_D1(n + 5),    \
        PSM_D1(n + 6), PSM_D1(n + 7)
#define PSM_D16(n) PSM_D8(n), PSM_D8(n + 8)
#define PSM_D32(n) PSM_D16(n), PSM_D16(n + 16)
#define PSM_R32                                                                              \
    "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, " \
    "%19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define PSM_R64                                                                              \
    PSM_R32                                                                                  \
    ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, "\
    "%49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define PSM_R128                                                                             \
    PSM_R64                                                                                  \
    ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, "\
    "%81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, %96, %97, "  \
    "%98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, "     \
    "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, "   \
    "%126, %127"

// D = A B (+ D), A and B by descriptors, both K-major
#define PSM_WGMMA_SS(N, TYPE, REGS, OUT, A, B, P)                                            \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " P ", 0;\n"                              \
                 "wgmma.mma_async.sync.aligned.m64n" N "k16.f32." TYPE "." TYPE " " REGS     \
                 "}, " A ", " B ", p, 1, 1, 0, 0;\n}"                                        \
                 : OUT                                                                       \
                 : "l"(a), "l"(b), "r"(int(accumulate)))
// D += A B, A from registers, B by an MN-major descriptor
#define PSM_WGMMA_RS(N, TYPE, REGS, OUT, A0, A1, A2, A3, B)                                  \
    asm volatile("wgmma.mma_async.sync.aligned.m64n" N "k16.f32." TYPE "." TYPE " " REGS     \
                 "}, {" A0 ", " A1 ", " A2 ", " A3 "}, " B ", 1, 1, 1, 1;"                   \
                 : OUT                                                                       \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b))
#define PSM_WGMMA_SIZES(FORM, TYPE)                                                          \
    if constexpr (kTiles == 8) {                                                             \
        FORM##_64(TYPE);                                                                     \
    } else if constexpr (kTiles == 16) {                                                     \
        FORM##_128(TYPE);                                                                    \
    } else {                                                                                 \
        static_assert(kTiles == 32);                                                         \
        FORM##_256(TYPE);                                                                    \
    }
#define PSM_SS_64(TYPE) PSM_WGMMA_SS("64", TYPE, PSM_R32, PSM_D8(0), "%32", "%33", "%34")
#define PSM_SS_128(TYPE) PSM_WGMMA_SS("128", TYPE, PSM_R64, PSM_D16(0), "%64", "%65", "%66")
#define PSM_SS_256(TYPE) PSM_WGMMA_SS("256", TYPE, PSM_R128, PSM_D32(0), "%128", "%129", "%130")
#define PSM_RS_64(TYPE) \
    PSM_WGMMA_RS("64", TYPE, PSM_R32, PSM_D8(0), "%32", "%33", "%34", "%35", "%36")
#define PSM_RS_128(TYPE) \
    PSM_WGMMA_RS("128", TYPE, PSM_R64, PSM_D16(0), "%64", "%65", "%66", "%67", "%68")
#define PSM_RS_256(TYPE) \
    PSM_WGMMA_RS("256", TYPE, PSM_R128, PSM_D32(0), "%128", "%129", "%130", "%131", "%132")

template <class T, int kTiles>
PSM_DEVICE void wgmma(float (&d)[kTiles][4], uint64_t a, uint64_t b, bool accumulate) {
    if constexpr (kIsBFloat16<T>) {
        PSM_WGMMA_SIZES(PSM_SS, "bf16")
    } else {
        PSM_WGMMA_SIZES(PSM_SS, "f16")
    }
}
template <class T, int kTiles>
PSM_DEVICE void wgmma_transposed(float (&d)[kTiles][4], const uint32_t (&a)[4], uint64_t b) {
    if constexpr (kIsBFloat16<T>) {
        PSM_WGMMA_SIZES(PSM_RS, "bf16")
    } else {
        PSM_WGMMA_SIZES(PSM_RS, "f16")
    }
}

}  // namespace psm::cuda
