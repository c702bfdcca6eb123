"""Backend `cpp`: hands tensors to psm_kernels._C as addresses. The kernels are in csrc/cpu."""

from __future__ import annotations

import functools
import os
from pathlib import Path

import torch
from torch import Tensor

from psm_kernels._csrc import source_id
from psm_kernels.backends.base import NOTHING, Backend, BankPass, Exclude

MAX_FINISH_TOPK = 1024  # a thread of psm_finish holds (topk, D) in fp32

# The enums of csrc/bank_pass.h
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
SELECTIONS = {"bernoulli": 0, "expected": 1, "all": 2, "affine": 3}
SOFT_WEIGHTS = {"attention": 0, "uniform": 1, "binary": 2}

_REBUILD = "build it with `pip install -e .` in a checkout, or reinstall the package"


@functools.cache
def unavailable() -> str | None:
    from psm_kernels import __version__

    try:
        from psm_kernels import _C
    except ImportError as error:
        return _missing(error)
    built, wanted = _C.source_id, source_id(Path(__file__).parents[1], __version__)
    if "+" not in wanted:  # no sources next to the package: the version has to do
        built = built.partition("+")[0]
    if built != wanted:
        return f"psm_kernels._C was built from other sources ({built}, not {wanted}): {_REBUILD}"
    return None


def _missing(error: ImportError) -> str:
    try:
        from psm_kernels._build_info import MISSING
    except ImportError:
        return f"psm_kernels._C cannot be imported ({error}): {_REBUILD}"
    return f"{MISSING}: install one and {_REBUILD}"


def instruction_set() -> str:
    """The best this machine runs, or PSM_CPU_ISA, which exists for tests."""
    from psm_kernels import _C

    return _forced(os.environ.get("PSM_CPU_ISA"), tuple(_C.instruction_sets()))


@functools.cache
def _forced(name: str | None, able: tuple[str, ...]) -> str:
    if name is None or name in able:
        return name or able[0]
    raise ValueError(f"PSM_CPU_ISA: got {name!r}, wanted one that this machine runs: {able}")


class _Workspace:
    """Lends the kernels memory of torch for one call."""

    def __call__(self, size: int) -> int:
        self.buffer = torch.empty(size, dtype=torch.uint8, device="cpu")
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
    mean: bool = True,
    affine: Tensor | None = None,  # (5, B)
    rho: Tensor | None = None,  # (K,)
) -> tuple[Tensor, ...]:
    """See `psm_kernels.ops.bank_pass`. The last three are for the two passes below; without
    `mean` neg_mean is not written and the product for it is saved."""
    from psm_kernels import _C

    batch, dim = query.shape
    neg_lse, neg_sq_lse, neg_count, neg_mean = (
        s_pos.new_empty(shape) for shape in (batch, batch, batch, (batch, dim))
    )
    topk_sim, topk_index = _topk_outputs(query, topk)
    seed, offset = _noise(rng_state)
    _C.bank_pass(
        query=query.data_ptr(),
        key=key.data_ptr() if topk else 0,
        bank=bank.data_ptr(),
        s_pos=s_pos.data_ptr(),
        batch=batch,
        count=_valid(count, bank),
        dim=dim,
        dtype=DTYPES[bank.dtype],
        selection=SELECTIONS[selection],
        temperature=temperature,
        a=a,
        b=b,
        topk=topk,
        seed=seed,
        offset=offset,
        row_offset=row_offset,
        col_offset=col_offset,
        affine=0 if affine is None else affine.data_ptr(),
        rho=0 if rho is None else rho.data_ptr(),
        **_excluded(exclude),
        exclude_mined=exclude_mined,
        neg_lse=neg_lse.data_ptr(),
        neg_mean=neg_mean.data_ptr() if mean else 0,
        neg_sq_lse=neg_sq_lse.data_ptr(),
        neg_count=neg_count.data_ptr(),
        topk_sim=topk_sim.data_ptr(),
        topk_index=topk_index.data_ptr(),
        isa=instruction_set(),
        threads=torch.get_num_threads(),
        allocate=_Workspace(),
    )
    return neg_lse, neg_mean, neg_sq_lse, neg_count, topk_sim, topk_index


