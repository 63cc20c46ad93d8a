"""The command `plan`: fitting layouts for the published models, files that run, refusals that help."""

import json
import re
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_models import save_folder

from glm_rlhf.engine.build.models import layout_of
from glm_rlhf.engine.cli import main
from glm_rlhf.engine.config.load import load_config
from glm_rlhf.engine.config.plan import PlanConfig
from glm_rlhf.engine.config.rl import PPOConfig
from glm_rlhf.engine.cost.memory import fullest_rank
from glm_rlhf.engine.plan.command import cluster_of, limits_of, roles_of, run, work_of
from glm_rlhf.engine.plan.search import Limits, NoFit, search
from glm_rlhf.parallel.inference.kv_cache import num_pages_within


def plan_config(tmp_path: Path, *overrides: str) -> PlanConfig:
    return load_config(PlanConfig, None, [f"run.output={tmp_path}", *overrides])


def plans_of(config: PlanConfig):
    return search(
        roles_of(config),
        work_of(config),
        cluster_of(config),
        limits=limits_of(config),
        has_baseline=config.ppo.reference_baseline,
        count=config.plan.alternatives,
    )


@pytest.mark.parametrize(
    ("model", "num_gpus"),
    [
        ("chatglm3-6b", 8),
        ("glm-4-9b", 8),
        ("glm-4-9b", 64),
        ("glm-4-0414-32b", 64),
        ("glm-4-0414-32b", 512),
    ],
)
def test_a_published_model_gets_a_plan_that_fits_in_seconds(tmp_path, capsys, model, num_gpus):
    config = plan_config(tmp_path, f"model.path={model}", f"cluster.gpus={num_gpus}")
    start = time.process_time()
    run(config)
    # Of processor time, since others may use the machine; importing torch takes another two.
    assert time.process_time() - start < 3.0
    text = capsys.readouterr().out
    assert "fastest that fits" in text
    assert "assumed from public peak figures, not measured" in text
    for plan in plans_of(config):
        assert plan.peak_bytes <= 0.9 * 80e9
        layout = plan.choice.layout
        layout.check_model(roles_of(config).policy)
        assert config.train.global_batch_size >= layout.dp(num_gpus)
    assert f"{num_gpus * 2} " in text


def test_the_written_config_is_one_that_ppo_accepts(tmp_path):
    config = plan_config(
        tmp_path, "model.path=glm-4-9b", "cluster.gpus=64", "reward.path=/models/rm", "data.path=p.jsonl"
    )
    with pytest.raises(ValueError, match="/models/rm"):
        run(config)
    options = ("model.path=glm-4-9b", "cluster.gpus=64", "reward.function=rules:judge", "data.path=p.jsonl")
    config = plan_config(tmp_path, *options, "train.offload=[optimizers]")
    run(config)
    best = plans_of(config)[0]
    written = load_config(PPOConfig, tmp_path / "ppo.yaml")
    assert layout_of(written.parallel) == best.choice.layout
    assert written.train.micro_batch_tokens == best.choice.micro_batch_tokens
    assert written.train.recompute_layers == best.choice.recompute_layers
    assert written.generation.max_batch == best.max_batch
    assert written.generation.cache_bytes == best.cache_bytes
    assert written.train.offload == ("optimizers",)
    assert written.reward.path is None
    assert written.data.path == "p.jsonl"
    for name in ("torchrun.sh", "slurm.sbatch"):
        script = (tmp_path / name).read_text()
        assert f"-m glm_rlhf.engine ppo {tmp_path}/ppo.yaml" in script
        assert "--nnodes=8" in script
        assert "--nproc-per-node=8" in script
        subprocess.run(["bash", "-n", str(tmp_path / name)], check=True)


@pytest.mark.parametrize(("disk", "seconds"), [("1GB", 320), ("10GB", 90), ("1MB", 65535)])
def test_a_job_is_signalled_early_enough_for_a_save(tmp_path, disk, seconds):
    config = plan_config(tmp_path, "model.path=glm-4-9b", "cluster.gpus=64", f"cluster.disk={disk}")
    run(config)
    estimate = plans_of(config)[0].estimate.phases
    longest = max(
        estimate["score"].seconds, estimate["train policy"].seconds + estimate["train critic"].seconds
    )
    needed = longest + 60 + 255e9 / config.cluster.disk  # 2 × 9 B parameters of 14 bytes
    assert min(needed, 65535) <= seconds < needed + 10
    lines = (tmp_path / "slurm.sbatch").read_text().splitlines()
    assert f"#SBATCH --signal=TERM@{seconds}" in lines
    assert lines.index(f"#SBATCH --signal=TERM@{seconds}") < lines.index("set -euo pipefail")
    for name in ("slurm.sbatch", "torchrun.sh"):
        export = f'export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${{TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-{seconds}}}"'
        assert export in (tmp_path / name).read_text().splitlines()


def test_one_node_needs_no_rendezvous_address(tmp_path):
    run(plan_config(tmp_path, "model.path=chatglm3-6b", "cluster.gpus=4"))
    assert "--standalone --nproc-per-node=4" in (tmp_path / "torchrun.sh").read_text()


