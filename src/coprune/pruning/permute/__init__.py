"""Channels sorted for N:M, and folded into the model so that it computes what it did."""
