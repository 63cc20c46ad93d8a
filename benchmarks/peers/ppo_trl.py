"""TRL's PPO on the task of `peers.ppo`, with another contender's iteration after each of its own."""

import gc
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace

import torch

from benchmarks.peers.ppo_task import (
    ADAM_BETAS,
    CLIP,
    GAMMA,
    KL_COEF,
    LAM,
    LOW_IDS,
    LR,
    PROMPTS,
    SHAPE,
    STOP_ID,
    PeerTask,
    Run,
)

_NO_ID = SHAPE["vocab_size"]
"""Stands for padding: no model gives it."""


def run_in_turns(
    folder: Path,
    task: PeerTask,
    prompts: Sequence[Sequence[int]],
    *,
    seed: int,
    iterations: int,
    other: Callable[[], None],
) -> Run:
    """Return TRL's iterations; `other` runs after each of them, outside its time.

    Args:
        folder: with the models of `save_models`.
        task: how long answers are.
        prompts: ids of each; shorter ones are padded on the left, and TRL masks the padding.
        seed: of TRL's answers.
        iterations: of each contender.
        other: one iteration of the other contender.
    """
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    from transformers import GlmForCausalLM, GlmForSequenceClassification, TrainerCallback
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    run = Run()

    class Turns(TrainerCallback):
        """Takes TRL's time from one call to the next."""

        started = 0.0

        def on_train_begin(self, args: object, state: object, control: object, **options: object) -> None:
            gc.collect()
            gc.freeze()
            self.started = time.perf_counter()

        def on_step_end(self, args: object, state: object, control: object, **options: object) -> None:
            run.seconds.append(time.perf_counter() - self.started)
            run.rewards.append(state.log_history[-1]["objective/scores"])
            other()
            self.started = time.perf_counter()

    policy, reference = (GlmForCausalLM.from_pretrained(folder / "policy") for _ in range(2))
    critic = GlmForSequenceClassification.from_pretrained(folder / "critic")
    weights = [*policy.parameters(), *critic.parameters()]
    optimizer = torch.optim.AdamW(weights, lr=LR, betas=ADAM_BETAS, weight_decay=0.0, fused=True)
    schedule = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
    config = PPOConfig(
        output_dir=str(folder / "trl"),
        seed=seed,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to="none",
        save_strategy="no",
        learning_rate=LR,
        total_episodes=iterations * PROMPTS,
        per_device_train_batch_size=PROMPTS,
        gradient_accumulation_steps=1,
        local_rollout_forward_batch_size=PROMPTS,
        num_mini_batches=1,
        num_ppo_epochs=1,
        num_sample_generations=0,
        response_length=task.max_answer_tokens,
        stop_token_id=STOP_ID if task.stops else None,
        temperature=1.0,
        missing_eos_penalty=None,
        kl_coef=KL_COEF,
        kl_estimator="k1",
        cliprange=CLIP,
        cliprange_value=CLIP,
        vf_coef=1.0,
        gamma=GAMMA,
        lam=LAM,
        whiten_rewards=False,
    )
    trainer = PPOTrainer(
        args=config,
        processing_class=SimpleNamespace(pad_token_id=_NO_ID, eos_token_id=_NO_ID),
        model=policy,
        ref_model=reference,
        reward_model=_Rule(max(map(len, prompts)), run.lengths),
        value_model=critic,
        train_dataset=[{"input_ids": prompt} for prompt in prompts],
        eval_dataset=[{"input_ids": prompt} for prompt in prompts],
        data_collator=_padded,
        optimizers=(optimizer, schedule),
        callbacks=[Turns()],
    )
    trainer.train()
    gc.unfreeze()
    return run


def _padded(records: Sequence[dict[str, Sequence[int]]]) -> dict[str, torch.Tensor]:
    longest = max(len(record["input_ids"]) for record in records)
    rows = [[_NO_ID] * (longest - len(record["input_ids"])) + [*record["input_ids"]] for record in records]
    return {"input_ids": torch.tensor(rows)}


class _Rule(torch.nn.Module):
    """`share_of_low_ids` in the form of a reward model: a backbone, and a head over its hidden states."""

    base_model_prefix = "backbone"

    def __init__(self, num_prompt_tokens: int, lengths: list[float]) -> None:
        """Take the prompts' length with padding, and where the mean length of answers goes at each call."""
        super().__init__()
        self._num_prompt_tokens, self._lengths = num_prompt_tokens, lengths

    def backbone(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, **options: object
    ) -> SimpleNamespace:
        """Return as hidden states [B, T, 1] whether each id is one of the answer's and low."""
        self._lengths.append(attention_mask[:, self._num_prompt_tokens :].sum(1).float().mean().item())
        is_low_BT = input_ids < LOW_IDS
        is_low_BT[:, : self._num_prompt_tokens] = False
        return SimpleNamespace(hidden_states=[is_low_BT.float()[..., None]])

    def score(self, hidden_BT1: torch.Tensor) -> torch.Tensor:
        """Return [B, T, 1], the share of low ids in the answer up to every position."""
        length_T1 = torch.arange(1, hidden_BT1.shape[1] + 1)[:, None] - self._num_prompt_tokens
        return hidden_BT1.cumsum(1) / length_T1.clamp_min(1)
