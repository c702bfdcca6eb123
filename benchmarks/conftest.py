"""Options, the machine's rates before the first case, the table after the last."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from benchmarks import measure, report
from benchmarks.cases import SWEEPS, default_cases, sweep_cases, tiny
from benchmarks.providers import our_name
from psm_kernels import backends

RESULTS = pytest.StashKey[dict]()


def pytest_addoption(parser):
    group = parser.getgroup("psm_kernels")
    group.addoption("--device", default="auto", help="cpu, cuda; auto: a GPU if there is one")
    group.addoption("--sweep", nargs="+", default=[], choices=SWEEPS, help="instead of the default")
    group.addoption("--budget", type=float, default=6.0, help="seconds of timed rounds a case")
    group.addoption("--tiny", action="store_true", help="does everything run? numbers mean nothing")
    group.addoption(
        "--results", type=Path, default=Path(".benchmarks/latest.json"), help="what is measured"
    )


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config):
    config.option.benchmark_quiet = True  # it would print rounds of all providers as one number
    device = config.option.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    config.option.device = device
    if our_name(device) == "reference":
        raise pytest.UsageError(f"nothing to measure on {device}:\n{backends.describe()}")
    cases = [case for name in config.option.sweep for case in sweep_cases(name)]
    cases = cases or default_cases(device)
    if config.option.tiny:
        cases = [tiny(case) for case in cases]
    config.option.cases = list(dict.fromkeys(cases))


def pytest_generate_tests(metafunc):
    options = metafunc.config.option
    if "case" in metafunc.fixturenames:
        metafunc.parametrize("case", options.cases, ids=str)
    if "cache" in metafunc.fixturenames:
        metafunc.parametrize("cache", ["warm"] if options.device == "cpu" else ["warm", "cold"])


def pytest_collection_finish(session):
    config = session.config
    here = [item for item in session.items if item.path.parent == Path(__file__).parent]
    if not here or config.option.collectonly:
        return
    device = config.option.device
    dtypes = tuple(dict.fromkeys(("fp32", *(case.dtype for case in config.option.cases))))
    config.stash[RESULTS] = {
        "machine": measure.machine(device),
        "ours": our_name(device),
        **measure.provenance(),
        "rates": measure.rates(device, dtypes, 256 if config.option.tiny else None),
        "rows": [],
        "skipped": [],
    }
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    for line in report.headline(config.stash[RESULTS]):
        reporter.write_line(line)


@pytest.fixture
def results(request) -> dict:
    return request.config.stash[RESULTS]


@pytest.fixture
def options(request):
    return request.config.option


def pytest_terminal_summary(terminalreporter, config):
    results = config.stash.get(RESULTS, None)
    if results is None or not (results["rows"] or "training" in results):
        return
    terminalreporter.section("benchmarks")
    for line in (*report.headline(results), "", *report.text(results)):
        terminalreporter.write_line(line)
    path = config.option.results
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1) + "\n")
    terminalreporter.write_line(f"\nwritten: {path}; pictures: python -m benchmarks.report {path}")


def wants_memory(case, options) -> bool:
    """The largest fp32 bank of each operation; of the sweep over K all of them."""
    if case.operation in ("enqueue", "psm_forward") or case.dtype != "fp32":
        return False
    alike = [c for c in options.cases if dataclasses.replace(case, size=c.size) == c]
    same = [c for c in options.cases if (c.operation, c.dtype) == (case.operation, case.dtype)]
    return len(alike) > 2 or case.size == max(c.size for c in same)
