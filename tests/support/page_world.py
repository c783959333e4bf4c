"""A small version of the pages' working folder, in which the named models, texts and files exist."""

from __future__ import annotations

import json
import random
import re
import shutil
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
import yaml
from gguf import GGUFValueType, GGUFWriter
from PIL import Image
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

import coprune
from coprune.base import pool
from coprune.data.corpora import EMBEDDED, EMBEDDED_EVALUATION
from coprune.data.text import JoinedText
from coprune.model.checkpoint.glance import PACKAGED, Packaged
from coprune.model.checkpoint.load import quiet_transformers
from coprune.report import run_folder as run_folders
from support.page_blocks import ROOT
from support.pico import pico_model
from support.pico_gguf import distinct_norms, write_pico_gguf
from support.pico_images import save_classifier
from support.short import shorten
from support.task_items import word_items

FILE = "pico.Q4_1.gguf"
PACKAGE = "pico_package"
# GPT-2's letters, one per byte, and two merged tokens.
_BYTES = [*range(33, 127), *range(161, 173), *range(174, 256), *range(256, 256 + 68)]
TOKENS = ["<|endoftext|>", *map(chr, _BYTES), "Ġt", "he"]
_TEXT = re.compile(r"(?:[\w-]+/)*[\w-]+\.(?:txt|jsonl)")
# Commands that read all of their arguments as models; others only read the first.
_READ_ALL = ("bench", "compare")
_READ_FIRST = (
    "prune",
    "inspect",
    "eval",
    "estimate",
    "finetune",
    "generate",
    "push",
    "export",
    "merge",
)


@dataclass(frozen=True)
class Base:
    """Models made once: the package's, and folders."""

    folder: Path

    def __getitem__(self, name: str) -> Path:
        return self.folder / name


def make_base(folder: Path) -> Base:
    """Make the models that no page changes."""
    tokens: dict[str, Any] = dict(vocab_size=len(TOKENS), bos_token_id=0, eos_token_id=0, max_position_embeddings=2048)
    package = folder / "site" / PACKAGE
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    dense = distinct_norms(pico_model("llama", num_hidden_layers=2, **tokens))
    with patch.object(GGUFWriter, "add_key_value", _with_tokenizer(GGUFWriter.add_key_value)):
        write_pico_gguf(dense, package / FILE)
        experts = distinct_norms(pico_model("qwen3_moe", num_hidden_layers=2, norm_topk_prob=True, **tokens))
        write_pico_gguf(experts, folder / "mixture.gguf", "Q8_0", "qwen3moe")
    tokenizer = AutoTokenizer.from_pretrained(package, gguf_file=FILE)
    pruned = pico_model("llama", num_hidden_layers=2, **tokens)
    with torch.no_grad():
        for name, weight in pruned.named_parameters():
            if ".layers." in name and weight.ndim == 2:
                weight[:, ::2] = 0
    mixture = pico_model("mixtral", num_hidden_layers=2, **tokens)
    for name, model in {"dense": dense, "pruned": pruned, "mixture": mixture}.items():
        with quiet_transformers():
            model.save_pretrained(folder / name)
            tokenizer.save_pretrained(folder / name)
    words = [" ".join(f"word{number * row % 97}" for number in range(99)) for row in range(9)]
    with patch.object(run_folders, "write_page", lambda runs, path: True):
        coprune.prune(str(folder / "dense"), dataset=words, nsamples=2, seqlen=32, save=folder / "run", quiet=True)
    save_classifier("deit", folder / "classifier")
    _write_images(folder / "images")
    _write_items(folder / "items")
    return Base(folder)


def _with_tokenizer(add: Any) -> Any:
    """Return a GGUFWriter.add_key_value that adds a byte tokenizer to files without one."""

    def add_key_value(self: GGUFWriter, key: str, value: Any, kind: GGUFValueType, **more: Any) -> None:
        if key != "tokenizer.ggml.model":
            add(self, key, value, kind, **more)
            return
        add(self, key, "gpt2", kind, **more)
        self.add_tokenizer_pre("gpt-2")
        self.add_token_list(TOKENS)
        self.add_token_types([3] + [1] * (len(TOKENS) - 1))
        self.add_token_merges(["Ġ t", "h e"])
        self.add_bos_token_id(0)
        self.add_eos_token_id(0)

    return add_key_value


