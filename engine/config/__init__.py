"""The settings of every command: sections, keys, YAML. One file per command's own section.

Imports no other sub-package of `engine`.
"""
