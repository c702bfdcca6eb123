"""The table of backends: what is installed, and what `auto` picks."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from psm_kernels.backends.base import Backend
from psm_kernels.backends.cpp import Cpp
from psm_kernels.backends.cuda import Cuda
from psm_kernels.backends.reference import Reference
from psm_kernels.backends.triton import Triton

TABLE = {backend.name: backend for backend in (Triton(), Cuda(), Cpp(), Reference())}

# What auto tries, best first. "cuda" waits for a file in benchmarks/results that shows where it is
# ahead of "triton".
AUTO = {
    "cpu": ("cpp", "reference"),
    "cuda": ("triton", "reference"),
    "xpu": ("triton", "reference"),
}


def choose(name: str | Backend, bank: Tensor, topk: int = 0, *, sums: bool = True) -> Backend:
    """What runs backend `name` on this bank; `sums`: bank_pass is wanted of it, not bank_topk. A
    Backend that is in no table runs itself, but not under torch.compile.

    Raises:
        ValueError: the name is unknown, or the named backend cannot run; says why and which can.
    """
    if isinstance(name, Backend):
        return name
    return _choose(name, bank.device.type, bank.dtype, bank.shape[1], topk, sums)


@functools.lru_cache(maxsize=256)
def _choose(
    name: str, device: str, dtype: torch.dtype, dim: int, topk: int = 0, sums: bool = True
) -> Backend:
    def refusal(other: str) -> str | None:
        return TABLE[other].supports(device, dtype, dim, topk, sums=sums)

    if name == "auto":  # never another backend, B x K matrices and all, for a large topk alone
        able = [
            o for o in AUTO.get(device, ()) if not TABLE[o].supports(device, dtype, dim, sums=sums)
        ]
        name = able[0] if able else "reference"
    _check_name(name)
    if reason := refusal(name):
        able = [other for other in TABLE if refusal(other) is None]
        raise ValueError(f"backend: {name!r} cannot run: {reason}; these can: {', '.join(able)}")
    return TABLE[name]


def require(name: str | Backend) -> None:
    """Raise the ValueError of a backend that is unknown, or that no device of this machine runs;
    what depends on device, dtype or size waits for `choose`."""
    if name == "auto" or isinstance(name, Backend):
        return
    _check_name(name)
    if reason := TABLE[name].unavailable():
        able = [other for other, backend in TABLE.items() if not backend.unavailable()]
        raise ValueError(f"backend: {name!r} cannot run: {reason}; these can: {', '.join(able)}")


def _check_name(name: str) -> None:
    if name not in TABLE:
        raise ValueError(f"backend: got {name!r}, wanted one of 'auto', {str(list(TABLE))[1:-1]}")


def describe() -> str:
    """The table as text: each backend, whether it can run here or why not, and what auto picks."""
    lines = [f"{'backend':<10} {'available':<10} what it is"]
    for name, backend in TABLE.items():
        reason = backend.unavailable()
        why = f" [{reason}]" if reason else ""
        lines.append(f"{name:<10} {'no' if reason else 'yes':<10} {backend.what}{why}")
    lines += [line for backend in TABLE.values() for line in backend.notes()]
    for device in ["cpu"] + ["cuda"] * torch.cuda.is_available():
        lines.append(f"auto on {device}: {_choose('auto', device, torch.float32, 128).name}")
    return "\n".join(lines)
