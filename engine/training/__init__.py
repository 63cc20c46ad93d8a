"""One optimizer step, and the loop over steps, of every objective.

Imports `build` and below.
"""
