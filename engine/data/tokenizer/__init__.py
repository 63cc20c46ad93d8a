"""The tokenizers of the three families, and their chat formats."""
