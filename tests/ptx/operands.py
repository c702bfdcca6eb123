"""Operands of a statement, as functions of the registers of a team."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from ptx.text import TYPES, Fault

if TYPE_CHECKING:
    from ptx.machine import Machine

BITS = {size: np.dtype(f"u{size}") for size in (1, 2, 4, 8)}
# What an instruction may ask for; else it gives nothing, or the statement to go on with.
# PAUSE goes on behind it when other teams have run, AGAIN asks it once more.
LEAVE, PAUSE, AGAIN, BARRIER, TOGETHER = range(-5, 0)


class Operands:
    """Turns operands of a statement into functions of the registers of a team."""

    def __init__(self, machine: Machine):
        self.machine = machine

    def value(self, name: str, dtype: np.dtype) -> Callable[[list], np.ndarray]:
        machine = self.machine
        if name in machine.slots:
            slot = machine.slots[name]
        else:
            slot = machine.constant(literal(name), dtype)
        kept = machine.dtypes[slot]
        if kept == dtype:
            return operator.itemgetter(slot)
        if kept.itemsize == dtype.itemsize and kept.kind != "b":
            return lambda registers: registers[slot].view(dtype)
        if kept.kind in "ui" and dtype.kind in "ui":  # the low bits, or zeros before them
            return lambda registers: registers[slot].astype(BITS[dtype.itemsize]).view(dtype)
        raise Fault(f"{name} of {kept} as {dtype}")

    def address(self, operand: tuple) -> Callable[[list], np.ndarray]:
        name, offset, _ = operand
        base = self.value(name, TYPES["u64"])
        return lambda registers: base(registers).astype(np.int64) + offset

    def target(self, name: str) -> Callable[[object, np.ndarray | None, np.ndarray], None]:
        if name == "_":
            return lambda w, lanes, value: None
        slot = self.machine.slots[name]
        dtype = self.machine.dtypes[slot]

        def store(w, lanes, value):
            if value.dtype != dtype:
                if value.dtype.itemsize != dtype.itemsize:  # ld.u8 into 16 bits and the like
                    value = value.astype(f"{value.dtype.kind}{dtype.itemsize}")
                value = value.view(dtype)
            if lanes is not None:
                value = np.where(lanes, value, w.registers[slot])
            w.registers[slot] = value

        return store


def apply(result, function, *sources):
    """The statement that stores `function` of its sources. Two and three of them, by far the most,
    are written out: a generator would cost as much as the arithmetic."""
    if len(sources) == 2:
        x, y = sources
        return lambda w, m: result(w, m, function(x(w.registers), y(w.registers)))
    if len(sources) == 3:
        x, y, z = sources
        return lambda w, m: result(w, m, function(x(w.registers), y(w.registers), z(w.registers)))
    return lambda w, m: result(w, m, function(*(source(w.registers) for source in sources)))


def literal(text: str) -> int:
    """The bits of a constant."""
    if text[:2] in ("0f", "0d"):
        return int(text[2:], 16)
    return int(text.removesuffix("U"), 0) & 0xFFFFFFFFFFFFFFFF
