"""The CUDA kernels of csrc/cuda compiled by g++ and run on the CPU, one fiber per CUDA thread."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "tests/cuda_emulation.cpp"
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
SELECTIONS = ("bernoulli", "expected", "all", "affine")

_p, _i, _l, _f, _b = (
    ctypes.c_void_p,
    ctypes.c_int,
    ctypes.c_int64,
    ctypes.c_float,
    ctypes.c_bool,
)


class PassArgs(ctypes.Structure):  # csrc/cuda/pass.cuh
    _fields_ = (
        *((name, _p) for name in ("query", "key", "bank", "count", "s_pos", "rng_state")),
        *((name, _p) for name in ("affine", "rho")),
        *((name, _l) for name in ("slots", "row_offset", "col_offset")),
        *((name, _i) for name in ("batch", "dim", "selection")),
        *((name, _b) for name in ("mine", "aligned")),
        *((name, _f) for name in ("scale", "sharpness", "b")),
        *((name, _i) for name in ("row_blocks", "splits", "cell_log2", "cell_group", "cells")),
        *((name, _p) for name in ("sums", "means", "cell_max")),
    )


class MergeArgs(ctypes.Structure):  # csrc/cuda/merge.cuh
    _fields_ = (
        ("pass_", PassArgs),
        ("topk", _i),
        *((name, _p) for name in ("neg_lse", "neg_mean", "neg_sq_lse", "neg_count")),
        *((name, _p) for name in ("topk_sim", "topk_index", "cell_keys", "slot_keys", "scores")),
    )


class EnqueueArgs(ctypes.Structure):  # csrc/cuda/enqueue.cuh
    _fields_ = (
        *((name, _p) for name in ("keys", "labels", "bank", "bank_labels")),
        *((name, _p) for name in ("ptr", "count", "ticket")),
        *((name, _l) for name in ("batch", "slots")),
        ("dim", _i),
    )


class FinishArgs(ctypes.Structure):  # csrc/cuda/finish.cuh
    _fields_ = (
        *((name, _p) for name in ("query", "key", "bank", "s_pos", "rng_state")),
        *((name, _p) for name in ("neg_lse", "neg_mean", "neg_sq_lse", "neg_count", "topk_index")),
        ("row_offset", _l),
        *((name, _i) for name in ("batch", "dim", "topk", "selection", "soft_weights")),
        *((name, _f) for name in ("temperature", "weight_temperature", "hard_weight")),
        *((name, _f) for name in ("sharpness", "b")),
        *((name, _p) for name in ("loss", "grad_query", "stats")),
    )


@functools.cache
def library() -> ctypes.CDLL:
    """Compiled once per content of the sources, kept in the temporary directory."""
    sources = [*sorted((ROOT / "csrc").glob("**/*.*h")), SOURCE]
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:16]
    built = Path(tempfile.gettempdir()) / f"psm_cuda_emulation_{os.getuid()}_{digest}.so"
    if not built.exists():
        part = built.with_suffix(f".{os.getpid()}")
        command = [shutil.which("g++"), "-std=c++17", "-O1", "-shared", "-fPIC", f"-I{ROOT}"]
        command += ["-DPSM_HOST_EMULATION", "-Wall", "-Werror", "-Wno-unknown-pragmas"]
        subprocess.run([*command, "-o", part, SOURCE], check=True)
        part.rename(built)
    loaded = ctypes.CDLL(str(built))
    loaded.psm_message.restype = ctypes.c_char_p
    loaded.psm_sharpness.restype = ctypes.c_float
    loaded.psm_sharpness.argtypes = [ctypes.c_double]
    return loaded


def call(function: str, *args) -> None:
    if getattr(library(), function)(*args):
        raise RuntimeError(library().psm_message().decode())


def power_of_two(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


def bank_pass(
    query,
    key,
    bank,
    count,
    s_pos,
    temperature,
    selection,
    a,
    b,
    topk,
    rng_state,
    row_offset,
    col_offset,
    *,
    splits=3,
    grid=2,
    cell_log2=6,
    sums=True,
    path="sm80",
    affine=None,
    rho=None,
):
    """As a backend's bank_pass, with the cut of the work open; outputs start as NaN and -9."""
    (batch, dim), slots = query.shape, bank.shape[0]
    cell_group = 1 if sums or path == "sm80" else 4
    cell_log2 = cell_log2 if cell_group > 1 else max(cell_log2, 6)
    padded = ctypes.c_int64(slots + col_offset % 16)
    tile_slots = 256 if cell_group > 1 else 128  # no tile of these kernels is larger
    cells = library().psm_room_for_cells(padded, tile_slots, cell_log2, cell_group)
    chosen = min(topk + cell_group - 1, cells)
    f32 = {"dtype": torch.float32}
    out = {
        "neg_lse": torch.full((batch,), torch.nan),
        "neg_mean": torch.full((batch, dim), torch.nan),
        "neg_sq_lse": torch.full((batch,), torch.nan),
        "neg_count": torch.full((batch,), torch.nan),
        "topk_sim": torch.full((batch, topk), torch.nan),
        "topk_index": torch.full((batch, topk), -9),
    }
    work = {
        "sums": torch.full((splits, batch, 5), torch.nan, **f32),
        "means": torch.full((splits, batch, dim), torch.nan, **f32),
        "cell_max": torch.full((batch + 1, cells), torch.nan, **f32),
    }
    merge = {
        "cell_keys": torch.full((grid, power_of_two(chosen)), -9),
        "slot_keys": torch.full((grid, power_of_two(topk)), -9),
        "scores": torch.full((grid, chosen << cell_log2), torch.nan, **f32),
    }

    def pointer(tensor):
        return None if tensor is None else tensor.data_ptr()

    aligned = dim * bank.element_size() % 16 == 0
    aligned &= all(t is None or t.data_ptr() % 16 == 0 for t in (query, key, bank))
    args = MergeArgs(
        PassArgs(
            *map(pointer, (query, key, bank, count, s_pos, rng_state, affine, rho)),
            slots,
            row_offset,
            col_offset,
            batch,
            dim,
            SELECTIONS.index(selection),
            topk > 0,
            aligned,
            1.4426950408889634 / temperature,
            library().psm_sharpness(a),
            b,
            0,
            splits,
            cell_log2,
            cell_group,
            cells,
            *map(pointer, work.values()),
        ),
        topk,
        *map(pointer, out.values()),
        *map(pointer, merge.values()),
    )
    if not sums:
        args.neg_lse = None
    kind = DTYPES[bank.dtype]
    call(f"psm_bank_pass_{path}", ctypes.byref(args), kind, 0 if sums else 2, grid)
    return tuple(out.values())


