"""The table of backends: the only place that knows what is installed and what `auto` picks."""

from __future__ import annotations

import functools
import importlib
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

_LOW = (torch.float32, torch.bfloat16, torch.float16)


class Backend(NamedTuple):
    name: str
    devices: tuple[str, ...] | None  # None: any
    dtypes: tuple[torch.dtype, ...]
    max_dim: int | None  # columns that bank_pass takes
    max_topk_dim: int | None  # and bank_topk
    what: str


TABLE = {
    row.name: row
    for row in (
        Backend(
            "triton",
            ("cuda", "xpu", "cpu"),
            _LOW,
            512,
            512,
            "Triton kernels (cpu: interpreter only)",
        ),
        Backend(
            "cuda",
            ("cuda",),
            _LOW,
            256,
            512,
            "CUDA C++ kernels, sm_80 and newer; not in auto: no measured results yet",
        ),
        Backend("cpp", ("cpu",), _LOW, 4096, 4096, "C++ kernels: AVX-512, AVX2, portable"),
        Backend(
            "reference", None, (*_LOW, torch.float64), None, None, "plain torch, B x K matrices"
        ),
    )
}

# What auto tries, best first. Triton on a CPU is the interpreter: for tests, never chosen. "cuda"
# waits for a file in benchmarks/results that shows where it is ahead of "triton".
AUTO = {
    "cpu": ("cpp", "reference"),
    "cuda": ("triton", "reference"),
    "xpu": ("triton", "reference"),
}


@functools.cache
def load(name: str) -> ModuleType | str:
    """The backend's module, or one line that says why it cannot run here."""
    try:
        module = importlib.import_module(f"psm_kernels.ops.{name}")
    except ImportError as error:
        return str(error)
    return module.unavailable() or module


def _refusal(name: str, device: str, dtype: torch.dtype, dim: int, topk_only: bool) -> str | None:
    row = TABLE[name]
    most = row.max_topk_dim if topk_only else row.max_dim
    if row.devices is not None and device not in row.devices:
        return f"runs on {' and '.join(row.devices)}, not on {device}"
    if dtype not in row.dtypes:
        return f"has no kernel for {dtype}"
    if most is not None and dim > most:
        return f"takes at most {most} columns, not {dim}"
    module = load(name)
    if isinstance(module, str):
        return module
    if name == "triton" and device == "cpu" and not module.interpreted():
        return "runs on cpu in its interpreter alone, with TRITON_INTERPRET=1"
    return None


def choose(name: str, bank: Tensor, *, topk_only: bool = False) -> ModuleType:
    """The module that runs backend `name` on this bank; `topk_only`: no bank_pass is wanted of it.

    Raises:
        ValueError: the name is unknown, or the named backend cannot run; says why and which can.
    """
    return _choose(name, bank.device.type, bank.dtype, bank.shape[1], topk_only)


@functools.lru_cache(maxsize=256)
def _choose(
    name: str, device: str, dtype: torch.dtype, dim: int, topk_only: bool = False
) -> ModuleType:
    bank = device, dtype, dim, topk_only
    if name == "auto":
        for candidate in AUTO.get(device, ("reference",)):
            if _refusal(candidate, *bank) is None:
                return load(candidate)
    if name not in TABLE:
        raise ValueError(f"backend: got {name!r}, wanted one of 'auto', {str(list(TABLE))[1:-1]}")
    reason = _refusal(name, *bank)
    if reason is not None:
        able = [other for other in TABLE if _refusal(other, *bank) is None]
        raise ValueError(f"backend: {name!r} cannot run: {reason}; these can: {', '.join(able)}")
    return load(name)


def require(name: str) -> None:
    """Raise the ValueError of a backend that is unknown, or that no device of this machine runs;
    what depends on device, dtype or size waits for `choose`."""
    if name == "auto":
        return
    if name not in TABLE:
        raise ValueError(f"backend: got {name!r}, wanted one of 'auto', {str(list(TABLE))[1:-1]}")
    module = load(name)
    if isinstance(module, str):
        able = [other for other in TABLE if not isinstance(load(other), str)]
        raise ValueError(f"backend: {name!r} cannot run: {module}; these can: {', '.join(able)}")


def describe() -> str:
    """The table as text: each backend, whether it can run here or why not, and what auto picks."""
    from psm_kernels.ops import cuda

    lines = [f"{'backend':<10} {'available':<10} what it is"]
    for name, row in TABLE.items():
        module = load(name)
        reason = f" [{module}]" if isinstance(module, str) else ""
        lines.append(f"{name:<10} {'no' if reason else 'yes':<10} {row.what}{reason}")
    if built_for := cuda.built_for():
        lines.append(f"CUDA kernels compiled for sm_{built_for}")
    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    for device in devices:
        picked = _choose("auto", device, torch.float32, 128).__name__.rpartition(".")[2]
        lines.append(f"auto on {device}: {picked}")
    return "\n".join(lines)
