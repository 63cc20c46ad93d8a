"""Attention over a paged cache, writes to the cache, and sampling, each with its reference in plain torch.

Imports `dispatch`.
"""
