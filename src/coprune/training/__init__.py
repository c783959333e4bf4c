"""Recover what pruning cost: training that keeps every zero a zero."""
