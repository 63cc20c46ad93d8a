"""The importer of hh-rlhf dialogues."""

import gzip
import json

import pytest

from glm_rlhf.engine.data.messages import Message
from glm_rlhf.engine.data.records.hh_rlhf import split_dialogue, split_dialogue_pair
from glm_rlhf.engine.data.records.reading import ReadReport, RecordError
from glm_rlhf.engine.data.records.schema import read_pairs


def test_two_dialogues_become_one_prompt_and_two_answers():
    start = "\n\nHuman: one\n\nAssistant: two\n\nHuman:  three\nlines "
    messages, chosen, rejected = split_dialogue_pair(f"{start}\n\nAssistant: four", f"{start}\n\nAssistant:")
    assert messages == (
        Message(role="user", content="one"),
        Message(role="assistant", content="two"),
        Message(role="user", content=" three\nlines "),
    )
    assert (chosen, rejected) == ("four", "")


def test_a_mark_that_repeats_the_speaker_is_text():
    turns = split_dialogue("\n\nHuman: a\n\nHuman: b\n\nAssistant: c\n\nAssistant: d")
    assert [turn.content for turn in turns] == ["a\n\nHuman: b", "c\n\nAssistant: d"]


@pytest.mark.parametrize(
    ("chosen", "rejected", "says"),
    [
        ("\n\nHuman: a\n\nAssistant: b", "\n\nHuman: x\n\nAssistant: c", "differ before their last turn"),
        ("\n\nHuman: a\n\nAssistant: b", "\n\nHuman: a", "the rejected dialogue ends with Human"),
        (
            "Human: a\n\nAssistant: b",
            "\n\nHuman: a\n\nAssistant: c",
            "must begin with two line breaks and 'Human:'",
        ),
        ("\n\nAssistant: b", "\n\nAssistant: c", "must begin"),
        ("", "", "must begin"),
        ("\n\nHuman: \n\nAssistant: b", "\n\nHuman: \n\nAssistant: c", "the last user turn is blank"),
        (None, "\n\nHuman: a\n\nAssistant: c", "'chosen' must be a text, not null"),
    ],
)
def test_an_invalid_pair_of_dialogues_is_named_with_its_line(tmp_path, chosen, rejected, says):
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps({"chosen": chosen, "rejected": rejected}) + "\n")
    with pytest.raises(RecordError, match=says) as caught:
        list(read_pairs(path, form="hh-rlhf"))
    assert caught.value.line == 1


def test_a_pairs_file_read_as_hh_rlhf_is_refused(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps({"prompt": "a", "chosen": "b", "rejected": "c"}) + "\n")
    with pytest.raises(RecordError, match="read it as form=pairs"):
        list(read_pairs(path, form="hh-rlhf"))


def test_all_2312_published_pairs_load_and_render(shared_data, chatglm3):
    path = shared_data / "hh-rlhf" / "harmless-base-test.jsonl.gz"
    report = ReadReport()
    records = list(read_pairs(path, form="hh-rlhf", report=report))
    assert (len(records), report.num_records, report.num_skipped, report.num_blank) == (2312, 2312, 0, 0)
    assert all(record.prompt[-1].role == "user" for record in records)
    assert sum(not record.chosen for record in records) == 4
    # No text is lost: prompt and answers, concatenated, are the published texts.
    names = {"user": "Human", "assistant": "Assistant"}
    with gzip.open(path, "rt", encoding="utf-8") as file:
        published = [json.loads(line) for line in file]
    for record, texts in zip(records, published, strict=True):
        prompt = "".join(f"\n\n{names[turn.role]}: {turn.content}" for turn in record.prompt)
        assert f"{prompt}\n\nAssistant: {record.chosen}" == texts["chosen"]
        assert f"{prompt}\n\nAssistant: {record.rejected}" == texts["rejected"]
    for record in records[::8]:
        prompt_ids, response_ids = chatglm3.render_prompt_response(record.prompt, record.chosen)
        assert prompt_ids[-1] == chatglm3.id_of("<|assistant|>")
        assert chatglm3.decode_response(response_ids) == record.chosen
