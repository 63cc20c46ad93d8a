"""The report of the run on real input: sizes, times, metrics, samples and checks."""

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch

from glm_rlhf.engine.bench.machine import description
from glm_rlhf.engine.bench.report import facts as machine_facts
from glm_rlhf.engine.bench.report import number, table, write_files

_COLUMNS = {
    "reward, minus baseline": "reward/minus_baseline/mean",
    "sd": "reward/minus_baseline/std",
    "KL, nats an answer": "objective/kl",
    "ppo_kl, first step": "actor/first_ppo_kl",
    "ppo_kl": "actor/ppo_kl",
    "clipfrac": "actor/pg_clipfrac",
    "entropy": "actor/entropy",
    "logprob gap": "rollout/logprob_gap",
    "prompt tokens": "prompt_length/mean",
    "answer tokens": "response_length/mean",
    "cut": "response_length/cut_fraction",
    "vf_loss": "critic/vf_loss",
    "vf_explained_var": "critic/vf_explained_var",
    "idle": "perf/idle_fraction",
    "generate s": "timing_s/generate",
    "experience s": "timing_s/experience",
    "update s": "timing_s/update",
    "iteration s": "timing_s/iteration",
}
_NUM_SHOWN = 3
_CHINESE = re.compile(r"[\u4e00-\u9fff]")


def write_report(facts: Mapping, stem: Path) -> None:
    """Write `<stem>.md` for people and `<stem>.json` with every number."""
    machine = description(torch.device("cpu"), has_cuda_columns=False)
    shown = {name: _questions(part) for name, part in facts["samples"].items()}
    write_files(stem, as_markdown(facts, machine), {**facts, "samples": shown, "machine": machine})


def as_markdown(facts: Mapping, machine: Mapping[str, str]) -> str:
    """Return the report."""
    checks, config, records = facts["checks"], facts["model"]["config"], facts["records"]
    num_held = sum(check["holds"] for check in checks)
    loss, evaluations = facts["sft"]["loss"], facts["reward"]
    accuracy = " → ".join(f"{one['eval/accuracy']:.3f}" for one in evaluations)
    lines = [
        "# The pipeline on real input",
        "",
        f"{num_held} of {len(checks)} claims hold.",
        "",
        f"- command: `{facts['command']}`; the commands `sft`, `reward` and `ppo` each run under torchrun, "
        f"{facts['layout']}",
        f"- model: a folder in ChatGLM3-6B's published form (config, tokenizer, names, fp16 `.bin` pieces), "
        f"narrow: {config['num_layers']} layers, width {config['hidden_size']}, "
        f"{config['multi_query_group_num']} KV groups, {config['padded_vocab_size']} rows, "
        f"{facts['model']['weights']} weights, which begin at random. It says nothing about the quality of a "
        "large model's answers",
        f"- data: {records['demonstrations']} demonstrations and {records['pairs']} pairs of hh-rlhf, "
        f"{records['held_out']} pairs held out, {records['prompts']} prompts ({records['questions']} of them "
        f"AlignBench's questions), of which {records['prompts_short_enough']} are short enough",
        f"- SFT: loss {loss[0]:.2f} → {loss[-1]:.2f} nats per token in {len(loss)} steps",
        f"- reward model: accuracy on held-out pairs {accuracy}; an untrained one is at 0.5",
        *machine_facts(machine),
        "",
        *table(("claim", "measured", "holds"), [_cells(check) for check in checks]),
        "",
        "## PPO, by iteration",
        "",
        *table(("iteration", *_COLUMNS), list(_iterations(facts["metrics"]))),
        "",
        "## Seconds",
        "",
        *table(tuple(facts["seconds"]), [tuple(number(value) for value in facts["seconds"].values())]),
        "",
        "Each command's seconds have the start of its ranks in them. `idle` is the share of an iteration in "
        "which a rank waits in torch.distributed, here four ranks on the machine's cores.",
        "",
        "## Samples",
        "",
        f"The first {_NUM_SHOWN} answers to AlignBench's questions in the first iteration's samples, and to "
        "the same prompts after the last.",
    ]
    for before, after in zip(*(_questions(part) for part in facts["samples"].values()), strict=True):
        lines += ["", f"- prompt: {_in_line(before['prompt'])}"]
        for name, one in (("before", before), ("after", after)):
            lines.append(f"  - {name} (reward {one['reward']:.3f}): {_in_line(one['text'])}")
    return "\n".join(lines) + "\n"


def _questions(samples: Sequence[Mapping]) -> list[Mapping]:
    return [one for one in samples if _CHINESE.search(one["prompt"])][:_NUM_SHOWN]


def _iterations(metrics: Sequence[Mapping]) -> Iterator[tuple[str, ...]]:
    for one in metrics:
        values = (one.get(name) for name in _COLUMNS.values())
        yield (str(one["step"]), *("" if value is None else f"{value:.3g}" for value in values))


def _cells(check: Mapping) -> tuple[str, ...]:
    return check["claim"], check["figure"], "yes" if check["holds"] else "NO"


def _in_line(text: str) -> str:
    return "`" + " ".join(text.replace("`", "'").split())[:240] + "`"
