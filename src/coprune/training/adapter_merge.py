"""Merge adapters into the model that they were trained on, from folder to folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from coprune.base.environment import expand_home
from coprune.base.errors import BadInput
from coprune.base.markdown import inline
from coprune.base.progress import Reporter
from coprune.base.words import Sheet, Shown, per_cent
from coprune.evaluation.tasks import task_for
from coprune.model.checkpoint.companions import Companions
from coprune.model.checkpoint.load import dtype_name, load_model
from coprune.model.checkpoint.locate import locate
from coprune.model.checkpoint.writer import refuse_occupied
from coprune.model.loaded_model import Loaded, in_memory
from coprune.recipe.recipe import make_recipe
from coprune.training.adapters import merge_adapter, read_adapter_config
from coprune.training.masks import masks_of
from coprune.training.saving import save_model


@dataclass(frozen=True, repr=False)
class Merged(Shown):
    """A model with an adapter merged into it."""

    folder: Path
    sparsity: float
    """Fraction of zeros in the pruned matrices, as before."""
    matrices: int
    """Number of these matrices."""

    def headline(self) -> str:
        """Return the model's folder and its sparsity."""
        return f"{self.folder}: {per_cent(self.sparsity)} zeros in {self.matrices} matrices"

    def sheet(self) -> Sheet:
        """Return the model's folder and its kept zeros."""
        zeros = f"{per_cent(self.sparsity)} zeros in {self.matrices} matrices, every zero kept"
        return Sheet(self.headline(), [("model in", f"{self.folder} ({zeros})")])


def merge(model: str | Path, adapter: str | Path, output: str | Path, *, quiet: bool = False) -> Merged:
    """Merge a masked adapter into its pruned model, save the result, and verify that every zero was kept.

    Args:
        model: the pruned model that the adapter was trained on.
        adapter: the adapter's folder.
        output: a folder that does not exist or is empty.
        quiet: print no messages on standard error.

    Returns:
        The folder of the model, and its zeros.

    Raises:
        BadInput: the adapter is a plain one or belongs to another model, or the output folder is not empty.
        BrokenMask: a pruned weight would no longer be zero.
        VerificationError: the saved model differs from the one in memory.
    """
    if not isinstance(model, str | Path):
        held = f"merging reads a model from its folder, and this is a {type(model).__name__} in memory"
        raise BadInput(held, field="model", fix="save it and pass the folder")
    name, adapter, output = str(model), expand_home(adapter), expand_home(output)
    refuse_occupied(output)
    read_adapter_config(adapter)  # fails before the model is loaded if there is no adapter
    reporter = Reporter(quiet)
    with reporter.libraries():
        location = locate(name)
    pruned, processor = load_model(location, "auto")
    loaded = Loaded(in_memory(pruned, location), processor, name, False)
    probe = task_for(make_recipe({"model": name, "seqlen": 8}), loaded).inputs.probe(None, {})
    masks = masks_of(pruned, location.path)
    reporter.say(f"Merging {adapter} into {name}")
    merged = merge_adapter(pruned, masks, adapter)
    card = f"# {inline(Path(name).name)} with the masked adapter {inline(adapter.name)} merged\n"
    beside = Companions(processor, dtype_name(merged.dtype), name, location)
    save_model(merged, masks, beside, card, output, probe)
    return Merged(output, masks.sparsity, len(masks.matrices))
