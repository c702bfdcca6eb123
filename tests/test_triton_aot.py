"""The Triton pass compiled for chips that are not here: no stack, no spills, few instructions."""

from __future__ import annotations

import importlib.util
import os
from collections import defaultdict
from pathlib import Path

import pytest
import torch

from psm_kernels.backends.base import NOTHING, Exclude
from psm_kernels.backends.triton import Triton, config
from psm_kernels.options import PassOptions, PSMOptions

triton = pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("compiles, which the interpreter does not", allow_module_level=True)

_spec = importlib.util.spec_from_file_location(
    "sass", Path(__file__).parents[1] / "benchmarks" / "sass.py"
)
sass = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(sass)


# Limits: instructions per element of noise, mining and gradient together, what the worst of Triton
# 3.6 to 3.9 takes. Hopper at D = 256, where products take twice the time: 2.9 for mining and 29.5
# for the rest. What a tile with listed slots takes more, its lists read once, is less than half of
# a tile.
@pytest.mark.parametrize(
    ("arch", "dim", "limit"),
    [
        ("sm_90", 64, 31),
        ("sm_90", 128, 32),
        ("sm_90", 256, 34),
        ("sm_80", 64, 36),
        ("sm_80", 128, 41),
        ("sm_80", 256, 73),
    ],
)
def test_nvidia(arch, dim, limit):
    mining, sums = (
        sass.nvidia_report(*sass.compile_pass(arch, torch.bfloat16, dim, which))
        for which in (False, True)
    )
    assert mining.spills == sums.spills == 0
    assert mining.stack == 0
    assert sums.stack <= (8 if arch == "sm_90" else 16)
    assert mining.per_element + sums.per_element <= limit
    assert mining.rare == 0
    assert 0 < sums.rare < sums.per_element / 2
    assert mining.serial == sums.serial == 0


@pytest.mark.parametrize(("arch", "dim"), [("sm_90", 64), ("sm_90", 128), ("sm_80", 64)])
@pytest.mark.parametrize("sums", [False, True])
def test_ids_cost_a_few_instructions(arch, dim, sums):
    with_ids, plain = (
        sass.nvidia_report(
            *sass.compile_pass(arch, torch.bfloat16, dim, sums, lists=False, ids=ids)
        )
        for ids in (True, False)
    )
    assert with_ids.spills == with_ids.serial == 0
    assert 1 < with_ids.per_element - plain.per_element < 8


@pytest.mark.parametrize(("arch", "dim"), [("sm_90", 64), ("sm_90", 128), ("sm_80", 64)])
def test_a_bias_costs_a_few_instructions(arch, dim):
    with_bias, plain = (
        sass.nvidia_report(
            *sass.compile_pass(arch, torch.bfloat16, dim, True, "all", lists=False, bias=bias)
        )
        for bias in (True, False)
    )
    assert with_bias.spills == with_bias.serial == 0
    assert 1 < with_bias.per_element - plain.per_element < 8


@pytest.mark.parametrize("dim", [128, 256])
@pytest.mark.parametrize("sums", [False, True])
def test_amd(dim, sums):
    report = sass.amd_report(sass.compile_pass("gfx942", torch.bfloat16, dim, sums)[0])
    assert report["vgpr_spill_count"] == 0
    assert report["private_segment_fixed_size"] == 0


@pytest.mark.parametrize("sums", [False, True])
def test_fp32_products_are_fp32(sums):
    kernel, block = sass.compile_pass("sm_90", torch.float32, 128, sums)
    assert "tf32" not in kernel.asm["ptx"]
    assert "fma.rn.f32" in kernel.asm["ptx"]
    assert sass.nvidia_report(kernel, block).stack == 0


