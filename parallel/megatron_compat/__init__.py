"""Every assignment into Megatron-core or torch, and every use of their private names: open it on an upgrade.

Each patch is a function with a name of its own, tested with what it relies on by
`tests/parallel/megatron_compat`. Imports no other sub-package of `parallel`.
"""
