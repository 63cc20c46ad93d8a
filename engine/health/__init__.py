"""Checks of the installation and the ranks: doctor, watchdog, stopped ranks.

Imports `config`, `data` and `types`.
"""
