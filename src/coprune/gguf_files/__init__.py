"""A GGUF file made from another one of the same source model: tensors matched by value, what was removed left out."""
