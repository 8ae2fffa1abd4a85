"""Captions by image id, from the files they come in."""
