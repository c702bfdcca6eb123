"""What becomes of the times of gpu.py: shares of the roofline, a file, lines, a picture."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
import subprocess
from pathlib import Path

import torch

from benchmarks.cases import Case

ROOT = Path(__file__).parents[1]
TARGETS = {  # us, graph-captured, on an H100
    ("psm", 256, 65_536, 128): 40,
    ("psm", 256, 1 << 20, 128): 470,
    ("psm", 1_024, 65_536, 256): 215,
    ("psm", 4_096, 262_144, 256): 3_200,
}


def add_roofline(row: dict, machine: dict) -> dict:
    """The least time for the products or for one reading of the bank, whichever is more."""
    if "hot" not in row:
        return row
    case = Case(row["kind"], *row["shape"], row["dtype"])
    roofline = max(case.flops / machine["flops"], case.traffic / machine["bytes_per_s"]) * 1e6
    return row | {"roofline_us": roofline, "share_of_roofline": roofline / row["hot"]["us"]}


def versions() -> dict:
    found = {"torch": torch.__version__, "cuda": torch.version.cuda}
    found["python"] = platform.python_version()
    for name, command in {
        "driver": ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "-i", "0"],
        "nvcc": ["nvcc", "--version"],
        "commit": ["git", "-C", str(ROOT), "describe", "--always", "--abbrev=40", "--dirty"],
    }.items():
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            found[name] = done.stdout.strip().rpartition("\n")[2]
        except (OSError, subprocess.CalledProcessError):
            found[name] = None
    found["commit"] = found["commit"] or os.environ.get("PSM_COMMIT")
    try:
        found["triton"] = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        found["triton"] = None
    return found


def write(result: dict, folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    name = re.sub(r"[^A-Za-z0-9]+", "_", result["machine"]["gpu"]).strip("_")
    path = folder / f"{name}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    return path


def show(rows: list[dict]) -> None:
    for row in rows:
        where = f"{row['kind']:<9} {'x'.join(map(str, row['shape'])):<20} {row['backend']:<20}"
        if "hot" not in row:
            print(f"{where} {row['error']}")
            continue
        hot, cold = row["hot"], row["cold"]
        text = f"{hot['us']:>10.1f} us [{hot['q10']:.1f}, {hot['q90']:.1f}], cold {cold['us']:.1f}"
        share = f"{row['share_of_roofline']:.0%} of {row['roofline_us']:.1f} us"
        target = TARGETS.get((row["kind"], *row["shape"][:3]))
        target = f" (target {target})" if target else ""
        print(f"{where} {text}; {share}{target}; {row['peak_bytes'] / 1e6:.0f} MB")


def plot(result: dict, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [row for row in result["rows"] if "hot" in row]
    names = list(dict.fromkeys(row["backend"] for row in rows))
    cases = list(dict.fromkeys((row["kind"], *row["shape"]) for row in rows))
    figure, axes = pyplot.subplots(figsize=(2 + 1.4 * len(cases), 4.5), layout="constrained")
    width = 0.8 / len(names)
    for i, name in enumerate(names):
        own = {(row["kind"], *row["shape"]): row for row in rows if row["backend"] == name}
        at = [c + (i - (len(names) - 1) / 2) * width for c, x in enumerate(cases) if x in own]
        height = [1 / own[x]["share_of_roofline"] for x in cases if x in own]
        axes.bar(at, height, width, label=name)
    axes.axhline(1, color="black", linewidth=0.8)
    title = f"{result['machine']['gpu']}, bf16, hot"
    axes.set(yscale="log", ylabel="time / roofline", title=title)
    axes.set_xticks(range(len(cases)), ["\n".join(map(str, x)) for x in cases], fontsize="small")
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
