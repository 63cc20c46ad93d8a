"""On-policy reinforcement learning: roles, experience, the loop of iterations.

Imports `training` and below.
"""
