"""Prompts, demonstrations and pairs: every bad record of the list."""

import dataclasses
import json

import pytest

from glm_rlhf.engine.data.messages import Message
from glm_rlhf.engine.data.records.reading import ReadReport, RecordError
from glm_rlhf.engine.data.records.schema import TokenIds, read_demonstrations, read_pairs, read_prompts

USER = Message(role="user", content="hi")
TURNS = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "hi"}]


@pytest.fixture
def write(tmp_path):
    def write(*records: object):
        path = tmp_path / "data.jsonl"
        lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
        path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        return path

    return write


def test_prompts_are_texts_turns_or_ids_and_extra_fields_are_kept(write):
    path = write(
        {"prompt": "hi", "answer": "4", "meta": {"source": [1]}},
        {"messages": TURNS},
        {"prompt_tokens": [0, 5, 5], "text": ""},
    )
    text, turns, ids = read_prompts(path)
    assert (text.prompt, text.extra) == ((USER,), {"answer": "4", "meta": {"source": [1]}})
    assert turns.prompt == (Message(role="system", content="be kind"), USER)
    assert (ids.prompt, ids.extra) == (TokenIds((0, 5, 5)), {"text": ""})
    assert [(record.location.line, record.location.index) for record in (text, turns, ids)] == [
        (1, 0),
        (2, 1),
        (3, 2),
    ]


def test_demonstrations_carry_an_answer(write):
    path = write(
        {"prompt": "hi", "response": "hello", "id": 7},
        {"messages": TURNS, "response": ""},
        {"prompt_tokens": [1], "response_tokens": [2, 3]},
        {"prompt": "hi", "response_tokens": [2]},
    )
    records = list(read_demonstrations(path))
    assert [record.response for record in records] == ["hello", "", TokenIds((2, 3)), TokenIds((2,))]
    assert [dict(record.extra) for record in records] == [{"id": 7}, {}, {}, {}]


def test_pairs_carry_two_answers(write):
    path = write(
        {"prompt": "hi", "chosen": "a", "rejected": "b", "margin": 0.5},
        {"prompt_tokens": [1], "chosen_tokens": [2], "rejected_tokens": [3]},
        {"prompt": "hi", "chosen": "same", "rejected": "same"},
    )
    records = list(read_pairs(path))
    assert [(record.chosen, record.rejected) for record in records] == [
        *(("a", "b"), (TokenIds((2,)), TokenIds((3,))), ("same", "same"))
    ]
    assert records[0].extra == {"margin": 0.5}


def test_records_are_frozen(write):
    (record,) = read_prompts(write({"prompt": "hi"}))
    with pytest.raises(dataclasses.FrozenInstanceError):
        record.prompt = ()


@pytest.mark.parametrize(
    "text",
    [
        "🤗👍🏽👩‍👩‍👧‍👦",
        "\ud83d\ude00",
        "مرحبا \u202eabc\u202c שלום",
        "a" * 100_000,
        "龘" * 100_000,
        "<|user|>\n eop",
        "x\0y",
    ],
    ids=[
        "emoji",
        "a surrogate pair",
        "right to left",
        "a long word",
        "a long Chinese word",
        "markers",
        "NUL",
    ],
)
def test_unusual_texts_are_kept_unchanged(write, tiny, text):
    (record,) = read_prompts(write({"prompt": text}))
    kept = record.prompt[0].content
    assert kept == text.encode("utf-16", "surrogatepass").decode("utf-16")
    assert tiny.decode(tiny.encode(kept)) == kept


BAD_PROMPTS = {
    "no prompt": (
        {"text": "hi"},
        "no 'prompt' or 'messages' or 'prompt_tokens'; other fields.*: 'text'",
    ),
    "nothing": ({}, "other fields of the record: none"),
    "null": ({"prompt": None}, "'prompt' must be a text, not null"),
    "number": ({"prompt": 3}, "'prompt' must be a text, not a number"),
    "true": ({"prompt": True}, "'prompt' must be a text, not a boolean"),
    "list": ({"prompt": ["hi"]}, "'prompt' must be a text, not a list; give turns as 'messages'"),
    "object": ({"prompt": {"text": "hi"}}, "'prompt' must be a text, not an object"),
    "empty": ({"prompt": ""}, "'prompt' is blank"),
    "spaces": ({"prompt": " \n\t\u3000"}, "'prompt' is blank"),
    "lone surrogate": ('{"prompt": "ab\\ud83d"}', "'prompt' holds a lone surrogate at character 2"),
    "two prompts": ({"prompt": "hi", "messages": TURNS}, "'prompt' and 'messages' are both given"),
    "text and ids": ({"prompt": "hi", "prompt_tokens": [1]}, "'prompt' and 'prompt_tokens' are both given"),
    "no messages": ({"messages": []}, "there is no message"),
    "messages a text": ({"messages": "hi"}, "'messages' must be a list of turns, not a text"),
    "messages null": ({"messages": None}, "'messages' must be a list of turns, not null"),
    "turn a text": (
        {"messages": ["hi"]},
        r"messages\[0\] must be an object with role and content, not a text",
    ),
    "no role": ({"messages": [{"content": "hi"}]}, r"'messages\[0\].role' must be a text, not null"),
    "no content": ({"messages": [{"role": "user"}]}, r"'messages\[0\].content' must be a text, not null"),
    "turn with more": (
        {"messages": [{**TURNS[1], "name": "x"}]},
        r"messages\[0\] has the unknown field 'name'",
    ),
    "metadata null": (
        {"messages": [{**TURNS[1], "metadata": None}]},
        r"messages\[0\].metadata' must be a text",
    ),
    "unknown role": (
        {"messages": [{"role": "human", "content": "x"}]},
        r"messages\[0\]: unknown role 'human'",
    ),
    "roles out of order": (
        {"messages": [TURNS[1], TURNS[0]]},
        r"messages\[1\]: 'system' cannot follow 'user'",
    ),
    "last turn assistant": (
        {"messages": [*TURNS, {"role": "assistant", "content": "x"}]},
        r"messages\[2\]: the last turn is 'assistant'.*belongs in the record's answer",
    ),
    "last turn blank": ({"messages": [{"role": "user", "content": " "}]}, "the last user turn is blank"),
    "surrogate in a turn": (
        '{"messages": [{"role": "user", "content": "\\udc00"}]}',
        r"'messages\[0\].content' holds a lone surrogate at character 0",
    ),
    "ids a number": ({"prompt_tokens": 3}, "must be a list of at least one token id, not a number"),
    "ids null": ({"prompt_tokens": None}, "must be a list of at least one token id, not null"),
    "ids empty": ({"prompt_tokens": []}, "must be a list of at least one token id, not an empty list"),
    "id negative": ({"prompt_tokens": [1, -1]}, r"prompt_tokens\[1\] is -1; ids go from 0 to 99"),
    "id at the vocabulary": ({"prompt_tokens": [100]}, r"prompt_tokens\[0\] is 100; ids go from 0 to 99"),
    "id a float": (
        {"prompt_tokens": [1.0]},
        r"prompt_tokens\[0\] must be a whole number, not a number: 1\.0",
    ),
    "id true": ({"prompt_tokens": [True]}, r"prompt_tokens\[0\] must be a whole number, not a boolean"),
    "id a text": ({"prompt_tokens": ["1"]}, r"prompt_tokens\[0\] must be a whole number, not a text"),
    "id null": ({"prompt_tokens": [None]}, r"prompt_tokens\[0\] must be a whole number, not null"),
    "ids in a list": ({"prompt_tokens": [[1]]}, r"prompt_tokens\[0\] must be a whole number, not a list"),
}


