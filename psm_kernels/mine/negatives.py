"""`mine_negatives`: the call."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist

from psm_kernels.bank.collectives import agree, rank_and_world
from psm_kernels.mine.options import MinedNegatives, MiningOptions
from psm_kernels.mine.search import Search
from psm_kernels.options import takes


@takes(MiningOptions)
@torch.no_grad()
def mine_negatives(
    queries: Any,
    corpus: Any,
    k: int,
    *,
    positives: Any = None,
    exclude: Any = None,
    progress: bool = False,
    process_group: dist.ProcessGroup | None = None,
    backend: str = "auto",
    **settings,
) -> MinedNegatives:
    """The k rows of a corpus nearest to each query that may be its negatives, or a sample of them.

    The corpus is read in chunks, and once; a memory map that is larger than memory will do. Memory
    is O(Q k) and a chunk. With torch.distributed initialized this is a collective call: every rank
    brings the same arguments, searches its contiguous part of the corpus, and gets the whole.

    The limits `max_similarity` and `margin` come before the k: the result is the k best of what is
    allowed, exactly. Where better rows than the limit fill a list, a list twice as long is asked
    for, and beyond 1024 lists of halves of the chunk. The more rows are above a limit the longer
    it takes; a few false negatives per query cost nothing.

    Args:
        queries: (Q, D) tensor, numpy array or memory map of any floating dtype (numpy's: float16,
            float32, float64). Used as fp32. The work is done where it is, if it is a tensor.
        corpus: (N, D) of the same kinds, anywhere. Its pieces are copied.
        k: negatives wanted per query; may exceed N.
        positives: (Q,) integers, the corpus row that answers each query, -1 for none. It is no
            negative, and its similarity is s+.
        exclude: (Q, E) integers, further rows that are no negatives of a query, -1 for none.
        max_similarity: negatives have similarity <= max_similarity.
        margin: negatives have similarity <= s+ + margin, so -0.05 keeps those at least 0.05 below
            the positive. Every query then needs a positive.
        sample: "simans" draws `num` different ones of the k, with probability proportional to
            exp(-a (s - s+ - b)^2) (SimANS, arXiv 2210.11773, eq. 4; its code adds b where the
            paper subtracts it). Every query then needs a positive. The k largest of
            -a (s - s+ - b)^2 - log(-log u), u from the words of `psm_kernels.noise` for
            (seed, query, row), which are the same everywhere: chunks and ranks do not matter.
        num: how many to draw, at most k.
        a, b: width and place of the peak. Cosines lie close together: for a = 0.5 on logits at
            temperature t take a = 0.5 / t^2.
        seed: of the draw.
        normalize: compare unit rows; else the rows as they are, by their inner product.
        chunk: corpus rows read at a time; None for a quarter of the corpus, 64 to 256 MB in fp32.
        progress: show a bar (tqdm) with rows per second and the time left.
        process_group: the ranks that share the work, None for the default group. Its backend has to
            move tensors of the device that does the work.
        backend: "auto" or a name of `python -m psm_kernels`.

    Returns:
        MinedNegatives with k columns in descending similarity, of equal ones the smaller row first;
        with a sample `num` columns in the order of the draw, of which any first n are a sample of
        n. Missing ones, at the end of a row, are -inf and -1. On the device of the work.

        A row of zeros has similarity 0 to everything. A row with NaN or inf is no negative of any
        query; a query that has one, itself or as the positive that it is compared with, gets none.
        s+ is computed as the similarities are: on the backend "cpp" with the same bits, so that
        copies of the positive are within margin=0.

    Raises:
        ValueError: an argument is wrong, ranks differ, or the named backend cannot run here.
        ImportError: progress without tqdm.
    """
    search: Search | None = None

    def say() -> dict[str, object]:
        nonlocal search
        search = Search(queries, corpus, k, positives, exclude, MiningOptions(**settings), backend)
        return {
            "queries": [len(search.queries), search.queries.columns],
            "corpus": len(search.corpus),
            "positives given": positives is not None,
            "exclude given": exclude is not None,
            "k": search.k,
            **vars(search.options),
        }

    agree(process_group, say)
    assert search is not None
    rank, world = rank_and_world(process_group)
    start, stop = (len(search.corpus) * r // world for r in (rank, rank + 1))
    with _bar(stop - start, progress, shown=rank == 0) as advance:
        return search.run(start, stop, process_group, advance)


@contextlib.contextmanager
def _bar(rows: int, progress: bool, *, shown: bool) -> Iterator[Callable[[float], object]]:
    """Whoever does not show it needs tqdm as well: ranks fail together."""
    if not progress:
        yield lambda rows: None
        return
    try:
        from tqdm import tqdm
    except ImportError as error:
        raise ImportError("progress: tqdm is not installed: pip install tqdm") from error
    with tqdm(total=rows, desc="mining", unit="row", unit_scale=True, disable=not shown) as bar:
        yield bar.update
