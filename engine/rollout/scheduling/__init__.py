"""Which request computes next, and with which pages of the cache."""
