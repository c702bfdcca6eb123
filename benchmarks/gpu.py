"""Times the kernels on this GPU: backends, eager torch and torch.compile, against a roofline.

    python benchmarks/gpu.py [--seconds 150] [--results benchmarks/results]

writes <gpu name>.json and .png. The library's own backends are replayed from a CUDA graph. "hot"
repeats on one bank, which the L2 cache may hold; "cold" fills the cache before every run, by
reading: what was written would be moved to memory during the run. Each group of providers has a
process of its own: one that crashes or hangs costs its own rows alone.
"""

from __future__ import annotations

import argparse
import functools
import importlib.metadata
import json
import os
import platform
import re
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

from psm_kernels import MemoryBank
from psm_kernels.backends import registry
from psm_kernels.backends.base import Backend
from psm_kernels.backends.cuda import Cuda
from psm_kernels.functional import psm_loss
from psm_kernels.ops import NOTHING, bank_pass, bank_topk
from psm_kernels.options import PassOptions
from psm_kernels.rows import unit_rows

ROOT = Path(__file__).parents[1]
SHAPES = {  # kind -> B, K, D and for topk k; the smallest first
    "enqueue": [(4096, 1_048_576, 128)],
    "loss": [(256, 65_536, 128)],
    "pass": [
        (256, 65_536, 128),
        (1024, 65_536, 256),
        (256, 1_048_576, 128),
        (4096, 262_144, 256),
        (256, 16_777_216, 128),
    ],
    "topk": [(10_000, 50_000, 512, 5), (10_000, 50_000, 512, 200)],
}
SAMPLING = {"temperature": 0.1, "selection": "bernoulli", "a": 0.5, "b": 0.0}
TOPK = 5
DEVICE = "cuda"


class Run(NamedTuple):
    """One provider's work on one shape."""

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
        torch.cuda._sleep(200_000)  # 0.1 ms in which the host submits what is timed
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


# --- what is timed -------------------------------------------------------------------------------


def random_bank(size: int, dim: int) -> Tensor:
    bank = torch.empty(size, dim, dtype=torch.bfloat16, device=DEVICE)
    for part in bank.split(1 << 20):
        part.copy_(unit_rows(torch.randn(part.shape, device=DEVICE)))
    return bank


def random_rows(batch: int, dim: int) -> Tensor:
    return unit_rows(torch.randn(batch, dim, device=DEVICE))


def pass_runs(group: str, batch: int, size: int, dim: int) -> Iterator[Run]:
    """Forward and query gradient of the training pass."""
    query, key, bank = random_rows(batch, dim), random_rows(batch, dim), random_bank(size, dim)
    s_pos = (query * key).sum(1)
    rng_state = torch.tensor([1, 2], device=DEVICE)
    count = torch.tensor(size, device=DEVICE)
    if group == "torch":
        low = query.bfloat16(), key.bfloat16(), bank, s_pos
        yield Run("eager", functools.partial(eager_pass, *low), False)
        yield Run("torch.compile", functools.partial(compiled_pass(), *low), False)
        return
    leaf = query.requires_grad_()

    def step():
        out = bank_pass(
            leaf, key, bank, count, s_pos, **SAMPLING, topk=TOPK, exclude_mined=True,
            rng_state=rng_state, backend=group,
        )  # fmt: skip
        return torch.autograd.grad(out.neg_lse.sum(), leaf)

    yield Run(group, step, True)
    low = query.detach().bfloat16(), key.bfloat16(), bank, count, s_pos
    options = PassOptions(**SAMPLING, topk=TOPK, exclude_mined=True)

    def direct(backend: Backend) -> Callable:
        return functools.partial(backend.bank_pass, *low, options, NOTHING, rng_state)

    # without the casts and autograd's few kernels
    yield Run(f"{group} kernels", direct(registry.TABLE[group]), True)
    if group == "cuda":
        yield Run("cuda null epilogue", direct(Cuda(null_epilogue=True)), True)
        if torch.cuda.get_device_capability()[0] == 9:
            yield Run("cuda sm_80 kernels", direct(Cuda(force_sm80=True)), True)


def eager_pass(query: Tensor, key: Tensor, bank: Tensor, s_pos: Tensor) -> tuple[Tensor, ...]:
    """What a user writes, products in the bank's dtype; neg_mean is the gradient."""
    similarity = (query @ bank.T).float()  # (B, K)
    distance = similarity - s_pos[:, None] - SAMPLING["b"]
    p = torch.exp(-SAMPLING["a"] * distance.square()).clamp_max(0.999)
    mined = (key @ bank.T).topk(TOPK)
    keep = (torch.rand_like(p) < p).scatter(1, mined.indices, False)
    logits = torch.where(keep, similarity / SAMPLING["temperature"], -torch.inf)
    neg_lse = logits.logsumexp(1)
    neg_mean = (logits - neg_lse[:, None]).exp().to(bank.dtype) @ bank
    neg_sq_lse = (2 * logits).logsumexp(1)
    return neg_lse, neg_mean.float(), neg_sq_lse, keep.sum(1), *mined


