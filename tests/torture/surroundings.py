"""Typed commands in hostile surroundings: terminal, environment, disk, other processes, malicious files.

Each attack is a function from a folder to a list of failures.
"""

from __future__ import annotations

import gzip
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from support.pico import pico_model
from support.pico_folder import save_pico, write_words
from support.pico_gguf import distinct_norms, write_pico_gguf
from support.vocabularies import TEXTS, content_of, save_with_tokens

SECRET = "hf_torture0secret0that0nobody0may0read"
_PRUNE = "prune model --dataset words.txt --eval-data words.txt --eval-tokens 320 --seqlen 32 --nsamples 6 -m wanda"
_SLOW = 600
"""Seconds after which a command counts as hanging, also on a busy machine."""
_MOST_BYTES = 6 << 30
"""Memory limit of a command on a malicious file; three gigabytes of text may be read, compressed or not."""


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    code: int
    said: str
    peak: int = 0
    """Peak memory in bytes."""

    def wrong(self, *codes: int, words: str = "") -> list[str]:
        """Return the failures, given the expected exit codes and words."""
        found = [] if self.code in codes else [f"it ended with {self.code}: {self.said[-800:]}"]
        found += (
            [f"a traceback: {self.said[self.said.index('Traceback') :][-2000:]}"] if "Traceback" in self.said else []
        )
        found += [f"it does not say {words!r}: {self.said[-400:]}"] if words not in self.said else []
        return found + ([f"it held {self.peak >> 20} MB"] if self.peak > _MOST_BYTES else [])


def run(
    words: str | Sequence[str], place: Path, environment: Mapping[str, str | None] | None = None, before: str = ""
) -> Ended:
    """Run `coprune …`. environment: variables to set or, if None, to unset; before: shell words in front of it."""
    asked = words.split() if isinstance(words, str) else [*words]
    known = {**os.environ, "XDG_CACHE_HOME": str(place / "cache"), "OMP_NUM_THREADS": "1", **(environment or {})}
    own = {name: value for name, value in known.items() if value is not None}
    command = [sys.executable, "-m", "coprune", *asked]
    if before:
        command = ["bash", "-c", f'{before} "$@"', "bash", *command]
    before_it = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    try:
        done = subprocess.run(command, cwd=place, env=own, capture_output=True, timeout=_SLOW)
    except subprocess.TimeoutExpired:
        return Ended(-1, f"it hangs: {' '.join(asked)}")
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    said = (done.stdout + done.stderr).decode(errors="replace")
    return Ended(done.returncode, said, (peak if peak > before_it else 0) << 10)


def closed_output(place: Path) -> list[str]:
    """Try a closed standard output, and a reader that exits."""
    wrong = run("methods", place, before="exec 1>&-; exec").wrong(0, 1, 2)
    wrong += run(f"{_PRUNE} --save closed", place, before="exec 1>&- 2>&-; exec").wrong(0, 1, 2)
    command = f"{sys.executable} -m coprune methods | head -c 1; exit ${{PIPESTATUS[0]}}"
    piped = subprocess.run(["bash", "-c", command], cwd=place, capture_output=True, timeout=_SLOW)
    wrong += ["a traceback into a closed pipe"] if b"Traceback" in piped.stderr else []
    return wrong


