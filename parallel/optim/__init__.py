"""Adam's state in shards, gradient buckets, the optimizer step within backward.

Imports what `model` may, and `model`; not `weights`.
"""
