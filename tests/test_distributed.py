"""Banks over 1, 2 and 4 gloo processes against one process with the whole batch and bank.

One pool of four processes serves the file: importing torch takes longer than all the tests. World
sizes below four are groups of its first ranks. Functions whose first argument is `at` run there.
"""

import itertools
import multiprocessing
import os
import queue
import time
from datetime import timedelta
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from psm_kernels import HCLLoss, InfoNCELoss, PSMLoss, SSCLLoss, distributed
from psm_kernels.ops import BankPass, bank_pass
from psm_kernels.training.checkpoint import full_state_dict

DIM, BATCH = 12, 8  # columns; rows of all ranks together
WORLDS = (1, 2, 4)


class At(NamedTuple):
    """Where a function of the pool runs."""

    rank: int
    world: int
    group: object  # None: the default group, of all four

    def own(self, x):
        """This rank's part of a batch."""
        return x.chunk(self.world)[self.rank]


# --- the pool ------------------------------------------------------------------------------------


def serve(rank, size, store, tasks, results):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=20),
    )
    groups = {world: dist.new_group(list(range(world))) for world in range(1, size)}
    groups[size] = None
    while (task := tasks.get()) is not None:
        function, world, args = task
        try:
            result = function(At(rank, world, groups[world]), *args)
            results.put((rank, None, result))
        except Exception as error:
            results.put((rank, f"{type(error).__name__}: {error}", None))
    dist.destroy_process_group()


class Pool:
    def __init__(self, size, folder):
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch", "psm_kernels"])
        self.results = context.Queue()
        self.tasks = [context.Queue() for _ in range(size)]
        store = folder / f"store{time.monotonic_ns()}"
        self.processes = [
            context.Process(target=serve, args=(rank, size, store, task, self.results), daemon=True)
            for rank, task in enumerate(self.tasks)
        ]
        for process in self.processes:
            process.start()

    def outcomes(self, function, world, *args, answers=None, timeout=120):
        """(error or None, result) of each rank; a rank that does not answer fails the test."""
        for task in self.tasks[:world]:
            task.put((function, world, args))
        found, limit = {}, time.monotonic() + timeout
        try:
            for _ in range(world if answers is None else answers):
                rank, error, result = self.results.get(timeout=max(0.1, limit - time.monotonic()))
                found[rank] = (error, result)
        except queue.Empty:
            self.close()
            pytest.fail(f"no answer within {timeout} s from other ranks than {sorted(found)}")
        return [found[rank] for rank in sorted(found)]

    def run(self, function, world, *args):
        """Each rank's result."""
        outcomes = self.outcomes(function, world, *args)
        assert [error for error, _ in outcomes] == [None] * world
        return [result for _, result in outcomes]

    def refused(self, function, world, *args):
        """Each rank's error."""
        errors = [error for error, _ in self.outcomes(function, world, *args)]
        assert None not in errors
        return errors

    def close(self):
        for process in self.processes:
            process.kill()
            process.join()


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    pools = []

    def get():
        if not pools or not all(p.is_alive() for p in pools[-1].processes):
            pools.append(Pool(4, tmp_path_factory.mktemp("pool")))
            pools[-1].outcomes(started, 4, timeout=90)  # importing torch, on a busy machine
        return pools[-1]

    yield get
    for pool in pools:
        pool.close()


def started(at):
    return at.rank


@pytest.fixture
def pool(shared):
    return shared()


# --- data ----------------------------------------------------------------------------------------


def unit(rows, seed, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, DIM, generator=generator, dtype=torch.float64)
    return nn.functional.normalize(x).to(dtype)


