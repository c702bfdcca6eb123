"""`python -m psm_kernels.mine`: files in, one file out, or one line and none."""

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest

from psm_kernels import mine_negatives
from psm_kernels.mine import __main__ as command

ROOT = Path(__file__).parents[1]
INPUTS = ("queries", "corpus", "positives", "exclude")


@pytest.fixture
def arrays():
    rng = np.random.default_rng(0)
    return {
        "queries": rng.standard_normal((20, 16)).astype(np.float32),
        "corpus": rng.standard_normal((500, 16)).astype(np.float16),
        "positives": rng.integers(0, 500, 20),
        "exclude": rng.integers(-1, 500, (20, 3)).astype(np.int32),
    }


@pytest.fixture
def folder(tmp_path, arrays, monkeypatch):
    for name, array in arrays.items():
        np.save(tmp_path / f"{name}.npy", array)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT), prepend=os.pathsep)  # of a checkout
    return tmp_path


def names(folder):
    return {path.name for path in folder.iterdir()} - {f"{name}.npy" for name in INPUTS}


def run(*words):
    """The exit status of the command in this process."""
    try:
        return command.main(["queries.npy", "corpus.npy", "--out", "mined.npz", *words])
    except SystemExit as end:
        return end.code


ALL = "--k 30 --positives positives.npy --exclude exclude.npy --margin -0.05 --max-similarity 0.9"
CASES = {
    "--k 100": {"k": 100},
    ALL: {"k": 30, "positives": 1, "exclude": 1, "margin": -0.05, "max_similarity": 0.9},
    "--k 9 --no-normalize --chunk 7 --backend reference": {"k": 9, "normalize": False},
    "--k 30 --positives positives.npy --sample simans --num 8 --a 9 --b -0.1 --seed 7": {
        "k": 30, "positives": 1, "sample": "simans", "num": 8, "a": 9.0, "b": -0.1, "seed": 7,
    },
}  # fmt: skip


@pytest.mark.parametrize("line", CASES)
def test_files(folder, arrays, capsys, line):
    assert run(*line.split()) == 0
    given = {name: arrays[name] if value == 1 else value for name, value in CASES[line].items()}
    wanted = mine_negatives(arrays["queries"], arrays["corpus"], **given)
    with np.load("mined.npz") as mined:
        assert sorted(mined.files) == ["index", "similarity"]
        assert mined["index"].dtype == np.int64
        assert mined["similarity"].dtype == np.float32
        np.testing.assert_array_equal(mined["index"], wanted.index)
        np.testing.assert_allclose(mined["similarity"], wanted.similarity, rtol=1e-6)
    assert names(folder) == {"mined.npz"}
    out, err = capsys.readouterr()
    size = " x ".join(map(str, wanted.index.shape))
    assert out.startswith(f"mined.npz: {size} negatives, ")
    assert err == ""


def test_it_is_a_command(folder, arrays):
    line = [sys.executable, "-m", "psm_kernels.mine", "queries.npy", "corpus.npy"]
    line += ["--k", "5", "--out", "mined.npz", "--quiet"]
    done = subprocess.run(line, capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "")
    wanted = mine_negatives(arrays["queries"], arrays["corpus"], 5)
    np.testing.assert_array_equal(np.load("mined.npz")["index"], wanted.index)


def test_a_bar_on_a_terminal(folder, capsys, monkeypatch):
    pytest.importorskip("tqdm")
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    assert run("--k", "5") == 0
    assert "row/s]" in capsys.readouterr().err
    assert run("--k", "5", "--quiet") == 0
    assert capsys.readouterr() == ("", "")


def test_help_names_every_setting(capsys):
    with pytest.raises(SystemExit) as end:
        command.main(["--help"])
    assert end.value.code == 0
    shown = capsys.readouterr().out
    for name in vars(command.MiningOptions()):
        assert f"--{name.replace('_', '-')}" in shown or f"--no-{name}" in shown


# --- bad input -----------------------------------------------------------------------------------


def write_others(folder):
    np.save("wide.npy", np.ones((9, 17)))
    np.save("objects.npy", np.array([{}, []], object))
    np.save("words.npy", np.array(["no", "numbers"]))
    np.savez("archive.npz", a=np.ones(3))
    (folder / "empty.npy").touch()
    (folder / "text.npy").write_text("0.1 0.2\n0.3 0.4\n")
    (folder / "cut.npy").write_bytes((folder / "corpus.npy").read_bytes()[:5000])
    (folder / "a folder").mkdir()


