"""A model that can be opened, proven, walked, edited and written."""
