"""The CUDA kernels themselves, run on the CPU by an emulation of the instructions they use.

It checks layouts, descriptors, swizzles, barrier phases, waits, masks, noise and merge. It knows
nothing of time, of the memory model or of how a GPU schedules: for those see test_cuda.py.
"""

import ctypes
import math
import shutil

import cuda_emulation as emulation
import pytest
import torch
from conftest import problem

from psm_kernels import functional, noise
from psm_kernels.ops import BankPass, bank_pass, reference
from psm_kernels.ops.affine import weighted_pass

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="the emulation needs g++")

LOW = [torch.float32, torch.bfloat16, torch.float16]
# P in the second product has the bank's dtype: a rounding of 2^-9 per weight in bf16.
MEAN_ATOL = {torch.float32: 2e-6, torch.float16: 2e-4, torch.bfloat16: 2e-3}
PATHS = [
    pytest.param(path, dtype, id=f"{path}-{str(dtype)[6:]}")
    for path in ("sm80", "sm90")
    for dtype in LOW
    if (path, dtype) != ("sm90", torch.float32)
]
SEED, OFFSET = 0x1234567_89ABCDEF, 3 << 33 | 5


def arguments(query, key, bank, s_pos, **settings):
    settings = {
        "count": len(bank),
        "temperature": 0.2,
        "selection": "bernoulli",
        "a": 2.0,
        "b": -0.1,
        "topk": 5,
        "rng_state": torch.tensor([SEED, OFFSET]),
        "row_offset": 0,
        "col_offset": 0,
        **settings,
    }
    settings["count"] = torch.tensor(settings["count"])
    key = key.to(bank.dtype) if settings["topk"] else None
    count = settings.pop("count")
    return query.to(bank.dtype), key, bank, count, s_pos, *settings.values()


def both(problem, path, cut=None, **settings) -> tuple[BankPass, BankPass]:
    """The emulated kernels, and the reference in float64 on the same rounded inputs."""
    args = arguments(*problem, **settings)
    got = BankPass(*emulation.bank_pass(*args, path=path, **(cut or {})))
    wide = [x.double() if torch.is_tensor(x) and x.is_floating_point() else x for x in args]
    return got, BankPass(*reference.bank_pass(*wide))


