"""The bottom layer, independent of models: errors, files, memory, processes, progress, devices and their kernels."""
