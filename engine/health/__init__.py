"""Whether the installation and the ranks are well: doctor, watchdog, stopped ranks.

Imports `config`, `data` and `types`.
"""
