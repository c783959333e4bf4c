"""How often the host waits for the device in every stage, beside the number that the tests allow."""

from __future__ import annotations

import torch

from gpu_sections.section import SIMULATED, Asked, Result, head, row

LINES = 12


def count(asked: Asked) -> Result:
    """Print the stages that wait most, and those above the allowed number."""
    from support.simdevice import counting, run_cases, stages

    if asked.device != SIMULATED and torch.device(asked.device).type != "cuda":
        return None, "only CUDA tells when the host waits"
    run_cases.prepare()
    found, allowed = stages.count_all(), stages.allowed()
    more = {stage for stage, counts in found.items() if counts["sync"] > allowed[stage]["sync"]}
    shown = [stage for stage in found if stage in more or "a block" in stage or "report" in stage]
    head(" stage", "waits", "in the table")
    for stage in shown:
        row(f"**{stage}**" if stage in more else stage, found[stage]["sync"], allowed[stage]["sync"])
    if asked.device != SIMULATED:
        print("\nLines that let the host wait in a run by Wanda 2:4:\n")
        waits = stages.run_of(2, count=counting.waits_of, method="wanda", pattern="2:4")
        for line, number in sorted(waits.items(), key=lambda item: -item[1])[:LINES]:
            print(f"- {number} × `{line}`")
    return not more, f"{len(found) - len(more)} of {len(found)} stages wait no more often than their table says"
