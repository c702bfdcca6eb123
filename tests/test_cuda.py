"""The cuda backend on a GPU: the matrix of test_cuda_host.py natively, streams, graphs, devices.

"native" tests run the kernels that this GPU gets, those of sm_90a on a Hopper; all others, and what
has no such name, run those of sm_80, so that a hang of one leaves the results of the other."""

import functools

import cold
import pytest
import torch
from conftest import problem
from cuda_cases import (
    LOW,
    MEAN_ATOL,
    STATE,
    arguments,
    assert_agree,
    exact_rows,
    hidden,
    step_in_float64,
    widened,
)

from psm_kernels import MemoryBank, noise
from psm_kernels.backends.base import NOTHING, BankPass, Exclude
from psm_kernels.backends.cuda import Cuda
from psm_kernels.backends.reference import Reference
from psm_kernels.options import PSMOptions
from psm_kernels.weighted import weighted_pass

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture(autouse=True)
def built():
    if reason := Cuda().unavailable():
        pytest.fail(reason)


each_path = pytest.mark.parametrize("force_sm80", [True, False], ids=["sm80", "native"])


def on_device(args, device="cuda"):
    def moved(x):
        if isinstance(x, Exclude):
            return Exclude(*(None if part is None else part.to(device) for part in x))
        return x.to(device) if torch.is_tensor(x) else x

    return [moved(x) for x in args]


def run(args, device="cuda", **flags) -> BankPass:
    return BankPass(*(x.cpu() for x in Cuda(**flags).bank_pass(*on_device(args, device))))


def truth(args) -> BankPass:
    """In float64; on the GPU, for otherwise it takes nearly all of the time."""
    return BankPass(*(x.cpu() for x in Reference().bank_pass(*on_device(widened(args)))))


def rows_of_sure_samples(args) -> torch.Tensor:
    """(B,) whether no sample of the row lies so close to its p that rounding decides it: one of
    some 10 million does, and this file makes 30 million."""
    query, _, bank, count, s_pos, options, _, rng_state = on_device(args)
    if options.selection != "bernoulli":
        return torch.ones(len(query), dtype=torch.bool)
    similarity = query.double() @ bank[:count].double().T
    p = noise.keep_probability(similarity, s_pos.double()[:, None], options.a, options.b)
    words = noise.philox_block(options.row_offset, *p.shape, options.col_offset, rng_state)
    return ((words / 2**32 - p).abs() > 2e-6).all(1).cpu()


