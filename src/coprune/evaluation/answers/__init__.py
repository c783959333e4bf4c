"""A model's answers to prompts, and figures of those, by themselves and against the dense model's."""
