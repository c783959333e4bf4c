"""Packed checkpoints: pruned weights stored as their kept values and where they are, and products computed from them.

Nothing here is imported or compiled before it is used: `coprune.packed.pack` writes and reads packed folders,
`linear` and `kernels` multiply from packed weights, `quantizer` lets transformers load a packed folder,
`registration` makes that happen on `import coprune`, `accelerate` and `bench` measure where it pays.
"""
