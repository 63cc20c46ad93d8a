"""Code and documentation use the terms of the field: nothing of the banned list in pyproject.toml."""

import ast
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
WORDS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["glm-rlhf"]["words"]
SUFFIXES = (".py", ".md", ".yaml")
BETWEEN = r"(?:_|\s+(?:\#\s*)?|\"\s*f?\")+"
"""Between the words of a phrase: `_`, space, a line break with a comment sign, or the seam of two strings."""


def phrase_pattern(phrases: list[str]) -> re.Pattern[str]:
    """A pattern of any of the phrases, as whole words."""
    alternatives = (BETWEEN.join(map(re.escape, phrase.split())) for phrase in sorted(phrases, reverse=True))
    return re.compile(rf"(?<![a-z0-9])(?:{'|'.join(alternatives)})(?![a-z0-9])", re.IGNORECASE)


def phrases_in(text: str, phrases: dict[str, str]) -> Iterator[tuple[int, str]]:
    """Yield (line, banned phrase as it is listed)."""
    for match in phrase_pattern(list(phrases)).finditer(text):
        yield text.count("\n", 0, match.start()) + 1, re.sub(BETWEEN, " ", match[0].lower())


def names_in(text: str, names: dict[str, str]) -> Iterator[tuple[int, str]]:
    """Yield (line, banned name) of the identifiers of Python code, imports and decorators excepted."""
    tree = ast.parse(text)
    decorators = {id(item) for node in ast.walk(tree) for item in getattr(node, "decorator_list", ())}
    foreign = {id(item) for node in ast.walk(tree) if id(node) in decorators for item in ast.walk(node)}
    for node in ast.walk(tree):
        if isinstance(node, ast.alias) or id(node) in foreign:
            continue
        for field in ("id", "attr", "arg", "name"):
            name = getattr(node, field, None)
            if isinstance(name, str) and name.lstrip("_") in names:
                yield node.lineno, name.lstrip("_")


def checked_files() -> list[Path]:
    paths = [ROOT / name for name in WORDS["checked"]]
    files = [file for path in paths for file in ([path] if path.is_file() else path.rglob("*"))]
    return sorted(file for file in files if file.suffix in SUFFIXES and "__pycache__" not in file.parts)


def findings() -> list[str]:
    found = []
    for file in checked_files():
        text, name = file.read_text(), file.relative_to(ROOT).as_posix()
        hits = [*phrases_in(text, WORDS["phrases"])]
        if file.suffix == ".py":
            hits += names_in(text, WORDS["names"])
        replacements = WORDS["phrases"] | WORDS["names"]
        found += [
            f"{name}:{line}: {phrase!r}: write {replacements[phrase]!r}"
            for line, phrase in sorted(hits)
            if f"{name}: {phrase}" not in WORDS["allowed"]
        ]
    return found


def test_no_banned_word_is_used():
    found = findings()
    assert not found, "\n".join(["banned words, see [tool.glm-rlhf.words] in pyproject.toml:", *found])


def test_every_checked_path_exists_and_every_exception_is_used():
    assert [name for name in WORDS["checked"] if not (ROOT / name).exists()] == []
    texts = {file.relative_to(ROOT).as_posix(): file.read_text() for file in checked_files()}
    for exception in WORDS["allowed"]:
        name, phrase = exception.split(": ")
        kinds = WORDS["phrases"], WORDS["names"]
        hits = {*phrases_in(texts[name], kinds[0])} | {*names_in(texts[name], kinds[1])}
        assert phrase in {hit for _, hit in hits}, f"{exception} is not needed any more"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("# training goes\n    # on", [(1, "goes on")]),
        ("def test_training_goes_on():", [(1, "goes on")]),
        ("x = 1\n'What was Left Out'", [(2, "left out")]),
        ('"rows are left "\n    f"out here"', [(1, "left out")]),
        ("mending, cargo on, parkour", []),
    ],
)
def test_phrases_are_found_over_lines_and_in_names(text: str, expected: list[tuple[int, str]]):
    phrases = dict.fromkeys(("goes on", "left out", "mend", "go on", "park"), "")
    assert list(phrases_in(text, phrases)) == expected


def test_names_are_whole_identifiers():
    lines = (
        "from hypothesis import given",
        "_given = Leaving(f'{x.told}')",
        "# given",
        "x.given_up = 'Leaving'",
    )
    text = "\n".join((*lines, "@given()", "def f(told): ..."))
    names = dict.fromkeys(("given", "Leaving", "told"), "")
    assert sorted(names_in(text, names)) == [(2, "Leaving"), (2, "given"), (2, "told"), (6, "told")]
