"""Whole channels, heads and blocks: which of them matter least, and how the others make up for what is removed."""
