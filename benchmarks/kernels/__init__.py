"""Kernels on their own, and everything that needs a CUDA device."""
