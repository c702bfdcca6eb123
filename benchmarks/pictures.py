"""Pictures of results, as SVG: time and memory against K, B, D and k, and ratios."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from matplotlib import rcParams
from matplotlib.figure import Figure  # no pyplot: the user's backend stays as it is
from matplotlib.ticker import FuncFormatter

from benchmarks.cases import PRODUCTS, Case
from benchmarks.tables import cases

COLORS = {
    "eager": "#c0433c",
    "compile": "#d97b29",
    "slab": "#8a6bb1",
    "matmul": "#8a8a8a",
    "lightly": "#3f8f55",
    "metric-learning": "#a3762f",
    "liger": "#b0578d",
    "faiss": "#2d8f91",
}
OURS = "#3b6ea8"
VARIABLES = {"size": "K", "batch": "B", "dim": "D", "topk": "k"}
LEAST = 3  # points of a curve

Curves = dict[str, list[tuple[int, float]]]  # provider: (variable, value)


def draw(results: dict, path: Path) -> list[Path]:
    """Files named after `path`; a picture without data is not drawn."""
    made = {
        "time": curves(results, "median", 1e3, "milliseconds"),
        "memory": curves(results, "memory", 1e-6, "peak memory, MB"),
        "ratios": bars(results),
    }
    return [
        save(figure, path.with_name(f"{path.stem}-{name}.svg"))
        for name, figure in made.items()
        if figure
    ]


def save(figure: Figure, path: Path) -> Path:
    rcParams["svg.hashsalt"] = "psm_kernels"  # the same results, the same bytes
    figure.savefig(path, metadata={"Date": None})
    return path


def draw_overview(sweeps: list[dict], path: Path) -> list[Path]:
    """The README's: time and memory of PSM against K, a row of panels for each processor."""
    base, shown = Case("psm", 256, 0, 128, 5), ("ours", "eager", "compile", "slab")
    columns = (("median", 1e3, "time of a step, ms"), ("memory", 1e-6, "memory on top, MB"))
    found = [
        (results, [panels(results, *column[:2]).get((base, "size"), {}) for column in columns])
        for results in sweeps
    ]
    found = [(results, pair) for results, pair in found if pair[0]]
    if not found:
        return []
    figure = Figure(figsize=(8.4, 3.1 * len(found)), layout="constrained")
    grid = figure.subplots(len(found), 2, squeeze=False)
    for (results, pair), row in zip(found, grid, strict=True):
        for axis, lines, (_, _, label) in zip(row, pair, columns, strict=True):
            for name in shown:
                provider = results["ours"] if name == "ours" else name
                points = sorted(lines.get(provider, ()))
                if points:
                    color, width = (OURS, 2.4) if name == "ours" else (COLORS[name], 1.5)
                    axis.plot(*zip(*points, strict=True), "o-", color=color, lw=width, ms=3.5,
                              label=name)  # fmt: skip
            _log_axes(axis, "K, rows of the bank")
            axis.set_ylabel(label)
        title = f"a PSM step, B 256, D 128, on {results['machine']['name']}"
        row[0].set_title(title, fontsize=10, loc="left")
        row[0].legend(frameon=False, fontsize=9)
    return [save(figure, path)]


def panels(results: dict, column: str, unit: float) -> dict[tuple[Case, str], Curves]:
    """Cases that differ in one variable, which is set to 0 in the key."""
    found: dict[tuple[Case, str], Curves] = {}
    for case, cache, rows in cases(results):
        for variable in VARIABLES if cache == "warm" else ():
            curves = found.setdefault((dataclasses.replace(case, **{variable: 0}), variable), {})
            for name, row in rows.items():
                if row.get(column) is not None:
                    point = (getattr(case, variable), row[column] * unit)
                    curves.setdefault(name, []).append(point)
    return {
        key: curves
        for key, curves in sorted(found.items(), key=lambda item: _order(*item[0]))
        if max(map(len, curves.values()), default=0) >= LEAST
    }


