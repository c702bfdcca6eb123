"""The machine: its name, what it can do at best, and what was run on it."""

from __future__ import annotations

import datetime
import functools
import importlib.metadata
import os
import platform
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.cases import DTYPES
from benchmarks.measure import seconds

ROOT = Path(__file__).resolve().parent.parent
PEERS = ("lightly", "pytorch-metric-learning", "liger-kernel", "faiss-cpu", "open_clip_torch")

# Virtual machines hide the number of a chip, and not these: vendor, family, models.
CORES = (
    ("AuthenticAMD", 23, range(0x00, 0x30), "zen"),
    ("AuthenticAMD", 23, range(0x30, 0x100), "zen2"),
    ("AuthenticAMD", 25, (*range(0x00, 0x10), *range(0x20, 0x60)), "zen3"),
    ("AuthenticAMD", 25, (*range(0x10, 0x20), *range(0x60, 0x100)), "zen4"),
    ("AuthenticAMD", 26, range(0x100), "zen5"),
    ("GenuineIntel", 6, (0x4F, 0x56), "broadwell"),
    ("GenuineIntel", 6, (0x55,), "skylake"),  # Cascade Lake and Cooper Lake have its number too
    ("GenuineIntel", 6, (0x6A, 0x6C), "icelake"),
    ("GenuineIntel", 6, (0x8F,), "sapphire-rapids"),
    ("GenuineIntel", 6, (0xCF,), "emerald-rapids"),
    ("GenuineIntel", 6, (0xAD, 0xAE), "granite-rapids"),
)


def chip() -> str:
    """Of the processor, such as amd-epyc-zen4: what names results and the guard's entries."""
    fields = _cpu_fields()
    vendor = fields.get("vendor_id", "")
    if not vendor:  # no x86, or no Linux
        return _slug(platform.processor() or platform.machine())
    maker = {"AuthenticAMD": "amd", "GenuineIntel": "intel"}.get(vendor, vendor)
    family, model = (int(fields.get(name, 0)) for name in ("cpu family", "model"))
    lines = re.findall(r"EPYC|Ryzen|Xeon|Core", fields.get("model name", ""))[:1]
    core = f"family {family} model {model}"
    for *kind, models, name in CORES:
        if kind == [vendor, family] and model in models:
            core = name
    return _slug(" ".join((maker, *lines, core)))


def name(device: str) -> str:
    """The folder of its results."""
    if device != "cpu":
        return _slug(torch.cuda.get_device_name())
    return f"{chip()}-{os.cpu_count()}-cores"


def _slug(words: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", words.lower()).strip("-")


def _cpu_fields() -> dict[str, str]:
    """Of the first core."""
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    except OSError:
        return {}
    pairs = (line.partition(":") for line in lines)
    return {name.strip(): value.strip() for name, _, value in pairs}


def rates(device: str, dtypes: tuple[str, ...], edge: int | None = None) -> dict[str, float]:
    """The roofline: operations a second of a large product of each type, bytes a second of a copy
    (read and written). Best of several: the machine, not its disturbances."""
    edge = edge or (2048 if device == "cpu" else 8192)
    found = {}
    for name in dtypes:
        left, right = (torch.randn(edge, edge, device=device).to(DTYPES[name]) for _ in range(2))
        found[name] = 2 * edge**3 / _best(functools.partial(torch.mm, left, right), device)
    source = torch.zeros(edge * edge * 16, device=device)  # 268 MB on a CPU: larger than a cache
    target = torch.empty_like(source)
    copied = 2 * source.numel() * source.element_size()
    found["copy"] = copied / _best(lambda: target.copy_(source), device)
    return found


def _best(run: Callable[[], object], device: str) -> float:
    run()
    return min(seconds(run, device) for _ in range(7))


def machine(device: str) -> dict:
    """What a reader must know of the machine; nothing that names its owner."""
    from psm_kernels.backends import cpp

    about = {
        "device": device,
        "name": name(device),
        "cpu": _cpu_fields().get("model name") or platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "instructions": cpp.instruction_set() if not cpp.Cpp().unavailable() else "no C++ backend",
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9),
    }
    if device != "cpu":
        about["gpu"] = torch.cuda.get_device_name()
    return about


def provenance() -> dict:
    import psm_kernels

    versions = {"python": platform.python_version(), "psm_kernels": psm_kernels.__version__}
    for package in ("torch", "triton", "torchvision", *PEERS):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
        "commit": _git("rev-parse", "--short=12", "HEAD"),
        "changed": bool(_git("status", "--porcelain", "--untracked-files=no")),
        "versions": versions,
    }


def _git(*words: str) -> str | None:
    done = subprocess.run(["git", *words], capture_output=True, text=True, cwd=ROOT)
    return done.stdout.strip() if done.returncode == 0 else None