@functools.cache
def compiled_pass() -> Callable:
    return torch.compile(eager_pass, dynamic=False)


def loss_runs(group: str, batch: int, size: int, dim: int) -> Iterator[Run]:
    """PSM's loss and its gradient: the pass, and what is made of it."""
    query, key, bank = random_rows(batch, dim), random_rows(batch, dim), random_bank(size, dim)
    query.requires_grad_()
    rng_state = torch.tensor([1, 2], device=DEVICE)

    def step():
        loss = psm_loss(
            query, key, bank, **SAMPLING, topk=TOPK, rng_state=rng_state,
            backend="reference" if group == "torch" else group,
        )  # fmt: skip
        return torch.autograd.grad(loss, query)

    yield Run("reference" if group == "torch" else group, step, group != "torch")


def topk_runs(group: str, batch: int, size: int, dim: int, k: int) -> Iterator[Run]:
    query, bank = random_rows(batch, dim).bfloat16(), random_bank(size, dim)
    count = torch.tensor(size, device=DEVICE)
    if group == "torch":
        yield Run("eager", lambda: (query @ bank.T).topk(k), False)
        return
    yield Run(group, lambda: bank_topk(query, bank, k, count=count, backend=group), True)


def enqueue_runs(group: str, batch: int, size: int, dim: int) -> Iterator[Run]:
    keys, memory = random_rows(batch, dim), MemoryBank(size, dim, dtype=torch.bfloat16)
    memory.to(DEVICE)
    names = {"torch": "eager", "cuda": "cuda"}
    backend = "cuda" if group == "cuda" else "reference"  # has no kernel: torch's operators
    if group in names:
        yield Run(names[group], lambda: memory.enqueue(keys, backend=backend), True)


RUNS = {"pass": pass_runs, "loss": loss_runs, "topk": topk_runs, "enqueue": enqueue_runs}
PRODUCTS = {"pass": 3, "loss": 3, "topk": 1, "enqueue": 0}  # of B x K x D


# --- one process per group -----------------------------------------------------------------------


def measure_group(group: str, seconds: float, write: Callable[[dict], None]) -> bool:
    """Hands each row to `write`; False where something failed that was to run."""
    reason = registry.TABLE[group].unavailable() if group in registry.TABLE else None
    if reason:
        write({"error": reason})
        return False
    flush = torch.zeros(64 << 20, device=DEVICE)
    cases = [(kind, shape) for kind, shapes in SHAPES.items() for shape in shapes]
    good, stop = True, time.perf_counter() + seconds
    for number, (kind, shape) in enumerate(cases):
        about = {"kind": kind, "shape": list(shape), "dtype": "bfloat16"}
        left = stop - time.perf_counter()
        if left < 0:
            write(about | {"backend": group, "error": "not measured, the time was up"})
        else:  # up to four runs of a case, hot and cold
            good &= measure_case(group, about, left / (len(cases) - number) / 8, flush, write)
    return good


def measure_case(
    group: str, about: dict, seconds: float, flush: Tensor, write: Callable[[dict], None]
) -> bool:
    """A failure becomes a row, and the next run may still be measured. Memory that a baseline's
    matrices would take and the card does not have is a result."""
    about, good = about | {"backend": group}, True
    runs = RUNS[about["kind"]](group, *about["shape"])
    while True:
        try:
            run = next(runs, None)
            if run is None:
                return good
            about["backend"] = run.name
            write(about | measure(run, seconds, flush))
        except Exception as error:
            text = str(error).strip().partition("\n")[0]
            write(about | {"error": f"{type(error).__name__}: {text}"})
            good &= group == "torch" and isinstance(error, torch.cuda.OutOfMemoryError)


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


GROUPS = ("triton", "cuda", "torch")


START, GRACE = 10, 20  # seconds: of imports and a context; of a last case and its compilation


def start_group(group: str, seconds: float) -> tuple[list[dict], str | None]:
    """Rows of a group, measured in a process that is stopped when it takes GRACE too long."""
    measured = str(max(seconds - START, 5))
    command = [sys.executable, __file__, "--group", group, "--seconds", measured]
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    child = subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env=environment, start_new_session=True
    )
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


# --- the report ----------------------------------------------------------------------------------


