"""Backend `cuda`: hands addresses of tensors to psm_kernels._C.cuda. Kernels: csrc/cuda."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from psm_kernels.backends import compiled
from psm_kernels.backends.compiled import Compiled


def built_for() -> str | None:
    """The architectures whose machine code is in the module; None without the CUDA kernels."""
    if compiled.unavailable() is not None:
        return None
    from psm_kernels import _C

    return _C.cuda.built_for if hasattr(_C, "cuda") else None


@functools.cache
def unavailable() -> str | None:
    reason = compiled.unavailable()
    if reason is not None:
        return reason
    from psm_kernels import _C

    if not hasattr(_C, "cuda"):
        return f"psm_kernels._C was {_missing()}: build it again with nvcc and PSM_CUDA=1"
    if not torch.cuda.is_available():
        return "no CUDA device was found"
    try:
        _load(torch.cuda.current_device())
    except RuntimeError as reason:
        return str(reason)
    return None


@functools.cache
def _load(device: int) -> None:
    """The kernels, which a first call in a graph capture could not load any more: of the current
    device when the backend is chosen, of another one before its first call."""
    from psm_kernels import _C

    if reason := _C.cuda.unavailable(device):
        raise RuntimeError(reason)


def _missing() -> str:
    try:
        from psm_kernels._build_info import MISSING_CUDA
    except ImportError:  # not built by setup.py
        return "built without the CUDA kernels"
    return MISSING_CUDA


def _place(bank: Tensor) -> dict[str, int]:
    """The device and its current stream, which a graph capture replaces by its own."""
    stream = torch.cuda.current_stream(bank.device).cuda_stream
    return {"device": bank.device.index, "stream": stream}


class Cuda(Compiled):
    """Flags are for benchmarks and tests: `null_epilogue`, products alone, whose results mean
    nothing; `force_sm80`, the kernels of sm_80 on a Hopper GPU; `ping_pong`, warpgroups of sm_90a
    start products in turns; `cell_log2`, mining's cells are at least so large."""

    name = "cuda"
    what = "CUDA C++ kernels, sm_80 and newer; not in auto: no measured results yet"
    devices = ("cuda",)
    max_dim = 256
    max_topk_dim = 4096
    max_step_topk = 64

    def __init__(self, **flags: bool | int):
        self.flags = flags

    def unavailable(self) -> str | None:
        return unavailable()

    def notes(self) -> list[str]:
        archs = built_for()
        return [f"CUDA kernels compiled for sm_{archs}"] if archs else []

    def run(self, name: str, args, bank: Tensor) -> None:
        from psm_kernels import _C

        place = _place(bank)
        _load(place["device"])
        if name == "enqueue":  # needs no memory of its own
            return _C.cuda.enqueue(args, **place)
        size = _C.cuda.workspace_bytes(args, place["device"], **self.flags)
        # Given back when this returns: whoever gets it next comes later on the same stream.
        workspace = torch.empty(size, dtype=torch.uint8, device=bank.device)
        getattr(_C.cuda, name)(args, **place, workspace=workspace.data_ptr(), **self.flags)
