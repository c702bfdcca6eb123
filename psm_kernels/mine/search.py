"""Chunks of a corpus go through `bank_topk`, and their lists are merged."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from psm_kernels import checks, ops
from psm_kernels.backends import registry
from psm_kernels.backends.base import EMPTY, NOTHING, Exclude
from psm_kernels.bank.collectives import gather_all, merge_topk, rank_and_world
from psm_kernels.mine.limits import Lists, topk_within
from psm_kernels.mine.options import MinedNegatives, MiningOptions
from psm_kernels.mine.simans import draw
from psm_kernels.mine.source import Source, corpus_rows

# Of a chunk in fp32. The larger it is the fewer rows are near enough to be listed and merged; with
# a quarter of the corpus memory stays below 1.5 times a file of 400 MB.
_LEAST_BYTES, _MOST_BYTES = 64 << 20, 256 << 20
_BLOCK = 2048  # queries at a time
_PAIRS = 64  # queries whose positives are compared at a time: the rest of the square is waste

Advance = Callable[[float], object]


class Search:
    """One call's arguments, checked."""

    def __init__(
        self, queries: Any, corpus: Any, k: int, positives: Any, exclude: Any,
        options: MiningOptions, backend: str,
    ):  # fmt: skip
        normalize = options.normalize
        self.queries = Source("queries", queries, normalize=normalize)
        self.corpus = Source("corpus", corpus, normalize=normalize, columns=self.queries.columns)
        self.k, self.options, self.backend = checks.as_int(k), options, backend
        checks.check_int("k", self.k, 1)
        if options.num is not None:
            checks.check_int("num", options.num, 1, self.k, "k")
        sizes, self.positives, hides = (len(self.queries), len(self.corpus)), None, []
        if positives is not None:
            self.positives = corpus_rows("positives", positives, *sizes)
            hides.append(self.positives[:, None])
        if exclude is not None:
            hides.append(corpus_rows("exclude", exclude, *sizes, listed=True))
        self.hides = torch.cat(hides, 1) if hides else None  # (Q, E) on the CPU
        if options.relative:
            self._check_positives(options.relative)
        tensors = [x for x in (queries, corpus) if isinstance(x, Tensor)]
        self.device = tensors[0].device if tensors else torch.device("cpu")
        empty = torch.empty(1, self.queries.columns, device=self.device)
        registry.choose(backend, empty, self.k, sums=False)

    def _check_positives(self, why: str) -> None:
        wanted = f"a corpus row for each query, because {why} is relative to it"
        if self.positives is None:
            raise ValueError(f"positives: got None, wanted {wanted}")
        missing = self.positives < 0
        if missing.any():
            query = int(missing.nonzero()[0, 0])
            raise ValueError(f"positives: got -1 for query {query}, wanted {wanted}")

    def run(
        self, start: int, stop: int, group: dist.ProcessGroup | None, advance: Advance
    ) -> MinedNegatives:
        """What all ranks of the group find, of which this one searches corpus rows start to stop;
        `advance` is told how many of them are done."""
        s_pos = self.positive_similarity() if self.options.relative else None
        found = self.scan(start, stop, s_pos, advance)
        _, world = rank_and_world(group)
        for rows in self.blocks() if world > 1 else ():
            everyones = gather_all((found.similarity[rows], found.index[rows]), group)
            lists = (x.unflatten(0, (world, -1)) for x in everyones)
            found.similarity[rows], found.index[rows] = merge_topk(*lists)
        if self.options.sample is None:
            return found
        drawn = []
        for rows in self.blocks():
            listed = MinedNegatives(found.similarity[rows], found.index[rows])
            drawn.append(draw(listed, s_pos[rows], self.options, first=rows.start))
        return MinedNegatives(*map(torch.cat, zip(*drawn, strict=True)))

    def blocks(self) -> Iterator[slice]:
        size = len(self.queries)
        for start in range(0, size, _BLOCK):
            yield slice(start, min(start + _BLOCK, size))

    def read_queries(self, rows: slice) -> tuple[Tensor, Tensor]:
        query = torch.empty(rows.stop - rows.start, self.queries.columns, device=self.device)
        return query, self.queries.read(rows.start, rows.stop, query)

    def positive_similarity(self) -> Tensor:
        """s+ (Q,), NaN where it is of a row that is not finite. By the kernel that mines: another
        order of additions would put copies of the positive on either side of it."""
        s_pos = torch.empty(len(self.queries), device=self.device)
        for rows in self.blocks():
            query, spoiled = self.read_queries(rows)
            positive = torch.empty_like(query)
            spoiled |= self.corpus.gather(self.positives[rows], positive)
            for part in range(0, len(query), _PAIRS):
                left, right = (x[part : part + _PAIRS] for x in (query, positive))
                similarity, index = self.topk(left, right, len(right))
                own = index == torch.arange(len(right), device=self.device)[:, None]
                best = torch.where(own, similarity, -torch.inf).amax(1)  # -inf is not listed
                s_pos[rows][part : part + _PAIRS] = best
            s_pos[rows][spoiled] = torch.nan
        return s_pos

    def scan(self, start: int, stop: int, s_pos: Tensor | None, advance: Advance) -> MinedNegatives:
        """The best of corpus rows `start` to `stop`."""
        shape = len(self.queries), self.k
        found = MinedNegatives(
            torch.full(shape, -torch.inf, device=self.device),
            torch.full(shape, -1, device=self.device),
        )
        limit = self.limit(s_pos)
        step = min(self.options.chunk or self.chunk(), stop - start)
        buffer = torch.empty(step, self.corpus.columns, device=self.device)
        for first in range(start, stop, step or 1):
            bank = buffer[: min(step, stop - first)]
            spoiled = self.corpus.read(first, first + len(bank), bank)
            holds = torch.where(spoiled, EMPTY, -1) if spoiled.any() else None
            for rows in self.blocks():
                query, nothing = self.read_queries(rows)
                near = None if limit is None else limit[rows]
                hidden = self.hidden(rows, first, len(bank), holds)
                similarity, index = topk_within(self.topk, query, bank, self.k, near, hidden)
                if s_pos is not None:
                    nothing |= s_pos[rows].isnan()
                missing = nothing[:, None] | (index < 0)
                lists = (
                    (found.similarity[rows], similarity.masked_fill(missing, -torch.inf)),
                    (found.index[rows], (index + first).masked_fill(missing, -1)),
                )
                found.similarity[rows], found.index[rows] = merge_topk(*map(torch.stack, lists))
                advance(len(bank) * len(query) / len(self.queries))
        return found

    def chunk(self) -> int:
        """Corpus rows read at a time where nobody says how many."""
        size = min(max(self.corpus.value.nbytes // 4, _LEAST_BYTES), _MOST_BYTES)
        return max(1, size // (4 * self.corpus.columns))

    def limit(self, s_pos: Tensor | None) -> Tensor | None:
        """The largest similarity (Q,) of a negative; None: there is no limit."""
        o = self.options
        if o.max_similarity is None and o.margin is None:
            return None
        most = torch.inf if o.max_similarity is None else o.max_similarity
        limit = torch.full((len(self.queries),), most, device=self.device)
        return limit if o.margin is None else torch.minimum(limit, s_pos + o.margin)

    def hidden(self, rows: slice, first: int, size: int, holds: Tensor | None) -> Exclude:
        """What those queries must not see of corpus rows `first` to first + size: a list that is as
        long as the longest one has to be here."""
        hidden = NOTHING
        if self.hides is not None:
            slots = self.hides[rows] - first
            slots = slots.masked_fill((slots < 0) | (slots >= size), -1)
            if longest := int((slots >= 0).sum(1).max()):
                slots = slots.sort(1, descending=True).values[:, :longest]
                hidden = hidden._replace(slots=slots.to(self.device))
        if holds is not None:
            ids = ops.known(None, rows.stop - rows.start, self.device)
            hidden = hidden._replace(ids=ids, bank_ids=holds)
        return hidden

    def topk(self, query: Tensor, bank: Tensor, k: int, hidden: Exclude = NOTHING) -> Lists:
        count = torch.full((), len(bank), device=self.device)
        return ops.run_topk(query, bank, k, count, hidden, self.backend)
