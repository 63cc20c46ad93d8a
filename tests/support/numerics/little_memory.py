"""A model with little memory: too many tokens in a micro-batch raise torch's out-of-memory error."""

import contextlib
from collections.abc import Iterator

import torch
from torch.nn.modules.module import register_module_forward_hook

from glm_rlhf.parallel.model.glm import GLMModel


@contextlib.contextmanager
def little_memory(
    model: torch.nn.Module, most_tokens: int, *, in_backward: bool = False
) -> Iterator[list[int]]:
    """Return, as a context manager, the token counts at which memory ran out in a bare model chunk."""
    met: list[int] = []

    def run_out(num_tokens: int) -> None:
        if num_tokens > most_tokens:
            met.append(num_tokens)
            raise torch.OutOfMemoryError(f"injected: no memory for {num_tokens} tokens")

    def after(chunk: torch.nn.Module, args: tuple, output: torch.Tensor) -> None:
        if not isinstance(chunk, GLMModel):
            return
        num_tokens = args[0].packed.num_tokens
        if not in_backward:
            run_out(num_tokens)
        elif output.requires_grad:
            output.register_hook(lambda _: run_out(num_tokens))

    register = register_module_forward_hook if model is None else model.register_forward_hook
    handle = register(after)
    try:
        yield met
    finally:
        handle.remove()
