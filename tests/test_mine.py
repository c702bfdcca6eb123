"""mine_negatives against plain numpy in fp64, over chunks, blocks, files and ranks."""

import subprocess
import sys
import textwrap
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import WORLDS

import psm_kernels
from psm_kernels import mine_negatives, noise
from psm_kernels.mine import MiningOptions, limits, search
from psm_kernels.ops import bank_topk

# --- the same in numpy ---------------------------------------------------------------------------


def similarities(queries, corpus, normalize=True):
    queries, corpus = (np.asarray(x, np.float64) for x in (queries, corpus))
    if normalize:
        queries, corpus = (
            x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-300)
            for x in (queries, corpus)
        )
    return queries @ corpus.T


def mined_by_numpy(
    queries, corpus, k, *, positives=None, exclude=None, max_similarity=None, margin=None,
    sample=None, num=None, a=0.5, b=0.0, seed=0, normalize=True,
):  # fmt: skip
    every = similarities(queries, corpus, normalize)
    size = k if sample is None else num
    similarity = np.full((len(every), size), -np.inf)
    index = np.full((len(every), size), -1)
    state = noise.stream_state(torch.tensor([seed, 0]), noise.Stream.MINE)
    for i, row in enumerate(every):
        hidden = set() if exclude is None else {int(j) for j in exclude[i]}
        if positives is not None:
            hidden.add(int(positives[i]))
        able = [j for j in range(len(row)) if j not in hidden]
        if max_similarity is not None:
            able = [j for j in able if row[j] <= max_similarity]
        if margin is not None:
            able = [j for j in able if row[j] <= row[positives[i]] + margin]
        best = sorted(able, key=lambda j: (-row[j], j))[:k]
        if sample is not None:
            words = noise.philox_words(torch.tensor([i]), torch.arange(len(row)), state)[0]
            u = (words.numpy() + 0.5) / 2**32
            weight = -a * (row - row[positives[i]] - b) ** 2
            best = sorted(best, key=lambda j: -(weight[j] - np.log(-np.log(u[j]))))[:num]
        similarity[i, : len(best)], index[i, : len(best)] = row[best], best
    return similarity, index


def assert_same(found, similarity, index):
    assert found.similarity.dtype == torch.float32
    assert found.index.dtype == torch.int64
    np.testing.assert_array_equal(found.index.numpy(), index)
    np.testing.assert_array_equal(found.similarity.numpy(), similarity)


def few_bits(rng, rows, dim):
    """Four entries +-1/2, hence unit length, in all of two to the dim ways: products are exact and
    many are equal. Times powers of two, which normalizing takes out again without rounding."""
    x = np.zeros((rows, dim))
    for row in x:
        row[rng.choice(dim, 4, replace=False)] = rng.choice((-0.5, 0.5), 4)
    return x * 2.0 ** rng.integers(-2, 3, (rows, 1))


KINDS = {
    "float16": lambda x: x.astype(np.float16),
    "float32": lambda x: x.astype(np.float32),
    "float64": lambda x: x,
    "big endian": lambda x: x.astype(">f4"),
    "columns first": lambda x: np.asfortranarray(x, np.float32),
    "tensor": lambda x: torch.tensor(x),
    "bfloat16": lambda x: torch.tensor(x, dtype=torch.bfloat16),
    "half tensor": lambda x: torch.tensor(x, dtype=torch.half),
    "carries gradient": lambda x: torch.tensor(x, requires_grad=True),
}
NUMBERS = {
    "int32": lambda x: x.astype(np.int32),
    "int64": lambda x: x,
    "tensor": torch.from_numpy,
    "int32 tensor": lambda x: torch.from_numpy(x).int(),
}


