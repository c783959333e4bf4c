"""Whole parts removed: channels, heads, experts, blocks. The core enters through `coprune.run.to_removal` alone."""
