"""Expand a sweep into its runs: every combination of its lists, each with its own folder."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from string import Formatter
from typing import Any

from coprune.base.environment import expand_home
from coprune.base.errors import BadInput
from coprune.recipe.choice import Choice
from coprune.recipe.flags import ALIASES
from coprune.recipe.flat import PRESET
from coprune.recipe.recipe import DEFAULTS, Recipe, make_recipe
from coprune.run.step import NamedStep, step_named
from coprune.store.store import key_of
from coprune.sweeps.file import FOLDERS, SHARED_FOLDER, Sweep, added_to, is_axis, require_few

Settings = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """A run of a sweep. name: its folder within the sweep's; preset: the preset of its settings, if any."""

    name: str
    recipe: Recipe
    preset: str | None = None
    steps: tuple[NamedStep, ...] = ()
    """Steps that make its model, in order."""
    made_of: str = ""
    """Model that the first step starts from."""
    of_steps: Mapping[str, Any] = field(default_factory=dict)
    """Settings of the steps, by their names in the sweep."""

    @property
    def model(self) -> str:
        """Model that the run starts from, before its steps."""
        return self.made_of or self.recipe.model.name

    def setting(self, name: str) -> Any:
        """Return a setting of the recipe or of a step."""
        return self.of_steps[name] if name in self.of_steps else self.recipe.setting(name)

    @property
    def way(self) -> str:
        """Label in tables: its method, or its preset with the method."""
        method = self.recipe.prune.method.name
        return method if self.preset is None else f"{self.preset} ({method})"


def expand(sweep: Sweep) -> list[Run]:
    """List a sweep's runs in the order of its file, without duplicates.

    Raises BadInput if a run is invalid, two different runs share a folder, or an exclusion matches nothing.
    """
    combinations = list(_combinations(sweep.settings, sweep.zip))
    used = [any(_matches(combination, entry) for combination in combinations) for entry in sweep.exclude]
    if not all(used):
        raise BadInput(
            f"exclude {sweep.exclude[used.index(False)]} matches no run",
            field="sweep.exclude",
            fix="correct it or leave it out",
        )
    chosen = [c for c in combinations if not any(_matches(c, entry) for entry in sweep.exclude)]
    for entry in sweep.include:
        chosen += _combinations(added_to(sweep.settings, entry), sweep.zip)
        require_few([len(chosen)])
    if not chosen:
        raise BadInput("every run of the sweep is excluded", field="sweep.exclude")
    chains = list(_chains(sweep.steps))
    require_few([len(chosen), len(chains)])
    runs, models = dict[str, Run](), _model_parts(sweep)
    for chain, combination in product(chains, chosen):
        run = _run(sweep, combination, models, chain)
        if run.name in runs and runs[run.name].recipe != run.recipe:
            raise BadInput(
                f"two different runs would go to {sweep.folder / run.name}",
                field="sweep.folders",
                value=sweep.folders,
                fix="distinguish them in sweep.folders, for example "
                f"{'/'.join('{' + name + '}' for name in varied(sweep))!r}",
            )
        runs[run.name] = run
    return list(runs.values())


def varied(sweep: Sweep) -> list[str]:
    """Return the fields in which a sweep's runs may differ: those of its steps, then the others in the order of the file."""
    return [*(name for name, values in _of_steps(sweep.steps).items() if len(values) > 1), *_varied(sweep)]


def _varied(sweep: Sweep) -> list[str]:
    added = [name for entry in sweep.include for name in entry]
    return list(dict.fromkeys([*_axes(sweep.settings), *added]))


def _of_steps(steps: Sequence[Mapping[str, Settings]]) -> dict[str, list[Any]]:
    """Return the values of all settings of steps, by names such as `merge_share`; `merge2_share` if a step occurs twice."""
    found, turns = dict[str, list[Any]](), Counter[str]()
    for name, asked in ((name, asked) for step in steps for name, asked in step.items()):
        turns[name] += 1
        word = name if turns[name] == 1 else f"{name}{turns[name]}"
        found |= {f"{word}_{one}": value if isinstance(value, list) else [value] for one, value in asked.items()}
    return found


def _chains(steps: Sequence[Mapping[str, Settings]]) -> Iterator[Settings]:
    """Yield every combination of the settings of steps, by their names in a sweep."""
    lists = _of_steps(steps)
    require_few(map(len, lists.values()))
    yield from (dict(zip(lists, values, strict=True)) for values in product(*lists.values()))


def _made_by(sweep: Sweep, chain: Settings, model: str) -> tuple[NamedStep, ...]:
    """Return the steps that make a run's model, in folders named by a hash of all settings so far, so that runs share them."""
    made, before, values = list[NamedStep](), model, iter(chain.values())
    for name, asked in ((name, asked) for step in sweep.steps for name, asked in step.items()):
        own = dict(zip(asked, values, strict=False))
        before = str(key_of(name, 1, asked=own, before=before))
        made.append(step_named(name, own, sweep.folder / SHARED_FOLDER / "steps" / before))
    return tuple(made)


def _axes(settings: Mapping[str, Any]) -> list[str]:
    return [name for name, value in settings.items() if is_axis(name, value)]


def _combinations(settings: Settings, groups: Sequence[Sequence[str]]) -> Iterator[Settings]:
    axes = {name: settings[name] for name in _axes(settings)}
    together = {name: tuple(other for other in group if other in axes) for group in groups for name in group}
    # Each factor is a list of settings; the position of a group is that of its first field.
    factors: list[list[Settings]] = []
    for name in axes:
        members = together.get(name, (name,))
        if members[0] == name:
            factors.append(_in_step({member: axes[member] for member in members}))
    require_few(len(factor) for factor in factors)
    for parts in product(*factors):
        combination = dict(settings)
        for part in parts:
            combination |= part
        yield combination


