"""kNN against a plain numpy vote, the probe on data whose answer is known, and bad input."""

import numpy as np
import pytest
import torch
from torch import nn

from psm_kernels.evaluate import compare, encode, knn_accuracy, linear_probe


def clusters(rows: int, dim: int = 20, classes: int = 5, noise: float = 1.5, seed: int = 0):
    """Overlapping clusters around fixed centers; rows are not of unit length."""
    centers = torch.randn(classes, dim, generator=torch.Generator().manual_seed(99))
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (rows,), generator=generator)
    return centers[labels] + noise * torch.randn(rows, dim, generator=generator), labels


def knn_numpy(x, y, x_test, y_test, k, temperature) -> float:
    x, x_test = (a.double().numpy() for a in (x, x_test))
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    x_test /= np.linalg.norm(x_test, axis=1, keepdims=True)
    right = 0
    for query, label in zip(x_test, y_test.tolist(), strict=True):
        similarity = x @ query
        votes = np.zeros(int(y.max()) + 1)
        for j in np.argsort(-similarity)[:k]:
            votes[y[j]] += np.exp(similarity[j] / temperature)
        right += int(votes.argmax() == label)
    return right / len(y_test)


@pytest.mark.parametrize(("k", "temperature"), [(1, 0.1), (7, 0.1), (200, 0.1), (20, 1.0)])
def test_knn_equals_the_plain_vote(k, temperature):
    sets = (*clusters(150), *clusters(67, seed=1))  # 200 neighbors of 150 rows: all of them
    got = knn_accuracy(*sets, k=k, temperature=temperature)
    assert got == knn_numpy(*sets, k, temperature)
    assert 0.4 < got < 1.0  # neither trivial nor chance, so that a wrong vote shows


@pytest.mark.parametrize("chunk", [1, 5, 67, 1000])
def test_knn_does_not_depend_on_the_chunk(chunk):
    sets = (*clusters(150), *clusters(67, seed=1))
    assert knn_accuracy(*sets, k=9, chunk=chunk) == knn_accuracy(*sets, k=9)


def test_knn_at_a_temperature_where_exp_overflows():
    sets = (*clusters(150), *clusters(67, seed=1))
    assert knn_accuracy(*sets, k=9, temperature=0.002) == knn_numpy(*sets, 9, 0.002)


def test_knn_leaves_its_input_alone_and_takes_any_float():
    sets = (*clusters(150), *clusters(67, seed=1))
    before = [t.clone() for t in sets]
    wide = [t.double() if t.is_floating_point() else t.int() for t in sets]
    assert knn_accuracy(*sets, k=9) == knn_accuracy(*wide, k=9, num_classes=50)
    assert all(torch.equal(a, b) for a, b in zip(sets, before, strict=True))


@pytest.mark.parametrize("scale", [1e30, 3e-39, 1e-44, 1e300, 1e-310])
@pytest.mark.parametrize("function", [knn_accuracy, linear_probe])
def test_the_scale_of_finite_features_does_not_matter(function, scale):
    x, y, x_test, y_test = *clusters(150), *clusters(67, seed=1)
    wide = torch.float32 if 1e-45 < scale < 1e38 else torch.float64
    # The subnormal ones keep few bits: both sides are rounded as they are.
    x, x_test = ((t.double() * scale).to(wide) for t in (x, x_test))
    truth = (x.double() / scale).float(), y, (x_test.double() / scale).float(), y_test
    options = {"k": 9} if function is knn_accuracy else {}
    got = function(x, y, x_test, y_test, **options)
    assert got == pytest.approx(function(*truth, **options), abs=0.02)
    assert got > 0.4


def test_knn_takes_class_numbers_of_any_size():
    x, y, x_test, y_test = *clusters(150), *clusters(67, seed=1)
    names = torch.tensor([10**12, 3, 10**18, 2**40, 7])
    y_test[0] = 4  # of a class that the training set may lack: never predicted, a miss
    x, y = x[y != 4], y[y != 4]
    wanted = knn_accuracy(x, y, x_test, y_test, k=9)
    assert knn_accuracy(x, names[y], x_test, names[y_test], k=9) == pytest.approx(wanted, abs=0.02)
    assert 0.4 < wanted < 1


def test_linear_probe_learns_what_is_linear():
    sets = (*clusters(400, noise=0.3), *clusters(100, noise=0.3, seed=1))
    assert linear_probe(*sets) == 1.0
    shuffled = (sets[0], sets[1][torch.randperm(400)], *sets[2:])
    assert linear_probe(*shuffled) < 0.6


def test_linear_probe_with_few_labels():
    sets = (*clusters(400), *clusters(200, seed=1))
    few, many = linear_probe(*sets, labels_per_class=3), linear_probe(*sets)
    assert 0.2 < few < many
    assert linear_probe(*sets, labels_per_class=3) == few  # the seed decides the subsets
    assert linear_probe(*sets, labels_per_class=3, seed=1) != few
    assert linear_probe(*sets, labels_per_class=400, draws=1) == pytest.approx(many, abs=0.02)


