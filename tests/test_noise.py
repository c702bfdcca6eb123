import pytest
import torch

from psm_kernels import noise

ONES = 0xFFFFFFFF


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [  # Random123's kat_vectors for philox4x32 with 10 rounds
        ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([ONES] * 4, [ONES] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_known_answers(counter, key, words):
    got = noise.philox4x32(tuple(torch.tensor(counter)), tuple(torch.tensor(key)))
    assert [int(w) for w in got] == words


def test_golden_words(golden):
    batch, count = golden.words.shape
    rows = torch.arange(batch) + golden.p["row_offset"]
    words = noise.philox_words(rows, torch.arange(count), golden.rng_state)
    assert torch.equal(words, golden.words)


@pytest.mark.parametrize("state", [[0, 0], [7, 1], [-5, 3], [2**62 + 3, 2**40 + 1]])
@pytest.mark.parametrize(("slot", "slots"), [(0, 64), (5, 1), (13, 40), (2**33 + 11, 20)])
def test_block_equals_words(state, slot, slots):
    rng_state, row = torch.tensor(state), 2**31 - 2  # rows and counters cross 2^31
    words = noise.philox_words(
        torch.arange(row, row + 4), torch.arange(slot, slot + slots), rng_state
    )
    assert torch.equal(noise.philox_block(row, 4, slots, slot, rng_state), words)
    assert words.min() >= 0
    assert words.max() <= ONES


def test_words_broadcast_unless_both_are_vectors():
    rows, slots = torch.arange(3)[:, None], torch.tensor([[0, 5], [9, 1], [17, 2]])
    rng_state = torch.tensor([3, 4])
    pairs = noise.philox_words(rows, slots, rng_state)
    full = noise.philox_words(torch.arange(3), torch.arange(20), rng_state)
    assert torch.equal(pairs, full.gather(1, slots))


def test_keep_frequency_matches_p():
    """Chi-square of 40 bins of p against kept counts: 38 degrees of freedom, 99.99 % below 80."""
    rng_state = torch.tensor([1, 2])
    words = noise.philox_block(0, 64, 4096, 0, rng_state)
    p = torch.linspace(0.01, 0.99, 40).repeat(64 * 4096 // 40 + 1)[: 64 * 4096].view(64, 4096)
    similarity = torch.sqrt(-p.log())  # a = 1, s_pos = b = 0 gives back p
    kept = noise.keep_weight(similarity, torch.zeros(64, 1), words, "bernoulli", 1.0, 0.0)
    chi = 0.0
    for value in p.unique():
        members = p == value
        n, expected = members.sum(), members.sum() * value
        chi += float((kept[members].sum() - expected) ** 2 / (expected * (1 - value)))
        assert n > 6000
    assert chi < 80


def test_p_is_capped_so_that_a_zero_is_not_certain():
    s = torch.zeros(1, 3)
    assert noise.keep_probability(s, s, 0.0, 0.0).tolist() == [[pytest.approx(0.999)] * 3]


def test_streams_have_other_words():
    rng_state = torch.tensor([5, 6])
    states = [noise.stream_state(rng_state, stream) for stream in noise.Stream]
    assert [int(state[1] - 6) >> 32 for state in states] == [0, 1, 2, 3, 4]
    words = [noise.philox_block(0, 8, 64, 0, state) for state in states]
    assert not (words[0] == words[1]).any()
    assert not (words[1] == words[2]).any()
