"""The keys of a config: accepted values, defaults, nearest spelling, help."""

from functools import partial
from typing import Annotated, Literal

import pytest
from pydantic import Field

from glm_rlhf.engine.cli import COMMANDS
from glm_rlhf.engine.config.keys import Described, Required, help_text, in_yaml, keys_of, nearest_key
from glm_rlhf.engine.config.sections import Count, ScoreConfig, frozen_section


@frozen_section
class _Optimizer:
    """How weights move."""

    lr: Annotated[float, Field(gt=0, le=1)]
    """Learning rate of the first step,
    per update."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decays."""
    stop_ids: tuple[Count, ...] = ()
    """Ids."""
    clip_grad: Annotated[float, Field(ge=0)] | None = None
    """Largest norm."""
    kind: Literal["adam", "sgd"] = "adam"
    """Algorithm."""
    level: Literal[1, 2] = 1
    """Level."""
    size: Annotated[int, Described(accepts="a size")] = 3
    """Size."""


@frozen_section
class _Root:
    """Settings of a test."""

    optimizer: _Optimizer = Field(default_factory=partial(_Optimizer, lr=0.5))
    """The optimizer."""


def test_a_key_describes_what_it_accepts():
    accepts = {key.name: key.accepts for key in keys_of(_Root).values()}
    assert accepts == {
        "lr": "a number, above 0, at most 1",
        "betas": "a list of 2: a number, a number",
        "stop_ids": "a list: a whole number, at least 1 each",
        "clip_grad": "a number, at least 0 or null",
        "kind": "one of adam, sgd",
        "level": "one of 1, 2",
        "size": "a size",
    }


def test_a_command_has_its_own_defaults():
    assert keys_of(_Root)["optimizer.lr"].default == 0.5
    assert keys_of(ScoreConfig)["run.name"].default == "score"
    assert keys_of(ScoreConfig)["model.path"].default == Required()


def test_only_keys_of_text_take_text_unparsed():
    assert {key.name for key in keys_of(_Root).values() if key.is_text} == {"kind"}
    assert {key.name for key in keys_of(_Root).values() if key.may_be_null} == {"clip_grad"}


@pytest.mark.parametrize(
    ("unknown", "nearest"),
    [
        ("model.pth", "model.path"),
        ("modle.path", "model.path"),
        ("seed", "run.seed"),
        ("train.seed", "run.seed"),
        ("parallel.tensor", "parallel.tp"),
        ("parallel.seq_parallel", "parallel.sequence_parallel"),
        ("train.micro_batch", "train.micro_batch_tokens"),
        ("data.paht", "data.path"),
        ("tokenizr.path", "tokenizer.path"),
    ],
)
def test_the_nearest_key_is_the_likely_one(unknown: str, nearest: str):
    assert nearest_key(unknown, keys_of(ScoreConfig)) == nearest


def test_values_are_shown_as_a_user_writes_them():
    shown = [in_yaml(value) for value in (None, True, False, 1e-6, (1, True), "a")]
    assert shown == ["null", "true", "false", "1e-06", "[1, true]", "a"]


def test_help_names_every_key_with_kind_default_and_meaning():
    text = help_text(_Root)
    assert "optimizer: How weights move." in text
    assert "  optimizer.lr         a number, above 0, at most 1 (default 0.5)" in text
    assert "      Learning rate of the first step, per update." in text
    assert "a list of 2: a number, a number (default [0.9, 0.95])" in text
    assert "model.path                  a path (required)" in help_text(ScoreConfig)
    for key in keys_of(ScoreConfig):
        assert key in help_text(ScoreConfig)


def test_a_key_of_a_base_section_keeps_its_description():
    for command in COMMANDS:
        assert [key.path for key in keys_of(command.config).values() if not key.meaning] == [], command.name
