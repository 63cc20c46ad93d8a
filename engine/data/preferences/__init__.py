"""Cleaning preference pairs: duplicates, contradictions, length bias, and what is reported of them."""
