"""Command-line options made from settings: one per field, named like it, with the field's description as help.

Options that no command knows are fields of the method.
"""

from __future__ import annotations

import ast
import inspect
import re
import sys
import typing
from collections.abc import Callable, Mapping
from functools import cache
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any

import typer
from pydantic import BaseModel, BeforeValidator
from pydantic.fields import FieldInfo

from coprune.base.errors import BadInput, unknown_name
from coprune.commands.command_table import option_of_another
from coprune.commands.grouped import UNGROUPED, GroupedCommand
from coprune.recipe.choice import Choice, read_scalar
from coprune.recipe.flags import flags_of
from coprune.recipe.flat import TRAIN
from coprune.recipe.parts import is_common
from coprune.recipe.presets import preset_settings
from coprune.recipe.recipe import DEFAULTS
from coprune.recipe.tree import DETAILS, FIELDS, HEADS, LEAVES
from coprune.recipe.views import INSPECTING, MEASURING, TRAINING, Setting

Command = Callable[..., None]
_NOT_OPTIONS = ("model", "options")
_METHODS = "coprune.pruning.methods"
_HELP_ALL = "help_all"
_FEW = 6
_EACH = "<str>"
"""How help shows a value of an option that may be repeated."""
_NAMED_TWICE = ("model_option", "use_variant")
"""Options that repeat another under a second name."""
_COMMON_IN_TRAINING = ("finetune_tokens", "finetune_lr", "finetune_teacher", "finetune_only")
"""Settings that the short help of a training shows in addition to those of a pruning run."""
_TITLES_OF_TRAINING = {"Calibration": "The data", "What is pruned, and how": "Fine-tuning"}
_TITLES_OF_MEASURING = {"Calibration": "Measuring"}
"""Titles of option groups in commands that prune nothing."""
_SHORT_TITLES = {
    "The model": UNGROUPED,
    "What is removed as a whole (--remove)": "What is pruned, and how",
    "What the models write": "Measuring",
}
"""Groups whose few common options join another group in the short help."""


class ShortCommand(GroupedCommand):
    """A command whose `--help` fits one screen; `--help-all` shows every option in full."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the common options in a few words each, or all of them in full."""
        if ctx.meta.get(_HELP_ALL):
            super().format_options(ctx, formatter)
            return
        groups: dict[str, list[tuple[str, str]]] = {}
        for title, rows in self.groups(ctx, self.is_shown_short).items():
            groups.setdefault(_SHORT_TITLES.get(title, title), []).extend(rows)
        for title, rows in groups.items():
            rows.sort(key=lambda row: "--help" in row[0])  # these come last
            with formatter.section(title):
                formatter.write_dl([(names, _in_few_words(told)) for names, told in rows])

    def is_shown_short(self, name: str) -> bool:
        """Return whether the short help shows a parameter; those outside a recipe are always shown."""
        return name not in (*_NAMED_TWICE, TRAIN) and (name not in FIELDS or is_common(FIELDS[name]))


class TrainingCommand(ShortCommand):
    """A `ShortCommand` that trains without pruning, where settings have other names."""

    def is_shown_short(self, name: str) -> bool:
        """Return whether the short help shows a parameter."""
        word = TRAINING[name].word if name in TRAINING else None
        common = word is None or word in _COMMON_IN_TRAINING or is_common(FIELDS[word])
        return name not in _NAMED_TWICE and common


class MeasuringCommand(ShortCommand):
    """A `ShortCommand` that measures without pruning, where settings have other names."""

    def is_shown_short(self, name: str) -> bool:
        """Return whether the short help shows a parameter."""
        word = MEASURING[name].word if name in MEASURING else None
        return name not in _NAMED_TWICE and (word is None or (word in FIELDS and is_common(FIELDS[word])))


def _apart(told: str) -> tuple[str, str | None]:
    """Split a help text from the default in brackets at its end."""
    found = re.fullmatch(r"(.*) \[([^\[\]]*)\]", told, re.DOTALL)
    return (found[1], found[2]) if found else (told, None)


def _in_few_words(told: str) -> str:
    """Return the first statement of a help text, with the default in brackets."""
    said, default = _apart(told)
    first = re.split(r"\. |; | \(", said, maxsplit=1)[0].removesuffix(".")
    return first if default is None else f"{first} [{default}]"


