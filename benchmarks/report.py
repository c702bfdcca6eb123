"""Tables and pictures of measured results.

python -m benchmarks.report [FILE ...]           markdown of these results, pictures next to each
python -m benchmarks.report --readme [README]    write the tables between the README's markers
python -m benchmarks.report --check [README]     fail where the README says something else

Between `<!-- benchmark:cpu -->` and `<!-- /benchmark:cpu -->` stands the table of every default run
of benchmarks/results/ on that kind of device; benchmark:cpu:methods is an excerpt, cpu:training the
training step, cpu:sweep what the sweeps found.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import sys
from collections.abc import Callable, Iterable
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
    plain = ("matmul", "eager", "compile", "slab")
    head = ["operation", "B", "K", "D", "k", "bank", f"ours (`{ours}`), ms"]
    head += ["one product", *plain[1:]]
    head += ["other libraries", "memory, ours", "memory, eager", "roofline"]
    body = []
    for case, cache, rows in cases(results):
        if ours not in rows or not wanted(case):
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
    return markdown(head, body) if body else []


LEGEND = (
    "Other columns are times over ours: above 1x ours is faster. One product is `query @ bank.T` "
    "and nothing else. Memory is the peak on top of the inputs, in a fresh process. The last "
    "column is the share of the roofline; above 100 % because mining looks at most slots with "
    "products of eight bits."
)


def bullets(lines: Iterable[str]) -> list[str]:
    return [f"- {line}" for line in lines]


def bank_kinds(results: dict) -> list[str]:
    """Our time on banks that are hard to mine over that on a random one."""
    found: dict[Case, list[str]] = {}
    times = {case: rows.get(results["ours"], {}).get("median") for case, _, rows in cases(results)}
    for case, time in times.items():
        base = dataclasses.replace(case, bank="random")
        if case != base and time and times.get(base):
            found.setdefault(base, []).append(f"{case.bank} {ratio(time, times[base])}")
    return [f"{base}, over a random bank: {', '.join(kinds)}" for base, kinds in found.items()]


# Sections of a README, each of one run: the parts are paragraphs.


def default_run(results: dict) -> list[list[str]]:
    first, rates, origin = headline(results)
    return [
        [f"{first}; {rates}. {origin}."],
        table(results),
        [LEGEND],
        bullets(not_fastest(results)),
    ]


def methods(results: dict) -> list[list[str]]:
    """Every loss at one shape."""
    alike, shape = {"psm", "info_nce", "hcl", "sscl", "unremix"}, (256, 65_536, 128, "fp32")

    def wanted(case: Case) -> bool:
        return case.operation in alike and (case.batch, case.size, case.dim, case.dtype) == shape

    return [table(results, wanted)]


def sweeps(results: dict) -> list[list[str]]:
    first, _, origin = headline(results)
    stem = f"benchmarks/results/{results['name']}"
    return [
        [f"{first}. {origin}."],
        [f"![{name}]({stem}-{name}.svg)" for name in ("time", "memory", "ratios")],
        bullets(bank_kinds(results)),
        bullets(not_fastest(results)),
    ]


SECTIONS = {None: default_run, "methods": methods, "training": lambda r: [training(r)]}
SECTIONS |= {"sweep": sweeps}


def paragraphs(parts: Iterable[list[str]]) -> str:
    return "\n\n".join("\n".join(part) for part in parts if part)


def document(results: dict) -> str:
    """All that a file holds."""
    if results["sweep"]:
        return paragraphs([*sweeps(results), table(results), skipped(results)])
    return paragraphs([*default_run(results), training(results), skipped(results)])


def pictures(results: dict, path: Path) -> list[str]:
    try:
        from benchmarks.pictures import draw
    except ImportError as error:
        return [f"no pictures: {error}"]
    return [f"drawn: {picture}" for picture in draw(results, path)]


# --- README --------------------------------------------------------------------------------------


def fill(readme: str, stored: list[dict]) -> str:
    """The README with every marker pair filled from the results of its kind.

    Raises:
        ValueError: there is no marker pair, one is unknown, or none of the results is for it.
    """

    def block(match: re.Match) -> str:
        name, device, section = match.groups()
        if section not in SECTIONS:
            raise ValueError(f"README: got a marker benchmark:{name}, wanted {list(SECTIONS)}")
        here = [results for results in stored if results["machine"]["device"] == device]
        if not here:
            raise ValueError(f"README: got a marker benchmark:{name}, but no results for it")
        swept = section == "sweep"
        found = [paragraphs(SECTIONS[section](r)) for r in here if r["sweep"] == swept]
        body = "\n\n".join(filter(None, found)) or "Not measured yet."
        return f"<!-- benchmark:{name} -->\n{body}\n<!-- /benchmark:{name} -->"

    pattern = r"<!-- benchmark:((\w+)(?::(\w+))?) -->.*?<!-- /benchmark:\1 -->"
    filled, count = re.subn(pattern, block, readme, flags=re.DOTALL)
    if not count:
        raise ValueError("README: got no markers, wanted <!-- benchmark:cpu --> and its end")
    return filled


def load(paths: Iterable[Path]) -> list[dict]:
    found = [{**json.loads(path.read_text()), "name": path.stem} for path in paths]
    return [results for results in found if "ours" in results]  # gpu.py's have another form


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

    for results in load(files):
        print(document(results), end="\n\n")
        if not args.no_pictures:
            print("\n".join(pictures(results, STORED / results["name"])))
    return 0


if __name__ == "__main__":
    sys.exit(main())
