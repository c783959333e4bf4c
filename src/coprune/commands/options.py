"""Command-line options made from settings: one per field, named like it, with the field's description as help.

Options that no command knows are the method's own, whose fields they are.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Annotated, Any

import typer
from pydantic.fields import FieldInfo

from coprune.base.errors import BadInput, unknown_name
from coprune.recipe.choice import Choice
from coprune.recipe.flags import flags_of
from coprune.recipe.flat import FLAT, place_of
from coprune.recipe.grammar import read_scalar
from coprune.recipe.measuring import SETTINGS
from coprune.recipe.recipe import DEFAULTS, FIELDS
from coprune.recipe.retired import retired
from coprune.training.settings import FinetuneSettings

Command = Callable[..., None]
_NOT_OPTIONS = ("model", "options")
_TITLES = {
    "model": "The model",
    "method": "What is pruned, and how",
    "pattern": "What is pruned, and how",
    "selection": "What is pruned, and how",
    "allocation": "What is pruned, and how",
    "refine": "What is pruned, and how",
    "low_rank": "What is pruned, and how",
    "reconstruction": "What is pruned, and how",
    "structure": "What is removed as a whole (--remove)",
    "calibration": "Calibration",
    "finetune": "Fine-tuning",
    "evaluation": "Measuring",
    "answers": "What the models write",
    "output": "Where it goes",
}
"""What the options of a recipe's parts are called together."""
# A fine-tuning's settings that are called otherwise on the command line, where the word has another meaning.
_FLAGS_OF_TRAINING = {
    "seqlen": ["--seqlen", "--block-size", "--block_size"],
    "temperature": ["--distill-temperature", "--temperature"],
}
_TITLES_OF_TRAINING = {
    "The data": ("dataset", "seqlen", "max_samples", "held_out"),
    "How long": ("epochs", "max_steps", "minutes", "patience", "evaluations"),
    "Adapters (--mode lora or lora-distill)": ("rank", "alpha", "dropout", "masked"),
    "Distillation (--mode distill or lora-distill)": (
        "teacher",
        "temperature",
        "kl_weight",
        "hidden_weight",
        "text_weight",
        "top_k",
    ),
    "Measuring": ("evaluate", "eval_data", "eval_images", "eval_seqlen", "eval_tokens", "bos", "against"),
    "Where it goes": ("cache_dir", "report_to", "save", "save_model", "save_every", "overwrite"),
}


def recipe_options() -> list[inspect.Parameter]:
    """One command-line option per setting of a recipe."""
    return [_option(name, FIELDS[name], DEFAULTS[name]) for name in FIELDS if name not in _NOT_OPTIONS]


def finetune_options() -> list[inspect.Parameter]:
    """One command-line option per setting of a fine-tuning."""
    titles = {name: title for title, names in _TITLES_OF_TRAINING.items() for name in names}
    return [
        _option(
            name,
            field,
            field.default,
            _FLAGS_OF_TRAINING.get(name),
            title=titles.get(name) or (_title(name) if FLAT.get(name, "").startswith("answers.") else "The training"),
        )
        for name, field in FinetuneSettings.model_fields.items()
        if name not in _NOT_OPTIONS
    ]


def _title(setting: str) -> str | None:
    return _TITLES[place_of(setting)[0]] if setting in FLAT else None


_INSPECTED: dict[str, str | None] = {
    **dict.fromkeys(("sparsity", "pattern", "include", "exclude", "allocation", "dataset")),
    "nsamples": "Calibration samples for a drawing, or for an allocation that takes a pass over data. [16]",
    **dict.fromkeys(("seqlen", "cache_dir")),
}


def inspecting_options() -> list[inspect.Parameter]:
    """The options of a recipe that say what would be pruned."""
    return [
        _option(name, FIELDS[name], DEFAULTS[name] if description is None else None, None, description)
        for name, description in _INSPECTED.items()
    ]


def measuring_options() -> list[inspect.Parameter]:
    """One command-line option per setting of a measurement, which goes by the recipe's flags too."""
    made = []
    for name, (word, description) in SETTINGS.items():
        flags = list(dict.fromkeys([*flags_of(name), *flags_of(word)]))
        default = None if description is not None else DEFAULTS[word]
        made.append(_option(name, FIELDS[word], default, flags, description, _title(word)))
    return made


def _option(
    name: str,
    field: FieldInfo,
    default: Any,
    flags: list[str] | None = None,
    description: str | None = None,
    title: str | None = None,
) -> inspect.Parameter:
    """The option of one setting, with its description and its default as help. title: of its group, if not the recipe's."""
    several = default == ()
    kind: Any = list[str] if several else str if field.annotation in (Choice, Choice | None) else field.annotation
    # None means "not typed", so that a recipe file's value is only replaced by what was typed.
    # 0 equals False, and is a default to be shown.
    shown = "" if default is None or default is False or several else " [on]" if default is True else f" [{default}]"
    option = typer.Option(
        *flags or flags_of(name),
        help=f"{description or field.description}{shown}",
        show_default=False,
        rich_help_panel=title or _title(name),
    )
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind | None, option]
    )


def with_options(options: list[inspect.Parameter]) -> Callable[[Command], Command]:
    """Give a command options in place of its `**settings`."""

    def decorate(function: Command) -> Command:
        own = [p for p in inspect.signature(function, eval_str=True).parameters.values() if p.kind is not p.VAR_KEYWORD]
        parameters = [*own, *options]
        function.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        function.__annotations__ = {p.name: p.annotation for p in parameters}
        return function

    return decorate


def method_options(arguments: list[str]) -> dict[str, Any]:
    """Read `--block-size 64` or `--block-size=64` as an option of the method.

    Raises BadInput for an option that is no method's, with the nearest of all options, and for one that was retired.
    """
    if not arguments:
        return {}
    from coprune.pruning.methods import is_option, option_names

    found: dict[str, Any] = {}
    rest = list(arguments)
    while rest:
        flag = rest.pop(0)
        if not flag.startswith("--"):
            raise BadInput(f"unexpected argument {flag!r}", value=flag, fix="options begin with --")
        written, has_value, value = flag.partition("=")
        name = written[2:].replace("-", "_")
        if not is_option(name):
            if (gone := retired(written)) is not None:
                raise gone
            flags = [option for parameter in recipe_options() for option in _flags(parameter)]
            flags += ["--model", "--recipe", "--preset", "--use-variant", "--quiet"]
            raise unknown_name(
                "option", written, [*flags, *(f"--{other.replace('_', '-')}" for other in option_names())]
            )
        if not has_value:
            if not rest or rest[0].startswith("--"):
                raise BadInput(f"the option {written} needs a value")
            value = rest.pop(0)
        found[name] = read_scalar(value)
    return found


def _flags(parameter: inspect.Parameter) -> list[str]:
    option = parameter.annotation.__metadata__[0]
    # Within Annotated, typer keeps the first name where a default would be.
    return [flag for name in (option.default, *option.param_decls) for flag in name.split("/") if flag.startswith("--")]
