"""Config text: YAML sections to values with their location, and values to YAML."""

import dataclasses
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from glm_rlhf.parallel.storage.model_folder import ModelFolderError
from glm_rlhf.parallel.storage.text_files import read_text


class ConfigError(ValueError):
    """A config that the user has to change; the message says what was given and what is required."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class YamlValue:
    """One value that the user set."""

    section: str
    """Part of its key before the dot."""
    name: str
    """Part of its key after the dot; empty where a whole section was given a value."""
    value: Any
    """The parsed value: null, bool, int, float, str, or a tuple or dict of them."""
    location: str
    """Its place for error messages: `ppo.yaml line 3`, or `command line`."""

    @property
    def path(self) -> str:
        """The key as written on the command line: `section.name`."""
        return f"{self.section}.{self.name}" if self.name else self.section


_MAX_BYTES = 2**17
"""Largest config file: one with every key has 20 KiB. YAML is read at some 200 KB/s."""
_MAX_VALUES = 10_000
"""Most values of a config, those that aliases repeat included."""


class _Loader(yaml.SafeLoader):
    """YAML 1.2 scalars: `1e-6` is a number; `no`, `010`, `12:30` and dates are text."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012  (yaml's own form: one table per class)


class _Dumper(yaml.SafeDumper):
    """Quotes text that YAML 1.1 or YAML 1.2 would read as another type."""


_NUMBER = re.compile(
    r"[-+]?(\.[0-9]+|[0-9]+\.[0-9]*)([eE][-+]?[0-9]+)?$|[-+]?[0-9]+[eE][-+]?[0-9]+$"
    r"|[-+]?\.(inf|Inf|INF)$|\.(nan|NaN|NAN)$"
)
_SCALARS = (
    ("null", re.compile(r"(~|null|Null|NULL|)$"), ["~", "n", "N", ""]),
    ("bool", re.compile(r"(true|True|TRUE|false|False|FALSE)$"), list("tTfF")),
    ("int", re.compile(r"[-+]?(0|[1-9][0-9_]*)$"), list("-+0123456789")),
    ("float", _NUMBER, list("-+0123456789.")),
)
for _tag, _pattern, _first in _SCALARS:
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", _pattern, _first)
_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", _NUMBER, list("-+0123456789."))


def read_file(path: str | os.PathLike[str]) -> list[YamlValue]:
    """Return the values of a YAML file of sections, in the order of the file.

    Raises:
        ConfigError: the file is missing, unreadable, not UTF-8, not YAML, not sections of keys, or sets a
            key twice; the message names the file and, if known, the line.
    """
    path = Path(path)
    if path.is_dir():
        raise ConfigError(f"{path} is a folder: name a YAML file in it")
    if not path.exists():
        raise ConfigError(f"there is no config file {path}")
    try:
        text = read_text(path, max_bytes=_MAX_BYTES)
    except ModelFolderError as error:
        raise ConfigError(str(error)) from None
    try:
        loader = _Loader(text)
        root = loader.get_single_node()
        _check_size(root, str(path))
        return list(_entries(loader, root, str(path)))
    except yaml.YAMLError as error:
        raise ConfigError(_yaml_problem(error, str(path))) from None
    except RecursionError:
        raise ConfigError(f"{path} nests too deeply: a config has sections of keys") from None
    except ValueError as error:  # a value that does not fit its tag
        raise error if isinstance(error, ConfigError) else ConfigError(f"{path}: {error}") from None


def read_value(text: str) -> object:
    """Return the YAML value of a command-line text; text that is not YAML is returned as it is."""
    try:
        loader = _Loader(text)
        root = loader.get_single_node()
        _check_size(root, "the command line")
        return None if root is None else _frozen(loader.construct_document(root))
    except (yaml.YAMLError, RecursionError, ValueError):
        return text


def _check_size(root: yaml.Node | None, file: str) -> None:
    """Raise ConfigError if a YAML document has too many values, each counted wherever an alias repeats it.

    Aliases of lists of aliases grow a short text to billions of values.
    """
    sizes: dict[int, int] = {}

    def size(node: yaml.Node) -> int:
        if id(node) not in sizes:
            sizes[id(node)] = 1  # also of an alias to itself, which has no end
            inner = node.value if isinstance(node, yaml.CollectionNode) else ()
            parts = (part for item in inner for part in (item if isinstance(item, tuple) else (item,)))
            sizes[id(node)] += sum(map(size, parts))
        return sizes[id(node)]

    if root is not None and (count := size(root)) > _MAX_VALUES:
        raise ConfigError(f"{file} holds {count} values, aliases counted; a config has at most {_MAX_VALUES}")


def to_yaml(sections: dict[str, Any]) -> str:
    """Return YAML text that `read_file` reads back as the same values.

    Args:
        sections: section → key → value.
    """
    return yaml.dump(sections, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110)


def _entries(loader: _Loader, root: yaml.Node | None, file: str) -> Iterator[YamlValue]:
    if root is None or _is_null(root):
        return
    for section, location, section_node in _pairs(root, file, "the file", "sections such as run: and model:"):
        if "." in section:
            head, _, tail = section.partition(".")
            raise ConfigError(
                f"{location}: {section} is the command line's form, in YAML write {tail}: below {head}:"
            )
        if _is_null(section_node):
            continue
        for name, key_location, node in _pairs(section_node, file, section, "keys, each on a line below it"):
            value = _frozen(loader.construct_object(node, deep=True))
            yield YamlValue(section=section, name=name, value=value, location=key_location)


def _pairs(node: yaml.Node, file: str, what: str, required: str) -> Iterator[tuple[str, str, yaml.Node]]:
    """Yield key, location and value node of a mapping whose keys are text and differ."""
    if not isinstance(node, yaml.MappingNode):
        kind = "a list" if isinstance(node, yaml.SequenceNode) else f"the value {node.value!r}"
        raise ConfigError(
            f"{file} line {node.start_mark.line + 1}: {what} is {kind}, it must hold {required}"
        )
    lines: dict[str, int] = {}
    for key_node, value_node in node.value:
        key, line = key_node.value, key_node.start_mark.line + 1
        if key_node.tag != "tag:yaml.org,2002:str" or not key:
            raise ConfigError(f"{file} line {line}: a key is not text: {key!r}")
        if key in lines:
            raise ConfigError(f"{file} line {line}: {key} is already set in line {lines[key]}, keep one")
        lines[key] = line
        yield key, f"{file} line {line}", value_node


def _is_null(node: yaml.Node) -> bool:
    return node.tag == "tag:yaml.org,2002:null"


def _frozen(value: Any) -> Any:
    """Return a value with its lists replaced by tuples, so that a config is immutable."""
    if isinstance(value, list):
        return tuple(_frozen(item) for item in value)
    if isinstance(value, dict):
        return {key: _frozen(item) for key, item in value.items()}
    return value


def _yaml_problem(error: yaml.YAMLError, file: str) -> str:
    mark = getattr(error, "problem_mark", None)
    location = f"{file} line {mark.line + 1} column {mark.column + 1}" if mark else file
    problem = getattr(error, "problem", None) or getattr(error, "reason", None) or "it cannot be parsed"
    return f"{location} is not YAML: {problem}"
