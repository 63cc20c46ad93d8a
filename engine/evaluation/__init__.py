"""Held-out measures with confidence intervals.

Imports `rewards`, `scoring` and below; not `runs`.
"""
