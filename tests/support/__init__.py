"""Shared parts of tests: tiny models and their folders, oracles, and ways to run, kill and read a command.

Tests import from here and never from each other; fixtures shared by several folders are in `tests/conftest.py`.
"""
