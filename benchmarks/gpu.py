"""Times the bank pass on this GPU: backends, eager torch and torch.compile, against a roofline.

    python benchmarks/gpu.py [--seconds 150]

writes benchmarks/results/<gpu name>.json and .png. Training rows are forward and query gradient;
the library's own backends are replayed from a CUDA graph. "hot" repeats on one bank, which the L2
cache may hold; "cold" overwrites the cache before every run.
"""

from __future__ import annotations

import argparse
import functools
import json
import platform
import re
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import torch

from psm_kernels import backends
from psm_kernels.memory_bank import unit_rows
from psm_kernels.ops import bank_pass, bank_topk, reference

RESULTS = Path(__file__).parent / "results"
TRAINING = [  # B, K, D
    (256, 65_536, 128),
    (256, 1_048_576, 128),
    (1024, 65_536, 256),
    (4096, 262_144, 256),
    (256, 16_777_216, 128),
]
TOPK = [(10_000, 50_000, 512, 5), (10_000, 50_000, 512, 200)]  # B, K, D, k
SETTINGS = {"temperature": 0.1, "selection": "bernoulli", "a": 0.5, "b": 0.0, "topk": 5}


def timed(run: Callable[[], object], seconds: float, flush: torch.Tensor | None) -> dict:
    """Median and quantiles of device time in microseconds."""
    times, stop = [], time.perf_counter() + seconds
    for _ in range(3):
        run()
    torch.cuda.synchronize()
    while len(times) < 10 or (time.perf_counter() < stop and len(times) < 1000):
        if flush is not None:
            flush.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3)
        if time.perf_counter() > stop and len(times) >= 3:
            break
    cuts = statistics.quantiles(times, n=10) if len(times) > 1 else times * 9
    return {"us": statistics.median(times), "q10": cuts[0], "q90": cuts[8], "runs": len(times)}


def captured(run: Callable[[], object]) -> Callable[[], None]:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def ceilings() -> dict:
    """What this card does at best: a large bf16 product and a large copy."""
    a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    product = timed(lambda: a @ a, 1.0, None)["us"]
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    copy = timed(lambda: target.copy_(source), 1.0, None)["us"]
    return {"flops": 2 * 8192**3 / (product * 1e-6), "bytes_per_s": 2 * (1 << 30) / (copy * 1e-6)}


def training_runs(batch: int, size: int, dim: int) -> dict[str, Callable]:
    """What is compared: name -> (one step, may be captured)."""
    query = unit_rows(torch.randn(batch, dim, device="cuda")).requires_grad_()
    key = unit_rows(torch.randn(batch, dim, device="cuda"))
    bank = torch.empty(size, dim, dtype=torch.bfloat16, device="cuda")
    for part in bank.split(1 << 20):
        part.copy_(unit_rows(torch.randn(part.shape, device="cuda")))
    s_pos = (query * key).sum(1).detach()
    rng_state = torch.tensor([1, 2], device="cuda")
    count = torch.tensor(size, device="cuda")

    def step(backend):
        out = bank_pass(
            query, key, bank, count, s_pos, **SETTINGS, rng_state=rng_state, backend=backend
        )
        return torch.autograd.grad(out.neg_lse.sum(), query)

    settings = {k: v for k, v in SETTINGS.items() if k != "topk"}
    low = query.detach().bfloat16(), key.bfloat16(), bank, count, s_pos, *settings.values()

    def eager(run=reference.bank_pass):
        return run(*low, 5, rng_state, 0, 0, noise="torch", exact_ties=False)

    runs = {
        name: (functools.partial(step, name), True)
        for name in ("cuda", "triton")
        if not isinstance(backends.load(name), str)
    }
    if "cuda" in runs:
        from psm_kernels.ops import cuda

        direct = functools.partial(cuda.bank_pass, *low, 5, rng_state, 0, 0)
        runs["cuda null epilogue"] = functools.partial(direct, null_epilogue=True), True
        if torch.cuda.get_device_capability()[0] == 9:
            runs["cuda sm_80 kernels"] = functools.partial(direct, force_sm80=True), True
    runs["eager"] = eager, False
    compiled = torch.compile(reference.bank_pass, dynamic=False)
    runs["torch.compile"] = functools.partial(eager, compiled), False
    return runs