def few_bits(rows, seed):
    """Rows with four entries +-1/2: unit length, products exact in any order and dtype."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.zeros(rows, DIM)
    where = torch.rand(rows, DIM, generator=generator).argsort(1)[:, :4]
    signs = torch.randint(0, 2, (rows, 4), generator=generator) - 0.5
    return x.scatter_(1, where, signs)


def filled(count, size, **settings):
    """A loss in one process with `count` of `size` slots filled, and the state to load."""
    criterion = PSMLoss(0.2, (size, DIM), bank_dtype=torch.float64, **settings)
    if count:
        criterion.enqueue(unit(count, seed=7), torch.arange(count) % 3)
    criterion.rng_state.copy_(torch.tensor([5, 11]))
    return criterion


def whole_batch():
    query, key, projection = (unit(BATCH, seed) for seed in (1, 2, 3))
    return query, key, projection, torch.arange(BATCH) % 3


def step(criterion, query, key, projection, labels):
    """Row losses, the gradient of their mean, and statistics, after which keys are enqueued."""
    query = query.clone().requires_grad_()
    projection = projection.clone().requires_grad_()
    out = criterion(query, key, projection=projection, labels=labels, return_stats=True)
    out.loss.mean().backward()
    stats = out.stats
    return {
        "loss": out.loss.detach(),
        "query grad": query.grad,
        "projection grad": torch.zeros_like(query) if projection.grad is None else projection.grad,
        "kept_count": stats.kept_count,
        "grad_mean": stats.grad_mean,
        "contrast_acc": stats.contrast_acc[None],
        "bank_age": stats.bank_age[None],
    }


def joined(results, world):
    """Results of all ranks as one process would give them: gradients of the mean are averaged."""
    whole = {name: torch.cat([r[name] for r in results]) for name in results[0]}
    for name in ("query grad", "projection grad"):
        whole[name] = whole[name] / world
    for name in ("contrast_acc", "bank_age"):
        whole[name] = whole[name].mean(0, keepdim=True)
    return whole


# --- sharded: equal to one process ---------------------------------------------------------------


def sharded_steps(at, size, settings, state, steps):
    criterion = PSMLoss(
        0.2,
        (size, DIM),
        bank_dtype=torch.float64,
        shard_bank=True,
        process_group=at.group,
        **settings,
    )
    criterion.load_state_dict(state)
    batch = [at.own(x) for x in whole_batch()]
    return [step(criterion, *batch) for _ in range(steps)]


@pytest.mark.parametrize("count", [0, 3, 101], ids=["empty", "partly", "full"])
@pytest.mark.parametrize("topk", [0, 5])
@pytest.mark.parametrize("selection", ["bernoulli", "expected", "all"])
@pytest.mark.parametrize("world", WORLDS)
def test_sharded_loss_and_gradient_equal_one_process(pool, world, selection, topk, count):
    """101 slots: no world size divides them. The second step has read the first one's writes,
    which wrap around when the bank is full."""
    settings = {"selection": selection, "topk": topk, "reduction": "none", "b": 0.1, "a": 2.0}
    single = filled(count, 101, **settings)
    state = single.state_dict()
    got = pool.run(sharded_steps, world, 101, settings, state, 2)
    for i, results in enumerate(zip(*got, strict=True)):
        expected = step(single, *whole_batch())
        for name, value in joined(results, world).items():
            tolerance = {"rtol": 1e-10, "atol": 1e-12}
            torch.testing.assert_close(
                value, expected[name], **tolerance, msg=lambda m, n=name, i=i: f"step {i} {n}: {m}"
            )


@pytest.mark.parametrize("settings", [{"soft_weights": "uniform"}, {"soft_weights": "binary"}])
@pytest.mark.parametrize("world", [2, 4])
def test_other_weights(pool, world, settings):
    settings = settings | {"reduction": "none", "hard_weight": 0.5}
    single = filled(60, 64, **settings)
    got = pool.run(sharded_steps, world, 64, settings, single.state_dict(), 1)
    expected = step(single, *whole_batch())
    for name, value in joined([r[0] for r in got], world).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-10, atol=1e-12)


KIN = {
    "info_nce": (InfoNCELoss, {}),
    "hcl": (HCLLoss, {"beta": 0.5}),
    "sscl": (SSCLLoss, {"num_hard": 6}),
}


def kin_steps(at, name, options, state, steps):
    cls, settings = KIN[name]
    criterion = cls(
        0.2, (40, DIM), bank_dtype=torch.float64, process_group=at.group, **settings, **options
    )
    criterion.load_state_dict(state)
    results = []
    for _ in range(steps):
        query, key = (at.own(x) for x in whole_batch()[:2])
        query = query.clone().requires_grad_()
        loss = criterion(query, key)
        loss.backward()
        results.append((loss.detach(), query.grad / at.world))
    return results


@pytest.mark.parametrize("options", [{"shard_bank": True}, {"gather_distributed": True}], ids=str)
@pytest.mark.parametrize("name", KIN)
def test_kin_equal_one_process(pool, name, options):
    cls, settings = KIN[name]
    single = cls(0.2, (40, DIM), bank_dtype=torch.float64, **settings)
    single.enqueue(unit(30, seed=7))
    got = pool.run(kin_steps, 2, name, options, single.state_dict(), 2)
    expected = kin_steps(At(0, 1, None), name, {}, single.state_dict(), 2)
    for ranks, (loss, grad) in zip(zip(*got, strict=True), expected, strict=True):
        torch.testing.assert_close(sum(r[0] for r in ranks) / 2, loss, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(torch.cat([r[1] for r in ranks]), grad, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("options", [{"shard_bank": True}, {"gather_distributed": True}], ids=str)
def test_kin_that_cannot_be_distributed(pool, options):
    errors = pool.refused(kin_without_bank, 2, options)
    assert all("memory_bank_size: got 0" in error for error in errors)


def kin_without_bank(at, options):
    HCLLoss(process_group=at.group, **options)


def sharded_operators(at, query, key, bank, labels, count, settings):
    rows = torch.zeros(-(-len(bank) // at.world) + 1, *bank.shape[1:], dtype=bank.dtype)
    shard = distributed.Shard(rows, len(bank), at.group)
    own = bank[shard.start :][: shard.per_rank]
    rows[: len(own)] = own
    rows[len(own) :] = torch.nan  # neither the scrap row nor slots beyond K may matter
    label_rows = labels.new_full((len(rows),), -7)
    label_rows[: len(own)] = labels[shard.start :][: shard.per_rank]
    query, key = at.own(query), at.own(key)
    found = distributed.bank_pass(
        query,
        key,
        shard,
        count,
        (query * key).sum(1),
        row_offset=at.rank * len(query),
        **settings,
    )
    index = found.topk_index.clamp_min(0)
    label_shard = distributed.Shard(label_rows, len(bank), at.group)
    nearest = distributed.bank_topk(query, shard, 3, count=count)
    return tuple(found), nearest, shard[index], label_shard[index]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize(("size", "count"), [(90, 90), (90, 50), (5, 5), (3, 1)])
def test_mined_slots_rows_and_counts_are_exact(pool, world, dtype, size, count):
    """Exact products, many ties and duplicates: every mask bit and index must agree. Of 3 slots on
    4 ranks the last rank has none; 20 mined exceed most shards, 5 and 3 even the whole bank."""
    query, key, bank = few_bits(BATCH, 1), few_bits(BATCH, 2), few_bits(size, 3).to(dtype)
    bank[size // 2 :] = bank[: size - size // 2].clone()
    labels, count = torch.arange(size) % 5, torch.tensor(count)
    settings = {
        "temperature": 0.1,
        "selection": "bernoulli",
        "topk": 20,
        "rng_state": torch.tensor([3, 4]),
    }
    got = pool.run(sharded_operators, world, query, key, bank, labels, count, settings)
    expected = bank_pass(query, key, bank, count, (query * key).sum(1), **settings)
    whole = BankPass(*(torch.cat(parts) for parts in zip(*(g[0] for g in got), strict=True)))
    for name in ("neg_count", "topk_sim", "topk_index"):
        assert torch.equal(getattr(whole, name), getattr(expected, name)), name
    # Kernels round the softmax to a bfloat16 bank's dtype before the second product.
    loose = {"rtol": 2**-8, "atol": 2**-10} if dtype is torch.bfloat16 else {}
    for name in ("neg_lse", "neg_mean", "neg_sq_lse"):
        torch.testing.assert_close(getattr(whole, name), getattr(expected, name), **loose)
    similarity, index = bank_pass(
        query, query, bank, count, (query * key).sum(1), **settings | {"topk": 3}
    )[4:]
    assert torch.equal(torch.cat([g[1][0] for g in got]), similarity)
    assert torch.equal(torch.cat([g[1][1] for g in got]), index)
    there = expected.topk_index >= 0
    index = expected.topk_index[there]
    assert torch.equal(torch.cat([g[2] for g in got])[there], bank[index])
    assert torch.equal(torch.cat([g[3] for g in got])[there], labels[index])


@pytest.mark.parametrize("cuts", [(0, 40), (0, 16, 17, 40), (0, 0, 33, 40)])
def test_merge_of_any_split_is_the_whole(cuts):
    query, key, bank = unit(6, 1), unit(6, 2), unit(40, 3)
    s_pos, count = (query * key).sum(1), torch.tensor(37)
    settings = {
        "temperature": 0.05,
        "selection": "bernoulli",
        "a": 3.0,
        "topk": 4,
        "rng_state": torch.tensor([3, 4]),
    }
    parts = []
    for start, stop in itertools.pairwise(cuts):
        rows = bank[start:stop] if stop > start else bank[:1]
        held = (count - start).clamp(0, stop - start)
        part = bank_pass(query, key, rows, held, s_pos, col_offset=start, **settings)
        index = torch.where(part.topk_index >= 0, part.topk_index + start, -1)
        parts.append(part._replace(topk_index=index))
    merged = distributed.merge(BankPass(*map(torch.stack, zip(*parts, strict=True))))
    for got, expected in zip(
        merged, bank_pass(query, key, bank, count, s_pos, **settings), strict=True
    ):
        torch.testing.assert_close(got, expected)


def traffic(at, size, topk):
    """Bytes that this rank sends to others in a call without statistics or update."""
    sent = []
    names = ("all_gather_into_tensor", "all_to_all_single")
    originals = {name: getattr(dist, name) for name in names}
    for name, original in originals.items():

        def counted(out, x, *args, name=name, original=original, **kwargs):
            sent.append(x.numel() * x.element_size())
            return original(out, x, *args, **kwargs)

        setattr(dist, name, counted)
    try:
        criterion = PSMLoss(0.2, (size, DIM), topk=topk, shard_bank=True, process_group=at.group)
        own = torch.ones(2, DIM)
        criterion(own, own, update=False)
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)
    return sum(sent)


def test_traffic_does_not_grow_with_the_bank(pool):
    rows, columns = 2 * 4, 4 * DIM  # of all ranks; bytes of a row
    for topk in (0, 5):
        [small, *_] = pool.run(traffic, 4, 64, topk)
        [big, *_] = pool.run(traffic, 4, 6400, topk)
        assert small == big
        result = rows * (columns + 12 + 12 * topk)  # mean, three numbers, similarity and slot
        mined = rows * topk * columns
        # rows of both kinds, then slots: those to leave out, those whose rows are wanted
        own = 2 * (columns * (2 if topk else 1) + 4 + (8 + 8) * topk)
        assert big == result + mined + own + distributed._FACTS_BYTES


def spoiled_step(at, query, key, state):
    criterion = PSMLoss(0.2, (40, DIM), reduction="none", shard_bank=True, process_group=at.group)
    criterion.load_state_dict(state)
    return criterion(at.own(query), at.own(key), update=False).detach()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_bad_row_spoils_itself_alone(pool, value):
    single = PSMLoss(0.2, (40, DIM), reduction="none")
    single.enqueue(unit(40, 7).float())
    query, key = unit(BATCH, 1).float(), unit(BATCH, 2).float()
    query[2], key[5] = value, value
    loss = torch.cat(pool.run(spoiled_step, 4, query, key, single.state_dict()))
    good = torch.tensor([i not in (2, 5) for i in range(BATCH)])
    assert loss[~good].isnan().all()
    torch.testing.assert_close(loss[good], single(query, key, update=False)[good])


# --- training: gradient scale, replicated banks, DDP ---------------------------------------------


def make_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, DIM)).double()


class Whole(nn.Module):
    """A model that holds its loss, as MoCo-like code has it."""

    def __init__(self, criterion):
        super().__init__()
        self.encoder, self.criterion = make_model(), criterion

    def forward(self, x, key, **options):
        return self.criterion(self.encoder(x), key, **options)


def train(at, steps=7, accumulate=1, inside=True, ddp=None, ignore=False, autocast=False, **flags):
    """Losses of each step, final weights, and the whole bank; at=None is one process."""
    settings = {"bank_dtype": torch.float64, "topk": 3, **flags}
    if at is not None:
        settings["process_group"] = at.group
    criterion = PSMLoss(0.2, (21, DIM), **settings)
    whole = Whole(criterion)
    if ignore:
        distributed.ignore_banks_in_ddp(whole if inside else whole.encoder)
    if at is None or ddp is None:
        model = whole
    elif inside:
        model = DistributedDataParallel(whole, process_group=at.group, broadcast_buffers=ddp)
    else:
        encoder = DistributedDataParallel(
            whole.encoder, process_group=at.group, broadcast_buffers=ddp
        )

        def model(x, key, **options):
            return criterion(encoder(x), key, **options)

    optimizer = torch.optim.SGD(whole.encoder.parameters(), 0.5)
    generator = torch.Generator().manual_seed(3)
    losses = []
    for _ in range(steps):
        keys, total = [], 0.0
        for _ in range(accumulate):
            x = torch.randn(BATCH, 6, generator=generator, dtype=torch.float64)
            key = torch.randn(BATCH, DIM, generator=generator, dtype=torch.float64)
            if at is not None:
                x, key = at.own(x), at.own(key)
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                loss = model(x, key, update=None if accumulate == 1 else False)
            (loss / accumulate).backward()
            keys.append(key)
            total += loss.item() / accumulate
        if accumulate > 1:
            criterion.enqueue(torch.cat(keys))
        if at is not None and ddp is None:
            for p in whole.encoder.parameters():
                dist.all_reduce(p.grad, group=at.group)
                p.grad /= at.world
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    state = {name: t.clone() for name, t in full_state_dict(criterion).items()}
    return torch.tensor(losses), list(whole.encoder.state_dict().values()), state


def check_training(results, **options):
    """The mean of the ranks' losses, weights and bank are those of one process."""
    losses, weights, state = train(None, **options)
    torch.testing.assert_close(torch.stack([r[0] for r in results]).mean(0), losses)
    for rank_losses, rank_weights, rank_state in results:
        assert len(rank_losses) == len(losses)
        for got, expected in zip(rank_weights, weights, strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-11)
        for name, value in state.items():
            assert torch.equal(rank_state[name], value), name


