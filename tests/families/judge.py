"""The verdict on a model type: pruned, compared with full forwards, saved and reloaded, it works, is refused or is wrong."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.io import wavfile
from torch import Tensor
from transformers import PreTrainedModel, ViTImageProcessor, WhisperFeatureExtractor, WhisperProcessor

import coprune
from coprune.base.errors import CopruneError
from coprune.base.progress import Reporter
from coprune.data.images import draw_images, labelled_images, transform_of
from coprune.data.pairs import Pairs
from coprune.data.windows import calibration_windows
from coprune.evaluation.tasks import task_for
from coprune.model.blocks import find_blocks
from coprune.model.checkpoint.load import loaded_by_auto, quiet_transformers, task_of
from coprune.model.checkpoint.weights import InMemory
from coprune.model.leftovers import LeftOut
from coprune.model.loaded_model import Loaded
from coprune.model.matrices import find_matrices
from coprune.recipe.pattern import NM, Target, parse_pattern
from coprune.recipe.recipe import make_recipe
from coprune.report.run_events import left_lines
from coprune.report.schema import Report
from families.build_models import AUTO, Kind, image_size, published_model, tiny_model
from families.exceptions import UNBUILT
from families.kept import lost_in_silence, save_published
from support.walking import full_forward
from support.whole_forwards import kind_of, prune_by_whole_forwards
from support.word_tokenizers import word_tokenizer

TARGETS = {"50%": Target(parse_pattern("unstructured"), 0.5), "2:4": Target(NM(2, 4), 0.5)}
LENGTH = 32
BATCH = 4
MOST_DIFFERENT = 1e-3
"""Share of the mask's entries that may differ, since sums in another order break ties differently."""


class Wrong(AssertionError):
    """The error for a result that differs from the oracle's or from the reloaded one."""


class NotBuilt(Exception):
    """The error for a tiny model that cannot be built, or that transformers itself cannot run."""


@dataclass
class Verdict:
    """The verdict on one model type."""

    model_type: str
    model_class: str
    kind: Kind
    result: str = "works"
    """`works`, `refused`, `wrong` or `not built`."""
    reason: str = ""
    blocks: int = 0
    matrices: int = 0
    left_alone: list[str] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)
    """Tensors that changed in its folder, as published, and why."""
    seconds: float = 0.0

    def line(self) -> dict[str, Any]:
        """Return the verdict as stored in a file."""
        return asdict(self)


@dataclass(frozen=True)
class Data:
    """The data of a run, and the batches made from it."""

    settings: dict[str, Any]
    batches: list[Tensor]


def judge(
    model_type: str, model_class: str, kind: Kind, folder: Path, samples: int = 24, as_folder: bool = True
) -> Verdict:
    """Try everything with one model type.

    Args:
        model_type: its name in the configuration.
        model_class: the name of its class.
        kind: the kind of its inputs and outputs.
        folder: an empty one to work in.
        samples: number of calibration samples.
        as_folder: whether to prune it from a folder, too, and compare the files.
    """
    verdict, started = Verdict(model_type, model_class, kind), time.perf_counter()
    try:
        model = _built(model_type, kind)
        data = _images(model, samples) if kind == "images" else _text(folder, samples)
        task = task_of(model.config, type(model))
        if task == "pairs":  # including those that fill in masked tokens, such as BART
            data = _pairs(model, folder, samples)
        if kind == "seeing" and task == "images":
            raise NotBuilt("checkpoints of it classify images, and name another class")
        if kind == "speech" and task == "speech":
            data = _recordings(model, folder)
        _require_forward(model, data.batches[0])
        for name in TARGETS:
            _try(model_type, name, data, verdict, folder / name.replace(":", "-"))
        if as_folder and task != "speech":
            _compare_folders(model_type, data, verdict, folder)
    except NotBuilt as error:
        verdict.result, verdict.reason = "not built", str(error)
    except CopruneError as error:
        verdict.result, verdict.reason = "refused", str(error)
    except Exception as error:  # a traceback does not count as a refusal
        verdict.result, verdict.reason = "wrong", f"{type(error).__name__}: {first_line(error)}"
    verdict.seconds = round(time.perf_counter() - started, 1)
    return verdict