def topk_runs(batch: int, size: int, dim: int, k: int) -> dict[str, Callable]:
    query, bank = (unit_rows(torch.randn(n, dim, device="cuda")).bfloat16() for n in (batch, size))
    count = torch.tensor(size, device="cuda")
    runs = {
        name: (functools.partial(bank_topk, query, bank, k, count=count, backend=name), True)
        for name in ("cuda", "triton")
        if not isinstance(backends.load(name), str)
    }
    runs["torch.topk"] = lambda: (query @ bank.T).topk(k), False
    return runs


def measure(kind, shape, runs, products, limits, seconds, flush) -> list[dict]:
    batch, size, dim = shape[:3]
    work = products * 2 * batch * size * dim / limits["flops"]
    read = size * dim * 2 / limits["bytes_per_s"]
    roofline = max(work, read) * 1e6
    rows = []
    for name, (run, capture) in runs.items():
        row = {"kind": kind, "shape": list(shape), "dtype": "bfloat16", "backend": name}
        row |= {"roofline_us": roofline}
        try:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            run()
            torch.cuda.synchronize()
            row["peak_bytes"] = torch.cuda.max_memory_allocated() - before
            replay = captured(run) if capture else run
            row["graph"] = capture
            row["hot"] = timed(replay, seconds, None)
            row["cold"] = timed(replay, seconds, flush)
            row["share_of_roofline"] = roofline / row["hot"]["us"]
        except (torch.cuda.OutOfMemoryError, ValueError) as error:
            row["error"] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
        rows.append(row)
        shown = row.get("error") or f"{row['hot']['us']:.1f} us, cold {row['cold']['us']:.1f} us"
        print(f"{kind} {shape} {name}: {shown}; roofline {roofline:.1f} us", flush=True)
    return rows


def plot(result: dict, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [row for row in result["rows"] if "hot" in row]
    names = list(dict.fromkeys(row["backend"] for row in rows))
    shapes = list(dict.fromkeys(tuple(row["shape"]) for row in rows))
    figure, axes = pyplot.subplots(figsize=(2 + 1.6 * len(shapes), 4.5), layout="constrained")
    for i, name in enumerate(names):
        own = {tuple(row["shape"]): row for row in rows if row["backend"] == name}
        at = [s + (i - len(names) / 2) * 0.8 / len(names) for s, x in enumerate(shapes) if x in own]
        height = [own[x]["hot"]["us"] / own[x]["roofline_us"] for x in shapes if x in own]
        axes.bar(at, height, 0.8 / len(names), label=name)
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set(yscale="log", ylabel="time / roofline", title=f"{result['gpu']}, bf16")
    axes.set_xticks(range(len(shapes)), ["\n".join(map(str, x)) for x in shapes])
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=150, help="about how long to measure")
    seconds = parser.parse_args().seconds
    if not torch.cuda.is_available():
        raise SystemExit("no CUDA device")
    git = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True)
    gpu = torch.cuda.get_device_properties(0)
    result = {
        "gpu": gpu.name,
        "capability": f"{gpu.major}.{gpu.minor}",
        "multiprocessors": gpu.multi_processor_count,
        "versions": {
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "python": platform.python_version(),
        },
        "commit": git.stdout.strip() or None,
        "settings": SETTINGS,
        "ceilings": ceilings(),
        "rows": [],
    }
    flush = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
    share = seconds / (len(TRAINING) + len(TOPK)) / 12
    cases = [("training", shape, training_runs, 3) for shape in TRAINING]
    cases += [("topk", shape, topk_runs, 1) for shape in TOPK]
    for kind, shape, runs, products in cases:
        try:
            made = runs(*shape)
        except torch.cuda.OutOfMemoryError:
            print(f"{kind} {shape}: inputs do not fit this card")
            continue
        result["rows"] += measure(kind, shape, made, products, result["ceilings"], share, flush)
        del made
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{re.sub(r'[^A-Za-z0-9]+', '_', gpu.name).strip('_')}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    plot(result, path.with_suffix(".png"))
    print(path)


if __name__ == "__main__":
    main()
