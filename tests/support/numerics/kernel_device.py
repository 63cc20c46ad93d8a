"""Where the kernels of this suite run."""

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
"""CUDA where there is one, else the CPU with Triton's interpreter; draw on the CPU, then move here."""
