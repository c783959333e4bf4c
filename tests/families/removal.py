"""Try which parts can be removed from every pico family: python tests/families/removal.py [FAMILY …].

Tries some or all families and rewrites their rows in benchmarks/results/removal-families.md.
"""

from __future__ import annotations

import re
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

import torch

import coprune
from coprune.base.errors import CopruneError
from coprune.base.progress import Reporter
from coprune.model.blocks import find_blocks
from coprune.recipe.recipe import make_recipe
from coprune.runner.run_recipe import run_recipe
from support.killing import killed_when
from support.pico import FAMILIES, MIXTURES, MORE_MIXTURES, pico_model
from support.pico_folder import listing, save, write_words
from support.pico_hybrids import HYBRIDS
from support.pico_pairs import SIZES, pico_pair_model, pico_processor, write_recordings
from support.saved import load_clean, saved_like

PAGE = Path(__file__).parents[2] / "benchmarks" / "results" / "removal-families.md"
PAIRS = {name.lower(): name for name in SIZES}
ALL = [*FAMILIES, *MIXTURES, *MORE_MIXTURES, *HYBRIDS, *PAIRS]
SHARES = {"channels": 0.4, "heads": 0.5, "blocks": 0.34, "experts": 0.25}
CHANGES: dict[str, dict[str, Any]] = {
    "deepseek_v3": {"n_routed_experts": 8},  # otherwise no group of its experts could lose one
    "mamba": {"num_hidden_layers": 3},
    "gemma2": {"num_hidden_layers": 4},
    "t5": {"num_layers": 3, "num_decoder_layers": 3},
    **{name: {"encoder_layers": 3, "decoder_layers": 3} for name in ("bart", "marian", "mbart", "whisper")},
}
_IDS = torch.randint(60, (8, 32), generator=torch.Generator().manual_seed(0))
_OPENING = """# What can be removed of which models

This page says which parts `--remove` takes from which families, tried on tiny models. ✓ means that:

- the smaller model computes the same as the big one with these parts silent (experts: never chosen), in memory and from its
  folder;
- transformers loads the folder with no missing and no unexpected key;
- a killed run resumes to the same bytes.

A number refers to the reason of a refusal, below; a refused model stays unchanged. `python tests/families/removal.py` writes this
page.

| families | channels | heads | blocks | experts |
| --- | --- | --- | --- | --- |
"""


@dataclass(frozen=True)
class Row:
    """The result of one family: for each part, empty if it can be removed, else the reason."""

    family: str
    refused: dict[str, str]

    def cells(self, reasons: list[str]) -> str:
        """Return the family's table cells. reasons: numbered from one; new ones are appended."""
        cells = []
        for part in SHARES:
            reason = self.refused.get(part)
            if reason is not None and reason not in reasons:
                reasons.append(reason)
            cells.append("✓" if reason is None else str(reasons.index(reason) + 1))
        return " | ".join(cells)


def shortened(reason: str) -> str:
    """Return a refusal's first clause without the class name, so that families can share it."""
    return re.sub(r" of [A-Z]\w+", "", reason.partition(";")[0].removesuffix("."))


def tried(family: str, folder: Path) -> Row:
    """Remove every part of a family, alone, and all together in a run that is killed. Fails on any difference."""
    refused = {}
    for part, share in SHARES.items():
        try:
            remove_alone(family, f"{part}={share}", folder / part)
        except CopruneError as error:
            refused[part] = shortened(str(error))
    # Blocks separately, since they may include the only one with heads.
    for number, kinds in enumerate([("blocks",), ("channels", "heads", "experts")]):
        parts = [f"{part}={SHARES[part]}" for part in kinds if part not in refused]
        if parts:
            kill_and_resume(family, ",".join(parts), folder / f"killed{number}")
    return Row(family, refused)


def remove_alone(family: str, remove: str, folder: Path) -> None:
    """Remove a part in memory, and require that the rest computes what the silenced model does. Raises refusals."""
    model = _model(family)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    try:
        result = coprune.prune(
            model, remove=remove, save_model=folder, **_read_by(family, folder), align=16, evaluate=False, quiet=True
        )
    except CopruneError:
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items()), family
        raise
    saved_like(model, result.model, folder, rounding=1e-5)


def _model(family: str) -> Any:
    """Return a pico model with nonzero router biases and corrections, so that a lost one would show."""
    if family in PAIRS:
        return pico_pair_model(PAIRS[family], **CHANGES[family])
    model = pico_model(family, **CHANGES.get(family, {}))
    generator = torch.Generator().manual_seed(3)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if any(part in name for part in ("correction_bias", "expert_bias", "router.bias")):
            tensor.data += torch.rand(tensor.shape, generator=generator)
    return model


