"""Kernels: operations with device-specific implementations, in one table (`table`)."""
