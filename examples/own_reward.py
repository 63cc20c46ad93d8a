"""Your own reward function: right answers are worth 1, and long ones a little less.

torchrun --nproc-per-node=8 -m glm_rlhf.engine ppo examples/chatglm3_6b/ppo_8gpu.yaml \\
    reward.path=null reward.function=examples.own_reward:right_and_short

Run it from the checkout's folder, or put the module where Python finds it. Prompts carry what the function
needs as further fields, here `answer`.
"""

from glm_rlhf.engine.rewards.function import RewardRequest

TOKENS_FREE = 128
COST_PER_TOKEN = 0.001


def right_and_short(requests: list[RewardRequest]) -> list[float]:
    """Return a number for each answer, in the order of the requests; one rank per copy of the model calls it.

    Raises:
        KeyError: a prompt without the field `answer`; PPO ends on all ranks and names it.
    """
    rewards = []
    for request in requests:
        is_right = request.is_finished and request.extra["answer"] in request.response
        too_long = max(0, len(request.response_tokens) - TOKENS_FREE)
        rewards.append(float(is_right) - COST_PER_TOKEN * too_long)
    return rewards
