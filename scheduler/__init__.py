"""When things happen: pure decisions, and the loop that carries them out."""
