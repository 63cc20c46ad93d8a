"""What cannot be parked is refused with the setting that mends it, before a model is read."""

import pytest

from glm_rlhf.engine.config.load import load_config
from glm_rlhf.engine.config.rl import PPOConfig

GIVEN = ("model.path=m", "data.path=p.jsonl", "reward.function=rules:one", "train.steps=1")


def test_an_optimizer_in_backward_is_not_parked():
    with pytest.raises(
        ValueError, match=r"remove optimizers from train.offload, or set optimizer.in_backward to false"
    ):
        load_config(PPOConfig, overrides=[*GIVEN, "train.offload=[optimizers]", "optimizer.in_backward=true"])
    offloads = load_config(
        PPOConfig, overrides=[*GIVEN, "train.offload=[reference]", "optimizer.in_backward=true"]
    )
    assert offloads.train.offload == ("reference",)


def test_what_cannot_be_parked_is_not_a_name():
    with pytest.raises(ValueError, match=r"train.offload"):
        load_config(PPOConfig, overrides=[*GIVEN, "train.offload=[policy]"])
