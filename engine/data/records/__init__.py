"""Records of a file: formats, fields, messages, and token ids instead of text."""
