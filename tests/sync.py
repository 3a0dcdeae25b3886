"""One name, one body: what two algorithm files both define at top level is the same text in both, OWN excepted.

python tests/sync.py gmpo.py      copy gmpo.py's shared definitions into the other files
"""

import ast
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
FILES = ["iql_critic.py", "gmpo.py", "gmpg.py", "idql.py"]

# The names that are the lesson: each file has its own.
OWN = {"NAME", "Args", "OURS", "SETTINGS", "sample", "f", "matching_loss", "policy_loss", "act", "load_policy"}
OWN |= {"matching_loss", "evaluate", "evaluate_bandit", "train"}


def definitions(name: str) -> dict[str, tuple[int, int, str]]:
    """Top-level name -> (first line, last line, text), comments directly above included, in the order of the file."""
    text = (ROOT / name).read_text()
    lines, found = text.splitlines(), {}
    for node in ast.parse(text).body:
        if isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names = [n.id for target in targets for n in ast.walk(target) if isinstance(n, ast.Name)]
        else:
            names = [node.name] if isinstance(node, ast.FunctionDef | ast.ClassDef) else []
        first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))])
        while first > 1 and re.match(r"#(?! (---|\d+\.))", lines[first - 2]):  # a comment, but not a section's heading
            first -= 1
        last = node.end_lineno
        found |= {n: (first, last, "\n".join(lines[first - 1 : last])) for n in names}
    return found


def files() -> list[str]:
    return [name for name in FILES if (ROOT / name).exists()]


def changed_lines(one: str, other: str) -> int:
    """How many lines `diff one other` shows."""
    shown = subprocess.run(["diff", ROOT / one, ROOT / other], capture_output=True, text=True).stdout
    return sum(line.startswith(("<", ">")) for line in shown.splitlines())


def copy_from(source: str) -> None:
    """Write the shared definitions of `source` into every other file, last one first so that line numbers stay true."""
    shared = definitions(source)
    for name in set(files()) - {source}:
        lines = (ROOT / name).read_text().splitlines()
        for key, (first, last, text) in sorted(definitions(name).items(), key=lambda item: -item[1][0]):
            if key in shared and key not in OWN and shared[key][2] != text:
                lines[first - 1 : last] = shared[key][2].splitlines()
                print(f"{name}: {key}")
        (ROOT / name).write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    copy_from(sys.argv[1])
