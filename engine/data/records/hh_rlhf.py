"""The form of Anthropic's hh-rlhf: two whole dialogues as texts that differ in the last answer."""

import re

from glm_rlhf.engine.data.messages import Message

_TURN = re.compile(r"\n\n(Human|Assistant):")
_ROLES = {"Human": "user", "Assistant": "assistant"}


def split_dialogue_pair(chosen: str, rejected: str) -> tuple[tuple[Message, ...], str, str]:
    """Return `(messages, chosen answer, rejected answer)` of two dialogues that differ in the last turn only.

    A dialogue is `\\n\\nHuman: …\\n\\nAssistant: …` and so on, ending with an assistant turn. One space after
    the colon belongs to the marker; all other text is unchanged. A marker that repeats the speaker, which a
    few published dialogues have, is text of its turn. The last answer may be empty.

    Raises:
        ValueError: a text that is not such a dialogue, or two that differ before the last turn.
    """
    chosen_turns, rejected_turns = split_dialogue(chosen), split_dialogue(rejected)
    for name, turns in (("chosen", chosen_turns), ("rejected", rejected_turns)):
        if turns[-1].role != "assistant":
            raise ValueError(f"the {name} dialogue ends with Human; an answer of the Assistant is required")
    if chosen_turns[:-1] != rejected_turns[:-1]:
        raise ValueError("the two dialogues differ before their last turn; a pair needs one prompt")
    return tuple(chosen_turns[:-1]), chosen_turns[-1].content, rejected_turns[-1].content


def split_dialogue(text: str) -> list[Message]:
    """Return the turns of one dialogue, user and assistant alternating.

    Raises:
        ValueError: a text that does not begin with `\\n\\nHuman:`.
    """
    marks = []
    speaker = "Assistant"
    for mark in _TURN.finditer(text):
        if mark.group(1) != speaker:
            speaker = mark.group(1)
            marks.append(mark)
    if not marks or marks[0].start() != 0:
        raise ValueError("the dialogue must begin with two line breaks and 'Human:'")
    ends = [mark.start() for mark in marks[1:]] + [len(text)]
    return [
        Message(role=_ROLES[mark.group(1)], content=text[mark.end() : end].removeprefix(" "))
        for mark, end in zip(marks, ends, strict=True)
    ]
