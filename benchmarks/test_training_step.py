"""What share of a training step is the loss? ResNet-18, 256 images of 32 x 32, three banks.

Two clocks in one step: of the whole, and of the loss with the gradient of its queries. On two cores
the rest takes ten seconds, and its noise is more than the loss: the difference of two steps would
say nothing.
"""

from __future__ import annotations

import copy
import functools
import importlib
import statistics
import time
from collections.abc import Callable

import pytest
import torch

from benchmarks.cases import Case, Problem, make_problem
from benchmarks.measure import first_line, give_back_memory
from benchmarks.provider import Run
from benchmarks.providers import PROVIDERS, our_name
from benchmarks.test_operations import attempt

SIZES = (16_384, 65_536, 1_048_576)
NEEDED = ("matplotlib", "numpy", "sklearn", "torchvision", "tqdm")  # by train.py


def make_step(batch: int, edge: int, device: str) -> Callable[[Problem, Run], tuple[float, float]]:
    """The step of train.py: two forwards, the loss, one backward, SGD, the moving mean. Returns
    seconds of all of it and of the loss."""
    import train

    online = train.make_encoder("resnet18", 128).to(device)
    momentum = copy.deepcopy(online)
    optimizer = torch.optim.SGD(online.parameters(), lr=0.01, momentum=0.9)
    images = torch.randn(batch, 3, edge, edge, device=device)

    def now() -> float:
        if device != "cpu":
            torch.cuda.synchronize()
        return time.perf_counter()

    def step(problem: Problem, loss: Run) -> tuple[float, float]:
        start = now()
        with torch.autocast(device, torch.bfloat16, enabled=device != "cpu"):
            query = online(images).float()
            with torch.no_grad():
                key = momentum(images)
        with torch.no_grad():
            problem.query.copy_(query)
            problem.key.copy_(key)
        begin = now()
        loss()
        end = now()
        query.backward(problem.query.grad)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            for slow, fast in zip(momentum.parameters(), online.parameters(), strict=True):
                slow.lerp_(fast, 0.01)
        return now() - start, end - begin

    return step


def take(step, case: Case, provider: str, device: str) -> tuple[float, float]:
    """Medians of the two clocks."""
    problem = make_problem(case, device)
    loss = PROVIDERS[provider].make(problem)
    taken = [step(problem, loss) for _ in range(1 if device == "cpu" else 20)]
    return tuple(statistics.median(times) for times in zip(*taken, strict=True))


def missing() -> str | None:
    """Why train.py cannot be imported, through no fault of its own."""
    for module in NEEDED:
        try:
            importlib.import_module(module)
        except Exception as error:  # OSError of a broken library, RuntimeError of another torch's
            return f"train.py needs {module}: pip install -e '.[bench]' ({first_line(error)})"
    return None


def test_training_step(benchmark, results, options):
    reason = "measured without --sweep" if options.sweep else missing()
    if reason:
        pytest.skip(reason)
    device = options.device
    batch, edge = (8, 16) if options.tiny else (256, 32)
    step = make_step(batch, edge, device)
    rows = []

    def measure(case: Case, provider: str) -> None:
        row = {"size": case.size, "provider": provider}
        row["skipped"] = PROVIDERS[provider].refuse(case, device)
        if options.seconds_left() <= 0:
            row["skipped"] = "the time is over: --minutes"
        if row["skipped"] is None:
            steps = functools.partial(take, step, case, provider, device)
            taken, row["skipped"] = attempt(provider, steps, options.patience)
        if row["skipped"] is None:
            row["step"], row["loss"] = taken
        rows.append(row)
        give_back_memory()

    def everything() -> None:
        measure(Case("psm", batch, 512, 128, 5), our_name(device))  # the encoders warm up
        rows.clear()
        for size in (512,) if options.tiny else SIZES:
            for provider in (our_name(device), "eager"):
                measure(Case("psm", batch, size, 128, 5), provider)

    benchmark.pedantic(everything, rounds=1)
    results["training"] = {"batch": batch, "edge": edge, "rows": rows}
