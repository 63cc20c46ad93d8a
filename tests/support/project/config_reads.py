"""The settings that a command's code reads, found in the sources reachable from its function.

From a command's function on, every name that stands for a function, class or constant of the engine is
followed. Reads are attributes of a section: `config.train.steps`, of a local name for one
(`train = config.train`), of a parameter annotated with a section's class, of an attribute that holds one, or
of `algorithm.section`, which is that of an algorithm of RL.
Checks within a config (`__post_init__`) and writing it as a whole do not count as reads.
"""

import ast
import dataclasses
import functools
from collections.abc import Iterator
from pathlib import Path

from glm_rlhf.engine.rl.algorithm import UpdateSection

ROOT = Path(__file__).resolve().parents[3]
PACKAGE = "glm_rlhf.engine"
OF_ALGORITHM = "section"
"""Attribute of an algorithm with its section."""
Place = tuple[str, str]
"""A module and a top-level name."""


def reads_of(function: str, sections: dict[str, type]) -> set[tuple[str, str]]:
    """Return (section, key) for every key that is read from `module:function` on.

    Args:
        function: entry point of a command.
        sections: of its config, by name.
    """
    names = {section.__name__ for section in sections.values()}
    read: set[tuple[str, str]] = set()
    for _, definition in _reached(tuple(function.split(":"))):
        read |= _reads_in(definition, {*sections, OF_ALGORITHM}, names)
    of_algorithms = {name for name, section in sections.items() if _is_of_algorithm(section)}
    read |= {(name, key) for owner, key in read if owner == OF_ALGORITHM for name in of_algorithms}
    by_class = {section.__name__: name for name, section in sections.items()}
    shared = {(by_class.get(owner, owner), key) for owner, key in read}
    return read | shared


def _is_of_algorithm(section: type) -> bool:
    """Return whether a section has what `UpdateSection` asks of an algorithm's."""
    wanted = {name for name in vars(UpdateSection) if not name.startswith("_")}
    return wanted <= {field.name for field in dataclasses.fields(section)}


def _reached(start: Place) -> Iterator[tuple[Place, ast.AST]]:
    waiting, seen = [start], {start}
    while waiting:
        place = waiting.pop()
        module = _module(place[0])
        definition = module.definitions.get(place[1])
        if definition is None:
            continue
        yield place, definition
        for node in _walk(definition):
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
                target = module.targets.get(node.id)
                if target is not None and target not in seen:
                    seen.add(target)
                    waiting.append(target)


class _Module:
    """The top-level definitions of one module, and the meaning of its names."""

    def __init__(self, tree: ast.Module, name: str) -> None:
        self.definitions: dict[str, ast.AST] = {}
        self.targets: dict[str, Place] = {}
        for node in tree.body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                self.definitions[node.name] = node
            elif isinstance(node, ast.Assign):
                for target in node.targets:
                    if isinstance(target, ast.Name):
                        self.definitions[target.id] = node
        self.targets = {known: (name, known) for known in self.definitions}
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(PACKAGE):
                for alias in node.names:
                    self.targets[alias.asname or alias.name] = (node.module, alias.name)


@functools.cache
def _module(name: str) -> _Module:
    path = ROOT.joinpath("engine", *name.removeprefix(PACKAGE).strip(".").split("."))
    file = path.with_suffix(".py") if path.with_suffix(".py").exists() else path / "__init__.py"
    return _Module(ast.parse(file.read_text(encoding="utf-8")), name)


def _walk(node: ast.AST) -> Iterator[ast.AST]:
    """Yield a definition's nodes except those of `__post_init__`."""
    yield node
    for child in ast.iter_child_nodes(node):
        if not (isinstance(child, ast.FunctionDef) and child.name == "__post_init__"):
            yield from _walk(child)


def _reads_in(definition: ast.AST, sections: set[str], classes: set[str]) -> set[tuple[str, str]]:
    owners = _owners_in(definition, sections, classes)
    read = set()
    for node in _walk(definition):
        if isinstance(node, ast.Attribute):
            for owner in _owners_of(node.value, sections, owners):
                read.add((owner, node.attr))
    return read


def _owners_in(definition: ast.AST, sections: set[str], classes: set[str]) -> dict[str, set[str]]:
    """Return, by local name and by attribute of self, which sections or section classes it stands for."""
    owners: dict[str, set[str]] = {}
    for node in _walk(definition):
        if isinstance(node, ast.arg) and node.annotation is not None:
            named = {part.id for part in ast.walk(node.annotation) if isinstance(part, ast.Name)}
            owners.setdefault(node.arg, set()).update(named & classes)
    for node in _walk(definition):
        if not isinstance(node, ast.Assign):
            continue
        (target,) = node.targets[:1]
        pairs = [(target, node.value)]
        if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
            pairs = list(zip(target.elts, node.value.elts, strict=False))
        for left, right in pairs:
            found = _owners_of(right, sections, owners)
            name = left.id if isinstance(left, ast.Name) else getattr(left, "attr", None)
            if found and name is not None:
                owners.setdefault(name, set()).update(found)
    return owners


def _owners_of(node: ast.AST, sections: set[str], owners: dict[str, set[str]]) -> set[str]:
    """Return the sections that an expression may be."""
    if isinstance(node, ast.Name):
        return owners.get(node.id, set())
    if isinstance(node, ast.Attribute):
        is_own = isinstance(node.value, ast.Name) and node.value.id == "self"
        held = owners.get(node.attr, set()) if is_own else set()
        return held or ({node.attr} & sections)
    return set()
