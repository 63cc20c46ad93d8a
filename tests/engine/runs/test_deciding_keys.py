"""What a run may change where it resumes."""

from pathlib import Path

import pytest

from glm_rlhf.engine.config.keys import keys_of
from glm_rlhf.engine.config.rl import PPOConfig
from glm_rlhf.engine.config.training import DPOConfig, RewardConfig, SFTConfig
from glm_rlhf.engine.runs.deciding_keys import KNOWN_KEYS, effect_of
from glm_rlhf.engine.runs.fingerprint import check_same_run

ROOTS = (PPOConfig, SFTConfig, RewardConfig, DPOConfig)
ALL_KEYS = {key for root in ROOTS for key in keys_of(root)}
MAY_CHANGE = (
    *("run.watchdog_s", "parallel.timeout_s", "reward.timeout_s", "reward.concurrency", "train.offload"),
    *("train.save_every", "train.export_every", "evaluate.every", "data.eval_path"),
)
END_EQUAL_BITS = (
    "reward.on_error",
    "generation.tp",
    "generation.pp",
    "parallel.tp",
    "train.micro_batch_tokens",
)


def checked(key: str, then: object, now: object) -> list[str]:
    section, name = key.split(".")
    return check_same_run(Path("run/step_3"), {section: {name: then}}, {section: {name: now}}, {}, {})


def test_every_listed_key_is_a_key_of_a_command_that_trains():
    assert not KNOWN_KEYS - ALL_KEYS


@pytest.mark.parametrize("key", MAY_CHANGE)
def test_how_a_run_is_carried_out_may_change(key):
    assert key in ALL_KEYS
    assert checked(key, 1, 2) == []


@pytest.mark.parametrize("key", END_EQUAL_BITS)
def test_what_moves_the_last_bits_may_change_and_is_named(key):
    assert key in ALL_KEYS
    assert checked(key, "a", "b") == [f"{key} was a and is b"]
    assert checked(key, "a", "a") == []


@pytest.mark.parametrize("key", sorted(key for key in ALL_KEYS if effect_of(key) == "result"))
def test_what_decides_the_result_may_not_change(key):
    with pytest.raises(ValueError, match=rf"is of another run: {key} was 1 and is 2; set"):
        checked(key, 1, 2)


def test_a_key_that_nobody_has_classified_decides_the_result():
    assert effect_of("my_algorithm.my_key") == "result"


@pytest.mark.parametrize("key", ["optimizer.lr", "run.seed", "ppo.clip", "train.dtype", "data.max_tokens"])
def test_the_algorithm_and_its_numbers_decide(key):
    assert effect_of(key) == "result"
