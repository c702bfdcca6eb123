"""`mine_negatives`: chunks of the corpus go through `bank_topk`, their lists are merged."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from psm_kernels import checks, noise, ops
from psm_kernels.backends import registry
from psm_kernels.backends.base import EMPTY, NOTHING, Exclude
from psm_kernels.bank.collectives import agree, gather_all, merge_topk, rank_and_world
from psm_kernels.mine.source import Source, corpus_rows
from psm_kernels.options import takes

_CHUNK_BYTES = 64 << 20  # of corpus rows in fp32: memory stays below 1.5 times a float16 file
_BLOCK = 4096  # queries at a time
_PAIRS = 64  # queries whose positives are compared at a time: the rest of the square is waste
_LONGEST = 1024  # list that is asked for where a limit hides what is best


class MinedNegatives(NamedTuple):
    similarity: Tensor  # (Q, n) fp32; missing: -inf
    index: Tensor  # (Q, n) int64 rows of the corpus; missing: -1


@dataclass(frozen=True, kw_only=True)
class MiningOptions:
    """See `mine_negatives`."""

    max_similarity: float | None = None
    margin: float | None = None
    sample: str | None = None
    num: int | None = None
    a: float = 0.5
    b: float = 0.0
    seed: int = 0
    normalize: bool = True
    chunk: int | None = None

    def __post_init__(self):
        for name in ("max_similarity", "margin"):
            if getattr(self, name) is not None:
                checks.check_number(name, getattr(self, name))
        if self.sample is None and self.num is not None:
            raise ValueError(f'num: got {self.num!r} without a sample, wanted sample="simans"')
        if self.sample is not None:
            checks.check_option("sample", self.sample, ("simans",))
            checks.check_int("num", self.num, 1)
        checks.check_number("a", self.a, least=0)
        checks.check_number("b", self.b)
        checks.check_int("seed", self.seed, -(2**63), 2**63 - 1)
        checks.check_option("normalize", self.normalize, (False, True))
        if self.chunk is not None:
            checks.check_int("chunk", self.chunk, 1)

    @property
    def relative(self) -> str | None:
        """The setting that wants every query's positive."""
        return "margin" if self.margin is not None else self.sample and "sample"


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
            (seed, query, row): chunks, ranks and the machine do not matter.
        num: how many to draw, at most k.
        a, b: width and place of the peak. Cosines lie close together: for a = 0.5 on logits at
            temperature t take a = 0.5 / t^2.
        seed: of the draw.
        normalize: compare unit rows; else the rows as they are, by their inner product.
        chunk: corpus rows read at a time; None for 64 MB of them in fp32.
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
    return search.run(process_group, progress)


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

    def run(self, group: dist.ProcessGroup | None, progress: bool) -> MinedNegatives:
        rank, world = rank_and_world(group)
        part = [len(self.corpus) * r // world for r in (rank, rank + 1)]
        with _bar(part[1] - part[0], progress and rank == 0) as advance:
            s_pos = self.positive_similarity() if self.options.relative else None
            found = self.scan(*part, s_pos, advance)
        for rows in self.blocks() if world > 1 else ():
            everyones = gather_all((found.similarity[rows], found.index[rows]), group)
            lists = (x.unflatten(0, (world, -1)) for x in everyones)
            found.similarity[rows], found.index[rows] = merge_topk(*lists)
        return found if self.options.sample is None else self.draw(found, s_pos)

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
                s_pos[rows][part : part + _PAIRS] = similarity[own]
            s_pos[rows][spoiled] = torch.nan
        return s_pos

    def scan(
        self, start: int, stop: int, s_pos: Tensor | None, advance: Callable[[float], object]
    ) -> MinedNegatives:
        """The best of corpus rows `start` to `stop`."""
        shape, o = (len(self.queries), self.k), self.options
        found = MinedNegatives(
            torch.full(shape, -torch.inf, device=self.device),
            torch.full(shape, -1, device=self.device),
        )
        limit = self.limit(s_pos)
        step = min(o.chunk or max(1, _CHUNK_BYTES // (4 * self.corpus.columns)), stop - start)
        buffer = torch.empty(step, self.corpus.columns, device=self.device)
        for first in range(start, stop, step or 1):
            bank = buffer[: min(step, stop - first)]
            spoiled = self.corpus.read(first, first + len(bank), bank)
            holds = torch.where(spoiled, EMPTY, -1) if spoiled.any() else None
            for rows in self.blocks():
                query, nothing = self.read_queries(rows)
                most = None if limit is None else limit[rows]
                hidden = self.hidden(rows, first, len(bank), holds)
                similarity, index = self.allowed(query, bank, most, hidden)
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

    def limit(self, s_pos: Tensor | None) -> Tensor | None:
        """The largest similarity (Q,) of a negative; None: there is no limit."""
        o, limit = self.options, None
        if o.margin is not None:
            limit = s_pos + o.margin
        if o.max_similarity is not None:
            most = torch.full((len(self.queries),), o.max_similarity, device=self.device)
            limit = most if limit is None else torch.minimum(limit, most)
        return limit

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

    def topk(
        self, query: Tensor, bank: Tensor, k: int, hidden: Exclude = NOTHING
    ) -> tuple[Tensor, Tensor]:
        count = torch.full((), len(bank), device=self.device)
        return ops.run_topk(query, bank, k, count, hidden, self.backend)

    def allowed(
        self, query: Tensor, bank: Tensor, limit: Tensor | None, hidden: Exclude, asked: int = 0
    ) -> tuple[Tensor, Tensor]:
        """The k best slots of a bank with similarity <= limit (B,), from lists of `asked`."""
        k = self.k
        if limit is None:
            return self.topk(query, bank, k, hidden)
        asked = asked or k
        similarity, index = self.topk(query, bank, asked, hidden)
        above = (similarity > limit[:, None]).sum(1)  # they come first
        short = (above + k > asked) & (similarity[:, -1] > -torch.inf)  # more may come behind
        short &= asked < len(bank)
        columns = above[:, None] + torch.arange(k, device=self.device)
        beyond = columns >= asked
        columns = columns.clamp_max(asked - 1)
        similarity = similarity.gather(1, columns).masked_fill(beyond, -torch.inf)
        index = index.gather(1, columns).masked_fill(beyond, -1)
        rows = short.nonzero()[:, 0]
        if len(rows):
            query, limit, hidden = query[rows], limit[rows], _of_rows(hidden, rows)
            if 2 * asked <= _LONGEST:
                again = self.allowed(query, bank, limit, hidden, 2 * asked)
            else:
                again = self.allowed_by_halves(query, bank, limit, hidden, asked)
            similarity[rows], index[rows] = again
        return similarity, index

    def allowed_by_halves(
        self, query: Tensor, bank: Tensor, limit: Tensor, hidden: Exclude, asked: int
    ) -> tuple[Tensor, Tensor]:
        """Of a bank that no list of `asked` holds whole: both halves have slots."""
        middle, halves = len(bank) // 2, []
        for start, stop in ((0, middle), (middle, len(bank))):
            of_half = _of_slots(hidden, start, stop)
            similarity, index = self.allowed(query, bank[start:stop], limit, of_half, asked)
            halves.append((similarity, torch.where(index < 0, -1, index + start)))
        return merge_topk(*map(torch.stack, zip(*halves, strict=True)))

    def draw(self, found: MinedNegatives, s_pos: Tensor) -> MinedNegatives:
        """`num` of each row, without replacement: the largest of log weight + Gumbel noise."""
        o = self.options
        state = torch.tensor([o.seed, 0], device=self.device)
        state = noise.stream_state(state, noise.Stream.MINE)
        drawn = [found.similarity[:, : o.num].clone(), found.index[:, : o.num].clone()]
        for rows in self.blocks():
            similarity, index = (x[rows] for x in found)
            row = torch.arange(rows.start, rows.stop, device=self.device)[:, None]
            words = noise.philox_words(row, index.clamp_min(0), state)
            uniform = (words.double() + 0.5) / 2.0**32  # never 0 or 1
            distance = similarity.double() - s_pos[rows, None].double() - o.b
            key = -o.a * distance.square() - torch.log(-torch.log(uniform))
            key = key.masked_fill(index < 0, -torch.inf)
            order = key.sort(dim=1, descending=True, stable=True).indices[:, : o.num]
            drawn[0][rows], drawn[1][rows] = similarity.gather(1, order), index.gather(1, order)
        return MinedNegatives(*drawn)


def _of_rows(hidden: Exclude, rows: Tensor) -> Exclude:
    slots, ids = (None if x is None else x[rows] for x in hidden[:2])
    return hidden if hidden is NOTHING else Exclude(slots, ids, hidden.bank_ids)


def _of_slots(hidden: Exclude, start: int, stop: int) -> Exclude:
    if hidden is NOTHING:
        return hidden
    slots = None if hidden.slots is None else hidden.slots - start
    bank_ids = None if hidden.bank_ids is None else hidden.bank_ids[start:stop]
    return Exclude(slots, hidden.ids, bank_ids)


@contextlib.contextmanager
def _bar(rows: int, shown: bool) -> Iterator[Callable[[float], object]]:
    if not shown:
        yield lambda rows: None
        return
    try:
        from tqdm import tqdm
    except ImportError as error:
        raise ImportError("progress: tqdm is not installed: pip install tqdm") from error
    with tqdm(total=rows, desc="mining", unit="row", unit_scale=True) as bar:
        yield bar.update
