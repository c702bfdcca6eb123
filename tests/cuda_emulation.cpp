// The CUDA kernels on the CPU, behind a C interface for tests/test_cuda_host.py.
#include <cstdio>
#include <cstring>

#include "csrc/cuda/configs.cuh"
#include "csrc/cuda/enqueue.cuh"
#include "csrc/cuda/finish.cuh"
#include "csrc/cuda/merge.cuh"

using namespace psm::cuda;
namespace emulator = psm::emulator;

namespace {

thread_local char message[256];

template <class Body>
int guarded(Body body) {
    try {
        body();
        return 0;
    } catch (const std::exception& error) {
        std::snprintf(message, sizeof message, "%s", error.what());
        return 1;
    }
}

template <class T, Work kWork>
void run_sm80(PassArgs& args, int grid) {
    const auto launch = [&](auto config) {
        using Config = typename decltype(config)::type;
        args.row_blocks = (args.batch + Config::kRows - 1) / Config::kRows;
        const auto run = [&](auto selection) {
            emulator::launch(grid, Config::kThreads, Config::shared_bytes(kWork), [&](char* shared) {
                Config::template run<decltype(selection)::value, kWork>(args, shared);
            });
        };
        if (args.selection == psm::Selection::kAffine) {
            run(std::integral_constant<psm::Selection, psm::Selection::kAffine>{});
        } else {
            visit_selection(args.selection, run);
        }
    };
    if constexpr (kWork == Work::kMine) {
        visit_mine<Sm80<T>>(args.dim, launch);
    } else {
        visit_pass<Sm80<T>>(args.dim, launch);
    }
}

template <class T>
void run_mine_sm90(PassArgs& args, int grid) {
    using Config = MineSm90<T>;
    args.row_blocks = (args.batch + Config::kRows - 1) / Config::kRows;
    TensorMaps maps;
    maps.key = emulated_map(args.key, args.batch, args.dim, Config::kRows);
    maps.bank = emulated_map(args.bank, args.slots, args.dim, Config::kTileSlots);
    emulator::launch(grid, Config::kThreads, Config::shared_bytes(Work::kMine),
                     [&](char* shared) { Config::run(args, maps, shared); });
}

template <class T>
void run_sm90(PassArgs& args, int grid) {
    visit_pass<Sm90<T>>(args.dim, [&](auto config) {
        using Config = typename decltype(config)::type;
        args.row_blocks = (args.batch + Config::kRows - 1) / Config::kRows;
        const TensorMaps maps = {
            emulated_map(args.query, args.batch, args.dim, Config::kRows),
            emulated_map(args.key, args.batch, args.dim, Config::kRows),
            emulated_map(args.bank, args.slots, args.dim, Config::kTileSlots),
        };
        visit_selection(args.selection, [&](auto selection) {
            emulator::launch(grid, Config::kThreads, Config::shared_bytes(Work::kPass),
                             [&](char* shared) {
                                 Config::template run<decltype(selection)::value, Work::kPass>(
                                     args, maps, shared);
                             });
        });
    });
}

template <class T>
void run_merge(const MergeArgs& args, int grid) {
    emulator::launch(grid, kMergeThreads, sizeof(MergeShared), [&](char* shared) {
        merge_rows<T>(args, *reinterpret_cast<MergeShared*>(shared));
    });
}

}  // namespace

