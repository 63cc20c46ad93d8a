"""Whether two commits compute the same numbers, to the bit."""
