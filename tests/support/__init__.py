"""What several tests share: tiny models and their folders, oracles, and ways to run, kill and read a command.

Tests import from here and never from one another; fixtures that several folders share are in `tests/conftest.py`.
"""
