"""Text and JSON of strangers is read, or refused in one sentence with the file's name, without waiting."""

import json
import os
import time

import pytest

from glm_rlhf.parallel.storage.model_folder import ModelFolderError
from glm_rlhf.parallel.storage.text_files import (
    MAX_DEPTH,
    first_duplicate,
    is_deeper_than,
    parse_json_object,
    read_json,
    read_text,
)


def test_a_byte_order_mark_is_skipped(tmp_path):
    path = tmp_path / "config.json"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}')
    assert read_json(path) == {"a": 1}
    assert read_text(path) == '{"a": 1}'


@pytest.mark.parametrize("kind", ["pipe", "folder", "device"])
def test_what_is_no_regular_file_is_refused_at_once(tmp_path, kind):
    """A pipe that nobody writes to would be waited for until the job's end."""
    path = tmp_path / "config.json"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to("/dev/zero")
    with pytest.raises(ModelFolderError, match=r"config\.json (is not a regular file|cannot be read)"):
        read_json(path)


DEEP = '{"a": ' + "[" * (MAX_DEPTH + 1) + "]" * (MAX_DEPTH + 1) + "}"
CASES = {
    "hostile depth": ('{"a": ' + "[" * 200_000, "nests more than 64 levels deep"),
    "some depth": (DEEP, "nests more than 64 levels deep"),
    "a key twice": ('{"a": 1, "b": 2, "a": 3}', "the key 'a' stands there twice"),
    "a number of many digits": ('{"a": ' + "9" * 5000 + "}", "not usable JSON"),
    "NaN": ('{"a": {"b": [1, NaN]}}', "a.b is nan; a finite number is required"),
    "beyond a float": ('{"a": 1e999}', "a is inf; a finite number is required"),
    "a lone surrogate": ('{"a": "\\ud83d"}', "a lone surrogate"),
    "too large": ('{"a": "' + "x" * 2000 + '"}', "larger than 1000 bytes"),
    "not UTF-8": (b'{"a": "\xff"}', "not UTF-8 text"),
}


@pytest.mark.parametrize("case", CASES)
def test_hostile_json_is_refused_in_one_short_sentence(tmp_path, case):
    content, message = CASES[case]
    path = tmp_path / "config.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ModelFolderError, match=message) as caught:
        read_json(path, max_bytes=1000 if case == "too large" else 2**20)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < len(str(path)) + 300


def test_depth_counts_lists_and_objects():
    value: object = 1
    for level in range(1, 6):
        value = [value] if level % 2 else {"a": value}
        assert not is_deeper_than(value, level)
        assert is_deeper_than(value, level - 1)


def test_a_text_with_pairs_of_surrogates_or_numbers_of_python_is_read():
    assert parse_json_object('{"a": "\\ud83d\\ude00"}', what="x") == {"a": "\N{GRINNING FACE}"}
    assert parse_json_object('{"a": Infinity}', what="x", allows_nonfinite=True) == {"a": float("inf")}


def test_fifty_thousand_keys_cost_linear_time():
    """The duplicate is the last key: looking for each in all was a minute."""
    text = json.dumps({f"key_{i}": i for i in range(50_000)})
    start = time.process_time()
    with pytest.raises(ModelFolderError, match="'key_49999' stands there twice"):
        parse_json_object(text[:-1] + ', "key_49999": 1}', what="x")
    assert time.process_time() - start < 2 * len(text) / 1e6 + 1
    assert first_duplicate(["a", "b"]) is None
