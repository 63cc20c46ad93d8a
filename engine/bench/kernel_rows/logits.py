"""Row b: from logits that exist to logprob and entropy, and their gradient in the logits' memory."""

from collections.abc import Callable

import torch

from glm_rlhf.engine.bench.harness import Answer, Contender, Problem
from glm_rlhf.engine.bench.kernel_rows.case import TOLERANCE, Case, compiled, peers, random_ids, random_normal
from glm_rlhf.engine.bench.peers import peer
from glm_rlhf.kernels.lm_head.logprob import logprobs_from_logits

# Rows of one slice of the definition: fp32 copies of 1024 × 151552 are 0.6 GB.
SLICE = 1024


def cases(sizes: dict[str, tuple[int, int]], dtype: torch.dtype) -> list[Case]:
    """Return the rows for each model's (tokens, vocabulary). Limits: one read; one read and one write."""
    targets = {("b1", "6B"): 0.28e-3, ("b1", "9B"): 0.65e-3, ("b2", "6B"): 0.60e-3, ("b2", "9B"): 1.4e-3}
    found = []
    for model, size in sizes.items():
        num_tokens, vocab_size = size
        logits_bytes = float(num_tokens * vocab_size * dtype.itemsize)
        for row, what, passes, build in (
            ("b1", "logits → logprob, entropy; forward", 1, _forward),
            ("b2", "logits → logprob; forward + backward, gradient over the logits", 2, _in_place),
        ):
            found.append(
                Case(
                    row=row,
                    what=what,
                    model=model,
                    shape=f"T {num_tokens}, V {vocab_size}, {str(dtype).removeprefix('torch.')}",
                    num_bytes=passes * logits_bytes,
                    num_flop=0.0,
                    target_s=targets.get((row, model)),
                    build=lambda device, size=size, build=build: build(device, dtype, *size),
                    counts_memory=row == "b2",
                )
            )
    return found


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
    compiled_definition = compiled(definition)

    def expected() -> Answer:
        slices = zip(logits_TV.split(SLICE), targets_T.split(SLICE), strict=True)
        parts = [definition(*part) for part in slices]
        return [torch.cat(column) for column in zip(*parts, strict=True)]

    return Problem(
        contenders=[
            Contender(name="ours", run=lambda: logprobs_from_logits(logits_TV, targets_T)),
            Contender(name="torch eager", run=lambda: definition(logits_TV, targets_T)),
            Contender(name="torch.compile", run=lambda: compiled_definition(logits_TV, targets_T)),
            *peers(
                device,
                [
                    lambda: peer(
                        "quack-kernels (no entropy)",
                        "quack.cross_entropy",
                        "cross_entropy",
                        lambda quack: lambda: quack(logits_TV, targets_T, reduction="none"),
                        answer=lambda loss_T: [-loss_T.float(), None],
                    ),
                ],
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

    compiled_eager = compiled(eager)
    return Problem(
        contenders=[
            contender("ours", lambda: logprobs_from_logits(logits_TV, targets_T, inplace_gradient=True)[0]),
            contender("torch eager", lambda: eager(logits_TV)),
            contender("torch.compile", lambda: compiled_eager(logits_TV)),
            *peers(
                device,
                [
                    lambda: peer(
                        "quack-kernels",
                        "quack.cross_entropy",
                        "cross_entropy",
                        lambda quack: (
                            contender(
                                "quack-kernels",
                                lambda: -quack(logits_TV, targets_T, reduction="none", inplace_backward=True),
                            ).run
                        ),
                        prepare=restore,
                    ),
                ],
            ),
        ],
        expected=expected,
        tolerance=TOLERANCE[dtype],
    )
