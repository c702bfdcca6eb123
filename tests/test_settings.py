"""The command line of a dataclass: what is given, what fills the rest, and what is refused."""

import dataclasses

import pytest

from psm_kernels.training.settings import check, command_line, complete, continued, setting


@dataclasses.dataclass
class Settings:
    method: str = setting("psm", "loss", choices=("psm", "hcl", "sscl"))
    size: str = setting("small", "of the network", choices=("small", "large"))
    temperature: float = setting(0.5, "of the loss", least=0, most=1)
    beta: float = setting(1.0, "hardness", of=["hcl", "sscl"])
    batch_size: int = setting(256, "rows", least=2)
    probe: bool = setting(True, "end with a probe", free=True)


RECIPES = {"hcl": {"temperature": 0.2, "batch_size": 8}, "large": {"batch_size": 4}}


def parse(text: str) -> tuple[Settings, dict]:
    given = command_line(Settings, text.split(), recipes=RECIPES)
    return complete(Settings, given, RECIPES), given


def test_given_before_recipes_before_defaults():
    assert parse("") == (Settings(), {})
    settings, given = parse("--method hcl --batch-size 16 --no-probe")
    assert given == {"method": "hcl", "batch_size": 16, "probe": False}
    assert settings == Settings("hcl", "small", 0.2, 1.0, 16, False)
    assert parse("--method hcl --size large")[0].batch_size == 4  # the later field's


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("--method moco", "invalid choice: 'moco'"),
        ("--batch-size many", "invalid int value: 'many'"),
        ("--learning-rate 1", "--learning-rate"),
        ("--batch-size 1", "batch_size: got 1, wanted at least 2"),
        ("--temperature 1.5", "temperature: got 1.5, wanted at most 1"),
        ("--temperature nan", "temperature: got nan, wanted at least 0"),
        ("--beta 2", "beta: got 2.0, but --method psm has no such setting"),
    ],
)
def test_refused(text, words):
    with pytest.raises(ValueError, match=words):
        check(*parse(text))


@pytest.mark.parametrize("text", ["", "--method sscl --beta 2", "--batch-size 2 --temperature 1"])
def test_not_refused(text):
    check(*parse(text))


def test_help_names_defaults_recipes_and_choices(capsys):
    with pytest.raises(SystemExit):
        command_line(Settings, ["--help"], about="About it.", recipes=RECIPES)
    text = " ".join(capsys.readouterr().out.split())
    assert "About it." in text
    assert "hcl, sscl: hardness [1.0]" in text
    assert "rows [256; hcl: 8; large: 4]" in text
    assert "--probe, --no-probe" in text


def test_continued():
    saved = dataclasses.asdict(Settings(batch_size=16))
    given = {"probe": False, "batch_size": 16}
    assert continued(Settings, saved, given) == Settings(batch_size=16, probe=False)
    with pytest.raises(
        ValueError, match=r"batch_size \(saved 16, given 8\), beta \(saved 1.0, giv"
    ):
        continued(Settings, saved, {"batch_size": 8, "probe": False, "beta": 2.0})
    with pytest.raises(ValueError, match="got depth, rank"):
        continued(Settings, saved | {"rank": 1, "depth": 2}, {})
