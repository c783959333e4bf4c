"""Pruned weights from weights and statistics of their inputs."""