def _read_by(family: str, folder: Path) -> dict[str, Any]:
    """Return a family's data and processor. folder: a folder beside which data may be written."""
    if family not in PAIRS:
        return {"dataset": _IDS}
    folder.parent.mkdir(exist_ok=True)
    hears = family == "whisper"
    dataset = write_recordings(folder.with_suffix(".heard")) if hears else write_words(folder.with_suffix(".txt"))
    return {"dataset": dataset, "processor": pico_processor(PAIRS[family]), "nsamples": 4, "seqlen": 16}


def kill_and_resume(family: str, remove: str, folder: Path, **settings: Any) -> None:
    """Kill a run in the middle, resume it, and require the bytes of an undisturbed run."""
    read = _read_by(family, folder / "read") if family in PAIRS else {}
    processor, dataset = read.get("processor"), read.get("dataset")
    own = settings if dataset is None else settings | {"dataset": str(dataset)}
    kill_and_resume_model(_model(family), remove, folder, processor, **own)


def kill_and_resume_model(model: Any, remove: str, folder: Path, processor: Any = None, **settings: Any) -> None:
    """The same for a model. processor: if it is not the tokenizer of words."""
    blocks = len(find_blocks(model))
    save(model, folder / "model")
    if processor is not None:
        processor.save_pretrained(folder / "model")
    write_words(folder / "words.txt")
    data = {"model": str(folder / "model"), "dataset": str(folder / "words.txt"), "evaluate": False}

    def run(out: str) -> None:
        places = {"save": str(folder / out / "run"), "save_model": str(folder / out / "small")}
        sizes = {"remove": remove, "align": 16, "nsamples": 4, "seqlen": 16}
        run_recipe(make_recipe(data | places | sizes | settings), reporter=Reporter(quiet=True))

    def finished() -> list[Path]:
        return [*(folder / "killed" / ".small.partial").glob("model-*.json")]

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # forked children lose thread pools
    try:
        run("whole")
        assert killed_when(
            lambda: run("killed"), lambda: len(finished()) >= blocks // 2, ("run/output", "writer", "walk")
        )
        assert finished()
        assert not (folder / "killed" / "small").exists()
        run("killed")
    finally:
        torch.set_num_threads(threads)
    whole, found = listing(folder / "whole" / "small"), listing(folder / "killed" / "small")
    assert whole.pop("README.md")  # contains folder names
    assert found.pop("README.md")
    assert found == whole
    load_clean(folder / "killed" / "small")


def read_page() -> list[Row]:
    """Read the page's rows; empty if there is no page yet."""
    if not PAGE.is_file():
        return []
    text = PAGE.read_text(encoding="utf-8").removeprefix(_OPENING)
    table, _, numbered = text.partition("\n\n")
    reasons = [line.partition(". ")[2].replace("\\*", "*") for line in numbered.splitlines()]
    rows = []
    for line in table.splitlines():
        families, *cells = (cell.strip() for cell in line.strip("|").split("|"))
        refused = {part: reasons[int(cell) - 1] for part, cell in zip(SHARES, cells, strict=True) if cell != "✓"}
        rows += [Row(family, dict(refused)) for family in families.split(", ")]
    return sorted(rows, key=lambda row: ALL.index(row.family))


def page(rows: Sequence[Row]) -> str:
    """Return the page, in which families with the same results share a row."""
    reasons: list[str] = []
    alike: dict[str, list[str]] = {}
    for row in rows:
        alike.setdefault(row.cells(reasons), []).append(row.family)
    lines = [f"| {', '.join(families)} | {cells} |" for cells, families in alike.items()]
    numbered = [f"{number}. {reason.replace('*', chr(92) + '*')}" for number, reason in enumerate(reasons, 1)]
    return _OPENING + "\n".join([*lines, "", *numbered]) + "\n"


def main(families: Sequence[str]) -> int:
    """Try the families; return 1 if something is wrong."""
    rows, wrong = {row.family: row for row in read_page()}, []
    for family in families or ALL:
        with tempfile.TemporaryDirectory() as folder:
            try:
                rows[family] = tried(family, Path(folder))
            except Exception as error:
                wrong.append(family)
                print(f"{family}: WRONG: {type(error).__name__}: {str(error)[:300]}", flush=True)
                continue
        print(f"{family}: {rows[family].refused or 'all'}", flush=True)
        PAGE.write_text(page([rows[one] for one in ALL if one in rows]), encoding="utf-8")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
