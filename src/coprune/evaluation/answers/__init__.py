"""A model's answers to prompts and figures of them, alone and against the dense model's."""
