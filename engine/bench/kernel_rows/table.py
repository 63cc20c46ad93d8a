"""All rows at the shapes of 6B and 9B, and at small shapes that a CPU does in seconds."""

import torch

from glm_rlhf.engine.bench.kernel_rows import advantages, decode, layers, logits, optimizer, vocabulary_head
from glm_rlhf.engine.bench.kernel_rows.case import Case
from glm_rlhf.parallel.spec.presets import preset
from glm_rlhf.parallel.spec.weight_map import names_within, weights_of

NUM_TOKENS = 8192
MODELS = {"6B": "chatglm3-6b", "9B": "glm-4-9b"}
# Two copies of 6B's optimizer state do not fit one chip: each contender gets what one of 16 ranks holds.
OPTIMIZER_SHARE = 16
ADAM_TARGET_S = {"6B": 42e-3, "9B": 63e-3}


def full_cases() -> list[Case]:
    """Return the rows at full shapes in bf16."""
    bf16, both = torch.bfloat16, " ".join(MODELS)
    shapes = {model: preset(name) for model, name in MODELS.items()}
    first = next(iter(shapes.values()))
    vocabulary = {m: (NUM_TOKENS, s.vocab_size, s.hidden_size) for m, s in shapes.items()}
    return [
        *vocabulary_head.cases(vocabulary, bf16),
        *logits.cases({m: (NUM_TOKENS, s.vocab_size) for m, s in shapes.items()}, bf16),
        *advantages.cases({"c1": (64, 8192), "c2": (512, 4096)}, both),
        *optimizer.cases({m: (*_optimizer_share(m), ADAM_TARGET_S[m]) for m in shapes}),
        *layers.cases(NUM_TOKENS, first.hidden_size, first.ffn_size, bf16, both, has_targets=True),
        *decode.attention_cases(256, 2048, bf16, both),
        *decode.sampling_cases({m: (64, s.vocab_size, s.hidden_size) for m, s in shapes.items()}, bf16),
    ]


def small_cases() -> list[Case]:
    """Return the same rows in fp32 at shapes for a CPU; the head at two vocabularies, to show its memory."""
    fp32, small = torch.float32, "small"
    return [
        *vocabulary_head.cases({small: (512, 16384, 128)}, fp32),
        *(c for c in vocabulary_head.cases({"small, 2 V": (512, 32768, 128)}, fp32) if c.row == "a2"),
        *logits.cases({small: (512, 8192)}, fp32),
        *advantages.cases({"c1": (16, 512), "c2": (64, 256)}, small),
        *optimizer.cases({small: ([(1024, 1024), (2048, 1024), (1024,)], 0.0, None)}),
        *layers.cases(1024, 1024, 2736, fp32, small, has_targets=False),
        *decode.attention_cases(16, 512, fp32, small),
        *decode.sampling_cases({small: (64, 8192, 256)}, fp32),
    ]


def _optimizer_share(model: str) -> tuple[list[tuple[int, ...]], float]:
    """Return shapes whose elements are about 1 / OPTIMIZER_SHARE of the model, and the whole model's."""
    config = preset(MODELS[model])
    shapes = [
        shape
        for weight in weights_of(config, layers=range(config.num_layers), role="policy")
        for shape in names_within(weight, config).values()
    ]
    # Every tensor is there, with a share of its rows: a rank of the distributed optimizer holds many pieces.
    pieces = [(max(1, shape[0] // OPTIMIZER_SHARE), *shape[1:]) for shape in shapes]
    return pieces, float(sum(torch.Size(shape).numel() for shape in shapes))
