"""Launching a kernel, checking its arguments, compiling it ahead of time.

Imports torch and Triton only.
"""
