"""What is stored of a file: bad records, limits to their last token, cuts, the tokenizer's checksum."""

import dataclasses
import json
from functools import partial
from pathlib import Path

import pytest
from stored_ids import ids, open_ids, parts, stores, write_lines

from glm_rlhf.engine.data.records.reading import RecordError
from glm_rlhf.engine.data.store.token_store import open_store
from glm_rlhf.engine.data.store.token_writer import tokenizer_digest


@pytest.fixture
def folder(tmp_path) -> Path:
    return tmp_path / "tokens"


@pytest.fixture
def write(tmp_path):
    """Write the records of a file and return its path."""
    return partial(write_lines, tmp_path / "data.jsonl")


def test_a_bad_record_is_an_error_or_skipped_and_counted(write, folder):
    path = write(ids(1, 1), {"prompt_tokens": []}, ids(2, 2), ids(3, 100))
    with pytest.raises(RecordError, match="at least one token id") as caught:
        open_ids(path, "demonstrations", folder)
    assert caught.value.line == 2

    for _ in range(2):  # built, then found
        store = open_ids(path, "demonstrations", folder, on_error="skip")
        assert [store.record_index(i) for i in range(len(store))] == [0, 2]
        report = store.report
        assert (report.num_records, report.num_skipped, report.num_truncated) == (2, 2, 0)
        assert [error.line for error in report.errors] == [2, 4]
        assert report.lines()[0] == "2 records with 6 tokens, 2 bad records skipped"
        assert report.lines()[1].startswith(f"  skipped: {path}:2: 'prompt_tokens' must be")
        assert json.loads(json.dumps(report.as_dict()))["errors"][1].startswith(f"{path}:4: ")


def test_a_report_says_how_many_reasons_it_does_not_show(write, folder):
    store = open_ids(write(ids(1), *[{}] * 25), "prompts", folder, on_error="skip")
    assert (store.report.num_skipped, len(store.report.errors)) == (25, 20)
    assert store.report.lines()[-1] == "  skipped: 5 more"


def test_a_file_without_a_good_record_is_an_error_even_when_skipping(write, folder):
    with pytest.raises(RecordError, match="no record is left: all 2 are bad"):
        open_ids(write(ids(7), ids(8)), "prompts", folder, on_error="skip")
    assert stores(folder) == []


@pytest.mark.parametrize(
    ("record", "kind", "says"),
    [
        (ids(6), "prompts", None),
        (ids(7), "prompts", "the prompt has 7 tokens, max_prompt_tokens allows 6"),
        (ids(6, 4), "demonstrations", None),
        (ids(6, 5), "demonstrations", "prompt and response have 11 tokens, the model's context is 10"),
        (ids(2, 8, 8), "pairs", None),
        (ids(2, 9, 1), "pairs", "prompt and chosen have 11 tokens"),
        (ids(2, 1, 9), "pairs", "prompt and rejected have 11 tokens"),
    ],
)
def test_limits_are_the_last_length_that_fits(write, folder, record, kind, says):
    path = write(record)
    if says is None:
        assert len(open_ids(path, kind, folder)) == 1
    else:
        with pytest.raises(RecordError, match=says) as caught:
            open_ids(path, kind, folder)
        assert caught.value.line == 1


def test_a_prompt_that_fills_the_context_leaves_no_room(write, folder):
    arguments = {"max_prompt_tokens": 10, "truncates": True}
    assert len(open_ids(write(ids(9)), "prompts", folder, **arguments)) == 1
    for record, kind in ((ids(10), "prompts"), (ids(10, 1), "demonstrations")):
        with pytest.raises(RecordError, match="leaves no room for an answer in a context of 10"):
            open_ids(write(record), kind, folder, **arguments)


def test_answers_are_cut_only_when_asked_and_counted(write, folder):
    path = write(ids(6, 4, 9), ids(6, 5, 5), ids(1, 1, 1))
    store = open_ids(path, "pairs", folder, truncates=True)
    assert parts(store)[:2] == [[[1, 2, 3, 4, 5, 6], [1, 2, 3, 4], [1, 2, 3, 4]]] * 2
    assert store.report.num_truncated == 3
    assert store.report.lines() == ["3 records with 31 tokens, 3 answers truncated"]


def test_a_text_without_a_tokenizer_is_a_bad_record(write, folder):
    with pytest.raises(RecordError, match="there is no tokenizer"):
        open_ids(write({"prompt": "hi"}), "prompts", folder)


def test_ids_of_the_file_must_be_below_the_vocabulary(write, folder):
    with pytest.raises(RecordError, match=r"prompt_tokens\[4\] is 5; ids go from 0 to 4"):
        open_ids(write(ids(5)), "prompts", folder, vocab_size=5)


def test_the_largest_id_survives(write, folder):
    store = open_ids(write({"prompt_tokens": [0, 2**31 - 1]}), "prompts", folder)
    assert store.prompt(0).tolist() == [0, 2**31 - 1]


def test_an_encoder_counts_for_the_tokenizers_identity_though_no_table_shows_it(tiny):
    # Two models may have the same tokens, and merge them otherwise where no short text shows it.
    other = dataclasses.replace(tiny, encode_text=partial(encode_zebras_backwards, tiny.encode_text))
    assert tokenizer_digest(tiny) != tokenizer_digest(other)
    assert tokenizer_digest(tiny) == tokenizer_digest(dataclasses.replace(tiny))


def encode_zebras_backwards(encode, text: str) -> list[int]:
    return encode(text)[:: -1 if "zebra" in text else 1]


def test_a_file_that_grows_while_it_is_read_is_refused(write, folder, tiny):
    path = write({"prompt": "hi"}, {"prompt": "you"})
    growing = dataclasses.replace(tiny, encode_text=partial(encode_and_append, path, tiny.encode_text))
    with pytest.raises(RecordError, match="changed while it was read"):
        open_store(path, "prompts", folder=folder, tokenizer=growing, max_prompt_tokens=50, max_tokens=60)
    assert stores(folder) == []


def encode_and_append(path: Path, encode, text: str) -> list[int]:
    if text == "you":
        with path.open("a") as file:
            file.write('{"prompt": "more"}\n')
    return encode(text)
