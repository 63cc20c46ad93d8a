"""Cleaning of preference pairs: repeats, contradictions and length bias, with reports."""
