"""A record of a file: formats, fields, messages, and token ids in place of text."""
