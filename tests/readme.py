"""The parts of README that are made from the sources: equation -> line, and the list of differences.

python tests/readme.py      write them into README.md
"""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
FILES = ["iql_critic.py", "gmpo.py", "gmpg.py", "idql.py"]


def equation_lines(name: str) -> dict[int, int]:
    """Equation number -> the line that computes it: code tagged with it, else the docstring of its function."""
    text = (ROOT / name).read_text()
    first, last = (text[: text.index(title)].count("\n") + 1 for title in ("# 2. Networks", "# 6. Training"))
    code, docstrings = {}, {}
    for number, line in enumerate(text.splitlines()[:last], 1):
        before, *tags = re.split(r"Eqs?\. ((?:\(\d+\)(?:, | and )?)+)", line)
        if tags and number > first and not line.strip().startswith("#"):
            for equation in re.findall(r"\d+", " ".join(tags[::2])):
                (code if "#" in before else docstrings).setdefault(int(equation), number)
    return docstrings | code


def formulas() -> dict[int, str]:
    """Equation number -> its formula, as the first file that states it has it."""
    found = {}
    for name in FILES:
        for number, formula in re.findall(r"^    \((\d+)\) +(\S.*?)(?: {2,}.*)?$", (ROOT / name).read_text(), re.M):
            found.setdefault(int(number), formula)
    return found


def equation_table() -> str:
    lines = {name: equation_lines(name) for name in FILES}
    rows = ["| | equation | " + " | ".join(f"`{name}`" for name in FILES) + " |", "| --- " * (len(FILES) + 2) + "|"]
    for number, formula in sorted(formulas().items()):
        shown = formula.replace("|", "\\|")
        cells = [f"[{k}]({name}#L{k})" if (k := lines[name].get(number)) else "" for name in FILES]
        rows.append(f"| ({number}) | `{shown}` | " + " | ".join(cells) + " |")
    return "\n".join(rows)


def differences() -> str:
    """A bullet for each `# differs from ...` comment, with the files that have it; first those about bugs."""
    bugs, choices = {}, {}
    for name in FILES:
        lines = (ROOT / name).read_text().splitlines()
        for k, line in enumerate(lines):
            if (text := line.strip()).startswith("# differs from "):
                while lines[k + 1].strip().startswith("# ") and not lines[k + 1].strip().startswith("# differs"):
                    k += 1
                    text += " " + lines[k].strip()[2:]
                found = bugs if text.startswith("# differs from a bug in ") else choices
                text = text.removeprefix("# ").removeprefix("differs from a bug in ")
                found.setdefault(text[0].upper() + text[1:], []).append(f"`{name}`")
    lists = ["\n".join(f"* {text}. ({', '.join(names)})" for text, names in found.items()) for found in (bugs, choices)]
    return "Mistakes in the authors' code that are put right here:\n\n{}\n\nChoices of our own:\n\n{}".format(*lists)


def current() -> str:
    """README.md with these parts made anew."""
    text = (ROOT / "README.md").read_text()
    for name, content in (("equations", equation_table()), ("differences", differences())):
        pattern = rf"(<!-- {name}: made by tests/readme.py -->\n).*?(<!-- end -->)"
        text = re.sub(pattern, lambda match, content=content: f"{match[1]}{content}\n{match[2]}", text, flags=re.S)
    return text


if __name__ == "__main__":
    (ROOT / "README.md").write_text(current())
