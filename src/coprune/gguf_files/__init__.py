"""Write GGUF files from another one of the same source model: tensors are matched by value, removed parts left out."""
