"""Searches for the budget with which a model stays nearest to the dense one: what is tried, what that costs, what was found."""
