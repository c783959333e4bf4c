"""The native CPU kernels: C++ sources, compiled on first use, and their C interface."""
