"""Command-line options made from settings: one per field, named like it, with the field's description as help.

Options that no command knows are the method's own, whose fields they are.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import suppress
from typing import Annotated, Any

import typer

from coprune.base.errors import BadInput, unknown_name
from coprune.recipe.recipe import Recipe
from coprune.training.settings import FinetuneSettings

# The seed system's names of options, and short forms. Every other option is named like its field of the recipe.
_ALIASES: dict[str, list[str]] = {
    "method": ["--method", "--prune_method", "--prune-method", "-m"],
    "sparsity": ["--sparsity", "--sparsity_ratio", "--sparsity-ratio", "-s"],
    "pattern": ["--pattern", "--sparsity_type", "--sparsity-type", "-p"],
    "cache_dir": ["--cache-dir", "--cache_dir"],
    "save_model": ["--save-model", "--save_model"],
    "eval_zero_shot": ["--eval-zero-shot", "--eval_zero_shot"],
    "num_fewshot": ["--num-fewshot", "--num_fewshot"],
    "include_path": ["--include-path", "--include_path"],
    "evaluate": ["--eval/--no-eval"],
    "evaluate_dense": ["--eval-dense/--no-eval-dense"],
    "layer_error": ["--layer-error/--no-layer-error"],
    "stream": ["--stream/--no-stream"],
    "check_memory": ["--check-memory/--no-check-memory"],
    "masked": ["--masked/--no-masked"],
}
Command = Callable[..., None]
_NOT_OPTIONS = ("model", "options")


def flags_of(field: str) -> list[str]:
    """The names of a field's option, its own first."""
    return _ALIASES.get(field, [f"--{field.replace('_', '-')}"])


def _options_of(settings: type[Recipe] | type[FinetuneSettings]) -> list[inspect.Parameter]:
    """One command-line option per field, with the field's description as its help."""
    parameters = []
    for name, field in settings.model_fields.items():
        if name in _NOT_OPTIONS:
            continue
        flags = flags_of(name)
        kind: Any = list[str] if field.default == () else field.annotation
        # None means "not typed", so that a recipe file's value is only replaced by what was typed.
        default = "" if field.default is None or field.default == () else f" [{field.default}]"
        option = typer.Option(*flags, help=f"{field.description}{default}", show_default=False)
        annotation = Annotated[kind | None, option]
        parameters.append(inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation))
    return parameters


def with_options_of(settings: type[Recipe] | type[FinetuneSettings]) -> Callable[[Command], Command]:
    """Give a command one option per field in place of its `**settings`."""

    def decorate(function: Command) -> Command:
        own = [p for p in inspect.signature(function, eval_str=True).parameters.values() if p.kind is not p.VAR_KEYWORD]
        parameters = [*own, *_options_of(settings)]
        function.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        function.__annotations__ = {p.name: p.annotation for p in parameters}
        return function

    return decorate


def method_options(arguments: list[str]) -> dict[str, Any]:
    """Read `--block-size 64` or `--block-size=64` as an option of the method.

    Raises BadInput for an option that is no method's, with the nearest of all options.
    """
    if not arguments:
        return {}
    import dataclasses

    from coprune.pruning.methods import METHODS

    known = {f.name for method in METHODS.values() for f in dataclasses.fields(method)}
    found: dict[str, Any] = {}
    rest = list(arguments)
    while rest:
        flag = rest.pop(0)
        if not flag.startswith("--"):
            raise BadInput(f"unexpected argument {flag!r}; options begin with --.")
        written, has_value, value = flag.partition("=")
        name = written[2:].replace("-", "_")
        if name not in known:
            flags = [option for parameter in _options_of(Recipe) for option in _flags(parameter)]
            flags += ["--model", "--recipe", "--preset", "--use-variant", "--quiet"]
            raise unknown_name("option", written, [*flags, *(f"--{other.replace('_', '-')}" for other in known)])
        if not has_value:
            if not rest or rest[0].startswith("--"):
                raise BadInput(f"the option {written} needs a value.")
            value = rest.pop(0)
        found[name] = _value(value)
    return found


def _value(text: str) -> Any:
    """A whole number, a number, true or false, or else the text itself."""
    for kind in (int, float):
        with suppress(ValueError):
            return kind(text)
    return {"true": True, "false": False}.get(text.lower(), text)


def _flags(parameter: inspect.Parameter) -> list[str]:
    option = parameter.annotation.__metadata__[0]
    # Within Annotated, typer keeps the first name where a default would be.
    return [flag for name in (option.default, *option.param_decls) for flag in name.split("/") if flag.startswith("--")]
