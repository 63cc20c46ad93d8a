"""The device on which the tests run kernels."""

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
"""CUDA if available, else the CPU with Triton's interpreter; draw on the CPU, then move here."""
