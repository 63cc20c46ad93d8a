"""RMSNorm, RoPE and SwiGLU, each beside its plain fp32 reference.

Imports `dispatch`.
"""
