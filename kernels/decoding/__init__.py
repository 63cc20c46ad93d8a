"""Attention over a paged cache, writing to the cache, and sampling, each beside its plain reference.

Imports `dispatch`.
"""
