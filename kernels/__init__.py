"""Fused kernels for RLHF on packed sequences: Triton on CUDA, fp32 torch on CPU, one signature."""
