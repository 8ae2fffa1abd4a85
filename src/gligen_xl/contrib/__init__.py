"""Data sets of single publications, each read as it was published; nothing of the main way depends on them."""
