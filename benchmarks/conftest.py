"""Options, the machine's rates before the first case, the table after the last."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch

from benchmarks import machine, measure, report, tables
from benchmarks.cases import SWEEPS, default_cases, sweep_cases, tiny
from benchmarks.providers import our_name
from psm_kernels.backends import registry

RESULTS = pytest.StashKey[dict]()


def pytest_addoption(parser):
    group = parser.getgroup("psm_kernels")
    group.addoption("--device", default="auto", help="cpu, cuda; auto: a GPU if there is one")
    group.addoption(
        "--sweep", nargs="+", default=[], choices=[*SWEEPS, "all"], help="instead of the default"
    )
    group.addoption("--minutes", type=float, default=9.5, help="after that, cases are skipped")
    group.addoption("--budget", type=float, help="seconds of timed rounds a case; 3, in a sweep 1")
    group.addoption("--longest", type=float, default=5.0, help="seconds of a call by a competitor")
    group.addoption(
        "--patience", type=float, default=120.0, help="seconds of its first call, which compiles"
    )
    group.addoption("--tiny", action="store_true", help="does everything run? numbers mean nothing")
    group.addoption(
        "--results", type=Path, default=Path(".benchmarks/latest.json"), help="what is measured"
    )
    group.addoption(
        "--store", action="store_true", help="into benchmarks/results, which the READMEs show"
    )


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config):
    config.option.benchmark_quiet = True  # it would print rounds of all providers as one number
    device = config.option.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    config.option.device = device
    if config.option.budget is None:
        config.option.budget = 0.0 if config.option.tiny else 1.0 if config.option.sweep else 3.0
    config.option.least = 0 if config.option.sweep or config.option.tiny else 5  # rounds of a case
    if config.option.store:
        if config.option.tiny or config.option.keyword or "benchmarks" not in "".join(config.args):
            raise pytest.UsageError("--store: wanted a whole run, pytest benchmarks/ --store")
        run = "sweep" if config.option.sweep else "default"
        config.option.results = report.STORED / machine.name(device) / f"{run}.json"
    measure.keep_memory()
    end = time.monotonic() + 60 * config.option.minutes
    config.option.seconds_left = lambda: end - time.monotonic()
    if our_name(device) == "reference":
        raise pytest.UsageError(f"nothing to measure on {device}:\n{registry.describe()}")
    names = SWEEPS if "all" in config.option.sweep else config.option.sweep
    cases = sweep_cases(names) or default_cases(device)
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
        "machine": machine.machine(device),
        "ours": our_name(device),
        **machine.provenance(),
        "rates": machine.rates(device, dtypes, 256 if config.option.tiny else None),
        "sweep": bool(config.option.sweep),
        "rows": [],
        "skipped": [],
    }
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    for line in tables.headline(config.stash[RESULTS]):
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
    for line in (*tables.headline(results), "", *tables.text(results)):
        terminalreporter.write_line(line)
    path = config.option.results
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1) + "\n")
    terminalreporter.write_line(f"\nwritten: {path}")
    for line in report.pictures(results, path):
        terminalreporter.write_line(line)
