"""Sharded Adam state, gradient buckets, and the optimizer in backward.

Imports `model` and everything that `model` may import; not `weights`.
"""
