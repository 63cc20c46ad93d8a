"""The optional paths of the engine, each as settings on top of a command's own."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """An optional path of the engine."""

    name: str
    """What is different from the base row."""
    options: tuple[str, ...] = ()
    """`section.key=value` each; {inputs} stands for the folder of inputs."""
    then: tuple[str, ...] | None = None
    """Options on top of these of a second run in the same folder, which resumes; None for no second run."""
    then_layout: str | None = None
    """Layout of the second run; None for the first's."""
    shows: tuple[str, ...] = ()
    """Metrics that are neither 0 nor null at some step, or the path was not taken."""


def _variant(name: str, *options: str, **more) -> Variant:
    return Variant(name=name, options=options, **more)


def _resumed_in(layout: str | None = None, *options: str) -> Variant:
    name = " ".join(["resumed", *([f"in {layout}"] if layout else []), *options])
    return _variant(name, *options, "train.save_every=1", then=("train.steps=4",), then_layout=layout)


def _evaluated(data: str) -> Variant:
    options = (f"data.eval_path={{inputs}}/eval_{data}.jsonl", "train.eval_every=1", "train.export_every=1")
    return _variant("evaluated", *options)


_RESUMED = _resumed_in()
_ODD = _variant("odd batches", "train.global_batch_size=5", "train.micro_batch_tokens=37")
_BF16 = _variant("bf16", "train.dtype=bf16")
_IN_BACKWARD = _variant("optimizer in backward", "optimizer.in_backward=true")
_RECOMPUTED = _variant("recomputed layers", "train.recompute_layers=true")
_OVERLAPPED = _variant("overlapped communication", "train.overlap_communication=true")
_GLM = _variant("glm", "model.path={inputs}/glm")
_GLM4 = _variant("glm4", "model.path={inputs}/glm4")
_SCHEDULED = _variant(
    "warm-up, decay, clipping",
    "train.steps=3",
    "optimizer.warmup_steps=1",
    "optimizer.min_lr=1e-4",
    "optimizer.weight_decay=0.1",
    "optimizer.clip_grad=0.1",
    "optimizer.betas=[0.8, 0.9]",
)
_SAVED_OFTEN = _variant(
    "saved and exported often",
    "train.steps=3",
    "train.save_every=1",
    "train.keep_last=1",
    "train.keep_every=2",
    "train.export_every=1",
    "train.async_save=false",
)
_MANY_ANSWERS = ("train.global_batch_size=8", "generation.max_new_tokens=24", "generation.max_batch=8")
_REWARD_MODEL = ("reward.function=null", "reward.path={inputs}/reward")

_PPO = (
    (_RESUMED, "one", "tp2_pp2", "cp2_dp2"),
    (_resumed_in("tp2"), "pp2"),
    (
        _variant(
            "preempted and resumed",
            "train.steps=3",
            "reward.function=answer_rules:preempts_once",
            "reward.concurrency=0",
            "ppo.epochs=2",
            then=(),
        ),
        "one",
        "tp2",
    ),
    (_SAVED_OFTEN, "tp2"),
    (_ODD, "cp2_dp2", "tp2_pp2"),
    (_BF16, "tp2_pp2", "cp2_dp2"),
    (_IN_BACKWARD, "one", "tp2_pp2", "pp2_vpp2"),
    (_RECOMPUTED, "pp2", "tp2_sp_dp2"),
    (_SCHEDULED, "one"),
    (_GLM, "tp2", "tp4"),
    (_GLM4, "tp2_pp2", "cp2_dp2"),
    (
        _variant(
            "SFT term",
            "data.sft_path={inputs}/demonstrations.jsonl",
            "ppo.sft_coef=0.3",
            "train.sft_batch_size=3",
            "ppo.minibatches=2",
            shows=("actor/sft_loss",),
        ),
        "one",
        "tp2_pp2",
        "cp2_dp2",
        "pp2_vpp2",
    ),
    (_variant("reward model", *_REWARD_MODEL), "tp2", "pp2_vpp2"),
    (
        _variant(
            "reward model and functions",
            "reward.path={inputs}/reward",
            "reward.function=answer_rules:low_id_tokens + 0.5 * answer_rules:low_ids",
            "reward.function_weight=0.5",
            "reward.concurrency=0",
        ),
        "cp2_dp2",
    ),
    (
        _variant(
            "answers without a reward",
            "reward.function=answer_rules:fails_on_some",
            "reward.on_error=mask",
            shows=("reward/num_excluded",),
        ),
        "one",
        "tp2_pp2",
        "cp2_dp2",
    ),
    (
        _variant(
            "iteration skipped",
            "train.steps=3",
            "reward.function=answer_rules:overflows_once",
            "reward.concurrency=0",
            "ppo.reference_baseline=false",
            shows=("actor/is_step_skipped", "actor/grad_norm"),
        ),
        "one",
        "pp2",
    ),
    (_variant("generation at tp1", "generation.tp=1"), "tp2"),
    (_variant("generation at tp2", "generation.tp=2", "generation.pp=1"), "pp2"),
    (_variant("generation at tp4", "generation.tp=4", "generation.pp=1"), "tp2_pp2"),
    (
        _variant("little cache", *_MANY_ANSWERS, "generation.num_samples=3", "generation.cache_bytes=24KB"),
        "one",
        "pp2",
    ),
    (
        _variant("offload", *_REWARD_MODEL, "train.offload=[optimizers, reference, reward]"),
        "one",
        "pp2",
    ),
    (
        _variant("scoring overlapped", *_MANY_ANSWERS, "reward.path={inputs}/reward"),
        "pp2",
        "tp2_pp2",
    ),
    (
        _variant(
            "scoring not overlapped",
            *_MANY_ANSWERS,
            "reward.path={inputs}/reward",
            "ppo.overlap_scoring=false",
        ),
        "pp2",
    ),
    (
        _variant("epochs and mini-batches", "ppo.epochs=2", "ppo.minibatches=3", "ppo.whiten=true"),
        "one",
        "tp2_pp2",
        "tp2_sp_dp2",
        "pp2_vpp2",
    ),
    (_variant("no reference baseline", "ppo.reference_baseline=false"), "one", "pp2"),
    (
        _variant(
            "critic warm-up",
            "train.steps=3",
            "critic.warmup_iterations=1",
            "critic.path={inputs}/reward",
        ),
        "tp2",
        "tp2_pp2",
    ),
    (
        _variant(
            "adaptive KL",
            "train.steps=3",
            "ppo.kl_target=0.01",
            "ppo.kl_horizon=50",
            "ppo.kl_estimator=k3",
            "reference.path={inputs}/other",
            shows=("objective/kl",),
        ),
        "one",
        "cp2_dp2",
    ),
    (
        _variant(
            "entropy bonus, discount, no value clip",
            "ppo.entropy_coef=0.01",
            "ppo.gamma=0.99",
            "ppo.lam=0.9",
            "ppo.value_clip=null",
            "ppo.clip=0.1",
            "ppo.kl_estimator=k2",
        ),
        "tp2",
    ),
    (
        _variant(
            "update stopped early",
            "ppo.epochs=3",
            "ppo.max_kl=1e-6",
            shows=("actor/stopped_early",),
        ),
        "one",
        "tp2_sp_dp2",
    ),
    (
        _variant(
            "temperature, top-k, top-p",
            "generation.temperature=0.7",
            "generation.top_k=40",
            "generation.top_p=0.9",
            "generation.seed=5",
            "generation.max_step_tokens=16",
            "generation.max_batch=3",
        ),
        "tp2",
        "pp2",
    ),
    (_variant("old logprobs of a pass", "ppo.max_logprob_gap=0"), "tp2_sp_dp2"),
    (_variant("traced, with samples", "observe.trace=true", "train.sample_every=1"), "pp2"),
    (
        _variant(
            "evaluated",
            "train.steps=3",
            "evaluate.every=1",
            "evaluate.path={inputs}/eval_prompts.jsonl",
            "evaluate.num_samples=2",
            "evaluate.pass_k=[1, 2]",
            "evaluate.pass_reward=0.5",
            "train.export_every=1",
            shows=("eval/reward",),
        ),
        "one",
        "tp2_pp2",
    ),
)

