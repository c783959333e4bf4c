"""Reports with results that a quick run does not measure."""

from __future__ import annotations

from coprune.evaluation.zero_shot import Estimate, TaskComparison, ZeroShotFacts
from coprune.pruning.solver_events import Event
from coprune.report.run_events import OfMatrix
from coprune.report.schema import Report


def with_tasks(report: Report) -> Report:
    """Return a report with zero-shot results and a name that would end a script element."""
    tasks = tuple(
        TaskComparison(
            task=task,
            version=1.0,
            num_fewshot=0,
            items=100,
            dense={"acc": Estimate(value=0.6, stderr=0.05)},
            pruned={"acc": Estimate(value=0.5, stderr=0.05)},
            delta={"acc": Estimate(value=-0.1, stderr=0.02)},
        )
        for task in ("piqa", "</script><b>")
    )
    mean = Estimate(value=0.5, stderr=0.03)
    facts = ZeroShotFacts(tasks=tasks, mean_dense=mean, mean_pruned=mean, mean_delta=mean, harness="0")
    event = OfMatrix(matrix="m", event=Event(kind="other", note="<b>event</b>"))
    return report.model_copy(update={"zero_shot": facts, "events": [event]})
