"""The runs that speed.py times, each in a process of its own: one JSON line at the end of standard output.

    python benchmarks/speed_runs.py '{"run": "plain", ...}'

Time, CPU time and peak memory are of pruning alone, from a loaded model and its tokens to the pruned model in memory;
`process` is the time since the process was started, with imports and loading. A run imports only what it needs:
llm-compressor's process has no coprune, and coprune's no llm-compressor.
"""

from __future__ import annotations

import json
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

BATCHES = (1, 2, 4, 8, 16)
PROBE_SAMPLES = 16


def main() -> None:
    settings = json.loads(sys.argv[1])
    run: Callable[[dict[str, Any]], dict[str, Any]] = RUNS[settings["run"].partition(" ")[0]]
    found = run(settings)
    print(json.dumps(found), flush=True)


def load(settings: dict[str, Any]) -> tuple[Any, Any]:
    """The model and the calibration tokens (samples × S int64)."""
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(settings["model"], dtype="auto").eval()
    return model, load_file(settings["tokens"])["tokens"]


class Clock:
    """Time, CPU time and the largest resident set between two moments."""

    def __init__(self) -> None:
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    def read(self, settings: dict[str, Any]) -> dict[str, float]:
        return {
            "seconds": time.perf_counter() - self._wall,
            "cpu": time.process_time() - self._cpu,
            "process": time.time() - settings["started"],
            # Not getrusage, whose figure a process inherits from the one that started it.
            "peak": next(
                int(line.split()[1]) * 1024
                for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines()
                if line.startswith("VmHWM")
            ),
        }


def floor(settings: dict[str, Any]) -> dict[str, Any]:
    """One forward pass of all tokens through the blocks, without the head, at the fastest batch size."""
    import torch

    model, tokens = load(settings)

    def forward(samples: Any, batch: int) -> None:
        for part in torch.split(samples, batch):
            model.model(input_ids=part, use_cache=False)

    def cpu_of(batch: int) -> float:
        started = time.process_time()
        forward(tokens[:PROBE_SAMPLES], batch)
        return time.process_time() - started

    with torch.no_grad():
        cpu_of(1)
        tried = {batch: min(cpu_of(batch), cpu_of(batch)) for batch in BATCHES}
        best = min(tried, key=lambda batch: tried[batch])
        clock = Clock()
        forward(tokens, best)
        found: dict[str, Any] = clock.read(settings)
    parameters = sum(p.numel() for p in model.model.layers.parameters() if p.ndim == 2)
    attention = sum(2 * tokens.shape[1] * model.config.hidden_size for _ in model.model.layers)
    flops = 2 * tokens.numel() * (parameters + attention)
    return found | {"batch": best, "gflops": flops / 1e9, "gflops_per_second": product_rate()}


def product_rate(size: int = 1024) -> float:
    """The speed of a product of two float32 matrices, in 10⁹ operations per second of CPU time."""
    import torch

    a, b = torch.randn(size, size), torch.randn(size, size)
    best = float("inf")
    for _ in range(5):
        started = time.process_time()
        a @ b
        best = min(best, time.process_time() - started)
    return 2 * size**3 / best / 1e9 * torch.get_num_threads()


def coprune(settings: dict[str, Any]) -> dict[str, Any]:
    from coprune.base.progress import Event, Reporter
    from coprune.recipe.recipe import make_recipe
    from coprune.run.phase_events import Phase, PhaseDone
    from coprune.runner.run_recipe import run_recipe

    limit = settings["run"].partition("--activation-memory ")[2]
    recipe = make_recipe(
        dict(
            model=settings["model"],
            method=settings["method"],
            pattern=settings["pattern"],
            propagation=settings["run"].split()[1],
            activation_memory=float(limit) if limit else None,
            dataset=settings["dataset"],
            nsamples=settings["nsamples"],
            seqlen=settings["seqlen"],
            seed=settings["seed"],
            device="cpu",
            stream=False,
            evaluate=False,
        )
    )
    reporter = Reporter(quiet=True)
    clock, found = Clock(), {}

    def hear(event: Event) -> None:
        nonlocal clock
        if isinstance(event, PhaseDone) and event.phase is Phase.MEASURE_DENSE:
            clock = Clock()
        if isinstance(event, PhaseDone) and event.phase is Phase.PRUNE:
            found.update(clock.read(settings))

    reporter.listeners.append(hear)
    result = run_recipe(recipe, reporter=reporter, write=False)
    assert result.report.calibration is not None
    if result.report.calibration.fingerprint != settings["fingerprint"]:
        raise SystemExit("coprune drew other tokens than the other runs were given")
    result.model.save_pretrained(settings["out"])
    return found


