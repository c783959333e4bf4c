"""A run from recipe to folder: checks, walk, journal, verification."""
