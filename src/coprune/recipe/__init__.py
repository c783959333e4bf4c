"""What is asked for, as data; nothing here imports torch or transformers."""
