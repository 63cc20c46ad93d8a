"""Rollouts: who generates next, rewards, scoring."""
