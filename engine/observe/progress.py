"""Progress of a PPO run: a progress bar on a terminal, otherwise one line per iteration."""

import time
from collections.abc import Mapping

from tqdm import tqdm

from glm_rlhf.parallel.runtime.log import log


class ProgressLine:
    """Owns the progress bar; a context manager."""

    def __init__(self, *, steps: int, is_shown: bool, first_step: int = 0) -> None:
        """Open the progress bar.

        Args:
            steps: iterations of the whole run.
            is_shown: whether this process shows progress.
            first_step: iterations done before the run was resumed.
        """
        self._steps, self._first, self._is_shown = steps, first_step, is_shown
        self._start = time.monotonic()
        self._bar = tqdm(
            total=steps,
            initial=first_step,
            desc="ppo",
            unit="it",
            smoothing=0.1,
            disable=None if is_shown else True,  # None: disabled unless stderr is a terminal
        )

    def show(self, step: int, metrics: Mapping[str, float]) -> None:
        """Show iteration `step`, from 1: reward, KL in nats per answer, tokens/s of all ranks, time left."""
        if not self._is_shown:
            return
        speed = metrics["perf/tokens_per_s"]
        reward, kl = metrics["reward/minus_baseline/mean"], metrics["objective/kl"]
        if not self._bar.disable:
            self._bar.set_postfix_str(
                f"reward {reward:.3f}, KL {kl:.3f}, {speed:.0f} tokens/s", refresh=False
            )
            self._bar.update(step - self._bar.n)
            return
        elapsed = time.monotonic() - self._start
        left_s = elapsed / max(step - self._first, 1) * (self._steps - step)
        log(
            f"iteration {step} of {self._steps}: reward {reward:.4f}, KL {kl:.4f}, length "
            f"{metrics['response_length/mean']:.1f}, {speed:.0f} tokens/s, "
            f"{metrics['timing_s/iteration']:.1f} s, {tqdm.format_interval(left_s)} left"
        )

    def __enter__(self) -> "ProgressLine":
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.close()
