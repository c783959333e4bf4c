"""A run's state, steps, data, output and estimates."""