def _show_all(context: typer.Context, asked: bool | None) -> None:
    if asked:
        context.meta[_HELP_ALL] = True
        typer.echo(context.get_help())
        raise typer.Exit


def help_all_option() -> inspect.Parameter:
    """Return the option of a `ShortCommand` that shows all the others."""
    told = "Show every option, in full, and exit."
    option = typer.Option("--help-all", is_eager=True, callback=_show_all, show_default=False, help=told)
    keyword = inspect.Parameter.KEYWORD_ONLY
    return inspect.Parameter(_HELP_ALL, keyword, default=None, annotation=Annotated[bool | None, option])


def recipe_options(preset: str | None = None) -> list[inspect.Parameter]:
    """Return one command-line option per setting of a recipe. preset: the default when nothing says how to prune."""
    usual = {} if preset is None else {word: (preset, value) for word, value in preset_settings(preset).items()}
    return [_option(name, Setting(name), [], usual=usual.get(name)) for name in FIELDS if name not in _NOT_OPTIONS]


def training_options() -> list[inspect.Parameter]:
    """Return one command-line option per setting of a training."""
    asked = {name: setting for name, setting in TRAINING.items() if name not in _NOT_OPTIONS}
    return [
        _option(name, setting, flags_of(name, in_training=True), _TITLES_OF_TRAINING) for name, setting in asked.items()
    ]


def inspecting_options() -> list[inspect.Parameter]:
    """Return the options of a recipe that determine what would be pruned."""
    return [_option(name, setting, []) for name, setting in INSPECTING.items()]


def measuring_options() -> list[inspect.Parameter]:
    """Return one command-line option per setting of a measurement, with the recipe's flags as well."""
    return [
        _option(name, setting, list(dict.fromkeys([*flags_of(name), *flags_of(setting.word)])), _TITLES_OF_MEASURING)
        for name, setting in MEASURING.items()
    ]


def _option(
    name: str,
    setting: Setting,
    flags: list[str],
    titles: Mapping[str, str] = MappingProxyType({}),
    usual: tuple[str, Any] | None = None,
) -> inspect.Parameter:
    """Return the option of a setting.

    Args:
        name: of the parameter; its usual flags are used if `flags` is empty.
        setting: the recipe's setting.
        flags: the option's own.
        titles: group titles that replace those of the parts.
        usual: the default preset, with its value of the setting.
    """
    leaf, default = LEAVES[setting.word], DEFAULTS[setting.word]
    field, several = leaf.field, default == ()
    is_text = field.annotation in (Choice, Choice | None) or _is_read_otherwise(field)
    kind: Any = list[str] if several else str if is_text or setting.word in HEADS else field.annotation
    told, details = setting.description or str(field.description), HEADS.get(name, {}) if not flags else {}
    if details:
        most = [detail.removeprefix(leaf.part.prefix) for detail in dict.fromkeys(details.values())][:_FEW]
        command = "finetune" if leaf.path[0] == "train" else "eval"
        more = f" … (coprune {command} --help-all)" if len(details) > _FEW else ""
        said, own_default = _apart(told)
        told = f"{said} Options behind a colon: {', '.join(most)}{more}."
        told += "" if own_default is None else f" [{own_default}]"
    # None means "not typed", so that a recipe file's value is only replaced by what was typed.
    option = typer.Option(
        *flags or flags_of(name),
        help=_with_default(told, default, usual),
        metavar=_EACH if several else None,
        show_default=False,
        rich_help_panel=titles.get(leaf.part.title, leaf.part.title),
        hidden=not flags and setting.word in DETAILS and not is_common(field),
    )
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind | None, option]
    )


def settings_options(settings: type[BaseModel]) -> list[inspect.Parameter]:
    """Return one command-line option per setting of a command that has no recipe."""
    found = []
    for name, field in settings.model_fields.items():
        several, default = typing.get_origin(field.annotation) is tuple, field.default
        kind: Any = list[str] if several else str if _is_read_otherwise(field) else field.annotation
        told = _with_default(str(field.description), default, None)
        option = typer.Option(*flags_of(name), help=told, metavar=_EACH if several else None, show_default=False)
        keyword = inspect.Parameter.KEYWORD_ONLY
        found.append(inspect.Parameter(name, keyword, default=None, annotation=Annotated[kind | None, option]))
    return found


