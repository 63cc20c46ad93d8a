"""The page `configuration.md`: every key of every command, as the code declares it.

python docs/configuration_reference.py    # writes the page; a test compares it with the code
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

from glm_rlhf.engine.cli import COMMANDS, Command
from glm_rlhf.engine.config.keys import Key, in_yaml, keys_of

PAGE = Path(__file__).with_name("configuration.md")
INTRODUCTION = """\
# Configuration

<!-- Written by configuration_reference.py; `make docs` writes it anew. -->

A command takes one YAML file of sections, and `section.key=value` on the command line, which wins. A key that
a command does not read is refused, and the nearest one named. The resolved config goes to
`<run.output>/config.yaml` and is itself a config. Numbers, `true`, `null` and lists are YAML 1.2: `1e-6` is a
number, `no` is text. Sizes take units: `5GB`, `512MiB`.

The same key means the same thing in every command. "all" stands for every command that has the section.
"""


def page(commands: Sequence[Command]) -> str:
    """Return the page's Markdown: a table a section; a row a key and meaning, with the commands of it."""
    found: dict[str, dict[tuple[str, str, str], list[tuple[str, Key]]]] = {}
    owners: dict[str, list[str]] = {}
    for command in commands:
        for key in keys_of(command.config).values():
            row = (key.path, key.accepts, key.meaning)
            found.setdefault(key.section, {}).setdefault(row, []).append((command.name, key))
            if command.name not in owners.setdefault(key.section, []):
                owners[key.section].append(command.name)
    parts = [INTRODUCTION]
    for section, rows in sorted(found.items()):
        parts.append(f"\n## {section}\n\nOf {_listed(owners[section])}.\n\n")
        parts.append("| key | accepts | default | meaning | commands |\n|---|---|---|---|---|\n")
        parts += _rows(rows, owners[section])
    return "".join(parts)


def _rows(rows: dict[tuple[str, str, str], list[tuple[str, Key]]], owners: list[str]) -> Iterator[str]:
    for (path, accepts, meaning), uses in sorted(rows.items(), key=lambda row: row[0][0]):
        names = [name for name, _ in uses]
        where = "all" if names == owners else ", ".join(names)
        cells = (f"`{path}`", accepts, _default(uses), meaning, where)
        yield "| " + " | ".join(cell.replace("|", "\\|").replace("<", "&lt;") for cell in cells) + " |\n"


def _default(uses: list[tuple[str, Key]]) -> str:
    """Return the default; where commands differ, each value with those that have it."""
    values: dict[str, list[str]] = {}
    for name, key in uses:
        shown = "required" if key.is_required else f"`{in_yaml(key.default)}`"
        values.setdefault(shown.replace("``", "empty"), []).append(name)
    if len(values) == 1:
        return next(iter(values))
    return "; ".join(f"{value} ({', '.join(names)})" for value, names in values.items())


def _listed(names: Sequence[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


if __name__ == "__main__":
    PAGE.write_text(page(COMMANDS), encoding="utf-8")
    print(f"wrote {PAGE}")
