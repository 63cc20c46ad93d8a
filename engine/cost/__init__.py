"""The model of time and memory that `plan`, `bench` and the metrics use: arithmetic, no devices.

Imports `config` and `types`.
"""