def test_linear_probe_without_scikit_learn(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "sklearn.linear_model", None)
    with pytest.raises(ImportError, match="pip install scikit-learn"):
        linear_probe(*clusters(10), *clusters(10))


def bad_sets():
    x, y = clusters(30)
    wrong = {
        "test_features: .* wanted .* 20": (x, y, x[:, :19], y),
        "train_features: got .*(30, 20, 1)": (x[..., None], y, x, y),
        "train_features": (x[:0], y[:0], x, y),
        "test_features: got dtype torch.int64": (x, y, x.long(), y),
        "train_labels: got .*29": (x, y[:29], x, y),
        "test_labels: got torch.float32": (x, y, x, y.float()),
        "train_features: got NaN": (x.clone().index_fill_(0, torch.tensor([3]), np.nan), y, x, y),
        "test_labels: got -1": (x, y, x, y - y.min() - 1),
    }
    return [pytest.param(sets, match, id=match) for match, sets in wrong.items()]


@pytest.mark.parametrize(("sets", "match"), bad_sets())
@pytest.mark.parametrize("function", [knn_accuracy, linear_probe])
def test_bad_sets(function, sets, match):
    with pytest.raises(ValueError, match=match.replace("(", r"\(").replace(")", r"\)")):
        function(*sets)


@pytest.mark.parametrize(
    ("function", "options"),
    [
        (knn_accuracy, {"k": 0}),
        (knn_accuracy, {"chunk": 0}),
        (knn_accuracy, {"temperature": 0.0}),
        (knn_accuracy, {"temperature": float("nan")}),
        (knn_accuracy, {"num_classes": 3}),
        (linear_probe, {"labels_per_class": 0}),
        (linear_probe, {"draws": 0}),
        (linear_probe, {"max_iter": 0}),
        (linear_probe, {"regularization": 0.0}),
    ],
)
def test_bad_options(function, options):
    name = {"num_classes": "train_labels"}.get(*options, *options)
    with pytest.raises(ValueError, match=name):
        function(*clusters(30), *clusters(30), **options)


def test_linear_probe_wants_two_classes():
    x, y = clusters(30)
    with pytest.raises(ValueError, match="train_labels"):
        linear_probe(x, y * 0, x, y)


def test_encode():
    module = nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.5))
    x, y = torch.randn(10, 4), torch.arange(10)
    features, labels = encode(module, [(x[:7], y[:7]), (x[7:], y[7:])])
    assert torch.allclose(features, module[0](x), atol=1e-6)  # dropout was off
    assert torch.equal(labels, y)
    assert module.training
    assert not features.requires_grad
    with pytest.raises(ValueError, match="batches"):
        encode(module, [])


def frozen() -> nn.Sequential:
    """In training mode but for its batch norm, as fine-tuning has it."""
    module = nn.Sequential(nn.Linear(20, 4), nn.Sequential(nn.BatchNorm1d(4), nn.Dropout(0.5)))
    module[1][0].eval()
    return module


def modes(module: nn.Module) -> list[bool]:
    return [part.training for part in module.modules()]


@pytest.mark.parametrize("fails", [False, True])
def test_each_part_gets_its_mode_back(fails):
    module = frozen()
    (x, y), test = clusters(40), clusters(30, seed=1)
    before = modes(module)
    if fails:
        with pytest.raises(RuntimeError, match="shapes"):
            encode(module, [(x, y), (x[:, :19], y)])
    else:
        encode(module, [(x, y)])
    assert modes(module) == before
    if fails:
        with pytest.raises(RuntimeError, match="shapes"):
            compare({"a": module}, [(x, y)], [(test[0][:, :19], test[1])], labels_per_class=3)
    else:
        compare({"a": module}, [(x, y)], [test], labels_per_class=3)
    assert modes(module) == before


def test_compare():
    train, test = clusters(150, noise=0.5), clusters(60, noise=0.5, seed=1)
    modules = {"all": nn.Identity(), "nothing": nn.Linear(20, 3, bias=False)}
    nn.init.zeros_(modules["nothing"].weight)
    scores = compare(modules, [train], [test], labels_per_class=3)
    assert list(scores) == ["all", "nothing"]
    knn, linear, few = scores["all"].values()
    assert list(scores["all"]) == ["knn", "linear", "linear_3"]
    assert knn == knn_accuracy(*train, *test)
    assert linear == linear_probe(*train, *test)
    assert few == linear_probe(*train, *test, labels_per_class=3)
    assert all(value > 0.8 for value in scores["all"].values())
    assert all(value < 0.4 for value in scores["nothing"].values())
