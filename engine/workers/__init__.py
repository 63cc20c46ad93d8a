"""Spawned processes that call functions by name, each call with a time limit.

Imports nothing of the engine, and no torch.
"""
