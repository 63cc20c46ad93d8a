"""Training steps: time, memory, and what joint or interleaved updates save."""
