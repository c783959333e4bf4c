"""Vocabulary trimming: remove tokens with their embedding and head rows, exact for all text without them."""
