"""`PPOEngine`: another layout for generation, stop texts, prompts that cannot be answered."""

import itertools
from pathlib import Path

import pytest
import torch
from tiny_models import make_model, save_folder

from glm_rlhf.engine import PPOConfig, PPOEngine

PROMPTS = [[5, 6, 7], [8, 9], [10, 11, 12, 13, 14, 15, 16], [14], [20, 21], [3, 3, 3]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return save_folder(tmp_path_factory.mktemp("model"), "glm", make_model("glm"))


def config_file(path: Path, folder: Path, *, parallel: str, generation: str, more: str = "") -> Path:
    path.write_text(
        f"model: {{path: {folder}}}\n"
        "data: {path: unused.jsonl}\n"
        "reward: {function: reward_rules:share_of_low_ids}\n"
        f"parallel: {{{parallel}}}\n"
        "train: {steps: 1, dtype: fp32}\n"
        "optimizer: {lr: 1.0e-3}\n"
        "ppo: {reference_baseline: true}\n"
        f"generation: {{max_new_tokens: 6, num_samples: 2, page_size: 4, {generation}}}\n" + more
    )
    return path


def drive(path: Path):
    """On each rank: answers and metrics of two iterations, and bytes of a second copy between them."""
    with PPOEngine(PPOConfig.from_yaml(path)) as engine:
        weights = [weight for chunk in engine.roles.models["policy"] for _, weight in chunk.named_weights()]
        addresses = [weight.data_ptr() for weight in weights]
        resharded = engine.roles.resharded
        answers, metrics, num_bytes = [], [], []
        for _ in range(2):
            rollouts = engine.generate(PROMPTS)
            assert [weight.data_ptr() for weight in weights] == addresses
            if resharded is not None:
                num_bytes.append(sum(t.untyped_storage().nbytes() for t in resharded._owned.values()))
            answers.append((rollouts.indices, rollouts.tokens_T.tolist()))
            metrics.append(engine.update(engine.make_experience(rollouts)))
        assert [weight.data_ptr() for weight in weights] == addresses
        return answers, metrics, num_bytes


@pytest.mark.parametrize(
    "parallel, generation",
    [
        ("tp: 2", "tp: 1, pp: 2"),
        ("pp: 2, tp: 2", "tp: 1, pp: 1"),
        pytest.param("cp: 2", "tp: 4", marks=pytest.mark.slow),
        pytest.param("pp: 4", "pp: 1", marks=pytest.mark.slow),
    ],
)
def test_another_layout_for_generation_changes_nothing_but_where_it_runs(
    ranks, folder, tmp_path, parallel, generation
):
    own = config_file(tmp_path / "own.yaml", folder, parallel=parallel, generation="temperature: 1.0")
    other = config_file(tmp_path / "other.yaml", folder, parallel=parallel, generation=generation)
    for (answers, metrics, none), (found, others, num_bytes) in zip(
        ranks.run(drive, own), ranks.run(drive, other), strict=True
    ):
        assert (none, num_bytes) == ([], [0, 0]), "the second copy lives while answers are drawn"
        # The same share of the same answers on every rank, before and after an update.
        assert found == answers
        for one, expected in zip(others, metrics, strict=True):
            assert one["rollout/logprob_gap"] < 1e-5
            for name in (name for name in one if not name.startswith(("timing_s/", "perf/"))):
                # Sums in another order.
                assert one[name] == pytest.approx(expected[name], rel=1e-4, abs=2e-5), name


def stopped(path: Path):
    """On each rank: ids of each answer, their text at every length, and whether it ended by itself."""
    with PPOEngine(PPOConfig.from_yaml(path)) as engine:
        rollouts = engine.generate([[30, 31, 32], [40, 41], [50]] * 4)
        answers = [rollouts.answer(index).tolist() for index in range(rollouts.num_sequences)]
        texts = [
            [engine.tokenizer.decode(answer[:end], unknown="replace") for end in range(len(answer) + 1)]
            for answer in answers
        ]
        return answers, texts, rollouts.is_finished


def test_stop_texts_end_answers_at_the_same_token_on_all_ranks(ranks, tmp_path):
    tokenizer = Path(__file__).parents[3] / "examples" / "tiny_tokenizer"
    model = save_folder(tmp_path / "model", "glm", make_model("glm", vocab_size=640))
    options = {"parallel": "tp: 2, pp: 2", "more": f"tokenizer: {{path: {tokenizer}}}\n"}
    path = config_file(tmp_path / "plain.yaml", model, generation="seed: 1", **options)
    whole, texts, _ = ranks.run(stopped, path)[0]
    stop = next(text[-1] for *_, text in texts if len(text) > 3)
    path = config_file(tmp_path / "stop.yaml", model, generation=f"seed: 1, stop: [{stop!r}]", **options)
    found = ranks.run(stopped, path)
    assert found == [found[0]] * 4
    num_cut = 0
    for tokens, short, (*before, last), is_finished in zip(whole, *found[0], strict=True):
        assert short == tokens[: len(short)], "the answer is the one without stop texts, perhaps shorter"
        assert not any(stop in text for text in before)
        if stop in last:
            assert is_finished
        num_cut += len(short) < len(tokens)
    assert num_cut > 0


@pytest.mark.parametrize(
    "prompts, sentence",
    [
        ([[5], []], "prompt 1 has 0 tokens"),
        ([[5] * 512, [5]], "prompt 0 has 512 tokens, it must have 1 to 511"),
        ([[5], "text"], "no tokenizer"),
        ([], "0 prompts"),
    ],
)
def test_prompts_that_cannot_be_answered_are_named(folder, tmp_path, prompts, sentence):
    path = config_file(tmp_path / "ppo.yaml", folder, parallel="tp: 1", generation="seed: 1")
    with PPOEngine(PPOConfig.from_yaml(path)) as engine:
        with pytest.raises(ValueError, match=sentence):
            engine.generate(prompts)
        # The engine is as good as before; 511 tokens leave room for one.
        rollouts = engine.generate([[5] * 511])
        assert rollouts.lengths == (512, 512)
        assert torch.isfinite(rollouts.logprobs_T).all()


@pytest.mark.parametrize("family", ["glm", "glm4"])
def test_a_reward_model_of_transformers_judges_and_starts_the_critic(tmp_path, capfd, family):
    policy = save_folder(tmp_path / "policy", family)
    model = make_model(family, has_score=True)
    reward = save_folder(tmp_path / "reward", family, model)
    path = config_file(tmp_path / "ppo.yaml", policy, parallel="tp: 1", generation="seed: 1")
    with PPOEngine(PPOConfig.from_yaml(path, ["reward.function=null", f"reward.path={reward}"])) as engine:
        assert "scalar head" not in capfd.readouterr().err
        rollouts = engine.generate(PROMPTS)
        rewards_B = engine.roles.rewards.without_baseline(rollouts).totals_B(rollouts.starts)
        experience = engine.make_experience(rollouts)
        for number, (start, end) in enumerate(itertools.pairwise(rollouts.starts)):
            with torch.no_grad():
                hidden_TD = model.model(rollouts.tokens_T[None, start:end]).last_hidden_state[0]
                scores_T = model.score(hidden_TD)[:, 0]
            # fp32: about as many roundings as layers. A token's value is the score of those before it.
            assert float(rewards_B[number]) == pytest.approx(float(scores_T[-1]), abs=2e-5)
            is_drawn = rollouts.action_mask_T[start + 1 : end]
            values_T = experience.values_T[start + 1 : end]
            assert torch.allclose(values_T[is_drawn], scores_T[:-1][is_drawn], atol=2e-5)


@pytest.mark.parametrize(
    "key, changes, sentence",
    [
        ("reward.path", {}, "reward.path is .*, which has no scalar head: give a reward model"),
        ("reward.path", {"vocab_size": 128, "has_score": True}, "path has 128 rows in its vocab"),
        ("critic.path", {"vocab_size": 128}, "critic.path has 128 rows in its vocabulary, model.path 96"),
        ("reference.path", {"vocab_size": 128}, "reference.path has 128 rows in its vocabulary"),
    ],
)
def test_models_that_do_not_belong_together_are_refused(folder, tmp_path, key, changes, sentence):
    other = save_folder(tmp_path / "other", "glm", make_model("glm", **changes))
    path = config_file(tmp_path / "ppo.yaml", folder, parallel="tp: 1", generation="seed: 1")
    with pytest.raises(ValueError, match=sentence):
        PPOEngine(PPOConfig.from_yaml(path, [f"{key}={other}"]))
