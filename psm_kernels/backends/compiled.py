"""What the compiled backends share: tensors into the structs of csrc/args.h, as addresses."""

from __future__ import annotations

import functools
from pathlib import Path

import torch
from torch import Tensor

from psm_kernels._csrc import source_id
from psm_kernels.backends.base import NOTHING, Backend, BankPass, Exclude
from psm_kernels.options import PassOptions, PSMOptions

# The enums of csrc/args.h
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


def address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


class Compiled(Backend):
    """A backend that runs the structs of psm_kernels._C."""

    def run(self, name: str, args, bank: Tensor) -> None:
        raise NotImplementedError

    def bank_pass(
        self,
        query: Tensor,
        key: Tensor | None,
        bank: Tensor,
        count: Tensor,
        s_pos: Tensor,
        options: PassOptions,
        exclude: Exclude = NOTHING,
        rng_state: Tensor | None = None,
    ) -> BankPass:

        args = _pass_args(bank, count, len(query), options, exclude, rng_state)
        result = _result(query, bank, options.topk)
        args.query, args.key, args.s_pos = map(address, (query, key, s_pos))
        _fill(args, result)
        self.run("bank_pass", args, bank)
        return result

    def bank_topk(self, query, bank, k, count, exclude=NOTHING):
        args = _pass_args(bank, count, len(query), PassOptions(1.0, topk=k), exclude, None)
        result = _result(query, bank, k)
        args.key = query.data_ptr()
        args.topk_sim, args.topk_index = result.topk_sim.data_ptr(), result.topk_index.data_ptr()
        self.run("bank_pass", args, bank)
        return result.topk_sim, result.topk_index

    def weighted_pass(self, query, bank, count, temperature, affine, rho, exclude=NOTHING):
        options = PassOptions(temperature)
        args = _pass_args(bank, count, len(query), options, exclude, None)
        o = args.options
        o.selection = 3
        args.options = o
        result = _result(query, bank, 0)
        args.query, args.s_pos = query.data_ptr(), affine.data_ptr()
        args.affine, args.rho = affine.data_ptr(), rho.data_ptr()
        _fill(args, result)
        self.run("bank_pass", args, bank)
        return result.neg_lse, result.neg_mean, result.neg_count

    def psm_step(
        self,
        query: Tensor,
        key: Tensor,
        bank: Tensor,
        count: Tensor,
        options: PSMOptions,
        exclude: Exclude = NOTHING,
        rng_state: Tensor | None = None,
        row_offset: int = 0,
    ) -> tuple[Tensor, Tensor]:
        from psm_kernels import _C

        query, key = query.float().contiguous(), key.float().contiguous()
        loss, gradient = query.new_empty(len(query)), torch.empty_like(query)
        args = _C.StepArgs(
            pass_=_pass_args(
                bank, count, len(query), options.mining_pass(row_offset), exclude, rng_state
            ),
            query=query.data_ptr(),
            key=key.data_ptr(),
            soft_weights=SOFT_WEIGHTS[options.soft_weights],
            weight_temperature=options.weight_temperature,
            hard_weight=options.hard_weight,
            loss=loss.data_ptr(),
            gradient=gradient.data_ptr(),
        )
        self.run("psm_step", args, bank)
        return loss, gradient


def bank_struct(bank, count):
    from psm_kernels import _C

    return _C.Bank(
        rows=bank.data_ptr(),
        slots=bank.shape[0],
        dim=bank.shape[1],
        dtype=DTYPES[bank.dtype],
        count=count.data_ptr(),
    )


def _pass_args(bank, count, batch, options, exclude, rng_state):
    from psm_kernels import _C

    return _C.PassArgs(
        options=_C.PassOptions(
            temperature=options.temperature,
            a=options.a,
            b=options.b,
            selection=SELECTIONS[options.selection],
            topk=options.topk,
            exclude_mined=options.exclude_mined,
            row_offset=options.row_offset,
            col_offset=options.col_offset,
        ),
        bank=bank_struct(bank, count),
        exclude=_C.Exclude(
            slots=address(exclude.slots),
            listed=0 if exclude.slots is None else exclude.slots.shape[1],
            ids=address(exclude.ids),
            bank_ids=address(exclude.bank_ids),
        ),
        batch=batch,
        rng_state=address(rng_state),
    )


def _result(query, bank, k):
    batch, dim = query.shape
    fp32 = functools.partial(torch.empty, dtype=torch.float32, device=bank.device)
    index = torch.empty(batch, k, dtype=torch.int64, device=bank.device)
    return BankPass(fp32(batch), fp32(batch, dim), fp32(batch), fp32(batch), fp32(batch, k), index)


def _fill(args, result):
    for name, value in result._asdict().items():
        setattr(args, name, value.data_ptr())
