"""Tables and pictures of measured results.

python -m benchmarks.report [FILE ...]     markdown of these results, pictures next to each
python -m benchmarks.report --readme       write tables and pictures of README.md and
                                           benchmarks/README.md from benchmarks/results
python -m benchmarks.report --check        fail where these say something else

benchmarks/results/<processor>/ has default.json and sweep.json, as `pytest benchmarks/ --store` and
`--sweep all --store` leave them. Between `<!-- benchmark:cpu -->` and `<!-- /benchmark:cpu -->` is
the table of every default run on that kind of device, the processor with the lowest ratios first;
benchmark:cpu:short is a few rows of the first one; cpu:methods, cpu:training, cpu:sweep and
cpu:banks are excerpts; benchmark:digits:accuracy is a table of results/digits.json, and so are
fashion's, mining's and batches'.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import sys
from collections.abc import Iterable
from pathlib import Path

from benchmarks.cases import Case
from benchmarks.tables import (
    advantage,
    bank_kinds,
    headline,
    markdown,
    not_fastest,
    short,
    skipped,
    table,
    training,
)

ROOT = Path(__file__).resolve().parent.parent
STORED = Path(__file__).resolve().parent / "results"
READMES = (ROOT / "README.md", ROOT / "benchmarks/README.md")
OVERVIEW = STORED / "overview.svg"  # of README.md
TABLES = ("digits", "fashion", "mining", "batches")  # files that hold tables alone
LEGEND = (
    "Other columns are times over ours: above 1x ours is faster. One product is `query @ bank.T` "
    "and nothing else. Memory is the peak on top of the inputs, in a fresh process. The last "
    "column is the share of the roofline of all products; above 100 % because most slots are mined "
    "by products of eight bits, and slots that were dropped cost no gradient."
)


def bullets(lines: Iterable[str]) -> list[str]:
    return [f"- {line}" for line in lines]


# Sections of a README, each of one run: the parts are paragraphs.


def default_run(results: dict) -> list[list[str]]:
    return [*about(results), table(results), [LEGEND], bullets(not_fastest(results))]


def about(results: dict) -> list[list[str]]:
    first, rates, origin = headline(results)
    return [[f"**{results['machine']['name']}**: {first}; {rates}. {origin}."]]


def methods(results: dict) -> list[list[str]]:
    """Every loss at one shape."""
    shape = (256, 65_536, 128, "fp32")

    def wanted(case: Case) -> bool:
        loss = case.operation not in ("psm_forward", "bank_topk", "enqueue")
        return loss and (case.batch, case.size, case.dim, case.dtype) == shape

    return [table(results, wanted)]


def steps(results: dict) -> list[list[str]]:
    return [training(results)]


def sweeps(results: dict) -> list[list[str]]:
    """Over K; the rest are pictures."""
    base = Case("psm", 256, 65_536, 128, 5)
    over_k = table(results, lambda case: case == dataclasses.replace(base, size=case.size))
    drawn = [f"![{name}]({picture})" for name, picture in picture_links(results)]
    return [*about(results), over_k, drawn, bullets(not_fastest(results))]


def picture_links(results: dict) -> list[tuple[str, str]]:
    """Of those of `pictures`, from benchmarks/."""
    folder = Path("results", results["machine"]["name"])
    return [(name, f"{folder}/sweep-{name}.svg") for name in ("time", "memory", "ratios")]


def banks(results: dict) -> list[list[str]]:
    return [bullets(bank_kinds(results))]


# name: (section, of a sweep)
SECTIONS = {
    None: (default_run, False),
    "short": (lambda results: [short(results)], False),
    "methods": (methods, False),
    "training": (steps, False),
    "sweep": (sweeps, True),
    "banks": (banks, True),
}


def paragraphs(parts: Iterable[list[str]]) -> str:
    return "\n\n".join("\n".join(part) for part in parts if part)


def document(results: dict) -> str:
    """All that a file holds."""
    if "tables" in results:
        return paragraphs(markdown(*table) for table in results["tables"].values())
    if results["sweep"]:
        return paragraphs([*sweeps(results), table(results), *banks(results), skipped(results)])
    return paragraphs([*default_run(results), training(results), skipped(results)])


def pictures(results: dict, path: Path) -> list[str]:
    try:
        from benchmarks.pictures import draw
    except (ImportError, OSError) as error:
        return [f"no pictures: {error}"]
    return [f"drawn: {picture}" for picture in draw(results, path)]


# --- READMEs -------------------------------------------------------------------------------------


def excerpt(stored: list[dict], kind: str, section: str | None) -> str:
    """What stands between `<!-- benchmark:kind:section -->` and its end; empty where nothing of the
    kind has been measured.

    Raises:
        ValueError: there is no such marker.
    """
    if kind in TABLES:
        tables = {} if section is None else {section: None}
        for results in stored:
            if "tables" in results and results["name"] == kind:
                tables = results["tables"]
        known = tables
    else:
        known = SECTIONS if kind in ("cpu", "cuda") else {}
    if section not in known:
        wanted = [name for name in known if name] or ["cpu", "cuda", *TABLES]
        raise ValueError(f"got a marker benchmark:{kind}:{section}, wanted one of {wanted}")
    if kind in TABLES:
        return "\n".join(markdown(*tables[section])) if tables[section] else ""

    write, of_sweep = SECTIONS[section]
    runs = [r for r in ordered(stored, kind) if r["sweep"] == of_sweep]
    if section == "short":
        return paragraphs([*write(runs[0]), [others_line(runs)]]) if runs else ""
    return "\n\n".join(filter(None, (paragraphs(write(results)) for results in runs)))


def ordered(stored: list[dict], kind: str) -> list[dict]:
    """Runs on this kind of device, the processor where plain torch comes nearest first."""
    runs = [r for r in stored if "rows" in r and r["machine"]["device"] == kind]
    least: dict[str, float] = {}
    for r in sorted(runs, key=lambda r: r["sweep"]):  # default runs decide
        least.setdefault(r["machine"]["name"], advantage(r))
    return sorted(runs, key=lambda r: (least[r["machine"]["name"]], r["machine"]["name"]))


def others_line(runs: list[dict]) -> str:
    first, _, origin = headline(runs[0])
    line = (
        "Forward and backward; columns with an x are times over ours, above 1x ours is faster. "
        f"`pytest benchmarks/` on {runs[0]['machine']['name']}: {first}; {origin}."
    )
    others = [r["machine"]["name"] for r in runs[1:]]
    if others:
        line += f" {', '.join(others)}, where the ratios are higher: [benchmarks](benchmarks)."
    return line


def fill(readme: str, stored: list[dict]) -> str:
    """The README with every marker pair filled from the results of its kind.

    Raises:
        ValueError: there is no marker pair, or one is unknown.
    """

    def block(match: re.Match) -> str:
        name, kind, section = match.groups()
        body = excerpt(stored, kind, section) or "Not measured yet."
        return f"<!-- benchmark:{name} -->\n{body}\n<!-- /benchmark:{name} -->"

    pattern = r"<!-- benchmark:((\w+)(?::(\w+))?) -->.*?<!-- /benchmark:\1 -->"
    filled, count = re.subn(pattern, block, readme, flags=re.DOTALL)
    if not count:
        raise ValueError("got no markers, wanted <!-- benchmark:cpu --> and its end")
    return filled


def load(paths: Iterable[Path]) -> list[dict]:
    found = [{**json.loads(path.read_text()), "name": path.stem, "path": path} for path in paths]
    return [r for r in found if "ours" in r or "tables" in r]  # gpu.py's have another form


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        "benchmarks.report", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("files", nargs="*", type=Path, help="default: all of benchmarks/results")
    parser.add_argument("--no-pictures", action="store_true")
    parser.add_argument("--readme", action="store_true")
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args(words)
    files = args.files or sorted((*STORED.glob("*.json"), *STORED.glob("*/*.json")))
    stored = load(files)
    if args.readme or args.check:
        return write_readmes(stored, args.check, draw=not args.no_pictures)
    if not stored:
        parser.error("no results: pytest benchmarks/ --store")
    for results in stored:
        print(document(results), end="\n\n")
        if "rows" in results and not args.no_pictures:
            print("\n".join(pictures(results, results["path"])))
    return 0


def write_readmes(stored: list[dict], check: bool, draw: bool) -> int:
    wrong = 0
    for readme in READMES:
        before = readme.read_text()
        try:
            after = fill(before, stored)
        except ValueError as error:
            raise SystemExit(f"{readme}: {error}") from None
        if check and before != after:
            print(f"{readme} differs from the results: python -m benchmarks.report --readme")
            wrong = 1
        elif not check:
            readme.write_text(after)
    if draw and not check:
        from benchmarks.pictures import draw_overview

        for results in stored:
            if "rows" in results:
                print("\n".join(pictures(results, results["path"])))
        sweeps_first = [r for r in ordered(stored, "cpu") if r["sweep"]]
        print(*draw_overview(sweeps_first, OVERVIEW), sep="\n")
    return wrong


if __name__ == "__main__":
    sys.exit(main())
