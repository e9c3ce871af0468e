"""What a model is divided into, and where each part of it stays."""
