"""Who may know whom: a room imports from rooms before it alone, and no file imports in a circle."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import gradsurgery

ROOT = Path(gradsurgery.__file__).parent

# from the bottom up: each may import those before it, and nothing after it. Folders and files of
# the package by name, those of unlearn as unlearn.NAME
ORDER = (
    "errors",
    "text",
    "extras",  # what to install where a package is missing
    "ranking",
    "spread",
    "grads",
    "buffers",
    "kernels",  # nothing of the operators that call them
    "ops",  # no models
    "batch",
    "optimizers",
    "capture",  # rows of models, and no rules
    "apart",
    "stored",
    "jacobian",
    "ranks",  # rows of many processes
    "surgery",  # rules, and no steps
    "diagnosis",
    "undo",
    "passes",
    "collect",
    "given",
    "info",
    "update",
    "step",
    "language",  # losses of language models
    "integrations",
    "gradsurgery",  # the public names
    "unlearn.objectives",  # what methods ask of a task
    "unlearn.training",
    "unlearn.methods",
    "unlearn.metrics",  # one of them trains: how fast a model learns again
    "unlearn.jobs",
    "unlearn.report",
    "unlearn.function",
    "unlearn",  # the public names of unlearn
    "unlearn.command",
    "bench",  # what all of the above costs
    "doctor",
    "cli",
    "__main__",
)
# what the order alone would allow
NEVER = {
    ("unlearn", "kernels"): (),
    ("unlearn", "capture"): (),
    # rules look at gradients; these two project steps off the inputs of a model's layers
    ("surgery", "capture"): ("surgery.inputs", "surgery.seen"),
}


def imports(source: str) -> Iterator[str]:
    """Every `module` or `module.name` that a source imports, inside functions too.

    Imports for type checking alone are left out.
    """

    def visit(node: ast.AST) -> Iterator[str]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                yield from (alias.name for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                assert child.level == 0, "imports say the whole path"
                yield from (f"{child.module}.{alias.name}" for alias in child.names)
            elif isinstance(child, ast.If) and ast.unparse(child.test).endswith("TYPE_CHECKING"):
                for other in child.orelse:
                    yield from visit(ast.Module([other], []))
            else:
                yield from visit(child)

    return visit(ast.parse(source))


def modules() -> dict[str, Path]:
    """The package's files by dotted name, without `gradsurgery.` before it."""
    found = {}
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(part for part in parts if part != "__init__") or "gradsurgery"] = path
    return found


def graph() -> dict[str, list[str]]:
    """By module, the modules of the package that it imports; the compiled one is not among them."""
    known = modules()
    found: dict[str, list[str]] = {}
    for name, path in known.items():
        found[name] = []
        for wanted in imports(path.read_text(encoding="utf-8")):
            package, _, rest = wanted.partition(".")
            if package != "gradsurgery" or rest == "_C":
                continue
            while rest not in known and rest:
                rest = rest.rpartition(".")[0]
            found[name].append(rest or "gradsurgery")
    return found


def room(module: str) -> str:
    parts = module.split(".")
    return ".".join(parts[:2]) if parts[0] == "unlearn" else parts[0]


GRAPH = graph()


def test_every_file_has_a_room():
    assert {room(module) for module in GRAPH} == set(ORDER)


@pytest.mark.parametrize("name", ORDER)
def test_arrows_point_down(name):
    place = ORDER.index(name)
    wrong = [
        f"{module} imports {wanted}"
        for module in GRAPH
        if room(module) == name
        for wanted in GRAPH[module]
        if room(wanted) != name and ORDER.index(room(wanted)) > place
    ]
    assert not wrong


@pytest.mark.parametrize(("one", "other"), NEVER)
def test_who_never_knows_whom(one, other):
    wrong = [
        f"{module} imports {wanted}"
        for module in GRAPH
        if module.split(".")[0] == one and module not in NEVER[one, other]
        for wanted in GRAPH[module]
        if wanted.split(".")[0] == other
    ]
    assert not wrong


def test_no_file_imports_in_a_circle():
    # what imports nothing of the rest is taken away, until nothing is left, or circles are
    left = {module: set(wanted) - {module} for module, wanted in GRAPH.items()}
    while free := [module for module, wanted in left.items() if not wanted & left.keys()]:
        for module in free:
            del left[module]
    assert not left


def test_short_names_of_modules_users_import_from():
    from gradsurgery.unlearn.attacks import attack_all
    from gradsurgery.unlearn.classification import cross_entropy

    from gradsurgery import unlearn

    assert attack_all is unlearn.attacks.attack_all
    assert cross_entropy is unlearn.cross_entropy is unlearn.classification.cross_entropy


def test_imports_are_those_that_run():
    source = """
from typing import TYPE_CHECKING
if TYPE_CHECKING:
    from gradsurgery.cli import main
else:
    from gradsurgery.step import Surgeon
def late():
    import gradsurgery.ops.gramian
"""
    assert list(imports(source)) == [
        "typing.TYPE_CHECKING",
        "gradsurgery.step.Surgeon",
        "gradsurgery.ops.gramian",
    ]
