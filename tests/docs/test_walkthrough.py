"""The page that walks through the code names files, functions and methods that are there."""

import ast
import functools
import re
from pathlib import Path

import pytest
from doc_pages import DOCS, ROOT, inline_code, prose

PAGE = DOCS / "follow_a_batch.md"
NAME = re.compile(r"([\w/]+\.py):([\w.]+)")
MAX_LINES = 12
"""Lines of one walk: more is no longer a first reading."""
CLIP = {"clip", "clip_low", "clip_high"}
"""Names of `ppo.clip` in the code."""
MAX_FILES = 9
"""Files from the command line and the declaration of `ppo.clip` to its kernel."""


def test_every_name_of_the_page_exists():
    names = [match.groups() for code in inline_code(PAGE) if (match := NAME.fullmatch(code))]
    assert len(names) > 40
    assert [f"{path}:{name}" for path, name in names if not is_defined(ROOT / path, name)] == []


def test_each_walk_is_short_and_every_line_names_code():
    _, *walks = re.split(r"^## ", prose(PAGE), flags=re.MULTILINE)
    assert len(walks) == 3
    for walk in walks:
        lines = [line for line in walk.splitlines() if re.match(r"\d+\. ", line)]
        assert 0 < len(lines) <= MAX_LINES
        assert [line for line in lines if not NAME.search(line)] == []


def test_the_walk_of_one_setting_lists_every_file_that_names_it():
    walk = re.split(r"^## ", prose(PAGE), flags=re.MULTILINE)[3]
    listed = {path for path, _ in NAME.findall(walk)}
    naming = {
        path.relative_to(ROOT).as_posix()
        for room in ("engine", "kernels", "parallel")
        for path in sorted((ROOT / room).rglob("*.py"))
        if CLIP & identifiers(path) and path.relative_to(ROOT).parts[:2] != ("engine", "bench")
    }
    # The references are plain PyTorch formulas that the kernels are compared with.
    assert {path for path in naming if not Path(path).name.startswith("reference_")} <= listed
    assert len(naming) > 3
    assert len(listed) <= MAX_FILES


def identifiers(path: Path) -> set[str]:
    """The names that a file's code reads, assigns, takes or passes."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {
        getattr(node, field)
        for node in ast.walk(tree)
        for field in ("id", "attr", "arg")
        if isinstance(getattr(node, field, None), str)
    }


def is_defined(path: Path, name: str) -> bool:
    """Whether a file defines a function or class at its top, or a method, by its dotted name."""
    return path.is_file() and name in definitions(path)


@functools.cache
def definitions(path: Path) -> frozenset[str]:
    """The dotted names of a file's functions, classes and methods."""
    found = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
            members = node.body if isinstance(node, ast.ClassDef) else ()
            found |= {
                f"{node.name}.{member.name}" for member in members if isinstance(member, ast.FunctionDef)
            }
    return frozenset(found)


@pytest.mark.parametrize(
    ("path", "name", "expected"),
    [
        ("engine/cli.py", "main", True),
        ("engine/rl/engine.py", "PPOEngine.generate", True),
        ("engine/cli.py", "gone", False),
        ("engine/gone.py", "main", False),
    ],
)
def test_the_check_sees_what_is_wrong(path, name, expected):
    assert is_defined(ROOT / path, name) is expected
