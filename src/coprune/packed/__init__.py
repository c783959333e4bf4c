"""The packed format: pruned weights stored as their kept values and where they are, and products computed from them.

Nothing here is imported or compiled before it is used: `folder` packs and unpacks folders, `encoding` lets a run write
packed, `linear` and `matrix` multiply from packed weights, `quantizer` lets transformers load a packed folder,
`registration` makes that happen on `import coprune`, `accelerate` and `bench` measure where it pays.
"""
