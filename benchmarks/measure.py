"""Clocks, rounds in turns, peak memory in a fresh process, and what the machine can do at best."""

from __future__ import annotations

import ctypes
import datetime
import functools
import gc
import importlib.metadata
import multiprocessing
import os
import platform
import random
import statistics
import subprocess
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch

from benchmarks.cases import DTYPES, Case, make_problem

ROOT = Path(__file__).resolve().parent.parent
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
PEERS = ("lightly", "pytorch-metric-learning", "liger-kernel", "faiss-cpu")


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
    while slows all of them, so that their ratios hold."""

    def __init__(
        self,
        runs: dict[str, Callable[[], object]],
        device: str,
        cache: str = "warm",
        clock: Callable[[], float] = time.perf_counter,
    ):
        self.runs = runs
        self.time = functools.partial(seconds, device=device, cache=cache, clock=clock)
        self.taken: dict[str, list[float]] = {name: [] for name in runs}
        self.random = random.Random(0)

    def __call__(self) -> None:
        for name in self.random.sample(list(self.runs), len(self.runs)):
            self.taken[name].append(self.time(self.runs[name]))

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


# --- memory --------------------------------------------------------------------------------------


def available_memory(device: str) -> float:
    if device != "cpu":
        return float(torch.cuda.mem_get_info()[0])
    try:
        text = Path("/proc/meminfo").read_text()
    except OSError:
        return 4e9  # not Linux: a guess that keeps the small cases
    return 1024.0 * int(text.split("MemAvailable:")[1].split()[0])


def peak_memory(case: Case, provider: str, device: str) -> int | None:
    """Bytes that one call takes on top of its inputs, in a process that has done nothing else;
    None where the system does not tell.

    Raises:
        BrokenProcessPool: the process was killed, mostly for its memory.
    """
    if device == "cpu" and not Path("/proc/self/clear_refs").exists():
        return None
    # A fork server that has imported torch, and no more, saves two seconds a process.
    context = multiprocessing.get_context("forkserver" if device == "cpu" else "spawn")
    context.set_forkserver_preload(["torch._dynamo"])
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(_measure_peak, case, provider, device).result()


def _measure_peak(case: Case, provider: str, device: str) -> int:
    """In the fresh process: the second call, because the first one loads and compiles."""
    from benchmarks.providers import PROVIDERS  # which imports this module

    if device == "cpu":  # fixed thresholds: or glibc keeps freed blocks, and they look resident
        for threshold in (M_TRIM_THRESHOLD, M_MMAP_THRESHOLD):
            ctypes.CDLL(None).mallopt(threshold, 65_536)
    run = PROVIDERS[provider].make(make_problem(case, device))
    run()
    gc.collect()
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before = _high_water()
    run()
    return _high_water() - before


def _high_water() -> int:
    return 1024 * int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])


# --- the machine ---------------------------------------------------------------------------------


def rates(device: str, dtypes: tuple[str, ...], edge: int | None = None) -> dict[str, float]:
    """The roofline: operations a second of a large product of each type, bytes a second of a copy
    (read and written). Best of several: the machine, not its disturbances."""
    edge = edge or (2048 if device == "cpu" else 8192)
    found = {}
    for name in dtypes:
        left, right = (torch.randn(edge, edge, device=device).to(DTYPES[name]) for _ in range(2))
        found[name] = 2 * edge**3 / _best(functools.partial(torch.mm, left, right), device)
    source = torch.zeros(edge * edge * 16, device=device)  # 268 MB on a CPU: larger than a cache
    target = torch.empty_like(source)
    copied = 2 * source.numel() * source.element_size()
    found["copy"] = copied / _best(lambda: target.copy_(source), device)
    return found


def _best(run: Callable[[], object], device: str) -> float:
    run()
    return min(seconds(run, device) for _ in range(7))


def machine(device: str) -> dict:
    """What a reader must know of the machine; nothing that names its owner."""
    from psm_kernels.backends import cpp

    about = {
        "device": device,
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "instructions": cpp.instruction_set() if not cpp.Cpp().unavailable() else "no C++ backend",
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9),
    }
    if device != "cpu":
        about["gpu"] = torch.cuda.get_device_name()
    return about


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def provenance() -> dict:
    import psm_kernels

    versions = {"python": platform.python_version(), "psm_kernels": psm_kernels.__version__}
    for name in ("torch", "triton", "torchvision", *PEERS):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
        "commit": _git("rev-parse", "--short=12", "HEAD"),
        "changed": bool(_git("status", "--porcelain", "--untracked-files=no")),
        "versions": versions,
    }


def _git(*words: str) -> str | None:
    done = subprocess.run(["git", *words], capture_output=True, text=True, cwd=ROOT)
    return done.stdout.strip() if done.returncode == 0 else None