@pytest.mark.parametrize("ignore", [False, True], ids=["listed", "ignored"])
@pytest.mark.parametrize("broadcast", [False, True], ids=["own buffers", "broadcast"])
@pytest.mark.parametrize("inside", [False, True], ids=["outside", "inside"])
@pytest.mark.parametrize("flag", ["gather_distributed", "shard_bank"])
def test_ddp_trains_as_one_process(pool, flag, inside, broadcast, ignore):
    """Two ranks, 21 slots, 8 keys a step: the ring wraps, and a batch is cut by a shard's end."""
    options = {"steps": 5, flag: True}
    ddp = {"inside": inside, "ddp": broadcast, "ignore": ignore}
    check_training(pool.run(train_with, 2, options | ddp), steps=5)


@pytest.mark.parametrize("flag", ["gather_distributed", "shard_bank"])
@pytest.mark.parametrize("world", WORLDS)
def test_gradient_mean_is_that_of_the_whole_batch(pool, world, flag):
    check_training(pool.run(train_with, world, {flag: True}))


def train_with(at, options):
    return train(at, **options)


@pytest.mark.parametrize("flag", ["gather_distributed", "shard_bank"])
def test_accumulation_enqueues_once_per_step(pool, flag):
    """The banks of both ranks agree; the order within a step is by rank first, so the reference
    is one process that enqueues in that order."""
    results = pool.run(train_with, 2, {"steps": 2, "accumulate": 2, flag: True})
    for name, value in results[0][2].items():
        assert torch.equal(results[1][2][name], value), name
    generator = torch.Generator().manual_seed(3)
    bank = PSMLoss(0.2, (21, DIM), bank_dtype=torch.float64)
    for _ in range(2):
        keys = []
        for _ in range(2):
            torch.randn(BATCH, 6, generator=generator, dtype=torch.float64)
            keys.append(torch.randn(BATCH, DIM, generator=generator, dtype=torch.float64))
        bank.enqueue(torch.cat([k.chunk(2)[rank] for rank in range(2) for k in keys]))
    assert torch.equal(results[0][2]["memory_bank.bank"], bank.memory_bank.bank)
    assert results[0][2]["memory_bank.count"] == 21


