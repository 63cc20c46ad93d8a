"""What cannot be offloaded is refused, naming the setting to change, before a model is read."""

import pytest

from glm_rlhf.engine.config.load import load_config
from glm_rlhf.engine.config.rl import PPOConfig

REQUIRED = ("model.path=m", "data.path=p.jsonl", "reward.function=rules:one", "train.steps=1")


def test_an_optimizer_in_backward_is_not_offloaded():
    with pytest.raises(
        ValueError, match=r"remove optimizers from train.offload, or set optimizer.in_backward to false"
    ):
        load_config(
            PPOConfig, overrides=[*REQUIRED, "train.offload=[optimizers]", "optimizer.in_backward=true"]
        )
    offloads = load_config(
        PPOConfig, overrides=[*REQUIRED, "train.offload=[reference]", "optimizer.in_backward=true"]
    )
    assert offloads.train.offload == ("reference",)


def test_a_role_that_cannot_be_offloaded_is_refused():
    with pytest.raises(ValueError, match=r"train.offload"):
        load_config(PPOConfig, overrides=[*REQUIRED, "train.offload=[policy]"])
