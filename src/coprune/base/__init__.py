"""The layer that knows nothing of models: errors, files, memory, processes, progress, devices and their kernels."""
