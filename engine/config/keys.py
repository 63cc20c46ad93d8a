"""The keys of a config: what each accepts, its default and its meaning."""

import dataclasses
import difflib
import functools
import textwrap
import types
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import annotated_types
from pydantic.dataclasses import is_pydantic_dataclass
from pydantic.fields import FieldInfo

HELP_WIDTH = 100
RENAMED_KEYS = {
    "train.park": "train.offload",
    "ppo.scores_early": "ppo.overlap_scoring",
}
"""Old key → new key; the old one is refused with the new name."""
_BOUNDS: tuple[tuple[type, str, str], ...] = (
    (annotated_types.Ge, "ge", "at least"),
    (annotated_types.Gt, "gt", "above"),
    (annotated_types.Le, "le", "at most"),
    (annotated_types.Lt, "lt", "below"),
)
_TYPE_NAMES = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Required:
    """Default of a key that the user must set."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Described:
    """Description of a value type that its Python type does not give; goes into `Annotated`."""

    accepts: str
    """Completes "it must be …"."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Key:
    """One setting, as a user sees it."""

    section: str
    """Name of the root's field, e.g. `train`."""
    name: str
    """Name within the section, e.g. `dtype`."""
    accepts: str
    """Completes "it must be …": type, range, choices."""
    default: Any
    """Value where the user sets none, or `Required()`."""
    meaning: str
    """The string below the field: meaning and unit."""
    value_type: type
    """Python type of its values other than null: bool, int, float, str, tuple."""
    may_be_null: bool
    """Whether `null` is a value."""

    @property
    def path(self) -> str:
        """The key as written on the command line: `section.name`."""
        return f"{self.section}.{self.name}"

    @property
    def is_text(self) -> bool:
        """Whether values are text, so that the command line takes them unparsed."""
        return self.value_type is str

    @property
    def is_required(self) -> bool:
        """Whether the user must set it."""
        return isinstance(self.default, Required)


def section_factories(config_class: type) -> dict[str, functools.partial[Any]]:
    """Return section name → callable that builds the section from keyword arguments, in the root's order.

    A root's field is declared with its section's class and may have a `default_factory`, which is the class
    or a `functools.partial` of it: the partial's keywords are defaults of this command.

    Raises:
        AssertionError: a field of the root is not a section.
    """
    factories = {}
    for name, field in _fields_of(config_class).items():
        factory: Any = field.annotation if field.default_factory is None else field.default_factory
        factory = factory if isinstance(factory, functools.partial) else functools.partial(factory)
        assert dataclasses.is_dataclass(factory.func), f"{config_class.__name__}.{name} is not a section"
        factories[name] = factory
    return factories


def keys_of(config_class: type) -> dict[str, Key]:
    """Return path (`section.name`) → key of a root config, in the order of declaration."""
    keys = {}
    for section, factory in section_factories(config_class).items():
        for name, field in _fields_of(factory.func).items():
            annotation, may_be_null, metadata = _unwrapped(field.annotation, field.metadata)
            key = Key(
                section=section,
                name=name,
                accepts=_describe(annotation, metadata) + (" or null" if may_be_null else ""),
                default=factory.keywords.get(name, _default(field)),
                meaning=_meaning(factory.func, name),
                value_type=_value_type(annotation),
                may_be_null=may_be_null,
            )
            keys[key.path] = key
    return keys


def _fields_of(section: object) -> dict[str, FieldInfo]:
    assert isinstance(section, type), f"{section} is not a section"
    assert is_pydantic_dataclass(section), f"{section.__name__} is not a section"
    return section.__pydantic_fields__


def nearest_key(path: str, keys: Mapping[str, Key]) -> str:
    """Return the valid key path that is nearest to `path`.

    Keys of the same name in other sections come first, then the most similar spelling.
    """
    name = path.rpartition(".")[2]
    namesakes = [key.path for key in keys.values() if key.name == name]
    candidates = namesakes or list(keys)
    return max(candidates, key=lambda candidate: difflib.SequenceMatcher(None, path, candidate).ratio())


def in_yaml(value: object) -> str:
    """Return a value as YAML text on one line."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, tuple):
        return "[" + ", ".join(in_yaml(item) for item in value) + "]"
    return str(value)


def help_text(config_class: type) -> str:
    """Return the help text of a root config: type, default and meaning of each key."""
    lines: list[str] = []
    section = None
    keys = keys_of(config_class)
    width = max(len(path) for path in keys)
    for key in keys.values():
        if key.section != section:
            section = key.section
            purpose = section_factories(config_class)[section].func.__doc__ or ""
            lines += ["", f"{section}: {purpose.strip().splitlines()[0]}"]
        default = "required" if key.is_required else f"default {in_yaml(key.default)}"
        lines.append(f"  {key.path:<{width}}  {key.accepts} ({default})")
        lines += textwrap.wrap(key.meaning, HELP_WIDTH, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return "\n".join(lines[1:])


def _meaning(section: object, name: str) -> str:
    """Return the string below a field; pydantic keeps it only in the class that declares the field."""
    assert isinstance(section, type), f"{section} is not a section"
    declared = [vars(base).get("__pydantic_fields__", {}) for base in section.__mro__]
    descriptions = [fields[name].description for fields in declared if name in fields]
    return " ".join(next((text for text in descriptions if text), "").split())


def _default(field: FieldInfo) -> object:
    return Required() if field.is_required() else field.get_default(call_default_factory=True)


def _unwrapped(annotation: Any, metadata: list[Any]) -> tuple[Any, bool, list[Any]]:
    """Return the annotation without `Annotated` and `| None`, whether null is allowed, and all metadata."""
    may_be_null = False
    metadata = list(metadata)
    while True:
        if get_origin(annotation) is Annotated:
            annotation, *more = get_args(annotation)
            metadata += more
        elif get_origin(annotation) in (Union, types.UnionType) and type(None) in get_args(annotation):
            rest = [member for member in get_args(annotation) if member is not type(None)]
            assert len(rest) == 1, f"a key has one type, or that type or null, not {annotation}"
            annotation, may_be_null = rest[0], True
        else:
            return annotation, may_be_null, metadata


def _value_type(annotation: Any) -> type:
    if get_origin(annotation) is Literal:
        (value_type,) = {type(choice) for choice in get_args(annotation)}
        return value_type
    value_type = get_origin(annotation) or annotation
    assert isinstance(value_type, type)
    return value_type


def _describe(annotation: Any, metadata: list[Any]) -> str:
    """Return what completes "it must be …"."""
    for entry in reversed(metadata):  # the outermost `Annotated` comes last
        if isinstance(entry, Described):
            return entry.accepts
    if get_origin(annotation) is Literal:
        return "one of " + ", ".join(in_yaml(choice) for choice in get_args(annotation))
    if get_origin(annotation) is tuple:
        members = [member for member in get_args(annotation) if member is not Ellipsis]
        inner = [_describe(*_unwrapped(member, [])[::2]) for member in members]
        is_open = Ellipsis in get_args(annotation)
        return f"a list: {inner[0]} each" if is_open else f"a list of {len(inner)}: {', '.join(inner)}"
    bounds = [
        f"{phrase} {getattr(entry, attribute)}"
        for entry in _flat(metadata)
        for bound, attribute, phrase in _BOUNDS
        if isinstance(entry, bound)
    ]
    return ", ".join([_TYPE_NAMES[annotation], *bounds])


def _flat(metadata: list[Any]) -> list[Any]:
    """Return the metadata with each nested `Field(...)` replaced by its entries."""
    flat = []
    for entry in metadata:
        flat += entry.metadata if isinstance(entry, FieldInfo) else [entry]
    return flat
