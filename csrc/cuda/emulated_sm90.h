// Host versions of primitives_sm90.cuh. Products run when a warpgroup waits for them, and until
// then their accumulators read as NaN; bulk copies run at a random moment.
#pragma once

#include <array>

#include "emulated_primitives.h"

namespace psm::emulator {

struct Product {
    bool a_in_registers, b_transposed, accumulate;
    uint64_t a, b;
    uint32_t fragment[4];
    const uint32_t* fragment_at;
    float* d;
    int columns;
    float (*value)(uint16_t);
    std::shared_ptr<std::vector<float>> held;  // what `d` holds, while the kernel sees NaN
};

}  // namespace psm::emulator

namespace psm::cuda {

// --- mbarriers ---

inline emulator::Mbarrier& mbarrier_at(uint32_t barrier) {
    Block& block = Block::get();
    const auto found = block.mbarrier.find(barrier);
    if (found == block.mbarrier.end()) block.fail("mbarrier used before its init");
    return found->second;
}
inline void mbarrier_settle(emulator::Mbarrier& barrier) {
    ++Block::get().progress;
    if (barrier.pending > 0 || barrier.bytes != 0) return;
    barrier.phase ^= 1;
    barrier.pending = barrier.expected;
}
inline void mbarrier_init(uint32_t barrier, int arrivals) {
    if (barrier % 8) Block::get().fail("misaligned mbarrier");
    Block::get().at(barrier, 8);
    Block::get().mbarrier[barrier] = {arrivals, arrivals, 0, 0};
}
inline void mbarrier_arrive_expect(uint32_t barrier, int bytes) {
    auto& at = mbarrier_at(barrier);
    if (at.pending == 0) Block::get().fail("more arrivals than an mbarrier expects");
    --at.pending;
    at.bytes += bytes;
    mbarrier_settle(at);
}
inline void mbarrier_arrive(uint32_t barrier) { mbarrier_arrive_expect(barrier, 0); }
inline void mbarrier_wait(uint32_t barrier, uint32_t parity) {
    while (uint32_t(mbarrier_at(barrier).phase) == parity) Block::get().yield();
}
inline void fence_proxy_async() {
    Block& block = Block::get();
    for (uint32_t unit : block.self().unfenced) --block.unfenced[unit];
    block.self().unfenced.clear();
}

// --- bulk tensor copies of 16-bit elements, boxes 64 columns wide ---

inline TensorMap emulated_map(const void* base, int64_t rows, int64_t columns, int box_rows) {
    return {{reinterpret_cast<uintptr_t>(base), uint64_t(rows), uint64_t(columns),
             uint64_t(box_rows)}};
}
inline void tma_load(uint32_t target, const TensorMap* map, uint32_t barrier, int column, int row) {
    Block& block = Block::get();
    if (target % 1024) block.fail("a swizzled box must start at a multiple of 1024 bytes");
    block.bulk_copies.push_back([=, &block] {
        const auto* base = reinterpret_cast<const uint16_t*>(map->opaque[0]);
        const auto rows = int64_t(map->opaque[1]), columns = int64_t(map->opaque[2]);
        const int box_rows = int(map->opaque[3]);
        for (int r = 0; r < box_rows; ++r) {
            for (int c = 0; c < 64; ++c) {
                const bool inside = row + r >= 0 && row + r < rows && column + c < columns;
                const uint16_t x = inside ? base[(row + r) * columns + column + c] : 0;
                const uint32_t at = target + r * 128 + ((c / 8) ^ (r % 8)) * 16 + c % 8 * 2;
                std::memcpy(block.at(at, 2), &x, 2);
            }
        }
        auto& bar = mbarrier_at(barrier);
        bar.bytes -= box_rows * 128;
        mbarrier_settle(bar);
    });
}

// --- warpgroups ---

inline void hide(Descriptor&) {}
template <int kRegisters>
inline void take_registers() {}
template <int kRegisters>
inline void give_registers() {}
inline void wgmma_fence() {}
template <int kTiles>
inline void hold_accumulators(float (&)[kTiles][4]) {}

inline uint16_t descriptor_element(uint64_t descriptor, bool transposed, int mn, int k) {
    Block& block = Block::get();
    if (descriptor >> 62 != 1) block.fail("descriptor without 128-byte swizzle");
    const uint32_t start = uint32_t(descriptor & 0x3FFF) << 4;
    const uint32_t leading = uint32_t(descriptor >> 16 & 0x3FFF) << 4;
    const uint32_t stride = uint32_t(descriptor >> 32 & 0x3FFF) << 4;
    uint32_t address = start + (transposed ? mn / 64 * leading + mn % 64 * 2 + k / 8 * stride +
                                                 k % 8 * 128
                                           : mn / 8 * stride + mn % 8 * 128 + k * 2);
    address ^= (address >> 7 & 7) << 4;
    if (block.unfenced[(address - emulator::kSharedStart) / 16])
        block.fail("wgmma reads an ordinary store that no proxy fence followed");
    uint16_t x;
    std::memcpy(&x, block.at(address, 2), 2);
    return x;
}

inline void run_products(std::vector<void*>& all) {
    const auto& first = *static_cast<emulator::Product*>(all[0]);
    const int columns = first.columns;
    std::vector<std::array<float, 16>> a(64), b(columns);
    for (int thread = 0; thread < 128; ++thread) {
        const auto& p = *static_cast<emulator::Product*>(all[thread]);
        if (p.b != first.b || p.columns != columns || (!p.a_in_registers && p.a != first.a))
            Block::get().fail("threads of a warpgroup name different operands");
        if (!p.a_in_registers) continue;
        if (std::memcmp(p.fragment, p.fragment_at, sizeof p.fragment) != 0)
            Block::get().fail("an A fragment changed while wgmma was reading it");
        const int group = thread / 32 * 16 + thread % 32 / 4, quad = 2 * (thread % 4);
        for (int i = 0; i < 8; ++i) {  // as mma.m16n8k16, one warp per 16 rows
            const uint16_t x = uint16_t(p.fragment[i / 2] >> (i % 2 * 16));
            a[group + 8 * (i / 2 % 2)][quad + i % 2 + 8 * (i / 4)] = p.value(x);
        }
    }
    for (int k = 0; k < 16; ++k) {
        if (!first.a_in_registers)
            for (int m = 0; m < 64; ++m)
                a[m][k] = first.value(descriptor_element(first.a, false, m, k));
        for (int n = 0; n < columns; ++n)
            b[n][k] = first.value(descriptor_element(first.b, first.b_transposed, n, k));
    }
    for (int thread = 0; thread < 128; ++thread) {  // PTX ISA, D fragment of wgmma.m64nNk16
        const auto& p = *static_cast<emulator::Product*>(all[thread]);
        const int group = thread / 32 * 16 + thread % 32 / 4, quad = 2 * (thread % 4);
        for (int i = 0; i < columns / 2; ++i) {
            const int row = group + 8 * (i / 2 % 2), column = 8 * (i / 4) + quad + i % 2;
            float sum = p.accumulate ? (*p.held)[i] : 0.0f;
            for (int k = 0; k < 16; ++k) sum += a[row][k] * b[column][k];
            (*p.held)[i] = sum;
        }
    }
}

inline void issue_product(emulator::Product product) {
    auto& self = Block::get().self();
    const auto share = [&](const std::vector<std::shared_ptr<emulator::Product>>& under_way) {
        for (const auto& other : under_way)
            if (other->d == product.d) product.held = other->held;
    };
    for (const auto& group : self.product_groups) share(group);
    share(self.products);
    if (!product.held) {
        const int n = product.columns / 2;
        product.held = std::make_shared<std::vector<float>>(product.d, product.d + n);
        std::fill(product.d, product.d + n, NAN);
    }
    self.products.push_back(std::make_shared<emulator::Product>(std::move(product)));
}
template <class T, int kTiles>
inline void wgmma(float (&d)[kTiles][4], uint64_t a, uint64_t b, bool accumulate) {
    const auto value = [](uint16_t x) { return to_float(T{x}); };
    issue_product({false, false, accumulate, a, b, {}, nullptr, &d[0][0], 8 * kTiles, value, {}});
}
template <class T, int kTiles>
inline void wgmma_transposed(float (&d)[kTiles][4], const uint32_t (&a)[4], uint64_t b) {
    const auto value = [](uint16_t x) { return to_float(T{x}); };
    issue_product({true, true, true, 0, b, {a[0], a[1], a[2], a[3]}, a, &d[0][0], 8 * kTiles, value,
                   {}});
}
inline void wgmma_commit() {
    auto& self = Block::get().self();
    self.product_groups.push_back(std::move(self.products));
    self.products.clear();
}
template <int kLeft>
inline void wgmma_wait() {
    static const char tag = 0;
    Block& block = Block::get();
    auto& groups = block.self().product_groups;
    while (int(groups.size()) > kLeft) {
        for (const auto& product : groups.front()) {
            block.collective(block.warpgroup[block.current / emulator::kWarpgroupSize],
                             block.current % emulator::kWarpgroupSize, emulator::kWarpgroupSize,
                             &tag, product.get(), run_products);
            const auto held = std::move(product->held);
            if (held.use_count() == 1)  // no other product is under way for this accumulator
                std::copy(held->begin(), held->end(), product->d);
        }
        groups.erase(groups.begin());
    }
}

}  // namespace psm::cuda
