"""Rows j to n of whole models: the phase switch, decoding, training and an iteration of PPO."""
