"""Tables and pictures of measured results.

python -m benchmarks.report [FILE ...]           markdown of these results, pictures next to each
python -m benchmarks.report --readme [README]    write the tables between the README's markers
python -m benchmarks.report --check [README]     fail where the README says something else

Between `<!-- benchmark:cpu -->` and `<!-- /benchmark:cpu -->` stands the table of every default run
of benchmarks/results/ on that kind of device; benchmark:cpu:methods is an excerpt, cpu:training the
training step, cpu:sweep what the sweeps found, benchmark:digits:accuracy a table of digits.json.
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
    bank_kinds,
    headline,
    markdown,
    not_fastest,
    skipped,
    table,
    training,
)

ROOT = Path(__file__).resolve().parent.parent
STORED = Path(__file__).resolve().parent / "results"
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
    base = Case("psm", 256, 65_536, 128, 5)
    return [
        [f"{first}. {origin}."],
        table(results, lambda case: case == dataclasses.replace(base, size=case.size)),
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
    if "tables" in results:
        return paragraphs(markdown(*table) for table in results["tables"].values())
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


def excerpt(results: dict, kind: str, section: str | None) -> str | None:
    """What stands between `<!-- benchmark:kind:section -->` and its end; None where these results
    are of another kind.

    Raises:
        ValueError: there is no such section.
    """
    digits = "tables" in results
    if kind != ("digits" if digits else results["machine"]["device"]):
        return None
    sections = results["tables"] if digits else SECTIONS
    if section not in sections:
        wanted = [name for name in sections if name]
        raise ValueError(f"README: got a marker benchmark:{kind}:{section}, wanted one of {wanted}")
    if digits:
        return "\n".join(markdown(*sections[section]))
    return (
        paragraphs(sections[section](results)) if results["sweep"] == (section == "sweep") else ""
    )


def fill(readme: str, stored: list[dict]) -> str:
    """The README with every marker pair filled from the results of its kind.

    Raises:
        ValueError: there is no marker pair, one is unknown, or none of the results is for it.
    """

    def block(match: re.Match) -> str:
        name, kind, section = match.groups()
        found = [text for text in (excerpt(r, kind, section) for r in stored) if text is not None]
        if not found:
            raise ValueError(f"README: got a marker benchmark:{name}, but no results for it")
        body = "\n\n".join(filter(None, found)) or "Not measured yet."
        return f"<!-- benchmark:{name} -->\n{body}\n<!-- /benchmark:{name} -->"

    pattern = r"<!-- benchmark:((\w+)(?::(\w+))?) -->.*?<!-- /benchmark:\1 -->"
    filled, count = re.subn(pattern, block, readme, flags=re.DOTALL)
    if not count:
        raise ValueError("README: got no markers, wanted <!-- benchmark:cpu --> and its end")
    return filled


def load(paths: Iterable[Path]) -> list[dict]:
    found = [{**json.loads(path.read_text()), "name": path.stem} for path in paths]
    return [r for r in found if "ours" in r or "tables" in r]  # gpu.py's have another form


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
        if "rows" in results and not args.no_pictures:
            print("\n".join(pictures(results, STORED / results["name"])))
    return 0


if __name__ == "__main__":
    sys.exit(main())
