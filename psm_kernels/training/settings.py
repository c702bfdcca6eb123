"""A dataclass as a command line, with bounds and with defaults that depend on a choice.

@dataclasses.dataclass
class Settings:
    method: str = setting("psm", "loss", choices=("psm", "hcl"))
    temperature: float = setting(0.5, "of the loss")
    topk: int = setting(5, "mined positives", least=0, of=["psm"])

given = command_line(Settings, ["--method", "hcl"])  # {"method": "hcl"}
settings = complete(Settings, given, {"hcl": {"temperature": 0.2}})
check(settings, given)
"""

import argparse
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn, TypeVar, get_type_hints

T = TypeVar("T")
Recipes = Mapping[str, Mapping[str, Any]]


def setting(
    default: Any,
    help: str,
    *,
    choices: Sequence[str] = (),
    least: float | None = None,
    most: float | None = None,
    of: Sequence[str] = (),
    free: bool = False,
) -> Any:
    """A field of a dataclass of settings, and an option of its command line.

    Args:
        default: what it is when it is not given.
        help: a few words for --help.
        choices: the values there are.
        least, most: closed bounds.
        of: choices of another setting; with the rest of those, this one is refused.
        free: it does not change the results, so that a continued run may change it.
    """
    rules = {"choices": choices, "least": least, "most": most, "of": of, "free": free}
    return dataclasses.field(default=default, metadata={"help": help, **rules})


def command_line(
    kind: type,
    argv: Sequence[str] | None = None,
    *,
    about: str = "",
    recipes: Recipes | None = None,
) -> dict[str, Any]:
    """The settings given on a command line, by name, those alone.

    Args:
        kind: the dataclass, all of whose fields are made by `setting`.
        argv: the words; None: those of this process.
        about: what --help says above the options.
        recipes: as in `complete`, for --help.

    Raises:
        ValueError: an unknown option, a value of the wrong type or not among the choices.
    """
    plain = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=about, formatter_class=plain)
    parser.error = _refuse
    types = get_type_hints(kind)
    for field in dataclasses.fields(kind):
        name, rules = field.name, field.metadata
        special = [f"{choice}: {r[name]}" for choice, r in (recipes or {}).items() if name in r]
        of = f"{', '.join(rules['of'])}: " if rules["of"] else ""
        text = f"{of}{rules['help']} [{'; '.join([str(field.default), *special])}]"
        form = {"type": types[name], "choices": rules["choices"] or None}
        if types[name] is bool:
            form = {"action": argparse.BooleanOptionalAction}
        option = "--" + name.replace("_", "-")
        parser.add_argument(option, help=text, default=argparse.SUPPRESS, **form)
    return vars(parser.parse_args(argv))


def complete(kind: type[T], given: Mapping[str, Any], recipes: Recipes) -> T:
    """What was given, then the recipes of the choices made, then the defaults of the dataclass.

    Args:
        kind: the dataclass.
        given: values by name.
        recipes: by choice, such as "hcl", the defaults that differ with it.
    """
    values: dict[str, Any] = {}
    for field in dataclasses.fields(kind):
        if field.metadata["choices"]:
            values |= recipes.get(given.get(field.name, field.default), {})
    return kind(**(values | given))


def check(settings: Any, given: Mapping[str, Any]) -> None:
    """Raise a ValueError on a value out of bounds, or on one given with a choice that lacks it."""
    fields = dataclasses.fields(settings)
    for field in fields:
        name, value, rules = field.name, getattr(settings, field.name), field.metadata
        if rules["least"] is not None and not value >= rules["least"]:
            raise ValueError(f"{name}: got {value}, wanted at least {rules['least']}")
        if rules["most"] is not None and not value <= rules["most"]:
            raise ValueError(f"{name}: got {value}, wanted at most {rules['most']}")
        if not rules["of"] or name not in given:
            continue
        other = next(f.name for f in fields if set(rules["of"]) <= set(f.metadata["choices"]))
        choice = getattr(settings, other)
        if choice not in rules["of"]:
            raise ValueError(f"{name}: got {value}, but --{other} {choice} has no such setting")


def continued(kind: type[T], saved: Mapping[str, Any], given: Mapping[str, Any]) -> T:
    """The settings of a saved run, with the free ones among the given in the place of its own.

    Raises:
        ValueError: saved names that `kind` has not; given values that contradict: names each.
    """
    fields = {field.name: field for field in dataclasses.fields(kind)}
    unknown = sorted(saved.keys() - fields.keys())
    if unknown:
        raise ValueError(f"saved settings: got {', '.join(unknown)}, wanted those of --help")
    old = kind(**saved)
    other = [
        f"{name} (saved {getattr(old, name)}, given {value})"
        for name, value in given.items()
        if not fields[name].metadata["free"] and value != getattr(old, name)
    ]
    if other:
        raise ValueError(f"the saved run has other settings: {', '.join(other)}")
    return dataclasses.replace(old, **given)  # what is not free is equal


def _refuse(message: str) -> NoReturn:
    raise ValueError(message)
