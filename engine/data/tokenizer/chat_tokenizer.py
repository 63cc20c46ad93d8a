"""A tokenizer that alone places special tokens: text in, ids out, conversations by its family's form."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from glm_rlhf.engine.data.messages import Message, check_conversation, lone_surrogate
from glm_rlhf.engine.data.tokenizer import vocabulary
from glm_rlhf.engine.data.tokenizer.chat_format import ChatFormat, Marker, Segment
from glm_rlhf.engine.data.tokenizer.vocabulary import StreamDecoder, TokenTable, Unknown


@dataclass(frozen=True, slots=True, kw_only=True)
class Tokenizer:
    """Text ⇄ ids of one vocabulary and one chat form. Made by `load_tokenizer`; can be pickled."""

    table: TokenTable
    """What every id stands for."""
    chat: ChatFormat
    """How conversations are written."""
    encode_text: Callable[[str], list[int]] = field(repr=False)
    """The vocabulary's own encoder of plain text, which never yields a special id."""
    extra_stop_ids: tuple[int, ...] = ()
    """Ids the model's folder names as ends besides the chat form's."""

    @property
    def vocab_size(self) -> int:
        """One more than the largest id, special tokens included; the model's embedding may have more rows."""
        return self.table.size

    @property
    def prefix_ids(self) -> list[int]:
        """Ids every sequence opens with, as others have a `bos`: those of `[gMASK]` and `sop`."""
        return [self.id_of(name) for name in self.chat.prefix]

    @property
    def end_id(self) -> int:
        """Id a training answer ends with; always among `stop_ids`."""
        return self.id_of(self.chat.end)

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Ids that end a generated answer, the chat form's first, no id twice."""
        named = [self.id_of(name) for name in self.chat.stops]
        return tuple(dict.fromkeys([*named, *self.extra_stop_ids]))

    @property
    def pad_id(self) -> int:
        """Id for places without meaning; it may be a stop id (GLM-4), so never tell an end by it."""
        return self.id_of(self.chat.pad)

    def id_of(self, name: str) -> int:
        """Return the id of a special token.

        Raises:
            ValueError: no special token has that name.
        """
        found = self.table.id_by_name.get(name)
        if found is None:
            known = ", ".join(self.table.id_by_name)
            raise ValueError(f"{name!r} is no special token of this tokenizer; it has {known}")
        return found

    def encode(self, text: str) -> list[int]:
        """Return the ids of plain text, without prefix or end.

        Special tokens in the text, such as a typed `<|user|>`, are encoded as the characters they are.

        Raises:
            ValueError: not a `str`, or one with a lone surrogate, which UTF-8 cannot hold.
        """
        if not isinstance(text, str):
            raise ValueError(f"encode needs a str, not {type(text).__name__}")
        place = lone_surrogate(text)
        if place >= 0:
            raise ValueError(f"the text holds a lone surrogate at character {place}; repair its escape")
        ids = self.encode_text(text)
        assert self.table.name_by_id.keys().isdisjoint(ids), "plain text became a special token"
        return ids

    def decode(self, ids: Sequence[int], *, skip_special: bool = True, unknown: Unknown = "raise") -> str:
        """Return the text of `ids`; see `vocabulary.decode` for cut characters and ids without a token.

        `decode(encode(text)) == text` but for what the vocabulary's own normalisation changes: with
        ChatGLM's sentencepiece model only U+2581, its sign for a space, which comes back as a space; with
        GLM-4 nothing.
        """
        return vocabulary.decode(self.table, ids, skip_special=skip_special, unknown=unknown)

    def stream(self, *, skip_special: bool = True, unknown: Unknown = "raise") -> StreamDecoder:
        """Return a decoder for ids that arrive one by one."""
        return StreamDecoder(self.table, skip_special=skip_special, unknown=unknown)

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool) -> list[int]:
        """Return the ids of a conversation in the family's form, prefix included, end not.

        ChatGLM3: `[gMASK] sop`, then for each turn `<|role|>`, the encoding of `metadata + "\\n"` and that of
        the content; the generation prompt is `<|assistant|>` alone, for the model writes the line end.
        GLM-4: `[gMASK] <sop>`, then `<|role|>` and the encoding of `metadata + "\\n" + content`.
        ChatGLM2: `[gMASK] sop` and one text, `[Round 1]\\n\\n问：…\\n\\n答：…\\n\\n[Round 2]…`.

        Args:
            messages: the turns, oldest first.
            add_generation_prompt: open the answer that is to follow; the last turn must then be a user's or
                an observation.

        Raises:
            RoleError: turns that cannot stand so, naming the first bad one.
        """
        check_conversation(messages, ends_open=add_generation_prompt)
        opening = self.chat.opening if add_generation_prompt else ()
        return self.prefix_ids + self._ids_of([*self.chat.turns(messages), *opening])

    def render_response(self, response: str) -> list[int]:
        """Return the ids of a training answer: what the model is to write behind the prompt, end included."""
        return self._ids_of(self.chat.answer(response))

    def render_prompt_response(
        self, messages: Sequence[Message], response: str
    ) -> tuple[list[int], list[int]]:
        """Return `(prompt_ids, response_ids)`; the sequence to train on is their sum.

        The prompt is `render(messages, add_generation_prompt=True)`. The response's ids are exactly what the
        model has to generate: the header line, where its form leaves that to the model, the text, the end id.

        Raises:
            RoleError: turns that cannot stand so.
            ValueError: a response that is not text.
        """
        return self.render(messages, add_generation_prompt=True), self.render_response(response)

    def decode_response(self, ids: Sequence[int], *, unknown: Unknown = "raise") -> str:
        """Return the text of a generated answer, without its header line and special tokens.

        `decode_response(render_response(text)) == text` within the limits `decode` names. An answer that
        opens with a tool's name keeps that line.
        """
        header = self.chat.header
        if header:
            header_ids = self.encode(header)
            if list(ids[: len(header_ids)]) == header_ids:
                return self.decode(ids[len(header_ids) :], unknown=unknown)
        return self.decode(ids, unknown=unknown).removeprefix(header)

    def ids_without_token(self, num_rows: int) -> torch.Tensor:
        """Return a bool tensor [num_rows], true for rows of the embedding that no token has.

        Raises:
            ValueError: fewer rows than ids.
        """
        return vocabulary.ids_without_token(self.table, num_rows)

    def unsampleable_ids(self, num_rows: int) -> torch.Tensor:
        """Return a bool tensor [num_rows], true for rows a sampler must never choose.

        Rows without a token, and special tokens only a chat form may place (`[gMASK]`, `<|system|>`, `<unk>`,
        …). Stop ids and `<|assistant|>`, with which ChatGLM3 and GLM-4 open a tool call, stay possible.

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
