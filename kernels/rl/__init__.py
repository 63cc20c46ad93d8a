"""Advantages, policy loss, value loss and KL on packed sequences, each with its reference in plain torch.

Imports `dispatch`.
"""
