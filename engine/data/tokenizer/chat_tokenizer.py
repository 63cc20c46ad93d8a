"""The tokenizer: text and conversations to ids and back; only a chat format inserts special tokens."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from glm_rlhf.engine.data.messages import Message, check_conversation, lone_surrogate
from glm_rlhf.engine.data.tokenizer import vocabulary
from glm_rlhf.engine.data.tokenizer.chat_format import ChatFormat, Marker, Segment
from glm_rlhf.engine.data.tokenizer.vocabulary import StreamDecoder, TokenTable, Unknown


@dataclass(frozen=True, slots=True, kw_only=True)
class Tokenizer:
    """Text ⇄ ids with one vocabulary and one chat format. Made by `load_tokenizer`; can be pickled."""

    table: TokenTable
    """Bytes or name of every id."""
    chat: ChatFormat
    """The chat format."""
    encode_text: Callable[[str], list[int]] = field(repr=False)
    """The vocabulary's encoder of plain text, which never returns a special id."""
    extra_stop_ids: tuple[int, ...] = ()
    """Stop ids that the model's folder declares in addition to those of the chat format."""

    @property
    def vocab_size(self) -> int:
        """One more than the largest id, special tokens included; the model's embedding may have more rows."""
        return self.table.size

    @property
    def prefix_ids(self) -> list[int]:
        """Ids at the beginning of every sequence: those of `[gMASK]` and `sop`."""
        return [self.id_of(name) for name in self.chat.prefix]

    @property
    def end_id(self) -> int:
        """Id at the end of a training answer; always among `stop_ids`."""
        return self.id_of(self.chat.end)

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Ids that end a generated answer, those of the chat format first, without duplicates."""
        named = [self.id_of(name) for name in self.chat.stops]
        return tuple(dict.fromkeys([*named, *self.extra_stop_ids]))

    @property
    def pad_id(self) -> int:
        """Padding id; it may be a stop id (GLM-4), so it does not mark the end of an answer."""
        return self.id_of(self.chat.pad)

    def id_of(self, name: str) -> int:
        """Return the id of a special token.

        Raises:
            ValueError: no special token has that name.
        """
        token = self.table.id_by_name.get(name)
        if token is None:
            known = ", ".join(self.table.id_by_name)
            raise ValueError(f"{name!r} is not a special token of this tokenizer; it has {known}")
        return token

    def encode(self, text: str) -> list[int]:
        """Return the ids of plain text, without prefix or end.

        Names of special tokens in the text, such as a typed `<|user|>`, are encoded as ordinary characters.

        Raises:
            ValueError: not a `str`, or one with a lone surrogate, which UTF-8 cannot hold.
        """
        if not isinstance(text, str):
            raise ValueError(f"encode needs a str, not {type(text).__name__}")
        index = lone_surrogate(text)
        if index >= 0:
            raise ValueError(f"the text holds a lone surrogate at character {index}; fix its \\u escape")
        ids = self.encode_text(text)
        assert self.table.name_by_id.keys().isdisjoint(ids), "plain text became a special token"
        return ids

    def decode(self, ids: Sequence[int], *, skip_special: bool = True, unknown: Unknown = "raise") -> str:
        """Return the text of `ids`; see `vocabulary.decode` for cut characters and ids without a token.

        `decode(encode(text)) == text` except for what the vocabulary normalises: with ChatGLM's sentencepiece
        model only U+2581, its sign for a space, which is decoded as a space; with GLM-4 nothing.
        """
        return vocabulary.decode(self.table, ids, skip_special=skip_special, unknown=unknown)

    def stream(self, *, skip_special: bool = True, unknown: Unknown = "raise") -> StreamDecoder:
        """Return a decoder for ids that arrive one by one."""
        return StreamDecoder(self.table, skip_special=skip_special, unknown=unknown)

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool) -> list[int]:
        """Return the ids of a conversation in the chat format, with the prefix and without the end.

        ChatGLM3: `[gMASK] sop`, then for each turn `<|role|>`, the encoding of `metadata + "\\n"` and that of
        the content; the generation prompt is only `<|assistant|>`, as the model generates the line break.
        GLM-4: `[gMASK] <sop>`, then `<|role|>` and the encoding of `metadata + "\\n" + content`.
        ChatGLM2: `[gMASK] sop` and one text, `[Round 1]\\n\\n问：…\\n\\n答：…\\n\\n[Round 2]…`.

        Args:
            messages: the turns, oldest first.
            add_generation_prompt: append the opening of an answer; the last turn must then be a user turn or
                an observation.

        Raises:
            RoleError: an invalid order of turns; it names the first invalid one.
        """
        check_conversation(messages, ends_open=add_generation_prompt)
        opening = self.chat.opening if add_generation_prompt else ()
        return self.prefix_ids + self._ids_of([*self.chat.turns(messages), *opening])

    def render_response(self, response: str) -> list[int]:
        """Return the ids of a training answer, which follow the prompt, end included."""
        return self._ids_of(self.chat.answer(response))

    def render_prompt_response(
        self, messages: Sequence[Message], response: str
    ) -> tuple[list[int], list[int]]:
        """Return `(prompt_ids, response_ids)`; the training sequence is their concatenation.

        The prompt is `render(messages, add_generation_prompt=True)`. The response's ids are exactly what the
        model has to generate: the header line, if the format leaves it to the model, the text, the end id.

        Raises:
            RoleError: an invalid order of turns.
            ValueError: a response that is not text.
        """
        return self.render(messages, add_generation_prompt=True), self.render_response(response)

    def decode_response(self, ids: Sequence[int], *, unknown: Unknown = "raise") -> str:
        """Return the text of a generated answer, without its header line and special tokens.

        `decode_response(render_response(text)) == text` with the exceptions of `decode`. An answer that
        begins with a tool's name keeps that line.
        """
        header = self.chat.header
        if header:
            header_ids = self.encode(header)
            if list(ids[: len(header_ids)]) == header_ids:
                return self.decode(ids[len(header_ids) :], unknown=unknown)
        return self.decode(ids, unknown=unknown).removeprefix(header)

    def ids_without_token(self, num_rows: int) -> torch.Tensor:
        """Return a bool tensor [num_rows], true for rows of the embedding without a token.

        Raises:
            ValueError: fewer rows than ids.
        """
        return vocabulary.ids_without_token(self.table, num_rows)

    def unsampleable_ids(self, num_rows: int) -> torch.Tensor:
        """Return a bool tensor [num_rows], true for rows that a sampler must never choose.

        These are rows without a token, and special tokens that only a chat format inserts (`[gMASK]`,
        `<|system|>`, `<unk>`, …). Stop ids and `<|assistant|>`, with which ChatGLM3 and GLM-4 begin a tool
        call, remain possible.

        Raises:
            ValueError: fewer rows than ids.
        """
        is_masked_V = vocabulary.with_special_ids(
            self.ids_without_token(num_rows), self.table, except_names=self.chat.emitted
        )
        is_masked_V[list(self.stop_ids)] = False
        return is_masked_V

    def _ids_of(self, segments: Sequence[Segment]) -> list[int]:
        ids: list[int] = []
        for segment in segments:
            if isinstance(segment, Marker):
                ids.append(self.id_of(segment.name))
            else:
                ids += self.encode(segment)
        return ids