@pytest.mark.parametrize("flag", ["gather_distributed", "shard_bank"])
def test_autocast(pool, flag):
    """Queries come in bfloat16; the exchange and the loss stay in the bank's precision."""
    options = {"steps": 3, "autocast": True, flag: True}
    results = pool.run(train_with, 2, options)
    losses, _, state = train(None, steps=3, autocast=True)
    torch.testing.assert_close(
        torch.stack([r[0] for r in results]).mean(0), losses, rtol=1e-2, atol=1e-2
    )
    for result in results:
        assert torch.equal(result[2]["memory_bank.bank"], state["memory_bank.bank"])


def gather_without_update(at):
    """Calls that do not enqueue exchange nothing: one rank may validate alone."""
    criterion = PSMLoss(0.2, (16, DIM), gather_distributed=True, process_group=at.group)
    criterion(unit(2, 1).float(), unit(2, 2).float())
    criterion.eval()
    return criterion(unit(3, 1).float(), unit(3, 2).float()).item() if at.rank == 0 else None


def test_one_rank_may_validate_a_replicated_bank_alone(pool):
    losses = pool.run(gather_without_update, 2)
    assert losses[0] > 0
    assert losses[1] is None


def neighbors(at, state):
    criterion = PSMLoss(
        0.2,
        (20, DIM),
        negatives="neighbors",
        bank_dtype=torch.float64,
        shard_bank=True,
        process_group=at.group,
    )
    criterion.load_state_dict(state)
    query, key, *_ = whole_batch()
    return criterion(at.own(query), at.own(key), update=False).item()


