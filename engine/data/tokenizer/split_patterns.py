"""The regular expressions of a `tokenizer.json`, of which some need more than linear time for some texts.

Known ones are trusted. Another is refused if its form allows exponential time, or if texts made for the
purpose show that it needs quadratic time: CPU time is measured, which a busy machine does not change.
"""

import re
import string
import time
from collections.abc import Callable, Iterator
from pathlib import Path

_KNOWN = frozenset(
    (
        # GLM-4, as in its tokenizer.json and in tiktoken's form.
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+",
        # GPT-2
        r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    )
)
_REPEATED_GROUP = re.compile(r"\((?:\?[:>=!<#imsx-]*)?([^()]*)\)(?:[*+]|\{\d*,?\d*\})")
_SIZES = (1_024, 4_096, 16_384)
_FREE_S, _S_PER_CHARACTER = 0.1, 2e-6
_TAIL = "\n!0 az,AZ-_='\"x中\u3000é."
"""The end of each text, so that no pattern fails early for want of a character."""
_MAX_UNITS = 48


def check_patterns(path: Path, description: object, encode: Callable[[str], object]) -> None:
    """Check that text is split in linear time.

    Args:
        path: the `tokenizer.json`, for errors.
        description: its parsed content.
        encode: encodes a text with it.

    Raises:
        ValueError: a pattern may need more than 2 s per megabyte of some text.
    """
    patterns = [pattern for pattern in _patterns_in(description) if pattern not in _KNOWN]
    for pattern in patterns:
        for group in _REPEATED_GROUP.finditer(pattern):
            if any(sign in group.group(1) for sign in "*+|{"):
                raise ValueError(
                    f"{path}: its pattern {pattern!r:.120} repeats a group that holds repetitions or "
                    f"alternatives, {group.group(0)!r:.60}, which takes exponential time for some texts; "
                    "give the tokenizer.json of a GLM-4 model"
                )
    if patterns:
        _check_time(path, patterns, encode)


def _check_time(path: Path, patterns: list[str], encode: Callable[[str], object]) -> None:
    letters = "".join(dict.fromkeys("".join(patterns)))
    units = [*"aA1 \n.中'", "ab", "a1", letters[:64], *(c for c in letters if c in string.printable)]
    for size in _SIZES:
        for unit in list(dict.fromkeys(units))[:_MAX_UNITS]:
            text = (unit * size)[:size] + _TAIL
            start = time.thread_time()
            encode(text)
            spent_s = time.thread_time() - start
            if spent_s > _FREE_S + _S_PER_CHARACTER * size:
                raise ValueError(
                    f"{path}: its pattern {patterns[0]!r:.120} takes {spent_s:.1f} s for {size} characters, "
                    "more than linear time; give the tokenizer.json of a GLM-4 model"
                )


def _patterns_in(value: object) -> Iterator[str]:
    if isinstance(value, dict):
        if isinstance(value.get("Regex"), str):
            yield value["Regex"]
        for inner in value.values():
            yield from _patterns_in(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _patterns_in(inner)
