"""Native code for CPUs: C++ sources that are compiled on first use, and their C interface."""
