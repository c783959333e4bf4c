"""What a model writes: prompts, its answers to them, and figures of those, by themselves and against the dense model's."""
