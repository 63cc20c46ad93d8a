"""The learning rate of each step."""

import math


def cosine_lr(step: int, *, steps: int, lr: float, min_lr: float, warmup_steps: int) -> float:
    """Return the learning rate of step `step`: linear warm-up, then half a cosine down to `min_lr`.

    With steps counted from 0, w = warmup_steps and s = steps:

        step < w:  lr · (step + 1) / w
        else:      min_lr + (lr − min_lr) · (1 + cos(π · (step − w) / (s − w))) / 2

    so that step w − 1 has already the full rate, and `min_lr` would be that of step s: none is wasted on a
    rate of 0. A pure function of the step: a run that resumes needs no state for it.

    Args:
        step: in [0, steps).
        steps: of the whole run, at least 1.
        lr: the highest rate.
        min_lr: where the cosine ends.
        warmup_steps: at least 0.
    """
    if step < warmup_steps:
        return lr * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / (steps - warmup_steps)
    return min_lr + (lr - min_lr) * (1.0 + math.cos(math.pi * progress)) / 2.0
