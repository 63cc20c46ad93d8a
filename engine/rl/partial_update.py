"""An update that a run was left in between two epochs, and how a checkpoint holds it."""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from glm_rlhf.engine.types import Experience, PromptInput, Rollouts

_PREFIX = "update."
_FACTS = f"{_PREFIX}facts"
"""Tensor with everything that is none, as JSON in bytes."""


@dataclass(slots=True, kw_only=True)
class PartialUpdate:
    """What a rank has learned from an iteration's experience so far, and what it continues with."""

    experience: Experience
    """Of this rank's share of the answers."""
    epoch: int = 0
    """The epoch that comes next."""
    steps: dict[str, list[dict[str, float]]] = field(default_factory=dict)
    """Metrics of the optimizer steps so far, by role."""


def tensors_of(update: PartialUpdate) -> dict[str, torch.Tensor]:
    """Return an update as tensors by name, for a rank's part of a checkpoint."""
    experience, rollouts = update.experience, update.experience.rollouts
    tensors: dict[str, torch.Tensor] = {}
    facts: dict[str, Any] = {
        "epoch": update.epoch,
        "steps": update.steps,
        "experience": _parts(experience, "experience.", tensors),
        "rollouts": _parts(rollouts, "rollouts.", tensors),
    }
    facts["experience"].pop("rollouts")
    facts["experience"]["metrics"] = dict(experience.metrics)
    facts["rollouts"]["excluded"] = sorted(rollouts.excluded)
    facts["rollouts"]["prompts"] = [[prompt.tokens, dict(prompt.extra)] for prompt in rollouts.prompts]
    text = json.dumps(facts).encode()
    return tensors | {_FACTS: torch.frombuffer(bytearray(text), dtype=torch.uint8)}


def update_of(tensors: Mapping[str, torch.Tensor], *, device: torch.device) -> PartialUpdate:
    """Return the update that `tensors_of` took apart, its tensors on a device.

    Raises:
        KeyError: there is none in the tensors.
    """
    facts = json.loads(tensors[_FACTS].numpy().tobytes())
    moved = {name: tensor.to(device) for name, tensor in tensors.items() if name.startswith(_PREFIX)}
    others = {name: tuple(v) if isinstance(v, list) else v for name, v in facts["rollouts"].items()}
    others["excluded"] = frozenset(others["excluded"])
    others["prompts"] = tuple(PromptInput(tokens=tuple(ids), extra=extra) for ids, extra in others["prompts"])
    fields_of_rollouts: dict[str, Any] = {**others, **_named(moved, "rollouts.")}
    rollouts = Rollouts(**fields_of_rollouts)
    experience = Experience(rollouts=rollouts, **facts["experience"], **_named(moved, "experience."))
    steps = facts.get("steps")
    if steps is None:  # of a version before 0.2
        steps = {"critic": facts["critic_steps"], "policy": facts["policy_steps"]}
    return PartialUpdate(experience=experience, epoch=facts["epoch"], steps=steps)


def _parts(whole: Experience | Rollouts, prefix: str, tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Put the tensors of a batch into `tensors`; return its other fields."""
    others = {}
    for one in dataclasses.fields(whole):
        value = getattr(whole, one.name)
        if isinstance(value, torch.Tensor):
            tensors[f"{_PREFIX}{prefix}{one.name}"] = value
        else:
            others[one.name] = value
    return others


def _named(tensors: Mapping[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    start = f"{_PREFIX}{prefix}"
    return {name.removeprefix(start): tensor for name, tensor in tensors.items() if name.startswith(start)}