def _built(model_type: str, kind: Kind) -> PreTrainedModel:
    if model_type in UNBUILT:
        raise NotBuilt(UNBUILT[model_type])
    try:
        return tiny_model(model_type, kind)
    except Exception as error:
        raise NotBuilt(first_line(error)) from error


def _require_forward(model: PreTrainedModel, batch: Tensor) -> None:
    """Raise NotBuilt if the model itself does not run on coprune's inputs."""
    try:
        with torch.no_grad():
            full_forward(model, batch)
    except Exception as error:
        raise NotBuilt(f"transformers cannot run it on this alone: {first_line(error)}") from error


def _text(folder: Path, samples: int) -> Data:
    """Write uniformly random words, so that all experts see some."""
    file, words = folder / "words.txt", torch.randint(1000, (6000,), generator=torch.Generator().manual_seed(0))
    file.write_text(" ".join(f"w{number}" for number in words.tolist()), encoding="utf-8")
    tokenizer = word_tokenizer()
    windows = calibration_windows(str(file), tokenizer, samples, LENGTH, seed=0)
    tokenizer.mask_token = "<unk>"
    settings = {"dataset": str(file), "eval_data": str(file), "eval_tokens": 4 * LENGTH, "seqlen": LENGTH}
    return Data(settings | {"nsamples": samples, "processor": tokenizer}, list(windows.tokens.split(BATCH)))


def _pairs(model: PreTrainedModel, folder: Path, samples: int) -> Data:
    """Write pairs of random words, and return a run's batches of them."""
    numbers = torch.randint(1000, (samples, LENGTH), generator=torch.Generator().manual_seed(0)).tolist()
    texts = [" ".join(f"w{number}" for number in row) for row in numbers]
    file, tokenizer = folder / "pairs.jsonl", word_tokenizer()
    rows = [{"source": text, "target": " ".join(reversed(text.split()))} for text in texts]
    file.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    settings = {"dataset": str(file), "eval_data": str(file), "seqlen": LENGTH, "nsamples": samples}
    return _as_a_run(model, settings | {"processor": tokenizer, "batch_size": BATCH})


def _recordings(model: PreTrainedModel, folder: Path) -> Data:
    """Write recordings of noise with random words, and return a run's batches of them."""
    bins, positions = (getattr(model.config, name, None) for name in ("num_mel_bins", "max_source_positions"))
    if not isinstance(bins, int) or not isinstance(positions, int) or model.main_input_name != "input_features":
        raise NotBuilt("nothing here makes features of sound for it")
    (folder / "heard").mkdir()
    generator = np.random.default_rng(0)
    for number in range(8):
        wavfile.write(folder / "heard" / f"{number}.wav", 16000, generator.normal(size=8000).astype(np.float32))
        (folder / "heard" / f"{number}.txt").write_text(" ".join(f"w{one}" for one in generator.integers(5, 1000, 12)))
    extractor = WhisperFeatureExtractor(
        feature_size=bins, chunk_length=1, hop_length=50, sampling_rate=100 * positions, n_fft=200
    )
    processor = WhisperProcessor(extractor, word_tokenizer())
    settings = {"dataset": str(folder / "heard"), "evaluate": False, "seqlen": LENGTH, "nsamples": 8}
    return _as_a_run(model, settings | {"processor": processor, "batch_size": BATCH})


def _as_a_run(model: PreTrainedModel, settings: dict[str, Any]) -> Data:
    """Return the batches of a run with these settings."""
    loaded = Loaded(InMemory(model), settings["processor"], "model", False)
    recipe = make_recipe({"model": "model", **{key: settings[key] for key in settings.keys() - {"processor"}}})
    task = task_for(recipe, loaded)
    drawn = task.inputs.calibration(True, Reporter(quiet=True))
    assert drawn is not None
    return Data(settings, list(task.inputs.batches(drawn.tokens)))


