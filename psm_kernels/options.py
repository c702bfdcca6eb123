"""Frozen settings of a pass and of the losses: name, default and check, each once.

What is made here is right: whoever gets one hands it on whole and checks nothing again. The structs
of the same names in csrc/args.h are what crosses into compiled code.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields, replace
from typing import TypeVar

from psm_kernels import checks

SELECTIONS = ("bernoulli", "expected", "all")
SOFT_WEIGHTS = ("attention", "uniform", "binary")
NEGATIVES = ("bank", "neighbors")
REDUCTIONS = ("mean", "sum", "none")

F = TypeVar("F", bound=Callable)


@dataclass(frozen=True)
class PassOptions:
    """A pass over the bank, see `psm_kernels.ops.bank_pass`."""

    temperature: float
    selection: str = "all"
    a: float = 0.5
    b: float = 0.0
    topk: int = 0
    exclude_mined: bool = False
    row_offset: int = 0  # global index of query row 0 and bank slot 0, for the noise
    col_offset: int = 0

    def __post_init__(self):
        checks.check_number("temperature", self.temperature, above=0)
        _check_mining(self)
        checks.check_option("exclude_mined", self.exclude_mined, (False, True))


def _check_mining(options: PassOptions | PSMOptions) -> None:
    checks.check_int("topk", options.topk, 0)
    checks.check_number("a", options.a, least=0)
    checks.check_number("b", options.b)
    checks.check_option("selection", options.selection, SELECTIONS)


@dataclass(frozen=True, kw_only=True)
class LossOptions:
    """What every loss has. A method's own settings are a subclass, in the method's file."""

    reduction: str = "mean"

    def __post_init__(self):
        checks.check_option("reduction", self.reduction, REDUCTIONS)

    @classmethod
    def of(cls, options: LossOptions | None, settings: dict) -> LossOptions:
        """`options`, or else the defaults, with `settings` in the place of their own."""
        if options is None:
            return cls(**settings)
        if not isinstance(options, cls):
            raise ValueError(f"options: got {options!r}, wanted {cls.__name__}")
        return replace(options, **settings) if settings else options

    def check_size(self, size: int) -> None:
        """Raise the ValueError of a setting that does not fit a bank of `size` rows."""


@dataclass(frozen=True)
class ContrastiveOptions(LossOptions):
    """Of a loss that is a softmax: all but MSF."""

    temperature: float = 0.5

    def __post_init__(self):
        super().__post_init__()
        checks.check_number("temperature", self.temperature, above=0)


@dataclass(frozen=True)
class PSMOptions(ContrastiveOptions):
    """See `psm_kernels.functional.psm_loss`. Here, not in its file: backends fuse it."""

    topk: int = 5
    a: float = 0.5
    b: float = 0.0
    selection: str = "bernoulli"
    soft_weights: str = "attention"
    weight_temperature: float = 1.0
    hard_weight: float = 1.0
    negatives: str = "bank"

    def __post_init__(self):
        super().__post_init__()
        _check_mining(self)
        checks.check_option("soft_weights", self.soft_weights, SOFT_WEIGHTS)
        checks.check_number("weight_temperature", self.weight_temperature, above=0)
        checks.check_number("hard_weight", self.hard_weight, least=0)
        checks.check_option("negatives", self.negatives, NEGATIVES)

    def check_size(self, size: int) -> None:
        checks.check_int("topk", self.topk, 0, size, "the bank's rows")

    def mining_pass(self, row_offset: int = 0) -> PassOptions:
        """What is mined is not summed."""
        return PassOptions(
            self.temperature, self.selection, self.a, self.b, self.topk,
            exclude_mined=True, row_offset=row_offset,
        )  # fmt: skip


def takes(options: type) -> Callable[[F], F]:
    """For a function whose **settings are the fields of `options`: its signature shows them."""

    def show(function: F) -> F:
        function.__signature__ = with_fields(inspect.signature(function), options)
        return function

    return show


def with_fields(
    signature: inspect.Signature, options: type, more: tuple[inspect.Parameter, ...] = ()
) -> inspect.Signature:
    """`signature` with `more` and the fields of `options` in the place of its **settings."""
    named = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
    named += [p for p in more if p.name not in signature.parameters]
    taken = {p.name for p in named}
    own = [
        inspect.Parameter(
            f.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=inspect.Parameter.empty if f.default is MISSING else f.default,
            annotation=f.type,
        )
        for f in fields(options)
        if f.name not in taken
    ]
    return signature.replace(parameters=[*named, *own])
