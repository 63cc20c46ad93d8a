"""How large the models of rows j to n are, what fits beside them, and the least time of a decode step."""

from dataclasses import dataclass, replace

import torch

from glm_rlhf.engine.bench.machine import MachineRates
from glm_rlhf.engine.bench.sizes import SMALL
from glm_rlhf.engine.cost.activations import RankMicroBatch
from glm_rlhf.engine.cost.pass_time import layer_matrix_elements
from glm_rlhf.parallel.model.glm import GLMModel
from glm_rlhf.parallel.spec.layout import Layout
from glm_rlhf.parallel.spec.model_config import GLMConfig
from glm_rlhf.parallel.spec.presets import preset

PRESETS = {"6B": "chatglm3-6b", "9B": "glm-4-9b"}
SMALL_NAME = "small"
_SHARE_OF_FREE_MEMORY = 0.8
_TRAINED_BYTES, _STEP_BYTES, _FROZEN_BYTES = 18, 8, 2
"""Per weight: bf16 with fp32 gradient, master, Adam moments; temporaries of torch's AdamW; bf16 alone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSizes:
    """One model and what is asked of it."""

    name: str
    """`6B`, `9B` or `small`."""
    model: GLMConfig
    """Shape of the whole model."""
    dtype: torch.dtype
    """Of weights and activations."""
    batches: tuple[int, ...]
    """Sequences of row l, a row per number."""
    context: int
    """Positions that a decode step sees, on average over the steps."""
    new_tokens: int
    """Steps of a sequence; prompts are half as many shorter than `context`."""
    step_tokens: int
    """Tokens of a prefill step."""
    sequence: int
    """Tokens of a training sequence, row m."""
    num_sequences: int
    """Of a micro-batch."""
    num_prompts: int
    """Of PPO's iteration, row n."""
    prompt_tokens: int
    """Of each."""
    answer_tokens: int
    """Of each answer."""
    targets_s: dict[tuple[str, int], float]
    """Seconds of a decode step that are aimed at, by row and batch; empty where nothing is judged."""
    page_size: int = 16
    """Positions per page of the cache, the engine's default."""

    @property
    def prompt_of_decode(self) -> int:
        """Tokens of a prompt of rows k and l: decoding begins so far below `context` as it ends above."""
        return self.context - self.new_tokens // 2


def full_sizes(name: str) -> ModelSizes:
    """Return the sizes on CUDA of `6B` or `9B`."""
    seconds = {
        "6B": {("k", 1): 3.2e-3, ("l", 64): 64 / 17e3, ("l", 256): 256 / 36e3},
        "9B": {("k", 1): 4.7e-3, ("l", 64): 64 / 11.5e3, ("l", 256): 256 / 25e3},
    }
    return ModelSizes(
        name=name,
        model=replace(preset(PRESETS[name]), family="glm"),  # the families differ in names alone
        dtype=torch.bfloat16,
        batches=(64, 256),
        context=1024,
        new_tokens=128,
        step_tokens=16384,
        sequence=4096,
        num_sequences=2,
        num_prompts=64,
        prompt_tokens=256,
        answer_tokens=256,
        targets_s=seconds[name],
    )


def small_sizes() -> ModelSizes:
    """Return sizes with which a CPU goes through all rows in a minute."""
    return ModelSizes(
        name=SMALL_NAME,
        model=SMALL,
        dtype=torch.float32,
        batches=(4, 16),
        context=96,
        new_tokens=48,
        step_tokens=256,
        sequence=256,
        num_sequences=2,
        num_prompts=8,
        prompt_tokens=32,
        answer_tokens=32,
        targets_s={},
    )


def decode_limit_s(rates: MachineRates, model: GLMConfig, batch: int, context: int, itemsize: int) -> float:
    """Return the least time of a decode step: its matrix products, and attention over the cache behind them.

    Products read every matrix but the embedding once; attention reads keys and values of `context` positions.
    """
    elements = (
        model.num_layers * layer_matrix_elements(model, Layout()) + model.vocab_size * model.hidden_size
    )
    positions = model.num_layers * batch * context
    cache_bytes = 2 * positions * model.num_kv_heads * model.head_size * itemsize
    attention_flop = 4 * positions * model.num_heads * model.head_size
    products_s = rates.limit_s(elements * itemsize, 2 * batch * elements)
    return products_s + rates.limit_s(cache_bytes, attention_flop)


def layers_that_train(sizes: ModelSizes, free_bytes: float) -> int:
    """Return how many layers of a policy train within a device's free memory, with AdamW's whole state."""
    a_weight = _TRAINED_BYTES + _STEP_BYTES
    num_tokens = sizes.num_sequences * sizes.sequence
    return _layers(sizes, free_bytes, num_tokens, a_weight, 2 * a_weight)


def layers_of_ppo(sizes: ModelSizes, free_bytes: float) -> int:
    """Return how many layers of four roles fit: two that train, in turn, and two that only score."""
    num_tokens = micro_batch_tokens(sizes)
    in_layers = 2 * _TRAINED_BYTES + _STEP_BYTES + 2 * _FROZEN_BYTES
    # Embeddings of all four, the heads of policy and reference.
    in_vocabulary = 3 * _TRAINED_BYTES + 2 * _STEP_BYTES + 3 * _FROZEN_BYTES
    return _layers(sizes, free_bytes, num_tokens, in_layers, in_vocabulary)


def micro_batch_tokens(sizes: ModelSizes) -> int:
    """Return the tokens of a micro-batch of PPO: eight sequences."""
    return 8 * (sizes.prompt_tokens + sizes.answer_tokens)


def _layers(sizes: ModelSizes, free_bytes: float, num_tokens: int, in_layers: int, in_vocabulary: int) -> int:
    """Return the layers that fit, at least one, given a weight's bytes in layers and in vocabulary rows."""
    model = sizes.model
    batch = RankMicroBatch(model=model, layout=Layout(), num_tokens=num_tokens, itemsize=sizes.dtype.itemsize)
    rows = model.vocab_size * model.hidden_size
    fixed = rows * in_vocabulary + batch.policy_loss_bytes(num_tokens)[0]
    fixed += batch.backward_workspace_bytes(recomputes=False)
    a_layer = layer_matrix_elements(model, Layout()) * in_layers + batch.layer_saved_bytes()
    fitting = (_SHARE_OF_FREE_MEMORY * free_bytes - fixed) / a_layer
    return int(max(1, min(model.num_layers, fitting)))


def free_bytes(device: torch.device) -> float:
    """Return the free memory of the device; infinite on a CPU."""
    if device.type != "cuda":
        return float("inf")
    torch.cuda.empty_cache()
    return float(torch.cuda.mem_get_info(device)[0])


@torch.no_grad()
def fill_on_device(chunks: list[GLMModel], *, seed: int) -> None:
    """Fill whole models at random where they lie: billions of weights take a host minutes."""
    for chunk in chunks:
        generator = torch.Generator(chunk.topology.device).manual_seed(seed)
        for name, parameter in chunk.named_weights():
            if parameter.dim() > 1:
                parameter.normal_(0.0, chunk.glm.init_std, generator=generator)
            else:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)
