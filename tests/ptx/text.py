"""Reads the kernels of a PTX file."""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

TYPES = {f"{kind}{8 * size}": np.dtype(f"{letter}{size}") for size in (1, 2, 4, 8)
         for kind, letter in (("u", "u"), ("s", "i"), ("b", "u"))}  # fmt: skip
TYPES |= {"f16": np.dtype("f2"), "f32": np.dtype("f4"), "f64": np.dtype("f8")}
TYPES["pred"] = np.dtype(bool)


class Fault(Exception):
    """The program did what a GPU would answer with an error, a hang or a wrong result."""


@dataclass
class Statement:
    opcode: list[str]
    operands: list
    guard: str | None
    negated: bool
    text: str


@dataclass
class Kernel:
    """One .entry of a PTX file."""

    name: str
    params: dict[str, int]  # bytes
    registers: dict[str, np.dtype] = field(default_factory=dict)
    statements: list[Statement] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    shared: dict[str, tuple[int, int]] = field(default_factory=dict)  # alignment, bytes
    local: dict[str, int] = field(default_factory=dict)

    def waits_first(self) -> bool:
        """For the launch ahead, before any thread can branch or touch memory."""
        for at, statement in enumerate(self.statements):
            name, *kind = statement.opcode
            if name == "griddepcontrol":
                return kind == ["wait"] and statement.guard is None
            if at in self.labels.values() or name in ("bra", "ret", "atom", "cp", "red", "st"):
                return False
            if name == "ld" and kind[0] != "param":
                return False
        return False


def read(text: str) -> dict[str, Callable[[], Kernel]]:
    """The kernels of a PTX file by name, each read when it is asked for."""
    text = re.sub(r"//[^\n]*|\.loc\s[^\n]*", "", text)
    dynamic = re.findall(r"\.extern \.shared \.align (\d+) \.b8 (\S+)\[\];", text)
    found = {}
    for piece in text.split(".entry ")[1:]:
        name, params, body = re.match(r"(\S+?)\((.*?)\)[^{]*\{(.*)", piece, re.S).groups()
        found[name] = functools.cache(functools.partial(_kernel, name, params, body, dynamic))
    return found


def _kernel(name: str, params: str, body: str, dynamic: list[tuple[str, str]]) -> Kernel:
    kernel = Kernel(name, dict(map(_param, params.split(","))) if params.strip() else {})
    kernel.shared = {name: (int(alignment), 0) for alignment, name in dynamic}
    scopes, counter, pending = [""], itertools.count(1), []
    declared: dict[str, set[str]] = {"": set()}
    for token in re.finditer(r"\s*(?:([{}])|([\w$]+):(?!:)|([^;{}]*(?:\{[^}]*\}[^;{}]*)*);)", body):
        brace, label, statement = token.groups()
        scope = scopes[-1]
        if brace == "{":
            scopes.append(f"{scope}#{next(counter)}")
            declared[scopes[-1]] = set()
        elif brace == "}":
            scopes.pop()
            if not scopes:
                break
        elif label:
            kernel.labels[label + scope] = len(pending)
            declared[scope].add(label)
        elif statement.startswith("."):
            for name, dtype in _declaration(kernel, statement):
                kernel.registers[name + scope] = dtype
                declared[scope].add(name)
        else:
            pending.append((statement, tuple(scopes)))

    def resolve(name: str, scopes: tuple[str, ...]) -> str:
        return next((name + scope for scope in reversed(scopes) if name in declared[scope]), name)

    for statement, inside in pending:
        kernel.statements.append(_statement(statement, lambda name, s=inside: resolve(name, s)))
    return kernel


def _param(text: str) -> tuple[str, int]:
    name, length = re.search(r"(\S+?)(?:\[(\d+)\])?\s*$", text).groups()
    return name, int(length or TYPES[re.search(r"\.param \.(\w+)", text)[1]].itemsize)


def _declaration(kernel: Kernel, text: str) -> list[tuple[str, np.dtype]]:
    if match := re.match(r"\.reg \.(\w+)\s+(.*)", text, re.S):
        names = []
        for name in re.split(r",\s*", match[2]):
            family = re.fullmatch(r"(.*)<(\d+)>", name.strip())
            names += [f"{family[1]}{i}" for i in range(int(family[2]))] if family else [name]
        return [(name.strip(), TYPES[match[1]]) for name in names]
    if match := re.match(r"\.shared \.align (\d+) \.b8 (\S+)\[(\d+)\]", text):
        kernel.shared[match[2]] = int(match[1]), int(match[3])
    elif match := re.match(r"\.local \.align \d+ \.b8\s+(\S+)\[(\d+)\]", text):
        kernel.local[match[1]] = int(match[2])
    elif not text.startswith(".pragma"):
        raise Fault(f"unknown directive: {text}")
    return []


def _statement(text: str, resolve: Callable[[str], str]) -> Statement:
    guard, opcode, rest = re.match(r"(?:@(!?[%\w]+)\s+)?(\S+)\s*(.*)", text, re.S).groups()
    rest = re.sub(r"\s*\+\s*", "+", rest)
    parts = re.findall(r"\[[^\]]*\]|\{[^}]*\}|[^,\s]+", rest)

    def operand(part: str):
        if part[0] == "{":
            return [operand(p) for p in re.findall(r"[^,\s{}]+", part)]
        if part[0] == "[":  # address, offset, and what else TMA puts there
            base, *more = re.findall(r"\{[^}]*\}|[^,\s\[\]{}]+", part)
            name, _, offset = base.partition("+")
            return (resolve(name), int(offset or "0", 0), [operand(m) for m in more])
        if "|" in part:
            return [resolve(p) for p in part.split("|")]
        return resolve(part)

    negated = bool(guard) and guard[0] == "!"
    guard = resolve(guard.lstrip("!")) if guard else None
    return Statement(opcode.split("."), [operand(p) for p in parts], guard, negated, text)
