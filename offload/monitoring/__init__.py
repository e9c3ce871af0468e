"""How far a job is and what it uses, for those who look at it."""
