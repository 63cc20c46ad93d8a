"""Losses and statistics as pure functions of tensors.

Imports `config` and `types`.
"""
