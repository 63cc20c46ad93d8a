"""Metrics, progress, traces and the report of a run.

Imports `config`, `cost` and `types`.
"""
