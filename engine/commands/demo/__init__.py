"""`glm-rlhf demo`: SFT, a reward model and PPO of a tiny model on one machine, and what it gained."""
