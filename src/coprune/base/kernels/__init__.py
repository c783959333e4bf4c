"""Kernels: every operation that is done in different ways on different devices, in one table (`table`)."""
