"""What the documentation names exists: pages, anchors, files, commands, keys, metrics, errors."""

import ast
import functools
import re
from pathlib import Path

import pytest
import yaml
from doc_pages import DOCS, PAGES, ROOT, anchors, blocks, commands, inline_code, links, prose

from glm_rlhf.engine.cli import COMMANDS
from glm_rlhf.engine.config.keys import keys_of

CONFIG_OF = {command.name: command.config for command in COMMANDS}
KEYS = {path for config in CONFIG_OF.values() for path in keys_of(config)}
SECTIONS = {path.partition(".")[0] for path in KEYS}
FILE_ENDINGS = (".json", ".jsonl", ".yaml", ".html", ".py", ".md")
EVERYWHERE = (*PAGES, *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "benchmarks/README.md")))

pages = pytest.mark.parametrize("page", EVERYWHERE, ids=lambda page: str(page.relative_to(ROOT)))


class _Loader(yaml.SafeLoader):
    """Reads the generator's config, whose one Python name it passes over."""


_Loader.add_multi_constructor("tag:yaml.org,2002:python/name:", lambda *_: None)


def nav_pages(entries: list) -> list[str]:
    """The files of a `nav`, in order."""
    found = []
    for entry in entries:
        (target,) = entry.values()
        found += nav_pages(target) if isinstance(target, list) else [target]
    return found


def test_every_page_is_once_in_the_nav():
    config = yaml.load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"), _Loader)
    assert sorted(nav_pages(config["nav"])) == [page.name for page in PAGES]


@pages
def test_links_lead_somewhere(page):
    for target in links(page):
        if target.startswith("http"):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{page.name} links to {target}"
        assert not anchor or anchor in anchors(file), f"{page.name} links to {target}"


@pages
def test_files_that_are_named_exist(page):
    folders = re.compile(r"(engine|kernels|parallel|tests|examples|benchmarks)/[\w./*-]+")
    for code in inline_code(page):
        if folders.fullmatch(code):
            assert any(ROOT.glob(code.rstrip("/"))), f"{page.name} names {code}"


@pages
def test_commands_exist_and_have_the_keys_that_they_set(page):
    """In shell blocks each key belongs to its command; so it does where prose names a command."""
    found = [words for block in blocks(page) if block.language == "bash" for words in commands(block.text)]
    inline = [code for code in inline_code(page) if code.startswith(("glm-rlhf", "torchrun"))]
    found += [words for code in inline for words in commands(code)]
    for words in found:
        if not words or not words[0].isalpha():
            continue
        assert words[0] in CONFIG_OF, f"{page.name}: glm-rlhf {' '.join(words)}"
        known = keys_of(CONFIG_OF[words[0]])
        for word in words[1:]:
            key, is_set, _ = word.partition("=")
            assert not is_set or key in known or "…" in key, f"{page.name}: {words[0]} has no key {key}"


@pages
def test_keys_that_are_named_exist(page):
    for code in inline_code(page):
        key = code.partition("=")[0].partition(":")[0]
        section, _, name = key.partition(".")
        if section in SECTIONS and re.fullmatch(r"\w+", name) and not code.endswith(FILE_ENDINGS):
            assert key in KEYS, f"{page.name} names {code}"


@pages
def test_python_compiles(page):
    for number, block in enumerate(blocks(page)):
        if block.language == "python":
            compile(block.text, f"{page.name}, block {number}", "exec")


def test_modules_of_the_changelog_that_is_not_released_exist():
    unreleased = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8").partition("(unreleased)")[2]
    unreleased = unreleased.partition("\n## ")[0]
    rows = re.findall(r"^\| `([\w/]+)` \| (.*) \|$", unreleased, re.MULTILINE)
    moved = [(folder, cells) for folder, cells in rows if "/" in folder and (ROOT / folder).is_dir()]
    assert len(moved) > 30
    for folder, cells in moved:
        names = re.findall(r"`(\w+)` ←", cells)
        names += re.findall(r"`(\w+)`", cells.partition("under the same name: ")[2])
        assert [name for name in names if not (ROOT / folder / f"{name}.py").exists()] == [], folder


