"""What each PTX instruction does, as a function of a team of warps and a mask of its lanes."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ptx.text import TYPES, Fault, Statement

if TYPE_CHECKING:
    from ptx.machine import Machine

BITS = {size: np.dtype(f"u{size}") for size in (1, 2, 4, 8)}
SPACES = ("global", "shared", "local", "param")
# What an instruction may ask for; else it gives nothing, or the statement to go on with.
LEAVE, PAUSE, BARRIER, TOGETHER = range(-4, 0)


class Operands:
    """Turns operands of a statement into functions of the registers of a team."""

    def __init__(self, machine: Machine):
        self.machine = machine

    def value(self, name: str, dtype: np.dtype) -> Callable[[list], np.ndarray]:
        machine = self.machine
        if name in machine.slots:
            slot = machine.slots[name]
        elif name in machine.kernel.labels:
            raise Fault(f"{name} is a label")
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


def literal(text: str) -> int:
    """The bits of a constant."""
    if text[:2] in ("0f", "0d"):
        return int(text[2:], 16)
    return int(text, 0) & 0xFFFFFFFFFFFFFFFF


# --- arithmetic ---


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
    if mode in ("rn", ""):
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


def plain_function(op: str, parts: list[str], dtype: np.dtype):
    """The function of an opcode whose sources and result all have the type `dtype`."""
    unsigned = BITS.get(dtype.itemsize)
    floating = dtype.kind == "f"
    mode = next((p for p in parts if p in ("rn", "rz", "rm", "rp")), "")
    if floating:
        wide = lambda f: lambda *x: directed(f(*(v.astype(np.float64) for v in x)), mode)  # noqa: E731
        table = {
            "add": wide(operator.add),
            "sub": wide(operator.sub),
            "mul": wide(operator.mul),
            "fma": wide(lambda x, y, z: x * y + z),
            "div": lambda x, y: x / y,
            "rcp": lambda x: np.float32(1) / x,
            "sqrt": np.sqrt,
            "neg": operator.neg,
            "abs": np.abs,
            "min": np.fmin,
            "max": np.fmax,
            "ex2": lambda x: exp2(x, "ftz" in parts),
        }
        if mode in ("", "rn"):
            table |= {"add": operator.add, "sub": operator.sub, "mul": operator.mul}
        return dtype, table.get(op)
    logic = {"and": operator.and_, "or": operator.or_, "xor": operator.xor, "not": operator.invert}
    if op in logic:
        return dtype if dtype.kind == "b" else unsigned, logic[op]
    modular = {
        "add": operator.add,
        "sub": operator.sub,
        "neg": lambda x: (~x) + x.dtype.type(1),
        "mul": operator.mul,
        "mad": lambda x, y, z: x * y + z,
    }
    if op in modular and "wide" not in parts and "hi" not in parts:
        return unsigned, modular[op]
    return dtype, {
        "min": np.minimum,
        "max": np.maximum,
        "div": divide,
        "rem": remainder,
        "abs": np.abs,
    }.get(op)


# --- statements ---


def compile_statement(machine: Machine, s: Statement):
    op = s.opcode[0]
    builder = BUILDERS.get(op, arithmetic)
    try:
        return builder(Operands(machine), machine, s)
    except (KeyError, TypeError, Fault) as error:
        reason = f"{s.text}: {error!r}"

        def unknown(w, lanes):
            raise Fault(f"not understood: {reason}")

        return unknown


def arithmetic(take: Operands, machine: Machine, s: Statement):
    op, *parts = s.opcode
    dtype = TYPES[parts[-1]]
    result = take.target(s.operands[0])
    if op in ("shl", "shr"):
        dtype = dtype if op == "shr" else BITS[dtype.itemsize]
        x, count = take.value(s.operands[1], dtype), s.operands[2]
        if count not in machine.slots and int(count, 0) < 8 * dtype.itemsize:
            n = take.value(count, dtype)
            function = operator.lshift if op == "shl" else operator.rshift
        else:
            n = take.value(count, TYPES["u32"])
            function = shift_left if op == "shl" else shift_right
        return lambda w, m: result(w, m, function(x(w.registers), n(w.registers)))
    if "wide" in parts or "hi" in parts:
        wide = np.dtype(f"{dtype.kind}{2 * dtype.itemsize}")
        sources = [take.value(name, dtype) for name in s.operands[1:3]]
        if op == "mad":
            sources.append(take.value(s.operands[3], wide if "wide" in parts else dtype))
        shift = wide.type(8 * dtype.itemsize)

        def multiply(w, m):
            x, y, *more = (source(w.registers) for source in sources)
            product = x.astype(wide) * y.astype(wide)
            if "hi" in parts:
                product = (product >> shift).astype(dtype)
            for z in more:
                product = product + z
            result(w, m, product)

        return multiply
    if op == "bfe":
        sources = [take.value(name, dtype) for name in s.operands[1:2]]
        sources += [take.value(name, np.dtype("u4")) for name in s.operands[2:]]
        return lambda w, m: result(w, m, extract_bits(*(x(w.registers) for x in sources)))
    if op == "prmt":
        sources = [take.value(name, dtype) for name in s.operands[1:]]
        return lambda w, m: result(w, m, permute_bytes(*(x(w.registers) for x in sources)))
    if op == "bfi":
        sources = [take.value(name, dtype) for name in s.operands[1:3]]
        sources += [take.value(name, np.dtype("u4")) for name in s.operands[3:]]
        return lambda w, m: result(w, m, insert_bits(*(x(w.registers) for x in sources)))
    kept, function = plain_function(op, parts, dtype)
    if function is None:
        raise Fault("no such instruction here")
    sources = [take.value(name, kept) for name in s.operands[1:]]
    if len(sources) == 1:
        (x,) = sources
        return lambda w, m: result(w, m, function(x(w.registers)))
    if len(sources) == 2:
        x, y = sources
        return lambda w, m: result(w, m, function(x(w.registers), y(w.registers)))
    x, y, z = sources
    return lambda w, m: result(w, m, function(x(w.registers), y(w.registers), z(w.registers)))


def setp(take: Operands, machine: Machine, s: Statement):
    _, name, *_, kind = s.opcode
    dtype = TYPES[kind]
    x, y = (take.value(n, dtype) for n in s.operands[1:3])
    result, function = take.target(s.operands[0]), compare(name, dtype)
    return lambda w, m: result(w, m, function(x(w.registers), y(w.registers)))


def selp(take: Operands, machine: Machine, s: Statement):
    dtype = TYPES[s.opcode[-1]]
    result, x, y = take.target(s.operands[0]), *(take.value(n, dtype) for n in s.operands[1:3])
    p = take.value(s.operands[3], TYPES["pred"])
    return lambda w, m: result(w, m, np.where(p(w.registers), x(w.registers), y(w.registers)))


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
        sources = [take.value(n, part) for n in s.operands[1]]
        return lambda w, m: result(
            w,
            m,
            np.ascontiguousarray(np.stack([x(w.registers) for x in sources], 1))
            .view(BITS[dtype.itemsize])
            .ravel(),
        )
    x = take.value(s.operands[1], dtype)
    return lambda w, m: result(w, m, x(w.registers))


def cvt(take: Operands, machine: Machine, s: Statement):
    *parts, to, source = s.opcode[1:]
    result = take.target(s.operands[0])
    if to in ("bf16x2", "f16x2"):
        high, low = (take.value(n, TYPES["f32"]) for n in s.operands[1:])
        narrow = to_bfloat16 if to == "bf16x2" else to_float16
        return lambda w, m: result(
            w, m, narrow(high(w.registers)) << np.uint32(16) | narrow(low(w.registers))
        )
    if to == "bf16":
        x = take.value(s.operands[1], TYPES["f32"])
        return lambda w, m: result(w, m, to_bfloat16(x(w.registers)).astype(np.uint16))
    if source == "bf16":
        x = take.value(s.operands[1], TYPES["b16"])
        return lambda w, m: result(w, m, halves(x(w.registers), "bf16"))
    a, b = TYPES[source], TYPES[to]
    x = take.value(s.operands[1], a)
    if a.kind == "f" and b.kind != "f":
        if "rzi" not in parts:
            raise Fault("only rzi")
        return lambda w, m: result(w, m, saturate(x(w.registers), b))
    if "sat" in parts:  # NaN becomes 0
        return lambda w, m: result(w, m, np.nan_to_num(np.clip(x(w.registers), 0, 1)).astype(b))
    return lambda w, m: result(w, m, x(w.registers).astype(b))


def cvta(take: Operands, machine: Machine, s: Statement):
    """Addresses of all state spaces are numbers of one kind here, but for those of parameters."""
    result, x = take.target(s.operands[0]), take.value(s.operands[1], TYPES[s.opcode[-1]])
    if "param" not in s.opcode:
        return lambda w, m: result(w, m, x(w.registers))
    return lambda w, m: result(w, m, x(w.registers) + np.uint64(machine.params_start))


# --- control ---


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


def vote(take: Operands, machine: Machine, s: Statement):
    result, p = take.target(s.operands[0]), take.value(s.operands[1], TYPES["pred"])
    member = take.value(s.operands[2], TYPES["u32"])
    reduce = {"any": np.any, "all": np.all}[s.opcode[2]]

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
    if s.operands != ["0"]:
        raise Fault("only barrier 0 of the whole block")
    return lambda w, m: BARRIER


# --- memory ---


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
    name, offset, _ = s.operands[0 if s.opcode[0] == "st" else -1]
    base = take.value(name, np.dtype("u8"))
    return space, dtype, count, lambda r: base(r) + np.uint64(offset % 2**64)


def load(take: Operands, machine: Machine, s: Statement):
    space, dtype, count, address = access(take, s)
    targets = s.operands[0] if isinstance(s.operands[0], list) else [s.operands[0]]
    targets = [take.target(name) for name in targets]

    def run(w, lanes):
        at = address(w.registers)
        some = w.active(lanes)
        if space == "local":
            index = at.astype(np.int64)[some][:, None] + np.arange(dtype.itemsize * count)
            flat = w.local[some[:, None], index].view(dtype)
        else:
            memory = memory_of(w, space)
            index = memory.at(at[some], dtype.itemsize, count)
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
            index = at.astype(np.int64)[:, None] + np.arange(dtype.itemsize * count)
            w.local[some[:, None], index] = np.ascontiguousarray(values).view(np.uint8)
            return
        memory = memory_of(w, space)
        index = memory.at(at, dtype.itemsize, count)[:, None] + np.arange(count)
        memory.views[dtype.itemsize][index] = values
        if space == "shared":
            bytes_ = at.astype(np.int64)[:, None] + np.arange(dtype.itemsize * count)
            w.block.unfenced[bytes_] = (w.warps[some] + 1)[:, None]

    return run


def atomic(take: Operands, machine: Machine, s: Statement):
    if s.opcode[2:] not in (["add", "u32"], ["add", "s32"]):
        raise Fault("only add")
    result, x = take.target(s.operands[0]), take.value(s.operands[2], TYPES["u32"])
    name, offset, _ = s.operands[1]
    base = take.value(name, np.dtype("u8"))

    def run(w, lanes):
        memory, some = memory_of(w, s.opcode[1]), w.active(lanes)
        index = memory.at((base(w.registers) + np.uint64(offset % 2**64))[some], 4)
        before = np.zeros(w.machine.width, np.uint32)
        for lane, at in zip(some, index, strict=True):
            before[lane] = memory.views[4][at]
            memory.views[4][at] += x(w.registers)[lane]
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
    value = lambda n: take.value(n, np.dtype("u8"))  # noqa: E731
    target, descriptor = value(s.operands[0][0]), value(s.operands[1][0])
    column, row = (take.value(n, TYPES["s32"]) for n in s.operands[1][2][0])
    barrier = value(s.operands[2][0])

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
        values = [v(r).astype(np.int64) for v in (target, descriptor, barrier, column, row)]
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
    to, source = (take.value(s.operands[i][0], np.dtype("u8")) for i in (0, 1))
    offsets = [s.operands[i][1] for i in (0, 1)]
    size = int(s.operands[2], 0)
    given = take.value(s.operands[3], TYPES["u32"])

    def run(w, lanes):
        some, r = w.active(lanes), w.registers
        target = to(r)[some].astype(np.int64) + offsets[0]
        start = source(r)[some].astype(np.int64) + offsets[1]
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
    base, offset = take.value(place[0], np.dtype("u8")), place[1]
    if kind == "try_wait":
        result, parity = take.target(s.operands[0]), take.value(s.operands[2], TYPES["u32"])
    elif s.operands[-1] is not place:
        number = take.value(s.operands[-1], TYPES["u32"])

    def run(w, lanes):
        some, r = w.active(lanes), w.registers
        addresses = base(r)[some].astype(np.int64) + offset
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


# --- tensor cores ---


def halves(words: np.ndarray, kind: str) -> np.ndarray:
    """16-bit elements as float32."""
    if kind == "bf16":
        return (words.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return words.view(np.float16).astype(np.float32)


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


def matrix_rows(w, lanes, base, offset: int, count: int) -> np.ndarray:
    """Indices of (active warps, count, 8, 8) elements; lane l tells row l % 8 of matrix l / 8."""
    address = base(w.registers)[w.active(lanes)].reshape(-1, 32)[:, : 8 * count]
    start = w.block.shared.at(address.ravel() + np.uint64(offset), 2, 8)
    return (start[:, None] + np.arange(8)).reshape(-1, count, 8, 8)


def ldmatrix(take: Operands, machine: Machine, s: Statement):
    targets = [take.target(n) for n in s.operands[0]]
    base, offset = take.value(s.operands[1][0], np.dtype("u8")), s.operands[1][1]

    def run(w, lanes):
        if not w.together(lanes):
            return TOGETHER
        rows = w.block.shared.views[2][matrix_rows(w, lanes, base, offset, len(targets))]
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
    base, offset = take.value(s.operands[0][0], np.dtype("u8")), s.operands[0][1]

    def run(w, lanes):
        if not w.together(lanes):
            return TOGETHER
        some = w.active(lanes)
        index = matrix_rows(w, lanes, base, offset, len(sources))
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
    a_descriptor = None if from_registers else take.value(a_operand, np.dtype("u8"))
    b_descriptor = take.value(b_name, np.dtype("u8"))
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

        def work():
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


def setmaxnreg(take: Operands, machine: Machine, s: Statement):
    return lambda w, m: None if w.together(m) else TOGETHER


BUILDERS = {
    "atom": atomic,
    "bar": bar,
    "bra": branch,
    "cp": cp,
    "cvt": cvt,
    "cvta": cvta,
    "elect": elect,
    "fence": fence,
    "ld": load,
    "ldmatrix": ldmatrix,
    "mbarrier": mbarrier,
    "membar": fence,
    "mma": mma,
    "mov": mov,
    "redux": redux,
    "ret": lambda take, machine, s: lambda w, m: LEAVE,
    "selp": selp,
    "setmaxnreg": setmaxnreg,
    "setp": setp,
    "shfl": shuffle,
    "st": store,
    "stmatrix": stmatrix,
    "vote": vote,
    "wgmma": wgmma,
}
