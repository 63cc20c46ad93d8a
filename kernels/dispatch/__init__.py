"""Kernel dispatch, argument checks, ahead-of-time compilation.

Imports torch and Triton only.
"""
