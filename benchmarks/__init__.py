"""Measurements of what the engine claims: run `python -m benchmarks.<name> --help` in the repository root."""