_SFT = (
    (_RESUMED, "one", "tp2_sp_dp2", "pp2_vpp2"),
    (_resumed_in("pp2"), "tp2"),
    (_resumed_in(None, "optimizer.in_backward=true"), "tp2"),
    (_SAVED_OFTEN, "cp2_dp2"),
    (_ODD, "cp2_dp2", "tp2_sp_dp2"),
    (_BF16, "tp2_pp2", "tp2_sp_dp2", "pp2_vpp2"),
    (_IN_BACKWARD, "tp2_sp_dp2", "pp2_vpp2"),
    (_RECOMPUTED, "tp2", "pp2_vpp2"),
    (_SCHEDULED, "tp2_pp2"),
    (_GLM, "pp2"),
    (_GLM4, "tp2_sp_dp2", "tp4"),
    (_OVERLAPPED, "cp2_dp2", "tp2_sp_dp2"),
    (_evaluated("demonstrations"), "one", "tp2_pp2"),
    (
        _variant(
            "answers cut, bad records skipped",
            "data.max_tokens=12",
            "data.max_prompt_tokens=8",
            "data.truncates=true",
            "data.on_error=skip",
        ),
        "one",
    ),
)

_REWARD = (
    (_RESUMED, "tp2"),
    (_resumed_in("cp2_dp2"), "one"),
    (_ODD, "cp2_dp2"),
    (_BF16, "tp2_pp2"),
    (_IN_BACKWARD, "cp2_dp2"),
    (_RECOMPUTED, "tp2_pp2"),
    (_GLM, "tp2_pp2"),
    (_GLM4, "pp2"),
    (_OVERLAPPED, "tp2_sp_dp2"),
    (_evaluated("pairs"), "pp2"),
    (_variant("from a reward model, no L2 term", "model.path={inputs}/reward", "reward.l2_coef=0"), "one"),
    (
        _variant(
            "balanced lengths",
            "data.balances_lengths=true",
            "data.length_edges=[4, 16]",
            "data.drops_repeats=true",
            "train.global_batch_size=2",
        ),
        "one",
    ),
)

_DPO = (
    (_RESUMED, "pp2", "tp2_sp_dp2"),
    (_resumed_in("tp4"), "tp2"),
    (_ODD, "tp2_sp_dp2"),
    (_BF16, "tp2", "pp2_vpp2"),
    (_IN_BACKWARD, "pp2"),
    (_RECOMPUTED, "cp2_dp2"),
    (_GLM, "one"),
    (_GLM4, "tp2"),
    (_OVERLAPPED, "cp2_dp2"),
    (_evaluated("pairs"), "tp2_pp2"),
    (
        _variant(
            "another reference, smoothed labels, token weights",
            "reference.path={inputs}/other",
            "dpo.beta=0.3",
            "dpo.label_smoothing=0.1",
            "dpo.length_normalised=true",
            "dpo.token_discount=0.9",
        ),
        "one",
        "cp2_dp2",
    ),
)

VARIANTS = {"ppo": _PPO, "sft": _SFT, "reward": _REWARD, "dpo": _DPO}
"""Of each command: (variant, names of its layouts)."""
