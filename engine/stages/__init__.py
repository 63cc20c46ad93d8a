"""Stages of alignment, one command each."""
