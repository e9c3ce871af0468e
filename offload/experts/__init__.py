"""How stacked experts run piece by piece."""
