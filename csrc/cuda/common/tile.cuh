// A tile of rows in shared memory: panels of 64 16-bit columns (128 bytes a row), one after the
// other, the 16-byte chunks of a row permuted by the 128-byte swizzle. TMA writes this layout,
// wgmma descriptors name it, and ldmatrix reads it without bank conflicts.
#pragma once

#include "pass.cuh"

namespace psm::cuda {

constexpr int kPanelColumns = 64, kRowBytes = 128, kChunkColumns = 8;

template <int kTileRows>
PSM_HD int chunk_offset(int row, int chunk) {  // bytes from the tile's start
    return (chunk / 8) * kTileRows * kRowBytes + row * kRowBytes + ((chunk % 8) ^ (row % 8)) * 16;
}

// The same for a walk over the chunks of one row: step_chunks(start, n) is n chunks after `start`,
// the address of chunk 0 or 1, for even n. The swizzle is an XOR of address bits 4 to 6.
template <int kTileRows>
PSM_HD uint32_t step_chunks(uint32_t start, int chunks) {
    return (start ^ uint32_t(chunks % 8 * 16)) + uint32_t(chunks / 8 * kTileRows * kRowBytes);
}

// Eight elements from `column` on; columns past `dim` are zero.
PSM_DEVICE Chunk gather_chunk(const uint16_t* row, int column, int dim) {
    uint16_t x[8];
    for (int i = 0; i < 8; ++i) x[i] = column + i < dim ? row[column + i] : 0;
    Chunk chunk;
    for (int i = 0; i < 4; ++i) chunk.word[i] = x[2 * i] | uint32_t(x[2 * i + 1]) << 16;
    return chunk;
}

// Starts copying kTileRows rows from row `first` on, with `threads` threads; by ordinary stores
// where rows are not aligned to 16 bytes. Columns count from `left` on. Rows outside [begin, end)
// and columns past `dim` become zero and are never read, whatever memory holds there.
template <int kTileRows, int kDim>
PSM_DEVICE void load_tile(uint32_t tile, const void* matrix, int64_t first, int64_t begin,
                          int64_t end, int dim, bool aligned, int thread, int threads,
                          int left = 0) {
    constexpr int kRowChunks = kDim / kChunkColumns;
    const auto* source = static_cast<const uint16_t*>(matrix);
#pragma unroll 2
    for (int at = thread; at < kTileRows * kRowChunks; at += threads) {
        const int row = at / kRowChunks, chunk = at % kRowChunks;
        const int column = left + chunk * kChunkColumns;
        const uint32_t target = tile + chunk_offset<kTileRows>(row, chunk);
        const bool inside = first + row >= begin && first + row < end && column < dim;
        const uint16_t* from = source + (inside ? (first + row) * dim : 0);
        if (aligned) {
            copy_async(target, inside ? from + column : source, inside ? 16 : 0);
        } else {
            store_shared(target, inside ? gather_chunk(from, column, dim) : Chunk{});
        }
    }
}

// Rows from `from` on become zero, by the lanes of a warp.
template <int kTileRows, int kPanels>
PSM_DEVICE void clear_rows(uint32_t tile, int from, int lane) {
    for (int at = from * kRowBytes + lane * 16; at < kTileRows * kRowBytes; at += 32 * 16)
        for (int panel = 0; panel < kPanels; ++panel)
            store_shared(tile + panel * kTileRows * kRowBytes + at, Chunk{});
}

}  // namespace psm::cuda