def test_neighbors_mine_from_all_shards(pool):
    """Their negatives are the rank's own batch, as in the released code."""
    single = filled(20, 20, negatives="neighbors")
    query, key, *_ = whole_batch()
    for rank, loss in enumerate(pool.run(neighbors, 2, single.state_dict())):
        half = slice(4 * rank, 4 * rank + 4)
        expected = single_neighbors(single, query[half], key[half], row_offset=4 * rank)
        assert loss == pytest.approx(expected.item(), rel=1e-10)


def single_neighbors(criterion, query, key, row_offset):
    from psm_kernels.functional import psm_loss

    return psm_loss(
        query,
        key,
        criterion.memory_bank.bank,
        temperature=0.2,
        rng_state=criterion.rng_state,
        row_offset=row_offset,
        **criterion.settings,
    )


# --- checkpoints ---------------------------------------------------------------------------------


def make_sharded(at, size=50):
    return PSMLoss(
        0.2,
        (size, DIM),
        reduction="none",
        bank_dtype=torch.float64,
        shard_bank=True,
        process_group=at.group,
    )


def save_after_steps(at, folder):
    import torch.distributed.checkpoint as dcp

    criterion = make_sharded(at)
    batch = [at.own(x) for x in whole_batch()]
    for _ in range(9):  # 72 keys into 50 slots
        step(criterion, *batch)
    dcp.save({"loss": criterion.state_dict()}, checkpoint_id=folder, process_group=at.group)
    return step(criterion, *batch)