@each_path
@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("selection", ["bernoulli", "expected", "all"])
@pytest.mark.parametrize("topk", [0, 5])
@pytest.mark.parametrize("dim", [20, 64, 128, 200, 256])
@pytest.mark.parametrize(("batch", "size"), [(1, 1), (3, 63), (257, 1000), (130, 4097)])
def test_odd_sizes(batch, size, dim, topk, selection, dtype, force_sm80):
    count = max(1, size - size // 3)
    query, key, bank, s_pos = problem(batch, size, dim, dtype=dtype)
    bank[count:] = torch.nan
    args = arguments(query, key, bank, s_pos, selection=selection, topk=topk, count=count)
    got, sure = run(args, force_sm80=force_sm80), rows_of_sure_samples(args)
    assert sure.float().mean() > 0.9
    assert_agree(*(BankPass(*(x[sure] for x in out)) for out in (got, truth(args))), dtype)
    again = run(args, force_sm80=force_sm80)
    assert all(torch.equal(a, b) for a, b in zip(got, again, strict=True))


@each_path
@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("selection", ["bernoulli", "expected", "all"])
@pytest.mark.parametrize("exclude_mined", [False, True])
@pytest.mark.parametrize(("lists", "ids"), [(False, False), (True, False), (False, True)])
@pytest.mark.parametrize("dim", [20, 64, 128, 256])
def test_what_is_hidden(dim, lists, ids, exclude_mined, selection, dtype, force_sm80):
    batch, size, count = 300, 70_000, 69_000
    query, key, bank, s_pos = problem(batch, size, dim, dtype=dtype)
    bank[count:] = torch.nan
    exclude = hidden(batch, size, count, lists=lists, ids=ids)
    settings = {"exclude": exclude, "exclude_mined": exclude_mined, "col_offset": 21}
    args = arguments(query, key, bank, s_pos, selection=selection, count=count, **settings)
    got, sure = run(args, force_sm80=force_sm80), rows_of_sure_samples(args)
    assert sure.float().mean() > 0.5
    assert_agree(*(BankPass(*(x[sure] for x in out)) for out in (got, truth(args))), dtype)
    again = run(args, force_sm80=force_sm80)
    assert all(torch.equal(a, b) for a, b in zip(got, again, strict=True))


@each_path
@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_exact_products_give_the_same_masks_and_indices(dtype, force_sm80):
    query, key, bank, s_pos = problem(9, 1500, 64, dtype=dtype, few_bits=True)
    bank[700:720] = bank[10:30]
    for a in (0.0, 0.5, 1e30):
        for col_offset in (0, 37):
            args = arguments(query, key, bank, s_pos, a=a, b=0.0, topk=20, col_offset=col_offset)
            got, want = run(args, force_sm80=force_sm80), truth(args)
            assert torch.equal(got.neg_count, want.neg_count.float())
            assert torch.equal(got.topk_index, want.topk_index)
            assert torch.equal(got.topk_sim, want.topk_sim.float())


@each_path
@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize(("size", "dim", "k"), [(3000, 504, 7), (90, 64, 200), (5000, 512, 200)])
def test_bank_topk(dtype, size, dim, k, force_sm80):
    _, key, bank, _ = problem(140, size, dim, dtype=dtype)
    bank[size - 10 :] = torch.nan
    key, count = key.to(dtype), torch.tensor(size - 10)
    sim, index = Cuda(force_sm80=force_sm80).bank_topk(*on_device((key, bank, k, count)))
    want_sim, want_index = Reference().bank_topk(key.double(), bank.double(), k, count)
    torch.testing.assert_close(sim.cpu().double(), want_sim, atol=1e-6, rtol=1e-5)
    assert (index.cpu() == want_index).float().mean() > 0.99


@each_path
def test_bank_topk_takes_many_rows_in_chunks(force_sm80):
    """Cell maxima of 16,000 rows take more than the 128 MB of a chunk."""
    _, key, bank, _ = problem(16_000, 17_000, 8, dtype=torch.bfloat16, few_bits=True)
    key, count = key.bfloat16(), torch.tensor(17_000)
    _, index = Cuda(force_sm80=force_sm80).bank_topk(*on_device((key, bank, 200, count)))
    some = torch.tensor([0, 127, 128, 15_700, 15_800, 15_999])
    want = Reference().bank_topk(key[some].double(), bank.double(), 200, count)[1]
    assert torch.equal(index.cpu()[some], want)


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize(
    ("batch", "size", "dim", "count"), [(3, 63, 24, 40), (70, 5000, 128, 5000), (2, 130, 250, 0)]
)
@pytest.mark.parametrize("hides", [False, True])
def test_weighted_pass(hides, batch, size, dim, count, dtype):
    query, _, bank, _ = problem(batch, size, dim, dtype=dtype)
    random = torch.Generator().manual_seed(1)
    affine, rho = torch.rand(5, batch, generator=random) - 0.3, torch.rand(size, generator=random)
    affine[3] = (query.to(dtype).float() @ bank.float().T).max(1).values
    exclude = hidden(batch, size, count) if hides else NOTHING
    args = (query.to(dtype), bank, torch.tensor(count), 0.3, affine, rho, exclude)
    names = ("alpha", "beta", "gamma", "top", "cap")
    want = weighted_pass(
        args[0].double(), bank.double(), count, temperature=0.3, rho=rho.double(),
        exclude=exclude, **dict(zip(names, affine.double(), strict=True)), backend="reference",
    )  # fmt: skip
    got = [x.cpu().double() for x in Cuda().weighted_pass(*on_device(args))]
    mean = MEAN_ATOL[dtype]
    for a, b, atol in zip(got, want, (1e-5, mean, 1e-4), strict=True):
        torch.testing.assert_close(a, b, atol=atol, rtol=1e-4)


@each_path
@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_streams_and_graphs_see_current_inputs(dtype, force_sm80):
    settings = {"exclude": hidden(70, 3000, 3000), "exclude_mined": True}
    args = on_device(arguments(*problem(70, 3000, 128, dtype=dtype), **settings))
    run_pass = functools.partial(Cuda(force_sm80=force_sm80).bank_pass, *args)
    want = run_pass()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        got = run_pass()
    torch.cuda.current_stream().wait_stream(stream)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run_pass()
    query, count, rng_state = args[0], args[3], args[7]
    for step in range(3):
        query.copy_(query.roll(1, 0))
        count.sub_(100)
        rng_state[1] += step
        graph.replay()
        want = run_pass()
        assert all(torch.equal(a, b) for a, b in zip(captured, want, strict=True))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one device")
@each_path
def test_the_device_of_the_bank_is_used(force_sm80):
    args = arguments(*problem(5, 500, 64, dtype=torch.bfloat16))
    with torch.cuda.device(0):
        first, second = (run(args, f"cuda:{i}", force_sm80=force_sm80) for i in range(2))
        assert torch.cuda.current_device() == 0
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("key_dtype", [*LOW, torch.float64], ids=str)
@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_enqueue(key_dtype, dtype):
    want, got = (MemoryBank(1000, 72, dtype=dtype, device="cuda") for _ in range(2))
    for batch in (3, 400, 998, 2500):
        keys = torch.randn(batch, 72, device="cuda").to(key_dtype)
        keys[1] = torch.nan
        labels = torch.arange(batch, device="cuda")
        want.enqueue(keys, labels)
        got.enqueue(keys, labels, backend="cuda")
        assert torch.equal(got.ptr, want.ptr)
        assert torch.equal(got.count, want.count)
        assert torch.equal(got.labels, want.labels)
        rtol = max(torch.finfo(dtype).eps, 1e-6)  # one rounding of the bank's dtype
        torch.testing.assert_close(got.bank, want.bank, atol=0, rtol=rtol)


@each_path
@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("selection", ["bernoulli", "expected", "all"])
@pytest.mark.parametrize("soft_weights", ["attention", "uniform", "binary"])
@pytest.mark.parametrize("topk", [0, 5])
def test_psm_step(topk, soft_weights, selection, dtype, force_sm80):
    """Of rows that are exact in every dtype; also captured in a graph, which sees new queries."""
    query, key, bank = exact_rows(300, 2000, dtype=dtype)
    settings = {
        "temperature": 0.3, "selection": selection, "a": 2.0, "b": -0.1, "topk": topk,
        "soft_weights": soft_weights, "weight_temperature": 0.7, "hard_weight": 0.6,
    }  # fmt: skip
    args = on_device((query, key, bank, torch.tensor(1900)))
    rest = (PSMOptions(reduction="none", **settings), NOTHING, STATE.cuda(), 7)
    run_step = functools.partial(Cuda(force_sm80=force_sm80).psm_step, *args, *rest)
    got = run_step()
    want = step_in_float64(query, key, bank, count=1900, row_offset=7, **settings)
    cold.assert_step(got, want, dtype)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run_step()
    args[0].copy_(args[0].roll(1, 0))
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured, run_step(), strict=True))


@each_path
def test_memory_does_not_grow_with_batch_times_bank(force_sm80):
    settings = {"exclude": hidden(256, 1 << 20, 1 << 20), "exclude_mined": True}
    args = on_device(arguments(*problem(256, 1 << 20, 64, dtype=torch.bfloat16), **settings))
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    Cuda(force_sm80=force_sm80).bank_pass(*args)
    assert torch.cuda.max_memory_allocated() - before < 64 << 20  # B x K fp32 would be 1 GB
