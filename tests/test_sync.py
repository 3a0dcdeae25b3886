"""The files stay alike where they are alike, stand alone, stay short, and number their equations in one way."""

import ast
import itertools
import re

import pytest
import sync

NAMES = sync.files()
PAIRS = list(itertools.combinations(NAMES, 2))
LINES, FUNCTION_LINES, DEPTH, COLUMNS = 700, 80, 4, 120

# How many lines `diff` may show: what a reader of the second file has to read after the first.
DIFF_BUDGETS = {
    ("iql_critic.py", "gmpo.py"): 450,
    ("gmpo.py", "gmpg.py"): 340,
    ("gmpo.py", "idql.py"): 550,
}  # fmt: skip

each_file = pytest.mark.parametrize("name", NAMES)
each_pair = pytest.mark.parametrize("one, other", PAIRS)


def text(name):
    return (sync.ROOT / name).read_text()


def docstring_and_body(name):
    source = text(name)
    end = ast.parse(source).body[0].end_lineno
    lines = source.splitlines()
    return "\n".join(lines[:end]), "\n".join(lines[end:])


def shared(one, other):
    return sync.definitions(one).keys() & sync.definitions(other).keys() - sync.OWN


# One name, one body


@each_pair
def test_one_name_has_one_body(one, other):
    first, second = sync.definitions(one), sync.definitions(other)
    assert [name for name in shared(one, other) if first[name][2] != second[name][2]] == []


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
    (tmp_path / "a.py").write_text("def f():\n    x = 1\n    return x\n\n\ndef act():\n    return 1\n")
    (tmp_path / "b.py").write_text("def f():\n    return 2\n\n\ndef act():\n    return 2\n\n\nlast = 1\n")
    sync.copy_from("a.py")
    expected = "def f():\n    x = 1\n    return x\n\n\ndef act():\n    return 2\n\n\nlast = 1\n"
    assert (tmp_path / "b.py").read_text() == expected


# Sizes


@pytest.mark.parametrize("one, other", DIFF_BUDGETS)
def test_the_diff_of_two_files_stays_in_its_budget(one, other):
    assert sync.changed_lines(one, other) <= DIFF_BUDGETS[one, other]


@each_file
def test_a_file_stays_in_its_budget(name):
    lines = text(name).splitlines()
    assert len(lines) <= LINES
    assert [line for line in lines if len(line) > COLUMNS] == []


@each_file
def test_functions_are_short_and_flat(name):
    nodes = list(ast.walk(ast.parse(text(name))))
    functions = [node for node in nodes if isinstance(node, ast.FunctionDef)]
    assert [f.name for f in functions if f.end_lineno - f.lineno + 1 > FUNCTION_LINES] == []
    assert [node.lineno for node in nodes if isinstance(node, ast.stmt) and node.col_offset > 4 * DEPTH] == []


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


@pytest.mark.parametrize("path", [*NAMES, *sorted(f"common/{p.name}" for p in (sync.ROOT / "common").glob("*.py"))])
def test_nothing_imports_an_algorithm_file(path):
    assert imported(sync.ROOT / path) & {name.removesuffix(".py") for name in sync.FILES} == set()
