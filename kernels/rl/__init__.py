"""Advantages, policy loss, value loss and KL on packed sequences, each beside its plain fp32 reference.

Imports `dispatch`.
"""
