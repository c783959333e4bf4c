"""Time, CPU time and peak memory of pruning, side by side: coprune, the published procedure, llm-compressor, the floor.

The floor of pruning with calibration is one forward pass of the calibration tokens through the blocks. All runs get the
same model, tokens, dtype and number of threads, and each is a process of its own. The runs of a repeat follow each other, in
another order each time, and ratios are taken within a repeat, since other work on the machine disturbs all alike. Every
result is evaluated on the same text, to check that the work was the same. Finished runs of a killed benchmark are reused.

    python benchmarks/speed.py --nsamples 8 --seqlen 128 --methods wanda    # minutes
    python benchmarks/speed.py                                              # 128 × 512, Wanda and SparseGPT: hours
    python benchmarks/speed.py --llm-compressor                             # the same with llm-compressor from PyPI
    python benchmarks/speed.py --methods alps,admm --runs forward,coprune   # methods that only coprune has here
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
import venv
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
FLOOR = "forward pass"
RUNS = (
    FLOOR,
    "coprune sequential",
    "coprune sequential --activation-memory 0.3",
    "coprune sequential --activation-memory 0",
    "coprune block",
    "command",
    "plain published",
    "llm-compressor",
)
PUBLISHED = ("wanda", "sparsegpt")

Found = dict[str, Any]


def main() -> None:
    arguments = read_arguments()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    settings = prepare(arguments)
    if arguments.llm_compressor:
        settings["llm-compressor python"] = make_environment(
            arguments.environment or arguments.folder / "llm-compressor"
        )
    blocks = f", its first {arguments.blocks} blocks" if arguments.blocks else ""
    print(
        f"{arguments.model}{blocks}, {arguments.nsamples} × {arguments.seqlen} tokens, {arguments.pattern}, "
        f"{arguments.dtype}, {arguments.threads} thread(s), medians of {arguments.repeats}",
        flush=True,
    )
    for method in arguments.methods.split(","):
        runs = [run for run in RUNS if wanted(run, method, arguments)]
        found: dict[str, list[Found]] = {run: [] for run in runs}
        for repeat in range(arguments.repeats):
            for run in runs[repeat % len(runs) :] + runs[: repeat % len(runs)]:
                found[run].append(remembered(settings, run, method, repeat, arguments))
        print("\n" + table(method, found), flush=True)


def wanted(run: str, method: str, arguments: argparse.Namespace) -> bool:
    if not any(run.startswith(name) for name in arguments.runs.split(",")):
        return False
    if run == "llm-compressor":
        return arguments.llm_compressor and method in PUBLISHED
    return method in PUBLISHED or run != "plain published"


def prepare(arguments: argparse.Namespace) -> Found:
    """Write the model as a plain folder and draw the tokens, so that all runs read the same."""
    from safetensors.torch import save_file

    from coprune.data.windows import calibration_windows
    from coprune.model.loaded_model import open_model
    from coprune.recipe.recipe import make_recipe

    loaded = open_model(make_recipe({"model": arguments.model, "dtype": arguments.dtype}).model, stream=False)
    model, tokens = (
        arguments.folder / f"model-{arguments.dtype}",
        arguments.folder / f"{arguments.nsamples}x{arguments.seqlen}-{arguments.seed}.safetensors",
    )
    assert loaded.tokenizer is not None
    if arguments.blocks:
        model = model.with_name(f"{model.name}-{arguments.blocks}")
        loaded.model.model.layers = loaded.model.model.layers[: arguments.blocks]
        loaded.model.config.num_hidden_layers = arguments.blocks
    if not model.is_dir():
        loaded.model.save_pretrained(model)
        loaded.tokenizer.save_pretrained(model)
    windows = calibration_windows(
        arguments.dataset, loaded.tokenizer, arguments.nsamples, arguments.seqlen, arguments.seed
    )
    save_file({"tokens": windows.tokens}, tokens)
    shared = {
        key: getattr(arguments, key) for key in ("pattern", "dataset", "nsamples", "seqlen", "seed", "eval_tokens")
    }
    names = {"model": str(model), "tokenizer": str(model), "tokens": str(tokens), "fingerprint": windows.fingerprint}
    return shared | names


def make_environment(folder: Path) -> str:
    """A virtual environment with the newest llm-compressor that installs; returns its Python."""
    python = folder / "bin" / "python"
    if not python.is_file():
        venv.create(folder, with_pip=True)
    subprocess.run([python, "-m", "pip", "install", "--quiet", "llmcompressor"], check=True)
    code = "import importlib.metadata as m; print(*(f'{n} {m.version(n)}' for n in ('llmcompressor','torch','transformers')))"
    print("llm-compressor's environment:", subprocess.check_output([python, "-c", code], text=True).strip())
    return str(python)


def remembered(settings: Found, run: str, method: str, repeat: int, arguments: argparse.Namespace) -> Found:
    """Do a run, or reuse the result of an earlier one in the same folder with the same settings."""
    # A forward pass is the same for all methods, but is measured beside each.
    size = f"{arguments.blocks or 'all'} {arguments.nsamples}x{arguments.seqlen}-{arguments.seed}"
    name = f"{run} {method} {arguments.pattern} {arguments.dtype} {size} {arguments.threads} {repeat}"
    file = arguments.folder / f"{name.replace(' ', '-').replace(':', '-')}.json"
    if not file.is_file():
        out = arguments.folder / "out"
        print(f"{time.strftime('%H:%M:%S')} {name}", file=sys.stderr, flush=True)
        python = settings.get("llm-compressor python") if run == "llm-compressor" else sys.executable
        found = inside(settings | {"run": run, "method": method, "out": str(out)}, str(python), arguments.threads)
        if run != FLOOR and repeat == 0 and arguments.eval_tokens:
            found |= inside(settings | {"run": "evaluate", "model": str(out)}, sys.executable, arguments.threads)
        file.write_text(json.dumps(found), encoding="utf-8")
    remembered: Found = json.loads(file.read_text(encoding="utf-8"))
    return remembered


def inside(settings: Found, python: str, threads: int) -> Found:
    """Do a run in a process of its own with a given number of threads; returns its result."""
    count = {name: str(threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
    command = [python, str(HERE / "speed_runs.py"), json.dumps(settings | {"started": time.time()})]
    done = subprocess.run(command, env=os.environ | count, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    found: Found = json.loads(done.stdout.splitlines()[-1])
    return found


def table(method: str, found: dict[str, list[Found]]) -> str:
    """One row per run; ratios of time to the floor and to llm-compressor in the same repeat."""
    lines = [
        f"| {method} | seconds | to a forward pass | to llm-compressor | CPU s | peak GiB | whole process s | perplexity |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for run, results in found.items():
        cells = [
            run + (f" (batches of {results[0]['batch']})" if run == FLOOR else ""),
            f"{middle(results, 'seconds'):.1f}",
            ratio(results, found.get(FLOOR)),
            ratio(results, found.get("llm-compressor")),
            f"{middle(results, 'cpu'):.1f}",
            f"{middle(results, 'peak') / 2**30:.2f}",
            f"{middle(results, 'process'):.1f}",
            f"{results[0]['perplexity']:.2f}" if "perplexity" in results[0] else "–",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", *(f"Of the command: {one['parts']}." for one in found.get("command", [])[:1])]
    if FLOOR in found:
        floor = found[FLOOR][0]
        lines += [
            "",
            f"The blocks' products are {floor['gflops']:,.0f} GFLOP; at the {floor['gflops_per_second']:.0f} GFLOP/s that a "
            f"large product of float32 reaches here they take {floor['gflops'] / floor['gflops_per_second']:.1f} s.",
        ]
    return "\n".join(lines)


def ratio(results: list[Found], others: list[Found] | None) -> str:
    """Median of the repeats' ratios of time, and their range."""
    if others is None:
        return "–"
    ratios = [result["seconds"] / other["seconds"] for result, other in zip(results, others, strict=True)]
    return f"{statistics.median(ratios):.2f}" + (f" ({min(ratios):.2f}–{max(ratios):.2f})" if len(ratios) > 1 else "")


def middle(results: list[Found], key: str) -> float:
    return float(statistics.median(result[key] for result in results))


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--dataset", default="embedded")
    parser.add_argument("--methods", default="wanda,sparsegpt")
    parser.add_argument(
        "--runs", default="forward,coprune,command,plain,llm-compressor", help="beginnings of their names"
    )
    parser.add_argument("--pattern", default="2:4", help="N:M, or unstructured (50 %%)")
    parser.add_argument("--nsamples", type=int, default=128)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--seed", type=int, default=0, help="of the calibration samples")
    parser.add_argument("--eval-tokens", type=int, default=8192, help="0 for no perplexity")
    parser.add_argument(
        "--blocks", type=int, help="only the model's first blocks; ratios hardly depend on how many [all]"
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--llm-compressor", action="store_true", help="make its environment (1 GB) and time it too")
    parser.add_argument("--environment", type=Path, help="where that environment is [in the folder]")
    parser.add_argument("--folder", type=Path, default=Path("out/speed"), help="where the runs' results are kept")
    return parser.parse_args()


if __name__ == "__main__":
    main()
