"""A config from a YAML file and command-line overrides, validated key by key."""

import dataclasses
import os
import re
import types
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from glm_rlhf.engine.config.keys import RENAMED_KEYS, Key, in_yaml, keys_of, nearest_key, section_factories
from glm_rlhf.engine.config.yaml_source import ConfigError, YamlValue, read_file, read_value, to_yaml
from glm_rlhf.parallel.storage.durable_io import replace_text

__all__ = ["FILE_NAME", "ConfigError", "dump_config", "is_override", "load_config", "save_config"]

Config = TypeVar("Config")

FILE_NAME = "config.yaml"
_MAX_NAMED = 20
"""Unknown keys that a message names, each with the nearest valid one, which takes a millisecond."""
COMMAND_LINE = "command line"
_OVERRIDE = re.compile(r"-*[A-Za-z_][A-Za-z0-9_.\-]*=")
_KINDS = {bool: "true or false", int: "a whole number", float: "a number", str: "text", tuple: "a list"}


def load_config(
    config_class: type[Config], path: str | os.PathLike[str] | None = None, overrides: Iterable[str] = ()
) -> Config:
    """Return a validated root config, built from a YAML file and `a.b=c` overrides.

    Precedence: a later override, an earlier override, the file, the default.

    Args:
        config_class: a root of `glm_rlhf.engine.config.sections`, e.g. `ScoreConfig`.
        path: YAML file of sections; None: defaults only.
        overrides: `section.key=value` each; the value is YAML, or plain text where the key takes text.

    Raises:
        ConfigError: an unreadable file, unknown or missing keys, values of a wrong type or range, invalid
            combinations. The message names all wrong keys at once, 20 unknown ones at most.
    """
    keys = keys_of(config_class)
    problems: list[str] = []
    entries = [*(read_file(path) if path is not None else ()), *(_override(text, keys) for text in overrides)]
    values_by_path = {entry.path: entry for entry in entries}
    unknown = [entry for entry in entries if entry.path not in keys]
    problems += [_unknown(entry, keys) for entry in unknown[:_MAX_NAMED]]
    if len(unknown) > _MAX_NAMED:
        problems.append(f"and {len(unknown) - _MAX_NAMED} more keys are unknown")
    if problems:
        raise ConfigError("; ".join(problems))
    sections = {}
    for section, factory in section_factories(config_class).items():
        values = {entry.name: entry.value for entry in values_by_path.values() if entry.section == section}
        try:
            sections[section] = factory(**values)
        except ValidationError as error:
            problems += dict.fromkeys(_problems(error, section, keys, values_by_path))  # a list's items: once
    if problems:
        raise ConfigError("; ".join(problems))
    try:
        return config_class(**sections)
    except ValidationError as error:
        raise ConfigError("; ".join(_reason(detail) for detail in error.errors())) from None


class FromYaml:
    """`from_yaml` of a root config: `load_config` as its class method, typed to return that root."""

    def __get__(self, instance: object, root: type[Config]) -> Callable[..., Config]:
        """Return `load_config` for this root."""
        return types.MethodType(load_config, root)


def dump_config(config: object) -> str:
    """Return a config as YAML that `load_config` reads back as an equal config."""
    assert dataclasses.is_dataclass(config)
    assert not isinstance(config, type)
    return to_yaml({section: _plain(values) for section, values in dataclasses.asdict(config).items()})


def save_config(config: object, folder: str | os.PathLike[str]) -> Path:
    """Write the config to `<folder>/config.yaml` and return that path; one rank calls this.

    Raises:
        OSError: the folder cannot be created or written.
    """
    path = Path(folder) / FILE_NAME
    replace_text(path, dump_config(config))
    return path


def is_override(argument: str) -> bool:
    """Return whether a command-line argument sets a key; otherwise it names a file."""
    return _OVERRIDE.match(argument) is not None