def add_roofline(row: dict, machine: dict) -> dict:
    """The least time for the products or for one reading of the bank, whichever is more."""
    if "hot" not in row:
        return row
    batch, size, dim = row["shape"][:3]
    work = PRODUCTS[row["kind"]] * 2 * batch * size * dim / machine["flops"]
    moved = batch * dim * 6 if row["kind"] == "enqueue" else size * dim * 2
    roofline = max(work, moved / machine["bytes_per_s"]) * 1e6
    return row | {"roofline_us": roofline, "share_of_roofline": roofline / row["hot"]["us"]}


def versions() -> dict:
    found = {"torch": torch.__version__, "cuda": torch.version.cuda}
    found["python"] = platform.python_version()
    for name, command in {
        "driver": ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "-i", "0"],
        "nvcc": ["nvcc", "--version"],
        "commit": ["git", "-C", str(ROOT), "describe", "--always", "--abbrev=40", "--dirty"],
    }.items():
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            found[name] = done.stdout.strip().rpartition("\n")[2]
        except (OSError, subprocess.CalledProcessError):
            found[name] = None
    found["commit"] = found["commit"] or os.environ.get("PSM_COMMIT")
    try:
        found["triton"] = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        found["triton"] = None
    return found


def write(result: dict, folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    name = re.sub(r"[^A-Za-z0-9]+", "_", result["machine"]["gpu"]).strip("_")
    path = folder / f"{name}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    return path


def show(rows: list[dict]) -> None:
    for row in rows:
        where = f"{row['kind']:<8} {'x'.join(map(str, row['shape'])):<20} {row['backend']:<20}"
        if "hot" not in row:
            print(f"{where} {row['error']}")
            continue
        hot, cold = row["hot"], row["cold"]
        text = f"{hot['us']:>10.1f} us [{hot['q10']:.1f}, {hot['q90']:.1f}], cold {cold['us']:.1f}"
        share = f"{row['share_of_roofline']:.0%} of {row['roofline_us']:.1f} us"
        print(f"{where} {text}; {share}; {row['peak_bytes'] / 1e6:.0f} MB")


def plot(result: dict, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [row for row in result["rows"] if "hot" in row]
    names = list(dict.fromkeys(row["backend"] for row in rows))
    cases = list(dict.fromkeys((row["kind"], *row["shape"]) for row in rows))
    figure, axes = pyplot.subplots(figsize=(2 + 1.4 * len(cases), 4.5), layout="constrained")
    width = 0.8 / len(names)
    for i, name in enumerate(names):
        own = {(row["kind"], *row["shape"]): row for row in rows if row["backend"] == name}
        at = [c + (i - (len(names) - 1) / 2) * width for c, x in enumerate(cases) if x in own]
        height = [1 / own[x]["share_of_roofline"] for x in cases if x in own]
        axes.bar(at, height, width, label=name)
    axes.axhline(1, color="black", linewidth=0.8)
    title = f"{result['machine']['gpu']}, bf16, hot"
    axes.set(yscale="log", ylabel="time / roofline", title=title)
    axes.set_xticks(range(len(cases)), ["\n".join(map(str, x)) for x in cases], fontsize="small")
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=150, help="about how long it may take")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks/results")
    parser.add_argument("--group", choices=("machine", *GROUPS), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.group:
        if args.group == "machine":
            print_line(measure_machine())
            return 0
        return 0 if measure_group(args.group, args.seconds, print_line) else 1
    return run_groups(args.seconds, args.results)


def print_line(row: dict) -> None:
    print(json.dumps(row), flush=True)


def run_groups(seconds: float, folder: Path) -> int:
    """Measures all groups; 1 where something failed that was to run."""
    signal.signal(signal.SIGTERM, lambda *unused: sys.exit("stopped"))  # and with it the child
    end = time.monotonic() + seconds
    machine, failed = start_group("machine", 30)
    if not machine:
        raise SystemExit(f"the GPU could not be measured: {failed}")
    result = {
        "machine": machine[0],
        "versions": versions(),
        "settings": SAMPLING | {"topk": TOPK},
        "failed": {},
        "rows": [],
    }
    for number, group in enumerate(GROUPS):
        share = max((end - time.monotonic()) / (len(GROUPS) - number), 15)
        rows, failed = start_group(group, share)
        rows = [add_roofline(row, result["machine"]) for row in rows]
        result["rows"] += [row for row in rows if "kind" in row]
        if failed:
            result["failed"][group] = next((r["error"] for r in rows if "kind" not in r), failed)
        show([row for row in rows if "kind" in row])
        path = write(result, folder)  # what is there, whatever becomes of the next group
    if any("hot" in row for row in result["rows"]):
        try:
            plot(result, path.with_suffix(".png"))
        except ImportError as error:
            print(f"no plot: {error}")
    print(path, *(f"; {group} failed: {why}" for group, why in result["failed"].items()))
    return 1 if result["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
