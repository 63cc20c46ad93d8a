"""Spawned processes that call functions by name, each call with a deadline on the wall.

Imports nothing of the engine, and no torch.
"""