def _in_step(lists: Mapping[str, Sequence[Any]]) -> list[Settings]:
    """Combine lists of equal length element by element. Raises BadInput if the lengths differ."""
    if len({len(values) for values in lists.values()}) > 1:
        told = ", ".join(f"{name} has {len(values)}" for name, values in lists.items())
        raise BadInput(f"zipped lists must have the same length: {told}", field="sweep.include")
    return [dict(zip(lists, values, strict=True)) for values in zip(*lists.values(), strict=True)]


def _matches(combination: Mapping[str, Any], entry: Mapping[str, Any]) -> bool:
    return all(
        combination.get(name, DEFAULTS.get(name)) in (wanted if is_axis(name, wanted) else [wanted])
        for name, wanted in entry.items()
    )


def _run(sweep: Sweep, combination: Settings, models: Mapping[str, str], chain: Settings) -> Run:
    elsewhere: Settings = dict.fromkeys(FOLDERS)
    try:
        plain = make_recipe({**combination, **elsewhere})
        model = models[plain.model.name]
        own, also = sweep.folders, {"model": model, PRESET: folder_part(PRESET, combination.get(PRESET), bare=True)}
        also |= {field: _part_of_step(field, value, bare=True) for field, value in chain.items()}
        name = _default_folder(sweep, combination, model, chain) if own is None else _folder(own, plain, also)
        places = {field: expand_home(combination[field]) / name for field in FOLDERS if combination.get(field)}
        places["save"] = sweep.folder / (name or plain.prune.method.name)
        steps = _made_by(sweep, chain, plain.model.name)
        made = {"model": str(steps[-1].model)} if steps else {}
        recipe = make_recipe({**combination, **elsewhere, **places, **made})
        return Run(name or plain.prune.method.name, recipe, combination.get(PRESET), steps, plain.model.name, chain)
    except BadInput as error:
        told = ", ".join(f"{field} {(combination | chain).get(field)}" for field in varied(sweep))
        raise (error.within(f"the run with {told}") if told else error) from None


def _part_of_step(field: str, value: Any, bare: bool = False) -> str:
    return folder_part(field, Path(value).name if isinstance(value, str) else value, bare)


def _default_folder(sweep: Sweep, combination: Settings, model: str, chain: Settings) -> str:
    """Return one path part per axis; other settings of included runs are appended, so that the other runs keep their names."""
    axes = _axes(sweep.settings)

    def part(field: str) -> str:
        return model if field == "model" else folder_part(field, combination.get(field))

    of_steps = [_part_of_step(name, chain[name]) for name in varied(sweep) if name in chain]
    changed = [n for n in _varied(sweep) if n not in axes and combination.get(n) != sweep.settings.get(n)]
    return "_".join(["/".join([*of_steps, *map(part, axes)]), *map(part, changed)]).strip("_")


def _model_parts(sweep: Sweep) -> dict[str, str]:
    """Return a short, unique path part for each model: as many last parts of its name as needed."""
    named = [values["model"] for values in (sweep.settings, *sweep.include) if "model" in values]
    found: dict[str, str] = {}
    for model in (str(one) for value in named for one in (value if isinstance(value, list) else [value])):
        parts, others = Path(model).parts, set(found.values())
        ends = [folder_part("model", "-".join(parts[at:])) for at in reversed(range(len(parts)))]
        if model not in found:
            found[model] = next((end for end in ends if end not in others), folder_part("model", model))
    return found


def _folder(template: str, recipe: Recipe, also: Mapping[str, str]) -> str:
    known = {name: folder_part(name, value, bare=True) for name, value in recipe.flat().items()}
    known |= {"sparsity": f"{recipe.prune.ratio:g}", **also}
    try:
        # Plain fields only: widths (`{method:>1000000000}`) and attributes are refused.
        if any(spec or conversion for _, _, spec, conversion in Formatter().parse(template)):
            raise ValueError(template)
        name = template.format_map(known | {alias: known[word] for alias, word in ALIASES.items()})
    except (KeyError, ValueError, IndexError, AttributeError):
        raise BadInput(
            f"sweep.folders {template!r} is not a pattern of recipe fields, such as '{{pattern}}/{{method}}'",
            field="sweep.folders",
            value=template,
        ) from None
    if any(part in ("", ".", "..") for part in name.split("/")):
        raise BadInput(
            f"sweep.folders {template!r} gives {name!r}, which is not a folder within the sweep's",
            field="sweep.folders",
            value=template,
        )
    return name


def folder_part(field: str, value: Any, bare: bool = False) -> str:
    """Return a field's value as part of a path: `wanda`, `2-4`, `seed-0`. bare: without the field's name."""
    if value is None:
        return "default"
    if isinstance(value, dict) and "name" in value:
        shown = str(Choice.of(value))
    elif isinstance(value, dict):
        shown = "_".join(f"{name}-{one}" for name, one in value.items()) or "default"
    elif isinstance(value, list | tuple):
        shown = "+".join(str(Choice.of(one)) if isinstance(one, dict) else str(one) for one in value) or "none"
    else:
        shown = f"{value:g}" if isinstance(value, float) else str(value)
    if field == "model":
        shown = Path(shown).name.removesuffix(".gguf")
    plain = re.sub(r"[^\w.+=-]+", "-", shown).strip("-.") or "none"
    return plain if bare or field in ("model", "method", "pattern", "options", PRESET) else f"{field}-{plain}"
