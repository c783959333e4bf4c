"""Reading checkpoints (Hub, folder, GGUF, a packaged model), whole or block by block, and writing them."""
