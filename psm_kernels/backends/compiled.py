"""What the compiled backends share: tensors become the structs of csrc/args.h, as addresses.

psm_kernels._C is imported where it is used: without it the other backends run."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from psm_kernels._csrc import source_id
from psm_kernels.backends.base import NOTHING, Backend, BankPass, Exclude
from psm_kernels.options import PassOptions, PSMOptions

# The enums of csrc/args.h
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
SELECTIONS = {"bernoulli": 0, "expected": 1, "all": 2, "affine": 3}
SOFT_WEIGHTS = {"attention": 0, "uniform": 1, "binary": 2}
REDUCTIONS = {"none": 0, "mean": 1, "sum": 2}

_REBUILD = "build it with `pip install -e .` in a checkout, or reinstall the package"


@functools.cache
def unavailable() -> str | None:
    """One line that says why psm_kernels._C cannot be used."""
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


class Compiled(Backend):
    def run(self, function: str, args: Any, bank: Tensor) -> None:
        """Call a function of psm_kernels._C by its name on args, where `bank` lies."""
        raise NotImplementedError

    def bank_pass(
        self, query: Tensor, key: Tensor | None, bank: Tensor, count: Tensor, s_pos: Tensor,
        options: PassOptions, exclude: Exclude = NOTHING, rng_state: Tensor | None = None,
    ) -> BankPass:  # fmt: skip
        return self._pass(
            pass_struct(options), query, key, bank, count, exclude,
            s_pos=address(s_pos), rng_state=address(rng_state),
        )  # fmt: skip

    def bank_topk(
        self, query: Tensor, bank: Tensor, k: int, count: Tensor, exclude: Exclude = NOTHING
    ) -> tuple[Tensor, Tensor]:
        options = pass_struct(PassOptions(temperature=1.0, topk=k))  # its sums are not wanted
        found = query.new_empty((len(query), k), dtype=torch.float32)
        index = query.new_empty((len(query), k), dtype=torch.int64)
        args = _pass_args(
            options, len(query), bank, count, exclude, key=query.data_ptr(),
            topk_sim=found.data_ptr(), topk_index=index.data_ptr(),
        )  # fmt: skip
        self.run("bank_pass", args, bank)
        return found, index

    def weighted_pass(
        self, query: Tensor, bank: Tensor, count: Tensor, temperature: float, affine: Tensor,
        rho: Tensor, exclude: Exclude = NOTHING,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        result = self._pass(
            _affine_struct(temperature), query, None, bank, count, exclude,
            s_pos=address(affine), affine=address(affine), rho=address(rho),  # s_pos: not read
        )  # fmt: skip
        return result.neg_lse, result.neg_mean, result.neg_count

    def psm_step(
        self, query: Tensor, key: Tensor, bank: Tensor, count: Tensor, options: PSMOptions,
        exclude: Exclude = NOTHING, rng_state: Tensor | None = None, row_offset: int = 0,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        from psm_kernels import _C

        query, key = query.float().contiguous(), key.float().contiguous()
        batch = query.shape[0]  # len(query) would ask torch's Python
        mining = _mining_struct(options, row_offset)
        loss = query.new_empty(batch if options.reduction == "none" else ())
        gradient = torch.empty_like(query)
        noise = address(rng_state)
        args = _C.StepArgs(
            pass_=_pass_args(mining, batch, bank, count, exclude, rng_state=noise),
            query=query.data_ptr(),
            key=key.data_ptr(),
            soft_weights=SOFT_WEIGHTS[options.soft_weights],
            weight_temperature=options.weight_temperature,
            hard_weight=options.hard_weight,
            reduction=REDUCTIONS[options.reduction],
            loss=loss.data_ptr(),
            gradient=gradient.data_ptr(),
        )
        self.run("psm_step", args, bank)
        return loss, gradient

    def enqueue(
        self, keys: Tensor, labels: Tensor | None, ids: Tensor | None, bank: Tensor,
        bank_labels: Tensor, bank_ids: Tensor, ptr: Tensor, count: Tensor,
        rng_state: Tensor | None = None,
    ) -> bool:  # fmt: skip
        from psm_kernels import _C

        keys = keys.contiguous() if keys.dtype in DTYPES else keys.float().contiguous()
        labels = None if labels is None else labels.contiguous()
        ids = None if ids is None else ids.contiguous()
        args = _C.EnqueueArgs(
            bank=bank_struct(bank, count),
            keys=keys.data_ptr(),
            key_dtype=DTYPES[keys.dtype],
            batch=keys.shape[0],
            labels=address(labels),
            ids=address(ids),
            bank_labels=bank_labels.data_ptr(),
            bank_ids=bank_ids.data_ptr(),
            ptr=ptr.data_ptr(),
            rng_state=address(rng_state),
        )
        self.run("enqueue", args, bank)
        # For autograd, which refuses a backward that would read what has changed.
        written = (bank, bank_labels, bank_ids, ptr, count)
        torch.autograd.graph.increment_version(
            written if rng_state is None else (*written, rng_state)
        )
        return True

    def _pass(
        self,
        options: Any,  # _C.PassOptions
        query: Tensor,  # (B, D)
        key: Tensor | None,  # (B, D)
        bank: Tensor,
        count: Tensor,
        exclude: Exclude,
        *,
        mean: bool = True,  # without it neg_mean is not written, which saves the product for it
        **addresses: int,
    ) -> BankPass:
        batch, topk = len(query), (len(query), options.topk)
        empty = functools.partial(torch.empty, dtype=torch.float32, device=bank.device)
        result = BankPass(
            neg_lse=empty(batch),
            neg_mean=empty(query.shape),
            neg_sq_lse=empty(batch),
            neg_count=empty(batch),
            topk_sim=empty(topk),
            topk_index=empty(topk, dtype=torch.int64),
        )
        addresses |= {name: tensor.data_ptr() for name, tensor in result._asdict().items()}
        if not mean:
            del addresses["neg_mean"]
        addresses |= {"query": query.data_ptr(), "key": address(key)}
        args = _pass_args(options, batch, bank, count, exclude, **addresses)
        self.run("bank_pass", args, bank)
        return result


def address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def bank_struct(bank: Tensor, count: Tensor) -> Any:
    return _bank_struct(bank.data_ptr(), *bank.shape, DTYPES[bank.dtype], count.data_ptr())


@functools.lru_cache(maxsize=256)
def _bank_struct(rows: int, slots: int, dim: int, dtype: int, count: int) -> Any:
    from psm_kernels import _C

    return _C.Bank(rows=rows, slots=slots, dim=dim, dtype=dtype, count=count)


def _pass_args(
    options: Any, batch: int, bank: Tensor, count: Tensor, exclude: Exclude, **addresses: int
) -> Any:
    from psm_kernels import _C

    args = _C.PassArgs(options=options, batch=batch, bank=bank_struct(bank, count), **addresses)
    if exclude is not NOTHING:
        slots, ids, bank_ids = map(address, exclude)
        listed = 0 if exclude.slots is None else exclude.slots.shape[1]
        args.exclude = _C.Exclude(slots=slots, listed=listed, ids=ids, bank_ids=bank_ids)
    return args


@functools.lru_cache(maxsize=256)
def pass_struct(options: PassOptions) -> Any:
    from psm_kernels import _C

    return _C.PassOptions(**vars(options) | {"selection": SELECTIONS[options.selection]})


@functools.lru_cache(maxsize=256)
def _mining_struct(options: PSMOptions, row_offset: int) -> Any:
    return pass_struct(options.mining_pass(row_offset))


@functools.lru_cache(maxsize=256)
def _affine_struct(temperature: float) -> Any:
    from psm_kernels import _C

    return _C.PassOptions(temperature=temperature, selection=SELECTIONS["affine"])