@pytest.mark.parametrize(
    ("words", "match"),
    [
        ("queries.npy none.npy", "none.npy"),
        ("queries.npy empty.npy", "empty.npy: got no array, wanted a .npy file"),
        ("queries.npy text.npy", "text.npy: got no array, wanted a .npy file"),
        ("queries.npy cut.npy", "cut.npy: got no array, wanted a .npy file"),
        ("queries.npy objects.npy", "objects.npy: got no array, wanted a .npy file"),
        ("queries.npy archive.npz", "archive.npz: got an archive of arrays, wanted a .npy file"),
        ("queries.npy wide.npy", "corpus: got shape (9, 17), wanted two dimensions (any, 16)"),
        ("queries.npy positives.npy", "corpus: got dtype int64"),
        ("words.npy corpus.npy --device meta", "queries: got dtype <U7"),
        ("queries.npy corpus.npy --k 0", "k: got 0, wanted an integer >= 1"),
        ("queries.npy corpus.npy --k many", "argument --k: invalid int value: 'many'"),
        ("queries.npy corpus.npy --margin 0.1", "positives: got None"),
        ("queries.npy corpus.npy --margin nan", "margin: got nan"),
        ("queries.npy corpus.npy --positives exclude.npy", "positives: got shape (20, 3)"),
        ("queries.npy corpus.npy --sample simans", "num: got None"),
        ("queries.npy corpus.npy --sample uniform", "argument --sample: invalid choice"),
        ("queries.npy corpus.npy --backend fast", "backend: got 'fast'"),
        ("queries.npy corpus.npy --device fast", "--device: got 'fast'"),
        ("queries.npy corpus.npy --out nowhere/mined.npz", "--out: got nowhere/mined.npz"),
        ("queries.npy corpus.npy --out queries.npy/mined.npz", "--out: got queries.npy/mined.npz"),
        ("queries.npy corpus.npy --normalise", "unrecognized arguments: --normalise"),
        ("queries.npy", "the following arguments are required: corpus"),
    ],
)
def test_bad_input_is_one_line(folder, capsys, words, match):
    write_others(folder)
    before = names(folder)
    with pytest.raises(SystemExit) as end:
        command.main(["--k", "3", "--out", "mined.npz", *words.split()])
    assert end.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert err.startswith("python -m psm_kernels.mine: ")
    assert match in err
    assert names(folder) == before


def test_a_folder_is_not_overwritten(folder, capsys):
    (folder / "mined.npz").mkdir()
    assert run("--k", "3") == 2
    assert "--out: got mined.npz, wanted a file" in capsys.readouterr().err
    assert names(folder) == {"mined.npz"}


# --- whole or not at all -------------------------------------------------------------------------


def half_written(file, **arrays):
    file.write(b"half of a file")
    file.flush()
    raise half_written.error


@pytest.mark.parametrize(
    ("error", "status", "match"),
    [
        (KeyboardInterrupt(), 130, "interrupted"),
        (OSError(28, "No space left on device"), 2, "No space left on device"),
    ],
)
def test_what_fails_while_writing_leaves_the_old_file(
    folder, capsys, monkeypatch, error, status, match
):
    (folder / "mined.npz").write_text("the old one")
    monkeypatch.setattr("numpy.savez", half_written)
    half_written.error = error
    assert run("--k", "3") == status
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert match in err
    assert (folder / "mined.npz").read_text() == "the old one"
    assert names(folder) == {"mined.npz"}


WRITES_SLOWLY = textwrap.dedent(
    """
    import sys, time
    import numpy
    from psm_kernels.mine.__main__ import main

    def savez(file, **arrays):
        file.write(b"half of a file")
        file.flush()
        print("writing", flush=True)
        time.sleep(60)

    numpy.savez = savez
    main(["queries.npy", "corpus.npy", "--k", "3", "--out", "mined.npz"])
    """
)


@pytest.mark.parametrize(
    ("sent", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 128 + signal.SIGTERM)]
)
def test_a_signal_while_writing_leaves_nothing(folder, sent, status):
    child = subprocess.Popen(
        [sys.executable, "-c", WRITES_SLOWLY], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True,
    )  # fmt: skip
    try:
        assert child.stdout.readline() == "writing\n"
        assert len(names(folder)) == 1  # the temporary one, which is there
        child.send_signal(sent)
        _, err = child.communicate(timeout=60)
    finally:
        child.kill()
    assert child.returncode == status
    assert "Traceback" not in err
    assert names(folder) == set()


def test_torchrun(folder, arrays):
    pytest.importorskip("torch.distributed.run")
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    line += ["-m", "psm_kernels.mine", "queries.npy", "corpus.npy", "--k", "9", "--chunk", "100"]
    done = subprocess.run(
        [*line, "--out", "mined.npz"], capture_output=True, text=True, check=False, timeout=240
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["mined.npz: 20 x 9 negatives, 0.0% missing"]
    wanted = mine_negatives(arrays["queries"], arrays["corpus"], 9)
    np.testing.assert_array_equal(np.load("mined.npz")["index"], wanted.index)
    assert names(folder) == {"mined.npz"}
