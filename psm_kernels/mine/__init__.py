"""Hard negatives for encoders of text and images, from corpora that need not fit into memory.

With sentence-transformers: `pairs` is a list of (question, answer), each answer different, and the
result is a data set in the columns that its losses read, the anchor, its positive and negatives:

    import numpy as np
    from datasets import Dataset
    from sentence_transformers import SentenceTransformer
    from psm_kernels import mine_negatives

    questions, answers = map(list, zip(*pairs))
    model = SentenceTransformer("sentence-transformers/all-MiniLM-L6-v2")
    mined = mine_negatives(
        model.encode(questions), model.encode(answers), k=100,
        positives=np.arange(len(questions)), margin=-0.05,
        sample="simans", num=4, a=200,  # of cosines: 0.5 of logits at temperature 0.05
    )
    found = (mined.index >= 0).all(1).nonzero()[:, 0]  # the margin may leave a question fewer
    columns = {
        "anchor": [questions[i] for i in found],
        "positive": [answers[i] for i in found],
    }
    for n, rows in enumerate(mined.index[found].T, 1):
        columns[f"negative_{n}"] = [answers[i] for i in rows]
    train_dataset = Dataset.from_dict(columns)  # for SentenceTransformerTrainer

`MultipleNegativesRankingLoss` takes any number of negatives, `TripletLoss` one. Passages that
answer none of the questions go to the end of `answers`. A large corpus is encoded once, in parts,
into a file:

    file = np.lib.format.open_memmap("corpus.npy", "w+", np.float16, (len(answers), 384))
    for i in range(0, len(answers), 10_000):
        file[i : i + 10_000] = model.encode(answers[i : i + 10_000])

and mined by `mine_negatives(queries, np.load("corpus.npy", mmap_mode="r"), k=100)` or by

    python -m psm_kernels.mine queries.npy corpus.npy --k 100 --out mined.npz
"""

from psm_kernels.mine.negatives import mine_negatives
from psm_kernels.mine.options import MinedNegatives, MiningOptions

__all__ = ["MinedNegatives", "MiningOptions", "mine_negatives"]
