"""The settings of a run, as data; nothing here imports torch or transformers."""
