"""Measurements of a model that is not being trained: bits per byte, accuracy on problems, which experts serve what."""
