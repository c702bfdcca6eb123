"""Argument checks shared by operators, losses and the bank. Every message names the argument, what
came and what is wanted; nothing here reads a device value, so nothing synchronizes."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import SupportsIndex

import torch
from torch import Tensor

BANK_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_matrix(
    name: str, value: Tensor, *, like: str = "", shape: Sequence[int | None] = ()
) -> None:
    """A floating (rows, dim) tensor whose sizes equal those of `shape` that are not None."""
    if not isinstance(value, Tensor):
        raise ValueError(f"{name}: got {type(value).__name__}, wanted a tensor")
    size, wanted = value.shape, tuple(shape) or (None, None)
    if (
        len(size) != 2
        or (wanted[0] is not None and wanted[0] != size[0])
        or (wanted[1] is not None and wanted[1] != size[1])
    ):
        # The text is made here alone: torch.compile cannot print a dynamic size.
        sizes = ", ".join("any" if w is None else str(int(w)) for w in wanted)
        text = f"two dimensions ({sizes})" + (f" as {like}" if like else "")
        raise ValueError(f"{name}: got shape {tuple(size)}, wanted {text}")
    if 0 in size:
        raise ValueError(f"{name}: got shape {tuple(size)}, wanted at least one row and column")
    if not value.is_floating_point():
        raise ValueError(f"{name}: got dtype {value.dtype}, wanted a floating dtype")


def check_vector(name: str, value: Tensor, size: int, dtype: torch.dtype | None = None) -> None:
    if not isinstance(value, Tensor) or value.shape != (size,):
        got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"{name}: got {got}, wanted a tensor of shape ({size},)")
    if dtype is not None and value.dtype != dtype:
        raise ValueError(f"{name}: got dtype {value.dtype}, wanted {dtype}")


def check_slots(name: str, value: Tensor, rows: int, most: int) -> None:
    """An int64 list of at most `most` slots for each of `rows` rows."""
    if not isinstance(value, Tensor) or value.ndim != 2 or value.shape[0] != rows:
        got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"{name}: got {got}, wanted a tensor of shape ({rows}, at most {most})")
    if value.shape[1] > most:
        raise ValueError(f"{name}: got {value.shape[1]} slots per row, wanted at most {most}")
    if value.dtype != torch.int64:
        raise ValueError(f"{name}: got dtype {value.dtype}, wanted {torch.int64}")


def check_device(name: str, value: Tensor, device: torch.device) -> None:
    if value.device != device:
        raise ValueError(
            f"{name}: got device {value.device}, wanted {device}, where the bank lives"
        )


def check_bank(bank: Tensor, name: str = "bank") -> None:
    check_matrix(name, bank)
    if bank.dtype not in BANK_DTYPES:
        raise ValueError(f"{name}: got dtype {bank.dtype}, wanted one of {BANK_DTYPES}")
    if not bank.is_contiguous():
        raise ValueError(f"{name}: got strides {bank.stride()}, wanted contiguous rows (K, D)")


def check_number(
    name: str,
    value: float,
    *,
    above: float | None = None,
    least: float | None = None,
    below: float | None = None,
) -> None:
    """A finite number; `above` and `below` are open bounds, `least` a closed one."""
    bounds = [
        f"{sign} {bound:g}"
        for sign, bound in ((">", above), (">=", least), ("<", below))
        if bound is not None
    ]
    wanted = " and ".join(["a finite number", *bounds])
    # Not math.isfinite: torch.compile has no symbolic form of it.
    ok = isinstance(value, (int, float)) and not isinstance(value, bool)
    ok = ok and -math.inf < value < math.inf
    ok = ok and (above is None or value > above) and (least is None or value >= least)
    if not (ok and (below is None or value < below)):
        got = f"a {type(value).__name__}" if isinstance(value, Tensor) else repr(value)
        raise ValueError(f"{name}: got {got}, wanted {wanted}")


def check_int(name: str, value: int, least: int, most: int | None = None, why: str = "") -> None:
    ok = isinstance(value, int) and not isinstance(value, bool) and value >= least
    if not (ok and (most is None or value <= most)):
        bounds = f">= {least}" if most is None else f"from {least} to {most}"
        raise ValueError(f"{name}: got {value!r}, wanted an integer {bounds}{why and f' ({why})'}")


def as_int(value: SupportsIndex) -> int:
    """numpy's and other integers as Python's; what is none stays as it is, to be refused."""
    try:
        return value if isinstance(value, bool) else operator.index(value)
    except TypeError:
        return value


def check_option(name: str, value: str, options: Sequence[str]) -> None:
    if value not in options:
        raise ValueError(f"{name}: got {value!r}, wanted one of {', '.join(map(repr, options))}")


def check_rng_state(rng_state: Tensor, device: torch.device) -> None:
    check_vector("rng_state", rng_state, 2, torch.int64)
    check_device("rng_state", rng_state, device)


def as_count(count: Tensor | int | None, bank: Tensor) -> Tensor:
    """`count` as the operators read it, 0-d int64 on the bank's device; None is a full bank."""
    size = bank.shape[0]
    if isinstance(count, Tensor):
        if count.ndim != 0 or count.dtype != torch.int64:
            got = f"shape {tuple(count.shape)}, dtype {count.dtype}"
            raise ValueError(f"count: got {got}, wanted a 0-d int64 tensor")
        check_device("count", count, bank.device)
        return count
    if count is not None:
        check_int("count", count, 0, size, "the bank's rows")
    return torch.full((), size if count is None else count, dtype=torch.int64, device=bank.device)
