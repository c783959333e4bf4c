"""Settings that are gone, since no measurement spoke for them (LOG.md has the figures), and what to use instead.

Nothing heavy is imported here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from coprune.base.errors import BadInput
from coprune.base.words import Command, LeaveOut, Set, Setting, Words, parts_of


@dataclass(frozen=True)
class Retired:
    """A setting that is gone."""

    place: str | None
    """Path in a recipe; None if it was not in one."""
    default: Any
    """Former default, which old recipes hold and which means the same as leaving it out."""
    instead: Words
    """Replacement."""
    moved: str | None = None
    """Place of the setting that takes its other values, as in recipes of earlier versions."""


def _of_training(field: str, default: Any, instead: Words = "", moved: str | None = None) -> tuple[str, Retired]:
    word = f"finetune_{field}"
    fix = instead if moved else (LeaveOut(word), *((": ", *parts_of(instead)) if instead else ()))
    return word, Retired(f"train.{field}", default, fix, moved)


RETIRED: dict[str, Retired] = {
    "reconstruct_window": Retired(
        "prune.reconstruct.window", 1, ("train each block for longer: ", Set("reconstruct", 12))
    ),
    "reconstruct_parts": Retired("prune.reconstruct.parts", "together", LeaveOut("reconstruct_parts")),
    "reconstruct_rates": Retired("prune.reconstruct.rates", "relative", LeaveOut("reconstruct_rates")),
    "target": Retired("calibrate.aim", "pruned", ("train what is left of each block instead: ", Set("reconstruct", 6))),
    "quantize": Retired(
        "quantization.grid",
        None,
        (
            LeaveOut("quantize"),
            ", and store the model in 8 bits: ",
            Command("export", "FOLDER", "OUT.gguf", Set("type", "q8_0")),
        ),
    ),
    "move_zeros": Retired(
        None, None, (LeaveOut("move_zeros"), ": as long a training with every zero kept comes nearer")
    ),
    "low_rank": Retired(
        "prune.low_rank.rank", 0, ("more is gained without bytes by training what is left: ", Set("preset", "best"))
    ),
    "low_rank_rounds": Retired("prune.low_rank.rounds", 8, LeaveOut("low_rank_rounds")),
    "generate_seed": Retired("evaluate.answers.seed", 0, LeaveOut("generate_seed")),
    "vocabulary_languages": Retired(
        "remove.vocabulary_languages",
        (),
        ("name languages beside texts: ", Set("vocabulary_text", "en,de,code")),
        "remove.vocabulary_text",
    ),
    "align_experts": Retired("remove.align_experts", None, ("say how many stay: ", Set("remove", "experts=keep:96"))),
    **dict(
        [
            _of_training("max_samples", None, ("a training ends with ", Set("finetune_tokens", ...))),
            _of_training("scope", "all", ("write ", Set("finetune_only", "blocks")), "train.only"),
            _of_training("against", None, ("name the dense model with ", Setting("finetune_teacher")), "train.teacher"),
            _of_training("schedule", "linear", "the rate falls linearly"),
            _of_training("warmup", 0.03),
            _of_training("optimizer", "adamw", ("adapters take less memory, ", Set("finetune", "lora"))),
            _of_training("weight_decay", 0.0),
            _of_training("max_grad_norm", 1.0),
            _of_training("evaluations", 5, ("nothing is watched with ", Set("finetune_held_out", 0))),
            _of_training("patience", None, "the rate has come down where a training ends"),
            _of_training("dropout", 0.0),
            _of_training("temperature", None),
            _of_training("kl_weight", 1.0),
            _of_training("hidden_weight", None),
            _of_training("text_weight", 0.0),
            _of_training("top_k", None, ("adapters take less memory, ", Set("finetune", "lora-distill"))),
        ]
    ),
}
"""Retired settings by flat name."""
GONE_PARTS = {"quantization": "grid", "low_rank": "rank", "prune.low_rank": "rank"}
"""Parts of a recipe of which nothing is left, with the field that each was about."""
ALLOCATIONS = ("alpha", "error", "search")
"""Allocations of zeros; of channels and heads `error` remains."""
_WORDS = {one.place: word for word, one in RETIRED.items() if one.place is not None}


def retired(name: str) -> BadInput | None:
    """Return the error for a setting that is gone; None for any other.

    name: flat, by its place, or a flag such as `--reconstruct-window`.
    """
    word = _word(name)
    return None if word is None else BadInput((Setting(word), " was retired"), field=word, fix=RETIRED[word].instead)


def passed_over(name: str, value: Any) -> bool:
    """Return whether a setting is retired and has its default, as in old recipes. Raises BadInput for other values."""
    word, error = _word(name), retired(name)
    if word is None or error is None:
        return False
    if not _is_default(word, value):
        error.value = value
        raise error
    return True


def moved_to(name: str, value: Any) -> str | None:
    """Return the place of the setting that takes a retired one's value now; None for any other, and for a default."""
    word = _word(name)
    return None if word is None or _is_default(word, value) else RETIRED[word].moved


def _is_default(word: str, value: Any) -> bool:
    default = RETIRED[word].default
    return bool(value == default or (default == () and value in ([], None)))


def retired_allocation(name: str) -> BadInput | None:
    """Return the error for an allocation that spreads zeros no more; None for any other."""
    if name not in ALLOCATIONS:
        return None
    cause = f"allocation {name} of zeros was retired"
    fix: Words = (
        "take ",
        Set("allocation", "fisher"),
        ", or ",
        Set("allocation", "owl"),
        " for a model that is streamed",
    )
    return BadInput(cause, field="allocation", value=name, fix=fix)


def _word(name: str) -> str | None:
    from coprune.recipe.tree import todays_place

    word = _WORDS.get(todays_place(name), name.removeprefix("--").replace("-", "_"))
    return word if word in RETIRED else None
