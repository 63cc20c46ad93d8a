"""The cost model of time and memory used by `plan`, `bench` and the metrics: arithmetic, no devices.

Imports `config` and `types`.
"""
