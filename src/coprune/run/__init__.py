"""One run from recipe to folder: checks, session, walk, journal, verification."""
