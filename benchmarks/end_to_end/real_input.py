"""The whole pipeline on real input: SFT, a reward model and PPO under torchrun at tp 2 × pp 2.

python -m benchmarks.end_to_end.real_input [--iterations 10] [--folder outputs/real_input]

Real are the tokenizer, config and names of ChatGLM3-6B, the pairs and dialogues of hh-rlhf, the questions of
AlignBench. The model is narrow and starts at random. The folder must not exist.
"""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from benchmarks.end_to_end.checks import MAX_TRANSFORMERS_GAP, Check, check_metrics, check_samples
from benchmarks.end_to_end.files import RecordFiles, write_narrow_chatglm3, write_records
from benchmarks.end_to_end.report import write_report
from benchmarks.harness.command import parse
from glm_rlhf.engine.bench.machine import ROOT
from glm_rlhf.engine.data.tokenizer.load import load_tokenizer

DATA = ROOT.parent / "shared" / "data"
SEED = 1234
NUM_RANKS = 4
LAYOUT = ("parallel.tp=2", "parallel.pp=2")
MAX_NEW_TOKENS = 32
MAX_PROMPT_TOKENS = 192
SFT = (
    "train.steps=40",
    "train.global_batch_size=16",
    "data.max_tokens=160",
    "data.truncates=true",
    f"data.max_prompt_tokens={MAX_PROMPT_TOKENS // 2}",
    "optimizer.lr=5e-3",
    "optimizer.warmup_steps=5",
)
REWARD = (
    "train.steps=40",
    "train.global_batch_size=16",
    "data.form=hh-rlhf",
    "data.max_tokens=256",
    f"data.max_prompt_tokens={MAX_PROMPT_TOKENS}",
    "optimizer.lr=1e-3",
    "optimizer.warmup_steps=5",
)
PPO = (
    "train.global_batch_size=16",
    "train.sample_every=1",
    f"data.max_prompt_tokens={MAX_PROMPT_TOKENS}",
    f"generation.max_new_tokens={MAX_NEW_TOKENS}",
    "generation.max_batch=32",
    "ppo.epochs=2",
    "ppo.minibatches=2",
    "ppo.whiten=true",
    "ppo.value_clip=null",
    "optimizer.lr=3e-4",
    "critic.lr=1e-3",
    "observe.trace=true",
)
SKIPS = ("data.on_error=skip",)
"""Records that are too long are excluded and counted."""
ALL = ("train.dtype=fp32", "train.micro_batch_tokens=2048", f"run.seed={SEED}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, check and report; return the exit status: 1 where a claim does not hold, 0 without real data."""
    options = parse(
        arguments,
        doc=__doc__,
        options={
            "iterations": (10, "of PPO"),
            "folder": (Path("outputs/real_input"), "new; of the runs"),
        },
        out="real_input_cpu",
    )
    if not DATA.is_dir():
        print(f"skipped: the real data are not beside the checkout, in ../{DATA.relative_to(ROOT.parent)}")
        return 0
    if options.folder.exists():
        print(f"{options.folder} exists: remove it, or name another --folder", file=sys.stderr)
        return 2
    facts = run(options.folder.absolute(), options.iterations)
    write_report(facts, options.out)
    failed = [check["claim"] for check in facts["checks"] if not check["holds"]]
    print(f"{options.out}.md: {'not shown: ' + '; '.join(failed) if failed else 'every claim holds'}")
    return 1 if failed else 0


def run(folder: Path, iterations: int) -> dict:
    """Return the contents of the report, after running every command in `folder`."""
    begin = time.monotonic()
    random_model = folder / "chatglm3"
    num_weights = write_narrow_chatglm3(random_model, DATA / "chatglm3", seed=SEED)
    files = write_records(folder / "data", DATA, seed=SEED)
    seconds, said = {"files": time.monotonic() - begin}, {}

    def launch(name: str, *options: str, ranks: int = NUM_RANKS) -> Path:
        layout = LAYOUT if ranks > 1 else ()
        start = time.monotonic()
        said[name] = _command(name, f"run.output={folder / name}", *options, *layout, ranks=ranks)
        seconds[name] = time.monotonic() - start
        return folder / name

    sft = launch("sft", f"model.path={random_model}", f"data.path={files.demonstrations}", *SKIPS, *SFT, *ALL)
    policy = _last_checkpoint(sft)
    pairs = (f"data.path={files.pairs}", f"data.eval_path={files.held_out}")
    reward = launch("reward", f"model.path={policy}", *pairs, *SKIPS, *REWARD, *ALL)
    paths = (f"model.path={policy}", f"reward.path={_last_checkpoint(reward)}", f"data.path={files.prompts}")
    ppo = launch("ppo", *paths, f"train.steps={iterations}", *SKIPS, *PPO, *ALL)
    metrics, samples = read_lines(ppo / "metrics.jsonl"), _samples(ppo, iterations)
    never = load_tokenizer(random_model).unsampleable_ids(_num_rows(random_model)).tolist()
    checks = [
        *check_metrics(metrics, iterations=iterations, num_ids=never.count(False)),
        *check_samples(
            [one for part in samples.values() for one in part], never=never, max_new_tokens=MAX_NEW_TOKENS
        ),
        _check_page(ppo / "report.html"),
        *_check_export(_last_checkpoint(ppo), folder, samples["after"], launch),
    ]
    seconds["all"] = time.monotonic() - begin
    return {
        "command": f"python -m benchmarks.end_to_end.real_input --iterations {iterations}",
        "layout": f"{NUM_RANKS} gloo ranks, {' '.join(LAYOUT)}",
        "model": {"weights": num_weights, "config": _config(random_model)},
        "records": _records(files, said),
        "settings": {"sft": SFT, "reward": REWARD, "ppo": PPO, "all": ALL},
        "sft": {
            "loss": [one["actor/loss"] for one in read_lines(sft / "metrics.jsonl") if "actor/loss" in one]
        },
        "reward": _evaluations(read_lines(reward / "metrics.jsonl")),
        "metrics": metrics,
        "samples": {"before": samples["step_1"], "after": samples["after"]},
        "checks": [{"claim": one.claim, "figure": one.figure, "holds": one.holds} for one in checks],
        "seconds": seconds,
    }


def _command(name: str, *options: str, ranks: int) -> str:
    """Return the stderr of a command.

    Raises:
        RuntimeError: it ended with another status than 0.
    """
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] * (ranks > 1)
    command = [sys.executable, *launcher, "-m", "glm_rlhf.engine", name, *options]
    environment = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}: {done.stderr[-4000:]}")
    return done.stderr


