"""Whole iterations of PPO against TRL's."""
