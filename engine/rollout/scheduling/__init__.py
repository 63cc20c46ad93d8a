"""Scheduling of requests and of pages of the key/value cache."""
