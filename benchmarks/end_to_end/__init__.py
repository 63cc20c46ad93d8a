"""The whole pipeline on real input."""