@st.composite
def problems(draw):
    """Arguments of mine_negatives, and those of numpy."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    queries, rows, dim = draw(st.integers(1, 7)), draw(st.integers(1, 40)), draw(st.integers(4, 9))
    corpus = few_bits(rng, rows, dim)
    if draw(st.booleans()):  # fewer different rows than rows
        corpus = corpus[rng.integers(0, max(1, rows // 3), rows)]
    given = {"queries": few_bits(rng, queries, dim), "corpus": corpus, "k": draw(st.integers(1, 9))}
    kinds = draw(st.tuples(st.sampled_from(sorted(KINDS)), st.sampled_from(sorted(KINDS))))
    grid = st.sampled_from([-0.5, -0.25, 0.0, 0.25, 0.5])
    relative = draw(st.sampled_from(["", "margin", "simans", "both"]))
    if relative or draw(st.booleans()):
        given["positives"] = rng.integers(0 if relative else -1, rows, queries)
    if draw(st.booleans()):
        given["exclude"] = rng.integers(-1, rows, (queries, draw(st.integers(0, 12))))
    if draw(st.booleans()):
        given["max_similarity"] = draw(grid)
    if relative in ("margin", "both"):
        given["margin"] = draw(grid)
    if relative in ("simans", "both"):
        given |= {"sample": "simans", "num": draw(st.integers(1, given["k"]))}
        given |= {"a": draw(st.sampled_from([0.0, 0.5, 20.0])), "b": draw(grid)}
        given["seed"] = draw(st.integers(-(2**63), 2**63 - 1))
    given["normalize"] = draw(st.booleans())
    ours = dict(given)
    for name, kind in zip(("queries", "corpus"), kinds, strict=True):
        ours[name] = KINDS[kind](given[name])
    for name in ("positives", "exclude"):
        if name in given:
            ours[name] = NUMBERS[draw(st.sampled_from(sorted(NUMBERS)))](given[name])
    ours["chunk"] = draw(st.none() | st.integers(1, rows + 1))
    inside = {
        "_BLOCK": draw(st.integers(1, 8)),
        "_PAIRS": draw(st.integers(1, 8)),
    }
    return ours, given, inside, draw(st.sampled_from([1, 4, 1024]))


@settings(max_examples=1000, deadline=None)
@given(problems())
def test_a_thousand_cases_of_numpy(problem):
    ours, given, inside, longest = problem
    with mock.patch.multiple(search, **inside), mock.patch.object(limits, "LONGEST", longest):
        found = mine_negatives(**ours)
    assert_same(found, *mined_by_numpy(**given))


@settings(max_examples=60, deadline=None)
@given(problems())
def test_the_oracle_finds_the_same(problem):
    ours, given, inside, longest = problem
    with mock.patch.multiple(search, **inside), mock.patch.object(limits, "LONGEST", longest):
        found = mine_negatives(**ours, backend="reference")
    assert_same(found, *mined_by_numpy(**given))


BACKEND_CASES = {
    "plain": {},
    "limits": {"margin": 0.25, "max_similarity": 0.5, "chunk": 25},
    "lists": {"exclude": np.tile(np.arange(-1, 69), (5, 1)), "chunk": 60},
    "simans": {"sample": "simans", "num": 4, "a": 8.0, "chunk": 33},
}


@pytest.mark.parametrize("case", BACKEND_CASES)
def test_every_backend_finds_what_numpy_finds(backend, case):
    """Also Triton's, where it is interpreted; a list longer than the public operators take."""
    rng, given = np.random.default_rng(5), dict(BACKEND_CASES[case])
    given |= {"queries": few_bits(rng, 5, 8), "corpus": few_bits(rng, 90, 8), "k": 7}
    given["positives"] = rng.integers(0, 90, 5)
    chunk = given.pop("chunk", None)
    found = mine_negatives(**given, chunk=chunk, backend=backend)
    assert_same(found, *mined_by_numpy(**given))


@pytest.mark.parametrize("limit", [{}, {"max_similarity": 0.25}])
def test_as_many_columns_and_as_long_lists_as_kernels_take(limit):
    rng = np.random.default_rng(5)
    corpus = few_bits(rng, 2500, 12).repeat(342, 1)[:, :4096] / 32
    given = {"queries": corpus[:3] * 64, "corpus": corpus, "k": 2048, "normalize": False}
    assert_same(mine_negatives(**given, **limit, chunk=2300), *mined_by_numpy(**given, **limit))


# --- any rows ------------------------------------------------------------------------------------


