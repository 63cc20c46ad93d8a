"""Which added tokens of a folder are reserved: no text encodes to them, only a chat format inserts them.

The others are tokens that somebody added for texts, such as `<|step|>`: a text that holds one encodes to it,
a model may generate it, and it decodes to its text, whether its entry says `special` or not.
"""

from collections.abc import Mapping
from dataclasses import dataclass

MARKERS = frozenset(
    (
        *("[MASK]", "[gMASK]", "[sMASK]", "sop", "eop", "<sop>", "<eop>", "<|endoftext|>"),
        *("<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"),
        *("<|begin_of_image|>", "<|end_of_image|>", "<|begin_of_video|>", "<|end_of_video|>"),
    )
)
"""Names that the GLM families give to special tokens."""

_NAME_KEYS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_ID_KEYS = ("bos_token_id", "eos_token_id", "pad_token_id")


@dataclass(frozen=True, slots=True)
class ReservedTokens:
    """The reserved tokens of a folder."""

    names: frozenset[str] = MARKERS
    """Names of the families' markers, and those that the tokenizer's config gives a part to."""
    ids: frozenset[int] = frozenset()
    """Ids that the configs give a part to, such as the end of an answer."""

    def holds(self, name: str, token: int) -> bool:
        """Return whether a token is reserved."""
        return name in self.names or token in self.ids


def reserved_tokens(tokenizer_config: Mapping, *configs: Mapping) -> ReservedTokens:
    """Return the reserved tokens of a folder.

    Args:
        tokenizer_config: parsed `tokenizer_config.json`.
        configs: parsed `config.json` and `generation_config.json`.
    """
    parts = [tokenizer_config.get(key) for key in _NAME_KEYS]
    names = [part.get("content") if isinstance(part, Mapping) else part for part in parts]
    declared = [config.get(key) for config in configs for key in _ID_KEYS]
    ids = [token for entry in declared for token in (entry if isinstance(entry, list) else [entry])]
    return ReservedTokens(
        names=MARKERS.union(name for name in names if isinstance(name, str)),
        ids=frozenset(token for token in ids if type(token) is int),
    )
