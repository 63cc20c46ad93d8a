"""Everything that patches Megatron-core or torch, or works around them: the folder to open on an upgrade.

Imports no other sub-package of `parallel`.
"""
