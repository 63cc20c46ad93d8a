"""Inputs of the run on real input: a narrow folder of ChatGLM3's form, and files of records."""

import gzip
import json
import random
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from glm_rlhf.engine.data.records.hh_rlhf import split_dialogue_pair
from glm_rlhf.engine.data.records.jsonl_writer import json_lines
from glm_rlhf.parallel.spec.weight_map import names_within, weights_of
from glm_rlhf.parallel.storage.hf_config import read_config

NARROW = {
    "num_layers": 4,
    "hidden_size": 64,
    "ffn_hidden_size": 192,
    "num_attention_heads": 4,
    "kv_channels": 16,
    "torch_dtype": "float16",
}
"""Differences from ChatGLM3-6B's config: the embedding keeps its 65024 rows, there are 2 KV groups."""
INIT_STD = 0.05
NUM_LEARNED, NUM_HELD_OUT = 1600, 200
"""Pairs that SFT and the reward model train on, and held-out pairs of the latter; the rest are prompts."""
_TOKENIZER_FILES = ("tokenizer.model", "tokenizer_config.json")
_INDEX = "pytorch_model.bin.index.json"
_ROTARY = "transformer.rotary_pos_emb.inv_freq"  # a buffer that the published files hold beside the weights


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordFiles:
    """JSON lines made of the real data; no dialogue is in two of pairs, held-out pairs and prompts."""

    demonstrations: Path
    """Dialogues and their chosen answers, of `pairs`."""
    pairs: Path
    """Lines of hh-rlhf that models train on."""
    held_out: Path
    """Lines of hh-rlhf that are held out."""
    prompts: Path
    """Dialogues of the remaining lines, and AlignBench's questions."""
    counts: dict[str, int]
    """Records of each file, by the field's name; `questions` are those prompts that are AlignBench's."""


def write_narrow_chatglm3(folder: Path, real: Path, *, seed: int) -> int:
    """Write a random model as ChatGLM3-6B is published, but narrow; return its number of weights.

    Config, tokenizer, names of weights, fp16 `.bin` pieces with an index: all as in `real`, the numbers of
    `NARROW` and the layers apart.
    """
    folder.mkdir(parents=True)
    config = json.loads((real / "config.json").read_text(encoding="utf-8")) | NARROW
    (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    for name in _TOKENIZER_FILES:
        shutil.copyfile(real / name, folder / name)
    published = json.loads((real / _INDEX).read_text(encoding="utf-8"))["weight_map"]
    tensors = _random_tensors(folder, seed)
    wanted = {name for name in published if _layer(name) < NARROW["num_layers"]}
    if wanted != tensors.keys():
        raise ValueError(f"{real / _INDEX} names other weights: {sorted(wanted ^ tensors.keys())[:4]}")
    names = list(tensors)
    weight_map = {}
    for number, piece in enumerate((names[::2], names[1::2]), start=1):
        file = f"pytorch_model-{number:05}-of-00002.bin"
        torch.save({name: tensors[name] for name in piece}, folder / file)
        weight_map |= dict.fromkeys(piece, file)
    (folder / _INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}), encoding="utf-8")
    return sum(tensor.numel() for name, tensor in tensors.items() if name != _ROTARY)


def write_records(folder: Path, data: Path, *, seed: int) -> RecordFiles:
    """Return files of records made of hh-rlhf and AlignBench in `data`."""
    with gzip.open(data / "hh-rlhf" / "harmless-base-test.jsonl.gz", "rt", encoding="utf-8") as file:
        lines = list(file)
    random.Random(seed).shuffle(lines)
    learned, held_out = lines[:NUM_LEARNED], lines[NUM_LEARNED : NUM_LEARNED + NUM_HELD_OUT]
    seen = {_prompt_of(line) for line in learned + held_out}
    rest = dict.fromkeys(map(_prompt_of, lines[NUM_LEARNED + NUM_HELD_OUT :]))
    dialogues = [prompt for prompt in rest if prompt not in seen]
    source = data / "alignbench" / "data_v1.1_release.jsonl"
    questions = [json.loads(line)["question"] for line in source.read_text(encoding="utf-8").splitlines()]
    demonstrations = [one for one in map(_demonstration, learned) if one["response"].strip()]
    folder.mkdir(parents=True)
    files = {name: folder / f"{name}.jsonl" for name in ("demonstrations", "pairs", "held_out", "prompts")}
    files["pairs"].write_text("".join(learned), encoding="utf-8")
    files["held_out"].write_text("".join(held_out), encoding="utf-8")
    _write(files["demonstrations"], demonstrations)
    prompts = [{"messages": _messages(prompt), "source": "hh-rlhf"} for prompt in dialogues]
    prompts += [{"prompt": question, "source": "AlignBench"} for question in questions]
    _write(files["prompts"], prompts)
    return RecordFiles(
        **files,
        counts={
            "pairs": len(learned),
            "held_out": len(held_out),
            "demonstrations": len(demonstrations),
            "prompts": len(prompts),
            "questions": len(questions),
        },
    )


def _random_tensors(folder: Path, seed: int) -> dict[str, torch.Tensor]:
    config = read_config(folder)
    generator = torch.Generator().manual_seed(seed)
    tensors = {_ROTARY: torch.ones(config.rotary_size // 2, dtype=torch.float16)}
    for weight in weights_of(config, layers=range(config.num_layers), role="policy"):
        for name, shape in names_within(weight, config).items():
            if name.endswith("norm.weight"):
                values = torch.ones(shape)
            elif name.endswith(".bias"):
                values = torch.zeros(shape)
            else:
                values = torch.randn(shape, generator=generator) * INIT_STD
            tensors[name] = values.half()
    return tensors


def _layer(name: str) -> int:
    """Return the layer that a weight is of, -1 for none."""
    _, found, rest = name.partition("encoder.layers.")
    return int(rest.partition(".")[0]) if found else -1


def _prompt_of(line: str) -> tuple[tuple[str, str], ...]:
    pair = json.loads(line)
    messages, _, _ = split_dialogue_pair(pair["chosen"], pair["rejected"])
    return tuple((message.role, message.content) for message in messages)


def _demonstration(line: str) -> dict:
    pair = json.loads(line)
    _, chosen, _ = split_dialogue_pair(pair["chosen"], pair["rejected"])
    return {"messages": _messages(_prompt_of(line)), "response": chosen}


def _messages(prompt: Iterable[tuple[str, str]]) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in prompt]


def _write(path: Path, records: Iterable[dict]) -> None:
    with json_lines(path) as write:
        for record in records:
            write(record)
