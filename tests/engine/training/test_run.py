"""What the training commands share: the optimizer in backward learns as the ordinary one."""

from pathlib import Path

import pytest
from tiny_models import save_folder
from training_curves import curve, largest_difference, run_main, write_demonstrations, write_pairs

STAGES = ("sft", "reward", "dpo")


def command(stage: str, folder: Path, data: Path, output: Path, *more: str) -> list[str]:
    return [
        stage,
        f"model.path={folder}",
        f"data.path={data}",
        f"run.output={output}",
        "observe.tensorboard=false",
        "train.dtype=fp32",
        "train.steps=2",
        "train.global_batch_size=6",
        "train.micro_batch_tokens=64",
        "optimizer.lr=1e-3",
        "optimizer.clip_grad=0",
        *more,
    ]


def run_commands(lines: list[list[str]]) -> list[tuple[int, str]]:
    return [run_main(line) for line in lines]


def test_every_stage_learns_in_backward_as_with_the_ordinary_optimizer(ranks, tmp_path):
    folder = save_folder(tmp_path / "model", "glm")
    demonstrations = write_demonstrations(tmp_path / "sft.jsonl", 8)
    pairs = write_pairs(tmp_path / "pairs.jsonl", 8)
    lines = []
    for stage in STAGES:
        data = demonstrations if stage == "sft" else pairs
        for way in (False, True):
            output = tmp_path / f"{stage} {way}"
            layout = ("parallel.tp=2", "parallel.pp=2") if stage == "sft" else ("parallel.tp=2",)
            lines.append(command(stage, folder, data, output, *layout, f"optimizer.in_backward={way}"))
    assert {code for answers in ranks.run(run_commands, lines) for code, _ in answers} == {0}
    for stage in STAGES:
        prefix = "reward" if stage == "reward" else "actor"
        for name in (f"{prefix}/loss", f"{prefix}/grad_norm"):
            ordinary, found = (curve(tmp_path / f"{stage} {way}", name) for way in (False, True))
            assert len(found) == 2
            # Sums in another order, then Adam, which divides small gradients by their own size.
            assert largest_difference(found, ordinary) <= 1e-4, (stage, name)


@pytest.mark.parametrize("stage", STAGES)
def test_two_ways_to_communicate_during_backward_are_refused(stage, tmp_path):
    options = ("optimizer.in_backward=true", "train.overlap_communication=true")
    code, said = run_main(command(stage, tmp_path, tmp_path / "data.jsonl", tmp_path, *options))
    assert code == 2
    assert "optimizer.in_backward and train.overlap_communication are both true" in said
