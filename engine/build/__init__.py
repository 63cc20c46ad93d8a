"""From a config to loaded models, prompts and records.

Imports `runs`, `evaluation` and below.
"""
