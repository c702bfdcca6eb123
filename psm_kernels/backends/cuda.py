"""Backend `cuda`: hands tensors to psm_kernels._C.cuda as addresses. Kernels: csrc/cuda."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from psm_kernels.ops import NOTHING, Exclude, cpp
from psm_kernels.ops.cpp import DTYPES, SELECTIONS

MAX_FINISH_TOPK = 64  # of psm_finish


@functools.cache
def unavailable() -> str | None:
    reason = cpp.unavailable()
    if reason is not None:
        return reason
    from psm_kernels import _C

    if not hasattr(_C, "cuda"):
        return f"psm_kernels._C was {_missing()}: build it again with nvcc and PSM_CUDA=1"
    if not torch.cuda.is_available():
        return "no CUDA device was found"
    return _C.cuda.unavailable(torch.cuda.current_device()) or None


def _missing() -> str:
    try:
        from psm_kernels._build_info import MISSING_CUDA
    except ImportError:  # not built by setup.py
        return "built without the CUDA kernels"
    return MISSING_CUDA


def built_for() -> str | None:
    """The architectures whose machine code is in the module; None without the CUDA kernels."""
    if cpp.unavailable() is not None:
        return None
    from psm_kernels import _C

    return _C.cuda.built_for if hasattr(_C, "cuda") else None


class _Workspace:
    """Lends the kernels memory of torch's allocator, on the stream they run on."""

    def __init__(self, device: torch.device):
        self.device = device

    def __call__(self, size: int) -> int:
        self.buffer = torch.empty(size, dtype=torch.uint8, device=self.device)
        return self.buffer.data_ptr()


def bank_pass(
    query: Tensor,  # (B, D)
    key: Tensor | None,  # (B, D)
    bank: Tensor,  # (K, D)
    count: Tensor,  # ()
    s_pos: Tensor,  # (B,)
    temperature: float,
    selection: str,
    a: float,
    b: float,
    topk: int,
    rng_state: Tensor | None,  # (2,)
    row_offset: int,
    col_offset: int,
    exclude: Exclude = NOTHING,
    exclude_mined: bool = False,
    *,
    null_epilogue: bool = False,
    force_sm80: bool = False,
    cell_log2: int = 0,
    affine: Tensor | None = None,  # (5, B): of `weighted_pass`, with selection "affine"
    rho: Tensor | None = None,  # (K,)
) -> tuple[Tensor, ...]:
    """See `psm_kernels.ops.bank_pass`. Three flags exist for benchmarks and tests: products alone,
    whose outputs mean nothing; the kernels of sm_80 on a Hopper GPU; the size of mining's cells."""
    batch, dim = query.shape
    fp32 = functools.partial(torch.empty, dtype=torch.float32, device=bank.device)
    neg_lse, neg_sq_lse, neg_count = fp32(batch), fp32(batch), fp32(batch)
    neg_mean, topk_sim = fp32(batch, dim), fp32(batch, topk)
    topk_index = torch.empty(batch, topk, dtype=torch.int64, device=bank.device)
    _run(
        query,
        key if topk else None,
        bank,
        count,
        (neg_lse, neg_mean, neg_sq_lse, neg_count, topk_sim, topk_index),
        exclude,
        s_pos=s_pos.data_ptr(),
        rng_state=0 if rng_state is None else rng_state.data_ptr(),
        selection=SELECTIONS[selection],
        temperature=temperature,
        a=a,
        b=b,
        row_offset=row_offset,
        col_offset=col_offset,
        null_epilogue=null_epilogue,
        force_sm80=force_sm80,
        cell_log2=cell_log2,
        exclude_mined=exclude_mined,
        affine=_address(affine),
        rho=_address(rho),
    )
    return neg_lse, neg_mean, neg_sq_lse, neg_count, topk_sim, topk_index


