"""Plans of steps made from recipes, and the runner that executes them."""
