"""One read of the bank against what a user would write. `pytest benchmarks/test_bank_pass.py -s`.

Variants run in turns within one process and are compared by the ratio of medians: a noisy machine
slows all of them alike. Eager and torch.compile baselines are the reference with torch's own
generator and ties left open; both include the backward that gives the gradient of the queries.
"""

from __future__ import annotations

import gc
import statistics
import time
from pathlib import Path

import pytest
import torch

from psm_kernels.memory_bank import unit_rows
from psm_kernels.ops import bank_pass, bank_topk, cpp, reference

ROUNDS = 9
SETTINGS = {"temperature": 0.5, "selection": "bernoulli", "a": 0.5, "b": 0.0, "topk": 5}


def in_turns(variants: dict, rounds: int = ROUNDS) -> dict[str, float]:
    """Median seconds of each variant; one round is thrown away."""
    times = {name: [] for name in variants}
    for _ in range(rounds + 1):
        for name, run in variants.items():
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values[1:]) for name, values in times.items()}


def report(title: str, times: dict[str, float], ours: str, flops: dict[str, float] | None = None):
    print(f"\n{title}, {torch.get_num_threads()} threads, {cpp.instruction_set()}")
    for name, seconds in times.items():
        rate = f"{flops[name] / seconds / 1e9:8.0f} GF/s" if flops and name in flops else ""
        print(f"  {name:<24}{seconds * 1e3:10.2f} ms {seconds / times[ours]:7.2f}x{rate}")


def problem(batch: int, size: int, dim: int):
    torch.manual_seed(0)
    query, bank = unit_rows(torch.randn(batch, dim)), unit_rows(torch.randn(size, dim))
    return query, unit_rows(query + 0.05 * torch.randn(batch, dim)), bank


def ours(query, key, bank):
    query, s_pos = query.clone().requires_grad_(), (query * key).sum(1)
    rng_state = torch.tensor([1, 2])

    def run():
        query.grad = None
        out = bank_pass(
            query, key, bank, None, s_pos, rng_state=rng_state, backend="cpp", **SETTINGS
        )
        out.neg_lse.sum().backward()

    return run


def naive(query, key, bank, compiled: bool):
    query, s_pos = query.clone().requires_grad_(), (query * key).sum(1)
    count = torch.tensor(bank.shape[0])

    def loss(query):
        # The gradient comes with the pass: neg_mean is what autograd would compute.
        return reference.bank_pass(
            query, key, bank, count, s_pos, *SETTINGS.values(), None, 0, 0,
            noise="torch", exact_ties=False,
        )  # fmt: skip

    loss = torch.compile(loss) if compiled else loss

    def run():
        with torch.no_grad():
            loss(query)

    return run


@pytest.mark.parametrize("size", [4096, 65536])
def test_pass(size):
    query, key, bank = problem(256, size, 128)
    product = 2.0 * 256 * size * 128
    times = in_turns(
        {
            "ours fp32": ours(query, key, bank),
            "ours bf16": ours(query, key, bank.bfloat16()),
            "query @ bank.T": lambda: query @ bank.T,
            "torch.compile": naive(query, key, bank, compiled=True),
            "eager": naive(query, key, bank, compiled=False),
        }
    )
    # Two of the three products of the pass are of the bank's type, mining is a byte product.
    flops = dict.fromkeys(times, 3 * product) | {"query @ bank.T": product}
    report(f"bank_pass B=256 K={size} D=128 k=5 bernoulli", times, "ours fp32", flops)
    assert times["ours fp32"] < times["eager"]


def test_million_slots():
    query, key, bank = problem(256, 1 << 20, 128)
    run, small = ours(query, key, bank), ours(query, key, bank[:65536])
    gc.collect()
    before = _reset_peak()
    run()
    extra = _peak() - before
    times = in_turns({"K=65,536": small, "K=1,048,576": run}, rounds=3)
    report("bank_pass B=256 D=128, a large bank", times, "K=65,536")
    print(f"  extra memory {extra / 2**20:.1f} MiB")
    assert extra < 64e6


def _reset_peak() -> int:
    """Bytes resident now; from here on `_peak` counts. Linux."""
    Path("/proc/self/clear_refs").write_text("5")
    return _peak()


def _peak() -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


@pytest.mark.parametrize("k", [5, 200])
def test_topk_of_features(k):
    """kNN evaluation: 10,000 queries, 50,000 rows of 512."""
    query, _, bank = problem(10_000, 50_000, 512)
    low = bank.bfloat16()

    def torch_topk():  # in parts of 2,000 queries: the whole matrix would take 2 GB
        for part in query.split(2000):
            torch.topk(part @ bank.T, k)

    times = in_turns(
        {
            "ours fp32": lambda: bank_topk(query, bank, k, backend="cpp"),
            "ours bf16": lambda: bank_topk(query, low, k, backend="cpp"),
            "torch.topk(q @ bank.T)": torch_topk,
        },
        rounds=3,
    )
    flops = dict.fromkeys(times, 2.0 * 10_000 * 50_000 * 512)
    report(f"bank_topk 10,000 x 50,000 x 512, k={k}", times, "ours fp32", flops)


def test_topk_against_faiss():
    faiss = pytest.importorskip("faiss")
    query, _, bank = problem(256, 65536, 128)
    low = bank.bfloat16()
    faiss.omp_set_num_threads(torch.get_num_threads())
    index = faiss.IndexFlatIP(128)
    index.add(bank.numpy())
    times = in_turns(
        {
            "ours fp32": lambda: bank_topk(query, bank, 5, backend="cpp"),
            "ours bf16": lambda: bank_topk(query, low, 5, backend="cpp"),
            "faiss IndexFlatIP": lambda: index.search(query.numpy(), 5),
        }
    )
    report("bank_topk B=256 K=65536 D=128 k=5", times, "ours fp32")
