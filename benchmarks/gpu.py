"""Times the kernels on this GPU: backends, lean eager torch, torch.compile and slabs of products,
against a roofline.

    python benchmarks/gpu.py [--seconds 150] [--results benchmarks/results]

writes <gpu name>.json and .png. The library's own backends are replayed from a CUDA graph. "hot"
repeats on one bank, which the L2 cache may hold; "cold" fills the cache before every run, by
reading: what was written would be moved to memory during the run. Each group of providers has a
process of its own: one that crashes or hangs costs its own rows alone. `--profile` only starts the
kernels of the first shape, for a profiler.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

if __name__ == "__main__":  # run by its path
    sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks import gpu_report
from benchmarks.cases import Case, make_problem
from benchmarks.providers import PROVIDERS
from psm_kernels.backends import registry
from psm_kernels.backends.base import NOTHING, Backend
from psm_kernels.backends.cuda import Cuda
from psm_kernels.options import PassOptions
from psm_kernels.rows import unit_rows

ROOT = Path(__file__).parents[1]
CASES = [  # the most wanted first
    Case("psm", 256, 65_536, 128, 5, "bf16"),
    Case("psm", 1_024, 65_536, 256, 5, "bf16"),
    Case("enqueue", 4_096, 1 << 20, 128, 0, "bf16"),
    Case("psm", 256, 1 << 20, 128, 5, "bf16"),
    Case("psm", 4_096, 262_144, 256, 5, "bf16"),
    Case("bank_topk", 10_000, 50_000, 512, 5, "bf16"),
    Case("bank_topk", 10_000, 50_000, 512, 200, "bf16"),
    Case("psm", 256, 1 << 24, 128, 5, "bf16"),
]
GROUPS = ("cuda", "triton", "eager", "compile", "slab")
VARIANTS = {  # of the cuda backend's pass; those of sm_90a stand last
    "null epilogue": {"null_epilogue": True},
    "sm_80 kernels": {"force_sm80": True},
    "ping-pong": {"ping_pong": True},
}
HOPPER = 9
DEVICE = "cuda"
LEAD = 2_000_000  # cycles, 1 ms, in which the host submits what is timed


class Run(NamedTuple):
    """One provider's work on one case."""

    name: str
    step: Callable[[], object]
    graph: bool  # may be captured


# --- clocks --------------------------------------------------------------------------------------


def timed(step: Callable[[], object], seconds: float, flush: Tensor | None) -> dict:
    """Median and quantiles of device time in microseconds."""
    times, stop = [], time.perf_counter() + seconds
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for _ in range(3):
        step()
    while len(times) < 3 or (time.perf_counter() < stop and len(times) < 1000):
        if flush is not None:
            flush.sum()
        torch.cuda._sleep(LEAD)
        start.record()
        step()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3)
    cuts = statistics.quantiles(times, n=10, method="inclusive")
    return {"us": statistics.median(times), "q10": cuts[0], "q90": cuts[8], "runs": len(times)}


