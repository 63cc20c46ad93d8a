"""Row d: one Adam step on bf16 weights whose fp32 masters are kept."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from glm_rlhf.engine.bench.harness import Contender, Problem
from glm_rlhf.engine.bench.kernel_rows.case import Case, random_normal
from glm_rlhf.engine.bench.peers import peer, peers
from glm_rlhf.kernels.adam.adamw import AdamWTable, adamw, join_master, split_master
from glm_rlhf.parallel.megatron_compat.torch_operators import copy_all

# So large an epsilon that the change depends on the gradient's size, so large a rate that the change shows
# in a bf16 weight.
LR, BETAS, EPSILON, WEIGHT_DECAY = 1e-2, (0.9, 0.95), 1e-2, 0.1
_SETTINGS = {"lr": LR, "betas": BETAS, "weight_decay": WEIGHT_DECAY}
# Read and written: weight 2 + 2, remainder 2 + 2, moments 4 + 4 each; read: a bf16 gradient.
BYTES_PER_PARAMETER = 26
# Of the change of the first step; a contender that shows only bf16 weights rounds it by some 1e-3.
TOLERANCE = 1e-2
WEIGHT_STD = 0.02


def cases(sizes: dict[str, tuple[list[tuple[int, ...]], float, float | None]]) -> list[Case]:
    """Return a row per model; a size is (shapes of the tensors, parameters of the model, target for all)."""
    return [_case(model, *size) for model, size in sizes.items()]


def _case(model: str, shapes: list[tuple[int, ...]], num_all: float, target_s: float | None) -> Case:
    num_own = sum(torch.Size(shape).numel() for shape in shapes)
    share = f", {num_own / num_all:.3f} of the model, the target in proportion" if target_s else ""
    return Case(
        row="d",
        what="AdamW step, bf16 weights and gradients, fp32 masters and moments",
        model=model,
        shape=f"{num_own / 1e6:.1f} M parameters in {len(shapes)} tensors{share}",
        num_bytes=float(BYTES_PER_PARAMETER * num_own),
        target_s=None if target_s is None else target_s * num_own / num_all,
        build=lambda device: _problem(device, shapes),
    )


def _problem(device: torch.device, shapes: Sequence[tuple[int, ...]]) -> Problem:
    fp32 = {"device": device, "dtype": torch.float32}
    bf16 = {"device": device, "dtype": torch.bfloat16}
    gradients = [random_normal(*s, std=0.1, seed=100 + i, **bf16) for i, s in enumerate(shapes)]

    def masters() -> list[torch.Tensor]:
        return [random_normal(*s, std=WEIGHT_STD, seed=200 + i, **fp32) for i, s in enumerate(shapes)]

    def change(first_weight: torch.Tensor) -> list[torch.Tensor]:
        before = random_normal(*shapes[0], std=WEIGHT_STD, seed=200, **fp32)
        return [first_weight.detach().double() - before.double()]

    def expected() -> list[torch.Tensor]:
        gradient = gradients[0].double()
        before = random_normal(*shapes[0], std=WEIGHT_STD, seed=200, **fp32).double()
        # The first step: corrected for their start at zero, the moments are g and g².
        return [-LR * WEIGHT_DECAY * before - LR * gradient / (gradient.abs() + EPSILON)]

    return Problem(
        contenders=[
            _engine_adamw(masters(), gradients, change),
            *(_of_torch(kind, masters(), gradients, change) for kind in ("foreach", "fused")),
            *peers(
                device,
                partial(
                    peer,
                    "Transformer Engine FusedAdam",
                    "transformer_engine.pytorch.optimizers",
                    "FusedAdam",
                    lambda adam: _transformer_engine(adam, masters(), gradients),
                    answer=change,
                ),
            ),
        ],
        expected=expected,
        tolerance=TOLERANCE,
    )


def _engine_adamw(masters: list[torch.Tensor], gradients: list[torch.Tensor], change: Callable) -> Contender:
    weights, remainders = zip(*(split_master(master) for master in masters), strict=True)
    table = AdamWTable(
        weights=weights,
        remainders=remainders,
        first_moments=[torch.zeros_like(master) for master in masters],
        second_moments=[torch.zeros_like(master) for master in masters],
    )
    num_steps = 0

    def run() -> None:
        nonlocal num_steps
        num_steps += 1
        adamw(table, gradients, step=num_steps, epsilon=EPSILON, **_SETTINGS)

    return Contender(name="ours", run=run, answer=lambda _: change(join_master(weights[0], remainders[0])))


def _of_torch(
    kind: str, masters: list[torch.Tensor], gradients: list[torch.Tensor], change: Callable
) -> Contender:
    weights = [master.bfloat16() for master in masters]
    optimizer = torch.optim.AdamW(masters, eps=EPSILON, **_SETTINGS, **{kind: True})
    wide = [torch.empty_like(master) for master in masters]
    for master, gradient in zip(masters, wide, strict=True):
        master.grad = gradient

    def run() -> None:
        copy_all(wide, gradients)
        optimizer.step()
        copy_all(weights, masters)

    return Contender(name=f"torch AdamW {kind} + casts", run=run, answer=lambda _: change(masters[0]))


def _transformer_engine(
    adam: type, masters: list[torch.Tensor], gradients: list[torch.Tensor]
) -> Callable[[], Any]:
    weights = [torch.nn.Parameter(master.bfloat16()) for master in masters]
    optimizer = adam(
        weights,
        eps=EPSILON,
        master_weights=True,
        store_param_remainders=True,
        use_decoupled_grad=True,
        **_SETTINGS,
    )
    for weight, gradient in zip(weights, gradients, strict=True):
        weight.decoupled_grad = gradient

    def run() -> torch.Tensor:
        optimizer.step()
        return weights[0]

    return run
