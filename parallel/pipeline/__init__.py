"""Forward and backward of micro-batches over pipeline stages, retries when memory runs out, scoring.

Imports `model`, `optim`, `weights` and below; not `checkpoint`, not `inference`.
"""
