"""No module of common/ imports in a circle: a lower one never imports a higher one, also not inside a function."""

import ast
import graphlib
from pathlib import Path

import pytest

COMMON = Path(__file__).parents[1] / "common"


def imported(source: str) -> set[str]:
    """The modules of common/ that `source` imports anywhere."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            package = ("common." * (node.level > 0) + (node.module or "")).rstrip(".")
            names |= {package} | {f"{package}.{alias.name}" for alias in node.names}
    return {name.split(".")[1] for name in names if name.startswith("common.")}


def order(sources: dict[str, str]) -> list[str]:
    """The modules, lowest first. Raises graphlib.CycleError."""
    graph = {name: imported(source) & sources.keys() for name, source in sources.items()}
    return list(graphlib.TopologicalSorter(graph).static_order())


def test_no_circle():
    modules = order({path.stem: path.read_text() for path in COMMON.glob("*.py") if path.stem != "__init__"})
    wanted = ["environments", "demo", "datasets", "runs"]
    assert [name for name in modules if name in wanted] == wanted
    assert modules.index("bandit") < modules.index("datasets")


@pytest.mark.parametrize(
    "statement",
    ["from common import a", "import common.a", "from common.a import x", "from . import a", "from .a import x"],
)
def test_a_circle_is_seen(statement):
    with pytest.raises(graphlib.CycleError):
        order({"a": "from common.b import y", "b": f"def function():\n    {statement}"})


def test_common_is_below_the_algorithms():
    algorithms = {path.stem for path in COMMON.parent.glob("*.py")}
    for path in COMMON.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            assert not algorithms & set(names), f"{path.name} imports an algorithm"
