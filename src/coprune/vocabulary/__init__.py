"""Tokens of a model's vocabulary removed, with their rows of embedding and head: exact for all text that needs none of them."""
