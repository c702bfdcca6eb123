"""What each PTX instruction does, as a function of a team of warps and a mask of its lanes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ptx import arithmetic, memory, products
from ptx.operands import AGAIN, BARRIER, LEAVE, TOGETHER, Operands
from ptx.text import TYPES, Fault, Statement

if TYPE_CHECKING:
    from ptx.machine import Machine


def compile_statement(machine: Machine, s: Statement):
    builder = BUILDERS.get(s.opcode[0], arithmetic.arithmetic)
    try:
        return builder(Operands(machine), machine, s)
    except (KeyError, TypeError, ValueError, Fault) as error:
        reason = f"{s.text}: {error!r}"

        def unknown(w, lanes):
            raise Fault(f"not understood: {reason}")

        return unknown


# --- control, and what warps tell each other ---


def branch(take: Operands, machine: Machine, s: Statement):
    target = machine.kernel.labels[s.operands[0]]
    return lambda w, m: target


def shuffle(take: Operands, machine: Machine, s: Statement):
    mode = s.opcode[2]
    first = s.operands[0]
    targets = [take.target(n) for n in (first if isinstance(first, list) else [first])]
    x, b, c, member = (take.value(n, TYPES["u32"]) for n in s.operands[1:])

    def run(w, lanes):
        r = w.registers
        if not w.together(lanes, member(r)):
            return TOGETHER
        value, by, control = x(r), b(r).astype(np.int64), c(r).astype(np.int64)
        lane = w.lanes % 32
        segment = control >> 8 & 31
        limit = (lane & segment) | (control & 31 & ~segment)
        source = {
            "bfly": lane ^ by,
            "down": lane + by,
            "up": lane - by,
            "idx": (lane & segment) | (by & 31 & ~segment),
        }[mode]
        good = source >= limit if mode == "up" else source <= limit
        result = value[w.lanes - lane + np.where(good, source, lane)]
        targets[0](w, lanes, result)
        if len(targets) > 1:
            targets[1](w, lanes, good)
        return None

    return run


def ballot(said: np.ndarray, axis: int) -> np.ndarray:
    return np.packbits(said, axis=axis, bitorder="little").view(np.uint32)[:, 0]


def vote(take: Operands, machine: Machine, s: Statement):
    result, p = take.target(s.operands[0]), take.value(s.operands[1], TYPES["pred"])
    member = take.value(s.operands[2], TYPES["u32"])
    reduce = {"any": np.any, "all": np.all, "ballot": ballot}[s.opcode[2]]

    def run(w, lanes):
        if not w.together(lanes, member(w.registers)):
            return TOGETHER
        said = p(w.registers)
        if lanes is not None:  # what others say does not count
            said = np.where(lanes, said, reduce is np.all)
        result(w, lanes, np.repeat(reduce(said.reshape(-1, 32), axis=1), 32))
        return None

    return run


def elect(take: Operands, machine: Machine, s: Statement):
    leader, chosen = (take.target(n) for n in s.operands[0])

    def run(w, lanes):
        here = np.ones(len(w.lanes), bool) if lanes is None else lanes
        first = np.repeat(here.reshape(-1, 32).argmax(1), 32)
        leader(w, lanes, first.astype(np.uint32))
        chosen(w, lanes, w.lanes % 32 == first)

    return run


def redux(take: Operands, machine: Machine, s: Statement):
    dtype = TYPES[s.opcode[-1]]
    reduce = {"min": np.min, "max": np.max, "add": np.sum}[s.opcode[2]]
    result, x = take.target(s.operands[0]), take.value(s.operands[1], dtype)

    def run(w, lanes):
        if not w.together(lanes):
            return TOGETHER
        value = reduce(x(w.registers).reshape(-1, 32), axis=1).astype(dtype)
        result(w, lanes, np.repeat(value, 32))
        return None

    return run


def bar(take: Operands, machine: Machine, s: Statement):
    if s.opcode[1] == "warp":
        member = take.value(s.operands[0], TYPES["u32"])
        return lambda w, m: None if w.together(m, member(w.registers)) else TOGETHER
    if s.operands == ["0"]:
        return lambda w, m: BARRIER
    name, count = (take.value(n, TYPES["u32"]) for n in s.operands)

    def of_some(w, lanes):
        """Of so many threads of the block, some of which may only arrive."""
        if lanes is not None:
            return TOGETHER
        which, wanted = int(name(w.registers)[0]), int(count(w.registers)[0])
        come = w.block.named.setdefault(which, [0, 0])  # threads, how often all have come
        if which in w.expects:
            if come[1] == w.expects[which]:
                return AGAIN
            del w.expects[which]
            w.advanced = True
            return None
        come[0] += w.machine.width
        if come[0] > wanted:
            raise Fault("more threads than a named barrier waits for")
        w.advanced = True
        if come[0] == wanted:
            w.block.named[which] = [0, come[1] + 1]
        elif s.opcode[1] == "sync":
            w.expects[which] = come[1]
            return AGAIN
        return None

    return of_some


def setmaxnreg(take: Operands, machine: Machine, s: Statement):
    return lambda w, m: None if w.together(m) else TOGETHER


def trap(take: Operands, machine: Machine, s: Statement):
    def run(w, lanes):
        raise Fault("the kernel ended itself")

    return run


BUILDERS = {
    "atom": memory.atomic,
    "bar": bar,
    "bra": branch,
    "cp": memory.cp,
    "cvt": arithmetic.cvt,
    "cvta": arithmetic.cvta,
    "elect": elect,
    "fence": memory.fence,
    "ld": memory.load,
    "ldmatrix": products.ldmatrix,
    "mbarrier": memory.mbarrier,
    "membar": memory.fence,
    "mma": products.mma,
    "mov": arithmetic.mov,
    "redux": redux,
    "ret": lambda take, machine, s: lambda w, m: LEAVE,
    "selp": arithmetic.selp,
    "setmaxnreg": setmaxnreg,
    "setp": arithmetic.setp,
    "shfl": shuffle,
    "st": memory.store,
    "stmatrix": products.stmatrix,
    "trap": trap,
    "vote": vote,
    "wgmma": products.wgmma,
}