def load_and_step(at, folder, sharded):
    import torch.distributed.checkpoint as dcp

    if sharded:
        criterion = make_sharded(at)
    else:
        criterion = PSMLoss(
            0.2,
            (50, DIM),
            reduction="none",
            bank_dtype=torch.float64,
            gather_distributed=True,
            process_group=at.group,
        )
    state = {"loss": criterion.state_dict()}
    dcp.load(state, checkpoint_id=folder, process_group=at.group)
    criterion.load_state_dict(state["loss"])
    return step(criterion, *[at.own(x) for x in whole_batch()])


@pytest.mark.parametrize("sharded", [True, False], ids=["sharded", "replicated"])
@pytest.mark.parametrize("worlds", [(4, 2), (2, 4), (2, 2), (4, 1)])
def test_distributed_checkpoint_loads_with_another_world_size(pool, tmp_path, worlds, sharded):
    before, after = worlds
    uninterrupted = joined(pool.run(save_after_steps, before, tmp_path), before)
    resumed = joined(pool.run(load_and_step, after, tmp_path, sharded), after)
    for name, value in uninterrupted.items():
        torch.testing.assert_close(resumed[name], value, rtol=1e-10, atol=1e-12, msg=name)
    if before == after and sharded:
        for name, value in uninterrupted.items():
            assert torch.equal(resumed[name], value), name


def copied(at):
    one, two = make_sharded(at), make_sharded(at)
    batch = [at.own(x) for x in whole_batch()]
    for _ in range(9):
        step(one, *batch)
    two.load_state_dict(one.state_dict())
    one, two = step(one, *batch), step(two, *batch)
    return all(torch.equal(one[name], two[name]) for name in one)


def test_a_loaded_shard_goes_on_exactly(pool):
    assert pool.run(copied, 2) == [True, True]


def full_state(at):
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    criterion = make_sharded(at, size=21)
    step(criterion, *[at.own(x) for x in whole_batch()])
    state = get_model_state_dict(criterion, options=StateDictOptions(full_state_dict=True))
    return state, full_state_dict(criterion)


