"""Measurements of a model: perplexity, accuracy, zero-shot tasks, closeness to the dense model, comparison."""
