"""The stages of a run that walks over the blocks: checks, opening, measuring, saving."""