def _images(model: PreTrainedModel, samples: int) -> Data:
    size = image_size(model.config)
    processor = ViTImageProcessor(size={"height": size, "width": size})
    drawn = draw_images(labelled_images("digits", "calibration"), transform_of(processor), samples, seed=0)
    settings = {"dataset": "digits", "eval_images": 20, "nsamples": samples, "processor": processor}
    return Data(settings, list(drawn.tokens.split(BATCH)))


def _try(model_type: str, name: str, data: Data, verdict: Verdict, folder: Path) -> None:
    """Prune to one target and compare. Raises Wrong, or coprune's error."""
    model, kind, target = tiny_model(model_type, verdict.kind), verdict.kind, TARGETS[name]
    dense = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with quiet_transformers():
        report = coprune.prune(
            model,
            "wanda",
            sparsity=target.sparsity,
            pattern="2:4" if name == "2:4" else "unstructured",
            save_model=folder,
            quiet=True,
            **{"batch_size": BATCH}
            | data.settings
            | ({"evaluate": False, "eval_data": None} if kind == "labels" else {}),
        ).report
    verdict.blocks, verdict.matrices, verdict.left_alone = (
        report.model.blocks,
        len(report.matrices),
        left_lines(report.left_out),
    )
    with _called(name):
        _compare_masks(model, tiny_model(model_type, kind), data, target, report)
        _compare_rest(model, dense, report)
        if kind == "seeing":
            _require_towers_alone(model, report)
        by_auto = kind == "seeing" or loaded_by_auto(model)
        _compare_loaded(model, AUTO[kind] if by_auto else type(model), folder)


def _compare_folders(model_type: str, data: Data, verdict: Verdict, folder: Path) -> None:
    """Require that pruning a published folder, also one of which this type is only a part, loses nothing or is refused."""
    try:
        model = published_model(model_type, verdict.kind)
        source = save_published(model, folder / "published", verdict.kind)
    except Exception as error:
        verdict.kept = [f"not built: {first_line(error)}"]
        return
    dataset = {"dataset": "digits"} if verdict.kind == "images" else {"dataset": data.batches[0]}
    if isinstance(data.batches[0], Pairs):
        dataset = {"dataset": data.settings["dataset"], "nsamples": 4, "seqlen": LENGTH}
    settings = {**dataset, "method": "magnitude", "sparsity": 0.5}
    told, wrong = lost_in_silence(source, folder / "kept", settings)
    verdict.kept = [f"{type(model).__name__} {line}" for line in told]
    if wrong:
        raise Wrong(f"{type(model).__name__} as a folder, {wrong}")


