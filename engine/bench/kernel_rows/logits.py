"""Row b: from logits that exist to logprob and entropy, and their gradient in the logits' memory."""

from collections.abc import Callable
from functools import partial

import torch

from glm_rlhf.engine.bench.harness import Answer, Contender, Problem
from glm_rlhf.engine.bench.kernel_rows.case import (
    TOLERANCE,
    Case,
    dtype_name,
    in_torch,
    plain,
    random_ids,
    random_normal,
)
from glm_rlhf.engine.bench.peers import peer, peers
from glm_rlhf.kernels.lm_head.logprob import logprobs_from_logits

# Rows of one slice of the definition: fp32 copies of 1024 × 151552 are 0.6 GB.
SLICE = 1024
_TARGETS_S = {("b1", "6B"): 0.28e-3, ("b1", "9B"): 0.65e-3, ("b2", "6B"): 0.60e-3, ("b2", "9B"): 1.4e-3}
_QUACK = ("quack.cross_entropy", "cross_entropy")


def cases(sizes: dict[str, tuple[int, int]], dtype: torch.dtype) -> list[Case]:
    """Return the rows for each model's (tokens, vocabulary). Limits: one read; one read and one write."""
    rows = (
        ("b1", "logits → logprob, entropy; forward", 1, _forward),
        ("b2", "logits → logprob; forward + backward, gradient over the logits", 2, _in_place),
    )
    return [
        Case(
            row=row,
            what=what,
            model=model,
            shape=f"T {size[0]}, V {size[1]}, {dtype_name(dtype)}",
            num_bytes=passes * float(size[0] * size[1] * dtype.itemsize),
            target_s=_TARGETS_S.get((row, model)),
            build=lambda device, size=size, build=build: build(device, dtype, *size),
            counts_memory=row == "b2",
        )
        for model, size in sizes.items()
        for row, what, passes, build in rows
    ]


def definition(logits_TV: torch.Tensor, targets_T: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return logprobs and entropy by log_softmax in fp32."""
    log_probability_TV = logits_TV.float().log_softmax(-1)
    logprobs_T = log_probability_TV.gather(1, targets_T[:, None]).squeeze(1)
    return logprobs_T, -(log_probability_TV.exp() * log_probability_TV).sum(-1)


def eager_logprobs(logits_TV: torch.Tensor, targets_T: torch.Tensor) -> torch.Tensor:
    """Return the logprobs alone."""
    return logits_TV.float().log_softmax(-1).gather(1, targets_T[:, None]).squeeze(1)


def _forward(device: torch.device, dtype: torch.dtype, num_tokens: int, vocab_size: int) -> Problem:
    logits_TV = random_normal(num_tokens, vocab_size, device=device, dtype=dtype, std=2.0, seed=1)
    targets_T = random_ids(num_tokens, vocab_size, device=device, seed=2)

    def expected() -> Answer:
        slices = zip(logits_TV.split(SLICE), targets_T.split(SLICE), strict=True)
        parts = [definition(*part) for part in slices]
        return [torch.cat(column) for column in zip(*parts, strict=True)]

    return Problem(
        contenders=[
            plain("ours", lambda: logprobs_from_logits(logits_TV, targets_T)),
            *in_torch(definition, (logits_TV, targets_T)),
            *peers(
                device,
                partial(
                    peer,
                    "quack-kernels (no entropy)",
                    *_QUACK,
                    lambda quack: partial(quack, logits_TV, targets_T, reduction="none"),
                    answer=lambda loss_T: [-loss_T.float(), None],
                ),
            ),
        ],
        expected=expected,
        tolerance=TOLERANCE[dtype],
    )


def _in_place(device: torch.device, dtype: torch.dtype, num_tokens: int, vocab_size: int) -> Problem:
    original_TV = random_normal(num_tokens, vocab_size, device=device, dtype=dtype, std=2.0, seed=1)
    targets_T = random_ids(num_tokens, vocab_size, device=device, seed=2)
    upstream_T = random_normal(num_tokens, device=device, dtype=torch.float32, seed=3)
    logits_TV = original_TV.clone().requires_grad_()

    def restore() -> None:
        logits_TV.grad = None
        with torch.no_grad():
            logits_TV.copy_(original_TV)

    def contender(name: str, logprobs: Callable[[], torch.Tensor]) -> Contender:
        def run() -> Answer:
            logprobs_T = logprobs()
            (gradient_TV,) = torch.autograd.grad(logprobs_T, logits_TV, upstream_T.to(logprobs_T.dtype))
            return [logprobs_T.detach().float(), gradient_TV]

        return Contender(name=name, run=run, prepare=restore)

    def expected() -> Answer:
        logprobs, gradients = [], []
        for start in range(0, num_tokens, SLICE):
            rows = slice(start, start + SLICE)
            part_TV = original_TV[rows].float().requires_grad_()
            logprobs_T = eager_logprobs(part_TV, targets_T[rows])
            gradients += torch.autograd.grad(logprobs_T, part_TV, upstream_T[rows])
            logprobs.append(logprobs_T.detach())
        return [torch.cat(logprobs), torch.cat(gradients)]

    def eager(logits_TV: torch.Tensor) -> torch.Tensor:
        return eager_logprobs(logits_TV, targets_T)

    def quack(cross_entropy: Callable) -> Callable[[], Answer]:
        options = {"reduction": "none", "inplace_backward": True}
        return contender("", lambda: -cross_entropy(logits_TV, targets_T, **options)).run

    return Problem(
        contenders=[
            contender("ours", lambda: logprobs_from_logits(logits_TV, targets_T, inplace_gradient=True)[0]),
            *in_torch(eager, (logits_TV,), contender=contender),
            *peers(device, partial(peer, "quack-kernels", *_QUACK, quack, prepare=restore)),
        ],
        expected=expected,
        tolerance=TOLERANCE[dtype],
    )
