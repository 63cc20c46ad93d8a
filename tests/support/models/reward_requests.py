"""Answers to score."""

from glm_rlhf.engine.rewards.function import RewardRequest


def reward_requests(count: int = 3) -> list[RewardRequest]:
    """Answers of two tokens and a long text, to prompts `question 0`, `question 1`, …"""
    return [
        RewardRequest(
            prompt_tokens=(1, number),
            response_tokens=(4, 55),
            prompt=f"question {number}",
            response="x" * 500,
            is_finished=True,
            extra={"answer": number},
        )
        for number in range(count)
    ]
