"""Do several runs together with the other processes that torchrun started: `torchrun … together.py RECIPE.yaml …`."""

from __future__ import annotations

import sys
from pathlib import Path

from coprune.base.processes import joined_processes
from coprune.base.progress import Reporter
from coprune.evaluation.answers import questions
from coprune.recipe.recipe import Recipe
from coprune.run.stages import run_recipe

if __name__ == "__main__":
    questions.SHORT_ANSWER = 4  # as in the tests' own process
    with joined_processes() as processes:
        for path in sys.argv[1:]:
            run_recipe(Recipe.from_yaml(Path(path)), reporter=Reporter(quiet=True), processes=processes)
