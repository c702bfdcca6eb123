"""Functions that run on 1, 2 and 4 gloo processes, and what one process has of the same.

A pool of four processes serves a file: starting them takes longer than most tests. World sizes
below four are groups of its first ranks. Functions whose first argument is `at` run there.
"""

import multiprocessing
import queue
import time
from datetime import timedelta
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import nn

from psm_kernels import PSMLoss

DIM, BATCH = 12, 8  # columns; rows of all ranks together
WORLDS = (1, 2, 4)


class At(NamedTuple):
    """Where a function of the pool runs."""

    rank: int
    world: int
    group: object  # None: the default group, of all four

    def own(self, x):
        """This rank's part of a batch."""
        return x.chunk(self.world)[self.rank]


# --- the pool ------------------------------------------------------------------------------------


def serve(rank, size, store, tasks, results):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=20),
    )
    groups = {world: dist.new_group(list(range(world))) for world in range(1, size)}
    groups[size] = None
    while (task := tasks.get()) is not None:
        function, world, args = task
        try:
            result = function(At(rank, world, groups[world]), *args)
            results.put((rank, None, result))
        except Exception as error:
            results.put((rank, f"{type(error).__name__}: {error}", None))
    dist.destroy_process_group()


class Pool:
    def __init__(self, size, folder):
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch", "psm_kernels"])
        self.results = context.Queue()
        self.tasks = [context.Queue() for _ in range(size)]
        store = folder / f"store{time.monotonic_ns()}"
        self.processes = [
            context.Process(target=serve, args=(rank, size, store, task, self.results), daemon=True)
            for rank, task in enumerate(self.tasks)
        ]
        for process in self.processes:
            process.start()

    def outcomes(self, function, world, *args, answers=None, timeout=120):
        """(error or None, result) of each rank; a rank that does not answer fails the test."""
        for task in self.tasks[:world]:
            task.put((function, world, args))
        found, limit = {}, time.monotonic() + timeout
        try:
            for _ in range(world if answers is None else answers):
                rank, error, result = self.results.get(timeout=max(0.1, limit - time.monotonic()))
                found[rank] = (error, result)
        except queue.Empty:
            self.close()
            pytest.fail(f"no answer within {timeout} s from other ranks than {sorted(found)}")
        return [found[rank] for rank in sorted(found)]

    def run(self, function, world, *args):
        """Each rank's result."""
        outcomes = self.outcomes(function, world, *args)
        assert [error for error, _ in outcomes] == [None] * world
        return [result for _, result in outcomes]

    def refused(self, function, world, *args):
        """Each rank's error."""
        errors = [error for error, _ in self.outcomes(function, world, *args)]
        assert None not in errors
        return errors

    def close(self):
        for process in self.processes:
            process.kill()
            process.join()


def started(at):
    return at.rank


# --- data ----------------------------------------------------------------------------------------


def unit(rows, seed, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, DIM, generator=generator, dtype=torch.float64)
    return nn.functional.normalize(x).to(dtype)


def few_bits(rows, seed):
    """Rows with four entries +-1/2: unit length, products exact in any order and dtype."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.zeros(rows, DIM)
    where = torch.rand(rows, DIM, generator=generator).argsort(1)[:, :4]
    signs = torch.randint(0, 2, (rows, 4), generator=generator) - 0.5
    return x.scatter_(1, where, signs)


def filled(count, size, **settings):
    """A loss in one process with `count` of `size` slots filled, and the state to load."""
    criterion = PSMLoss(0.2, (size, DIM), bank_dtype=torch.float64, **settings)
    if count:
        criterion.enqueue(unit(count, seed=7), torch.arange(count) % 3)
    criterion.rng_state.copy_(torch.tensor([5, 11]))
    return criterion


def whole_batch():
    query, key, projection = (unit(BATCH, seed) for seed in (1, 2, 3))
    return query, key, projection, torch.arange(BATCH) % 3


def step(criterion, query, key, projection, labels):
    """Row losses, the gradient of their mean, and statistics, after which keys are enqueued."""
    query = query.clone().requires_grad_()
    projection = projection.clone().requires_grad_()
    out = criterion(query, key, projection=projection, labels=labels, return_stats=True)
    out.loss.mean().backward()
    stats = out.stats
    return {
        "loss": out.loss.detach(),
        "query grad": query.grad,
        "projection grad": torch.zeros_like(query) if projection.grad is None else projection.grad,
        "kept_count": stats.kept_count,
        "grad_mean": stats.grad_mean,
        "contrast_acc": stats.contrast_acc[None],
        "bank_age": stats.bank_age[None],
    }


def joined(results, world):
    """Results of all ranks as one process would give them: gradients of the mean are averaged."""
    whole = {name: torch.cat([r[name] for r in results]) for name in results[0]}
    for name in ("query grad", "projection grad"):
        whole[name] = whole[name] / world
    for name in ("contrast_acc", "bank_age"):
        whole[name] = whole[name].mean(0, keepdim=True)
    return whole
