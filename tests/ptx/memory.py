"""Loads, stores, copies and mbarriers."""

from __future__ import annotations

import functools
import operator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ptx.operands import BITS, PAUSE, Operands
from ptx.text import TYPES, Fault, Statement

if TYPE_CHECKING:
    from ptx.machine import Machine

SPACES = ("global", "shared", "local", "param")


@dataclass
class Barrier:
    """An mbarrier of shared memory."""

    arrivals: int
    missing: int
    bytes: int = 0
    parity: int = 0

    def settle(self) -> None:
        if self.missing < 0:
            raise Fault("an mbarrier got more arrivals than it waits for")
        if self.missing == 0 and self.bytes == 0:
            self.parity ^= 1
            self.missing = self.arrivals


def memory_of(w, space: str):
    if space == "shared":
        return w.block.shared
    return w.machine.params if space == "param" else w.machine.memory


def access(take: Operands, s: Statement):
    """State space, element type, how many, address."""
    space = next(p for p in s.opcode if p.split("::")[0] in SPACES).split("::")[0]
    count = next((int(p[1:]) for p in s.opcode if p in ("v2", "v4")), 1)
    dtype = TYPES[s.opcode[-1]]
    place = s.operands[0 if s.opcode[0] == "st" else -1]
    return space, dtype, count, take.address(place)


def load(take: Operands, machine: Machine, s: Statement):
    space, dtype, count, address = access(take, s)
    targets = s.operands[0] if isinstance(s.operands[0], list) else [s.operands[0]]
    targets = [take.target(name) for name in targets]

    def run(w, lanes):
        some = w.active(lanes)
        at = address(w.registers)[some]
        if space == "local":
            index = at[:, None] + np.arange(dtype.itemsize * count)
            flat = w.local[some[:, None], index].view(dtype)
        else:
            memory = memory_of(w, space)
            index = memory.at(at, dtype.itemsize, count)
            flat = memory.views[dtype.itemsize][index[:, None] + np.arange(count)].view(dtype)
        for i, target in enumerate(targets):
            if lanes is None:
                target(w, None, np.ascontiguousarray(flat[:, i]))
            else:
                value = np.zeros(len(lanes), dtype)
                value[some] = flat[:, i]
                target(w, lanes, value)

    return run


def store(take: Operands, machine: Machine, s: Statement):
    space, dtype, count, address = access(take, s)
    names = s.operands[1] if isinstance(s.operands[1], list) else [s.operands[1]]
    unsigned = BITS[dtype.itemsize]
    sources = [take.value(name, unsigned) for name in names]

    def run(w, lanes):
        some = w.active(lanes)
        at = address(w.registers)[some]
        values = np.stack([x(w.registers)[some] for x in sources], 1)
        if space == "local":
            index = at[:, None] + np.arange(dtype.itemsize * count)
            w.local[some[:, None], index] = np.ascontiguousarray(values).view(np.uint8)
            return
        memory = memory_of(w, space)
        index = memory.at(at, dtype.itemsize, count)[:, None] + np.arange(count)
        memory.views[dtype.itemsize][index] = values
        if space == "shared":
            bytes_ = at[:, None] + np.arange(dtype.itemsize * count)
            w.block.unfenced[bytes_] = (w.warps[some] + 1)[:, None]

    return run


ATOMICS = {"add": operator.add, "or": operator.or_, "exch": lambda before, x: x}


def atomic(take: Operands, machine: Machine, s: Statement):
    *_, name, kind = s.opcode
    if name not in ATOMICS or kind not in ("u32", "s32", "b32"):
        raise Fault("only add, or and exch of 32 bits")
    change = ATOMICS[name]
    result, x = take.target(s.operands[0]), take.value(s.operands[2], TYPES["u32"])
    address = take.address(s.operands[1])

    def run(w, lanes):
        memory, some = memory_of(w, s.opcode[1]), w.active(lanes)
        index = memory.at(address(w.registers)[some], 4)
        before = np.zeros(w.machine.width, np.uint32)
        for lane, at in zip(some, index, strict=True):
            before[lane] = memory.views[4][at]
            memory.views[4][at] = change(before[lane], x(w.registers)[lane])
        result(w, lanes, before)

    return run


def fence(take: Operands, machine: Machine, s: Statement):
    def run(w, lanes):
        if "proxy" in s.opcode:
            unfenced = w.block.unfenced
            unfenced[np.isin(unfenced, w.warps[w.active(lanes)] + 1)] = 0

    return run


