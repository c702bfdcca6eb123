"""When does dividing the bank pay? A model of time, traffic and memory per step and process.

    python benchmarks/scaling.py                               tables for the machines below
    torchrun --nproc-per-node 2 benchmarks/scaling.py          measure this machine, then compare
                                                               the model with whole calls

The model counts what psm_kernels/bank/sharded.py does in one forward that enqueues:

    products   6 B K D operations: mining, similarity and the mean, whether the bank is divided (all
               R B rows against K / R slots) or not (B rows against K slots)
    reading    the bank once: K D elements, or 1/R of them
    traffic    bytes that leave a process for the other R - 1; K is nowhere in it
    latency    one small exchange of sizes, and four collectives or one

and takes time = max(products, reading) + traffic / link + latency. What it leaves out: the finish,
overlap, and the rest of the training step.
"""

from __future__ import annotations

import dataclasses
import os
import statistics
import sys
import time

import torch
import torch.distributed as dist

GB = 1e9


@dataclasses.dataclass(frozen=True)
class Machine:
    """One process's share. `source` says which numbers were measured and which are assumed."""

    name: str
    operations: float  # per second, of the whole fused pass
    reading: float  # bytes per second
    link: float  # bytes per second out of one process
    latency: float  # seconds per collective
    memory: float  # bytes that the bank may take
    source: str


H100_NVLINK = Machine(
    "H100, 8 in a node",
    operations=800e12 / 3,
    reading=3.0e12,
    link=300 * GB,
    latency=20e-6,
    memory=40 * GB,
    source="800 TFLOP/s bf16 and 3.0 TB/s measured elsewhere on one H100 (design notes); that the "
    "pass reaches a third of the products' rate, link, latency, memory: ASSUMED",
)
H100_NETWORK = dataclasses.replace(
    H100_NVLINK,
    name="H100, many nodes",
    link=40 * GB,
    latency=60e-6,
    source="as above with 400 Gbit/s per GPU, ASSUMED",
)


@dataclasses.dataclass(frozen=True)
class Step:
    products: float  # seconds
    reading: float
    traffic: float
    latency: float
    sent: int  # bytes
    bank: float  # bytes

    @property
    def seconds(self) -> float:
        return max(self.products, self.reading) + self.traffic + self.latency


def sent_bytes(
    world: int, batch: int, dim: int, topk: int, itemsize: int, sharded: bool, key_size: int = 4
) -> int:
    """Bytes that one process sends in a forward that enqueues; `tests/test_collectives.py` counts
    the same for a call that does not."""
    to_each = batch * dim * key_size  # the enqueue: keys
    if sharded:
        to_each += batch * (dim * itemsize * (2 if topk else 1) + 4)  # query, key, s_pos
        to_each += batch * (4 * dim + 12 + 12 * topk)  # partial results
        to_each += batch * topk * (8 + 8 + dim * itemsize)  # mined slots, twice; their rows, back
    return (world - 1) * to_each


def step(
    machine: Machine,
    world: int,
    batch: int,
    size: int,
    dim: int,
    *,
    sharded: bool,
    topk: int = 5,
    itemsize: int = 2,
) -> Step:
    """One forward with `batch` rows on each of `world` processes and `size` slots in all."""
    held = size / world if sharded else size
    rows = batch * world if sharded else batch
    sent = sent_bytes(world, batch, dim, topk, itemsize, sharded)
    collectives = (1 + (5 if topk else 3) if sharded else 2) if world > 1 else 0
    return Step(
        products=(6 if topk else 4) * rows * held * dim / machine.operations,
        reading=held * dim * itemsize / machine.reading,
        traffic=sent / machine.link,
        latency=collectives * machine.latency,
        sent=sent,
        bank=held * dim * itemsize,
    )


def table(machine: Machine, batch: int, dim: int, worlds, sizes) -> None:
    print(f"\n{machine.name}: B = {batch} rows a process, D = {dim}, bfloat16 bank, topk = 5")
    print(f"  {machine.source}")
    print(f"{'':26}{'--- replicated ---':>24}{'------ sharded ------':>30}")
    head = ("slots K", "processes", "bank GB", "ms", "bank GB", "ms", "sent MB", "better")
    print("{:>14}{:>12}{:>12}{:>12}{:>10}{:>10}{:>10}{:>12}".format(*head))
    for size in sizes:
        for world in worlds:
            a, b = (
                step(machine, world, batch, size, dim, sharded=sharded) for sharded in (False, True)
            )
            if b.bank > machine.memory:
                best = "does not fit"
            else:
                best = (
                    "sharded" if a.bank > machine.memory or b.seconds < a.seconds else "replicated"
                )
            print(
                f"{size:14,}{world:12}{a.bank / GB:12.2f}{1e3 * a.seconds:12.3f}"
                f"{b.bank / GB:10.2f}{1e3 * b.seconds:10.3f}{b.sent / 1e6:10.1f}  {best:>12}"
            )


