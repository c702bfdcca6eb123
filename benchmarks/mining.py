"""Hard negatives from files, against faiss and against products in slabs:

    python -m benchmarks.mining --store       10,000 x 500,000 x 384, k = 100; needs 2 GB of disk
    python -m benchmarks.mining --scale 10 --rounds 1     a tenth of both sizes: does it run?

Everybody starts from the same two .npy files, normalizes, and has the k best rows of each query in
memory at the end; imports are not counted. Each call is a process of its own, in turns, in a new
order in each round: times are medians. Memory is the peak of resident pages on top of what the
imports take, pages of the files among them. Who finds other rows than the others is left out.
--store keeps the table in benchmarks/results/mining.json, for benchmarks.report.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from benchmarks.machine import machine, provenance
from benchmarks.measure import peak_from_here
from benchmarks.report import STORED
from benchmarks.tables import markdown, megabytes, ratio
from psm_kernels import mine_negatives

DTYPES = ("float32", "float16")
SAME = 0.999  # share of equal rows: near ties may come in another order
_WRITTEN = 50_000  # rows drawn at a time


# --- who does it ---------------------------------------------------------------------------------


def by_ours(queries: np.ndarray, corpus: np.ndarray, k: int) -> np.ndarray:
    return mine_negatives(queries, corpus, k).index.numpy()


def by_faiss(queries: np.ndarray, corpus: np.ndarray, k: int) -> np.ndarray:
    """Its index takes fp32 alone and holds all rows. Added in parts, or they would be there twice,
    and thrice where the file has another type."""
    import faiss

    faiss.omp_set_num_threads(torch.get_num_threads())
    index = faiss.IndexFlatIP(corpus.shape[1])
    for start in range(0, len(corpus), _WRITTEN):
        part = np.array(corpus[start : start + _WRITTEN], np.float32)
        faiss.normalize_L2(part)
        index.add(part)
    queries = np.array(queries, np.float32)
    faiss.normalize_L2(queries)
    return index.search(queries, k)[1]


def by_slabs(queries: np.ndarray, corpus: np.ndarray, k: int) -> np.ndarray:
    """A product into a slab of 256 MB, `torch.topk` of it, and a merge. Of 8 MB, which stay in
    cache, lists are longer for their rows, and it takes three times as long."""
    block, step = 1024, 65_536
    queries = torch.nn.functional.normalize(torch.from_numpy(np.array(queries, np.float32)))
    best = torch.full((len(queries), k), -torch.inf)
    where = torch.full((len(queries), k), -1)
    for start in range(0, len(corpus), step):
        rows = torch.from_numpy(np.array(corpus[start : start + step], np.float32))
        rows = torch.nn.functional.normalize(rows)
        for at in range(0, len(queries), block):
            part = slice(at, at + block)
            found = (queries[part] @ rows.T).topk(min(k, len(rows)), 1)
            both = torch.cat((best[part], found.values), 1).topk(k, 1)
            named = torch.cat((where[part], found.indices + start), 1)
            best[part], where[part] = both.values, named.gather(1, both.indices)
    return where.numpy()


PROVIDERS: dict[str, Callable[[np.ndarray, np.ndarray, int], np.ndarray]] = {
    "ours": by_ours,
    "faiss": by_faiss,
    "slab": by_slabs,
}


# --- a call --------------------------------------------------------------------------------------


def worker(provider: str, folder: Path, k: int) -> None:
    """In the fresh process: what was found into a file, seconds and bytes to stdout."""
    if provider == "faiss":
        import faiss  # noqa: F401  (before the clock)
    run = PROVIDERS[provider]
    few = np.random.default_rng(0).standard_normal((2 * k, 16)).astype(np.float32)
    run(few[:8], few, k)  # loads what is loaded at the first call
    risen, start = peak_from_here(), time.perf_counter()
    queries, corpus = (np.load(folder / f"{n}.npy", mmap_mode="r") for n in ("queries", "corpus"))
    index = run(queries, corpus, k)
    taken = time.perf_counter() - start
    print(json.dumps({"seconds": taken, "memory": risen()}))
    np.save(folder / f"{provider}.npy", np.sort(index, 1))


def call(provider: str, folder: Path, k: int) -> dict[str, float]:
    """Raises RuntimeError with the last line of what it said where it fails."""
    line = [sys.executable, "-m", "benchmarks.mining", "--k", str(k)]
    line += ["--worker", provider, "--folder", str(folder)]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1])
    return json.loads(done.stdout)


# --- all of them ---------------------------------------------------------------------------------


def write(path: Path, rows: int, dim: int, dtype: str, seed: int) -> int:
    """Random rows of different lengths; returns the bytes of the file."""
    rng = np.random.default_rng(seed)
    file = np.lib.format.open_memmap(path, "w+", dtype, (rows, dim))
    for start in range(0, rows, _WRITTEN):
        part = file[start : start + _WRITTEN]
        part[:] = rng.standard_normal(part.shape, np.float32) * rng.uniform(0.5, 2, (len(part), 1))
    file.flush()
    return path.stat().st_size


def measure(folder: Path, k: int, rounds: int) -> tuple[dict[str, dict], dict[str, str]]:
    """(times and memory by provider, why the others are not there)."""
    found: dict[str, list[dict]] = {provider: [] for provider in PROVIDERS}
    failed: dict[str, str] = {}
    turns = random.Random(0)
    for _ in range(rounds):
        for provider in turns.sample(list(found), len(found)):
            try:
                found[provider].append(call(provider, folder, k))
            except RuntimeError as error:
                failed[provider] = str(error)
                del found[provider]
    index = {provider: np.load(folder / f"{provider}.npy") for provider in found}
    for provider in index:
        same = statistics.median(
            float((index[provider] == other).mean()) for other in index.values()
        )
        if same < SAME:
            failed[provider] = f"finds other rows: {same:.2%} are the same"
            del found[provider]
    summary = {
        provider: {
            "median": statistics.median(row["seconds"] for row in rows),
            "memory": max(row["memory"] for row in rows),
        }
        for provider, rows in found.items()
    }
    return summary, failed


HEAD = ["files", "ours, s", "faiss", "slab", *(f"memory, {name}" for name in PROVIDERS)]


def line(dtype: str, size: int, rows: dict[str, dict]) -> list[str]:
    """Ours in seconds, others as times over it; memory with times over the files."""
    ours = rows.get("ours", {}).get("median")
    cells = [f"{dtype}, {megabytes(size)}", "" if ours is None else f"{ours:.1f}"]
    cells += [ratio(rows.get(name, {}).get("median"), ours) for name in PROVIDERS if name != "ours"]
    for name in PROVIDERS:
        memory = rows.get(name, {}).get("memory")
        cells.append("" if memory is None else f"{megabytes(memory)}, {memory / size:.2f}x")
    return cells


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--queries", type=int, default=10_000)
    parser.add_argument("--rows", type=int, default=500_000)
    parser.add_argument("--dim", type=int, default=384)
    parser.add_argument("--k", type=int, default=100)
    parser.add_argument("--dtypes", nargs="+", default=DTYPES, choices=DTYPES)
    parser.add_argument("--scale", type=int, default=1, help="divides queries and rows")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--store", action="store_true", help="keep it in benchmarks/results")
    parser.add_argument("--folder", type=Path, help="where the files are written, for the while")
    parser.add_argument("--worker", choices=PROVIDERS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        return worker(options.worker, options.folder, options.k)
    queries, rows = (max(1, n // options.scale) for n in (options.queries, options.rows))
    print(f"{queries:,} x {rows:,} x {options.dim}, k = {options.k}", file=sys.stderr)
    body, left_out = [], {}
    for dtype in options.dtypes:
        with tempfile.TemporaryDirectory(dir=options.folder) as place:
            folder = Path(place)
            size = write(folder / "queries.npy", queries, options.dim, dtype, 0)
            size += write(folder / "corpus.npy", rows, options.dim, dtype, 1)
            found, left_out[dtype] = measure(folder, options.k, options.rounds)
        body.append(line(dtype, size, found))
    print("\n".join(markdown(HEAD, body)))
    for dtype, reasons in left_out.items():
        for provider, why in reasons.items():
            print(f"{dtype}: {provider} is left out: {why}")
    if options.store:
        shape = {"queries": queries, "rows": rows, "dim": options.dim, "k": options.k}
        tables = {"files": [HEAD, body]}
        kept = {"case": shape, "left_out": left_out, "tables": tables, "machine": machine("cpu")}
        text = json.dumps(kept | provenance(), indent=1)
        (STORED / "mining.json").write_text(f"{text}\n")


if __name__ == "__main__":
    main()
