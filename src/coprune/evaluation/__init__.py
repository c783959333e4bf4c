"""Figures of a model: perplexity, accuracy, zero-shot tasks, closeness to dense, comparison."""