def test_full_state_of_a_sharded_bank_is_that_of_one_process(pool):
    single = filled(0, 21)
    single.rng_state.copy_(torch.tensor([0, 0]))
    single(*whole_batch()[:2], labels=whole_batch()[3])
    for state in itertools.chain(*pool.run(full_state, 2)):
        assert state.keys() == single.state_dict().keys()
        for name, value in single.state_dict().items():
            assert torch.equal(state[name], value), name


def averaged(at):
    tensors = torch.tensor([1.0, at.rank]), torch.tensor(10.0 * at.rank)
    distributed.average(*tensors, group=at.group)
    return [t.tolist() for t in tensors]


@pytest.mark.parametrize("world", WORLDS)
def test_average(pool, world):
    mean = (world - 1) / 2
    assert pool.run(averaged, world) == [[[1.0, mean], 10 * mean]] * world


def bad_state(at, state):
    criterion = make_sharded(at)
    criterion.load_state_dict(state)


def test_a_checkpoint_of_another_size_is_refused(pool):
    errors = pool.refused(bad_state, 2, filled(3, 49).state_dict())
    assert all("(49, 12)" in e and "(50, 12)" in e for e in errors)
    state = filled(3, 50).state_dict()
    del state["memory_bank.bank"]
    assert all("Missing key" in e for e in pool.refused(bad_state, 2, state))


def moves(at):
    bank = make_sharded(at, size=10).memory_bank
    names = [name for name, _ in bank.named_buffers()]
    bank.enqueue(unit(3, 1), torch.arange(3))
    dtype = bank.float().bank.dtype
    bank.reset()
    return names, dtype, bank.count.item(), bank._rows.abs().sum().item(), len(bank.labels)


def test_shards_move_with_the_module_but_are_no_buffers(pool):
    assert pool.run(moves, 2) == [([], torch.float32, 0, 0.0, 10)] * 2


# --- bad input: an error on every rank, no hang --------------------------------------------------


def bad_step(at, flag, change):
    """One step in which rank 1 does what `change` says; then a good one, which must work."""
    size, dtype, kwargs = (16, DIM), torch.float32, {}
    rows, columns, settings = 4, DIM, {}
    if at.rank == 1:
        size = change.get("size", size)
        dtype, rows = change.get("dtype", dtype), change.get("rows", rows)
        columns = change.get("columns", columns)
        settings, kwargs = change.get("settings", {}), change.get("kwargs", {})
    settings = {"temperature": 0.2, flag: True} | settings
    criterion = PSMLoss(memory_bank_size=size, process_group=at.group, **settings)
    before = criterion.rng_state.clone()
    query = torch.ones(rows, columns, dtype=dtype)
    try:
        criterion(query, query, **kwargs)
    except ValueError as error:
        if not change.get("lasting"):
            assert torch.equal(criterion.rng_state, before)
            assert criterion.memory_bank.count == 0
            criterion(torch.ones(4, DIM), torch.ones(4, DIM))
            assert criterion.memory_bank.count == min(16, 4 * at.world)
        return f"refused: {error}"
    return "accepted"


@pytest.mark.parametrize("flag", ["gather_distributed", "shard_bank"])
@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"rows": 3}, "drop_last=True"),
        ({"columns": DIM + 1}, "(any, 12)"),
        ({"columns": 8, "size": (16, 8), "lasting": True}, "dim=8"),
        ({"size": (32, DIM), "lasting": True}, "size=32"),
        ({"dtype": torch.float16}, "dtype"),
        ({"dtype": torch.int64}, "floating"),
        ({"kwargs": {"labels": torch.zeros(4, dtype=torch.int64)}}, "labels given"),
        ({"kwargs": {"labels": torch.zeros(5, dtype=torch.int64)}}, "labels"),
        ({"kwargs": {"projection": torch.ones(3, DIM)}}, "projection"),
        ({"kwargs": {"return_stats": True}}, "return_stats"),
        ({"settings": {"temperature": 0.3}, "lasting": True}, "temperature=0.3"),
        ({"settings": {"seed": 1}, "lasting": True}, "seed"),
    ],
    ids=lambda value: None if isinstance(value, dict) else value,
)
def test_ranks_that_differ_are_refused_on_every_rank(pool, flag, change, words):
    for world in (2, 4):
        for outcome in pool.run(bad_step, world, flag, change):
            assert outcome.startswith("refused: ")
            assert words in outcome


