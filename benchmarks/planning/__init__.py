"""Predictions of `plan`, compared with what is counted or timed."""