def weighted_pass(
    query: Tensor,  # (B, D)
    bank: Tensor,  # (K, D)
    count: Tensor,  # ()
    temperature: float,
    affine: Tensor,  # (5, B)
    rho: Tensor,  # (K,)
    exclude: Exclude = NOTHING,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `psm_kernels.ops.affine.weighted_pass`."""
    log_sum, mean, _, weight, *_ = bank_pass(
        query, None, bank, count, affine[0], temperature, "affine", 0.0, 0.0, 0, None, 0, 0,
        exclude, affine=affine, rho=rho,
    )  # fmt: skip
    return log_sum, mean, weight


def bank_topk(
    query: Tensor,
    bank: Tensor,
    k: int,
    count: Tensor,
    exclude: Exclude = NOTHING,
    *,
    force_sm80: bool = False,
    cell_log2: int = 0,
) -> tuple[Tensor, Tensor]:
    """See `psm_kernels.ops.bank_topk`."""
    batch = query.shape[0]
    topk_sim = torch.empty(batch, k, dtype=torch.float32, device=bank.device)
    topk_index = torch.empty(batch, k, dtype=torch.int64, device=bank.device)
    if k:
        _run(
            None,
            query,
            bank,
            count,
            (None, None, None, None, topk_sim, topk_index),
            exclude,
            s_pos=0,
            rng_state=0,
            selection=SELECTIONS["all"],
            temperature=1.0,
            a=0.0,
            b=0.0,
            row_offset=0,
            col_offset=0,
            null_epilogue=False,
            force_sm80=force_sm80,
            cell_log2=cell_log2,
        )
    return topk_sim, topk_index


def _run(
    query: Tensor | None,
    key: Tensor | None,
    bank: Tensor,
    count: Tensor,
    outputs: tuple[Tensor | None, ...],
    exclude: Exclude,
    **settings,
) -> None:
    from psm_kernels import _C

    names = ("neg_lse", "neg_mean", "neg_sq_lse", "neg_count", "topk_sim", "topk_index")
    rows = key if query is None else query
    _C.cuda.bank_pass(
        query=_address(query),
        key=_address(key),
        bank=bank.data_ptr(),
        count=count.data_ptr(),
        batch=rows.shape[0],
        slots=bank.shape[0],
        dim=bank.shape[1],
        dtype=DTYPES[bank.dtype],
        topk=outputs[-1].shape[1],
        sums=query is not None,
        exclude=_address(exclude.slots),
        listed=0 if exclude.slots is None else exclude.slots.shape[1],
        ids=_address(exclude.ids),
        bank_ids=_address(exclude.bank_ids),
        **dict(zip(names, map(_address, outputs), strict=True)),
        **settings,
        **_place(bank),
        allocate=_Workspace(bank.device),
    )


def psm_finish(
    query: Tensor,  # (B, D) fp32
    key: Tensor,  # (B, D) fp32
    bank: Tensor,  # (K, D)
    s_pos: Tensor,  # (B,)
    swept: tuple[Tensor, ...],
    **settings,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `psm_kernels.ops.fused.psm_rows`."""
    from psm_kernels import _C

    outputs, arguments = cpp.finish_arguments(query, key, bank, s_pos, swept, **settings)
    _C.cuda.finish(**arguments, **_place(bank))
    return outputs


def enqueue(
    keys: Tensor,  # (B, D) of any float dtype
    labels: Tensor | None,  # (B,) int64
    ids: Tensor | None,  # (B,) int64
    bank: Tensor,  # (K, D) fp32 | bf16 | fp16
    bank_labels: Tensor,  # (K,) int64
    bank_ids: Tensor,  # (K,) int64
    ptr: Tensor,  # ()
    count: Tensor,  # ()
) -> None:
    """`MemoryBank.enqueue` in one kernel: normalize, cast, write, advance."""
    from psm_kernels import _C

    keys = keys.contiguous() if keys.dtype in DTYPES else keys.float().contiguous()
    labels, ids = (None if x is None else x.contiguous() for x in (labels, ids))
    ticket = torch.zeros((), dtype=torch.int32, device=bank.device)  # lives until the launch
    _C.cuda.enqueue(
        keys=keys.data_ptr(),
        labels=_address(labels),
        ids=_address(ids),
        bank=bank.data_ptr(),
        bank_labels=bank_labels.data_ptr(),
        bank_ids=bank_ids.data_ptr(),
        ptr=ptr.data_ptr(),
        count=count.data_ptr(),
        ticket=ticket.data_ptr(),
        batch=keys.shape[0],
        slots=bank.shape[0],
        dim=bank.shape[1],
        key_dtype=DTYPES[keys.dtype],
        bank_dtype=DTYPES[bank.dtype],
        **_place(bank),
    )


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _place(bank: Tensor) -> dict[str, int]:
    """The device and its current stream, which a graph capture replaces by its own."""
    stream = torch.cuda.current_stream(bank.device).cuda_stream
    return {"device": bank.device.index, "stream": stream}
