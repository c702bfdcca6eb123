// The CUDA kernels on the CPU, behind a C interface for tests/test_cuda_host.py.
#include <cstdio>

#include "csrc/cuda/configs.cuh"
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
        visit_selection(args.selection, [&](auto selection) {
            emulator::launch(grid, Config::kThreads, Config::shared_bytes(kWork), [&](char* shared) {
                Config::template run<decltype(selection)::value, kWork>(args, shared);
            });
        });
    };
    if constexpr (kWork == Work::kMine) {
        visit_mine<Sm80<T>>(args.dim, launch);
    } else {
        visit_pass<Sm80<T>>(args.dim, launch);
    }
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

// dtype: 1 bf16, 2 fp16; rows aligned to 16 bytes
int psm_bank_pass_sm90(MergeArgs* args, int dtype, int, int grid) {
    return guarded([&] {
        const auto run = [&](auto type) {
            using T = typename decltype(type)::type;
            run_sm90<T>(args->pass, grid);
            run_merge<T>(*args, grid);
        };
        if (dtype == 1) run(Type<BFloat16>{});
        if (dtype == 2) run(Type<Float16>{});
    });
}

float psm_sharpness(double a) { return sharpness_of(a); }
}
