"""Instructions that compute: each lane on its own registers."""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING

import numpy as np

from ptx.operands import BITS, Operands, apply
from ptx.text import TYPES, Fault, Statement

if TYPE_CHECKING:
    from ptx.machine import Machine


# --- functions of arrays ---


def halves(words: np.ndarray, kind: str) -> np.ndarray:
    """16-bit elements as float32."""
    if kind == "bf16":
        return (words.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return words.view(np.float16).astype(np.float32)


def shift_left(x, n):
    shifted = x << np.minimum(n, 8 * x.itemsize - 1).astype(x.dtype)
    return np.where(n < 8 * x.itemsize, shifted, 0).astype(x.dtype)


def shift_right(x, n):
    limit = 8 * x.itemsize
    shifted = x >> np.minimum(n, limit - 1).astype(x.dtype)
    return shifted if x.dtype.kind == "i" else np.where(n < limit, shifted, 0).astype(x.dtype)


def divide(x, y):
    """Truncates, as C does."""
    safe = np.where(y == 0, 1, y)
    quotient = x // safe
    if x.dtype.kind == "i":
        quotient = quotient + ((x % safe != 0) & ((x < 0) != (safe < 0)))
    return quotient.astype(x.dtype)


def remainder(x, y):
    return (x - divide(x, y) * y).astype(x.dtype)


def directed(value: np.ndarray, mode: str) -> np.ndarray:
    """A float64 rounded to float32."""
    near = value.astype(np.float32)
    if mode == "rn":
        return near
    wide = near.astype(np.float64)
    if mode == "rm":
        return np.where(wide > value, np.nextafter(near, np.float32(-np.inf)), near)
    if mode == "rz":
        over = np.abs(wide) > np.abs(value)
        return np.where(over, np.nextafter(near, np.float32(0)), near)
    raise Fault(f"rounding {mode}")


def to_bfloat16(x: np.ndarray) -> np.ndarray:
    bits = x.view(np.uint32)
    rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
    return np.where(np.isnan(x), 0x7FFF, rounded).astype(np.uint32)


def to_float16(x: np.ndarray) -> np.ndarray:
    return x.astype(np.float16).view(np.uint16).astype(np.uint32)


def exp2(x: np.ndarray, flush: bool) -> np.ndarray:
    y = np.exp2(x.astype(np.float64)).astype(np.float32)
    return np.where(y < 2.0**-126, np.float32(0), y) if flush else y


def saturate(x: np.ndarray, dtype: np.dtype) -> np.ndarray:
    info = np.iinfo(dtype)
    wide = np.clip(np.trunc(x.astype(np.float64)), float(info.min), float(info.max))
    return np.where(np.isnan(x), 0, wide).astype(np.int64).astype(dtype)


def permute_bytes(a, b, selector):
    both = np.stack([a, b], 1).view(np.uint8)  # (lanes, 8)
    result = np.zeros((len(a), 4), np.uint8)
    for i in range(4):
        pick = selector >> np.uint32(4 * i) & np.uint32(15)
        byte = both[np.arange(len(a)), pick & 7]
        result[:, i] = np.where(pick & 8, np.where(byte & 128, 255, 0), byte)
    return result.view(np.uint32).ravel()


def extract_bits(a, position, length):
    """Of at most all bits from `position` on; a signed one is continued."""
    bits = 8 * a.itemsize
    left = (bits - np.minimum(position + length, bits)).astype(a.dtype)
    right = (bits - np.minimum(length, bits)).astype(a.dtype)
    return np.where(length == 0, 0, a << left >> right).astype(a.dtype)


def insert_bits(a, b, position, length):
    """The low `length` bits of a at `position` of b; one of them may be all there are."""
    ones = ~a.dtype.type(0)
    spared = (8 * a.itemsize - length).astype(a.dtype)
    mask = np.where(length == 0, 0, ones >> spared).astype(a.dtype)
    position = position.astype(a.dtype)
    return b & ~(mask << position) | (a & mask) << position


def reverse_bits(x: np.ndarray) -> np.ndarray:
    bits = np.unpackbits(x.view(np.uint8).reshape(len(x), -1), axis=1, bitorder="little")
    return np.packbits(bits[:, ::-1], axis=1, bitorder="little").view(x.dtype)[:, 0]


def leading_zeros(x: np.ndarray) -> np.ndarray:
    """All ones where there is no other bit."""
    length = np.frexp(x.astype(np.float64))[1]
    return np.where(x == 0, 0xFFFFFFFF, 8 * x.itemsize - length).astype(np.uint32)


def count_bits(x: np.ndarray) -> np.ndarray:
    return np.unpackbits(x.view(np.uint8).reshape(len(x), -1), axis=1).sum(1, dtype=np.uint32)


COMPARE = {
    **{name: getattr(operator, name) for name in ("eq", "ne", "lt", "le", "gt", "ge")},
    "lo": operator.lt,
    "ls": operator.le,
    "hi": operator.gt,
    "hs": operator.ge,
    "nan": lambda x, y: np.isnan(x) | np.isnan(y),
    "num": lambda x, y: ~(np.isnan(x) | np.isnan(y)),
}


def compare(name: str, dtype: np.dtype):
    if dtype.kind != "f":
        return COMPARE[name]
    if name == "ne":  # ordered
        return lambda x, y: (x != y) & ~np.isnan(x) & ~np.isnan(y)
    if name in ("equ", "neu", "ltu", "leu", "gtu", "geu"):
        plain = COMPARE[name[:2]]
        return lambda x, y: plain(x, y) | np.isnan(x) | np.isnan(y)
    return COMPARE[name]


LOGIC = {"and": operator.and_, "or": operator.or_, "xor": operator.xor, "not": operator.invert}
MODULAR = {  # the same for signed and unsigned
    "add": operator.add,
    "sub": operator.sub,
    "neg": lambda x: (~x) + x.dtype.type(1),
    "mul": operator.mul,
    "mad": lambda x, y, z: x * y + z,
}
INTEGER = {
    "min": np.minimum,
    "max": np.maximum,
    "div": divide,
    "rem": remainder,
    "abs": np.abs,
}
FLOAT = {  # in float32; `directed` rounds what is in float64
    "add": operator.add,
    "sub": operator.sub,
    "mul": operator.mul,
    "div": operator.truediv,
    "rcp": lambda x: np.float32(1) / x,
    "sqrt": np.sqrt,
    "neg": operator.neg,
    "abs": np.abs,
    "min": np.fmin,
    "max": np.fmax,
}
EXACT = {
    "add": operator.add,
    "sub": operator.sub,
    "mul": operator.mul,
    "fma": lambda x, y, z: x * y + z,
}


def plain_function(op: str, parts: list[str], dtype: np.dtype):
    """The type of the sources and of the result, and the function, of an opcode with one type."""
    unsigned = BITS[dtype.itemsize]
    if dtype.kind == "f":
        mode = next((p for p in parts if p in ("rn", "rz", "rm", "rp")), "rn")
        if op == "ex2":
            return dtype, lambda x: exp2(x, "ftz" in parts)
        if op in FLOAT and mode == "rn":
            return dtype, FLOAT[op]
        exact = EXACT[op]
        if dtype.itemsize == 8:  # of fma, the product is rounded as well
            return dtype, exact
        return dtype, lambda *x: directed(exact(*(v.astype(np.float64) for v in x)), mode)
    if op in LOGIC:
        return dtype if dtype.kind == "b" else unsigned, LOGIC[op]
    return (unsigned, MODULAR[op]) if op in MODULAR else (dtype, INTEGER[op])


# --- statements ---


ONE_WORD = {
    "brev": reverse_bits,
    "bfind": leading_zeros,  # .shiftamt
    "popc": count_bits,
}
BYTES_AND_BITS = {  # function, and how many sources have the statement's type; the rest are u32
    "bfe": (extract_bits, 1),
    "bfi": (insert_bits, 2),
    "prmt": (permute_bytes, 3),
}


def arithmetic(take: Operands, machine: Machine, s: Statement):
    op, *parts = s.opcode
    dtype, names = TYPES[parts[-1]], s.operands[1:]
    result = take.target(s.operands[0])
    if op in ("shl", "shr"):
        return shift(take, machine, s)
    if op in ONE_WORD:
        return apply(result, ONE_WORD[op], take.value(names[0], dtype))
    if "wide" in parts or "hi" in parts:
        return multiply(take, s)
    if op in BYTES_AND_BITS:
        function, count = BYTES_AND_BITS[op]
        types = [dtype] * count + [TYPES["u32"]] * (len(names) - count)
        return apply(result, function, *map(take.value, names, types))
    kept, function = plain_function(op, parts, dtype)
    return apply(result, function, *(take.value(name, kept) for name in names))


def shift(take: Operands, machine: Machine, s: Statement):
    op, *_, kind = s.opcode
    dtype = TYPES[kind] if op == "shr" else BITS[TYPES[kind].itemsize]
    result, x, count = take.target(s.operands[0]), take.value(s.operands[1], dtype), s.operands[2]
    if count not in machine.slots and int(count, 0) < 8 * dtype.itemsize:  # nearly all
        function = operator.lshift if op == "shl" else operator.rshift
        return apply(result, function, x, take.value(count, dtype))
    function = shift_left if op == "shl" else shift_right
    return apply(result, function, x, take.value(count, TYPES["u32"]))


def multiply(take: Operands, s: Statement):
    """mul and mad with a product of twice the bits, or its high half."""
    dtype = TYPES[s.opcode[-1]]
    wide = np.dtype(f"{dtype.kind}{2 * dtype.itemsize}")
    bits, high = wide.type(8 * dtype.itemsize), "hi" in s.opcode

    def product(x, y, z=None):
        full = x.astype(wide) * y.astype(wide)
        full = (full >> bits).astype(dtype) if high else full
        return full if z is None else full + z

    types = [dtype, dtype, dtype if high else wide]
    sources = map(take.value, s.operands[1:], types[: len(s.operands) - 1])
    return apply(take.target(s.operands[0]), product, *sources)


def setp(take: Operands, machine: Machine, s: Statement):
    _, name, *_, kind = s.opcode
    dtype = TYPES[kind]
    sources = (take.value(n, dtype) for n in s.operands[1:3])
    return apply(take.target(s.operands[0]), compare(name, dtype), *sources)


def selp(take: Operands, machine: Machine, s: Statement):
    types = [TYPES["pred"], *2 * [TYPES[s.opcode[-1]]]]
    x, y, p = s.operands[1:]
    return apply(take.target(s.operands[0]), np.where, *map(take.value, (p, x, y), types))


def mov(take: Operands, machine: Machine, s: Statement):
    dtype = TYPES[s.opcode[-1]]
    if isinstance(s.operands[0], list):
        part = BITS[dtype.itemsize // len(s.operands[0])]
        results, x = [take.target(n) for n in s.operands[0]], take.value(s.operands[1], dtype)

        def split(w, m):
            pieces = np.ascontiguousarray(x(w.registers)).view(part).reshape(w.machine.width, -1)
            for i, result in enumerate(results):
                result(w, m, np.ascontiguousarray(pieces[:, i]))

        return split
    result = take.target(s.operands[0])
    if isinstance(s.operands[1], list):
        part = BITS[dtype.itemsize // len(s.operands[1])]

        def join(*pieces):
            return np.stack(pieces, 1).view(BITS[dtype.itemsize]).ravel()

        return apply(result, join, *(take.value(n, part) for n in s.operands[1]))
    return apply(result, lambda x: x, take.value(s.operands[1], dtype))


def cvt(take: Operands, machine: Machine, s: Statement):
    *parts, to, source = s.opcode[1:]
    result = take.target(s.operands[0])
    if to in ("bf16x2", "f16x2"):
        narrow = to_bfloat16 if to == "bf16x2" else to_float16
        sources = (take.value(n, TYPES["f32"]) for n in s.operands[1:])
        return apply(
            result, lambda high, low: narrow(high) << np.uint32(16) | narrow(low), *sources
        )
    a, b = TYPES.get(source, TYPES["b16"]), TYPES.get(to)  # of bf16: its bits
    if to == "bf16":
        function = lambda x: to_bfloat16(x).astype(np.uint16)  # noqa: E731
    elif source == "bf16":
        function = lambda x: halves(x, "bf16")  # noqa: E731
    elif a.kind == "f" and b.kind != "f":
        if "rzi" not in parts:
            raise Fault("only rzi")
        function = lambda x: saturate(x, b)  # noqa: E731
    elif "sat" in parts:  # NaN becomes 0
        function = lambda x: np.nan_to_num(np.clip(x, 0, 1)).astype(b)  # noqa: E731
    else:
        function = lambda x: x.astype(b)  # noqa: E731
    return apply(result, function, take.value(s.operands[1], a))


def cvta(take: Operands, machine: Machine, s: Statement):
    """Addresses of all state spaces are numbers of one kind here, but for those of parameters."""

    def generic(x):
        return x + np.uint64(machine.params_start if "param" in s.opcode else 0)

    return apply(take.target(s.operands[0]), generic, take.value(s.operands[1], TYPES["u64"]))
