"""Runs that take parts out of a model: what goes, a rehearsal of the cut, and the cut."""