# The room of a block: 99 KB of shared memory on the smallest chips of sm_80's kind, 227 on Hopper
@pytest.mark.parametrize(("arch", "room"), [("sm_90", 227 << 10), ("sm_80", 99 << 10)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("cell", [16, 64])
def test_mining_of_wide_rows(arch, room, dtype, cell):
    kernel, block = sass.compile_pass(arch, dtype, 4096, False, cell=cell)
    report = sass.nvidia_report(kernel, block)
    assert report.stack == report.spills == report.serial == 0
    assert report.shared <= room
    assert report.registers * 32 * block.warps * block.resident <= 65_536


@pytest.mark.parametrize("arch", ["sm_90", "sm_80"])
@pytest.mark.parametrize("chunk", [1024, 4096])
def test_the_best_of_many(arch, chunk):
    for kernel in sass.compile_many(arch, chunk):
        assert sass.usage(kernel)[1] == 0
        assert kernel.metadata.shared <= 48 << 10


class _NoDriver:
    """Enough of a driver to key a launch on a chip that is not here."""

    def get_current_device(self):
        return "none"

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        return triton.backends.compiler.GPUTarget("cuda", 90, 32)


@pytest.fixture
def compilations(monkeypatch):
    """Kernel names, each with the keys under which launches would have been compiled."""
    keys = defaultdict(set)

    def note(*, key, fn, **unused):
        keys[fn.name.rpartition(".")[2]].add(key)
        return True  # do not compile, do not launch

    monkeypatch.setattr(triton.knobs.runtime, "jit_cache_hook", note)
    monkeypatch.setattr(config, "chip", lambda device: "hopper")
    monkeypatch.setattr(triton.runtime.driver, "_active", _NoDriver())
    return keys


@pytest.mark.parametrize("dim", [64, 256])
def test_sizes_and_settings_do_not_compile_again(compilations, dim):
    backend = Triton()
    # 1 and multiples of 16 are what Triton specializes, 2^31 what it widens
    sizes = [(1, 1, 5, 0, 0), (16, 1024, 8, 16, 1), (33, 5000, 7, 1, 2**40 + 16), (2, 64, 6, -1, 3)]
    for batch, size, k, row_offset, col_offset in sizes:
        bank = torch.zeros(size, dim, dtype=torch.bfloat16)
        query, s_pos = bank.new_zeros(batch, dim), torch.zeros(batch)
        count, state = torch.tensor(size), torch.zeros(3, dtype=torch.int64)[1:]  # not 16-aligned

        held = torch.zeros(size + 1, dtype=torch.int64)[1:]
        lists = [torch.zeros(batch * n + 1, dtype=torch.int64)[1:] for n in (9 - k, 16 - k)]
        excludes = [NOTHING, NOTHING, Exclude(None, held.new_zeros(batch), held)]
        excludes += [Exclude(slots.view(batch, -1)) for slots in lists]
        for i, exclude in enumerate(excludes):
            options = PassOptions(
                1.0, "bernoulli", 1.0, 0.0, k, i > 0, row_offset=row_offset, col_offset=col_offset
            )
            backend.bank_pass(query, query, bank, count, s_pos, options, exclude, state)
        options, bias = PassOptions(1.0), torch.zeros(size + 1)[1:]
        backend.bank_pass(query, None, bank, count, s_pos, options, NOTHING, None, bias)
        backend.bank_topk(query, bank, k, count)
        options = PSMOptions(1, topk=k, weight_temperature=1, hard_weight=0)
        backend.psm_step(query, query, bank, count, options, NOTHING, state, row_offset)
        backend.weighted_pass(query, bank, count, 1.0, torch.zeros(5, batch), torch.zeros(size))
    counts = {name: len(keys) for name, keys in compilations.items()}
    # mining: with and without ids, and of small cells where lists are long; selection of a few:
    # plain, by ids; of many: by lists; sums: over all, without listed slots, and without ids too;
    # "all" with a bias
    assert counts == {
        "mine_kernel": 3, "select_kernel": 2, "cells_kernel": 1, "rescan_kernel": 1,
        "order_kernel": 1, "sum_kernel": 4, "merge_kernel": 1, "loss_kernel": 1,
        "weighted_kernel": 1,
    }  # fmt: skip


def test_a_launch_looks_no_global_up():
    from psm_kernels.backends.triton import few, loss, many, merge, mine, sums, weighted

    for kernel in (
        mine.mine_kernel,
        few.select_kernel,
        many.cells_kernel,
        many.rescan_kernel,
        many.order_kernel,
        sums.sum_kernel,
        merge.merge_kernel,
        weighted.weighted_kernel,
        loss.loss_kernel,
    ):
        assert kernel.cache_key  # computing it collects the globals
        assert not kernel.used_global_vals
