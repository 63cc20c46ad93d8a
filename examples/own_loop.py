"""PPO from your own loop, inside a torch.distributed world that another program has created.

torchrun --nproc-per-node=2 examples/own_loop.py examples/tiny/ppo.yaml parallel.tp=2

What differs from `glm-rlhf ppo`: prompts come from a generator, the learning rate and the logging of metrics
are this file's own, and the process group exists before the engine and stays after it.
"""

import itertools
import random
import sys
from collections.abc import Iterator

import torch.distributed as dist

from glm_rlhf.engine import PPOConfig, PPOEngine

NUM_ITERATIONS = 4


def prompts(seed: int) -> Iterator[list[str]]:
    """Yield the prompts of one iteration after the other: the same on every rank."""
    draw = random.Random(seed)
    while True:
        yield [f"{draw.randint(0, 29)}+{draw.randint(0, 29)}=" for _ in range(16)]


def main(arguments: list[str]) -> None:
    """Run a few iterations and write the policy."""
    owns_world = not dist.is_initialized()  # a larger program has created one long before
    if owns_world:
        dist.init_process_group()
    config = PPOConfig.from_yaml(arguments[0], overrides=arguments[1:])
    with PPOEngine(config) as engine:
        for number, batch in enumerate(itertools.islice(prompts(config.run.seed), NUM_ITERATIONS)):
            engine.set_lr(config.optimizer.lr * (1 - number / NUM_ITERATIONS))
            rollouts = engine.generate(batch)
            experience = engine.make_experience(rollouts)
            metrics = engine.update(experience)
            if engine.topology.is_main_rank:
                print(f"{number}: reward {metrics['reward/minus_baseline/mean']:.3f}", file=sys.stderr)
            engine.save(f"{config.run.output}/saved", progress={"iterations": number + 1}, keep_last=2)
        engine.export_hf(f"{config.run.output}/policy")
    if owns_world:
        dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1:])
