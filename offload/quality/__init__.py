"""How far a changed checkpoint, such as a quantised one, is from its original."""
