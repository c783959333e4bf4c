"""Pruning of weights, given the weights and statistics of their inputs."""
