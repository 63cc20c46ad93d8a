"""Parsing of the documentation for tests: pages, links, headings, code blocks, commands, inline code."""

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
DOCS = ROOT / "docs"
PAGES = tuple(sorted(DOCS.glob("*.md")))
_FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True, slots=True)
class Block:
    """One fenced block."""

    language: str
    text: str

    @property
    def title(self) -> str:
        """The label of its first line, such as `run: kernels` or `file: own_reward.py`; empty without one."""
        match = re.match(r"# ((?:run|file): .*)\n", self.text)
        return match[1] if match else ""


def blocks(page: Path) -> list[Block]:
    """Return the fenced blocks of a page in order."""
    return [Block(language, text) for language, text in _FENCE.findall(page.read_text(encoding="utf-8"))]


def prose(page: Path) -> str:
    """Return a page without its fenced blocks."""
    return _FENCE.sub("", page.read_text(encoding="utf-8"))


def inline_code(page: Path) -> list[str]:
    """Return what is between single backticks."""
    return [code.replace("\n", " ") for code in re.findall(r"`([^`]+)`", prose(page))]


def links(page: Path) -> list[str]:
    """Return the targets of a page's links."""
    return re.findall(r"\]\(([^)\s]+)\)", prose(page))


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as the generator makes them."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", text).strip().lower()) for text in headings}


def commands(text: str) -> list[list[str]]:
    """Return the arguments of every `glm-rlhf …` and `torchrun … -m glm_rlhf.engine …` of a shell block."""
    found = []
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if words[:1] == ["glm-rlhf"]:
            found.append(words[1:])
        elif words[:1] == ["torchrun"] and "glm_rlhf.engine" in words:
            found.append(words[words.index("glm_rlhf.engine") + 1 :])
    return found
