"""From prompts to completions.

Imports `config`, `data`, `types`.
"""
