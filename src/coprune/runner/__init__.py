"""Plans: the steps that a recipe comes to, and the runner that goes through them."""
