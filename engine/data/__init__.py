"""Records of files as token ids: batching and sampling here, formats and storage in the sub-packages.

Imports `config` and `types`.
"""
