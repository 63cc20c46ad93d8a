"""Rewards of answers: functions, servers, reward models and weighted sums, computed in the background.

Imports `scoring` and below.
"""