def assert_agree(got: BankPass, want: BankPass, dtype):
    def close(name, **tolerance):
        a, b = getattr(got, name).double(), getattr(want, name).double()
        torch.testing.assert_close(a, b, **tolerance, msg=lambda m: f"{name}: {m}")

    close("neg_count", atol=1e-3, rtol=1e-5)
    close("neg_lse", atol=1e-5, rtol=1e-5)
    close("neg_sq_lse", atol=2e-5, rtol=1e-5)
    close("neg_mean", atol=MEAN_ATOL[dtype], rtol=1e-4)
    close("topk_sim", atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize(("path", "dtype"), PATHS)
@pytest.mark.parametrize("selection", ["bernoulli", "expected", "all"])
@pytest.mark.parametrize(
    ("batch", "size", "dim", "topk", "cut"),
    [
        (1, 1, 8, 1, {"splits": 1, "grid": 1}),
        (3, 63, 24, 5, {"splits": 2, "grid": 5}),
        (3, 700, 64, 20, {"splits": 4, "grid": 3}),
        (130, 150, 128, 0, {"splits": 1, "grid": 1}),
        (5, 530, 200, 5, {"splits": 3, "grid": 1, "cell_log2": 7}),
        (2, 270, 256, 300, {"splits": 1, "grid": 1}),
        (20, 97, 72, 7, {"splits": 7, "grid": 2, "cell_log2": 8}),
    ],
)
def test_odd_sizes(path, dtype, batch, size, dim, topk, cut, selection):
    count = max(1, size - size // 3)
    query, key, bank, s_pos = problem(batch, size, dim, dtype=dtype)
    bank[count:] = torch.nan
    got, want = both(
        (query, key, bank, s_pos), path, cut, count=count, selection=selection, topk=topk
    )
    assert_agree(got, want, dtype)
    assert torch.equal(got.topk_index >= 0, want.topk_index >= 0)


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("dim", [1, 20, 33, 250])
def test_rows_that_are_not_aligned(dtype, dim):
    got, want = both(problem(3, 140, dim, dtype=dtype), "sm80")
    assert_agree(got, want, dtype)


@pytest.mark.parametrize(("path", "dtype"), PATHS)
def test_exact_products_give_the_same_masks_and_indices(path, dtype):
    query, key, bank, s_pos = problem(9, 1500, 64, dtype=dtype, few_bits=True)
    bank[700:720] = bank[10:30]  # duplicates: ties go to the smaller slot
    for a in (0.0, 8.0, 1e30):
        got, want = both((query, key, bank, s_pos), path, a=a, b=0.0, topk=20)
        assert torch.equal(got.neg_count, want.neg_count.float())
        assert torch.equal(got.topk_index, want.topk_index)
        assert torch.equal(got.topk_sim, want.topk_sim.float())


@pytest.mark.parametrize(("path", "dtype"), PATHS)
def test_masks_do_not_depend_on_how_the_bank_is_cut(path, dtype):
    """A shard that starts anywhere draws the noise of its global slots."""
    query, key, bank, s_pos = problem(4, 400, 64, dtype=dtype, few_bits=True)
    whole = both((query, key, bank, s_pos), path, row_offset=7)[0]
    counts = torch.zeros(4)
    for start, end in ((0, 37), (37, 150), (150, 400)):
        shard = bank[start:end].contiguous()
        got, want = both((query, key, shard, s_pos), path, row_offset=7, col_offset=start)
        assert torch.equal(got.topk_index, want.topk_index)
        counts += got.neg_count
    assert torch.equal(counts, whole.neg_count)


@pytest.mark.parametrize(("path", "dtype"), PATHS)
def test_the_cut_of_the_work_changes_nothing_but_rounding(path, dtype):
    one = both(problem(20, 500, 64, dtype=dtype), path, {"splits": 1, "grid": 1})[0]
    for cut in ({"splits": 2, "grid": 3}, {"splits": 5, "grid": 2}, {"splits": 40, "grid": 7}):
        other = both(problem(20, 500, 64, dtype=dtype), path, cut)[0]
        assert torch.equal(one.topk_index, other.topk_index)
        assert torch.equal(one.topk_sim, other.topk_sim)
        assert torch.equal(one.neg_count, other.neg_count)
        torch.testing.assert_close(one.neg_lse, other.neg_lse, atol=2e-6, rtol=1e-6)


@pytest.mark.parametrize(("path", "dtype"), PATHS)
@pytest.mark.parametrize("sign", [-1.0, 1.0])
def test_cold_temperature_with_equal_similarities(path, dtype, sign):
    row = torch.full((16,), 0.25)
    query, bank = row.expand(3, 16).clone(), (sign * row).expand(500, 16).contiguous().to(dtype)
    cold = {"temperature": 0.02, "selection": "all"}
    got, _ = both((query, query, bank, torch.ones(3)), path, **cold)
    assert got.neg_lse.tolist() == pytest.approx([sign * 50 + math.log(500)] * 3, rel=1e-6)
    assert got.neg_sq_lse.tolist() == pytest.approx([sign * 100 + math.log(500)] * 3, rel=1e-6)
    torch.testing.assert_close(got.neg_mean, bank[:3].float(), atol=1e-3, rtol=1e-3)
    assert got.topk_index.tolist() == [[0, 1, 2, 3, 4]] * 3


@pytest.mark.parametrize(("path", "dtype"), PATHS)
@pytest.mark.parametrize("selection", ["bernoulli", "expected"])
def test_what_is_kept_may_be_far_below_the_largest_logit(path, dtype, selection):
    """exp(-1/0.01) beside exp(1/0.01): only the kept one may set the shift."""
    row = torch.zeros(64)
    row[0] = 1.0
    signs = torch.where(torch.arange(600) % 3 == 0, 1.0, -1.0)
    bank = (signs[:, None] * row).to(dtype)
    got, want = both(
        (row[None], row[None], bank, torch.ones(1)),
        path,
        temperature=0.01,
        a=500.0,
        b=-2.0,  # the peak is at s = -1
        selection=selection,
    )
    assert_agree(got, want, dtype)
    assert got.neg_lse.item() == pytest.approx(-100 + math.log(400), abs=0.2)


@pytest.mark.parametrize(("path", "dtype"), PATHS)
def test_growing_logits_move_the_shift(path, dtype):
    row = torch.zeros(64)
    row[0] = 1.0
    bank = (torch.linspace(-1, 1, 1000)[:, None] * row).to(dtype)
    problem = (row.repeat(2, 1), row.repeat(2, 1), bank, torch.ones(2))
    got, want = both(problem, path, {"splits": 1}, temperature=0.01, selection="all")
    assert_agree(got, want, dtype)


@pytest.mark.parametrize(("path", "dtype"), PATHS)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_bad_row_spoils_itself_alone(path, dtype, bad):
    query, key, bank, s_pos = problem(20, 300, 64, dtype=dtype)
    good = both((query, key, bank, s_pos), path)[0]
    query, key = query.clone(), key.clone()
    query[3, 5], key[6, 7] = bad, bad
    got = both((query, key, bank, s_pos), path)[0]
    assert got.neg_lse[3].isnan()
    assert got.neg_mean[3].isnan().all()
    assert ((got.topk_index >= -1) & (got.topk_index < 300)).all()
    other = torch.tensor([row for row in range(20) if row not in (3, 6)])
    for a, b in zip(got, good, strict=True):
        assert torch.equal(a[other], b[other])


@pytest.mark.parametrize(("path", "dtype"), PATHS)
def test_an_empty_bank(path, dtype):
    query, key, bank, s_pos = problem(3, 40, 64, dtype=dtype)
    got, _ = both((query, key, torch.full_like(bank, torch.nan), s_pos), path, count=0)
    assert (got.neg_lse == -math.inf).all()
    assert (got.neg_sq_lse == -math.inf).all()
    assert not got.neg_mean.any()
    assert not got.neg_count.any()
    assert (got.topk_sim == -math.inf).all()
    assert (got.topk_index == -1).all()


@pytest.mark.parametrize(("path", "dtype"), PATHS)
@pytest.mark.parametrize(
    ("size", "dim", "k", "cut"),
    [
        (300, 504, 7, {"splits": 2, "grid": 1}),
        (90, 64, 200, {"cell_log2": 2}),
        (1300, 40, 20, {"splits": 3, "grid": 2, "cell_log2": 3}),
        (900, 128, 5, {"cell_log2": 8}),
    ],
)
def test_bank_topk(path, dtype, size, dim, k, cut):
    _, key, bank, s_pos = problem(5, size, dim, dtype=dtype)
    bank[size - 10 :] = torch.nan
    args = arguments(key, key, bank, s_pos, topk=k, selection="all", count=size - 10)
    got = BankPass(*emulation.bank_pass(*args, sums=False, path=path, **cut))
    want_sim, want_index = reference.bank_topk(
        args[1].double(), bank.double(), k, torch.tensor(size - 10)
    )
    torch.testing.assert_close(got.topk_sim.double(), want_sim, atol=1e-6, rtol=1e-5)
    assert (got.topk_index == want_index).float().mean() > 0.99


def test_bank_topk_of_odd_widths():
    _, key, bank, s_pos = problem(5, 257, 33, dtype=torch.bfloat16)
    args = arguments(key, key, bank, s_pos, topk=20, selection="all")
    got = BankPass(*emulation.bank_pass(*args, sums=False))
    want = reference.bank_topk(args[1].double(), bank.double(), 20, torch.tensor(257))
    torch.testing.assert_close(got.topk_sim.double(), want[0], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(("path", "dtype"), PATHS)
@pytest.mark.parametrize("cell_log2", [2, 3, 6, 7])
def test_bank_topk_gives_ties_to_the_smaller_slot(path, dtype, cell_log2):
    """Most slots tie, so that the last cells chosen matter; few bits: all products are exact."""
    _, key, bank, s_pos = problem(4, 700, 64, dtype=dtype, few_bits=True)
    bank[:] = bank[torch.arange(700) * 7 % 9]
    for k in (1, 3, 6, 50):
        args = arguments(key, key, bank, s_pos, topk=k, selection="all")
        cut = {"splits": 2, "grid": 1, "cell_log2": cell_log2}
        got = BankPass(*emulation.bank_pass(*args, sums=False, path=path, **cut))
        want = reference.bank_topk(args[1].double(), bank.double(), k, torch.tensor(700))
        assert torch.equal(got.topk_index, want[1])


@pytest.mark.parametrize(
    ("slots", "dim", "k", "group", "log2"),
    [
        (50_000, 512, 5, 4, 3),
        (50_000, 512, 200, 4, 2),
        (100, 512, 200, 4, 2),
        (65_536, 128, 5, 1, 6),
        (2**20, 128, 5, 1, 6),
        (2**20 + 1, 128, 5, 1, 7),
        (2**31 - 4096, 64, 1, 4, 17),
    ],
)
def test_the_size_of_cells(slots, dim, k, group, log2):
    library, size = emulation.library(), ctypes.c_int64
    assert library.psm_cell_log2(size(k), size(dim), size(slots), group) == log2
    for tile in (64, 128, 256):
        room = library.psm_room_for_cells(size(slots), tile, log2, group)
        assert room << log2 >= slots
        assert room % group == 0
        assert room <= 2**14 + 256


@pytest.mark.parametrize(("path", "dtype"), PATHS)
def test_a_bad_slot_hides_no_other(path, dtype):
    """As an integer, NaN is the largest of all; the cell maxima must not take it."""
    query, key, bank, s_pos = problem(4, 300, 64, dtype=dtype, few_bits=True)
    bank[70], bank[75] = torch.nan, torch.inf
    got, _ = both((query, key, bank, s_pos), path, topk=300)
    good = torch.tensor([slot for slot in range(300) if slot not in (70, 75)])
    for row in got.topk_index:
        assert torch.isin(good, row).all()


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize(
    ("batch", "size", "dim", "count"), [(3, 63, 24, 40), (70, 300, 128, 300), (2, 130, 250, 0)]
)
def test_weighted_pass(batch, size, dim, count, dtype):
    query, _, bank, s_pos = problem(batch, size, dim, dtype=dtype)
    draw = torch.Generator().manual_seed(1)
    rows = {name: torch.rand(batch, generator=draw) - 0.3 for name in ("alpha", "beta", "gamma")}
    query = query.to(dtype).float()
    rows["top"] = (query @ bank.float().T).max(1).values
    rows["cap"] = torch.full((batch,), 0.2)
    rho = torch.rand(size, generator=draw) - 0.5
    want = weighted_pass(
        query.double(),
        bank.double(),
        count,
        temperature=0.3,
        **{name: value.double() for name, value in rows.items()},
        rho=rho.double(),
        backend="reference",
    )
    bank[count:], rho[count:] = torch.nan, torch.nan
    args = arguments(query, query, bank, s_pos, topk=0, count=count, temperature=0.3)
    args = (*args[:6], "affine", *args[7:])
    affine = torch.stack(tuple(rows.values()))
    got = BankPass(*emulation.bank_pass(*args, affine=affine, rho=rho))
    torch.testing.assert_close(got.neg_lse.double(), want.log_sum, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(got.neg_count.double(), want.weight, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(got.neg_mean.double(), want.mean, atol=MEAN_ATOL[dtype], rtol=1e-4)


def test_noise_words_are_the_canonical_ones():
    """With the shared first rounds, through the thread and register that own each slot."""
    rows, slots = 19, 64
    words = torch.zeros(rows, slots, dtype=torch.int64)
    for row_offset, col_offset in ((0, 0), (2**32 - 3, 16 * (2**27 - 1)), (11, 2**33)):
        emulation.call(
            "psm_noise",
            *(ctypes.c_int64(x) for x in (SEED, OFFSET, row_offset, col_offset)),
            rows,
            slots,
            ctypes.c_void_p(words.data_ptr()),
        )
        state = torch.tensor([SEED, OFFSET])
        want = noise.philox_block(row_offset, rows, slots, col_offset, state)
        assert torch.equal(words, want)


def test_philox_known_answers():
    words = torch.zeros(1, 16, dtype=torch.int64)
    zero = [ctypes.c_int64(0)] * 4
    emulation.call("psm_noise", *zero, 1, 16, ctypes.c_void_p(words.data_ptr()))
    known = [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]  # Random123
    assert words[0, [0, 1, 8, 9]].tolist() == known


@pytest.mark.parametrize("key_dtype", LOW, ids=str)
@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_enqueue(key_dtype, dtype):
    from psm_kernels.memory_bank import MemoryBank

    want = MemoryBank(10, 20, dtype=dtype)
    got = MemoryBank(10, 20, dtype=dtype)
    for batch in (3, 4, 1, 10, 23, 5):
        keys = torch.randn(batch, 20).to(key_dtype)
        if batch > 4:
            keys[1], keys[2, 3], keys[3, 0] = 0.0, math.nan, math.inf
        labels = torch.arange(batch) if batch != 4 else None
        want.enqueue(keys, labels)
        emulation.enqueue(keys, labels, got)
        assert torch.equal(got.ptr, want.ptr)
        assert torch.equal(got.count, want.count)
        assert torch.equal(got.labels, want.labels)
        torch.testing.assert_close(got.bank, want.bank, atol=0, rtol=2.0**-8)


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("selection", ["bernoulli", "expected", "all"])
@pytest.mark.parametrize("soft_weights", ["attention", "uniform", "binary"])
@pytest.mark.parametrize(("size", "topk"), [(60, 5), (3, 3), (60, 0), (0, 5)])
def test_finish_is_the_loss_and_its_gradient(size, topk, soft_weights, selection, dtype):
    """Against functional.psm_loss under autograd."""
    query, key, bank, s_pos = problem(4, max(size, 10), 20, dtype=dtype)
    rng_state = torch.tensor([SEED, OFFSET])
    settings = {
        "temperature": 0.3,
        "selection": selection,
        "a": 2.0,
        "b": -0.1,
        "row_offset": 3,
    }
    rest = {"soft_weights": soft_weights, "weight_temperature": 0.7, "hard_weight": 0.6}
    count = torch.tensor(size)
    swept = bank_pass(
        query, key, bank, count, s_pos, **settings, topk=topk, rng_state=rng_state,
        backend="reference",
    )  # fmt: skip
    loss, grad, (kept, mean, var) = emulation.finish(
        query, key, bank, s_pos, rng_state, swept, **settings, **rest
    )
    leaf = query.clone().requires_grad_()
    want = functional.psm_loss(
        leaf, key, bank, count=count, topk=topk, rng_state=rng_state, reduction="none",
        return_stats=True, backend="reference", **settings, **rest,
    )  # fmt: skip
    want.loss.sum().backward()
    torch.testing.assert_close(loss, want.loss.detach(), atol=2e-5, rtol=1e-5)
    along = (grad * query).sum(1, keepdim=True) * query  # psm_loss normalizes its query
    torch.testing.assert_close(grad - along, leaf.grad, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(kept, want.stats.kept_count, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(mean, want.stats.grad_mean, atol=1e-5, rtol=1e-3)
    torch.testing.assert_close(var, want.stats.grad_var, atol=1e-5, rtol=1e-2)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("skip_copy_wait", "ended with copies"),
        ("wrong_parity", "deadlock"),
        ("no_proxy_fence", "no proxy fence"),
        ("divergent_shuffle", "different instructions"),
        ("double_arrival", "more arrivals"),
    ],
)
def test_the_emulation_finds_faults(fault, message):
    with pytest.raises(RuntimeError, match=message):
        emulation.call("psm_fault", fault.encode())
