"""The model as the walk sees it: blocks found by structure, their matrices, and their recorded calls."""
