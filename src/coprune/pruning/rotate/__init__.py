"""Rotations of what attention heads carry, before anything is pruned."""
