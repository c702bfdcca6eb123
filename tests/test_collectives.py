"""What ranks exchange: how much of it, and an error on every rank, no hang, where they differ."""

import itertools
import os

import pytest
import torch
import torch.distributed as dist
from ranks import DIM, WORLDS, Pool, started, unit

from psm_kernels import PSMLoss
from psm_kernels.bank import collectives
from psm_kernels.ops import BankPass, bank_pass


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
    merged = collectives.merge(BankPass(*map(torch.stack, zip(*parts, strict=True))))
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
        assert big == result + mined + own + collectives._SAID_BYTES


def averaged(at):
    tensors = torch.tensor([1.0, at.rank]), torch.tensor(10.0 * at.rank)
    collectives.average(*tensors, group=at.group)
    return [t.tolist() for t in tensors]


@pytest.mark.parametrize("world", WORLDS)
def test_average(pool, world):
    mean = (world - 1) / 2
    assert pool.run(averaged, world) == [[[1.0, mean], 10 * mean]] * world


# --- bad input -----------------------------------------------------------------------------------


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
    """A group that cannot move CPU tensors has a gloo group beside it for what the ranks say."""
    group = dist.new_group([0, 1], backend="cuda:gloo", use_local_synchronization=True)
    collectives.agree(group, lambda: {"batch size": 4})
    assert collectives._cpu_group(group) is collectives._cpu_group(group)
    try:
        collectives.agree(group, lambda: {"batch size": 4 + at.rank})
    except ValueError as error:
        return str(error)


def test_groups_without_cpu_collectives_agree_through_gloo(pool):
    for text in pool.run(beside, 2):
        assert text.startswith("batch size: got [4, 5] on ranks 0 to 1")


def long_refusal(at):
    def say():
        if at.rank == 0:
            raise ValueError("ü" * 5000)
        return {}

    collectives.agree(at.group, say)


def test_a_long_message_is_cut(pool):
    first, second = pool.refused(long_refusal, 2)
    assert "ü" * 5000 in first
    assert "rank 0 of 2 refused its input: ü" in second
