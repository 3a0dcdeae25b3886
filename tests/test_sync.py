"""The files stay alike where they are alike, stand alone, stay short and plain, and number equations in one way."""

import ast
import itertools
import re
import shutil
import subprocess
import sys

import pytest
import sync

NAMES = sync.FILES
COMMON = sorted(f"common/{path.name}" for path in (sync.ROOT / "common").glob("*.py"))
PAIRS = list(itertools.combinations(NAMES, 2))
FUNCTION_LINES, DEPTH, COLUMNS = 80, 4, 120

# Lines, docstrings included.
LINES = {"iql_critic.py": 380, "gmpo.py": 540, "gmpg.py": 540, "idql.py": 470, "common/runs.py": 270}
COMMON_LINES = 1551  # of common/ without its simulators
SIMULATORS = ("mazes", "physics", "robotics", "remade")  # D4RL's tasks, and data made in them: no reader needs these

# How many lines `diff` may show: what a reader of the second file has to read after the first.
DIFF_BUDGETS = {("iql_critic.py", "gmpo.py"): 450, ("gmpo.py", "gmpg.py"): 300, ("gmpo.py", "idql.py"): 450}

each_file = pytest.mark.parametrize("name", NAMES)
each_pair = pytest.mark.parametrize("one, other", PAIRS)


def text(name):
    return (sync.ROOT / name).read_text()


def docstring_and_body(name):
    source = text(name)
    end = ast.parse(source).body[0].end_lineno
    lines = source.splitlines()
    return "\n".join(lines[:end]), "\n".join(lines[end:])


# One name, one body


@each_pair
def test_one_name_has_one_body(one, other):
    first, second = sync.definitions(one), sync.definitions(other)
    shared = first.keys() & second.keys() - sync.OWN
    assert [name for name in shared if first[name][2] != second[name][2]] == []


@each_pair
def test_shared_names_come_in_one_order(one, other):
    both = sync.definitions(one).keys() & sync.definitions(other).keys()
    order = [[name for name in sync.definitions(file) if name in both] for file in (one, other)]
    assert order[0] == order[1]


@pytest.mark.parametrize("name", sorted(sync.OWN))
def test_what_is_a_files_own_is_in_two_files_and_differs(name):
    bodies = [found[name][2] for found in map(sync.definitions, NAMES) if name in found]
    assert len(bodies) >= 2 and len(set(bodies)) >= 2


def test_definitions_sees_tuples_decorators_and_the_comment_above(tmp_path, monkeypatch):
    monkeypatch.setattr(sync, "ROOT", tmp_path)
    source = '"""d"""\n# ---\n# 1. Arguments\n\n# why\nA, B = 1, 2\nC: int = 3\n\n\n@deco\ndef f():\n    pass\n'
    (tmp_path / "x.py").write_text(source)
    found = sync.definitions("x.py")
    assert list(found) == ["A", "B", "C", "f"]
    assert found["B"] == (5, 6, "# why\nA, B = 1, 2")
    assert found["f"] == (10, 12, "@deco\ndef f():\n    pass")


def test_copying_makes_two_files_agree_and_leaves_their_own(tmp_path, monkeypatch):
    monkeypatch.setattr(sync, "ROOT", tmp_path)
    monkeypatch.setattr(sync, "FILES", ["a.py", "b.py"])
    (tmp_path / "a.py").write_text("def g():\n    x = 1\n    return x\n\n\ndef act():\n    return 1\n")
    (tmp_path / "b.py").write_text("def g():\n    return 2\n\n\ndef act():\n    return 2\n\n\nlast = 1\n")
    sync.copy_from("a.py")
    expected = "def g():\n    x = 1\n    return x\n\n\ndef act():\n    return 2\n\n\nlast = 1\n"
    assert (tmp_path / "b.py").read_text() == expected


# Sizes


@pytest.mark.skipif(shutil.which("diff") is None, reason="needs diff")
@pytest.mark.parametrize("one, other", DIFF_BUDGETS)
def test_the_diff_of_two_files_stays_in_its_budget(one, other):
    assert sync.changed_lines(one, other) <= DIFF_BUDGETS[one, other]


@pytest.mark.skipif(shutil.which("diff") is None, reason="needs diff")
def test_changed_lines_counts_both_sides(tmp_path, monkeypatch):
    monkeypatch.setattr(sync, "ROOT", tmp_path)
    (tmp_path / "a.py").write_text("1\n2\n3\n4\n")
    (tmp_path / "b.py").write_text("1\n3\n5\n6\n")
    assert sync.changed_lines("a.py", "b.py") == 4  # 2 and 4 go, 5 and 6 come


@pytest.mark.parametrize("name", LINES)
def test_a_file_stays_in_its_budget(name):
    assert len(text(name).splitlines()) <= LINES[name]


def test_common_stays_in_its_budget():
    names = set(COMMON) - {f"common/{name}.py" for name in SIMULATORS}
    assert sum(len(text(name).splitlines()) for name in names) <= COMMON_LINES


def too_long_or_deep(source):
    """Functions of more than FUNCTION_LINES, decorators aside, lines indented deeper than DEPTH, or too wide."""
    nodes = list(ast.walk(ast.parse(source)))
    found = [f.name for f in nodes if isinstance(f, ast.FunctionDef) and f.end_lineno - f.lineno >= FUNCTION_LINES]
    found += [node.lineno for node in nodes if isinstance(node, ast.stmt) and node.col_offset > 4 * DEPTH]
    return found + [line for line in source.splitlines() if len(line) > COLUMNS]


