"""Checkpoints of a divided bank: other world sizes, other forms, other dtypes."""

import itertools

import pytest
import torch
from ranks import DIM, filled, joined, step, unit, whole_batch

from psm_kernels import PSMLoss
from psm_kernels.training.checkpoint import full_state_dict


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
