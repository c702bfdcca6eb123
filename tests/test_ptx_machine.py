"""The machine of tests/ptx itself: it finds what a kernel lacks."""

import re

import numpy as np
import pytest
import torch
from conftest import problem
from cuda_cases import (
    arguments,
    assert_agree,
    both,
)
from ptx import machine, runtime, text

from psm_kernels.backends.cuda import Cuda


@pytest.mark.parametrize(
    ("source", "pattern", "message"),
    [
        ("sm90_bfloat16", r"wgmma\.wait_group\S* 0;", "asynchronous work"),
        ("sm90_bfloat16", r"wgmma\.commit_group[^;]*;", "asynchronous work"),
        ("sm90_bfloat16", r"fence\.proxy[^;]*;", "no fence.proxy.async"),
        ("sm90_bfloat16", r"mbarrier\.arrive\.shared[^;]*;", "every thread waits"),
        ("sm90_bfloat16", r"\.expect_tx(?=.*_,)", None),
        ("sm80_bfloat16", r"cp\.async\.wait_group[^;]*;", "asynchronous work"),
        ("sm80_bfloat16", r"\.trans(?=\.shared)", None),
        ("sm80_bfloat16", r"bar\.sync[^;]*;", None),
        ("launch", r"bar\.sync[^;]*;", None),
    ],
)
def test_the_machine_finds_faults(gpu, source, pattern, message):
    """What a kernel lacks shows in an error or, without a message, in its results."""
    broken, found = re.subn(pattern, "", runtime.texts()[source])
    assert found
    gpu.warps = 1
    gpu.replaced = {runtime.plain(k): v for k, v in text.read(broken).items()}
    sound = problem(3, 700, 128, dtype=torch.bfloat16)
    if message:
        with pytest.raises(RuntimeError, match=message):
            both(gpu, sound, source[:4])
    else:
        got, want = both(gpu, sound, "sm80" if source == "launch" else source[:4])
        with pytest.raises(AssertionError):
            assert_agree(got, want, torch.bfloat16)


@pytest.mark.parametrize(
    ("before", "message"), [(True, "after the last wgmma.fence"), (False, "waited for")]
)
def test_the_machine_sees_operands_of_products_change(gpu, before, message):
    """An A operand in registers, written between the fence and the product, or while it is read."""
    product = r"wgmma\.mma_async[^;]*?\}, *\{(%r\d+)[^;]*;"

    def change(found: re.Match) -> str:
        write = f"add.s32 {found[1]}, {found[1]}, 1;"
        return f"{write} {found[0]}" if before else f"{found[0]} {write}"

    broken, count = re.subn(product, change, runtime.texts()["sm90_bfloat16"])
    assert count
    gpu.replaced = {runtime.plain(k): v for k, v in text.read(broken).items()}
    with pytest.raises(RuntimeError, match=message):
        both(gpu, problem(3, 300, 64, dtype=torch.bfloat16), "sm90", topk=0)


def test_the_machine_sees_turns_that_are_not_passed_on(gpu):
    broken, found = re.subn(r"bar\.arrive[^;]*;", "", runtime.texts()["sm90_bfloat16"])
    assert found
    gpu.replaced = {runtime.plain(k): v for k, v in text.read(broken).items()}
    args = arguments(*problem(3, 700, 128, dtype=torch.bfloat16), topk=0)
    with pytest.raises(RuntimeError, match="every thread waits"):
        Cuda(ping_pong=True).bank_pass(*args)


def test_a_debug_build_says_which_barrier_it_waits_for(gpu):
    """Where nothing is missing it does what the other does; where an arrival is, it ends itself."""
    source = runtime.ROOT / "csrc/cuda/sm90/sm90_bfloat16.cu"
    sound = runtime.ptx(source, "-DPSM_CUDA_TRAP")
    rows = problem(3, 700, 128, dtype=torch.bfloat16)
    want, _ = both(gpu, rows, "sm90")
    gpu.trapped, gpu.warps = torch.zeros(4, dtype=torch.int32), 1
    gpu.replaced = {runtime.plain(k): v for k, v in text.read(sound).items()}
    got, _ = both(gpu, rows, "sm90")
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert not gpu.trapped.any()

    # The consumers never leave a stage: the producer waits until stage 0 is empty and they until it
    # is full again, and it is theirs whose patience ends first.
    broken, found = re.subn(r"mbarrier\.arrive\.shared[^;]*;", "", sound)
    assert found
    gpu.replaced = {runtime.plain(k): v for k, v in text.read(broken).items()}
    with pytest.raises(RuntimeError, match="the kernel ended itself"):
        both(gpu, problem(3, 2000, 128, dtype=torch.bfloat16), "sm90", topk=0)
    full, stage, block, warp = 1, 0, 0, 4  # Waits::kFull
    assert gpu.trapped.tolist() == [full, stage, block, warp]


def test_the_machine_checks_bounds_and_alignment():
    memory = machine.Memory(np.zeros(64, np.uint8), 0, [(0, 24), (32, 64)])
    assert memory.at(np.array([8, 40, 16]), 8).tolist() == [1, 5, 2]
    with pytest.raises(text.Fault, match="out of bounds"):
        memory.at(np.array([0, 24]), 8)
    with pytest.raises(text.Fault, match="misaligned"):
        memory.at(np.array([8]), 8, 2)
