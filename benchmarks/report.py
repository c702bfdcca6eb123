"""Tables and pictures of measured results.

python -m benchmarks.report [FILE ...]           markdown of these results, pictures next to each
python -m benchmarks.report --readme [README]    write the tables between the README's markers
python -m benchmarks.report --check [README]     fail where the README says something else

A marker pair `<!-- benchmark:cpu -->` `<!-- /benchmark:cpu -->` takes every file of
benchmarks/results/ that was measured on that kind of device.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterable
from pathlib import Path

from benchmarks.cases import Case

ROOT = Path(__file__).resolve().parent.parent
STORED = Path(__file__).resolve().parent / "results"
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


def text(results: dict) -> list[str]:
    """The whole of it for a terminal: one block a case, then what was skipped."""
    lines = []
    for case, cache, rows in cases(results):
        lines.append(f"{case}" + ("" if results["machine"]["device"] == "cpu" else f" {cache}"))
        head = ("", "ms", "10 %", "90 %", "eager", "compile", "memory", "roofline")
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
        "* ours; (name): less or other work, a yardstick; eager, compile: how many times faster "
        "than these; roofline: share of what the measured rates allow"
    )
    lines += ["", *not_fastest(results), "", *training(results), *skipped(results)]
    return lines


def not_fastest(results: dict) -> list[str]:
    """Where a competitor wins or ties."""
    lines = []
    for case, cache, rows in cases(results):
        ours = rows.get(results["ours"])
        if ours is None:
            continue
        for name, row in rows.items():
            if name != results["ours"] and row["same_job"]:
                times = row["median"] / ours["median"]
                if times < 1 / TIE:
                    lines.append(f"{name} wins {case} ({cache}): {1 / times:.2f}x faster than ours")
                elif times <= TIE:
                    lines.append(f"{name} ties {case} ({cache}): {times:.2f}x our time")
    return lines or ["No competitor wins or ties in what was measured."]


def training(results: dict) -> list[str]:
    if "training" not in results:
        return []
    found = results["training"]
    encoders = found["encoders"]["median"]
    lines = [
        f"A training step: ResNet-18, batch {found['batch']}, {found['edge']} x {found['edge']}. "
        f"Encoders and optimizer take {milliseconds(encoders)} ms, timed by themselves; the step "
        "is their sum with the loss."
    ]
    for row in found["losses"]:
        start = f"bank {number(row['size'])}, {row['provider']}:"
        if row["skipped"]:
            lines.append(f"  {start} skipped, {row['skipped']}")
        else:
            part = row["median"] / (row["median"] + encoders)
            lines.append(f"  {start} {milliseconds(row['median'])} ms, {part:.1%} of the step")
    return lines


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


def table(results: dict) -> list[str]:
    """The markdown of the report and of the README: a line a case, ours first, others as ratios."""
    ours, gpu = results["ours"], results["machine"]["device"] != "cpu"
    plain = ("eager", "compile", "slab")
    head = ["operation", "B", "K", "D", "k", "bank", f"ours (`{ours}`), ms", *plain]
    head += ["other libraries", "memory, ours", "memory, eager", "roofline"]
    body = []
    for case, cache, rows in cases(results):
        if ours not in rows:
            continue
        mine = rows[ours]["median"]
        others = [
            f"{name} {ratio(row['median'], mine)}"
            for name, row in rows.items()
            if row["same_job"] and name not in (ours, *plain)
        ]
        kind = case.dtype if case.bank == "random" else f"{case.dtype} {case.bank}"
        body.append(
            [
                f"`{case.operation}`",
                *(number(n) for n in (case.batch, case.size, case.dim, case.topk)),
                f"{kind}, {cache}" if gpu else kind,
                milliseconds(mine),
                *(ratio(rows[name]["median"], mine) if name in rows else "" for name in plain),
                ", ".join(others),
                *(megabytes(rows.get(name, {}).get("memory")) for name in (ours, "eager")),
                share(case, mine, results["rates"]),
            ]
        )
    return markdown(head, body)


def document(results: dict) -> str:
    """What stands between a README's markers for one machine."""
    first, rates, origin = headline(results)
    steps = training(results)
    parts = [
        [f"{first}; {rates}. {origin}."],
        table(results),
        [
            "Other columns are times over ours: above 1x ours is faster. Memory is the peak on top "
            "of the inputs, in a fresh process. The last column is the share of the roofline."
        ],
        [f"- {line}" for line in not_fastest(results)],
        steps[:1],
        [f"- {line.strip()}" for line in steps[1:]],
    ]
    return "\n\n".join("\n".join(part) for part in parts if part)


# --- README --------------------------------------------------------------------------------------


def fill(readme: str, stored: list[dict]) -> str:
    """The README with every marker pair filled from the results of its kind of device.

    Raises:
        ValueError: there is no marker pair, or none of the results is for one.
    """

    def block(match: re.Match) -> str:
        device = match[1]
        chosen = [results for results in stored if results["machine"]["device"] == device]
        if not chosen:
            raise ValueError(f"README: got a marker benchmark:{device}, but no results for it")
        body = "\n\n".join(document(results) for results in chosen)
        return f"<!-- benchmark:{device} -->\n{body}\n<!-- /benchmark:{device} -->"

    pattern = r"<!-- benchmark:(\w+) -->.*?<!-- /benchmark:\1 -->"
    filled, count = re.subn(pattern, block, readme, flags=re.DOTALL)
    if not count:
        raise ValueError("README: got no markers, wanted <!-- benchmark:cpu --> and its end")
    return filled


def load(paths: Iterable[Path]) -> list[dict]:
    return [json.loads(path.read_text()) for path in paths]


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        "benchmarks.report", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("files", nargs="*", type=Path, help="default: benchmarks/results/*.json")
    parser.add_argument("--no-pictures", action="store_true")
    for name in ("--readme", "--check"):
        parser.add_argument(name, type=Path, nargs="?", const=ROOT / "README.md", metavar="README")
    args = parser.parse_args(words)
    files = args.files or sorted(STORED.glob("*.json"))
    if not files:
        parser.error(f"no results: run pytest benchmarks/ --results {STORED.name}/NAME.json")

    readme = args.readme or args.check
    if readme:
        before = readme.read_text()
        try:
            after = fill(before, load(files))
        except ValueError as error:
            parser.error(str(error))
        if args.check:
            if before != after:
                print(f"{readme} differs from the results: python -m benchmarks.report --readme")
            return int(before != after)
        readme.write_text(after)
        return 0

    for path, results in zip(files, load(files), strict=True):
        print(document(results), end="\n\n")
        if not args.no_pictures:
            from benchmarks.pictures import draw

            print("\n".join(f"drawn: {name}" for name in draw(results, path)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
