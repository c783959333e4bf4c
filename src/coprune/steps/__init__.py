"""What coprune can do, a file for each step; a step goes from a model to a model or a record."""
