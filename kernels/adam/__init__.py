"""One AdamW step over many tensors, with its fp32 reference in plain torch.

Imports `dispatch`.
"""
