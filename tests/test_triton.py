"""The triton backend against the reference: natively on a GPU, elsewhere in the interpreter.

Triton reads TRITON_INTERPRET when it is imported, so where there is no GPU a plain `pytest` runs
this file once more, in a process that has it set."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from psm_kernels import ops
from psm_kernels.backends.triton import config
from psm_kernels.options import PSMOptions
from psm_kernels.rows import wide
from psm_kernels.weighted import weighted_pass

pytest.importorskip("triton")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
GOLDEN = sorted(Path(__file__).parent.glob("golden/*.npz"))


# Triton 3.6 with NumPy 2.5, in every loop of a kernel
UNFIT = "only 0-dimensional arrays can be converted to Python scalars"


def interpreted(selected: str, *files: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", "-k", selected]
    command += [str(Path(__file__).with_name(name)) for name in files]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True)


@pytest.mark.skipif(INTERPRETED, reason="this is that process")
def test_everything_below_passes_in_the_interpreter():
    done = interpreted("not cpp", "test_triton.py", "test_psm_step.py")
    if UNFIT in done.stdout:
        pytest.skip(f"this Triton's interpreter does not know this NumPy: {UNFIT}")
    assert done.returncode == 0, done.stdout[-4000:]
    assert "passed" in done.stdout


@pytest.mark.skipif(INTERPRETED, reason="starts that process")
def test_a_choice_of_other_files_in_the_interpreter():
    """Of those files what an interpreter does in a minute; all of them take it ten."""
    names = "0.02 and nearer or copies or lists or spoils or every_backend or sscl"
    names += " or 37-33-True-14.3 or 70-33-20-0.1-True"
    of = "cold ids bank_gradient mine in_batch clip sampled_softmax"
    files = [f"test_{name}.py" for name in of.split()]
    done = interpreted(f"triton and ({names})", *files)
    if UNFIT in done.stdout:
        pytest.skip(f"this Triton's interpreter does not know this NumPy: {UNFIT}")
    assert done.returncode == 0, done.stdout[-4000:]


@pytest.fixture(
    params=[
        pytest.param("cpu", marks=pytest.mark.skipif(not INTERPRETED, reason="native process")),
        pytest.param(
            "cuda",
            marks=[
                pytest.mark.gpu,
                pytest.mark.skipif(
                    INTERPRETED or not torch.cuda.is_available(), reason="needs a GPU"
                ),
            ],
        ),
    ]
)
def device(request) -> str:
    return request.param


def unit(generator, *shape):
    return torch.nn.functional.normalize(torch.randn(*shape, generator=generator), dim=-1)


def problem(device, batch=5, size=150, dim=20, dtype=torch.float32, exact=False, seed=0):
    """query, key, bank, s_pos as the operators take them. `exact`: products with few bits."""
    g = torch.Generator().manual_seed(seed)
    if exact:  # entries 0, +-1/8: every sum of products is exact in fp32, whatever its order
        query, key, bank = (
            torch.randint(-1, 2, (n, dim), generator=g) / 8 for n in (batch, batch, size)
        )
    else:
        query, key, bank = unit(g, batch, dim), unit(g, batch, dim), unit(g, size, dim)
    s_pos = (query * key).sum(1)
    return query.to(device), key.to(device), bank.to(device, dtype), s_pos.to(device)


def both(query, key, bank, s_pos, **settings):
    """The backend's result and the reference's, on one problem."""
    settings = {"temperature": 0.2, "selection": "bernoulli", "a": 2.0, "topk": 5} | settings
    settings.setdefault("count", None)
    if settings["selection"] == "bernoulli":
        settings.setdefault("rng_state", torch.tensor([11, 5], device=bank.device))
    return tuple(
        ops.bank_pass(query, key, bank, s_pos=s_pos, backend=name, **settings)
        for name in ("triton", "reference")
    )


def check(got, want, dtype=torch.float32, exact=False):
    """Sums agree to rounding, masks to the bit; weights of the mean are rounded to the dtype."""
    mean = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 6e-3}[dtype]
    torch.testing.assert_close(got.neg_count, want.neg_count, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got.neg_lse, want.neg_lse, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got.neg_sq_lse, want.neg_sq_lse, rtol=1e-5, atol=2e-5)
    torch.testing.assert_close(got.neg_mean, want.neg_mean, rtol=mean, atol=mean)
    torch.testing.assert_close(got.topk_sim, want.topk_sim, rtol=1e-5, atol=1e-6)
    if exact:
        assert torch.equal(got.topk_sim, want.topk_sim)
        assert torch.equal(got.neg_count, want.neg_count)
    assert torch.equal(got.topk_index, want.topk_index)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("temperature", [0.5, 0.07, 0.02])
def test_slot_bias_and_both_gradients(device, dtype, temperature):
    query, _, bank, s_pos = problem(device, 9, 200, 48, dtype=dtype)
    query = query.to(dtype).float()
    bias = 3 * torch.randn(200, generator=torch.Generator().manual_seed(2)).to(device)
    bias[::7] = -torch.inf
    bias[190:] = torch.nan  # not looked at
    weight = torch.tensor([1.0, -2.0, 0.0, 0.5, 3.0, -0.1, 1.0, 1.0, -1.0], device=device)
    results = []
    for name, rows in (("triton", bank), ("reference", bank.double())):
        q, m = query.to(wide(rows)).requires_grad_(), rows.detach().requires_grad_()
        settings = {"temperature": temperature, "slot_bias": bias, "backend": name}
        got = ops.bank_pass(q, None, m, 190, s_pos, **settings)
        results.append((got, *torch.autograd.grad((got.neg_lse * weight).sum(), (q, m))))
    (got, *gradients), (want, *exact) = results
    torch.testing.assert_close(got.neg_lse.double(), want.neg_lse, rtol=1e-5, atol=2e-5)
    torch.testing.assert_close(got.neg_sq_lse.double(), want.neg_sq_lse, rtol=1e-5, atol=4e-5)
    assert torch.equal(got.neg_count.double(), want.neg_count)
    tolerance = {torch.float32: 3e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}[dtype]
    for a, b in zip(gradients, exact, strict=True):
        assert (a.double() - b).norm() <= tolerance * b.norm()


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_golden_cases(device, path):
    case = np.load(path)
    p = json.loads(str(case["params"]))
    query, key = (
        torch.nn.functional.normalize(torch.tensor(case[name]).double(), dim=1).float().to(device)
        for name in ("query", "key")
    )
    got = ops.bank_pass(
        query, key, torch.tensor(case["bank"]).float().to(device), int(case["count"]),
        torch.tensor(case["s_pos"]).float().to(device),
        temperature=p["tau"], selection=p["selection"], a=p["a"], b=p["b"], topk=p["k"],
        rng_state=torch.tensor([p["seed"], p["offset"]], device=device),
        row_offset=p["row_offset"], backend="triton",
    )  # fmt: skip
    for name in ("neg_lse", "neg_mean", "neg_sq_lse", "neg_count", "topk_sim", "topk_index"):
        want = torch.tensor(case[name])
        have = getattr(got, name).cpu()
        if name.startswith("topk"):
            assert (
                have[:, want.shape[1] :] == (-1 if want.dtype == torch.int64 else -np.inf)
            ).all()
            have = have[:, : want.shape[1]]
        torch.testing.assert_close(have, want.to(have.dtype), rtol=1e-5, atol=2e-6)


# B = 1: less than a row of tensor-core tiles; 70: a second block of rows. K = 1, 63: less than a
# cell; 64: one; 1000: an odd tail and more than one split. D = 8: padded to 16; 20, 200: padded,
# unaligned; 128: not padded; 512: in column blocks.
@pytest.mark.parametrize(
    ("batch", "size", "dim", "topk", "selection", "dtype", "count"),
    [
        (1, 1, 8, 1, "bernoulli", torch.float32, None),
        (3, 63, 20, 5, "expected", torch.float32, 50),
        (70, 150, 64, 1, "bernoulli", torch.bfloat16, None),
        (2, 1000, 20, 20, "bernoulli", torch.bfloat16, 903),
        (3, 1000, 128, 5, "all", torch.float16, 64),
        (3, 150, 200, 0, "bernoulli", torch.float16, 130),
        (2, 150, 200, 3, "expected", torch.bfloat16, None),
        (2, 100, 512, 5, "bernoulli", torch.bfloat16, None),
        (2, 100, 512, 2, "expected", torch.float32, 99),
        (4, 64, 128, 5, "all", torch.float32, None),
        (2, 1000, 8, 40, "all", torch.float32, 999),
    ],
)
def test_matches_reference(device, batch, size, dim, topk, selection, dtype, count):
    tensors = problem(device, batch, size, dim, dtype)
    check(*both(*tensors, topk=topk, selection=selection, count=count), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("col_offset", [0, 70_000_000_005])
def test_exact_products_give_the_same_mask_and_ties(device, dtype, col_offset):
    tensors = problem(device, 9, 700, 16, dtype, exact=True)
    got, want = both(
        *tensors, a=20.0, b=-0.1, topk=6, count=650, row_offset=2**33 + 3, col_offset=col_offset
    )
    check(got, want, dtype, exact=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_number_of_splits_changes_rounding_only(device, dtype, monkeypatch):
    tensors = problem(device, 4, 700, 32, dtype)
    results = []
    for splits in (1, 2, 5, 40):  # 40: more than there are tiles
        monkeypatch.setattr(config, "splits", lambda *args, splits=splits: splits)
        results.append(both(*tensors)[0])
    for other in results[1:]:
        assert torch.equal(other.neg_count, results[0].neg_count)
        assert torch.equal(other.topk_index, results[0].topk_index)
        assert torch.equal(other.topk_sim, results[0].topk_sim)
        check(other, results[0], dtype)


def test_scratch_that_holds_nan_leaks_nowhere(device, monkeypatch):
    tensors = problem(device, 5, 300, 20)
    clean = both(*tensors, count=70)[0]
    empty = torch.empty

    def poisoned(*args, **kwargs):
        out = empty(*args, **kwargs)
        return out.fill_(torch.nan if out.is_floating_point() else torch.iinfo(out.dtype).max)

    monkeypatch.setattr(torch, "empty", poisoned)
    got = both(*tensors, count=70)[0]
    assert all(torch.equal(x, y) for x, y in zip(got, clean, strict=True))  # and repeats bit by bit


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("garbage", [torch.nan, torch.inf])
def test_slots_beyond_count_may_hold_anything(device, dtype, garbage):
    query, key, bank, s_pos = problem(device, 3, 300, 20, dtype)
    want = both(query, key, bank, s_pos, count=130)[0]
    bank[130:] = garbage
    got = both(query, key, bank, s_pos, count=130)[0]
    assert all(torch.equal(x, y) for x, y in zip(got, want, strict=True))


@pytest.mark.parametrize("selection", ["bernoulli", "expected", "all"])
def test_empty_bank_and_nothing_kept(device, selection):
    query, key, bank, s_pos = problem(device, 3, 70, 20)
    got, want = both(query, key, bank, s_pos, count=0, selection=selection)
    check(got, want)
    assert (got.neg_lse == -torch.inf).all()
    assert (got.topk_index == -1).all()
    if selection != "all":
        got, want = both(query, key, bank, s_pos, b=50.0, selection=selection)
        check(got, want)
        assert (got.neg_count == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sign", [-1, 1])
@pytest.mark.parametrize("selection", ["bernoulli", "all"])
def test_extreme_similarities_at_a_low_temperature(device, dtype, sign, selection):
    # exp(2 s / tau) spans 2^+-144 here: neither end fits fp32 without a shift
    query, _, bank, s_pos = problem(device, 3, 200, 16, dtype)
    query = torch.nn.functional.one_hot(torch.arange(3), 16).float().to(device)
    bank[:] = sign * query[0].to(dtype)
    settings = {"temperature": 0.02, "selection": selection, "a": 0.1, "topk": 3}
    check(*both(query, query.clone(), bank, s_pos, **settings), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_that_need_a_shift_beside_rows_that_do_not(device, dtype):
    query, key, bank, s_pos = problem(device, 6, 300, 16, dtype)
    query[1] *= 40  # not unit: exp(s / tau) overflows without a shift
    check(*both(query, key, bank, s_pos, temperature=0.05, selection="all", topk=0), dtype)


@pytest.mark.parametrize("size", [64, 200])
def test_fp16_keeps_its_bits_when_all_weights_are_small(device, size):
    # p from 1e-9 to 1e-5: as they are, the weights p exp(s / tau) are 0 or subnormal in fp16
    tensors = problem(device, 5, size, 32, torch.float16)
    got, want = both(*tensors, selection="expected", a=3.0, b=2.5, temperature=0.5)
    assert (want.neg_count < size * 1e-4).all()
    check(got, want, torch.float16)


@pytest.mark.skipif(not INTERPRETED, reason="runs one program of many")
def test_addresses_beyond_2_to_the_31(device, monkeypatch):
    from triton.runtime import interpreter

    from psm_kernels.backends.triton import mine, sums

    size, dim = 2**24 + 64, 128  # of the 4 GB of addresses the last 128 rows are touched
    bank = torch.empty(size, dim, dtype=torch.bfloat16)
    query, key, tail, s_pos = problem(device, 2, 128, dim, torch.bfloat16)
    bank[-128:] = tail
    splits = 512  # of 513 tiles, but for the last, which has these two

    class Last:
        """The kernel, of whose programs the last alone runs."""

        def __init__(self, module, name):
            self.kernel = getattr(module, name)
            monkeypatch.setattr(module, name, self)

        def __getitem__(self, grid):
            assert grid == (splits,)
            return self.run

        def run(self, *args, **kwargs):
            with monkeypatch.context() as patch:
                last = np.array([splits - 1], dtype=np.int32)
                handle = interpreter.TensorHandle(last, interpreter.tl.int32)
                builder = interpreter.InterpreterBuilder
                patch.setattr(builder, "create_get_program_id", lambda self, axis: handle)
                self.kernel[(1,)](*args, **kwargs)

    Last(mine, "mine_kernel")
    Last(sums, "sum_kernel")
    monkeypatch.setattr(config, "tile", lambda *args: config.Tile(64, 64, 4, 2, 1, dim))
    monkeypatch.setattr(config, "splits", lambda *args: splits)
    monkeypatch.setattr(torch, "empty", torch.zeros)  # what the other programs leave
    # Results are in place already, and copying the bank onto itself would touch all of it.
    monkeypatch.setattr(interpreter.GridExecutor, "_restore_args_dev", lambda *args: None)
    settings = {"selection": "all", "topk": 1, "temperature": 0.2, "exclude_mined": True}
    got = ops.bank_pass(query, bank[-2:], bank, None, s_pos, backend="triton", **settings)
    want = ops.bank_pass(query, bank[-2:], tail, None, s_pos, backend="reference", **settings)
    want = want._replace(topk_index=want.topk_index + size - 128)
    check(got, want, torch.bfloat16)

    from psm_kernels.backends.triton.loss import loss_and_gradient

    options = PSMOptions(0.2, soft_weights="uniform")
    norms = torch.ones(2, 1)
    loss, _ = loss_and_gradient(query, norms, key, bank, s_pos, got, options)
    want = want._replace(topk_index=want.topk_index - size + 128)
    near, _ = loss_and_gradient(query, norms, key, tail, s_pos, want, options)
    torch.testing.assert_close(loss, near)


def test_duplicates_go_to_the_smaller_slot(device):
    query, key, bank, s_pos = problem(device, 4, 400, 16)
    bank[:] = bank[torch.arange(400) % 7]
    got, want = both(query, key, bank, s_pos, topk=20)
    assert torch.equal(got.topk_index, want.topk_index)
    bank.zero_()
    bank[::2] = -0.0  # a zero is a zero
    got = both(query, key, bank, s_pos, topk=20)[0]
    assert torch.equal(got.topk_index.cpu(), torch.arange(20).expand(4, 20))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_broken_row_spoils_itself_alone(device, value):
    query, key, bank, s_pos = problem(device, 5, 200, 20)
    clean = both(query, key, bank, s_pos)[0]
    query[1, 3], key[2, 0], key[3, 1] = value, value, -value
    got = both(query, key, bank, s_pos)[0]
    whole = torch.tensor([0, 4], device=device)
    for x, y in zip(got, clean, strict=True):
        torch.testing.assert_close(x[whole], y[whole], rtol=1e-5, atol=1e-5)
    assert ((got.topk_index >= -1) & (got.topk_index < 200)).all()


def test_inputs_are_not_written(device):
    tensors = problem(device, 5, 100, 20)
    before = [x.clone() for x in tensors]
    both(*tensors)
    assert all(torch.equal(x, y) for x, y in zip(tensors, before, strict=True))


# k = 9: the fewest that are not taken one by one; 300 of 1,100: more than lie in one chunk
@pytest.mark.parametrize(
    ("k", "size", "dim", "count"),
    [
        (1, 70, 20, None),
        (9, 300, 384, 299),
        (20, 500, 20, 431),
        (200, 300, 20, 280),
        (300, 1100, 20, None),
        (5, 90, 4096, 80),
        (30, 150, 1000, 140),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bank_topk(device, k, size, dim, count, dtype):
    query, _, bank, _ = problem(device, 2, size, dim, dtype)
    got = ops.bank_topk(query, bank, k, count=count, backend="triton")
    want = ops.bank_topk(query, bank, k, count=count, backend="reference")
    torch.testing.assert_close(got[0], want[0], rtol=1e-5, atol=1e-6)
    assert torch.equal(got[1], want[1])


@pytest.mark.parametrize("period", [1, 7, 1024])
@pytest.mark.parametrize("k", [9, 300, 2048])
def test_many_that_tie_or_share_a_lane(device, k, period):
    """More than a chunk reach the bound: all 3,000 tie, most do, or the best are 1,024 apart."""
    query, _, bank, _ = problem(device, 2, 3000, 16, exact=True)
    bank[:] = bank[torch.arange(3000) % period]
    got = ops.bank_topk(query, bank, k, count=2990, backend="triton")
    want = ops.bank_topk(query, bank, k, count=2990, backend="reference")
    assert torch.equal(got[0], want[0])
    assert torch.equal(got[1], want[1])


@pytest.mark.parametrize("k", [5, 40])
def test_similarities_that_are_not_numbers(device, k):
    """NaN counts as the largest value; of equal ones, infinities too, the smaller slot is first."""
    query, _, bank, _ = problem(device, 2, 300, 16, exact=True)
    query[:, 0], bank[:, 0] = 1.0, 0.0
    bank[torch.arange(7, 300, 30), 0] = torch.inf
    bank[torch.arange(9, 300, 25), 0] = -torch.inf
    bank[torch.arange(3, 300, 50), 0] = torch.nan
    sim, index = ops.bank_topk(query, bank, k, backend="triton")
    value = query @ bank.T
    rank = torch.where(value.isnan(), torch.inf, value).double()
    rank = torch.where(value.isnan(), 2.0, torch.where(rank.isinf(), rank.sign(), rank / 1e3))
    want = rank.sort(dim=1, descending=True, stable=True).indices[:, :k]
    assert torch.equal(index, want)
    torch.testing.assert_close(sim, value.gather(1, want), equal_nan=True)


@pytest.mark.parametrize(("k", "which"), [(5, ""), (40, "ids, lists")])
def test_rows_take_turns_where_scratch_would_be_large(device, k, which, monkeypatch):
    monkeypatch.setattr(config, "tile", lambda *args: config.Tile(16, 64, 4, 1, 1, 32))
    query, _, bank, _ = problem(device, 18, 400, 20)
    settings = {"count": 390, "backend": "triton"} | hidden(device, query, bank, which)
    largest, new = [0], config.new

    def measured(like, *shape, **kwargs):
        out = new(like, *shape, **kwargs)
        if shape[1] != k:  # scratch, not the result
            largest[0] = max(largest[0], out.nbytes)
        return out

    monkeypatch.setattr(config, "new", measured)
    want, whole = ops.bank_topk(query, bank, k, **settings), largest[0]
    monkeypatch.setattr(config, "TURN", whole * 8 // 9)
    largest[0] = 0
    got = ops.bank_topk(query, bank, k, **settings)
    assert 0 < largest[0] <= whole * 8 // 9
    assert torch.equal(got[0], want[0])
    assert torch.equal(got[1], want[1])


def test_splits():
    """The fewest that end as early: one wave where the blocks divide it, several where they do
    not; and never more than there are tiles."""
    assert config.splits(8, 1024, 132, 2.4 / 64) == 16  # 1,024 x 65,536 x 256
    assert config.splits(32, 2048, 132, 0.0) == 4
    assert config.splits(100, 512, 132, 0.0) == 5  # 1 would leave 32 of 132 idle
    assert config.splits(1, 10, 132, 0.0) == 10
    assert config.splits(1000, 1, 132, 0.0) == 1


def hidden(device, key, bank, which, seed=3):
    """What rows must not see: lists with each row's best slots, repeated ones, and some that are
    no slots; ids with many copies in bank and batch, unknown ones, and slots that hold nothing."""
    g = torch.Generator().manual_seed(seed)
    (batch, size), best = (len(key), len(bank)), min(3, len(bank))
    slots = torch.randint(-3, size + 3, (batch, 9), generator=g)
    slots[:, :best] = (key.to(bank.dtype).float() @ bank.float().T).topk(best).indices
    slots[:, 4], slots[:, 5], slots[0, 6] = slots[:, 0], 2**62, -(2**63)
    ids = torch.randint(-1, 6, (batch,), generator=g)
    bank_ids = torch.randint(-2, 6, (size,), generator=g) + 2**40 * (torch.arange(size) % 5 == 0)
    settings = {"exclude": slots} if "lists" in which else {}
    if "ids" in which:
        settings |= {"ids": ids, "bank_ids": bank_ids}
    return {name: value.to(device) for name, value in settings.items()}


@pytest.mark.parametrize("selection", ["bernoulli", "expected", "all"])
@pytest.mark.parametrize("which", ["mined", "lists", "lists, mined", "ids", "ids, lists, mined"])
@pytest.mark.parametrize(
    ("batch", "size", "dim", "topk", "dtype", "col_offset"),
    [
        (5, 300, 20, 5, torch.float32, 7),
        (70, 150, 64, 20, torch.bfloat16, 0),
        (3, 70, 200, 3, torch.float16, 33),
        (2, 9, 512, 5, torch.bfloat16, 1),
    ],
)
def test_what_is_hidden(device, batch, size, dim, topk, dtype, col_offset, which, selection):
    query, key, bank, s_pos = problem(device, batch, size, dim, dtype)
    settings = {"topk": topk, "selection": selection, "col_offset": col_offset}
    settings |= {"exclude_mined": "mined" in which, "count": size - 2, "row_offset": 3}
    settings |= hidden(device, key, bank, which)
    check(*both(query, key, bank, s_pos, **settings), dtype)


@pytest.mark.parametrize("chip", ["hopper", "cuda"])
@pytest.mark.skipif(not INTERPRETED, reason="a chip has its own")
def test_many_tiles_and_long_lists(device, chip, monkeypatch):
    """Tiles without listed slots between others, in every split; more listed than there are cells
    at hand; rows whose every slot is hidden."""
    monkeypatch.setattr(config, "chip", lambda device: chip)
    query, key, bank, s_pos = problem(device, 3, 520, 64, torch.bfloat16, exact=True)
    slots = torch.full((3, 600), -1, device=device)
    slots[0, ::5] = torch.arange(400, 520, device=device)
    slots[1, 80:] = torch.arange(520, device=device)
    slots[2, 5] = 340
    exclude = ops.Exclude(slots)
    got, want = both(
        query, key, bank, s_pos, a=20.0, topk=40, exclude=exclude, exclude_mined=True, col_offset=5
    )
    check(got, want, torch.bfloat16, exact=True)
    assert (got.topk_index[1] == -1).all()
    assert got.neg_count[1] == 0
    assert got.neg_lse[1] == -torch.inf


@pytest.mark.parametrize(("dtype", "loose"), [(torch.float32, 1e-3), (torch.bfloat16, 2e-2)])
def test_cold_sums_without_the_rows_that_would_dominate_them(device, dtype, loose):
    """Five slots 0.4 nearer than all others hold nearly all of the sum at tau = 0.02."""
    g = torch.Generator().manual_seed(0)
    sign = torch.randint(0, 2, (4 + 500, 64), generator=g) * 2 - 1
    query, bank = sign[:4] / 8.0, sign[4:] / 8.0  # unit rows, exact in every dtype
    for row in range(4):
        bank[7 * row : 7 * row + 5] = query[row]
        bank[7 * row : 7 * row + 5, :10] *= -1  # similarity 0.69, the others' at most 0.5
    query, bank = query.to(device), bank.to(device, dtype)
    settings = {"temperature": 0.02, "selection": "all", "exclude_mined": True}
    got = both(query, query, bank, torch.ones(4, device=device), **settings)[0]
    want = ops.bank_pass(
        query.double(), query.double(), bank.double(), None, torch.ones(4, device=device).double(),
        topk=5, backend="reference", **settings,
    )  # fmt: skip
    assert torch.equal(got.topk_index, want.topk_index)
    torch.testing.assert_close(got.neg_lse.double(), want.neg_lse, rtol=1e-5, atol=0)
    torch.testing.assert_close(got.neg_mean.double(), want.neg_mean, rtol=loose, atol=loose / 100)


@pytest.mark.parametrize("which", ["lists", "ids", "ids, lists"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bank_topk_does_not_find_what_is_hidden(device, which, dtype):
    query, _, bank, _ = problem(device, 3, 300, 20, dtype)
    got, want = (
        ops.bank_topk(
            query, bank, 20, count=280, backend=name, **hidden(device, query, bank, which)
        )
        for name in ("triton", "reference")
    )
    torch.testing.assert_close(got[0], want[0], rtol=1e-5, atol=1e-6)
    assert torch.equal(got[1], want[1])


def test_limits_are_said(device):
    bank = torch.zeros(4, 4097, device=device)
    with pytest.raises(ValueError, match=r"4096.*4097"):
        ops.bank_topk(bank, bank, 1, backend="triton")
    bank = bank[:, :513].contiguous()
    with pytest.raises(ValueError, match=r"512.*513"):
        ops.bank_pass(bank, bank, bank, None, bank[:, 0], temperature=0.1, backend="triton")
    with pytest.raises(ValueError, match=r"2049.*reference"):
        ops.bank_topk(bank[:, :8], bank[:, :8].contiguous(), 2049, backend="triton")


@pytest.mark.skipif(not INTERPRETED, reason="a chip has its own")
@pytest.mark.parametrize("chip", ["hopper", "hip", "cuda"])
@pytest.mark.parametrize("dim", [40, 200])
def test_the_tiles_of_every_chip(device, chip, dim, monkeypatch):
    monkeypatch.setattr(config, "chip", lambda device: chip)
    check(*both(*problem(device, 3, 200, dim, torch.bfloat16), topk=2), torch.bfloat16)
    query, _, bank, _ = problem(device, 2, 140, dim, torch.bfloat16)  # its last cell ends a tile
    got = ops.bank_topk(query, bank, 3, backend="triton")
    want = ops.bank_topk(query, bank, 3, backend="reference")
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("batch", "size", "dim", "count"), [(1, 1, 8, 1), (35, 130, 20, 99), (3, 600, 200, 600)]
)
@pytest.mark.parametrize("which", ["", "ids, lists"])
def test_weighted_pass(device, batch, size, dim, count, dtype, which):
    query, _, bank, _ = problem(device, batch, size, dim, dtype)
    bank[count:] = torch.nan
    generator = torch.Generator().manual_seed(1)
    rows = (torch.rand(5, batch, generator=generator) - 0.3).to(device)
    names = ("alpha", "beta", "gamma", "top", "cap")
    settings = dict(zip(names, rows, strict=True)) | {"temperature": 0.2}
    settings |= {"rho": torch.rand(size, generator=generator).to(device)}
    unseen = {"exclude": None, "ids": None, "bank_ids": None}
    unseen |= hidden(device, query, bank, which)
    settings["exclude"] = ops.excluded(
        unseen["exclude"], unseen["ids"], unseen["bank_ids"], bank, batch
    )
    got, want = (
        weighted_pass(query, bank, count, backend=name, **settings)
        for name in ("triton", "reference")
    )
    loose = 1e-5 if dtype is torch.float32 else 4e-3  # weights round to the bank's dtype
    for a, b, atol in zip(got, want, (1e-5, loose, 1e-4), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=atol)
