"""Clocks, rounds in turns, and peak memory in a fresh process."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import gc
import multiprocessing
import random
import signal
import statistics
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from benchmarks.cases import Case, make_problem

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4  # of glibc's malloc.h


# --- time ----------------------------------------------------------------------------------------


def seconds(
    run: Callable[[], object], device: str, cache: str = "warm", clock=time.perf_counter
) -> float:
    """One call's time by the clock; on a GPU the device's. "cold" empties its L2 first."""
    if device == "cpu":
        start = clock()
        run()
        return clock() - start
    if cache == "cold":
        _flusher(device).zero_()
    else:
        run()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


@functools.cache
def _flusher(device: str) -> torch.Tensor:
    return torch.empty(256 << 20, dtype=torch.uint8, device=device)  # five times an H100's L2


class Turns:
    """Calling it is one round: every run once, in a new order. A machine that slows down for a
    while slows all of them, so that their ratios hold. Who fails, as `attempt` tells by a reason,
    is out of the later rounds and in `failed`."""

    def __init__(
        self,
        runs: dict[str, Callable[[], object]],
        device: str,
        cache: str = "warm",
        clock: Callable[[], float] = time.perf_counter,
        attempt: Callable[[str, Callable[[], float]], tuple[float, str | None]] | None = None,
    ):
        self.runs = dict(runs)
        self.time = functools.partial(seconds, device=device, cache=cache, clock=clock)
        self.taken: dict[str, list[float]] = {name: [] for name in runs}
        self.random = random.Random(0)
        self.attempt = attempt or (lambda name, call: (call(), None))
        self.failed: dict[str, str] = {}

    def __call__(self) -> None:
        for name in self.random.sample(list(self.runs), len(self.runs)):
            taken, reason = self.attempt(name, functools.partial(self.time, self.runs[name]))
            if reason is None:
                self.taken[name].append(taken)
            else:
                self.failed[name] = reason
                del self.runs[name], self.taken[name]

    def measure(self, budget: float, least: int = 5, most: int = 50) -> None:
        """One round to warm up, then as many as fit the budget. With `least` 0 the first one is
        all where it took longer than that."""
        self()
        last = sum(taken[-1] for taken in self.taken.values())
        if last > budget and not least:
            return
        for taken in self.taken.values():
            taken.clear()
        for _ in range(int(min(max(budget / last, least, 1), most))):
            self()

    def summary(self) -> dict[str, dict[str, float]]:
        return {name: quantiles(taken) for name, taken in self.taken.items()}


def quantiles(taken: list[float]) -> dict[str, float]:
    """Median, 10 % and 90 % quantiles of seconds."""
    if len(taken) == 1:
        return {"median": taken[0], "low": taken[0], "high": taken[0], "rounds": 1}
    tenths = statistics.quantiles(taken, n=10, method="inclusive")
    middle = statistics.median(taken)
    return {"median": middle, "low": tenths[0], "high": tenths[-1], "rounds": len(taken)}


@contextlib.contextmanager
def time_limit(limit: float) -> Iterator[None]:
    """Raises TimeoutError in what takes longer, where Python or a system call notices: not in one
    endless call of compiled code. For the main thread."""

    def stop(signum, frame):
        raise TimeoutError(f"took more than {limit:g} s")

    before = signal.signal(signal.SIGALRM, stop)
    # Again after a while: a library may have caught the first one.
    signal.setitimer(signal.ITIMER_REAL, limit, 5.0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return ": ".join((type(error).__name__, *lines[:1]))[:200]


# --- memory --------------------------------------------------------------------------------------


def keep_memory() -> None:
    """Freed blocks stay in the process, as with the allocators that PyTorch's guide to performance
    recommends. By default glibc gives large ones back to the system, and zeroing new pages takes
    half of eager's time; ours allocates too little to notice."""
    _allocator("mallopt", M_MMAP_MAX, 0)
    _allocator("mallopt", M_TRIM_THRESHOLD, -1)


def give_back_memory() -> None:
    """What was freed, to the system: between cases."""
    gc.collect()
    _allocator("malloc_trim", 0)


def _allocator(function: str, *words: int) -> None:
    found = getattr(ctypes.CDLL(None), function, None)  # of glibc alone
    if found is not None:
        found(*words)


def available_memory(device: str) -> float:
    if device != "cpu":
        return float(torch.cuda.mem_get_info()[0])
    try:
        text = Path("/proc/meminfo").read_text()
    except OSError:
        return 4e9  # not Linux: a guess that keeps the small cases
    return 1024.0 * int(text.split("MemAvailable:")[1].split()[0])


def peak_memory(case: Case, provider: str, device: str, patience: float = 120.0) -> int | None:
    """Bytes that one call takes on top of its inputs, in a process that has done nothing else;
    None where the system does not tell.

    Raises:
        RuntimeError: the call failed there, the process was killed, mostly for its memory, or it
            took more than `patience` seconds.
    """
    if device == "cpu" and not Path("/proc/self/clear_refs").exists():
        return None
    # A fork server that has imported torch, and no more, saves two seconds a process.
    context = multiprocessing.get_context("forkserver" if device == "cpu" else "spawn")
    context.set_forkserver_preload(["torch._dynamo"])
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_send_peak, args=(sender, case, provider, device), daemon=True)
    child.start()
    sender.close()
    try:
        if not receiver.poll(patience):
            raise RuntimeError(f"took more than {patience:.0f} s when its memory was measured")
        found = receiver.recv()
    except EOFError:
        raise RuntimeError("was killed when its memory was measured") from None
    finally:
        child.kill()
        child.join()
        receiver.close()
    if isinstance(found, str):
        raise RuntimeError(f"{found}, when its memory was measured")
    return found


def _send_peak(sender: Connection, *asked) -> None:
    try:
        sender.send(_measure_peak(*asked))
    except BaseException as error:  # an exception need not survive the way through a pipe
        sender.send(first_line(error))


def _measure_peak(case: Case, provider: str, device: str) -> int:
    """In the fresh process: the second call, because the first one loads and compiles."""
    from benchmarks.providers import PROVIDERS  # which imports this module

    if device == "cpu":  # fixed thresholds: or glibc keeps freed blocks, and they look resident
        for threshold in (M_TRIM_THRESHOLD, M_MMAP_THRESHOLD):
            _allocator("mallopt", threshold, 65_536)
    run = PROVIDERS[provider].make(make_problem(case, device))
    run()
    gc.collect()
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    risen = peak_from_here()
    run()
    return risen()


def peak_from_here() -> Callable[[], int]:
    """By how many bytes resident memory has been above what it is now, when that is asked."""
    give_back_memory()
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before = _high_water()
    return lambda: _high_water() - before


def _high_water() -> int:
    return 1024 * int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