def _write_images(folder: Path) -> None:
    generator = np.random.default_rng(0)
    for split in ("train", "val"):
        for label in range(2):
            place = folder / split / f"class{label}"
            place.mkdir(parents=True)
            for number in range(4):
                pixels = generator.integers(0, 256, (32, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(place / f"{number}.png")


def _write_items(folder: Path) -> None:
    word_items(folder)
    choices = {"text": ["w1", "w2", "w3", "w4"], "label": ["A", "B", "C", "D"]}
    items: dict[str, dict[str, Any]] = {
        "boolq": {"passage": "w1 w2", "question": "w3 w4", "label": 1},
        "rte": {"sentence1": "w1 w2", "sentence2": "w3 w4", "label": 0},
        "openbookqa": {"question_stem": "w1 w2", "choices": choices, "answerKey": "B"},
        "arc_challenge": {"question": "w1 w2", "choices": choices, "answerKey": "C"},
    }
    for task, row in items.items():
        (folder / f"{task}.jsonl").write_text((json.dumps(row) + "\n") * 6)
    for file in list(folder.glob("*.jsonl")):
        shutil.copy(file, file.with_suffix(".train.jsonl"))


class World:
    """A separate folder per page, in which its blocks run in order."""

    def __init__(self, base: Base, folder: Path, patches: pytest.MonkeyPatch) -> None:
        self.base = base
        self.folder = folder
        shorten(patches)
        self.pages = False
        """Whether the pages of runs are made, which takes longer than the runs."""
        write = run_folders.write_page
        patches.setattr(run_folders, "write_page", lambda runs, path: not self.pages or write(runs, path))
        patches.chdir(folder)
        patches.syspath_prepend(str(base["site"]))
        patches.setitem(PACKAGED, "smollm2-135m", Packaged(PACKAGE, FILE, "HuggingFaceTB/SmolLM2-135M-Instruct"))
        pages = "\n\n".join(page.read_text(encoding="utf-8") for page in sorted((ROOT / "docs").glob("*.md")))
        calibration, held_out = JoinedText(pages[:6_000], "pages"), JoinedText(pages[-600:], "other pages", 4)
        for name in ("embedded", "wikitext2", "c4", "ptb"):
            patches.setitem(EMBEDDED, name, lambda: calibration)
            patches.setitem(EMBEDDED_EVALUATION, name, lambda: held_out)
        patches.setitem(EMBEDDED_EVALUATION, "embedded-lambada", lambda: held_out)
        patches.setattr("coprune.pruning.methods._registered", {})
        patches.setenv("TASK_DATA", str(base["items"]))
        # A spawned worker of a sweep would lack this world's patches.
        patches.setattr(pool, "get_context", lambda _: get_context("fork"))
        (folder / "docs").symlink_to(ROOT / "docs")
        own, tasks = folder / "my-tasks", ROOT / "docs" / "tasks"
        own.mkdir()
        shutil.copy(tasks / "local.py", own)
        piqa = (tasks / "piqa.yaml").read_text(encoding="utf-8")
        (own / "my_task.yaml").write_text(piqa.replace("task: piqa\n", "task: my_task\n"), encoding="utf-8")

    def provide(self, name: str, arguments: list[str]) -> None:
        """Provide the models and files that a command reads and that do not exist yet.

        name: of the command; arguments: its positional arguments.
        """
        for run in arguments if name == "report" else []:
            if not (self.folder / run).exists():
                shutil.copytree(self.base["run"], self.folder / run)
        if name in ("export", "generate"):
            (self.folder / arguments[1]).unlink(missing_ok=True)  # pages begin anew at several places
        models = arguments if name in _READ_ALL else arguments[:1] if name in _READ_FIRST else []
        for model in models:
            self.model(model)

    def model(self, name: str) -> None:
        """Provide a model named by a page."""
        place = self.folder / name
        if place.exists() or name in PACKAGED or not re.fullmatch(r"[\w./-]+", name):
            return
        if name.endswith("mixture.gguf"):
            source = self.base["mixture.gguf"]
        elif name.endswith(".gguf"):
            source = self.base["site"] / PACKAGE / FILE
        elif name.startswith("timm/"):
            source = self.base["classifier"]
        elif "MIXTURE" in name:
            source = self.base["mixture"]
        else:
            source = self.base["pruned" if name.startswith("out/") or name in ("PRUNED", "FOLDER") else "dense"]
        place.parent.mkdir(parents=True, exist_ok=True)
        place.symlink_to(source)

    def texts(self, words: str) -> None:
        """Provide the texts and image folders named by a setting."""
        for name in _TEXT.findall(words):
            write_text(self.folder / name)
        images = self.folder / words
        if words.startswith("path/") and not images.exists():
            images.parent.mkdir(parents=True, exist_ok=True)
            images.symlink_to(self.base["images"])

    def recipe(self, file: str, text: str) -> Path:
        """Write a page's YAML to a file with shortened lists: two entries of the first, one of others."""
        data = yaml.safe_load(text)
        long = [name for name, value in data.items() if isinstance(value, list) and name not in ("refine", "exclude")]
        for name in long:
            data[name] = data[name][: 2 if name == long[0] else 1]
        if "generate" in data:
            data |= {"generate_prompts": 2, "generate_tokens": 8}
        place = self.folder / file
        place.write_text(yaml.safe_dump(data), encoding="utf-8")
        for word in _TEXT.findall(text):
            write_text(self.folder / word)
        return place

    def names(self) -> dict[str, Any]:
        """Return the names that Python blocks assume to be defined."""
        with quiet_transformers():
            tokenizer = AutoTokenizer.from_pretrained(self.base["dense"])
            model = coprune_model(self.base["pruned"])
        texts = [" ".join(f"word{number * row % 97}" for number in range(60)) for row in range(1, 9)]
        rows = [_row(tokenizer, text) for text in texts]
        return {
            "__name__": "page",
            "coprune": coprune,
            "torch": torch,
            "model": model,
            "tokenizer": tokenizer,
            "my_texts": texts,
        } | {
            "held_out_texts": texts[:3],
            "texts": rows,
            "batches": [{name: torch.tensor([value]) for name, value in row.items()} for row in rows[:2]],
            "SFTTrainer": small_trainer(self.folder),
        }


def write_text(place: Path) -> None:
    """Write a text, or rows with text, prompts and answers, unless it exists."""
    if place.exists():
        return
    place.parent.mkdir(parents=True, exist_ok=True)
    generator = random.Random(place.name)
    lines = [" ".join(f"word{generator.randrange(99)}" for _ in range(40)) for _ in range(12)]
    rows = [json.dumps({"text": line, "prompt": line[:40]}) for line in lines]
    place.write_text("\n".join(rows if place.suffix == ".jsonl" else lines) + "\n", encoding="utf-8")


def coprune_model(folder: Path) -> PreTrainedModel:
    """Load a model into memory for training."""
    from transformers import AutoModelForCausalLM

    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder)
    return model


def _row(tokenizer: PreTrainedTokenizerBase, text: str) -> dict[str, list[int]]:
    tokens = tokenizer(text)["input_ids"][:16]
    return {"input_ids": tokens, "labels": tokens}


def small_trainer(folder: Path) -> Any:
    """Return a stand-in for TRL's trainers, based on transformers': one step, on rows of tokens."""
    from transformers import Trainer, TrainingArguments

    def make(**settings: Any) -> Trainer:
        small = TrainingArguments(
            output_dir=str(folder / "trainer"), max_steps=1, report_to=[], use_cpu=True, disable_tqdm=True
        )
        return Trainer(args=small, **settings)

    return make
