"""Imports run downwards only: the rooms of docs/design.md, read from the source of every module."""

import ast
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = {"data", "models", "evaluation", "pipeline"}
MAY_IMPORT = {"data": {"data"}, "models": {"models"}, "evaluation": {"evaluation"}, "pipeline": ROOMS, "configs": set()}
FRONT = {"__init__.py", "__main__.py"}  # the names that users import, and `python -m longslide`
MODULES = sorted(ROOT.glob("*.py")) + sorted(path for room in MAY_IMPORT for path in (ROOT / room).rglob("*.py"))


def at_import(tree: ast.AST) -> Iterator[ast.AST]:
    """The nodes that run when a module is imported: not what is imported for types alone or in functions."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        yield node
        yield from at_import(node)


def imported(path: Path, nodes: Callable[[ast.AST], Iterator[ast.AST]] = ast.walk) -> set[tuple[str, ...]]:
    """The modules of the package that a file imports, in any of the nodes, as parts below `longslide`."""
    package = path.parent.relative_to(ROOT).parts
    found: set[tuple[str, ...]] = set()
    for node in nodes(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) - node.level + 1] + tuple(
                (node.module or "").split(".") if node.module else ()
            )
            # `from . import name` takes a module or a name of the package itself
            found |= {base} if node.module else {(*base, alias.name) for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "longslide":
            found.add(tuple(str(node.module).split(".")[1:]))
        elif isinstance(node, ast.Import):
            found |= {tuple(a.name.split(".")[1:]) for a in node.names if a.name.split(".")[0] == "longslide"}
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_imports_run_downwards_only(path: Path) -> None:
    if path.parent == ROOT and path.name in FRONT:
        return
    room = path.relative_to(ROOT).parts[0]
    allowed = MAY_IMPORT.get(room, set())
    for module in imported(path):
        target = module[0] if module else "the package's front"
        root_file = len(module) <= 2 and (ROOT / f"{target}.py").is_file()
        assert root_file or target in allowed, f"{path.relative_to(ROOT)} imports {'.'.join(module)}"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_inside_the_package_imports_are_relative(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    absolute = [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and not node.level]
    assert not [module for module in absolute if (module or "").split(".")[0] == "longslide"]


def test_every_room_is_in_the_table_and_every_import_is_found() -> None:
    rooms = {
        path.parent.name
        for path in ROOT.glob("*/__init__.py")
        if path.parent.name not in {"tests", "docs", "benchmarks"}
    }
    assert rooms == set(MAY_IMPORT)
    assert ("data", "slides", "slide") in imported(ROOT / "pipeline" / "embed" / "job.py")
    assert ("errors",) in imported(ROOT / "data" / "slides" / "mpp.py")
    assert len(MODULES) > 100


# `Slide.tissue()` and `Slide.tiles()` import what they call when they are called: nothing else may go round.
WHEN_CALLED = {
    ("data", "slides", "slide"): {
        ("data", "tiles", "grid"),
        ("data", "tiles", "stream"),
        ("data", "tissue", "base"),
        ("data", "tissue", "optical_density"),
    }
}


def test_no_module_imports_itself_in_a_circle() -> None:
    """Following what runs at import, from any module, never comes back to it."""
    graph = {}
    for path in MODULES:
        parts = path.relative_to(ROOT).with_suffix("").parts
        name = parts[:-1] if parts[-1] == "__init__" else parts
        if name:
            graph[name] = {target for target in imported(path, at_import) if target != name} - WHEN_CALLED.get(
                name, set()
            )
    done: set[tuple[str, ...]] = set()

    def visit(name: tuple[str, ...], way: list[tuple[str, ...]]) -> None:
        assert name not in way, " -> ".join(".".join(part) for part in [*way[way.index(name) :], name])
        if name not in done and name in graph:
            for target in sorted(graph[name]):
                visit(target, [*way, name])
            done.add(name)

    for name in sorted(graph):
        visit(name, [])
