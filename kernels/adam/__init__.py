"""One AdamW step over many tensors, beside its plain fp32 reference.

Imports `dispatch`.
"""