def uneven_enqueue(at, flag):
    criterion = PSMLoss(0.2, (16, DIM), process_group=at.group, **{flag: True})
    criterion.enqueue(torch.ones(4 - at.rank, DIM))


@pytest.mark.parametrize("flag", ["gather_distributed", "shard_bank"])
def test_uneven_enqueue_is_refused(pool, flag):
    for error in pool.refused(uneven_enqueue, 2, flag):
        assert "ValueError: batch size: got [4, 3]" in error
        assert "drop_last=True" in error


def foreign_group(at, flag):
    group = dist.new_group([0, 1])
    criterion = PSMLoss(0.2, (16, DIM), process_group=group, **{flag: True})
    return criterion(torch.ones(4, DIM), torch.ones(4, DIM)).item()


@pytest.mark.parametrize("flag", ["gather_distributed", "shard_bank"])
def test_a_group_without_this_rank_is_refused(pool, flag):
    outcomes = pool.outcomes(foreign_group, 4, flag)
    assert [error for error, _ in outcomes[:2]] == [None, None]
    for rank, (error, _) in enumerate(outcomes[2:], 2):
        assert f"ValueError: process_group: global rank {rank} is not in it" in error


def test_without_a_process_group():
    with pytest.raises(ValueError, match=r"shard_bank.*torchrun.*init_process_group"):
        PSMLoss(0.2, (16, DIM), shard_bank=True)
    alone = PSMLoss(0.2, (16, DIM), gather_distributed=True)
    plain = PSMLoss(0.2, (16, DIM))
    for _ in range(3):
        query, key = unit(5, 1).float(), unit(5, 2).float()
        assert torch.equal(alone(query, key), plain(query, key))
    assert torch.equal(alone.memory_bank.bank, plain.memory_bank.bank)
    with pytest.raises(ValueError, match="process_group: got a group"):
        PSMLoss(0.2, (16, DIM), gather_distributed=True, process_group=object())


def test_one_process_still_compiles_whole():
    alone, plain = (
        PSMLoss(0.2, (16, DIM), backend="reference", gather_distributed=flag)
        for flag in (True, False)
    )
    compiled = torch.compile(alone, fullgraph=True, backend="aot_eager")
    for seed in (1, 2):
        query, key = unit(6, seed).float(), unit(6, seed + 2).float()
        torch.testing.assert_close(compiled(query, key), plain(query, key))


def dying(at, flag):
    criterion = PSMLoss(0.2, (16, DIM), process_group=at.group, **{flag: True})
    for i in range(50):
        if at.rank == 1 and i == 3:
            os._exit(7)
        criterion(torch.ones(4, DIM), torch.ones(4, DIM))


@pytest.mark.parametrize("flag", ["gather_distributed", "shard_bank"])
def test_a_killed_rank_ends_the_others_with_an_error(tmp_path, flag):
    pool = Pool(2, tmp_path)
    try:
        pool.run(started, 2)
        [(error, _)] = pool.outcomes(dying, 2, flag, answers=1, timeout=25)
        assert "RuntimeError" in error
    finally:
        pool.close()


def beside(at):
    """A group that cannot move CPU tensors: facts go through a gloo group of its own."""
    group = dist.new_group([0, 1], backend="cuda:gloo", use_local_synchronization=True)
    distributed.agree(group, lambda: {"batch size": 4})
    assert distributed._cpu_group(group) is distributed._cpu_group(group)
    try:
        distributed.agree(group, lambda: {"batch size": 4 + at.rank})
    except ValueError as error:
        return str(error)


def test_groups_without_cpu_collectives_agree_through_gloo(pool):
    for text in pool.run(beside, 2):
        assert text.startswith("batch size: got [4, 5] on ranks 0 to 1")


def long_refusal(at):
    def facts():
        if at.rank == 0:
            raise ValueError("ü" * 5000)
        return {}

    distributed.agree(at.group, facts)


def test_a_long_message_is_cut(pool):
    first, second = pool.refused(long_refusal, 2)
    assert "ü" * 5000 in first
    assert "rank 0 of 2 refused its input: ü" in second


def test_nothing_is_left_to_ignore():
    whole = Whole(PSMLoss(0.2, (16, DIM)))
    whole._ddp_params_and_buffers_to_ignore = ["encoder.0.bias"]
    assert distributed.ignore_banks_in_ddp(whole) is whole
    assert whole._ddp_params_and_buffers_to_ignore == ["encoder.0.bias"]
