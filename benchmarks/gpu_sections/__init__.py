"""The sections of `gpu.py`: each prints Markdown in a process of its own, and reports whether it passed."""
