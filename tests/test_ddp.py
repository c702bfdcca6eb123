"""Training over processes: the scale of gradients, replicated banks, DistributedDataParallel."""

import pytest
import torch
import torch.distributed as dist
from ranks import BATCH, DIM, WORLDS, unit
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from psm_kernels import PSMLoss, distributed
from psm_kernels.training.checkpoint import full_state_dict


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


def test_nothing_is_left_to_ignore():
    whole = Whole(PSMLoss(0.2, (16, DIM)))
    whole._ddp_params_and_buffers_to_ignore = ["encoder.0.bias"]
    assert distributed.ignore_banks_in_ddp(whole) is whole
    assert whole._ddp_params_and_buffers_to_ignore == ["encoder.0.bias"]
