"""The cases that tests run on a simulated device, run on this one; and a real model on it and on the CPU."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Iterator

import coprune
from gpu_sections.models import SMOLLM2, real, tensors
from gpu_sections.section import Asked, Result, head, row

SHARE = 0.9
"""Of a section's time in which a case is still begun."""


def cases(asked: Asked) -> Result:
    """Run cases while there is time, those that every test run has first; print the failures."""
    from support.simdevice import run_cases

    run_cases.prepare()
    ends = time.monotonic() + SHARE * asked.seconds
    passed, tried, left, failures = Counter[str](), Counter[str](), 0, list[str]()
    for kind, name in in_order(asked.cases):
        if time.monotonic() > ends:
            left += 1
            continue
        print(f"in the case {kind}: {name}", file=sys.stderr, flush=True)
        outcome = run_cases.tried(kind, name)
        tried[kind] += 1
        passed[kind] += outcome.passed
        if not outcome.passed:
            failures.append(f"- **{kind}: {name}**: {outcome.said}")
    head(" kind", "passed", "tried")
    for kind, number in tried.items():
        row(kind, passed[kind], number)
    print("\n" + "\n".join(failures) if failures else "")
    said = f"{passed.total()} of {tried.total()} cases gave what the CPU gives"
    return bool(tried) and not failures, said + (f", {left} left out for want of time" if left else "")


def in_order(words: str) -> Iterator[tuple[str, str]]:
    """Kinds and names of cases, the tests' own first."""
    from support.simdevice.run_cases import chosen

    wanted = [] if words in ("", "few") else words.split(",")
    first = list(chosen(wanted, everything=False))
    yield from first
    if words != "few":
        yield from (case for case in chosen(wanted, everything=True) if case not in first)


def real_model(asked: Asked) -> Result:
    """Prune a real model here and on the CPU, in float32, and compare masks, weights and perplexities."""
    from support.simdevice.cases.case import ROUNDED

    found = real(asked)
    if found is None:
        return None, SMOLLM2.missing
    sizes = {"nsamples": 8, "seqlen": 32 if asked.tiny else 128, "eval_tokens": 256 if asked.tiny else 4096}
    head(" method", " weights", "perplexity on the CPU", "here")
    apart = 0.0
    for method in ("wanda", "sparsegpt"):
        states, perplexity = {}, {}
        for device in ("cpu", asked.device):
            target = asked.folder / f"real-{method}-{device}"
            settings = {**found.data, **sizes, "dtype": "float32", "prompt": ""}
            result = coprune.prune(
                found.model, method, pattern="2:4", device=device, save_model=target, quiet=True, **settings
            )
            states[device], perplexity[device] = tensors(target), result.report.perplexity[0].pruned
        cpu, here = perplexity["cpu"], perplexity[asked.device]
        row(method, ROUNDED.compare(states["cpu"], states[asked.device]), f"{cpu:.3f}", f"{here:.3f}")
        apart = max(apart, abs(here / cpu - 1))
    return apart < 0.01, f"perplexities within {apart:.1e} of the CPU's"
