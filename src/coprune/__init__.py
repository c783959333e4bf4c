"""Prune large language models after training, measure what it did, and save a checkpoint that others can load."""
