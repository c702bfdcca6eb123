"""What share of a training step is the loss? ResNet-18, 256 images of 32 x 32, three banks.

The encoders take over ten seconds a step on two cores, and the loss does not change them: they are
timed once, the loss by itself with each bank, and the step is their sum.
"""

from __future__ import annotations

import copy
import sys

import pytest
import torch

from benchmarks.cases import Case, make_problem
from benchmarks.measure import ROOT, Turns
from benchmarks.providers import PROVIDERS, our_name

SIZES = (16_384, 65_536, 1_048_576)


def encoder_step(batch: int, edge: int, device: str):
    """The step of train.py without its loss: two forwards, one backward, SGD, the moving mean."""
    pytest.importorskip("torchvision")
    sys.path.insert(0, str(ROOT))
    train = pytest.importorskip("train")
    online = train.make_encoder(train.Settings(data="cifar10")).to(device)
    momentum = copy.deepcopy(online)
    optimizer = torch.optim.SGD(online.parameters(), lr=0.01, momentum=0.9)
    images = torch.randn(batch, 3, edge, edge, device=device)

    def run():
        with torch.autocast(device, torch.bfloat16, enabled=device != "cpu"):
            query = online(images)
            with torch.no_grad():
                momentum(images)
        query.float().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            for slow, fast in zip(momentum.parameters(), online.parameters(), strict=True):
                slow.lerp_(fast, 0.01)

    return run


def test_training_step(benchmark, results, options):
    batch, edge = (8, 16) if options.tiny else (256, 32)
    device, sizes = options.device, (512,) if options.tiny else SIZES
    encoders = Turns({"encoders": encoder_step(batch, edge, device)}, device)
    encoder_step(8, edge, device)()  # loads what a first call loads
    benchmark.pedantic(encoders, rounds=1 if options.tiny else 3, iterations=1)
    found = {"batch": batch, "edge": edge, "losses": []} | encoders.summary()

    for size in sizes:
        case = Case("psm", batch, size, 128, 5)
        problem = make_problem(case, device)
        for name in (our_name(device), "eager"):
            row = {"size": size, "provider": name}
            row["skipped"] = PROVIDERS[name].refuse(case, device)
            if row["skipped"] is None:
                turns = Turns({name: PROVIDERS[name].make(problem)}, device)
                turns()
                for _ in range(turns.rounds(options.budget / 4, least=0, most=9)):
                    turns()
                row |= turns.summary()[name]
            found["losses"].append(row)
    results["training"] = found