def captured(step: Callable[[], object]) -> Callable[[], None]:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def peak_bytes(step: Callable[[], object]) -> int:
    """Memory that a step takes on top of its inputs."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def measure(run: Run, seconds: float, flush: Tensor) -> dict:
    peak = peak_bytes(run.step)
    step = captured(run.step) if run.graph else run.step
    times = {"hot": timed(step, seconds, None), "cold": timed(step, seconds, flush)}
    return {"peak_bytes": peak, "graph": run.graph, **times}


def measure_machine() -> dict:
    """What this card is, and does at best: a large bf16 product and a large copy."""
    a = torch.randn(8192, 8192, device=DEVICE, dtype=torch.bfloat16)
    product = timed(lambda: a @ a, 1.0, None)["us"]
    source = torch.empty(1 << 30, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    copy = timed(lambda: target.copy_(source), 1.0, None)["us"]
    gpu = torch.cuda.get_device_properties(0)
    return {
        "gpu": gpu.name,
        "capability": f"{gpu.major}.{gpu.minor}",
        "multiprocessors": gpu.multi_processor_count,
        "memory_bytes": gpu.total_memory,
        "flops": 2 * 8192**3 / (product * 1e-6),
        "bytes_per_s": 2 * source.nbytes / (copy * 1e-6),
    }


# --- what is timed -------------------------------------------------------------------------------


def runs(group: str, case: Case) -> Iterator[Run]:
    """The whole loss with its gradient; of our backends the pass alone, too."""
    ours = group in registry.TABLE
    if ours and case.operation == "enqueue":
        if group == "cuda":  # the others' is torch's operators
            problem = make_problem(case, DEVICE)
            yield Run(group, lambda: problem.memory.enqueue(problem.key, backend=group), True)
        return
    if reason := PROVIDERS[group].refuse(case, DEVICE):
        raise ValueError(reason)
    problem = make_problem(case, DEVICE)
    yield Run(group, PROVIDERS[group].make(problem), ours)
    if not ours or case.operation != "psm":
        return
    query, key = unit_rows(problem.query.detach()), unit_rows(problem.key)
    low = query.to(problem.bank.dtype), key.to(problem.bank.dtype), problem.bank
    count, s_pos = problem.memory.count, (query * key).sum(1)
    options = PassOptions(
        temperature=0.5, selection="bernoulli", topk=case.topk, exclude_mined=True
    )

    def run(name: str, backend: Backend) -> Run:
        args = (*low, count, s_pos, options, NOTHING, problem.rng_state)
        return Run(f"{group} {name}", functools.partial(backend.bank_pass, *args), True)

    yield run("pass", registry.TABLE[group])
    if group == "cuda":
        for name, flags in VARIANTS.items():
            if name == "null epilogue" or capability() == HOPPER:
                yield run(name, Cuda(**flags))


def capability() -> int:
    return torch.cuda.get_device_capability()[0]


def profile() -> None:
    """The kernels of the first case between two marks, after a warm-up."""
    step = next(runs("cuda", CASES[0])).step
    for _ in range(3):
        step()
    torch.cuda.synchronize()
    torch.cuda.cudart().cudaProfilerStart()
    step()
    torch.cuda.synchronize()
    torch.cuda.cudart().cudaProfilerStop()


# --- one process per group -----------------------------------------------------------------------


def measure_group(group: str, seconds: float, write: Callable[[dict], None]) -> bool:
    """Hands each row to `write`; False where something failed that was to run."""
    reason = registry.TABLE[group].unavailable() if group in registry.TABLE else None
    if reason:
        write({"error": reason})
        return False
    flush = torch.zeros(64 << 20, device=DEVICE)
    good, stop = True, time.perf_counter() + seconds
    for number, case in enumerate(CASES):
        about = {"kind": case.operation, "shape": [case.batch, case.size, case.dim, case.topk]}
        about["dtype"] = case.dtype
        left = stop - time.perf_counter()
        if left < 0:
            write(about | {"backend": group, "error": "not measured, the time was up"})
        else:  # up to six runs of a case, hot and cold
            good &= measure_case(
                group, case, about, left / (len(CASES) - number) / 12, flush, write
            )
    return good


def measure_case(
    group: str, case: Case, about: dict, seconds: float, flush: Tensor,
    write: Callable[[dict], None],
) -> bool:  # fmt: skip
    """A failure becomes a row, and the next run may still be measured. Memory that a baseline's
    matrices would take and the card does not have is a result, as is work it does not do."""
    about, good = about | {"backend": group}, True
    pending = runs(group, case)
    while True:
        try:
            run = next(pending, None)
            if run is None:
                return good
            about["backend"] = run.name
            write(about | measure(run, seconds, flush))
        except Exception as error:
            text = str(error).strip().partition("\n")[0]
            write(about | {"error": f"{type(error).__name__}: {text}"})
            refused = isinstance(error, ValueError | torch.cuda.OutOfMemoryError)
            good &= group not in registry.TABLE and refused


START, GRACE = 10, 20  # seconds: of imports and a context; of a last case and its compilation


def start_group(group: str, seconds: float) -> tuple[list[dict], str | None]:
    """Rows of a group, measured in a process that is stopped when it takes GRACE too long."""
    measured = str(max(seconds - START, 5))
    command = [sys.executable, __file__, "--group", group, "--seconds", measured]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    limit, failed = seconds + GRACE, None
    try:
        output, _ = child.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        stop(child)
        output, _ = child.communicate()
        failed = f"stopped after {limit:.0f} s"
    finally:
        stop(child)
    if failed is None and child.returncode:
        failed = f"ended with status {child.returncode}"
    return [json.loads(line) for line in output.splitlines() if line.startswith("{")], failed


def stop(child: subprocess.Popen) -> None:
    if child.poll() is None:
        os.killpg(child.pid, signal.SIGKILL)  # the compiler's workers too: they hold the pipe


def run_groups(seconds: float, folder: Path) -> int:
    """Measures all groups; 1 where something failed that was to run."""
    signal.signal(signal.SIGTERM, lambda *unused: sys.exit("stopped"))  # and with it the child
    end = time.monotonic() + seconds
    machine, failed = start_group("machine", 30)
    if not machine:
        raise SystemExit(f"the GPU could not be measured: {failed}")
    result = {
        "machine": machine[0],
        "versions": gpu_report.versions(),
        "failed": {},
        "rows": [],
    }
    for number, group in enumerate(GROUPS):
        share = max((end - time.monotonic()) / (len(GROUPS) - number), 15)
        rows, failed = start_group(group, share)
        rows = [gpu_report.add_roofline(row, result["machine"]) for row in rows]
        result["rows"] += [row for row in rows if "kind" in row]
        if failed:
            result["failed"][group] = next((r["error"] for r in rows if "kind" not in r), failed)
        gpu_report.show([row for row in rows if "kind" in row])
        path = gpu_report.write(result, folder)  # what is there, whatever becomes of the next group
    if any("hot" in row for row in result["rows"]):
        try:
            gpu_report.plot(result, path.with_suffix(".png"))
        except ImportError as error:
            print(f"no plot: {error}")
    print(path, *(f"; {group} failed: {why}" for group, why in result["failed"].items()))
    return 1 if result["failed"] else 0


def print_line(row: dict) -> None:
    print(json.dumps(row), flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=150, help="about how long it may take")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks/results")
    parser.add_argument("--profile", action="store_true", help="start the kernels once, untimed")
    parser.add_argument("--group", choices=("machine", *GROUPS), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.profile:
        profile()
        return 0
    if args.group == "machine":
        print_line(measure_machine())
        return 0
    if args.group:
        return 0 if measure_group(args.group, args.seconds, print_line) else 1
    return run_groups(args.seconds, args.results)


if __name__ == "__main__":
    sys.exit(main())
