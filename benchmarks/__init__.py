"""Measurements of what the engine claims: run `python -m benchmarks.<name> --help` in the repository root."""

from pathlib import Path

RESULTS = Path(__file__).resolve().parent / "results"
"""Folder of the committed reports."""
