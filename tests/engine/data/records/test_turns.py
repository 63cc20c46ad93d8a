"""Fields beside the prompt that belong to it are used where their meaning is plain, and refused elsewhere."""

import json

import pytest

from glm_rlhf.engine.data.messages import Message
from glm_rlhf.engine.data.records.reading import RecordError
from glm_rlhf.engine.data.records.schema import read_demonstrations, read_pairs, read_prompts

ANSWERS = {"response": "48", "chosen": "48", "rejected": "47"}
READERS = {
    "prompts": (read_prompts, ()),
    "demonstrations": (read_demonstrations, ("response",)),
    "pairs": (read_pairs, ("chosen", "rejected")),
}


def record(tmp_path, kind, fields, **options):
    """Return the one record of a file as its reader gives it."""
    read, answers = READERS[kind]
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps(fields | {name: ANSWERS[name] for name in answers}) + "\n")
    [found] = read(path, **options)
    return found


def turns(*pairs):
    return tuple(Message(role=role, content=content) for role, content in pairs)


HISTORY = [["2 + 14?", "16"], ["3 * 16?", "48"]]
EARLIER = (("user", "2 + 14?"), ("assistant", "16"), ("user", "3 * 16?"), ("assistant", "48"))


@pytest.mark.parametrize("kind", READERS)
def test_system_and_history_come_before_the_prompt(tmp_path, kind):
    fields = {"system": "Be brief.", "history": HISTORY, "prompt": "And?"}
    found = record(tmp_path, kind, fields)
    assert found.prompt == turns(("system", "Be brief."), *EARLIER, ("user", "And?"))
    assert found.extra == {"system": "Be brief.", "history": HISTORY}, "a reward function sees them too"


def test_history_is_a_list_of_turns_too(tmp_path):
    history = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "metadata": "weather", "content": "{}"},
        {"role": "observation", "content": "sunny"},
        {"role": "assistant", "content": "Sunny."},
    ]
    found = record(tmp_path, "prompts", {"history": history, "prompt": "And?"})
    assert [turn.role for turn in found.prompt] == [turn["role"] for turn in history] + ["user"]
    assert found.prompt[2].metadata == "weather"


def test_history_stands_between_the_messages_system_turn_and_the_rest(tmp_path):
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "And?"}]
    found = record(tmp_path, "prompts", {"history": HISTORY, "messages": messages})
    assert found.prompt == turns(("system", "Be brief."), *EARLIER, ("user", "And?"))
    found = record(tmp_path, "prompts", {"system": "Be kind.", "messages": messages[1:]})
    assert found.prompt == turns(("system", "Be kind."), ("user", "And?"))


@pytest.mark.parametrize("nothing", [None, "", " ", [], {}])
@pytest.mark.parametrize("kind", READERS)
def test_a_field_that_says_nothing_changes_nothing(tmp_path, kind, nothing):
    names = ("system", "history", "tools", "functions", "input", "images")
    found = record(tmp_path, kind, {"prompt": "And?"} | dict.fromkeys(names, nothing))
    assert found.prompt == turns(("user", "And?"))


BAD = {
    "tools": (
        {"tools": [{"name": "add"}]},
        "'tools' is given, which is part of the prompt in other programs",
    ),
    "functions": ({"functions": [{"name": "add"}]}, "'functions' is given"),
    "input": ({"input": "3 apples"}, "'input' is given"),
    "images": ({"images": ["a.png"]}, "'images' is given"),
    "system of another type": ({"system": 3}, "'system' must be a text, not a number"),
    "a lone surrogate": ({"system": "\ud83d"}, "'system' holds a lone surrogate"),
    "history as text": ({"history": "2 + 14?"}, "'history' must be a list of rounds or turns, not a text"),
    "a round of one": ({"history": [["2 + 14?"]]}, r"history\[0\] has 1 entries; \[question, answer\]"),
    "an answer of null": ({"history": [["2 + 14?", None]]}, r"history\[0\] \(assistant\)' must be a text"),
    "a text as turn": ({"history": ["a"]}, r"history\[0\] must be an object"),
    "an open history": (
        {"history": [{"role": "user", "content": "2 + 14?"}]},
        "with 'system' and 'history' before it, .*'user' cannot follow 'user'",
    ),
    "two system turns": (
        {"system": "a", "history": [{"role": "system", "content": "b"}]},
        "'system' cannot follow 'system'",
    ),
}


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("kind", READERS)
def test_another_form_is_refused_with_file_and_line(tmp_path, kind, case):
    fields, message = BAD[case]
    with pytest.raises(RecordError, match=message) as caught:
        record(tmp_path, kind, {"prompt": "And?"} | fields)
    assert str(caught.value).startswith(f"{tmp_path / 'data.jsonl'}:1: ")


def test_a_second_system_turn_is_refused(tmp_path):
    messages = [{"role": "system", "content": "a"}, {"role": "user", "content": "b"}]
    with pytest.raises(RecordError, match=r"'system' is given, and messages\[0\] is a system turn too"):
        record(tmp_path, "prompts", {"system": "c", "messages": messages})


def test_ids_are_the_whole_prompt(tmp_path):
    found = record(tmp_path, "prompts", {"prompt_tokens": [5], "system": "a", "tools": [1]})
    assert found.prompt.ids == (5,)
    assert found.extra == {"system": "a", "tools": [1]}


def test_dialogues_hold_their_own_turns(tmp_path):
    dialogue = "\n\nHuman: hi\n\nAssistant: "
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps({"chosen": dialogue + "a", "rejected": dialogue + "b", "system": "c"}))
    with pytest.raises(RecordError, match="'system' is given, which belongs to the prompt"):
        list(read_pairs(path, form="hh-rlhf"))