def command(settings: dict[str, Any]) -> dict[str, Any]:
    """Time the whole command as a user types it, which streams from one folder to another."""
    out = Path(settings["out"])
    shutil.rmtree(out, ignore_errors=True)
    named = {key: str(settings[key]) for key in ("method", "pattern", "dataset", "nsamples", "seqlen", "seed")}
    words = [word for key, value in named.items() for word in (f"--{key}", value)]
    words += ["--propagation", "sequential", "--no-eval", "--no-gate", "--prompt", "", "--device", "cpu"]
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "coprune", "prune", settings["model"], *words, "--save-model", str(out)],
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise SystemExit(done.stderr)
    seconds, used = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    return {
        "seconds": seconds,
        "cpu": used.ru_utime + used.ru_stime,
        "process": seconds,
        "peak": used.ru_maxrss * (1024 if sys.platform == "linux" else 1),
        "faults": used.ru_minflt,
        "parts": next(line for line in done.stdout.splitlines() if line.startswith("time ")).split(maxsplit=1)[1],
    }


def plain(settings: dict[str, Any]) -> dict[str, Any]:
    from published import prune_published

    model, tokens = load(settings)
    clock = Clock()
    prune_published(model, tokens, settings["method"], group_of(settings))
    found = clock.read(settings)
    model.save_pretrained(settings["out"])
    return found


def llm_compressor(settings: dict[str, Any]) -> dict[str, Any]:
    from llmcompressor import oneshot
    from llmcompressor.modifiers.pruning import SparseGPTModifier, WandaPruningModifier
    from torch.utils.data import DataLoader

    model, tokens = load(settings)
    group = group_of(settings)
    structure = "0:0" if group is None else settings["pattern"]
    options = {"sparsity": 0.5, "mask_structure": structure, "targets": ["Linear"], "ignore": ["re:.*lm_head"]}
    if settings["method"] == "sparsegpt":
        modifier = SparseGPTModifier(**options, block_size=128, dampening_frac=0.01)
    else:
        modifier = WandaPruningModifier(**options)
    samples: Any = [{"input_ids": sample, "attention_mask": sample.new_ones(len(sample))} for sample in tokens]
    clock = Clock()
    oneshot(model=model, dataset=DataLoader(samples, batch_size=1), recipe=[modifier], pipeline="sequential")
    found = clock.read(settings)
    from transformers import PreTrainedModel

    PreTrainedModel.save_pretrained(model, settings["out"])  # past the tool's own, which compresses
    return found


def evaluate(settings: dict[str, Any]) -> dict[str, Any]:
    """Perplexity of a run's result, and the share of zeros in the blocks' matrices."""
    from transformers import AutoTokenizer

    from coprune.data.windows import evaluation_tokens
    from coprune.evaluation.perplexity import perplexity

    model, _ = load(settings)
    tokenizer = AutoTokenizer.from_pretrained(settings["tokenizer"])
    text = evaluation_tokens(
        settings["dataset"], tokenizer, settings["seqlen"], limit_tokens=settings["eval_tokens"]
    ).tokens
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    zeros = sum(int((p == 0).sum()) for p in matrices) / sum(p.numel() for p in matrices)
    return {"perplexity": perplexity(model, text, settings["seqlen"]).value, "zeros": zeros}


def group_of(settings: dict[str, Any]) -> tuple[int, int] | None:
    if settings["pattern"] == "unstructured":
        return None
    kept, size = settings["pattern"].split(":")
    return int(kept), int(size)


RUNS = {
    "forward": floor,
    "coprune": coprune,
    "command": command,
    "plain": plain,
    "llm-compressor": llm_compressor,
    "evaluate": evaluate,
}

if __name__ == "__main__":
    main()
