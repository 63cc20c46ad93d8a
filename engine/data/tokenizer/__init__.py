"""Tokenizers of the three model families, and their chat formats."""