def _compare_masks(model: PreTrainedModel, oracle: PreTrainedModel, data: Data, target: Target, report: Report) -> None:
    alone = {one.kind for one in report.left_out if isinstance(one, LeftOut)}
    # Some layers of a kind may be pruned and others not, such as convolutions.
    pruned = {kind_of(matrix.name) for matrix in report.matrices}
    expected = prune_by_whole_forwards(oracle, data.batches, target, alone - pruned)
    masks = masks_of(model)
    found = {matrix.name: masks[matrix.name] for matrix in report.matrices}
    stacks = {name.partition("[")[0].removesuffix(".weight") for name in found}
    named = stacks | {kind.removesuffix("[*]").removesuffix(".weight") for kind in alone}
    silent = [name for name in _large_names(model) if name not in named and kind_of(name) not in named]
    if silent:
        raise Wrong(f"{silent[0]} is neither pruned nor named ({len(silent)} in all)")
    if found.keys() != expected.keys():
        raise Wrong(f"other matrices were pruned: {sorted(found.keys() ^ expected.keys())[:3]}")
    different = sum(int((found[name] != mask).sum()) for name, mask in expected.items())
    entries = sum(mask.numel() for mask in expected.values())
    if different > MOST_DIFFERENT * entries:
        raise Wrong(f"{different / entries:.2%} of the masks differ from those of full forwards")
    # Experts without tokens are pruned by magnitude over the whole matrix.
    unseen = {matrix.name for matrix in report.matrices if matrix.events}
    for name, mask in found.items():
        per_group = mask.unflatten(1, (-1, 4)) if isinstance(target.pattern, NM) else mask
        if name in unseen and not isinstance(target.pattern, NM):
            per_group = mask.reshape(1, -1)
        if not bool((per_group.sum(dim=-1) == -(-per_group.shape[-1] // 2)).all()):
            raise Wrong(f"{name} is not pruned as asked")


def _large_names(model: PreTrainedModel) -> list[str]:
    """Return the blocks' tensors of two or more dimensions except biases: linear layers, experts, tables, convolutions.

    Shared tensors have their name in the first block.
    """
    found: dict[int, str] = {}
    for block in find_blocks(model):
        for name, parameter in block.module.named_parameters():
            if parameter.ndim >= 2 and "bias" not in name.rpartition(".")[2]:
                found.setdefault(id(parameter), f"{block.name}.{name}".removesuffix(".weight"))
    return list(found.values())


def masks_of(model: PreTrainedModel) -> dict[str, Tensor]:
    """Return where the blocks' matrices are not zero, O × I, by name; experts have their number in brackets."""
    matrices = [matrix for block in find_blocks(model) for matrix in find_matrices(block.module, block.name)]
    return {matrix.name: matrix.read() != 0 for matrix in matrices}


def _compare_rest(model: PreTrainedModel, dense: dict[str, Tensor], report: Report) -> None:
    """Require that everything except the pruned matrices is unchanged, bit for bit."""
    stacks = {matrix.name.partition("[")[0] for matrix in report.matrices}
    changed = {f"{name}.weight" for name in stacks} | stacks
    tied = {id(parameter): name for name, parameter in model.named_parameters() if name in changed}
    same = {name for name, p in model.named_parameters(remove_duplicate=False) if id(p) in tied}
    for name, tensor in model.state_dict().items():
        if name not in changed | same and not torch.equal(tensor, dense[name]):
            raise Wrong(f"{name} was changed")


def _require_towers_alone(model: PreTrainedModel, report: Report) -> None:
    """Require that towers for images or sound, which have their own configurations, are not pruned."""
    config = model.config
    parts = [getattr(config, name, None) for name in config.sub_configs]
    reading = [
        config,
        *(part for part in parts if hasattr(part, "text_config")),
    ]  # including encoders of both text and images
    own = {type(one) for part in reading for one in (part, part.get_text_config())}
    towers = [
        name
        for name, part in model.named_modules()
        if isinstance(part, PreTrainedModel) and name and type(part.config) not in own
    ]
    for matrix in report.matrices:
        if tower := next((name for name in towers if matrix.name.startswith(f"{name}.")), None):
            raise Wrong(f"{matrix.name} was pruned, though {tower} is no part of the language model")


def _compare_loaded(model: PreTrainedModel, loader: Any, folder: Path) -> None:
    """Require that the saved model loads as the same class with the same weights, by an Auto class if there is one."""
    with quiet_transformers():
        loaded, info = loader.from_pretrained(folder, output_loading_info=True)
    named = json.loads((folder / "config.json").read_text(encoding="utf-8"))["architectures"]
    if type(loaded) is not type(model) or named != [type(model).__name__]:
        raise Wrong(f"what was saved is loaded as a {type(loaded).__name__}, and says that it is {named}")
    if info["missing_keys"] or info["unexpected_keys"] or info["mismatched_keys"]:
        raise Wrong(f"what was saved is not all loaded: {info}")
    again = loaded.state_dict()
    for name, tensor in model.state_dict().items():
        if not torch.equal(tensor, again[name]):
            raise Wrong(f"{name} is loaded with other values")


@contextmanager
def _called(target: str) -> Iterator[None]:
    """Add the target to an error of the body."""
    try:
        yield
    except Wrong as error:
        raise Wrong(f"{target}: {error}") from error


def first_line(error: Exception) -> str:
    """Return an exception's message on one line of limited length."""
    text = re.sub(r"\s+", " ", str(error)).strip() or type(error).__name__
    return text if len(text) <= 300 else f"{text[:299]}…"
