"""Threads, memory and asynchronous work of one kernel.

The lanes of some warps go in step, as numpy arrays; those that part ways run in the order of their
addresses until they meet again. Blocks run one after the other, the teams of a block by lot; a
team of one warp shows a missing barrier, one of four warps is three times as fast. What is
asynchronous (cp.async, TMA, wgmma) happens as late as the program allows it or, with early=True,
at once: a wait that is missing shows in one of the two. Every access to memory is checked for
bounds and alignment, every read of shared memory by the proxy of TMA and wgmma for a missing
fence. Nothing is said about time.
"""

from __future__ import annotations

import ctypes
import operator
from collections.abc import Callable

import numpy as np

from ptx.instructions import compile_statement
from ptx.memory import Barrier
from ptx.operands import AGAIN, BARRIER, LEAVE, PAUSE
from ptx.text import Fault, Kernel

WARP = 32
SHARED_START = 1024  # of a block's own shared memory; 1,024 bytes are the system's, as on sm_90
MEMORY_START = 4096
CLOCK = "%globaltimer"  # stands still unless all wait
_memory = np.frombuffer((ctypes.c_uint8 * (1 << 47)).from_address(MEMORY_START), np.uint8)


class Memory:
    """Bytes at addresses from `start` on, as elements of any size."""

    def __init__(self, data: np.ndarray, start: int, regions: list[tuple[int, int]]):
        self.start, self.regions = start, sorted(set(regions))
        self.last = (0, 0)  # the region of the latest access
        self.views = {}
        for size in (1, 2, 4, 8):
            whole = data[: len(data) // size * size]
            self.views[size] = whole.view(f"u{size}")
        self.low = np.array([r[0] for r in self.regions])
        self.high = np.array([r[1] for r in self.regions])

    def at(self, address: np.ndarray, size: int, count: int = 1) -> np.ndarray:
        """Indices of elements; they must be aligned as `count` of them are."""
        if (address & (size * count - 1)).any():
            raise Fault(f"misaligned access of {count} x {size} bytes at {address}")
        if len(address):
            first, last = address.min(), address.max() + size * count
            low, high = self.last
            if first < low or last > high:
                self.check(address, size * count)
        return (address - self.start) // size

    def check(self, address: np.ndarray, size: int) -> None:
        region = np.searchsorted(self.low, address, side="right") - 1
        bad = (region < 0) | (address + size > self.high[np.maximum(region, 0)])
        if bad.any():
            raise Fault(f"access out of bounds: {size} bytes at {address[bad]}")
        self.last = self.regions[region[0]]


class Block:
    def __init__(self, machine: Machine, index: int):
        self.machine, self.index = machine, index
        size = machine.shared_end
        self.shared = Memory(
            np.full(size, 255, np.uint8), 0, [(SHARED_START, size)] * (size > SHARED_START)
        )
        # By byte, 1 + the warp whose write TMA and wgmma do not see yet
        self.unfenced = np.zeros(size, np.uint8)
        self.barriers: dict[int, Barrier] = {}
        self.named: dict[int, list[int]] = {}  # barriers of some warps, see instructions.bar
        self.flying: list[Callable[[], None]] = []  # copies by TMA that were asked for
        self.teams = [Team(self, i) for i in range(0, machine.threads, machine.width)]

    def run(self) -> None:
        order = np.random.default_rng(self.index)
        while teams := [t for t in self.teams if t.paths]:
            order.shuffle(teams)
            for team in teams:
                team.advanced = False
                if not team.waits:
                    team.run()
            live = [t for t in self.teams if t.paths]
            if live and all(t.waits for t in live):
                for team in live:
                    team.waits, team.advanced = False, True
            if not any(t.advanced for t in teams):
                if not self.flying and self.wake(live):
                    continue
                if not self.flying:
                    places = {t.first: t.where() for t in live}
                    raise Fault(f"hang: every thread waits: {places}")
                self.flying.pop(0)()

    def wake(self, teams: list[Team]) -> bool:
        """A second passes for those that wait with a clock in hand, up to five times."""
        clock = self.machine.slots[CLOCK]
        if not self.machine.has_clock or teams[0].registers[clock][0] >= 5 * 10**9:
            return False
        for team in teams:
            team.registers[clock] = team.registers[clock] + np.uint64(10**9)
        return True

    def barrier(self, address: int) -> Barrier:
        if address not in self.barriers:
            raise Fault(f"no mbarrier was initialized at {address}")
        return self.barriers[address]

    def check_proxy(self, address: np.ndarray) -> None:
        if self.unfenced[address].any():
            raise Fault("the asynchronous proxy reads a write that no fence.proxy.async follows")


class Team:
    """Warps that go in step."""

    def __init__(self, block: Block, first: int):
        self.block, self.first = block, first
        self.machine = block.machine
        self.lanes = np.arange(self.machine.width)
        self.warps = (self.lanes + first) // WARP  # of the block, by lane
        self.registers = list(self.machine.start)
        special = {"%tid.x": self.lanes + first, "%ctaid.x": np.full_like(self.lanes, block.index)}
        for name, value in special.items():
            self.registers[self.machine.slots[name]] = value.astype(np.uint32)
        self.local = np.full((len(self.lanes), self.machine.local_bytes), 255, np.uint8)
        # Lanes that are at the same statement: [statement, mask or None for all,
        # True where it waits for other lanes, PAUSE where for other teams]
        self.paths = [[0, None, False]]
        self.waits = self.advanced = False
        self.expects: dict[int, int] = {}  # named barriers at which it waits
        self.copies: list[list[Callable[[], None]]] = [[]]  # groups of cp.async, the last one open
        self.products: list[list[Callable[[], None]]] = [[]]  # of wgmma
        self.fenced: list[np.ndarray] = []  # the registers at the last wgmma.fence

    def where(self) -> list[str]:
        return [self.machine.kernel.statements[path[0]].text for path in self.paths]

    def active(self, mask: np.ndarray | None) -> np.ndarray:
        return self.lanes if mask is None else np.flatnonzero(mask)

    def together(self, mask: np.ndarray | None, wanted: np.ndarray | None = None) -> bool:
        """Are all lanes of a warp here, or those that its member mask wants and that are left?"""
        if mask is None:
            return True
        alive = np.zeros(len(self.lanes), bool)
        for _, lanes, _ in self.paths:
            alive |= True if lanes is None else lanes
        missing = alive & ~mask
        if wanted is not None:
            missing &= (wanted >> (self.lanes % WARP).astype(np.uint32) & 1).astype(bool)
        by_warp = mask.reshape(-1, WARP), missing.reshape(-1, WARP)
        return not (by_warp[0].any(1) & by_warp[1].any(1)).any()

    def defer(self, groups: list[list], work: Callable[[], None]) -> None:
        if self.machine.early:
            work()
        else:
            groups[-1].append(work)

    def commit(self, groups: list[list], mask: np.ndarray | None) -> None:
        if not self.all_here(mask):
            raise Fault("the warps of a team commit asynchronous work at different times")
        groups.append([])

    def all_here(self, mask: np.ndarray | None) -> bool:
        return mask is None or len(self.paths) == 1

    def finish(self, groups: list[list], left: int, mask: np.ndarray | None) -> None:
        """Until at most `left` committed groups are open."""
        if not self.all_here(mask):
            raise Fault("the warps of a team wait for asynchronous work at different times")
        while len(groups) - 1 > left:
            for work in groups.pop(0):
                work()

    def run(self) -> None:
        """Until all lanes have left or wait."""
        while self.paths:
            path = next((p for p in self.paths if not p[2]), None)
            if path is None:
                for other in self.paths:
                    other[2] = other[2] is True
                if all(p[2] for p in self.paths):
                    raise Fault(f"lanes wait for each other at different places: {self.where()}")
                return
            asked, lanes = self.follow(path)
            if asked is not None and (asked >= 0 or asked == LEAVE):
                self.part(path, lanes, asked)
            elif asked == AGAIN:
                path[0] -= 1
                return
            elif asked in (PAUSE, BARRIER) and len(self.paths) == 1:
                self.waits = asked == BARRIER
                self.advanced |= self.waits
                return
            elif asked is not None:
                path[0] -= asked != PAUSE  # it is asked again when others are here
                path[2] = PAUSE if asked == PAUSE else True
            self.merge()
        self.advanced = True
        if any(map(len, self.products)) or any(map(len, self.copies)):
            raise Fault("warps leave before their asynchronous work is done")

    def follow(self, path: list) -> tuple[int | None, np.ndarray | None]:
        """Takes a path to where a statement asks for something, and tells what and of which lanes,
        or to where another path is."""
        code, registers = self.machine.code, self.registers
        at, mask, _ = path
        others = {p[0] for p in self.paths if p is not path}
        asked, lanes = None, mask
        while asked is None and at not in others:
            work, guard, negated = code[at]
            at += 1
            lanes = mask
            if guard is not None:
                lanes = ~registers[guard] if negated else registers[guard]
                lanes = lanes if mask is None else lanes & mask
                if not lanes.any():
                    continue
                lanes = None if lanes.all() else lanes
            try:
                asked = work(self, lanes)
            except Fault as fault:
                raise Fault(f"{fault}: {self.machine.kernel.statements[at - 1].text}") from fault
            if asked is not None and asked >= 0 and lanes is None and not others:
                at, asked = asked, None  # all go on elsewhere
        path[0] = at
        return asked, lanes

    def part(self, path: list, lanes: np.ndarray | None, target: int) -> None:
        """Some lanes of a path leave or go elsewhere."""
        at, mask, _ = path
        self.paths = [p for p in self.paths if p is not path]
        if target != LEAVE:
            self.paths.append([target, lanes, False])
        if lanes is not None:
            rest = ~lanes if mask is None else mask & ~lanes
            if rest.any():
                self.paths.append([at, rest, False])

    def merge(self) -> None:
        self.paths.sort(key=operator.itemgetter(0))
        merged = []
        for path in self.paths:
            if merged and merged[-1][0] == path[0]:
                both = merged[-1][1] | path[1]
                merged[-1] = [path[0], None if both.all() else both, False]
            else:
                merged.append(path)
        self.paths = merged


class Machine:
    """One kernel on one launch configuration."""

    def __init__(self, kernel: Kernel, *, early: bool = False, warps: int = 4):
        self.kernel, self.early, self.width = kernel, early, WARP * warps
        self.slots: dict[str, int] = {}
        self.dtypes: list[np.dtype] = []
        self.start: list[np.ndarray] = []
        self.local_bytes = sum(kernel.local.values())
        for name, dtype in kernel.registers.items():
            self.add(name, self.full(0, dtype))
        for name in ("tid", "ctaid", "ntid", "nctaid"):
            for axis in "xyz":
                self.add(f"%{name}.{axis}", self.full(int(name.startswith("n")), np.uint32))
        self.add(CLOCK, self.full(0, np.uint64))
        self.has_clock = any(CLOCK in s.operands for s in kernel.statements)
        place, local = SHARED_START, 0
        for name, (alignment, size) in sorted(kernel.shared.items(), key=lambda s: s[1][1] == 0):
            place = -(-place // alignment) * alignment
            self.add(name, self.full(place, np.uint64))
            place += size
        self.static_end = place
        for name, size in kernel.local.items():
            self.add(name, self.full(local, np.uint64))
            local += size
        for name in kernel.params:
            self.add(name, self.full(0, np.uint64))
        self.code = [
            (compile_statement(self, s), s.guard and self.slots[s.guard], s.negated)
            for s in kernel.statements
        ]

    def full(self, value: int, dtype) -> np.ndarray:
        return np.full(self.width, value, dtype)

    def add(self, name: str, value: np.ndarray) -> int:
        self.slots[name] = len(self.start)
        self.start.append(value)
        self.dtypes.append(value.dtype)
        return self.slots[name]

    def constant(self, bits: int, dtype: np.dtype) -> int:
        name = f"{bits} {dtype}"
        if name not in self.slots:
            self.add(name, self.full(bits, np.uint64).astype(f"u{dtype.itemsize}").view(dtype))
        return self.slots[name]

    def launch(
        self,
        grid: int,
        threads: int,
        shared_bytes: int,
        params: list[bytes],
        regions: list[tuple[int, int]],
    ) -> None:
        """`params`: the bytes of each; `regions`: where the kernel may read and write."""
        self.threads, self.shared_end = threads, self.static_end + shared_bytes
        places = np.cumsum([0, *(-(-len(value) // 64) * 64 for value in params)]).tolist()
        copy = np.zeros(places[-1] + 64, np.uint8)
        copy = copy[-copy.ctypes.data % 64 :]  # tensor maps need 64
        own = []
        for name, value, place in zip(self.kernel.params, params, places, strict=False):
            copy[place : place + len(value)] = np.frombuffer(value, np.uint8)
            self.start[self.slots[name]] = self.full(place, np.uint64)
            own.append((place, place + len(value)))
        # A parameter has an address of its own, of 32 bits, besides that in memory.
        self.params, self.params_start = Memory(copy, 0, own), copy.ctypes.data
        shifted = [(self.params_start + low, self.params_start + high) for low, high in own]
        self.memory = Memory(_memory, MEMORY_START, [*regions, *shifted])
        self.start[self.slots["%ntid.x"]] = self.full(threads, np.uint32)
        self.start[self.slots["%nctaid.x"]] = self.full(grid, np.uint32)
        with np.errstate(all="ignore"):
            for index in range(grid):
                Block(self, index).run()