# --- this machine --------------------------------------------------------------------------------


TINY = "--tiny" in sys.argv  # does it run?


def median_seconds(call) -> float:
    """Median over repeats of the slowest process, after two calls to warm up."""
    times = []
    for i in range(2 + (1 if TINY else 15)):
        dist.barrier()
        begin = time.perf_counter()
        call()
        elapsed = torch.tensor(time.perf_counter() - begin)
        dist.all_reduce(elapsed, dist.ReduceOp.MAX)
        if i >= 2:
            times.append(elapsed.item())
    return statistics.median(times)


def measure(batch: int, dim: int) -> Machine:
    from psm_kernels.ops import bank_pass

    def sweep(rows: int, size: int, topk: int = 5) -> float:
        query = torch.nn.functional.normalize(torch.randn(rows, dim))
        bank = torch.nn.functional.normalize(torch.randn(size, dim))
        options = {"temperature": 0.2, "selection": "bernoulli", "topk": topk}
        options["rng_state"] = torch.tensor([0, 0])
        s_pos = torch.ones(rows)
        return median_seconds(lambda: bank_pass(query, query, bank, None, s_pos, **options))

    def gather(count: int) -> float:
        mine = torch.zeros(count, dtype=torch.uint8)
        everyone = torch.zeros(count * dist.get_world_size(), dtype=torch.uint8)
        return median_seconds(lambda: dist.all_gather_into_tensor(everyone, mine))

    small, big = 1 << 12, 1 << 15  # slots; the difference frees the rate from fixed costs
    operations = 6 * batch * (big - small) * dim / (sweep(batch, big) - sweep(batch, small))
    one = torch.zeros(1 << 25)
    reading = one.numel() * one.element_size() / median_seconds(one.sum)
    latency, few, many = gather(64), 1 << 16, 1 << 22
    others = dist.get_world_size() - 1
    link = others * (many - few) / (gather(many) - gather(few))
    threads = torch.get_num_threads()
    return Machine(
        f"this machine, {dist.get_world_size()} gloo processes, {threads} threads each",
        operations,
        reading,
        link,
        latency,
        4 * GB,
        f"MEASURED: {operations / GB:.1f} GFLOP/s in the pass, {reading / GB:.1f} GB/s, "
        f"link {link / GB:.2f} GB/s, latency {1e6 * latency:.0f} us",
    )


def compare(machine: Machine, batch: int, dim: int, sizes) -> None:
    """Whole calls of the module, forward and enqueue, against the model."""
    from psm_kernels import PSMLoss

    rank, world = dist.get_rank(), dist.get_world_size()
    if rank == 0:
        print(f"\n{machine.name}: B = {batch}, D = {dim}, float32 bank\n  {machine.source}")
        print(f"{'slots K':>12}{'bank':>12}{'model ms':>12}{'measured ms':>14}")
    for size in sizes:
        for flag in ("gather_distributed", "shard_bank"):
            criterion = PSMLoss(0.2, (size, dim), **{flag: True})
            query, key = torch.randn(batch, dim), torch.randn(batch, dim)
            criterion.memory_bank.enqueue(torch.randn(size, dim))
            criterion.memory_bank.count.fill_(size)
            measured = median_seconds(lambda c=criterion, q=query, k=key: c(q, k))
            sharded = flag == "shard_bank"
            model = step(machine, world, batch, size, dim, sharded=sharded, itemsize=4)
            if rank == 0:
                kind = "sharded" if sharded else "replicated"
                print(
                    f"{size:12,}{kind:>12}{1e3 * model.seconds:12.2f}{1e3 * measured:14.2f}",
                    flush=True,
                )


def main() -> None:
    if "WORLD_SIZE" in os.environ:
        dist.init_process_group("gloo")
        torch.manual_seed(dist.get_rank())
        machine = measure(64, 128)
        compare(machine, 64, 128, (4096,) if TINY else (4096, 16384, 65536))
        dist.destroy_process_group()
        return
    table(H100_NVLINK, 256, 128, (2, 8), (1 << 16, 1 << 20, 1 << 24, 1 << 28))
    table(H100_NVLINK, 32, 128, (8,), (1 << 16, 1 << 20, 1 << 24))
    table(H100_NETWORK, 4, 128, (64,), (1 << 20, 1 << 24, 1 << 26))  # a whole batch of 256
    table(H100_NETWORK, 256, 128, (16, 64, 256), (1 << 20, 1 << 26, 10**9))
    table(H100_NETWORK, 32, 128, (64, 256), (1 << 20, 1 << 26, 10**9))


if __name__ == "__main__":
    main()
