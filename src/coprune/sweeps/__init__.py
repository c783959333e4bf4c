"""Many runs: a recipe with lists, done by local processes or a Ray cluster, and collected into tables."""