def enqueue(keys, labels, memory) -> None:
    """As MemoryBank.enqueue of `memory`, by the kernel."""
    ticket = torch.zeros((), dtype=torch.int32)
    tensors = (memory.bank, memory.labels, memory.ptr, memory.count, ticket)
    args = EnqueueArgs(
        keys.data_ptr(),
        None if labels is None else labels.data_ptr(),
        *(tensor.data_ptr() for tensor in tensors),
        keys.shape[0],
        *memory.bank.shape,
    )
    call("psm_enqueue", ctypes.byref(args), DTYPES[keys.dtype], DTYPES[memory.bank.dtype], 3)
    assert ticket == 0


SOFT_WEIGHTS = ("attention", "uniform", "binary")


def finish(query, key, bank, s_pos, rng_state, swept, **settings):
    """loss, grad_query and stats of the fused finish."""
    batch, dim = query.shape
    outputs = [torch.full(shape, torch.nan) for shape in ((batch,), (batch, dim), (3, batch))]
    sums = (swept.neg_lse, swept.neg_mean, swept.neg_sq_lse, swept.neg_count, swept.topk_index)
    tensors = (query, key, bank, s_pos, rng_state, *sums)
    args = FinishArgs(
        *(None if tensor is None else tensor.data_ptr() for tensor in tensors),
        settings["row_offset"],
        batch,
        dim,
        swept.topk_index.shape[1],
        SELECTIONS.index(settings["selection"]),
        SOFT_WEIGHTS.index(settings["soft_weights"]),
        settings["temperature"],
        settings["weight_temperature"],
        settings["hard_weight"],
        library().psm_sharpness(settings["a"]),
        settings["b"],
        *(tensor.data_ptr() for tensor in outputs),
    )
    call("psm_finish", ctypes.byref(args), DTYPES[bank.dtype], 3)
    return outputs
