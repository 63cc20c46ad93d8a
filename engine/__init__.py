"""The RLHF engine: data, rollouts, objectives, stages."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from glm_rlhf.engine.config.rl import PPOConfig
    from glm_rlhf.engine.rl.engine import PPOEngine

    __version__: str

__all__ = ["PPOConfig", "PPOEngine"]


def __getattr__(name: str) -> object:
    """Import what is public when it is asked for: the command line's help must not import torch."""
    if name == "PPOConfig":
        from glm_rlhf.engine.config.rl import PPOConfig

        return PPOConfig
    if name == "PPOEngine":
        from glm_rlhf.engine.rl.engine import PPOEngine

        return PPOEngine
    if name == "__version__":
        from importlib.metadata import version

        return version("glm-rlhf")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
