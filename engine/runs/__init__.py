"""The run folder: checkpoints to resume from, exports, and the fingerprint of a run.

Imports `rewards`, `scoring` and below; not `evaluation`.
"""
