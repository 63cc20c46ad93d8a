"""Forward and backward of micro-batches over pipeline stages, retries after out-of-memory errors, scoring.

Imports `model`, `optim`, `weights` and below; not `checkpoint`, not `inference`.
"""