def bulk_copy(take: Operands, s: Statement):
    """cp.async.bulk.tensor.2d of a box in 128-byte swizzle, by a tensor map of plain numbers."""
    target, descriptor, barrier = map(take.address, s.operands)
    column, row = (take.value(n, TYPES["s32"]) for n in s.operands[1][2][0])

    def copy(w, block, to, map_, at, x, y):
        memory = w.machine.memory
        numbers = memory.views[8][memory.at(map_ + 8 * np.arange(7), 8)].astype(np.int64)
        base, width, height, pitch, box_width, box_height, size = numbers
        width, box_width, x = (n * size // 2 for n in (width, box_width, x))  # 16 bits each
        columns, rows = np.arange(box_width) + x, np.arange(box_height) + y
        address = base + rows[:, None] * pitch + columns * 2
        inside = ((rows >= 0) & (rows < height))[:, None] & (columns >= 0) & (columns < width)
        box = np.zeros(address.shape, np.uint16)
        box[inside] = memory.views[2][memory.at(address[inside], 2)]
        place = to + np.arange(box.size).reshape(box.shape) * 2
        place ^= (place >> 7 & 7) << 4
        index = block.shared.at(place.ravel(), 2)
        block.check_proxy(place)
        block.shared.views[2][index] = box.ravel()
        ready = block.barrier(at)
        ready.bytes -= box.nbytes
        ready.settle()

    def run(w, lanes):
        r, block = w.registers, w.block
        values = [v(r) for v in (target, descriptor, barrier, column, row)]
        for to, map_, at, x, y in np.stack(values, 1)[w.active(lanes)].tolist():
            if map_ % 64 or to % 128 or at % 8:
                raise Fault("wanted alignment: tensor map 64, target of a copy 128, mbarrier 8")
            block.barrier(at)
            work = functools.partial(copy, w, block, to, map_, at, x, y)
            if w.machine.early:
                work()
            else:
                block.flying.append(work)

    return run


def cp(take: Operands, machine: Machine, s: Statement):
    kind = s.opcode[2]
    if kind == "bulk":
        return bulk_copy(take, s)
    if kind == "commit_group":
        return lambda w, m: w.commit(w.copies, m)
    if kind == "wait_group":
        left = int(s.operands[0], 0)
        return lambda w, m: w.finish(w.copies, left, m)
    to, source = map(take.address, s.operands[:2])
    size = int(s.operands[2], 0)
    given = take.value(s.operands[3], TYPES["u32"])

    def run(w, lanes):
        some, r = w.active(lanes), w.registers
        target, start = to(r)[some], source(r)[some]
        bytes_ = given(r)[some].astype(np.int64)
        if (target % size).any() or (start % size)[bytes_ > 0].any() or (bytes_ > size).any():
            raise Fault("cp.async: misaligned, or more bytes than it copies")

        def work():  # for wgmma to see, a wait is taken for enough: Triton 3.6 has no fence there
            at = start[:, None] + np.arange(size)
            there = np.arange(size) < bytes_[:, None]
            memory, shared = w.machine.memory, w.block.shared
            data = np.zeros(at.shape, np.uint8)
            data[there] = memory.views[1][memory.at(at[there], 1)]
            place = target[:, None] + np.arange(size)
            shared.views[1][shared.at(place.ravel(), 1)] = data.ravel()

        w.defer(w.copies, work)

    return run


def mbarrier(take: Operands, machine: Machine, s: Statement):
    kind = s.opcode[1]
    place = next(o for o in s.operands if isinstance(o, tuple))
    address = take.address(place)
    if kind == "try_wait":
        result, parity = take.target(s.operands[0]), take.value(s.operands[2], TYPES["u32"])
    elif s.operands[-1] is not place:
        number = take.value(s.operands[-1], TYPES["u32"])

    def run(w, lanes):
        some, r = w.active(lanes), w.registers
        addresses = address(r)[some]
        if kind == "init":
            for lane, at in zip(some, addresses, strict=True):
                w.block.shared.at(np.array([at]), 8)
                arrivals = int(number(r)[lane])
                w.block.barriers[int(at)] = Barrier(arrivals, arrivals)
            return None
        if kind == "inval":
            for at in addresses.tolist():
                del w.block.barriers[at]
            return None
        if kind == "try_wait":
            if (addresses != addresses[0]).any():
                raise Fault("lanes wait for different mbarriers")
            done = w.block.barrier(int(addresses[0])).parity != int(parity(r)[some[0]])
            result(w, lanes, np.full(w.machine.width, done))
            w.advanced |= done
            return None if done else PAUSE
        for lane, at in zip(some, addresses, strict=True):
            barrier = w.block.barrier(int(at))
            if "expect_tx" in s.opcode:
                barrier.bytes += int(number(r)[lane])
            barrier.missing -= 1
            barrier.settle()
            w.advanced = True
        return None

    return run
