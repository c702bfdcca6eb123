"""Fingerprint of the C++ sources, for setup.py and backends/compiled.py: imports no torch."""

from __future__ import annotations

import hashlib
from pathlib import Path


def source_id(package: Path, version: str) -> str:
    """Version, and a hash of `csrc` where it lies next to the package: a checkout, not a wheel."""
    root = package.parent / "csrc"
    if not (root / "args.h").is_file():  # a csrc in site-packages is some other project's
        return version
    digest = hashlib.sha256()
    for path in sorted(p for p in root.rglob("*") if p.is_file()):
        digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    return f"{version}+{digest.hexdigest()[:16]}"