def test_fixed_sizes_are_kept(tmp_path):
    config = plan_config(
        tmp_path,
        "model.path=chatglm3-6b",
        "parallel.tp=4",
        "parallel.pp=2",
        "train.recompute_layers=true",
        "train.micro_batch_tokens=3000",
    )
    (best, *others) = plans_of(config)
    assert (best.choice.layout.tp, best.choice.layout.pp) == (4, 2)
    assert best.choice.recompute_layers
    assert best.choice.micro_batch_tokens == 3000
    assert not others


def test_a_model_that_does_not_fit_is_refused_with_changes_that_help(tmp_path, capsys):
    arguments = ["plan", "model.path=glm-4-0414-32b", "cluster.gpus=8", f"run.output={tmp_path}"]
    assert main(arguments) == 2
    message = capsys.readouterr().err
    assert "no layout fits 8 GPUs with 72.0 GB" in message
    assert "32 GPUs" in message
    assert not (tmp_path / "ppo.yaml").exists()
    assert main([*arguments, "cluster.gpus=32"]) == 0
    assert main([*arguments, "cluster.gpus=16"]) == 2


def test_more_memory_is_advised_only_where_it_is_enough(tmp_path):
    config = plan_config(tmp_path, "model.path=glm-4-0414-32b", "cluster.gpus=16")
    with pytest.raises(NoFit, match=r"h200 \(141\.0 GB each\)"):
        plans_of(config)
    larger = replace(cluster_of(config), usable_bytes=int(0.9 * 141e9))
    assert search(roles_of(config), work_of(config), larger, limits=Limits(), has_baseline=False, count=1)


def test_the_cache_counts_the_reference_that_answers_too(tmp_path):
    """Its pages are those of the engine's own arithmetic for the larger of the two models."""
    config = plan_config(tmp_path, "model.path=chatglm3-6b", "reference.path=glm-4-9b", "cluster.gpus=64")
    (plan, *_) = plans_of(config)
    larger = roles_of(config).reference
    options = {"page_size": 16, "dtype": torch.bfloat16}
    pages = num_pages_within(plan.cache_bytes, larger, plan.choice.layout, **options)
    assert pages == plan.max_batch * (2048 // 16 + 1)
    assert num_pages_within(plan.cache_bytes - 1, larger, plan.choice.layout, **options) == pages - 1


def test_an_impossible_layout_is_refused(tmp_path):
    with pytest.raises(NoFit, match=r"parallel\.tp 3"):
        plans_of(plan_config(tmp_path, "model.path=chatglm3-6b", "parallel.tp=3"))
    many = ["cluster.gpus=61", "cluster.per_node=61", "train.global_batch_size=1"]
    with pytest.raises(NoFit, match="give more prompts"):
        plans_of(plan_config(tmp_path, "model.path=chatglm3-6b", *many))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.path=chatglm3-6", "chatglm3-6b"),
        ("cluster.gpus=12", "a multiple of 8"),
        ("data.mean_prompt_tokens=2000", "above the longest"),
        ("generation.max_new_tokens=8000", "context is 8192"),
        ("cluster.rates=nowhere.json", "nowhere.json"),
    ],
)
def test_an_error_of_the_user_is_named(tmp_path, capsys, override, message):
    assert main(["plan", "model.path=chatglm3-6b", f"run.output={tmp_path}", override]) == 2
    assert message in capsys.readouterr().err


def test_a_folder_gives_the_shape(tmp_path):
    folder = save_folder(tmp_path / "model", "glm")
    config = plan_config(
        tmp_path / "run",
        f"model.path={folder}",
        "data.max_prompt_tokens=64",
        "generation.max_new_tokens=64",
        "train.global_batch_size=8",
    )
    assert (
        roles_of(config).policy.num_layers
        == json.loads((folder / "config.json").read_text())["num_hidden_layers"]
    )
    run(config)
    assert load_config(PPOConfig, tmp_path / "run" / "ppo.yaml").model.path == str(folder)


def test_every_saving_saves(tmp_path):
    """Each axis, and running layers again, takes less memory: a sign that is wrong would turn one around."""
    config = plan_config(tmp_path, "model.path=glm-4-9b", "cluster.gpus=64")
    (plan, *_) = plans_of(config)

    def peak(**changes) -> int:
        choice = replace(plan.choice, **changes)
        return fullest_rank(roles_of(config), work_of(config), choice, num_gpus=64).peak

    layout = replace(plan.choice.layout, tp=2, pp=2)
    base = peak(layout=layout)
    assert peak(layout=replace(layout, tp=4)) < base
    assert peak(layout=replace(layout, pp=4)) < base
    assert peak(layout=layout, recompute_layers=True) < base
    assert peak(layout=layout, micro_batch_tokens=2048) < base
    assert peak(layout=replace(layout, sequence_parallel=False)) > base


@pytest.mark.parametrize(
    "options, sentence",
    [
        (
            ["model.path=chatglm3"],
            "neither .* name, the nearest of which is chatglm3-6b: presets",
        ),
        (["model.path=nope"], "nope is neither a folder nor a preset's name: presets are chatglm2-6b"),
        (["model.path=tiny-glm", "cluster.memory=80"], "cluster.memory is 80 bytes.*unit, such as 80GB"),
    ],
)
def test_a_misspelt_value_is_named(tmp_path, capsys, options, sentence):
    assert main(["plan", f"run.output={tmp_path}", *options]) == 2
    assert re.search(sentence, capsys.readouterr().err.splitlines()[-1])