def _override(text: str, keys: dict[str, Key]) -> YamlValue:
    path, sign, value = text.partition("=")
    if not sign or not path:
        raise ConfigError(f"{COMMAND_LINE}: {text!r} sets no key: write section.key=value")
    if path.startswith("-"):
        raise ConfigError(f"{COMMAND_LINE}: {text} has dashes: write {path.lstrip('-')}={value}")
    section, _, name = path.partition(".")
    key = keys.get(path)
    if not value:
        required = "a value, or null for none" if key and key.may_be_null else "a value"
        raise ConfigError(f"{COMMAND_LINE}: {path}= is empty: give {required}")
    return YamlValue(section=section, name=name, value=_value(value, key), location=COMMAND_LINE)


def _value(text: str, key: Key | None) -> Any:
    """Return an override's value: unparsed for a key of text, unless it is quoted or null; else as YAML."""
    is_quoted = len(text) > 1 and text[0] == text[-1] and text[0] in "'\""
    is_null = key is not None and key.may_be_null and text == "null"
    return text if key is not None and key.is_text and not is_quoted and not is_null else read_value(text)


def _unknown(entry: YamlValue, keys: dict[str, Key]) -> str:
    of_section = [key for key in keys.values() if key.section == entry.section]
    if of_section and not entry.name:
        return (
            f"{entry.location}: {entry.path} is a section: set its keys one by one, "
            f"such as {of_section[0].path}=…"
        )
    if RENAMED_KEYS.get(entry.path) in keys:
        return f"{entry.location}: {entry.path} is now called {RENAMED_KEYS[entry.path]}"
    nearest = nearest_key(entry.path, keys)
    return f"{entry.location}: unknown key {entry.path:.200}, the nearest valid key is {nearest}"


def _problems(
    error: ValidationError, section: str, keys: dict[str, Key], values_by_path: dict[str, YamlValue]
) -> Iterator[str]:
    for detail in error.errors():
        kind, location = detail["type"], detail["loc"]
        if not location:
            yield _reason(detail)
            continue
        path = f"{section}.{location[0]}"
        if kind == "missing" and len(location) == 1:
            in_file = f"{location[0]}: below {section}: in the file"
            yield f"{path} is required: add {path}=… to the command line, or {in_file}"
            continue
        entry = values_by_path.get(path)
        location_prefix = "" if entry is None else f"{entry.location}: "
        value = detail["input"] if entry is None else entry.value
        subject = f"{location_prefix}{path} is {_shown(value)}"
        if kind == "value_error":
            yield f"{subject}: {_reason(detail)}"
        else:
            yield f"{subject}, it must be {keys[path].accepts}{_hint(value, keys[path])}"


def _reason(detail: Any) -> str:
    cause = detail.get("ctx", {}).get("error")
    return str(cause) if cause is not None else detail["msg"]


def _shown(value: Any) -> str:
    """Return a value with its kind, so that the text `'true'` differs from `true`."""
    if value is None:
        return "null"
    text = repr(value) if isinstance(value, str) else in_yaml(value)
    text = text if len(text) <= 80 else text[:77] + "…"
    kind = next((name for python, name in _KINDS.items() if type(value) is python), "a mapping")
    return text if isinstance(value, bool) else f"{text} ({kind})"


def _hint(value: Any, key: Key) -> str:
    """Return how to fix a value of which only the notation is wrong; empty for others."""
    if isinstance(value, str) and not key.is_text:
        written = value.strip().lower()
        meant = {"yes": True, "on": True, "no": False, "off": False}.get(written, read_value(written))
        if isinstance(meant, bool) == (key.value_type is bool) and isinstance(meant, bool | int | float):
            return f": write {in_yaml(meant)} without quotes"
    if key.accepts.startswith("text") and isinstance(value, bool | int | float):
        return f': write "{in_yaml(value)}" in quotes'
    if isinstance(value, float) and value.is_integer() and key.value_type is int:
        return f": write {int(value)}"
    return ""


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value
