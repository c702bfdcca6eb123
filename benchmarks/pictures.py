"""Pictures of results, PNG and SVG: time against K, memory against K, ratios."""

from __future__ import annotations

from pathlib import Path

from benchmarks.cases import PRODUCTS
from benchmarks.report import cases

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


def draw(results: dict, path: Path) -> list[Path]:
    """Files named after `path`; a picture without data is not drawn."""
    import matplotlib

    matplotlib.rcParams["svg.hashsalt"] = "psm_kernels"  # the same results, the same bytes
    made = {
        "time": against_size(results, "median", 1e3, "milliseconds"),
        "memory": against_size(results, "memory", 1e-6, "peak memory, MB"),
        "ratios": bars(results),
    }
    written = []
    for name, figure in made.items():
        for ending in ("png", "svg") if figure else ():
            target = path.with_name(f"{path.stem}-{name}.{ending}")
            metadata = {"Date": None} if ending == "svg" else {}
            figure.savefig(target, dpi=120, metadata=metadata)
            written.append(target)
    return written


def against_size(results: dict, column: str, unit: float, label: str):
    """A panel for each operation that has at least two sizes K of one (B, D, k, dtype)."""
    lines: dict[str, dict[str, list[tuple[int, float]]]] = {}
    settings: dict[str, tuple] = {}
    for case, cache, rows in cases(results):
        shape = (case.batch, case.dim, case.topk, case.dtype)
        if case.dtype != "fp32" or case.bank != "random" or cache != "warm":
            continue
        if settings.setdefault(case.operation, _commonest(results, case.operation)) != shape:
            continue
        for name, row in rows.items():
            if row.get(column):
                points = lines.setdefault(case.operation, {}).setdefault(name, [])
                points.append((case.size, row[column] * unit))
    panels = {
        operation: found
        for operation, found in lines.items()
        if max(len(points) for points in found.values()) > 1
    }
    if not panels:
        return None
    figure, axes = _figure(4.2 * len(panels), 3.6, ncols=len(panels), squeeze=False)
    for axis, (operation, found) in zip(axes[0], panels.items(), strict=True):
        for name, points in found.items():
            color, width = (OURS, 2.4) if name == results["ours"] else (COLORS.get(name), 1.3)
            axis.plot(*zip(*sorted(points), strict=True), "o-", color=color, lw=width, ms=3)
            last = max(points)
            axis.annotate(
                name, last, (4, 0), textcoords="offset points", fontsize=7, color=color, va="center"
            )
        batch, dim, topk, _ = settings[operation]
        axis.set_title(f"{operation}: B {batch}, D {dim}, k {topk}", fontsize=10, loc="left")
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set_xlabel("bank rows K")
        axis.margins(x=0.15)
        _clean(axis)
    axes[0][0].set_ylabel(label)
    return figure


def _commonest(results: dict, operation: str) -> tuple:
    shapes = [
        (case.batch, case.dim, case.topk, case.dtype)
        for case, cache, _ in cases(results)
        if case.operation == operation and case.dtype == "fp32" and cache == "warm"
    ]
    return max(shapes, key=shapes.count)


def bars(results: dict):
    """How many times longer than ours the others take, a group for each case; 1 is a tie."""
    ours, names = results["ours"], ("eager", "compile", "slab", *list(COLORS)[4:])
    order = list(PRODUCTS)
    groups = [
        (case, {n: rows[n]["median"] / rows[ours]["median"] for n in names if n in rows})
        for case, cache, rows in cases(results)
        if ours in rows and cache == "warm" and case.bank == "random"
    ]
    groups = sorted((g for g in groups if g[1]), key=lambda g: order.index(g[0].operation))
    if not groups:
        return None
    figure, axis = _figure(8, 0.9 + 0.5 * len(groups))
    seen = set()
    for place, (_, found) in enumerate(groups):
        for i, (name, times) in enumerate(found.items()):
            label = None if name in seen else name
            seen.add(name)
            height = 0.8 / len(found)
            y = place - 0.4 + (i + 0.5) * height
            axis.barh(y, times - 1, height, left=1, color=COLORS[name], label=label)
    axis.axvline(1, color="#444444", lw=1)
    axis.set_yticks(range(len(groups)), [str(case) for case, _ in groups], fontsize=7)
    axis.invert_yaxis()
    axis.set_xscale("log")
    axis.set_xlabel(f"time over ours ({ours})")
    axis.legend(frameon=False, fontsize=8)
    _clean(axis)
    return figure


def _figure(width: float, height: float, **grid):
    from matplotlib.figure import Figure  # no pyplot: the user's backend stays as it is

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(**grid)


def _clean(axis) -> None:
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(alpha=0.25, lw=0.5)
