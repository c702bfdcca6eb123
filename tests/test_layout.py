"""The rooms of psm_kernels: what may import what. CONTRIBUTING.md has the picture."""

import ast
import graphlib
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "psm_kernels"
ROOMS = (  # from the ground up: a module imports from its own row and from those below
    ("checks", "noise", "options", "rows", "_csrc"),
    ("backends",),
    ("ops", "weighted", "_autograd"),
    ("bank",),
    ("losses", "evaluate", "mine"),
    ("functional", "compat", "distributed"),
    ("training",),
    ("__init__", "__main__"),
)
HEIGHT = {room: height for height, row in enumerate(ROOMS) for room in row}
BUILT = {"psm_kernels._C", "psm_kernels._build_info"}  # by setup.py, not by hand
VERSION = "psm_kernels.__version__"  # a constant, which setup.py reads where it stands


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT.parent).with_suffix("").parts).removesuffix(".__init__")


MODULES = {
    name: ast.parse(path.read_text())
    for path in sorted(ROOT.rglob("*.py"))
    if (name := module_name(path)) not in BUILT
}
PACKAGES = {module_name(path) for path in ROOT.rglob("__init__.py")}


def room(module: str) -> str:
    return f"{module}.__init__".split(".")[1]


def statements(tree: ast.AST, *, when_loaded: bool) -> Iterator[ast.AST]:
    """All imports of a module, or those alone that run when it is loaded."""
    for node in ast.iter_child_nodes(tree):
        lazy = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)) or (
            isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        )
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            yield node
        elif not (lazy and when_loaded):
            yield from statements(node, when_loaded=when_loaded)


def imports(module: str, *, when_loaded: bool = False) -> dict[str, str]:
    """What it imports, by full name, such as torch.nn or psm_kernels.noise.Stream, and as what."""
    found = {}
    for node in statements(MODULES[module], when_loaded=when_loaded):
        if isinstance(node, ast.Import):
            found |= {alias.name: alias.asname or alias.name for alias in node.names}
            continue
        source = node.module or ""
        if node.level:
            parts = module.split(".")
            place = parts[: len(parts) + (module in PACKAGES) - node.level]
            source = ".".join([*place, source]).rstrip(".")
        found |= {f"{source}.{alias.name}": alias.asname or alias.name for alias in node.names}
    return found


def uses(module: str) -> set[str]:
    """What it imports, and the attributes of that by full name, such as torch.nn.Module."""
    names, tree = imports(module), ast.walk(MODULES[module])
    chains = {ast.unparse(node) for node in tree if isinstance(node, ast.Attribute)}
    return set(names) | {
        full + chain.removeprefix(local)
        for full, local in names.items()
        for chain in chains
        if chain.startswith(f"{local}.")
    }


def own(names: Iterable[str]) -> set[str]:
    """The modules of psm_kernels among the names, or that the names are in."""
    names = {*names} - BUILT - {VERSION}
    found = {name if name in MODULES else name.rpartition(".")[0] for name in names}
    return {name for name in found if name in MODULES}


def test_each_module_has_a_room():
    assert {room(module) for module in MODULES} <= set(HEIGHT)
    assert {str(path.parent) for path in ROOT.rglob("*.py")} == {
        str(path.parent) for path in ROOT.rglob("__init__.py")
    }


@pytest.mark.parametrize("module", MODULES)
def test_arrows_run_down_only(module):
    """Imports inside of functions as well."""
    up = {name for name in own(imports(module)) if HEIGHT[room(name)] > HEIGHT[room(module)]}
    assert not up


def test_there_is_no_circle():
    """Among the imports that run when a module is loaded, those of the packages it lies in too."""
    graph = {}
    for module in MODULES:
        graph[module] = own(imports(module, when_loaded=True))
        for name in list(graph[module]):
            parts = name.split(".")
            parents = {".".join(parts[:n]) for n in range(2, len(parts))}
            graph[module] |= {p for p in parents if not f"{module}.".startswith(f"{p}.")}
    assert "psm_kernels.checks" in graph["psm_kernels.options"]
    graphlib.TopologicalSorter(graph).prepare()  # CycleError names the circle


@pytest.mark.parametrize("module", [m for m in MODULES if room(m) != "training"])
def test_the_core_is_loaded_by_torch_and_the_standard_library(module):
    """Triton, which is optional, by its own backend alone."""
    allowed = {"torch", "psm_kernels", *sys.stdlib_module_names}
    if module.startswith("psm_kernels.backends.triton"):
        allowed.add("triton")
    assert {name.split(".")[0] for name in imports(module, when_loaded=True)} <= allowed


def test_importing_needs_torch_and_nothing_else():
    """Nor what torch imports lazily, such as Triton."""
    code = (
        "import sys, torch; before = set(sys.modules)\n"
        "import psm_kernels, psm_kernels.functional, psm_kernels.compat, psm_kernels.evaluate\n"
        "new = {name.split('.')[0] for name in set(sys.modules) - before}\n"
        "print(*new - {'torch', *sys.stdlib_module_names})\n"
        "print(*[name for name in sys.modules if name.startswith('psm_kernels.training')])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["psm_kernels"]


@pytest.mark.parametrize("module", [m for m in MODULES if room(m) in ("losses", "functional")])
def test_losses_know_neither_triton_nor_other_ranks(module):
    """Of torch.distributed they name the type of a group; base.py exchanges for all with a bank,
    and clip.py, which has none."""
    closed = ["triton", "psm_kernels.backends.triton", "torch.distributed"]
    if module not in ("psm_kernels.losses.base", "psm_kernels.losses.clip"):
        closed.append("psm_kernels.bank.collectives")
    below = tuple(f"{name}." for name in closed)
    used = {name for name in uses(module) if f"{name}.".startswith(below)}
    assert used <= {"torch.distributed", "torch.distributed.ProcessGroup"}


@pytest.mark.parametrize("module", [m for m in MODULES if HEIGHT.get(room(m), 9) <= HEIGHT["ops"]])
def test_operators_know_neither_modules_nor_ranks(module):
    used = uses(module)
    assert "torch.nn.Module" not in used
    assert not {name for name in used if f"{name}.".startswith("torch.distributed.")}
