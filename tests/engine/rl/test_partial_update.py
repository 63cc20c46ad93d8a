"""A PPO run that is left between two epochs resumes to the bits of the run that never stopped."""

import contextlib
import io
import json
from pathlib import Path

import pytest
import torch
from faulty_run import Fault, run_with_fault
from safetensors.torch import load_file
from tiny_models import make_model, save_folder
from tiny_ppo_line import ppo_line

from glm_rlhf.engine.cli import main
from glm_rlhf.engine.rl.partial_update import PartialUpdate, tensors_of, update_of
from glm_rlhf.engine.types import Experience, PromptInput, Rollouts

EPOCHS = ["ppo.epochs=2", "ppo.minibatches=2", "generation.max_new_tokens=6", "parallel.tp=2"]
FAULT = Fault(kind="SIGTERM", phase="critic", rank=2)
"""Rank 2 is asked to leave in the second mini-batch of the first epoch."""


@pytest.fixture(scope="module")
def line(tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("ppo")
    return [
        *ppo_line(save_folder(folder / "model", "glm", make_model("glm")), folder),
        *EPOCHS,
        "train.steps=1",
    ]


def leave_and_resume(line: list[str]) -> tuple[tuple[int, ...], str]:
    """Leave, try another layout, then resume; exit codes, and what was said."""
    with contextlib.redirect_stderr(io.StringIO()) as said:
        left = run_with_fault(FAULT, line, torch.distributed.get_rank())
        return (left, main([*line, "parallel.tp=1"]), main(line)), said.getvalue()


def result_of(output: Path) -> tuple[list[dict], dict[str, torch.Tensor]]:
    (file,) = (output / "hf" / "step_1").glob("*.safetensors")
    metrics = [json.loads(text) for text in (output / "metrics.jsonl").open()]
    kept = [{k: v for k, v in one.items() if not k.startswith(("timing_s", "perf"))} for one in metrics]
    return kept, load_file(file)


@pytest.mark.parametrize("more", [[], ["optimizer.in_backward=true"]], ids=["", "in backward"])
def test_it_resumes_bit_for_bit(ranks, line, tmp_path, more):
    line = [*line, *more]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert ranks.run(main, [*line, f"run.output={whole}"]) == [0] * 4
    answers = ranks.run(leave_and_resume, [*line, f"run.output={parts}"])
    assert [codes for codes, _ in answers] == [(0, 2, 0)] * 4
    said = answers[0][1]
    assert "left inside step 1 of 1" in said
    assert "was left inside iteration 1" in said
    (metrics, weights), (expected, wanted) = result_of(parts), result_of(whole)
    assert metrics == expected
    assert weights.keys() == wanted.keys()
    assert all(torch.equal(weights[name], wanted[name]) for name in wanted)


def test_everything_of_an_update_goes_through_tensors():
    values = iter(torch.rand(8, 5))
    rollouts = Rollouts(
        tokens_T=torch.tensor([4, 5, 6, 7, 8]),
        lengths=(2, 3),
        prompt_lengths=(1, 1),
        prompts=(
            PromptInput(tokens=(4,), extra={"answer": "四", "n": [1, None]}),
            PromptInput(tokens=(6,), extra={}),
        ),
        is_finished=(True, False),
        logprobs_T=next(values),
        temperature=0.7,
        indices=(3, 1),
        num_global=4,
        excluded=frozenset({1}),
    )
    names = ("old_logprobs_T", "ref_logprobs_T", "values_T", "advantages_T", "returns_T", "kl_T")
    experience = Experience(
        rollouts=rollouts,
        rewards_B=torch.tensor([0.1, 0.0]),
        metrics={"objective/kl": 0.1 + 0.2, "rollout/logprob_gap": 1e-7},
        **{name: next(values) for name in names},
    )
    update = PartialUpdate(
        experience=experience,
        epoch=2,
        steps={"critic": [{"critic/vf_loss": 0.1}], "policy": [{"actor/ppo_kl": 1 / 3}]},
    )
    found = update_of(tensors_of(update), device=torch.device("cpu"))
    assert (found.epoch, found.steps) == (2, update.steps)
    for one, expected in ((found.experience, experience), (found.experience.rollouts, rollouts)):
        for name in type(one).__dataclass_fields__:
            mine, wanted = getattr(one, name), getattr(expected, name)
            if isinstance(wanted, torch.Tensor):
                assert torch.equal(mine, wanted), name
                assert mine.dtype == wanted.dtype
            elif name != "rollouts":
                assert mine == wanted, name