@pytest.mark.parametrize("name", [*NAMES, *COMMON])
def test_functions_are_short_and_flat(name):
    assert too_long_or_deep(text(name)) == []


def test_long_functions_deep_lines_and_wide_ones_are_seen():
    long = "def g():\n" + "    pass\n" * 80
    deep = "def h():\n" + "".join(f"{'    ' * k}if {k}:\n" for k in range(1, 5)) + "    " * 5 + "pass\n"
    assert too_long_or_deep(long) == ["g"] and too_long_or_deep(long.replace("    pass\n", "", 1)) == []
    assert too_long_or_deep(deep) == [6] and too_long_or_deep("#" * 121) == ["#" * 121]


@pytest.mark.parametrize("words", [["check"], ["format", "--check"]], ids=["check", "format"])
def test_ruff_passes(words):
    pytest.importorskip("ruff")
    done = subprocess.run([sys.executable, "-m", "ruff", *words, sync.ROOT], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


# Plain PyTorch


def function(name, wanted):
    (found,) = (
        node for node in ast.parse(text(name)).body if isinstance(node, ast.FunctionDef) and node.name == wanted
    )
    return found


def calls(node):
    """The dotted names that are called in `node`: torch.optim.Adam, loss.backward, ..."""
    return [ast.unparse(call.func) for call in ast.walk(node) if isinstance(call, ast.Call)]


@each_file
def test_train_makes_torchs_optimizers_and_steps_them_itself(name):
    train = function(name, "train")
    found = calls(train)
    optimizers = [
        node.targets[0].id
        for node in ast.walk(train)
        if isinstance(node, ast.Assign) and "torch.optim.Adam" in calls(node)
    ]
    assert len(optimizers) >= 2 and all(optimizer.endswith("_optimizer") for optimizer in optimizers)
    for optimizer in optimizers:
        assert found.count(f"{optimizer}.zero_grad") == found.count(f"{optimizer}.step") == 1
    assert found.count("loss.backward") == len(optimizers)
    loops = [node for node in train.body if isinstance(node, ast.For)]
    assert [ast.unparse(loop.iter.func) for loop in loops] == ["run.steps"]  # one visible loop


@each_file
def test_nothing_stands_between_the_file_and_torch(name):
    """No optimizer, gradient or random number outside `train`, the losses and the samplers; none made by common/."""
    tree = ast.parse(text(name))
    outside = [node for node in tree.body if getattr(node, "name", "") != "train"]
    for node in outside:
        used = calls(node)
        assert not [call for call in used if call.startswith("torch.optim") or call.endswith((".backward", ".step"))]
    bases = [ast.unparse(base) for node in tree.body if isinstance(node, ast.ClassDef) for base in node.bases]
    assert set(bases) <= {"nn.Module", "RunArgs"}


@pytest.mark.parametrize("name", COMMON)
def test_common_trains_nothing(name):
    source = text(name)
    used = calls(ast.parse(source))
    assert "torch.optim" not in source and not [call for call in used if call.endswith((".backward", "zero_grad"))]


# Equations


def stated(name):
    """Number -> formula without spaces, of the docstring's lines `(n) formula   remark`; a formula may go on."""
    lines = re.findall(r"^ +\((\d+)\) +(.*)$", docstring_and_body(name)[0], re.MULTILINE)
    return {int(number): re.sub(r"\s", "", re.split(r"\s{3,}", rest)[0]) for number, rest in lines}


def used(source):
    """The numbers in `Eq. (3)`, `Eqs. (1), (2) and (3)`, `Eqs. (1) to (3)`."""
    found = set()
    for group in re.findall(r"Eqs?\.\s((?:\(\d+\)(?:,? and |, | to )?)+)", source):
        numbers = [int(n) for n in re.findall(r"\d+", group)]
        found |= set(range(numbers[0], numbers[-1] + 1)) if " to " in group else set(numbers)
    return found


def test_equation_tags_are_read_in_every_form():
    assert used("Eq. (3) and Eqs. (5), (7) and (9), Eqs. (11) to (13)") == {3, 5, 7, 9, 11, 12, 13}


@each_file
def test_every_equation_stated_is_tagged_and_every_tag_is_stated(name):
    docstring, body = docstring_and_body(name)
    assert used(body) == stated(name).keys()
    assert used(docstring) <= stated(name).keys()


@each_pair
def test_an_equation_has_one_number_everywhere(one, other):
    first, second = stated(one), stated(other)
    assert {n: first[n] for n in first.keys() & second.keys()} == {n: second[n] for n in first.keys() & second.keys()}


@each_file
def test_equations_are_stated_once(name):
    numbers = re.findall(r"^ +\((\d+)\) ", docstring_and_body(name)[0], re.MULTILINE)
    assert len(numbers) == len(set(numbers)) > 0


# Who imports whom


def imported(path):
    nodes = list(ast.walk(ast.parse(path.read_text())))
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    return {name.split(".")[0] for name in names + [n.module or "" for n in nodes if isinstance(n, ast.ImportFrom)]}


@pytest.mark.parametrize("path", [*NAMES, *COMMON])
def test_nothing_imports_an_algorithm_file(path):
    assert imported(sync.ROOT / path) & {name.removesuffix(".py") for name in NAMES} == set()