def _with_default(told: str, default: Any, usual: tuple[str, Any] | None) -> str:
    """Return a help text that ends with the default; a preset's default comes first."""
    told, said = _apart(told)
    # 0 equals False, but is a default to show.
    if said is None and default is not None and default is not False and default != ():
        said = _shown(default)
    if usual is not None:
        preset, value = usual
        said = f"{_shown(value)} by preset {preset}, else {said or _shown(default)}"
    return told if said is None else f"{told} [{said}]"


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    return (
        (" ".join(map(str, value)) or "none") if isinstance(value, tuple) else "none" if value is None else str(value)
    )


def _is_read_otherwise(field: FieldInfo) -> bool:
    """Return whether the recipe also accepts another form of the number, such as 50%."""
    own = [note for note in field.metadata if isinstance(note, BeforeValidator)]
    return field.annotation in (float, float | None) and bool(own)


def with_options(options: list[inspect.Parameter]) -> Callable[[Command], Command]:
    """Replace a command's `**settings` with options."""

    def decorate(function: Command) -> Command:
        own = [p for p in inspect.signature(function, eval_str=True).parameters.values() if p.kind is not p.VAR_KEYWORD]
        parameters = [*own, *options]
        function.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        function.__annotations__ = {p.name: p.annotation for p in parameters}
        return function

    return decorate


def method_options(arguments: list[str], command: str) -> dict[str, Any]:
    """Parse `--block-size 64` or `--block-size=64` as options of the method. command: the command that was typed.

    Raises BadInput for an option that no method has, naming the closest option.
    """
    if not arguments:
        return {}
    found: dict[str, Any] = {}
    rest = list(arguments)
    while rest:
        flag = rest.pop(0)
        if not flag.startswith("--"):
            raise BadInput(f"unexpected argument {flag!r}", value=flag, fix="options begin with --")
        written, has_value, value = flag.partition("=")
        name = written[2:].replace("-", "_")
        if not _is_methods_option(name):
            if (other := option_of_another(written, command)) is not None:
                raise other
            flags = [option for parameter in recipe_options() for option in _flags(parameter)]
            flags += ["--model", "--recipe", "--preset", "--use-variant", "--quiet"]
            raise unknown_name(
                "option", written, [*flags, *(f"--{own.replace('_', '-')}" for own in _methods_options())]
            )
        if not has_value:
            if not rest or rest[0].startswith("--"):
                raise BadInput(f"the option {written} needs a value")
            value = rest.pop(0)
        found[name] = read_scalar(value)
    return found


def _is_methods_option(name: str) -> bool:
    if _needs_methods():
        from coprune.pruning.methods import is_option

        return is_option(name)
    return name in options_in_source()


def _methods_options() -> set[str]:
    if _needs_methods():
        from coprune.pruning.methods import option_names

        return option_names()
    return options_in_source()


def _needs_methods() -> bool:
    """Return whether listing options requires importing the methods (and torch): if other packages register some."""
    return _METHODS in sys.modules or bool(entry_points(group="coprune.methods"))


@cache
def options_in_source() -> set[str]:
    """Return the option names of coprune's own methods: the fields of the classes in their source files."""
    spec = find_spec(_METHODS.rpartition(".")[0])
    folders = [Path(path) / "methods" for path in (spec.submodule_search_locations or [])] if spec else []
    parsed = [ast.parse(file.read_bytes()) for folder in folders for file in folder.glob("*.py")]
    classes = [node for tree in parsed for node in tree.body if isinstance(node, ast.ClassDef) and node.decorator_list]
    fields = [node for one in classes for node in one.body if isinstance(node, ast.AnnAssign)]
    return {
        field.target.id
        for field in fields
        if isinstance(field.target, ast.Name) and not ast.unparse(field.annotation).startswith("ClassVar")
    }


def _flags(parameter: inspect.Parameter) -> list[str]:
    option = parameter.annotation.__metadata__[0]
    # Within Annotated, typer stores the first name as the default.
    return [flag for name in (option.default, *option.param_decls) for flag in name.split("/") if flag.startswith("--")]
