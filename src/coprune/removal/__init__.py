"""Whole parts of a model removed: channels, heads, experts, blocks."""
