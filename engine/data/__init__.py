"""Data: records from JSON lines, conversations, tokenizers."""
