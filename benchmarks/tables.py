"""What results say, as text: numbers, tables for a terminal and in markdown, who wins."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Iterable

from benchmarks.cases import Case

TIE = 1.05  # nearer than this nobody wins
CASE = ("operation", "batch", "size", "dim", "topk", "dtype", "bank")


def cases(results: dict) -> list[tuple[Case, str, dict[str, dict]]]:
    """(case, cache, rows by provider), in the order measured."""
    found: dict[tuple, dict[str, dict]] = {}
    for row in results["rows"]:
        key = (Case(**{name: row[name] for name in CASE}), row["cache"])
        found.setdefault(key, {})[row["provider"]] = row
    return [(case, cache, rows) for (case, cache), rows in found.items()]


# --- numbers as text -----------------------------------------------------------------------------


def milliseconds(value: float) -> str:
    value *= 1e3
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def ratio(time: float | None, base: float | None) -> str:
    if not time or not base:
        return ""
    times = time / base
    return f"{times:.0f}x" if times >= 10 else f"{times:.2f}x"


def megabytes(value: int | None) -> str:
    return "" if value is None else f"{value / 1e6:,.0f} MB"


def share(case: Case, seconds: float, rates: dict[str, float]) -> str:
    """Of the roofline: the least time of the products or of the traffic, over what it took."""
    products = case.flops / rates[case.dtype]
    least = max(products, case.traffic / rates["copy"])
    return f"{least / seconds:.0%}"


def number(value: int) -> str:
    return f"{value:,}"


# --- tables --------------------------------------------------------------------------------------


def headline(results: dict) -> list[str]:
    about, rates = results["machine"], results["rates"]
    products = ", ".join(
        f"{name} products {rate / 1e9:,.0f} GFLOP/s"
        for name, rate in rates.items()
        if name != "copy"
    )
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    changed = " with changes" if results["changed"] else ""
    chip = f"{about['gpu']}; " if "gpu" in about else ""
    return [
        f"{chip}{about['cpu']}, {about['cores']} cores, {about['threads']} threads, "
        f"{about['instructions']}, {about['memory_gb']} GB",
        f"measured rates (the roofline): {products}, copy {rates['copy'] / 1e9:.1f} GB/s",
        f"{results['date']}, commit {results['commit']}{changed}; {versions}",
    ]


def title(results: dict, case: Case, cache: str) -> str:
    return str(case) if results["machine"]["device"] == "cpu" else f"{case} {cache}"


def text(results: dict) -> list[str]:
    """The whole of it for a terminal: one block a case, then what was skipped."""
    lines = []
    for case, cache, rows in cases(results):
        lines.append(title(results, case, cache))
        head = ("", "ms", "10 %", "90 %", "x eager", "x compile", "memory", "roofline")
        lines.append("  {:<16}{:>10}{:>9}{:>9}{:>10}{:>10}{:>12}{:>10}".format(*head))
        base = {name: rows[name]["median"] for name in ("eager", "compile") if name in rows}
        for name, row in sorted(rows.items(), key=lambda item: item[1]["median"]):
            cells = [milliseconds(row[column]) for column in ("median", "low", "high")]
            if row["same_job"]:
                cells += [ratio(base.get(other), row["median"]) for other in ("eager", "compile")]
                cells += [megabytes(row.get("memory"))]
                cells += [share(case, row["median"], results["rates"])]
            else:
                name, cells = f"({name})", [*cells, "", "", "", ""]
            mark = "*" if name == results["ours"] else " "
            widths = ("{:>10}", "{:>9}", "{:>9}", "{:>10}", "{:>10}", "{:>12}", "{:>10}")
            cells = [width.format(cell) for width, cell in zip(widths, cells, strict=True)]
            lines.append(f"{mark} {name:<16}{''.join(cells)}".rstrip())
    lines.append("")
    lines.append(
        "* ours; (name): less or other work, a yardstick; x eager, x compile: how many times "
        "faster than these; roofline: share of what the measured rates allow"
    )
    lines += ["", *not_fastest(results), "", *training(results), *skipped(results)]
    return lines


def not_fastest(results: dict) -> list[str]:
    """Where a competitor wins or ties."""
    lines = []
    for case, cache, rows in cases(results):
        ours, where = rows.get(results["ours"]), title(results, case, cache)
        if ours is None:
            continue
        for name, row in rows.items():
            if name != results["ours"] and row["same_job"]:
                times = row["median"] / ours["median"]
                if times < 1 / TIE:
                    lines.append(f"{name} wins {where}: {1 / times:.2f}x faster than ours")
                elif times <= TIE:
                    lines.append(f"{name} ties {where}: {times:.2f}x our time")
    return lines or ["No competitor wins or ties in what was measured."]


def training(results: dict) -> list[str]:
    """The whole training step, as markdown."""
    found = results.get("training")
    if not found:
        return []
    body = []
    for row in found["rows"]:
        cells = [number(row["size"]), f"`{row['provider']}`"]
        if row["skipped"]:
            cells += ["", "", row["skipped"]]
        else:
            cells += [f"{row['step']:.1f}", milliseconds(row["loss"])]
            cells.append(f"{row['loss'] / row['step']:.1%}")
        body.append(cells)
    return [
        f"ResNet-18, batch {found['batch']}, {found['edge']} x {found['edge']}, one PSM step:",
        "",
        *markdown(["bank", "loss by", "step, s", "of it the loss, ms", "share"], body),
    ]


def skipped(results: dict) -> list[str]:
    """One line a provider and reason."""
    found: dict[tuple[str, str], set[str]] = {}
    for case, provider, reason in results["skipped"]:
        found.setdefault((provider, reason), set()).add(case)
    lines = ["", "Skipped"] if found else []
    for (provider, reason), where in found.items():
        which = ", ".join(sorted(where)) if len(where) <= 2 else f"{len(where)} cases"
        lines.append(f"  {provider}: {reason} ({which})")
    return lines


def markdown(head: list[str], rows: Iterable[list[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]


def table(results: dict, wanted: Callable[[Case], bool] = lambda case: True) -> list[str]:
    """The markdown of the report and of the README: a line a case, ours first, others as ratios.
    Empty where no case is wanted."""
    ours, gpu = results["ours"], results["machine"]["device"] != "cpu"
    head = ["operation", "B", "K", "D", "k", "bank", f"ours (`{ours}`), ms"]
    head += ["one product", *PLAIN[1:]]
    head += ["other libraries", "memory, ours", "memory, eager", "roofline"]
    body = []
    for case, cache, rows in cases(results):
        if ours not in rows or not wanted(case):
            continue
        mine = rows[ours]["median"]
        others = [
            f"{name} {ratio(row['median'], mine)}"
            for name, row in other_libraries(results, rows).items()
        ]
        kind = case.dtype if case.bank == "random" else f"{case.dtype} {case.bank}"
        body.append(
            [
                f"`{case.operation}`",
                *(number(n) for n in (case.batch, case.size, case.dim, case.topk)),
                f"{kind}, {cache}" if gpu else kind,
                milliseconds(mine),
                *(ratio(rows[name]["median"], mine) if name in rows else "" for name in PLAIN),
                ", ".join(others),
                *(megabytes(rows.get(name, {}).get("memory")) for name in (ours, "eager")),
                share(case, mine, results["rates"]),
            ]
        )
    return markdown(head, body) if body else []


SHORT = (
    Case("psm", 64, 1_024, 128, 5),
    Case("psm", 256, 65_536, 128, 5),
    Case("psm", 256, 65_536, 128, 5, "bf16"),
    Case("info_nce", 256, 65_536, 128),
    Case("hcl", 256, 65_536, 128),
    Case("nnclr", 256, 65_536, 128),
    Case("bank_topk", 256, 65_536, 128, 5),
    Case("enqueue", 256, 65_536, 128),
)
PLAIN = ("matmul", "eager", "compile", "slab")


def short(results: dict) -> list[str]:
    """The README's: a few cases, of the other libraries the best one."""
    ours = results["ours"]
    head = ["", "ours, ms", "one product", *PLAIN[1:], "best other library", "memory, ours / eager"]
    body = []
    for case, cache, rows in cases(results):
        if case not in SHORT or cache != "warm" or ours not in rows:
            continue
        mine = rows[ours]["median"]
        others = {name: row["median"] for name, row in other_libraries(results, rows).items()}
        best = min(others, key=others.get, default=None)
        memory = [megabytes(rows.get(name, {}).get("memory")) for name in (ours, "eager")]
        body.append(
            [
                f"`{case.operation}`, {number(case.batch)} x {number(case.size)}, {case.dtype}",
                milliseconds(mine),
                *(ratio(rows[name]["median"], mine) if name in rows else "" for name in PLAIN),
                f"{best} {ratio(others[best], mine)}" if best else "",
                " / ".join(memory) if all(memory) else "",
            ]
        )
    return markdown(head, body) if body else []


def other_libraries(results: dict, rows: dict[str, dict]) -> dict[str, dict]:
    mine = (results["ours"], *PLAIN)
    return {name: row for name, row in rows.items() if row["same_job"] and name not in mine}


def advantage(results: dict) -> float:
    """How many times longer than ours plain torch takes, over all cases: the geometric mean."""
    ours = results["ours"]
    found = [
        rows["eager"]["median"] / rows[ours]["median"]
        for _, _, rows in cases(results)
        if ours in rows and "eager" in rows
    ]
    return statistics.geometric_mean(found) if found else 1.0


def bank_kinds(results: dict) -> list[str]:
    """Our time on banks that are hard to mine over that on a random one."""
    found: dict[Case, list[str]] = {}
    times = {case: rows.get(results["ours"], {}).get("median") for case, _, rows in cases(results)}
    for case, time in times.items():
        base = dataclasses.replace(case, bank="random")
        if case != base and time and times.get(base):
            found.setdefault(base, []).append(f"{case.bank} {ratio(time, times[base])}")
    return [f"{base}, over a random bank: {', '.join(kinds)}" for base, kinds in found.items()]