extern "C" {

const char* psm_message() { return message; }

// dtype: 0 fp32, 1 bf16, 2 fp16; work: 0 pass and merge, 2 mining alone
int psm_bank_pass_sm80(MergeArgs* args, int dtype, int work, int grid) {
    return guarded([&] {
        const auto run = [&](auto type) {
            using T = typename decltype(type)::type;
            if (work == 2) {
                run_sm80<T, Work::kMine>(args->pass, grid);
            } else {
                run_sm80<T, Work::kPass>(args->pass, grid);
            }
            run_merge<T>(*args, grid);
        };
        if (dtype == 0) run(Type<float>{});
        if (dtype == 1) run(Type<BFloat16>{});
        if (dtype == 2) run(Type<Float16>{});
    });
}

// dtype: 1 bf16, 2 fp16; rows aligned to 16 bytes; work as above
int psm_bank_pass_sm90(MergeArgs* args, int dtype, int work, int grid) {
    return guarded([&] {
        const auto run = [&](auto type) {
            using T = typename decltype(type)::type;
            if (work == 2) {
                run_mine_sm90<T>(args->pass, grid);
            } else {
                run_sm90<T>(args->pass, grid);
            }
            run_merge<T>(*args, grid);
        };
        if (dtype == 1) run(Type<BFloat16>{});
        if (dtype == 2) run(Type<Float16>{});
    });
}

// words (rows, slots) as the threads of an accumulator draw them
int psm_noise(int64_t seed, int64_t offset, int64_t row_offset, int64_t col_offset, int rows,
              int slots, int64_t* words) {
    return guarded([&] {
        emulator::launch(1, 32, 16, [&](char*) {
            const NoiseKey key = noise_key(uint64_t(seed), uint64_t(offset));
            const int group = thread_index() / 4, quad = thread_index() % 4;
            for (int row = group; row < rows; row += 8) {
                for (int n = 0; n < slots; n += 16) {
                    const psm::Philox4 drawn = noise_words(
                        key, noise_row(key, uint32_t(row_offset + row)),
                        noise_column(key, uint32_t((col_offset + n) / 16 * 4 + quad)));
                    for (int i = 0; i < 4; ++i)
                        words[row * slots + n + 8 * (i / 2) + 2 * quad + i % 2] = drawn.word[i];
                }
            }
        });
    });
}

int psm_enqueue(EnqueueArgs* args, int key_dtype, int bank_dtype, int grid) {
    const auto visit = [](int dtype, auto run) {
        if (dtype == 0) run(Type<float>{});
        if (dtype == 1) run(Type<BFloat16>{});
        if (dtype == 2) run(Type<Float16>{});
    };
    return guarded([&] {
        visit(key_dtype, [&](auto key) {
            visit(bank_dtype, [&](auto bank) {
                emulator::launch(grid, 64, 16, [&](char*) {
                    enqueue_rows<typename decltype(key)::type, typename decltype(bank)::type>(
                        *args);
                });
            });
        });
    });
}

int psm_finish(FinishArgs* args, int dtype, int grid) {
    return guarded([&] {
        const auto run = [&](auto type) {
            emulator::launch(grid, kFinishThreads, sizeof(FinishShared), [&](char* shared) {
                finish_rows<typename decltype(type)::type>(
                    *args, *reinterpret_cast<FinishShared*>(shared));
            });
        };
        if (dtype == 0) run(Type<float>{});
        if (dtype == 1) run(Type<BFloat16>{});
        if (dtype == 2) run(Type<Float16>{});
    });
}

// Programs with one fault each, which the emulation must find.
int psm_fault(const char* name) {
    const auto is = [name](const char* other) { return std::strcmp(name, other) == 0; };
    static const char zeros[16] = {};
    return guarded([&] {
        emulator::launch(1, 128, 4096, [&](char* shared) {
            const uint32_t start = shared_address(shared), barrier = start + 2048;
            if (is("skip_copy_wait")) {
                copy_async(start + 16 * thread_index(), zeros, 16);
                copy_commit();
            } else if (is("wrong_parity")) {  // waits for a phase that nobody completes
                if (thread_index() == 0) mbarrier_init(barrier, 128);
                block_sync();
                mbarrier_arrive(barrier);
                mbarrier_wait(barrier, 0);
                mbarrier_wait(barrier, 1);
            } else if (is("no_proxy_fence")) {
                store_shared(start + 16 * thread_index(), Chunk{});
                block_sync();
                float d[8][4];
                const Descriptor tile = descriptor(start, 16, 1024);
                wgmma<BFloat16>(d, tile.at(0), tile.at(0), false);
                wgmma_commit();
                wgmma_wait<0>();
            } else if (is("divergent_shuffle")) {
                if (thread_index() % 32 < 16) {
                    shuffle_xor(1, 1);
                } else {
                    warp_any(true);
                }
            } else if (is("double_arrival")) {
                if (thread_index() == 0) {
                    mbarrier_init(barrier, 1);
                    mbarrier_arrive_expect(barrier, 16);
                    mbarrier_arrive(barrier);
                }
            }
        });
    });
}

int psm_cell_log2(int64_t topk, int64_t dim, int64_t slots, int cell_group) {
    return choose_cell_log2(topk, dim, slots, cell_group);
}
int psm_room_for_cells(int64_t slots, int tile_slots, int cell_log2, int cell_group) {
    PassArgs args = {};
    args.cell_log2 = cell_log2, args.cell_group = cell_group;
    return room_for_cells(slots, tile_slots, args);
}

float psm_sharpness(double a) { return sharpness_of(a); }
}