def random_rows(queries=50, rows=3000, dim=24, seed=0):
    rng = np.random.default_rng(seed)
    corpus = rng.standard_normal((rows, dim)).astype(np.float32)
    corpus[rows // 2 :: 7] = corpus[: len(corpus[rows // 2 :: 7])]  # duplicates, far apart
    return rng.standard_normal((queries, dim)).astype(np.float32), corpus


OPTIONS = {
    "plain": {},
    "margin": {"margin": -0.02},
    "max_similarity": {"max_similarity": -0.1},
    "simans": {"sample": "simans", "num": 5, "a": 50.0, "margin": 0.1, "seed": 3},
}


def with_positives(queries, corpus, option):
    """Each query's positive is near it: limits leave some rows above."""
    positives = np.arange(len(queries)) * 11 + 5
    corpus = corpus.copy()
    corpus[positives] = queries + 2 * corpus[positives]
    return {"queries": queries, "corpus": corpus, "positives": positives, **OPTIONS[option]}


@pytest.mark.parametrize("option", OPTIONS)
def test_random_rows(option):
    given = with_positives(*random_rows(), option)
    found = mine_negatives(**given, k=30)
    similarity, index = mined_by_numpy(**given, k=30)
    np.testing.assert_allclose(found.similarity.numpy(), similarity, atol=1e-6)
    # Copies of a row are equal in fp32, and in fp64 but for the order of additions.
    every = similarities(given["queries"], given["corpus"])
    named = np.take_along_axis(every, found.index.numpy(), 1)
    np.testing.assert_allclose(named, similarity, atol=1e-6)
    assert (found.index.numpy() == index).mean() > 0.9
    assert all(len(set(row)) == len(row) for row in found.index.tolist())
    assert not (found.index.numpy() == given["positives"][:, None]).any()


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize(
    ("chunk", "block"), [(1000, 4096), (999, 7), (64, 50), (1 << 20, 49), (11, 16)]
)
def test_chunks_and_blocks_do_not_matter(option, chunk, block):
    """To the last bit, where a similarity does not depend on what else is in the product: cpp."""
    given = with_positives(*random_rows(), option)
    whole = mine_negatives(**given, k=30, backend="cpp")
    with mock.patch.multiple(search, _BLOCK=block):
        parts = mine_negatives(**given, k=30, chunk=chunk, backend="cpp")
    assert torch.equal(whole.index, parts.index)
    assert torch.equal(whole.similarity, parts.similarity)


@pytest.mark.parametrize("chunk", [1, 2, 3, 10, None])
def test_of_equal_rows_the_smaller_comes_first(chunk):
    queries, corpus = random_rows(3, 1)
    copies, positives = corpus.repeat(10, 0), np.array([1, 0, 9])
    found = mine_negatives(queries, copies, 4, chunk=chunk, positives=positives)
    assert found.index.tolist() == [[0, 2, 3, 4], [1, 2, 3, 4], [0, 1, 2, 3]]
    assert (found.similarity == found.similarity[:, :1]).all()


@pytest.mark.parametrize("k", [1, 100, 700, 2000])
@pytest.mark.parametrize("limit", [0.3, 0.0, -0.9])
def test_a_limit_leaves_the_best_below_it(k, limit):
    """However many are above, and against all similarities of the kernel itself."""
    queries, corpus = (torch.from_numpy(x) for x in random_rows(9))
    unit = [torch.nn.functional.normalize(x) for x in (queries, corpus)]
    similarity, index = bank_topk(*unit, len(corpus))
    found = mine_negatives(*unit, k, max_similarity=limit, normalize=False, chunk=2000)
    for i in range(len(queries)):
        below = similarity[i] <= limit
        wanted = torch.full((k,), -1)
        wanted[: min(k, int(below.sum()))] = index[i][below][:k]
        assert torch.equal(found.index[i], wanted)
    assert (found.similarity[found.index >= 0] <= limit).all()


def test_copies_of_the_positive_are_within_a_margin_of_zero():
    queries, corpus = random_rows(40, 500)
    positives = np.arange(40)
    corpus[100:140] = corpus[:40]
    found = mine_negatives(queries, corpus, 500, positives=positives, margin=0.0)
    assert (found.index == torch.arange(100, 140)[:, None]).any(1).all()
    assert torch.equal(found.index[:, 0], torch.arange(100, 140))


def test_only_short_lists_are_asked_for_again(monkeypatch):
    queries, corpus = random_rows(200, 4000)
    asked, topk = [], search.Search.topk
    monkeypatch.setattr(
        search.Search, "topk",
        lambda self, query, *args: asked.append(len(query)) or topk(self, query, *args),
    )  # fmt: skip
    corpus[:30] = queries[7]  # thirty near copies of one query
    found = mine_negatives(queries, corpus, 20, max_similarity=0.95)
    assert asked == [200, 1, 1]  # of 20, 40 and 80
    assert (found.similarity[7] < 0.95).all()


def test_zeros_and_rows_that_are_not_finite():
    queries, corpus = random_rows(6, 40)
    queries[1], queries[2, 3], corpus[4] = 0, np.nan, 0
    clean = corpus.copy()
    corpus[5, 0], corpus[6, 1], corpus[7, 2] = np.nan, np.inf, -np.inf
    for normalize in (True, False):
        found = mine_negatives(queries, corpus, 50, normalize=normalize, chunk=9)
        wanted = mine_negatives(
            queries, clean, 50, normalize=normalize, exclude=np.tile([5, 6, 7], (6, 1))
        )
        assert found.index[1].tolist() == [j for j in range(40) if j not in (5, 6, 7)] + [-1] * 13
        assert (found.similarity[1, :37] == 0).all()
        assert (found.index[2] == -1).all()
        assert (found.similarity[2] == -torch.inf).all()
        wanted.index[2] = -1
        assert torch.equal(found.index, wanted.index)
        assert (found.similarity[0][found.index[0] == 4] == 0).all()
    # The positive of query 0 is not finite: nothing can be said of a margin.
    positives = np.array([5, 8, 8, 8, 8, 8])
    found = mine_negatives(queries, corpus, 3, positives=positives, margin=0.5)
    assert (found.index[[0, 2]] == -1).all()
    assert (found.index[[1, 3, 4, 5]] >= 0).all()
    found = mine_negatives(queries, corpus, 3, positives=positives)
    assert (found.index[0] >= 0).all()


def test_a_positive_that_is_infinitely_far():
    corpus = np.array([[-1e30, 0.0], [1.0, 0.0], [0.0, 1.0]], np.float32)
    found = mine_negatives(
        corpus[:1] * [[-1, 0]], corpus, 2, positives=np.array([0]), margin=1.0, normalize=False
    )
    assert found.index.tolist() == [[-1, -1]]


def test_inputs_are_left_alone():
    queries, corpus = (torch.from_numpy(x) for x in random_rows(5, 30))
    corpus[3, 3] = torch.nan
    before = queries.clone(), corpus.clone()
    mine_negatives(queries, corpus, 3, normalize=False)
    mine_negatives(queries, corpus, 3)
    assert torch.equal(queries, before[0])
    assert torch.equal(corpus.nan_to_num(9), before[1].nan_to_num(9))


# --- the draw ------------------------------------------------------------------------------------


def test_the_draw_has_the_frequencies_of_its_formula():
    """Four thousand queries alike: the first that is drawn against exp(-a (s - s+ - b)^2), the
    second against what is left of it; chi-square of 7 degrees of freedom, 99.99 % below 30."""
    rows, a, b, number = 9, 30.0, -0.1, 4000
    angle = np.arccos(np.array([0.7, 0.9, 0.8, 0.75, 0.6, 0.5, 0.4, 0.3, 0.2]))  # first: positive
    corpus = np.stack((np.cos(angle), np.sin(angle)), 1)
    queries = np.tile([[1.0, 0.0]], (number, 1))
    found = mine_negatives(
        queries, corpus, 8, positives=np.zeros(number, int), sample="simans", num=8, a=a, b=b
    )
    p = np.exp(-a * (np.cos(angle[1:]) - 0.7 - b) ** 2)
    p /= p.sum()
    first = np.bincount(found.index[:, 0], minlength=rows)[1:]
    assert ((first - number * p) ** 2 / (number * p)).sum() < 30
    then = np.array([sum(p[i] * p[j] / (1 - p[i]) for i in range(8) if i != j) for j in range(8)])
    second = np.bincount(found.index[:, 1], minlength=rows)[1:]
    assert ((second - number * then) ** 2 / (number * then)).sum() < 30
    assert (found.index.sort(1).values == torch.arange(1, 9)).all()  # each once
    other = mine_negatives(
        queries, corpus, 8, positives=np.zeros(number, int), sample="simans", num=8, a=a, b=b,
        seed=1,
    )  # fmt: skip
    assert not torch.equal(found.index, other.index)


def test_any_first_ones_are_a_smaller_sample():
    given = with_positives(*random_rows(), "simans")
    many = mine_negatives(**given, k=30)
    few = mine_negatives(**given | {"num": 2}, k=30)
    assert torch.equal(many.index[:, :2], few.index)


# --- ranks ---------------------------------------------------------------------------------------


def mined_there(at, option, rows):
    given = with_positives(*random_rows(rows=max(rows, 600)), option)
    given["corpus"] = given["corpus"][:rows]
    given["positives"] = given["positives"] % rows
    found = mine_negatives(**given, k=20, chunk=97, process_group=at.group, backend="cpp")
    return found.similarity, found.index


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("rows", [3, 700])  # fewer than ranks, and chunks of unequal size
def test_ranks_have_what_one_process_has(pool, option, rows):
    [(similarity, index)] = pool.run(mined_there, 1, option, rows)
    for world in WORLDS[1:]:
        for found in pool.run(mined_there, world, option, rows):
            assert torch.equal(found[1], index)
            assert torch.equal(found[0], similarity)


def differing(at):
    queries, corpus = random_rows(5, 30)
    mine_negatives(queries, corpus[: 30 - at.rank], 3, process_group=at.group)


def refused_on_one(at):
    queries, corpus = random_rows(5, 30)
    mine_negatives(queries, corpus, 3 - 3 * at.rank, process_group=at.group)


def test_ranks_that_differ_are_refused_on_every_rank(pool):
    for error in pool.refused(differing, 2):
        assert "ValueError: corpus: got [30, 29]" in error
    for error in pool.refused(refused_on_one, 2):
        assert "k: got 0, wanted an integer >= 1" in error


# --- files, memory, progress ---------------------------------------------------------------------


def test_a_memory_map_is_read_in_chunks(tmp_path):
    """In a process that may not allocate as much as the corpus takes."""
    code = textwrap.dedent(
        """
        import resource, sys
        import numpy as np, torch
        from psm_kernels import mine_negatives

        torch.set_num_threads(1)
        corpus = np.load(sys.argv[1], mmap_mode="r")
        queries = np.ones((3, corpus.shape[1]), np.float32)
        mine_negatives(queries, corpus[:5000], 5, chunk=4096)  # loads and compiles what it needs
        with open("/proc/self/status") as status:
            now = 1024 * int(status.read().split("VmData:")[1].split()[0])
        resource.setrlimit(resource.RLIMIT_DATA, (now + (48 << 20),) * 2)
        try:
            np.array(corpus)
        except MemoryError:
            print("does not fit")
        found = mine_negatives(queries, corpus, 5, positives=np.array([7, 8, 9]), chunk=4096)
        print(found.index.tolist())
        """
    )
    rows, dim = 200_000, 256  # 102 MB
    file = np.lib.format.open_memmap(tmp_path / "corpus.npy", "w+", np.float16, (rows, dim))
    file[:] = np.random.default_rng(0).standard_normal((1, dim))
    best = [3, 99_999, 150_000, rows - 2, rows - 1]
    file[best] = 1.0
    file.flush()
    run = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "corpus.npy"],
        capture_output=True, text=True, check=False, timeout=240,
    )  # fmt: skip
    assert run.stdout.splitlines() == ["does not fit", str([best] * 3)], run.stderr


