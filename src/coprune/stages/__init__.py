"""What a run does from top to bottom where it walks over the blocks: checks, opening, measuring, saving."""
