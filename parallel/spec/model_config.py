"""The shape of a GLM model, independent of sharding and of the source of its weights."""

from dataclasses import dataclass
from typing import Literal

Family = Literal["chatglm", "glm", "glm4"]


@dataclass(frozen=True, slots=True, kw_only=True)
class GLMConfig:
    """A dense GLM decoder: RMSNorm, SwiGLU, grouped-query attention, partial interleaved RoPE."""

    family: Family
    """Hugging Face form: `chatglm` (remote code), `glm` (`GlmForCausalLM`), `glm4` (`Glm4ForCausalLM`)."""
    num_layers: int
    """Transformer layers."""
    hidden_size: int
    """D, width of the residual stream."""
    num_heads: int
    """N, query heads."""
    num_kv_heads: int
    """K, key/value heads (groups of query heads)."""
    head_size: int
    """H, width of one head."""
    ffn_size: int
    """Width of the gated MLP after the gate."""
    vocab_size: int
    """V, rows of the embedding: at least the number of token ids, often more."""
    norm_epsilon: float
    """Added to the mean square inside RMSNorm."""
    rope_theta: float
    """Base of the rotary frequencies, already multiplied by the source's `rope_ratio`."""
    rotary_fraction: float = 0.5
    """Fraction of each head that is rotated: interleaved pairs at the start of the head."""
    has_qkv_bias: bool = True
    """Whether query, key and value projections carry a bias."""
    has_interleaved_qkv: bool = False
    """Whether the folder's query-key-value tensor holds query, key and value of one head side by side, as
    `chatglm` without `multi_query_attention` does, and not all queries, then all keys, then all values."""
    has_sandwich_norms: bool = False
    """Whether attention and MLP outputs are normalised before the residual add (GLM-4-0414)."""
    has_tied_head: bool = False
    """Whether the vocabulary head shares the embedding's weight."""
    has_score_bias: bool = False
    """Whether a critic or reward model of `glm` or `glm4` adds a constant to every score, which is never
    trained: only where its folder holds one. That of `chatglm` always has a bias, and trains it."""
    max_positions: int = 8192
    """Longest sequence that the model supports, in tokens."""
    init_std: float = 0.02
    """Standard deviation of randomly initialised weights."""

    @property
    def rotary_size(self) -> int:
        """Number of rotated elements at the start of each head."""
        return int(self.head_size * self.rotary_fraction)

    @property
    def heads_per_group(self) -> int:
        """Query heads that share one key/value head."""
        return self.num_heads // self.num_kv_heads

    def __post_init__(self) -> None:
        positive = (
            "num_layers",
            "hidden_size",
            "num_heads",
            "num_kv_heads",
            "head_size",
            "ffn_size",
            "vocab_size",
        )
        for name in positive:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, it must be at least 1")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads {self.num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}: "
                "every key/value head serves the same number of query heads"
            )
        if self.has_interleaved_qkv and (self.family != "chatglm" or self.heads_per_group != 1):
            raise ValueError(
                f"has_interleaved_qkv is True for the family {self.family} with num_kv_heads "
                f"{self.num_kv_heads} of num_heads {self.num_heads}: only chatglm with a key and a value for "
                "every query head stores them so"
            )
        if self.rotary_size % 2:
            raise ValueError(f"rotary_fraction {self.rotary_fraction} of head_size {self.head_size} is odd")