def unit_pair(query: Tensor, key: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `psm_kernels.ops.fused.psm_rows`."""
    from psm_kernels import _C

    batch, dim = query.shape
    query, key = query.float(), key.float()
    unit_query, unit_key = torch.empty_like(query), torch.empty_like(key)
    norms, s_pos = query.new_empty(batch, 1), query.new_empty(batch)
    _C.unit_pair(
        query=query.data_ptr(),
        key=key.data_ptr(),
        unit_query=unit_query.data_ptr(),
        unit_key=unit_key.data_ptr(),
        norms=norms.data_ptr(),
        s_pos=s_pos.data_ptr(),
        batch=batch,
        dim=dim,
    )
    return unit_query, unit_key, norms, s_pos


def through_norm(gradient: Tensor, unit: Tensor, norms: Tensor) -> Tensor:
    """See `psm_kernels.ops.fused.psm_rows`."""
    from psm_kernels import _C

    batch, dim = unit.shape
    _C.through_norm(
        unit=unit.data_ptr(),
        norms=norms.data_ptr(),
        batch=batch,
        dim=dim,
        gradient=gradient.data_ptr(),
    )
    return gradient


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

    outputs, arguments = finish_arguments(query, key, bank, s_pos, swept, **settings)
    _C.psm_finish(
        **arguments,
        slots=len(bank),
        isa=instruction_set(),
        threads=torch.get_num_threads(),
    )
    return outputs


def finish_arguments(
    query: Tensor,
    key: Tensor,
    bank: Tensor,
    s_pos: Tensor,
    swept: tuple[Tensor, ...],
    *,
    temperature: float,
    soft_weights: str,
    weight_temperature: float,
    hard_weight: float,
) -> tuple[tuple[Tensor, Tensor, Tensor], dict[str, int | float]]:
    """What psm_finish returns, to be written, and the arguments that _C wants here and for CUDA."""
    neg_lse, neg_mean, neg_sq_lse, neg_count, _, topk_index = swept
    batch, dim = query.shape
    loss, grad_query = torch.empty_like(s_pos), torch.empty_like(query)
    stats = s_pos.new_empty(3, batch)
    arguments = {
        "query": query.data_ptr(),
        "key": key.data_ptr(),
        "bank": bank.data_ptr(),
        "s_pos": s_pos.data_ptr(),
        "neg_lse": neg_lse.data_ptr(),
        "neg_mean": neg_mean.data_ptr(),
        "neg_sq_lse": neg_sq_lse.data_ptr(),
        "neg_count": neg_count.data_ptr(),
        "topk_index": topk_index.data_ptr(),
        "batch": batch,
        "dim": dim,
        "dtype": DTYPES[bank.dtype],
        "temperature": temperature,
        "topk": topk_index.shape[1],
        "soft_weights": SOFT_WEIGHTS[soft_weights],
        "weight_temperature": weight_temperature,
        "hard_weight": hard_weight,
        "loss": loss.data_ptr(),
        "grad_query": grad_query.data_ptr(),
        "stats": stats.data_ptr(),
    }
    return (loss, grad_query, stats), arguments


def row_ranges(
    query: Tensor,  # (B, D)
    bank: Tensor,  # (K, D)
    count: Tensor,  # ()
    temperature: float,
    exclude: Exclude,
) -> tuple[Tensor, Tensor]:
    """See `psm_kernels.ops.affine.row_ranges`."""
    lse, *_, lowest, _ = bank_pass(
        query, -query, bank, count, query.new_zeros(len(query), dtype=torch.float32), temperature,
        "all", 0.0, 0.0, 1, None, 0, 0, exclude, mean=False,
    )  # fmt: skip
    return lse, -lowest[:, 0]


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
    query: Tensor,  # (B, D)
    bank: Tensor,  # (K, D)
    k: int,
    count: Tensor,  # ()
    exclude: Exclude = NOTHING,
) -> tuple[Tensor, Tensor]:
    """See `psm_kernels.ops.bank_topk`."""
    from psm_kernels import _C

    batch, dim = query.shape
    topk_sim, topk_index = _topk_outputs(query, k)
    _C.bank_topk(
        query=query.data_ptr(),
        bank=bank.data_ptr(),
        batch=batch,
        count=_valid(count, bank),
        dim=dim,
        dtype=DTYPES[bank.dtype],
        topk=k,
        **_excluded(exclude),
        topk_sim=topk_sim.data_ptr(),
        topk_index=topk_index.data_ptr(),
        isa=instruction_set(),
        threads=torch.get_num_threads(),
        allocate=_Workspace(),
    )
    return topk_sim, topk_index


def _excluded(exclude: Exclude) -> dict[str, int]:
    slots, ids, bank_ids = (0 if value is None else value.data_ptr() for value in exclude)
    listed = 0 if exclude.slots is None else exclude.slots.shape[1]
    return {"exclude": slots, "listed": listed, "ids": ids, "bank_ids": bank_ids}


def _topk_outputs(query: Tensor, k: int) -> tuple[Tensor, Tensor]:
    shape = (query.shape[0], k)
    return query.new_empty(shape, dtype=torch.float32), query.new_empty(shape, dtype=torch.int64)


def _noise(rng_state: Tensor | None) -> tuple[int, int]:
    return (0, 0) if rng_state is None else tuple(rng_state.tolist())


def _valid(count: Tensor, bank: Tensor) -> int:
    return min(max(int(count), 0), bank.shape[0])


class Cpp(Backend):
    name, what = "cpp", "C++ kernels: AVX-512, AVX2, portable"
    devices = ("cpu",)
    max_dim = max_topk_dim = 4096
    max_step_topk = 1024

    def unavailable(self):
        return unavailable()

    def bank_pass(self, query, key, bank, count, s_pos, options, exclude=NOTHING, rng_state=None):
        o = options
        return BankPass(
            *bank_pass(
                query,
                key,
                bank,
                count,
                s_pos,
                o.temperature,
                o.selection,
                o.a,
                o.b,
                o.topk,
                rng_state,
                o.row_offset,
                o.col_offset,
                exclude,
                o.exclude_mined,
            )
        )

    def bank_topk(self, query, bank, k, count, exclude=NOTHING):
        return bank_topk(query, bank, k, count, exclude)

    def psm_step(
        self, query, key, bank, count, options, exclude=NOTHING, rng_state=None, row_offset=0
    ):
        rows, key, norms, s_pos = unit_pair(query.contiguous(), key.contiguous())
        o = options
        seen, mine = rows.to(bank.dtype), key.to(bank.dtype)
        r = self.bank_pass(
            seen,
            mine if o.topk else None,
            bank,
            count,
            s_pos,
            o.mining_pass(row_offset),
            exclude,
            rng_state,
        )
        loss, gradient, _ = psm_finish(
            rows,
            key,
            bank,
            s_pos,
            r,
            temperature=o.temperature,
            soft_weights=o.soft_weights,
            weight_temperature=o.weight_temperature,
            hard_weight=o.hard_weight,
        )
        return loss, through_norm(gradient, rows, norms)

    def weighted_pass(self, *args):
        return weighted_pass(*args)

    def row_ranges(self, *args):
        return row_ranges(*args)