def ascii_terminal(place: Path) -> list[str]:
    """Try LANG=C without UTF-8."""
    plain = {"LANG": "C", "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "ascii"}
    wrong = run("prune --help", place, plain).wrong(0)
    return wrong + run(f"{_PRUNE} --save ascii", place, plain).wrong(0)


def no_home(place: Path) -> list[str]:
    """Try no HOME, a missing one, and an unwritable one."""
    gone: dict[str, str | None] = {"HOME": None, "XDG_CACHE_HOME": None}
    (place / "home-file").touch()
    wrong = run(f"{_PRUNE} --save no-home", place, gone).wrong(0)
    for number, home in enumerate(("/nonexistent/home", str(place / "home-file"))):
        wrong += run(f"{_PRUNE} --save home-{number}", place, gone | {"HOME": home}).wrong(0, 2)
    return wrong


def clock_going_back(place: Path) -> list[str]:
    """Try files of an earlier run with times in the future."""
    wrong = run(f"{_PRUNE} --save clock --save-model clock-model", place).wrong(0)
    tomorrow = time.time() + 86_400
    for path in (place / "clock").rglob("*"), (place / "cache").rglob("*"), (place / "clock-model").rglob("*"):
        for one in path:
            os.utime(one, (tomorrow, tomorrow))
    wrong += run(f"{_PRUNE} --save clock-2 --save-model clock-model-2", place).wrong(0)
    same = (place / "clock-model" / "model.safetensors").read_bytes()
    return wrong + ([] if same == (place / "clock-model-2" / "model.safetensors").read_bytes() else ["other bytes"])


def read_only_mount(place: Path) -> list[str]:
    """Try the model, and then the output, on a read-only mount."""
    mounted = f"mount --bind -o ro {place / 'model'} {place / 'model'} &&"
    tried = subprocess.run(["unshare", "-m", "bash", "-c", f"{mounted} true"], capture_output=True)
    if tried.returncode:
        return []  # not root, or no namespaces here
    wrong = run(f"{_PRUNE} --save read-only", place, before=f"unshare -m bash -c '{mounted} exec \"$@\"' bash").wrong(0)
    inside = f"{_PRUNE} --save model/out --save-model model/made"
    ended = run(inside, place, before=f"unshare -m bash -c '{mounted} exec \"$@\"' bash")
    return wrong + ended.wrong(2)


def _descendants(of: int) -> list[psutil.Process]:
    try:
        found: list[psutil.Process] = psutil.Process(of).children(recursive=True)
        return found
    except psutil.NoSuchProcess:
        return []


def _killing(
    words: str, place: Path, chosen: Callable[[psutil.Process], bool], times: int, seed: int
) -> tuple[Ended, int]:
    """Run a command while killing processes below it; return how it ended, and the number of kills."""
    chance, killed = random.Random(seed), 0
    own = {**os.environ, "XDG_CACHE_HOME": str(place / "cache"), "OMP_NUM_THREADS": "1"}
    with (place / "said.txt").open("w") as said:
        process = subprocess.Popen(
            [sys.executable, "-m", "coprune", *words.split()], cwd=place, env=own, stdout=said, stderr=said
        )
        until = time.monotonic() + 2 * _SLOW
        while process.poll() is None and time.monotonic() < until:
            time.sleep(chance.uniform(1.0, 6.0))
            found = [one for one in _descendants(process.pid) if chosen(one)]
            if found and killed < times:
                chance.choice(found).kill()
                killed += 1
        if process.poll() is None:
            process.kill()
            return Ended(-1, "it hangs"), killed
    return Ended(process.returncode, (place / "said.txt").read_text()), killed


def _sweep(place: Path, name: str) -> None:
    asked = {
        "model": "model",
        "dataset": "words.txt",
        "eval_data": "words.txt",
        "seqlen": 32,
        "nsamples": 4,
        "save": name,
    }
    asked |= {"method": ["wanda", "magnitude", "sparsegpt"], "sparsity": [0.4, 0.5], "check_memory": False}
    (place / f"{name}.yaml").write_text(yaml.safe_dump(asked))


def _works(process: psutil.Process) -> bool:
    try:
        words = " ".join(process.cmdline())
    except psutil.Error:
        return False
    return any(one in words for one in ("multiprocessing.spawn", "multiprocessing.forkserver", "ray::"))


def killed_workers(place: Path, how: str = "--workers 2", name: str = "killed") -> list[str]:
    """Kill workers of a sweep: every run finishes with the figures of an undisturbed sweep."""
    _sweep(place, name)
    _sweep(place, f"{name}-calm")
    ended, count = _killing(f"sweep {name}.yaml {how}", place, _works, 2, seed=1)
    wrong = ended.wrong(0, 1)
    wrong += [] if count else ["no worker was found to be killed"]
    wrong += run(f"sweep {name}.yaml {how}", place).wrong(0)  # finishes runs that were lost too often
    wrong += run(f"sweep {name}-calm.yaml", place).wrong(0)
    calm, other = (_perplexities(place / top) for top in (f"{name}-calm", name))
    return wrong + ([] if calm == other and len(calm) == 6 else [f"it has other figures: {other}, undisturbed {calm}"])


def _perplexities(sweep: Path) -> dict[str, Any]:
    """Return the figures of every finished run, by folder."""
    return {
        str(report.parent.relative_to(sweep)): json.loads(report.read_text())["perplexity"]
        for report in sorted(sweep.rglob("report.json"))
    }


def killed_ray(place: Path) -> list[str]:
    """Kill the workers of a local Ray cluster, then the driver itself."""
    wrong = killed_workers(place, "--ray local", "ray")
    _sweep(place, "driver")
    own = {**os.environ, "XDG_CACHE_HOME": str(place / "cache")}
    with (place / "driver.txt").open("w") as said:
        driver = subprocess.Popen(
            [sys.executable, "-m", "coprune", *["sweep", "driver.yaml", "--ray", "local"]],
            cwd=place,
            env=own,
            stdout=said,
            stderr=said,
        )
        until = time.monotonic() + _SLOW
        while not _perplexities(place / "driver") and driver.poll() is None and time.monotonic() < until:
            time.sleep(0.5)
        below = _descendants(driver.pid)
        driver.kill()
        driver.wait()
    _, alive = psutil.wait_procs(below, timeout=120)  # Ray's agents notice after a minute, its workers at once
    for one in alive:
        one.kill()
    wrong += [f"{len(alive)} processes outlive their driver"] if alive else []
    return wrong + run("sweep driver.yaml --ray local", place).wrong(0)


def killed_fit(place: Path) -> list[str]:
    """Kill a fit with vocabulary cuts three times, in llama.cpp and in transformers."""
    wrong = []
    for name, model in (("fit-l", "spoken.gguf --types q8_0,q4_0"), ("fit-t", "spoken --runtime transformers")):
        words = f"fit {model} --task text.txt --require bits<=dense*2 --without experts,blocks,channels --budget 24h -o {name}"
        for moment in (20.0, 45.0, 80.0):
            own = {**os.environ, "XDG_CACHE_HOME": str(place / "cache")}
            process = subprocess.Popen(
                [sys.executable, "-m", "coprune", *words.split()],
                cwd=place,
                env=own,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            try:
                process.wait(moment)
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGKILL)
                process.wait()
        wrong += [f"{name}: {one}" for one in run(words, place).wrong(0, 1)]  # 1: nothing better is proven
        wrong += [f"{name}-calm: {one}" for one in run(f"{words}-calm", place).wrong(0, 1)]
        wrong += [] if _found(place / name) == _found(place / f"{name}-calm") else [f"{name}: another answer"]
    return wrong


def _found(folder: Path) -> list[Any]:
    """Return a fit's candidates with their figures except speed, and the weights that it left."""
    rows = [{**row, "speed": None} for row in json.loads((folder / "fit.json").read_text())["rows"]]
    weights = [path for end in ("gguf", "safetensors") for path in sorted(folder.glob(f"**/*.{end}"))]
    return [rows, *(path.read_bytes() for path in weights if ".fit" not in path.parts)]


def bombs(place: Path) -> list[str]:
    """Try texts and models that are small on disk and huge in memory."""
    with gzip.open(place / "bomb.jsonl.gz", "wb") as stream:
        for _ in range(200):
            stream.write(b'{"text": "' + b"a" * 10_000_000 + b'"}\n')
    column = pa.DictionaryArray.from_arrays(pa.array([0] * 3_000_000, pa.int32()), pa.array(["word " * 200]))
    pq.write_table(pa.table({"text": column}), place / "bomb.parquet", compression="zstd")
    with zipfile.ZipFile(place / "bomb.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("bomb.txt", b"\0" * 2_000_000_000)
    (place / "deep.jsonl").write_text("[" * 1_000_000)
    (place / "row.jsonl").write_text(json.dumps({"text": "word " * 20_000_000}))
    deep = place / "deep"
    shutil.copytree(place / "model", deep)
    (deep / "config.json").write_text('{"a":' * 100_000 + "1" + "}" * 100_000)
    wrong = []
    for name in ("bomb.jsonl.gz", "bomb.parquet", "bomb.zip", "deep.jsonl", "row.jsonl"):
        ended = run(_PRUNE.replace("words.txt", name, 1) + f" --save bomb-{name}", place)
        wrong += [f"{name}: {one}" for one in ended.wrong(0, 2)]
    return wrong + [f"deep config: {one}" for one in run("inspect deep", place).wrong(2)]


def links(place: Path) -> list[str]:
    """Try links that lead out of a model's folder."""
    secret = place / "secret.txt"
    secret.write_text(SECRET)
    linked = place / "linked"
    shutil.copytree(place / "model", linked)
    (linked / "notes.txt").symlink_to(secret)
    (linked / "chat_template.jinja").symlink_to(secret)
    (linked / "sub").symlink_to(place)
    ended = run(_PRUNE.replace("model", "linked", 1) + " --save link-run --save-model link-made", place)
    wrong = ended.wrong(0, 2)
    return wrong + [
        f"{path.name} holds what a link led to"
        for path in _files(place, "link-made", "link-run")
        if SECRET.encode() in path.read_bytes()
    ]


def _files(place: Path, *names: str) -> list[Path]:
    return [path for name in names for path in (place / name).rglob("*") if path.is_file()]


def secrets(place: Path) -> list[str]:
    """Check that access tokens in the environment occur in no file or output of a run."""
    tokens: dict[str, str | None] = dict.fromkeys(
        ("HF_TOKEN", "WANDB_API_KEY", "HUGGING_FACE_HUB_TOKEN", "MLFLOW_TRACKING_TOKEN"), SECRET
    )
    ended = run(f"{_PRUNE} --save secret-run --save-model secret-made --log-json secret-run.jsonl", place, tokens)
    wrong = ended.wrong(0) + (["it says a token"] if SECRET in ended.said else [])
    left = [*_files(place, "secret-run", "secret-made", "cache"), place / "secret-run.jsonl"]
    return wrong + [f"{path} holds a token" for path in left if path.is_file() and SECRET.encode() in path.read_bytes()]


def load(place: Path) -> list[str]:
    """Try four parallel runs on one cache, 100,000 rows, a text of 300 MB, and a sweep of 60 runs."""
    own = {**os.environ, "XDG_CACHE_HOME": str(place / "cache"), "OMP_NUM_THREADS": "1"}
    four = [
        subprocess.Popen(
            [sys.executable, "-m", "coprune", *f"{_PRUNE} --save at-once-{number}".split()],
            cwd=place, env=own, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )
        for number in range(4)
    ]  # fmt: skip
    wrong = []
    for process in four:
        said, _ = process.communicate(timeout=2 * _SLOW)
        wrong += Ended(process.returncode, said.decode()).wrong(0)
    with (place / "rows.jsonl").open("w") as stream:
        stream.writelines(json.dumps({"text": f"row {number} of many words here"}) + "\n" for number in range(100_000))
    words = (place / "words.txt").read_text()
    (place / "large.txt").write_text((words + "\n") * (300_000_000 // (len(words) + 1)))
    for name in ("rows.jsonl", "large.txt"):
        wrong += [
            f"{name}: {one}"
            for one in run(_PRUNE.replace("words.txt", name, 1) + f" --save {name}-run", place).wrong(0)
        ]
    asked: dict[str, Any] = {
        "model": "model",
        "dataset": "words.txt",
        "eval_data": "words.txt",
        "seqlen": 32,
        "nsamples": 4,
    }
    asked |= {"save": "sixty", "check_memory": False, "method": ["magnitude", "wanda"], "eval_tokens": 320}
    asked |= {"sparsity": [round(0.2 + 0.02 * step, 2) for step in range(30)]}
    (place / "sixty.yaml").write_text(yaml.safe_dump(asked))
    wrong += run("sweep sixty.yaml", place).wrong(0)
    done = len(_perplexities(place / "sixty"))
    return wrong + ([] if done == 60 else [f"{done} of 60 runs are done"])


ATTACKS: dict[str, Callable[[Path], list[str]]] = {
    attack.__name__.replace("_", " "): attack
    for attack in (
        *(closed_output, ascii_terminal, no_home, clock_going_back, read_only_mount, links, secrets, bombs),
        *(killed_workers, killed_ray, killed_fit, load),
    )
}


def make_place(place: Path) -> Path:
    """Fill a folder with a model, one with a vocabulary that can be cut, and texts; return it."""
    place.mkdir(parents=True, exist_ok=True)
    save_pico(place / "model")
    write_words(place / "words.txt")
    save_with_tokens(place / "spoken")
    tokenizer = content_of("bytes")
    size = len(json.loads(tokenizer)["model"]["vocab"])
    model = pico_model("llama", vocab_size=size, max_position_embeddings=1024, tie_word_embeddings=True)
    write_pico_gguf(distinct_norms(model), place / "spoken.gguf", tokenizer=tokenizer)
    words = "\n".join(TEXTS).split()
    chance = random.Random(0)
    (place / "text.txt").write_text("\n".join(" ".join(chance.sample(words, 60)) for _ in range(60)))
    return place
