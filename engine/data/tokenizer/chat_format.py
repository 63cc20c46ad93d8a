"""Chat formats: a conversation as a sequence of markers and plain text, for each model family."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from glm_rlhf.engine.data.messages import Message, RoleError


@dataclass(frozen=True, slots=True)
class Marker:
    """A special token that only a chat format inserts; text is never encoded as one."""

    name: str
    """The token's name in the vocabulary, such as `<|user|>`."""


Segment = Marker | str
"""A piece of a rendered conversation. Each `str` is encoded separately: no token crosses its ends."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatFormat:
    """The chat format of one model family."""

    name: str
    """`chatglm2`, `chatglm3` or `glm4`."""
    prefix: tuple[str, ...]
    """Names of the markers at the beginning of every sequence."""
    turns: Callable[[Sequence[Message]], list[Segment]]
    """Returns the segments of checked turns, without the prefix."""
    opening: tuple[Segment, ...]
    """Segments that `add_generation_prompt` appends; may be empty."""
    header: str
    """Text between the opening and the answer that the model generates, so that it is part of the answer's
    ids."""
    joins_header: bool
    """Whether header and content are encoded as one text, as in a rendered template string."""
    end: str
    """Name of the token at the end of a training answer."""
    stops: tuple[str, ...]
    """Names of the tokens that end a generated answer."""
    pad: str
    """Name of the padding token."""
    emitted: tuple[str, ...]
    """Names of the special tokens that a model may generate: the stops, and the marker of another assistant
    turn."""

    def answer(self, text: str) -> list[Segment]:
        """Return the segments of a training answer: header, text, end marker."""
        end = Marker(self.end)
        if not self.header:
            return [text, end]
        return [self.header + text, end] if self.joins_header else [self.header, text, end]


def with_opening_text(chat_format: ChatFormat, text: str) -> ChatFormat:
    """Return the format with `text` after the opening marker, as part of the prompt.

    Some GLM-4 folders end the generation prompt with `<|assistant|>` and let the model generate the line
    break; others include it, and GLM-Z1 adds `<think>`. With text in the prompt, the answer has no header.
    """
    if not text:
        return chat_format
    return replace(chat_format, opening=(*chat_format.opening, text), header="")


_OPENING_IN_TEMPLATE = re.compile(r"if\s+add_generation_prompt\s*(-?)%\}(\s*)<\|assistant\|>")
_END_OF_OPENING = re.compile(r"\{%(-?)\s*endif")


def opening_text_of_template(template: str) -> str:
    """Return the literal text that a Hugging Face chat template writes after its last `<|assistant|>`.

    Nothing else is read from a template; the text is empty if the template has none there or computes it.
    A `{%-` after the text strips the white space before it, as in Jinja.
    """
    brace = 0
    for opening in _OPENING_IN_TEMPLATE.finditer(template):
        if brace < opening.end():
            brace = template.find("{", opening.end())
        if brace < 0:
            break
        end = _END_OF_OPENING.match(template, brace)
        if end is not None:
            text = template[opening.end() : brace]
            return text.rstrip() if end.group(1) else text
    return ""


def _chatglm2_turns(messages: Sequence[Message]) -> list[Segment]:
    # One text for the whole conversation. In this format a user turn ends with the opening of its answer, so
    # the opening is always written.
    text, num_rounds = "", 0
    for position, message in enumerate(messages):
        if message.role == "user":
            num_rounds += 1
            text += f"[Round {num_rounds}]\n\n问：{message.content}\n\n答："
        elif message.role == "assistant" and not message.metadata:
            is_last = position == len(messages) - 1
            text += message.content if is_last else f"{message.content}\n\n"
        else:
            kind = "tool call" if message.metadata else message.role
            raise RoleError(
                position, f"ChatGLM2's format has no {kind} turn; put its text into the user turn"
            )
    return [text]


def _chatglm3_turns(messages: Sequence[Message]) -> list[Segment]:
    segments: list[Segment] = []
    for message in messages:
        segments += [Marker(f"<|{message.role}|>"), f"{message.metadata}\n", message.content]
    return segments


def _glm4_turns(messages: Sequence[Message]) -> list[Segment]:
    segments: list[Segment] = []
    for message in messages:
        segments += [Marker(f"<|{message.role}|>"), f"{message.metadata}\n{message.content}"]
    return segments


CHATGLM2 = ChatFormat(
    name="chatglm2",
    prefix=("[gMASK]", "sop"),
    turns=_chatglm2_turns,
    opening=(),
    header="",
    joins_header=False,
    end="</s>",
    stops=("</s>",),
    pad="<unk>",
    emitted=("</s>",),
)

CHATGLM3 = ChatFormat(
    name="chatglm3",
    prefix=("[gMASK]", "sop"),
    turns=_chatglm3_turns,
    opening=(Marker("<|assistant|>"),),
    header="\n",
    joins_header=False,
    end="</s>",
    stops=("</s>", "<|user|>", "<|observation|>"),
    pad="<unk>",
    emitted=("</s>", "<|user|>", "<|observation|>", "<|assistant|>"),
)

GLM4 = ChatFormat(
    name="glm4",
    prefix=("[gMASK]", "<sop>"),
    turns=_glm4_turns,
    opening=(Marker("<|assistant|>"),),
    header="\n",
    joins_header=True,
    end="<|user|>",
    stops=("<|endoftext|>", "<|user|>", "<|observation|>"),
    pad="<|endoftext|>",
    emitted=("<|endoftext|>", "<|user|>", "<|observation|>", "<|assistant|>"),
)
