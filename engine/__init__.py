"""The RLHF engine: data, rollouts, objectives, stages."""
