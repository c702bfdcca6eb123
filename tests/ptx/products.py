"""Tensor cores: matrices of a warp, mma.sync and wgmma."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ptx.arithmetic import halves
from ptx.operands import TOGETHER, Operands
from ptx.text import TYPES, Fault, Statement

if TYPE_CHECKING:
    from ptx.machine import Machine

LANE = np.arange(32)
ROW, COLUMN = LANE // 4, LANE % 4 * 2


def fragment_a(registers: list[np.ndarray], kind: str) -> np.ndarray:
    """(warps, 16, 16) from the four registers of each lane."""
    matrix = np.zeros((len(registers[0]) // 32, 16, 16), np.uint16)
    for i, x in enumerate(registers):
        for j in (0, 1):
            part = x >> np.uint32(16 * j) & np.uint32(0xFFFF)
            matrix[:, ROW + i % 2 * 8, COLUMN + i // 2 * 8 + j] = part.reshape(-1, 32)
    return halves(matrix, kind)


def fragment_d(values: list[np.ndarray]) -> np.ndarray:
    """(warps, 16, 2 len(values))"""
    matrix = np.zeros((len(values[0]) // 32, 16, 2 * len(values)), np.float32)
    for i, x in enumerate(values):
        matrix[:, ROW + i // 2 % 2 * 8, COLUMN + i // 4 * 8 + i % 2] = x.reshape(-1, 32)
    return matrix


def spread_d(matrix: np.ndarray, count: int) -> list[np.ndarray]:
    return [
        matrix[:, ROW + i // 2 % 2 * 8, COLUMN + i // 4 * 8 + i % 2].astype(np.float32).ravel()
        for i in range(count)
    ]


def mma(take: Operands, machine: Machine, s: Statement):
    *_, kind, _, _ = s.opcode
    if s.opcode[3] != "m16n8k16":
        raise Fault("only m16n8k16")
    u32, f32 = TYPES["u32"], TYPES["f32"]
    targets = [take.target(n) for n in s.operands[0]]
    a, b = ([take.value(n, u32) for n in operand] for operand in s.operands[1:3])
    c = [take.value(n, f32) for n in s.operands[3]]

    def run(w, lanes):
        if not w.together(lanes):
            return TOGETHER
        r = w.registers
        right = np.zeros((w.machine.width // 32, 16, 8), np.uint16)
        for i, x in enumerate(b):
            for j in (0, 1):
                part = x(r) >> np.uint32(16 * j) & np.uint32(0xFFFF)
                right[:, COLUMN + i * 8 + j, ROW] = part.reshape(-1, 32)
        product = fragment_a([x(r) for x in a], kind) @ halves(right, kind)
        result = product + fragment_d([x(r) for x in c])
        for target, value in zip(targets, spread_d(result, 4), strict=True):
            target(w, lanes, value)
        return None

    return run


def matrix_rows(w, lanes, address, count: int) -> np.ndarray:
    """Indices of (active warps, count, 8, 8) elements; lane l tells row l % 8 of matrix l / 8."""
    rows = address(w.registers)[w.active(lanes)].reshape(-1, 32)[:, : 8 * count]
    start = w.block.shared.at(rows.ravel(), 2, 8)
    return (start[:, None] + np.arange(8)).reshape(-1, count, 8, 8)


def ldmatrix(take: Operands, machine: Machine, s: Statement):
    targets = [take.target(n) for n in s.operands[0]]
    address = take.address(s.operands[1])

    def run(w, lanes):
        if not w.together(lanes):
            return TOGETHER
        rows = w.block.shared.views[2][matrix_rows(w, lanes, address, len(targets))]
        if "trans" in s.opcode:
            rows = rows.swapaxes(2, 3)
        pairs = rows[:, :, ROW, COLUMN] | rows[:, :, ROW, COLUMN + 1].astype(np.uint32) << 16
        for i, target in enumerate(targets):
            value = np.zeros(w.machine.width, np.uint32)
            value[w.active(lanes)] = pairs[:, i].ravel()
            target(w, lanes, value)
        return None

    return run


def stmatrix(take: Operands, machine: Machine, s: Statement):
    sources = [take.value(n, TYPES["u32"]) for n in s.operands[1]]
    address = take.address(s.operands[0])

    def run(w, lanes):
        if not w.together(lanes):
            return TOGETHER
        some = w.active(lanes)
        index = matrix_rows(w, lanes, address, len(sources))
        rows = np.zeros(index.shape, np.uint16)
        for i, source in enumerate(sources):
            x = source(w.registers)[some].reshape(-1, 32)
            rows[:, i, ROW, COLUMN], rows[:, i, ROW, COLUMN + 1] = x & 0xFFFF, x >> 16
        w.block.shared.views[2][index] = rows.swapaxes(2, 3) if "trans" in s.opcode else rows
        w.block.unfenced[2 * index] = w.block.unfenced[2 * index + 1] = w.first // 32 + 1
        return None

    return run


def described(block, descriptor: int, rows: np.ndarray, bytes_: np.ndarray, groups: int):
    """Elements at (row, byte of it) of an operand of wgmma: 8 rows of 128 bytes make an atom."""
    if descriptor >> 62 != 1 or descriptor >> 49 & 7:
        raise Fault("only 128-byte swizzle without base offset")
    start = (descriptor & 0x3FFF) << 4
    stride = (descriptor >> 32 & 0x3FFF) << 4
    address = start + rows // 8 * stride + rows % 8 * 128 + bytes_ + groups
    address ^= (address >> 7 & 7) << 4
    block.check_proxy(address)
    return block.shared.views[2][block.shared.at(address.ravel(), 2)].reshape(address.shape)


def wgmma(take: Operands, machine: Machine, s: Statement):
    kind = s.opcode[1]
    if kind == "fence":

        def fence_registers(w, lanes):
            if not w.together(lanes):
                return TOGETHER
            w.fenced = list(w.registers)
            return None

        return fence_registers
    if kind == "commit_group":
        return lambda w, m: w.commit(w.products, m)
    if kind == "wait_group":
        left = int(s.operands[0], 0)
        return lambda w, m: w.finish(w.products, left, m)
    shape, element = s.opcode[4], s.opcode[-1]
    columns = int(shape[len("m64n") : shape.index("k")])
    d_names, a_operand, b_name, scale, sign_a, sign_b, *transposed = s.operands
    if (sign_a, sign_b) != ("1", "1") or len(d_names) != columns // 2:
        raise Fault("only plain signs and all accumulators")
    d = [machine.slots[n] for n in d_names]
    from_registers = isinstance(a_operand, list)
    a = [machine.slots[n] for n in a_operand] if from_registers else None
    a_descriptor = None if from_registers else take.value(a_operand, TYPES["u64"])
    b_descriptor = take.value(b_name, TYPES["u64"])
    add = (lambda r: [True]) if scale == "1" else take.value(scale, TYPES["pred"])
    if not from_registers and transposed != ["0", "0"]:
        raise Fault("only K-major operands in shared memory")
    mn_major = from_registers and transposed == ["1"]

    def run(w, lanes):
        if lanes is not None:
            return TOGETHER
        r, block = w.registers, w.block
        if not w.fenced or any(w.fenced[i] is not r[i] for i in [*d, *(a or [])]):
            raise Fault("wgmma takes registers that were written after the last wgmma.fence")
        accumulate, b_at = bool(add(r)[0]), int(b_descriptor(r)[0])
        a_at = 0 if from_registers else int(a_descriptor(r)[0])
        first_rows = w.warps[::32] % 4 * 16  # of 64, by warp
        given = [r[i] for i in a or []]

        def work():
            if any(r[i] is not value for i, value in zip(a or [], given, strict=True)):
                raise Fault(
                    "registers that wgmma reads were written before its group was waited for"
                )
            k, n = np.arange(16), np.arange(columns)
            if mn_major:
                leading = (b_at >> 16 & 0x3FFF) << 4
                panel = n // 64 * leading
                right = described(block, b_at, k[:, None], n % 64 * 2, panel)
            else:
                right = described(block, b_at, n[:, None], k * 2, 0).T
            if from_registers:
                left = fragment_a([r[i].view(np.uint32) for i in a], element)
            else:
                rows = (first_rows[:, None] + k)[:, :, None]
                left = halves(described(block, a_at, rows, k * 2, 0), element)
            result = left @ halves(np.ascontiguousarray(right), element)
            if accumulate:
                result = result + fragment_d([r[i].view(np.float32) for i in d])
            for i, value in zip(d, spread_d(result, len(d)), strict=True):
                r[i] = w.fenced[i] = value.view(machine.dtypes[i])

        w.defer(w.products, work)
        return None

    return run
