"""The packed format: pruned weights stored as kept values and their positions, and products computed from them.

Nothing here is imported or compiled before its use, except that `registration` tells transformers about packed folders
on `import coprune`.
"""
