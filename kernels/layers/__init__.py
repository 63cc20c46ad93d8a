"""RMSNorm, RoPE and SwiGLU, each with its fp32 reference in plain torch.

Imports `dispatch`.
"""
