"""The glossary speaks of what is there: keys, metrics, names and files; and of every public name."""

import ast
import functools
import re

import pytest
from doc_pages import DOCS, ROOT

from glm_rlhf import kernels
from glm_rlhf.engine import __all__ as engine_names
from glm_rlhf.engine.cli import COMMANDS
from glm_rlhf.engine.config.keys import keys_of

LAYERS = ("engine", "kernels", "parallel")


def rows() -> list[tuple[str, str, str]]:
    """Term, meaning and place of every row, in order."""
    text = (DOCS / "glossary.md").read_text(encoding="utf-8")
    found = re.findall(r"^\| (.+?) \| (.+) \| (.+?) \|$", text, re.MULTILINE)
    return [row for row in found if row[0] != "term"]


def test_every_row_names_what_exists():
    gone = [
        (term, code)
        for term, _, where in rows()
        for code in re.findall(r"`([^`]+)`", where) or ["nothing"]
        if not exists(code)
    ]
    assert gone == []


def test_terms_are_defined_once_and_briefly():
    terms = [term for row in rows() for term in row[0].split(", ")]
    assert len(rows()) > 40
    assert sorted(terms) == sorted(set(terms))
    assert [term for term, meaning, _ in rows() if len(meaning) > 160] == []


def test_every_public_name_is_in_it():
    named = {code for *_, where in rows() for code in re.findall(r"`([^`]+)`", where)}
    types = ast.parse((ROOT / "engine/types.py").read_text(encoding="utf-8")).body
    public = {*engine_names, *kernels.__all__, *(n.name for n in types if isinstance(n, ast.ClassDef))}
    assert sorted(public - named) == []


@pytest.mark.parametrize("code", ["ppo.gone", "actor/gone", "engine/gone.py", "gone_T"])
def test_the_check_sees_what_is_wrong(code):
    assert not exists(code)


def exists(code: str) -> bool:
    """Whether this is a key, a metric of the page of metrics, a file, or a name in the sources."""
    if code.endswith(".py"):
        return (ROOT / code).is_file()
    return code in keys() or code in metrics() or code in source_names()


@functools.cache
def keys() -> frozenset[str]:
    return frozenset(path for command in COMMANDS for path in keys_of(command.config))


@functools.cache
def metrics() -> frozenset[str]:
    page = (DOCS / "metrics.md").read_text(encoding="utf-8")
    return frozenset(re.findall(r"^\| `([\w/@]+)` \|", page, re.MULTILINE))


@functools.cache
def source_names() -> frozenset[str]:
    """Every identifier, argument, attribute and imported module of the sources, and every short text."""
    found = set()
    for path in (path for layer in LAYERS for path in (ROOT / layer).rglob("*.py")):
        found.add(path.stem)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            for field in ("name", "id", "attr", "arg", "value"):
                value = getattr(node, field, None)
                if isinstance(value, str) and value.isidentifier():
                    found.add(value)
    return frozenset(found)
