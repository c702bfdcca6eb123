// Host versions of primitives.cuh, on emulator.h: fragment layouts, swizzle, descriptors and
// barriers as the PTX ISA describes them.
#pragma once

#include <algorithm>
#include <cmath>

#include "emulator.h"

namespace psm::cuda {

using emulator::Block;

inline int thread_index() { return Block::get().current; }
inline int block_index() { return Block::get().index; }
inline int grid_size() { return Block::get().grid; }
inline int block_size() { return Block::get().threads; }

// --- numbers ---

inline uint32_t float_bits(float x) {
    uint32_t y;
    std::memcpy(&y, &x, 4);
    return y;
}
inline float bits_float(uint32_t x) {
    float y;
    std::memcpy(&y, &x, 4);
    return y;
}
inline float exp2_subnormal(float x) { return std::exp2(x); }
inline float exp2_fast(float x) {
    const float y = std::exp2(x);
    return y < 1.1754944e-38f ? 0.0f : y;  // as .ftz; NaN stays
}
inline uint32_t to_uint32(float x) {
    if (!(x > 0)) return 0;
    return x >= 4294967296.0f ? 0xFFFFFFFFu : uint32_t(x);
}
inline uint32_t scaled_threshold(float p, float cap) {
    const uint32_t exponent32 = 32u << 23;
    const auto sum = int32_t(float_bits(p) + exponent32);  // wraps, as on the device
    return to_uint32(bits_float(uint32_t(std::min(sum, int32_t(float_bits(cap) + exponent32)))));
}
inline void keep_below(uint32_t word, uint32_t threshold, float& x, int& kept) {
    kept += word < threshold;
    x = word < threshold ? x : -INFINITY;
}
inline int max_of_three(int x, int y, int z) { return std::max(x, std::max(y, z)); }
inline float to_float(float x) { return x; }
inline float to_float(BFloat16 x) { return bits_float(uint32_t(x.bits) << 16); }
inline float to_float(Float16 x) {
    const int exponent = x.bits >> 10 & 31, mantissa = x.bits & 1023;
    float y = std::ldexp(float(mantissa), -24);
    if (exponent == 31) {
        y = mantissa ? NAN : INFINITY;
    } else if (exponent > 0) {
        y = std::ldexp(float(mantissa + 1024), exponent - 25);
    }
    return x.bits & 0x8000 ? -y : y;
}
inline uint16_t round_bfloat16(float x) {
    const uint32_t bits = float_bits(x);
    if (std::isnan(x)) return 0x7FFF;
    return uint16_t((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}
inline uint16_t round_float16(float x) {
    const uint16_t sign = std::signbit(x) ? 0x8000 : 0;
    if (std::isnan(x)) return 0x7FFF;
    const float magnitude = std::fabs(x);
    if (magnitude >= 65520.0f) return sign | 0x7C00;
    if (magnitude == 0) return sign;
    int exponent;
    std::frexp(magnitude, &exponent);
    const int shift = std::max(exponent - 11, -24);  // of the last mantissa bit
    const auto units = uint32_t(std::nearbyint(std::ldexp(magnitude, -shift)));
    if (shift == -24) return sign | uint16_t(units);  // subnormal, or 1024 = the smallest normal
    return sign | uint16_t(((shift + 25) << 10) + units - 1024);
}
template <class T>
inline uint32_t pack(float low, float high) {
    const auto round = kIsBFloat16<T> ? round_bfloat16 : round_float16;
    return uint32_t(round(low)) | uint32_t(round(high)) << 16;
}
template <class T>
inline float half_of(uint32_t packed, int high) {
    return to_float(T{uint16_t(high ? packed >> 16 : packed & 0xFFFF)});
}

// --- threads of a warp and of a block ---

template <class Work>
inline void warp_collective(const void* what, void* argument, Work work) {
    Block& block = Block::get();
    const int lane = block.current % emulator::kWarpSize;
    block.collective(block.warp[block.current / emulator::kWarpSize], lane, emulator::kWarpSize,
                     what, argument, work);
}
template <class V, class Source>
inline V shuffle(V x, const void* what, Source source) {
    struct Slot {
        V in, out;
        int from;
    } slot{x, x, source(Block::get().current % 32)};
    warp_collective(what, &slot, [](std::vector<void*>& all) {
        for (void* p : all) {
            auto& mine = *static_cast<Slot*>(p);
            if (mine.from < 32) mine.out = static_cast<Slot*>(all[mine.from])->in;
        }
    });
    return slot.out;
}
template <class V>
inline V shuffle_from(V x, int lane) {
    static const char tag = 0;
    return shuffle(x, &tag, [lane](int) { return lane; });
}
template <class V>
inline V shuffle_xor(V x, int mask) {
    static const char tag = 0;
    return shuffle(x, &tag, [mask](int lane) { return lane ^ mask; });
}
template <class V>
inline V shuffle_down(V x, int delta) {
    static const char tag = 0;
    return shuffle(x, &tag, [delta](int lane) { return lane + delta; });
}
inline uint32_t warp_uniform(uint32_t x) {
    static const char tag = 0;
    return shuffle(x, &tag, [](int) { return 0; });
}
inline uint32_t keep_uniform(uint32_t x, int = 1) { return x; }
inline bool warp_any(bool x) {
    static const char tag = 0;
    struct Slot {
        bool in, out;
    } slot{x, false};
    warp_collective(&tag, &slot, [](std::vector<void*>& all) {
        bool any = false;
        for (void* p : all) any |= static_cast<Slot*>(p)->in;
        for (void* p : all) static_cast<Slot*>(p)->out = any;
    });
    return slot.out;
}
inline void warp_sync() {
    static const char tag = 0;
    warp_collective(&tag, nullptr, [](std::vector<void*>&) {});
}
inline void block_sync() {
    static const char tag = 0;
    Block& block = Block::get();
    block.collective(block.barrier, block.barrier.arrived, block.threads, &tag, nullptr,
                     [](std::vector<void*>&) {});
}
inline int atomic_add(int* address, int value) {
    const int old = *address;
    *address += value;
    return old;
}
inline void fence_device() {}
inline float square_root(float x) { return std::sqrt(x); }

// --- shared memory and asynchronous copies of sm_80 ---

inline uint32_t shared_address(const void* p) {
    return uint32_t(static_cast<const char*>(p) - Block::get().shared) + emulator::kSharedStart;
}
inline void store_shared(uint32_t address, Chunk x) {
    Block& block = Block::get();
    std::memcpy(block.at(address, 16), &x, 16);
    const uint32_t unit = (address - emulator::kSharedStart) / 16;
    ++block.unfenced[unit];
    block.self().unfenced.push_back(unit);
}
inline void copy_async(uint32_t address, const void* source, int bytes) {
    Block& block = Block::get();
    if (address % 16 || reinterpret_cast<uintptr_t>(source) % 16) block.fail("misaligned cp.async");
    block.self().copies.push_back({block.at(address, 16), source, bytes});
}
inline void copy_commit() {
    auto& self = Block::get().self();
    self.copy_groups.push_back(std::move(self.copies));
    self.copies.clear();
}
template <int kLeft>
inline void copy_wait() {
    auto& groups = Block::get().self().copy_groups;
    while (int(groups.size()) > kLeft) {
        for (const auto& copy : groups.front()) {
            std::memset(copy.target, 0, 16);
            if (copy.bytes) std::memcpy(copy.target, copy.source, copy.bytes);
        }
        groups.erase(groups.begin());
    }
}

// --- tensor cores of sm_80 ---

template <bool kTransposed>
inline void load_matrices_as(uint32_t (&x)[4], uint32_t address, const void* tag) {
    struct Slot {
        uint32_t address;
        uint32_t* x;
    } slot{address, x};
    warp_collective(tag, &slot, [](std::vector<void*>& all) {
        Block& block = Block::get();
        for (int lane = 0; lane < 32; ++lane) {
            for (int matrix = 0; matrix < 4; ++matrix) {
                uint16_t two[2];
                for (int half = 0; half < 2; ++half) {
                    const int major = lane / 4, minor = 2 * (lane % 4) + half;
                    const int row = kTransposed ? minor : major;
                    const int column = kTransposed ? major : minor;
                    const uint32_t start = static_cast<Slot*>(all[8 * matrix + row])->address;
                    if (start % 16) block.fail("misaligned ldmatrix");
                    std::memcpy(&two[half], block.at(start, 16) + 2 * column, 2);
                }
                static_cast<Slot*>(all[lane])->x[matrix] = two[0] | uint32_t(two[1]) << 16;
            }
        }
    });
}
inline void load_matrices(uint32_t (&x)[4], uint32_t address) {
    static const char tag = 0;
    load_matrices_as<false>(x, address, &tag);
}
inline void load_matrices_transposed(uint32_t (&x)[4], uint32_t address) {
    static const char tag = 0;
    load_matrices_as<true>(x, address, &tag);
}
template <class T>
inline void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    static const char tag = 0;
    struct Slot {
        float* d;
        const uint32_t* a;
        uint32_t b[2];
    } slot{d, a, {b0, b1}};
    warp_collective(&tag, &slot, [](std::vector<void*>& all) {
        float a[16][16], b[16][8];
        for (int lane = 0; lane < 32; ++lane) {  // PTX ISA, "Matrix fragments for mma.m16n8k16"
            const auto& in = *static_cast<Slot*>(all[lane]);
            const int group = lane / 4, quad = 2 * (lane % 4);
            for (int i = 0; i < 8; ++i) {
                const int row = group + 8 * (i / 2 % 2), column = quad + i % 2 + 8 * (i / 4);
                a[row][column] = half_of<T>(in.a[i / 2], i % 2);
            }
            for (int i = 0; i < 4; ++i)
                b[quad + i % 2 + 8 * (i / 2)][group] = half_of<T>(in.b[i / 2], i % 2);
        }
        for (int lane = 0; lane < 32; ++lane) {
            const auto& out = *static_cast<Slot*>(all[lane]);
            for (int i = 0; i < 4; ++i) {
                const int row = lane / 4 + 8 * (i / 2), column = 2 * (lane % 4) + i % 2;
                float sum = out.d[i];
                for (int k = 0; k < 16; ++k) sum += a[row][k] * b[k][column];
                out.d[i] = sum;
            }
        }
    });
}

}  // namespace psm::cuda