def test_no_more_than_a_chunk_is_read_at_a_time(monkeypatch):
    queries, corpus = random_rows(5, 1000)
    sizes, read = [], search.Source.read

    def noted(self, start, stop, out):
        sizes.append((len(self), stop - start))
        return read(self, start, stop, out)

    monkeypatch.setattr(search.Source, "read", noted)
    mine_negatives(queries, corpus, 3, chunk=300)
    assert [size for rows, size in sizes if rows == 1000] == [300, 300, 300, 100]


@pytest.mark.parametrize(
    ("rows", "wanted"), [(500, 64 << 20), (500_000, 500_000 * 384), (10**8, 256 << 20)]
)
def test_a_chunk_is_a_quarter_of_the_corpus_within_bounds(rows, wanted):
    corpus = np.broadcast_to(np.float32(1), (rows, 384))
    asked = search.Search(corpus[:1], corpus, 5, None, None, MiningOptions(), "auto")
    assert asked.chunk() == wanted // (4 * 384)


def test_the_bar_says_how_fast_and_how_long(capsys):
    pytest.importorskip("tqdm")
    queries, corpus = random_rows(5, 1000)
    mine_negatives(queries, corpus, 3, chunk=300)
    assert capsys.readouterr().err == ""
    mine_negatives(queries, corpus, 3, chunk=300, progress=True)
    shown = capsys.readouterr().err
    assert "mining: 100%" in shown
    assert "1.00k/1.00k" in shown
    assert "row/s]" in shown


