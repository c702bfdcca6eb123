"""Shared by all tests: golden cases, random problems, the backends that can run here."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from psm_kernels.backends import registry
from psm_kernels.rows import unit_rows


@pytest.fixture(autouse=True)
def _each_test_compiles_for_itself():
    """Else the eighth test that compiles a forward meets the limit of recompilations."""
    yield
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()


pytest.register_assert_rewrite("ranks")
GOLDEN = sorted(Path(__file__).parent.glob("golden/*.npz"))


class Golden:
    """One float64 case of an independent program; fields as in the npz, `p` the parameters."""

    def __init__(self, path: Path):
        data = np.load(path)
        self.p = json.loads(str(data["params"]))
        for name in data.files:
            value = data[name]
            if name == "words":
                value = value.astype(np.int64)
            if name != "params":
                setattr(self, name, torch.as_tensor(value))

    @property
    def rng_state(self) -> torch.Tensor:
        return torch.tensor([self.p["seed"], self.p["offset"]])


@pytest.fixture(params=GOLDEN, ids=lambda path: path.stem)
def golden(request) -> Golden:
    return Golden(request.param)


def _able(name: str) -> bool:
    try:
        registry.choose(name, torch.zeros(1, 8))
    except ValueError:
        return False
    return True


@pytest.fixture(params=[name for name in registry.TABLE if _able(name)])
def backend(request) -> str:
    return request.param


def problem(batch=5, size=70, dim=20, *, seed=0, dtype=torch.float32, few_bits=False):
    """Unit query, key (fp32), bank (dtype), s_pos. `few_bits`: entries +-1/sqrt(dim), dim a
    power of 4, so that every product is exact in any dtype and order."""
    g = torch.Generator().manual_seed(seed)
    if few_bits:
        query, key, bank = (
            (torch.randint(0, 2, (n, dim), generator=g) * 2.0 - 1) / dim**0.5
            for n in (batch, batch, size)
        )
    else:
        query, key, bank = (
            unit_rows(torch.randn(n, dim, generator=g)) for n in (batch, batch, size)
        )
    return query, key, bank.to(dtype), (query * key).sum(1)


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """The pool of a file of tests, made again after a test that killed it."""
    from ranks import Pool, started

    pools = []

    def get():
        if not pools or not all(p.is_alive() for p in pools[-1].processes):
            pools.append(Pool(4, tmp_path_factory.mktemp("pool")))
            pools[-1].outcomes(started, 4, timeout=90)  # importing torch, on a busy machine
        return pools[-1]

    yield get
    for pool in pools:
        pool.close()


@pytest.fixture
def pool(shared):
    return shared()


@pytest.fixture
def gpu(monkeypatch):
    """A GPU that is not there: the cuda backend's launches run on the CPU (tests/ptx)."""
    from ptx import runtime

    if reason := runtime.unavailable():
        pytest.skip(reason)
    return runtime.Gpu(monkeypatch)