@pytest.mark.parametrize(("bad", "says"), BAD_PROMPTS.values(), ids=BAD_PROMPTS)
def test_a_bad_prompt_is_named_with_file_and_line_or_skipped_and_counted(write, bad, says):
    path = write({"prompt": "good"}, bad, {"prompt": "good too"})
    with pytest.raises(RecordError, match=says) as caught:
        list(read_prompts(path, vocab_size=100))
    assert str(caught.value).startswith(f"{path}:2: ")

    report = ReadReport()
    records = list(read_prompts(path, vocab_size=100, on_error="skip", report=report))
    assert [record.location.index for record in records] == [0, 2]
    assert (report.num_records, report.num_skipped, len(report.errors)) == (2, 1, 1)


BAD_ANSWERS = {
    "no response": (
        read_demonstrations,
        {"prompt": "a"},
        "no 'response' or 'response_tokens'; other fields of the record: none",
    ),
    "a pair": (read_demonstrations, {"prompt": "a", "chosen": "b"}, "no 'response'.*of the record: 'chosen'"),
    "response null": (
        read_demonstrations,
        {"prompt": "a", "response": None},
        "'response' must be a text, not null",
    ),
    "response twice": (
        *(read_demonstrations, {"prompt": "a", "response": "b", "response_tokens": [1]}),
        "'response' and 'response_tokens' are both given",
    ),
    "response ids empty": (read_demonstrations, {"prompt": "a", "response_tokens": []}, "not an empty list"),
    "response surrogate": (read_demonstrations, '{"prompt": "a", "response": "\\ud800"}', "lone surrogate"),
    "no rejected": (read_pairs, {"prompt": "a", "chosen": "b"}, "no 'rejected' or 'rejected_tokens'"),
    "no chosen": (read_pairs, {"prompt": "a", "rejected": "b"}, "no 'chosen' or 'chosen_tokens'"),
    "chosen a list": (
        read_pairs,
        {"prompt": "a", "chosen": ["b"], "rejected": "c"},
        "'chosen' must be a text, not a list",
    ),
    "rejected id too large": (
        *(read_pairs, {"prompt": "a", "chosen": "b", "rejected_tokens": [2**31]}),
        rf"rejected_tokens\[0\] is {2**31}",
    ),
    "a dialogue": (
        read_pairs,
        {"chosen": "\n\nHuman: a", "rejected": "\n\nHuman: a"},
        "there is no 'prompt'",
    ),
}


@pytest.mark.parametrize(("reader", "bad", "says"), BAD_ANSWERS.values(), ids=BAD_ANSWERS)
def test_a_bad_answer_is_named_with_file_and_line(write, reader, bad, says):
    path = write(bad)
    with pytest.raises(RecordError, match=says) as caught:
        list(reader(path))
    assert caught.value.line == 1


def test_a_missing_file_is_refused_before_the_first_record(tmp_path):
    for reader in (read_prompts, read_demonstrations, read_pairs):
        with pytest.raises(RecordError, match="No such file"):
            reader(tmp_path / "absent.jsonl")


def test_an_unknown_form_is_refused(write):
    with pytest.raises(ValueError, match="must be one of pairs, hh-rlhf"):
        read_pairs(write({}), form="ultrafeedback")


def test_gsm8k_loads_once_its_fields_are_renamed(shared_data, write):
    lines = (shared_data / "gsm8k" / "test.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    path = write(*[{"prompt": row["question"], "response": row["answer"]} for row in rows])
    records = list(read_demonstrations(path))
    assert len(records) == 1319
    assert records[0].prompt[0].content == rows[0]["question"]
    assert records[-1].response == rows[-1]["answer"]
