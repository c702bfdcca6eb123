"""`python -m psm_kernels.mine`: hard negatives of embeddings in .npy files."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from psm_kernels.bank.collectives import rank_and_world
from psm_kernels.mine import MinedNegatives, MiningOptions, mine_negatives
from psm_kernels.mine.source import Source

_DESCRIPTION = """\
Hard negatives of embeddings in .npy files, float16, float32 or float64, which are read in parts and
may be larger than memory. --out gets the arrays `similarity` (Q, k) float32 and `index` (Q, k)
int64, rows of the corpus, best first; missing ones are -inf and -1. Under torchrun the ranks share
the corpus and rank 0 writes. See psm_kernels.mine.mine_negatives for what the options mean."""


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        """Without the usage: one line."""
        self.exit(2, f"{self.prog}: {message}\n")


def parser() -> Parser:
    defaults = MiningOptions()
    p = Parser(
        "python -m psm_kernels.mine",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    p.add_argument("queries", type=Path, help="(Q, D)")
    p.add_argument("corpus", type=Path, help="(N, D)")
    p.add_argument("--out", type=Path, required=True, help="the .npz, whole or not at all")
    p.add_argument("--k", type=int, required=True, help="negatives wanted per query")
    p.add_argument("--positives", type=Path, help="(Q,) corpus row that answers each query, or -1")
    p.add_argument("--exclude", type=Path, help="(Q, E) further rows that are no negatives, or -1")
    p.add_argument("--max-similarity", type=float, help="negatives are at most that similar")
    p.add_argument("--margin", type=float, help="and at most as the positive + margin")
    p.add_argument("--sample", choices=("simans",), help="draw from the k around the positive")
    p.add_argument("--num", type=int, help="how many to draw")
    p.add_argument("--a", type=float, default=defaults.a, help="width of the peak (%(default)s)")
    p.add_argument("--b", type=float, default=defaults.b, help="its offset (%(default)s)")
    p.add_argument("--seed", type=int, default=defaults.seed, help="of the draw (%(default)s)")
    p.add_argument("--no-normalize", dest="normalize", action="store_false", help="inner products")
    p.add_argument("--chunk", type=int, help="corpus rows read at a time (64 to 256 MB of them)")
    p.add_argument("--device", default="cpu", help="where the work is done (%(default)s)")
    p.add_argument("--backend", default="auto", help="a name of `python -m psm_kernels`")
    p.add_argument("--quiet", action="store_true", help="no progress bar, no summary")
    return p


def main(arguments: Sequence[str] | None = None) -> int:
    p = parser()
    words = vars(p.parse_args(arguments))
    # Else Python ends at once, and what cleans up does not run.
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    started = "WORLD_SIZE" in os.environ and not dist.is_initialized()
    try:
        if started:  # by torchrun
            dist.init_process_group("gloo" if words["device"] == "cpu" else "cpu:gloo,cuda:nccl")
        mine(**words)
    except (ValueError, OSError, ImportError, EOFError) as error:
        p.error(" ".join(str(error).split()))
    except KeyboardInterrupt:
        p.exit(128 + signal.SIGINT, f"{p.prog}: interrupted\n")
    finally:
        signal.signal(signal.SIGTERM, before)
        if started and dist.is_initialized():
            dist.destroy_process_group()
    return 0


def mine(
    queries: Path, corpus: Path, out: Path, k: int, positives: Path | None, exclude: Path | None,
    device: str, quiet: bool, **settings: Any,
) -> None:  # fmt: skip
    if out.is_dir() or not out.parent.is_dir() or not os.access(out.parent, os.W_OK):
        raise ValueError(f"--out: got {out}, wanted a file in a folder that can be written")
    asked, on = load(queries), torch_device(device)
    if on.type != "cpu":
        Source("queries", asked, normalize=False)  # or torch would refuse it in its own words
        asked = torch.from_numpy(asked.astype(asked.dtype.newbyteorder("="))).to(on)
    first = rank_and_world()[0] == 0
    mined = mine_negatives(
        asked,
        load(corpus),
        k,
        positives=None if positives is None else load(positives),
        exclude=None if exclude is None else load(exclude),
        progress=not quiet and sys.stderr.isatty(),
        **settings,
    )
    if first:
        save(out, mined)
        if not quiet:
            missing = (mined.index < 0).double().mean().item()
            size = " x ".join(f"{n:,}" for n in mined.index.shape)
            print(f"{out}: {size} negatives, {missing:.1%} missing")


def load(path: Path) -> Any:
    """The array of a .npy file as a memory map."""
    import numpy as np

    try:
        found = np.load(path, mmap_mode="r")
    except (ValueError, EOFError) as error:  # an empty file, one of something else, of objects
        raise ValueError(f"{path}: got no array, wanted a .npy file ({error})") from error
    if not isinstance(found, np.ndarray):
        raise ValueError(f"{path}: got an archive of arrays, wanted a .npy file")
    return found


def torch_device(name: str) -> torch.device:
    """The device of a name; torchrun's ranks that are told "cuda" have a GPU each."""
    try:
        device = torch.device(name)
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # AssertionError: torch without CUDA
        raise ValueError(f"--device: got {name!r}: {str(error).splitlines()[0]}") from error
    return device


def save(path: Path, mined: MinedNegatives) -> None:
    """Whole or not at all: under another name beside it until it is."""
    import numpy as np

    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "xb") as file:
            np.savez(file, similarity=mined.similarity.cpu(), index=mined.index.cpu())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


if __name__ == "__main__":
    sys.exit(main())