def _order(case: Case, variable: str) -> tuple:
    return list(VARIABLES).index(variable), list(PRODUCTS).index(case.operation), str(case)


def curves(results: dict, column: str, unit: float, label: str) -> Figure | None:
    found = panels(results, column, unit)
    if not found:
        return None
    across = min(len(found), 3)
    down = -(-len(found) // across)
    figure = Figure(figsize=(4.4 * across, 3.5 * down), layout="constrained")
    axes = figure.subplots(down, across, squeeze=False).flat
    for ((case, variable), lines), axis in zip(found.items(), axes, strict=False):
        for name, points in lines.items():
            color, width = (OURS, 2.4) if name == results["ours"] else (COLORS.get(name), 1.3)
            axis.plot(*zip(*sorted(points), strict=True), "o-", color=color, lw=width, ms=3)
            axis.annotate(
                name, max(points), (4, 0), textcoords="offset points", fontsize=7, color=color,
                va="center",
            )  # fmt: skip
        fixed = [f"{v} {getattr(case, n)}" for n, v in VARIABLES.items() if getattr(case, n)]
        title = f"{case.operation}: {', '.join(fixed)}, {case.dtype}"
        axis.set_title(title, fontsize=9, loc="left")
        _log_axes(axis, VARIABLES[variable])
        if variable == "topk":
            axis.set_xscale("symlog", base=2, linthresh=1)  # it has a 0
            axis.xaxis.set_major_formatter(FuncFormatter(lambda x, _: short(x)))
        axis.margins(x=0.18)
    for axis in list(axes):  # what is left of the grid
        axis.remove()
    figure.supylabel(label, fontsize=9)
    return figure


def short(value: float) -> str:
    """Powers of two as they are called: 64k, 16M."""
    for unit, letter in ((1 << 20, "M"), (1 << 10, "k")):
        if value >= unit:
            return f"{value / unit:g}{letter}"
    return f"{value:g}"


def bars(results: dict) -> Figure | None:
    """How many times longer than ours the others take, a group for each case; 1 is a tie. Of sweeps
    the kinds of banks: the rest are curves."""
    ours, names = results["ours"], [name for name in COLORS if name != "matmul"]
    found = [(case, rows) for case, cache, rows in cases(results) if cache == "warm"]
    if results["sweep"]:
        bases = {dataclasses.replace(c, bank="random") for c, _ in found if c.bank != "random"}
        found = [(c, r) for c, r in found if dataclasses.replace(c, bank="random") in bases]
    groups = [
        (case, {n: rows[n]["median"] / rows[ours]["median"] for n in names if n in rows})
        for case, rows in found
        if ours in rows
    ]
    order = list(PRODUCTS)
    groups = sorted((g for g in groups if g[1]), key=lambda g: order.index(g[0].operation))
    if not groups:
        return None
    figure = Figure(figsize=(8, 0.9 + 0.5 * len(groups)), layout="constrained")
    axis, seen = figure.subplots(), set()
    for place, (_, times) in enumerate(groups):
        height = 0.8 / len(times)
        for i, (name, value) in enumerate(times.items()):
            label = None if name in seen else name
            seen.add(name)
            y = place - 0.4 + (i + 0.5) * height
            axis.barh(y, value - 1, height, left=1, color=COLORS[name], label=label)
    axis.axvline(1, color="#444444", lw=1)
    axis.set_yticks(range(len(groups)), [str(case) for case, _ in groups], fontsize=7)
    axis.invert_yaxis()
    axis.set_xscale("log")
    axis.set_xlabel(f"time over ours ({ours})")
    axis.legend(frameon=False, fontsize=8)
    _clean(axis)
    return figure


def _log_axes(axis, label: str) -> None:
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_formatter(FuncFormatter(lambda x, _: short(x)))
    axis.set_yscale("log")
    axis.set_xlabel(label)
    _clean(axis)


def _clean(axis) -> None:
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(alpha=0.25, lw=0.5)