def test_every_command_has_its_place_on_the_commands_page():
    table = prose(DOCS / "commands.md")
    assert [name for name in CONFIG_OF if f"| `{name}` |" not in table] == []


def test_the_benchmarks_page_names_modules_and_every_report():
    folder = ROOT / "benchmarks"
    modules = re.findall(r"^\| `([\w.]+)` \|", prose(folder / "README.md"), re.MULTILINE)
    assert len(modules) > 15
    files = [folder / module.replace(".", "/") for module in modules]
    assert [
        file for file in files if not file.with_suffix(".py").exists() and not (file / "__main__.py").exists()
    ] == []
    reports = {f"results/{path.name}" for path in (folder / "results").glob("*.md")}
    assert sorted(reports - {*links(folder / "README.md")}) == []


def test_the_sentences_of_errors_are_those_of_the_code():
    rows = re.findall(r"^\| (.+?) \|", (DOCS / "troubleshooting.md").read_text("utf-8"), re.MULTILINE)
    codes = [code for row in rows for code in re.findall(r"`([^`]+)`", row)]
    quoted = [code for code in codes if " " in code and "…" not in code]
    assert len(quoted) > 25
    assert [sentence for sentence in quoted if not any(sentence in text for text in source_texts())] == []


def test_every_metric_of_the_page_is_one_of_the_code():
    """The other direction, that what is written is defined, is part of `test_snippets`."""
    names = re.findall(r"^\| `([\w/]+)` \|", (DOCS / "metrics.md").read_text("utf-8"), re.MULTILINE)
    assert len(set(names)) > 50
    texts = {text.strip(" /") for text in source_texts()}
    ends = {name: {name, name.partition("/")[2], name.rpartition("/")[2]} for name in names}
    assert [name for name in names if not ends[name] & texts] == []


def test_the_readmes_tree_shows_every_sub_package_with_its_sentence():
    """The first line of each `__init__.py`, without its full stop."""
    shown, layer = {}, ""
    for line in (ROOT / "README.md").read_text(encoding="utf-8").splitlines():
        if match := re.match(r"( *)(\w+)/ {2,}(.+)", line):
            indent, name, sentence = match.groups()
            layer = name if not indent else layer
            shown[f"{layer}/{name}" if indent else name] = sentence
    sentences = {}
    for file in sorted(ROOT.glob("*/*/__init__.py")):
        if file.parts[-3] in ("engine", "kernels", "parallel"):
            docstring = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8")))
            sentences["/".join(file.parts[-3:-1])] = docstring.splitlines()[0].rstrip(".")
    assert {name: shown.get(name) for name in sentences} == sentences
    assert [name for name in shown if not (ROOT / name).is_dir()] == []


@functools.cache
def source_texts() -> tuple[str, ...]:
    """Every text of the sources; what is filled in becomes a space."""
    found = []
    for layer in ("engine", "parallel", "kernels"):
        for path in sorted((ROOT / layer).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Constant) and isinstance(node.value, str):
                    found.append(node.value)
                elif isinstance(node, ast.JoinedStr):
                    parts = (part.value if isinstance(part, ast.Constant) else " " for part in node.values)
                    found.append("".join(parts))
    return tuple(found)


@pytest.mark.parametrize(
    "check",
    [
        test_links_lead_somewhere,
        test_files_that_are_named_exist,
        test_keys_that_are_named_exist,
        test_commands_exist_and_have_the_keys_that_they_set,
    ],
)
def test_the_checks_see_what_is_wrong(tmp_path: Path, check):
    page = tmp_path / "page.md"
    text = "# A b\n[x](gone.md) `data.paht` `engine/gone.py`\n```bash\nglm-rlhf score data.paht=1\n```\n"
    page.write_text(text, encoding="utf-8")
    with pytest.raises(AssertionError, match=r"page\.md"):
        check(page)