def _check_page(path: Path) -> Check:
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    return Check(
        claim="report.html holds curves, phase times and samples",
        figure=f"{len(text)} characters, {text.count('<svg')} charts",
        holds="<h2>Samples</h2>" in text and text.count("<svg") > 10,
    )


def _check_export(exported: Path, folder: Path, samples: Sequence[Mapping], launch) -> list[Check]:
    """Load the exported folder again, with our loader and, in its GLM form, with transformers.

    ChatGLM3's own class is remote code, which is not part of these data; `convert` gives the same weights
    the names of `GlmForCausalLM`.
    """
    from transformers import GlmForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    asked = folder / "data" / "answers.jsonl"
    lines = [{"prompt_tokens": one["prompt_tokens"], "response_tokens": one["tokens"]} for one in samples]
    asked.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    scored = launch("score", f"model.path={exported}", f"data.path={asked}", "train.dtype=fp32", ranks=1)
    launch("convert", f"model.path={exported}", f"convert.to={folder / 'glm'}", "convert.format=glm", ranks=1)
    model = GlmForCausalLM.from_pretrained(folder / "glm", dtype=torch.float32).eval()
    gaps = []
    for line, score in zip(lines, read_lines(scored / "score.jsonl"), strict=True):
        ids = torch.tensor([line["prompt_tokens"] + line["response_tokens"]])
        with torch.no_grad():
            logprobs = model(ids).logits[0].float().log_softmax(-1)
        expected = logprobs[:-1].gather(1, ids[0, 1:, None])[len(line["prompt_tokens"]) - 1 :, 0]
        gaps.append((expected - torch.tensor(score["logprobs"])).abs().max().item())
    names = ("tokenizer.model", "tokenizer_config.json")
    same = [(exported / name).read_bytes() == (DATA / "chatglm3" / name).read_bytes() for name in names]
    before, after = _config(folder / "chatglm3"), _config(exported)
    changed = sorted(key for key in before if before[key] != after.get(key))
    return [
        Check(
            claim="the export has ChatGLM3's tokenizer, byte for byte, and config, its precision apart",
            figure=f"{sum(same)} of {len(same)} files; config differs in {', '.join(changed) or 'nothing'}",
            holds=all(same) and set(changed) <= {"torch_dtype"},
        ),
        Check(
            claim=f"transformers' logprobs of {len(gaps)} answers are within {MAX_TRANSFORMERS_GAP:g} of "
            "those of `score` on the export",
            figure=f"{max(gaps):.2g} at most",
            holds=max(gaps) <= MAX_TRANSFORMERS_GAP,
        ),
    ]


def _samples(ppo: Path, iterations: int) -> dict[str, list[dict]]:
    names = [*(f"step_{step}" for step in range(1, iterations + 1)), "after"]
    return {name: read_lines(ppo / "samples" / f"{name}.jsonl") for name in names}


def _records(files: RecordFiles, said: Mapping[str, str]) -> dict[str, int | None]:
    """Return how many records each file has, and how many prompts were short enough."""
    left = re.search(r"bad prompts skipped, (\d+) left", said["ppo"])
    return files.counts | {"prompts_short_enough": int(left[1]) if left else files.counts["prompts"]}


def _evaluations(lines: Sequence[Mapping]) -> list[dict]:
    return [
        {name: value for name, value in one.items() if name == "step" or name.startswith("eval/")}
        for one in lines
        if any(name.startswith("eval/") for name in one)
    ]


def _last_checkpoint(folder: Path) -> Path:
    return max((folder / "hf").glob("step_*"), key=lambda path: int(path.name[5:]))


def _config(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text(encoding="utf-8"))


def _num_rows(folder: Path) -> int:
    return _config(folder)["padded_vocab_size"]


def read_lines(path: Path) -> list[dict]:
    """Return JSON lines."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


if __name__ == "__main__":
    sys.exit(main())
