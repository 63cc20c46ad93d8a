"""Random small models in random layouts score and answer as transformers does, for a minute or longer."""

import json
import os
import random
import time

import pytest
import torch
from tiny_models import FAMILIES, make_model, reference_logprobs, save_folder

from glm_rlhf.engine.cli import main

BUDGET_S = float(os.environ.get("GLM_RLHF_SOAK_S", "60"))


def random_shape(dice: random.Random) -> dict:
    kv_heads = dice.choice([1, 2, 4])
    return {
        "num_key_value_heads": kv_heads,
        "num_attention_heads": kv_heads * dice.choice([4 // kv_heads if kv_heads < 4 else 1, 4]),
        "head_dim": dice.choice([4, 8, 12]),
        "hidden_size": dice.choice([24, 40, 64]),
        "intermediate_size": dice.choice([36, 60, 128]),
        "num_hidden_layers": dice.choice([4, 8]),
        "vocab_size": dice.choice([52, 96, 200]),
        "attention_bias": dice.random() < 0.7,
    }


def random_layout(dice: random.Random) -> dict:
    tp, pp, cp = dice.choice(
        [(1, 1, 1), (2, 1, 1), (4, 1, 1), (1, 2, 1), (1, 4, 1), (2, 2, 1), (1, 1, 2), (2, 1, 2)]
    )
    vpp = dice.choice([1, 2]) if pp == 2 else 1
    sequence_parallel = tp > 1 and dice.random() < 0.5
    return {"tp": tp, "pp": pp, "cp": cp, "vpp": vpp, "sequence_parallel": str(sequence_parallel).lower()}


def run_mains(lines: list[list[str]]) -> list[int]:
    return [main(line) for line in lines]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_random_models_in_random_layouts(ranks, tmp_path):
    start, num_cases = time.monotonic(), 0
    while time.monotonic() - start < BUDGET_S:
        check_case(ranks, tmp_path / str(num_cases), random.Random(num_cases))
        num_cases += 1
    print(f"{num_cases} random cases held in {time.monotonic() - start:.0f} s")
    assert num_cases > 5


def check_case(ranks, folder, dice: random.Random) -> None:
    family, shape, layout = dice.choice(FAMILIES), random_shape(dice), random_layout(dice)
    case = f"{family} {shape} {layout}"
    model = make_model(family, seed=dice.randrange(10**6), **shape)
    save_folder(folder / "model", family, model)
    ids = [
        [dice.randrange(3, shape["vocab_size"]) for _ in range(dice.randint(1, 40))]
        for _ in range(dice.randint(1, 12))
    ]
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt_tokens": p}) + "\n" for p in ids))
    demonstrations = [{"prompt_tokens": p, "response_tokens": p[::-1]} for p in ids]
    (folder / "demonstrations.jsonl").write_text("".join(json.dumps(d) + "\n" for d in demonstrations))
    axes = [f"parallel.{axis}={size}" for axis, size in layout.items()]
    common = [f"model.path={folder / 'model'}", f"run.output={folder}", "train.dtype=fp32", *axes]
    lines = [
        ["score", f"data.path={folder / 'demonstrations.jsonl'}", "train.micro_batch_tokens=48", *common],
        [
            "generate",
            f"data.path={folder / 'prompts.jsonl'}",
            "generation.temperature=0",
            "generation.max_new_tokens=6",
            "generation.page_size=4",
            f"generation.max_batch={dice.randint(4, 9)}",
            f"generation.max_step_tokens={dice.randint(9, 60)}",
            *common,
        ],
    ]
    assert ranks.run(run_mains, lines) == [[0, 0]] * 4, case
    with torch.no_grad():
        expected = reference_logprobs(model, [torch.tensor(p + p[::-1]) for p in ids])
    for line, prompt, logprobs in zip(read(folder / "score.jsonl"), ids, expected, strict=True):
        assert line["logprobs"] == pytest.approx(logprobs[len(prompt) :].tolist(), abs=1e-4), case
    for line, prompt in zip(read(folder / "generate.jsonl"), ids, strict=True):
        check_greedy(model, prompt, line["tokens"], case)


def check_greedy(model, prompt: list[int], tokens: list[int], case: str) -> None:
    """Each token is the most likely one given those before it; or as likely, to fp32 rounding."""
    with torch.no_grad():
        logits = model(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1]
    for token, row in zip(tokens, logits, strict=True):
        assert row[token] >= row.max() - 1e-4, case
    assert len(tokens) == 6 or tokens[-1] == 2, case


def read(path) -> list[dict]:
    return [json.loads(line) for line in path.open()]
