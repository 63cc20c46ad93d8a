"""Generation against padded batches, and idle stages while it runs."""
