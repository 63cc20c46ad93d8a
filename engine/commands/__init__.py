"""One file per command of the command line, each a short way into the engine.

Imported by `cli` alone, and by benchmarks and examples.
"""
