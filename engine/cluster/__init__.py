"""The machines of a run: what they have, and whether their ranks reach each other."""
