"""How good are frozen features: weighted k-nearest-neighbors and a linear probe."""

from collections.abc import Iterable, Mapping

import torch
from torch import nn
from torch.nn import functional as F

from psm_kernels import checks
from psm_kernels.ops import bank_topk


@torch.no_grad()
def encode(
    module: nn.Module,
    batches: Iterable[tuple[torch.Tensor, torch.Tensor]],
    device: torch.device | str = "cpu",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Outputs of a module in evaluation mode; the mode of each part is restored afterwards.

    Args:
        module: maps images (B, ...) to features (B, D).
        batches: of (images, labels (B,)), such as a DataLoader.
        device: where the module is.

    Returns:
        features (N, D) in fp32 and labels (N,), on the device.

    Raises:
        ValueError: no batches.
    """
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    features, targets = [], []
    try:
        for images, labels in batches:
            features.append(module(images.to(device, non_blocking=True)).float())
            targets.append(labels.to(device))
    finally:
        for part, training in modes:  # not module.train(): frozen batch norm is to stay frozen
            part.training = training
    if not features:
        raise ValueError("batches: got none, wanted at least one")
    return torch.cat(features), torch.cat(targets)


def knn_accuracy(
    train_features: torch.Tensor,
    train_labels: torch.Tensor,
    test_features: torch.Tensor,
    test_labels: torch.Tensor,
    *,
    k: int = 200,
    temperature: float = 0.1,
    num_classes: int | None = None,
    chunk: int = 1024,
    backend: str = "auto",
) -> float:
    """Share of test rows that the weighted vote of their nearest training rows labels rightly.

    The protocol of Wu et al. (arXiv 1805.01978): a neighbor with cosine similarity s votes for its
    class with weight exp(s / temperature). Features are normalized inside.

    Args:
        train_features: (N, D), any float dtype, on the device that does the work.
        train_labels: (N,) integers >= 0, below num_classes.
        test_features: (M, D).
        test_labels: (M,) integers >= 0, below num_classes.
        k: neighbors per vote; N of them when the training set is smaller.
        temperature: of the votes, > 0.
        num_classes: bound of the labels; None for no bound.
        chunk: test rows searched at a time; memory is O(chunk * (k + classes in train_labels)).
        backend: of `bank_topk`.

    Returns:
        Accuracy in [0, 1].

    Raises:
        ValueError: shapes that do not agree, no rows, non-finite features, labels out of range,
            k or chunk < 1, temperature not a positive finite number.
    """
    _check_sets(train_features, train_labels, test_features, test_labels, num_classes=num_classes)
    checks.check_int("k", k, 1)
    checks.check_int("chunk", chunk, 1)
    checks.check_number("temperature", temperature, above=0)

    bank, queries = _unit(train_features), _unit(test_features)  # (N, D), (M, D)
    # Votes for the classes that are there: their numbers may be as large as they like.
    classes, train_labels = train_labels.long().unique(return_inverse=True)
    correct = torch.zeros((), dtype=torch.int64, device=bank.device)
    for query, label in zip(queries.split(chunk), test_labels.split(chunk), strict=True):
        similarity, index = bank_topk(query, bank, min(k, len(bank)), backend=backend)  # (C, k)
        # exp(88) is infinite in fp32; a shift per row leaves the winner as it is.
        weight = torch.exp((similarity - similarity[:, :1]) / temperature)
        votes = weight.new_zeros(len(query), len(classes))  # (C, classes)
        votes.scatter_add_(1, train_labels[index], weight)
        correct += (classes[votes.argmax(dim=1)] == label).sum()
    return correct.item() / len(queries)


def linear_probe(
    train_features: torch.Tensor,
    train_labels: torch.Tensor,
    test_features: torch.Tensor,
    test_labels: torch.Tensor,
    *,
    labels_per_class: int | None = None,
    draws: int = 5,
    regularization: float = 1.0,
    max_iter: int = 1000,
    seed: int = 0,
) -> float:
    """Test accuracy of a logistic regression on standardized, frozen features.

    Args:
        train_features: (N, D), any float dtype and device.
        train_labels: (N,) integers >= 0.
        test_features: (M, D).
        test_labels: (M,) integers >= 0.
        labels_per_class: train on that many random rows of each class (all of a class that has
            fewer); None: on every row.
        draws: with `labels_per_class`, the number of random subsets whose accuracies are averaged.
        regularization: scikit-learn's C, > 0; larger fits the training set more closely.
        max_iter: bound on the iterations of the solver.
        seed: of the random subsets.

    Returns:
        Accuracy in [0, 1].

    Raises:
        ImportError: scikit-learn is not installed.
        ValueError: shapes that do not agree, no rows, non-finite features, negative labels, fewer
            than two classes, labels_per_class, draws or max_iter < 1, regularization <= 0.
    """
    try:
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler
    except ImportError as error:
        raise ImportError("linear_probe needs scikit-learn: pip install scikit-learn") from error

    _check_sets(train_features, train_labels, test_features, test_labels)
    if labels_per_class is not None:
        checks.check_int("labels_per_class", labels_per_class, 1)
    checks.check_int("draws", draws, 1)
    checks.check_int("max_iter", max_iter, 1)
    checks.check_number("regularization", regularization, above=0)
    if len(train_labels.unique()) < 2:
        raise ValueError("train_labels: got one class, wanted at least two")

    train_labels = train_labels.detach().cpu()
    largest = _wide(train_features).abs().amax()  # one scale changes nothing but the overflow
    scale = torch.where(largest > 0, largest, 1.0)
    x, x_test = (
        (_wide(features) / scale).float().cpu().numpy()
        for features in (train_features, test_features)
    )
    y, y_test = train_labels.numpy(), test_labels.cpu().numpy()
    generator = torch.Generator().manual_seed(seed)
    scores = []
    for _ in range(draws if labels_per_class else 1):
        rows = slice(None)
        if labels_per_class:
            shuffled = torch.randperm(len(y), generator=generator)
            groups = [shuffled[train_labels[shuffled] == c] for c in train_labels.unique()]
            rows = torch.cat([group[:labels_per_class] for group in groups]).numpy()
        solver = LogisticRegression(C=regularization, max_iter=max_iter)
        probe = make_pipeline(StandardScaler(), solver).fit(x[rows], y[rows])
        scores.append(probe.score(x_test, y_test))
    return float(sum(scores) / len(scores))


def compare(
    modules: Mapping[str, nn.Module],
    train: Iterable[tuple[torch.Tensor, torch.Tensor]],
    test: Iterable[tuple[torch.Tensor, torch.Tensor]],
    *,
    device: torch.device | str = "cpu",
    labels_per_class: int = 10,
) -> dict[str, dict[str, float]]:
    """kNN and linear probes of several frozen encoders.

    Args:
        modules: by name, from images (B, ...) to features (B, D).
        train, test: batches of (images, labels (B,)), such as DataLoaders; read once per module.
        device: where the modules are.
        labels_per_class: of the probe on few labels.

    Returns:
        By name the accuracies in [0, 1]: "knn"; "linear", with all labels; "linear_10", with 10 or
        as many as `labels_per_class` per class.

    Raises:
        ImportError, ValueError: as `encode` and `linear_probe`.
    """
    scores = {}
    for name, module in modules.items():
        sets = *encode(module, train, device), *encode(module, test, device)
        scores[name] = {
            "knn": knn_accuracy(*sets),
            "linear": linear_probe(*sets),
            f"linear_{labels_per_class}": linear_probe(*sets, labels_per_class=labels_per_class),
        }
    return scores


def _unit(features: torch.Tensor) -> torch.Tensor:
    """Unit rows in fp32; scaled first, so that no square of a finite number overflows or is 0."""
    largest = _wide(features).abs().amax(1, keepdim=True)
    scaled = _wide(features) / torch.where(largest > 0, largest, 1.0)
    return F.normalize(scaled.float(), dim=1)


def _wide(features: torch.Tensor) -> torch.Tensor:
    features = features.detach()
    return features if features.dtype is torch.float64 else features.float()


def _check_sets(
    train_features: torch.Tensor,
    train_labels: torch.Tensor,
    test_features: torch.Tensor,
    test_labels: torch.Tensor,
    *,
    num_classes: int | None = None,
) -> None:
    """Raise ValueError on sets that do not fit together."""
    sets = {"train": (train_features, train_labels), "test": (test_features, test_labels)}
    shape = (None, train_features.shape[-1])
    for name, (features, labels) in sets.items():
        checks.check_matrix(f"{name}_features", features, like="train_features", shape=shape)
        checks.check_vector(f"{name}_labels", labels, len(features))
        if labels.is_floating_point():
            raise ValueError(f"{name}_labels: got {labels.dtype}, wanted integers")
        if not features.isfinite().all():
            raise ValueError(f"{name}_features: got NaN or inf, wanted finite numbers")
        low, high = int(labels.min()), int(labels.max())
        if low < 0 or (num_classes is not None and high >= num_classes):
            wanted = ">= 0" if num_classes is None else f"from 0 to {num_classes - 1}"
            raise ValueError(f"{name}_labels: got {low} to {high}, wanted integers {wanted}")
