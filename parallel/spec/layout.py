"""The layout of a model over ranks, and the checks that a world and a model allow it."""

from dataclasses import dataclass

from glm_rlhf.parallel.spec.model_config import GLMConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """Sizes of the parallel axes; the data-parallel size is the world size over their product."""

    tp: int = 1
    """Tensor parallelism: ranks that split every layer's matrices."""
    pp: int = 1
    """Pipeline parallelism: stages that hold consecutive layers."""
    vpp: int = 1
    """Model chunks per pipeline stage, interleaved; 1 does not interleave."""
    cp: int = 1
    """Context parallelism: ranks that split the tokens of a micro-batch."""
    sequence_parallel: bool = False
    """Whether norms and residuals between tensor-parallel regions are split over tokens."""

    def __post_init__(self) -> None:
        for axis in ("tp", "pp", "vpp", "cp"):
            if getattr(self, axis) < 1:
                raise ValueError(f"parallel.{axis} is {getattr(self, axis)}, it must be at least 1")
        if self.vpp > 1 and self.pp == 1:
            raise ValueError(f"parallel.vpp is {self.vpp} with parallel.pp 1: chunks interleave over stages")
        if self.sequence_parallel and self.tp == 1:
            raise ValueError("parallel.sequence_parallel needs parallel.tp above 1: it splits over tp ranks")

    @property
    def num_model_ranks(self) -> int:
        """Ranks that hold one copy of the model and process one micro-batch."""
        return self.tp * self.pp * self.cp

    @property
    def token_multiple(self) -> int:
        """Packed micro-batches are padded to a multiple of this many tokens."""
        chunks = 2 * self.cp if self.cp > 1 else 1
        return chunks * (self.tp if self.sequence_parallel else 1)

    def dp(self, world_size: int) -> int:
        """Return the data-parallel size in a world of `world_size` ranks.

        Raises:
            ValueError: tp × pp × cp does not divide the world.
        """
        if world_size % self.num_model_ranks:
            raise ValueError(
                f"tp {self.tp} × pp {self.pp} × cp {self.cp} = {self.num_model_ranks} does not divide "
                f"the world of {world_size} ranks: launch a multiple of {self.num_model_ranks}"
            )
        return world_size // self.num_model_ranks

    def check_model(self, config: GLMConfig) -> None:
        """Check that a model can be split this way.

        Raises:
            ValueError: an axis does not divide what it splits; the message names both numbers.
        """
        stages = self.pp * self.vpp
        divisions = [
            ("num_layers", config.num_layers, "pp × vpp" if self.vpp > 1 else "pp", stages),
            ("num_heads", config.num_heads, "tp", self.tp),
            ("ffn_size", config.ffn_size, "tp", self.tp),
        ]
        for dimension, amount, axis, size in divisions:
            if amount % size:
                raise ValueError(
                    f"{dimension} {amount} of the model is not a multiple of {axis} {size}: "
                    f"give a divisor of {amount}"
                )
        if config.vocab_size <= config.rows_per_rank(self.tp) * (self.tp - 1):
            raise ValueError(
                f"vocab_size {config.vocab_size} of the model is too small for tp {self.tp}: a rank would "
                "have no row"
            )
        if config.num_kv_heads % self.tp and self.tp % config.num_kv_heads:
            raise ValueError(
                f"num_kv_heads {config.num_kv_heads} of the model and tp {self.tp}: one must be a multiple "
                "of the other, so that key/value heads are split or replicated evenly"
            )