def test_a_bar_without_tqdm(monkeypatch):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    queries, corpus = random_rows(5, 10)
    mine_negatives(queries, corpus, 3)
    with pytest.raises(ImportError, match="pip install tqdm"):
        mine_negatives(queries, corpus, 3, progress=True)


# --- bad input -----------------------------------------------------------------------------------

NONE = np.full(5, -1)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"queries": [[1.0, 2.0]]}, "queries: got list, wanted a tensor or a numpy array"),
        ({"queries": np.ones((5, 24), np.int32)}, "queries: got dtype int32, wanted one of float"),
        ({"queries": torch.ones(5, 24, dtype=torch.int32)}, "queries: got dtype torch.int32"),
        ({"queries": np.ones(24)}, r"queries: got shape \(24,\)"),
        ({"queries": np.ones((0, 24))}, r"queries: got shape \(0, 24\)"),
        ({"corpus": np.ones((30, 23))}, r"corpus: got shape \(30, 23\).*\(any, 24\) as queries"),
        ({"corpus": np.ones((30, 24), complex)}, "corpus: got dtype complex128"),
        ({"k": 0}, "k: got 0"),
        ({"k": 2.0}, "k: got 2.0"),
        ({"positives": np.zeros(4, int)}, r"positives: got shape \(4,\), wanted \(5,\)"),
        ({"positives": np.zeros((5, 1), int)}, r"positives: got shape \(5, 1\)"),
        ({"positives": np.zeros(5)}, "positives: got dtype float64, wanted integers"),
        ({"positives": torch.zeros(5)}, "positives: got dtype torch.float32, wanted integers"),
        ({"positives": torch.zeros(5) == 0}, "positives: got dtype torch.bool"),
        ({"positives": [0] * 5}, "positives: got list"),
        ({"positives": np.array([0, 1, 30, 2, 3])}, "positives: got 30 for query 2.*0 to 29"),
        ({"positives": np.array([0, -2, 3, 2, 3])}, "positives: got -2 for query 1"),
        ({"positives": np.array([2**64 - 2] * 5, np.uint64)}, "positives: got -2 for query 0"),
        ({"exclude": np.zeros(5, int)}, r"exclude: got shape \(5,\), wanted \(5, any\)"),
        ({"exclude": np.zeros((4, 2), int)}, r"exclude: got shape \(4, 2\)"),
        ({"exclude": np.full((5, 2), 99)}, "exclude: got 99 for query 0"),
        ({"max_similarity": np.nan}, "max_similarity: got nan"),
        ({"margin": "0"}, "margin: got '0'"),
        ({"margin": -0.1}, "positives: got None.*margin is relative to it"),
        ({"margin": -0.1, "positives": NONE}, "positives: got -1 for query 0.*margin"),
        ({"sample": "simans", "num": 2}, "positives: got None.*sample is relative to it"),
        ({"sample": "simans", "num": 2, "positives": NONE}, "positives: got -1 for query 0"),
        ({"sample": "simans"}, "num: got None"),
        ({"sample": "simans", "num": 4}, r"num: got 4, wanted an integer from 1 to 3 \(k\)"),
        ({"sample": "uniform", "num": 2}, "sample: got 'uniform', wanted one of 'simans'"),
        ({"num": 2}, "num: got 2 without a sample"),
        ({"a": -1.0}, "a: got -1.0"),
        ({"b": np.inf}, "b: got inf"),
        ({"seed": 2**63}, "seed: got"),
        ({"chunk": 0}, "chunk: got 0"),
        ({"normalize": None}, "normalize: got None"),
        ({"backend": "fast"}, "backend: got 'fast'"),
    ],
)
def test_bad_input(change, match):
    queries, corpus = random_rows(5, 30)
    with pytest.raises(ValueError, match=match):
        mine_negatives(**{"queries": queries, "corpus": corpus, "k": 3} | change)


def test_a_setting_that_is_unknown():
    with pytest.raises(TypeError, match="relative_margin"):
        mine_negatives(*random_rows(5, 30), 3, relative_margin=0.95)


def test_it_is_a_public_name():
    assert psm_kernels.mine_negatives is mine_negatives
    assert "mine_negatives" in psm_kernels.__all__
