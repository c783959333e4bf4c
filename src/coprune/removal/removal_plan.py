"""The plan of a removal: which parts, how many of each stay, and which blocks go, from the recipe's shares."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain, islice

import torch
from torch import Tensor
from transformers import PreTrainedModel

from coprune.base.errors import BadInput, UnsupportedModel
from coprune.base.memory import return_free_memory
from coprune.base.words import Set, Setting, say
from coprune.model.blocks import Block, by_list
from coprune.model.checkpoint.encoding import Encoding
from coprune.model.edit import Configure
from coprune.model.saved_slices import slices_kept
from coprune.model.walk.model_structure import ProvenModel
from coprune.recipe.choice import Choice
from coprune.recipe.size import Size
from coprune.recipe.structure import SCORES, RemovePart
from coprune.removal.block_scores import Going, Mapped, block_score_named, may_go
from coprune.removal.by_size import Counted, Mix, mixes_for, smallest, with_more_blocks
from coprune.removal.channels_and_heads import (
    Kind,
    Part,
    find_parts,
    groups_of,
    kept_count,
    read_together,
    share_of,
    step_of,
)
from coprune.removal.cuts import Plan
from coprune.removal.expert_choice import experts_left, find_experts, known_scores
from coprune.removal.maps import FoundMap, MapWalk, find_writers, spans_of
from coprune.removal.mixtures import Mixture
from coprune.removal.rehearsal import rehearse, resized_by
from coprune.removal.smaller_model import refusal_of
from coprune.run.calibrating import first_batches
from coprune.run.context import Run

_MOST_SHARES = 3
"""Number of alternative shares rehearsed when the requested share of heads is refused."""


@dataclass(frozen=True)
class Removable:
    """The parts that a run may remove, found and rehearsed before anything slow."""

    parts: Mapping[str, Sequence[Part]] = field(default_factory=dict)
    """Parts of the requested kinds, by block, over all blocks."""
    mixtures: Mapping[str, Mixture] = field(default_factory=dict)
    rehearsed: tuple[Plan, Configure] | None = None
    """The plan and its configuration change, if no blocks have to be chosen first."""
    mixes: Sequence[Mix] = ()
    """Ways to reach a target size that a run compares, the one found by counting first; none if there is no choice."""
    every: Mapping[str, Sequence[Part]] = field(default_factory=dict)
    """The parts of all kinds that the mixes may cut, by block."""

    def of_mix(self, run: Run, mix: Mix) -> Removable:
        """Return the parts that one of the mixes removes, and make its shares the run's."""
        run.sized = run.recipe.remove.with_shares(mix.shares)
        if mix is self.mixes[0]:
            return replace(self, mixes=())
        parts = {name: [part for part in own if part.kind in mix.keep] for name, own in self.every.items()}
        return Removable(parts)

    def without(self, gone: Collection[str]) -> Removable:
        """Return the removable parts without those of some blocks. gone: their names."""
        parts = {name: own for name, own in self.parts.items() if name not in gone}
        return replace(self, parts=parts, mixtures={n: own for n, own in self.mixtures.items() if n not in gone})

    def routers(self, blocks: Sequence[Block]) -> dict[str, list[Tensor]]:
        """Return the routers' matrices, by block."""
        return {
            block.name: self.mixtures[block.name].routing_matrices(block.module)
            for block in blocks
            if block.name in self.mixtures
        }


def find_removable(run: Run) -> Removable:
    """Find the removable parts of a recipe's shares. Raises BadInput and UnsupportedModel for what cannot go."""
    asked, model = run.recipe.remove, run.model
    there = dict(find_parts(model) if _kinds(asked.kinds) else ())
    return _find(run, there) if asked.size is None else _find_for_size(run, there, asked.size)


def _find_for_size(run: Run, there: Mapping[str, Sequence[Part]], size: Size) -> Removable:
    """Choose the shares that bring the model to a size, and find their parts. there: all parts, by block."""
    asked, module = run.recipe.remove, run.model.module
    require_align(run, there)
    parts = _that_can_go(run, there)
    if size.nbytes is not None:
        _require_countable(run)
    counted, before = Counted.of(run.model, parts), module.num_parameters()
    most, refused = size.most(before, module.dtype.itemsize), list[UnsupportedModel]()
    if most >= before:
        cause = f"the model has {_told(before, module)} already"
        raise BadInput(cause, field="remove", value=asked.parts, fix="give a smaller size")
    for mix in mixes_for(counted, parts, most, asked.align):
        run.sized = asked.with_shares(mix.shares)
        try:
            found = _find(run, there)
        except UnsupportedModel as error:
            refused.append(error)
            continue
        compares = run.samples is not None and asked.maps_blocks and not run.recipe.output.as_gguf
        others = with_more_blocks(counted, parts, most, asked.align, mix) if compares else []
        if others:
            return replace(found, mixes=[mix, *others], every=parts)
        say_mix(run, mix)
        return found
    if refused:
        raise refused[0]
    least = _told(smallest(counted, parts, asked.align), module)
    raise BadInput(
        f"at least {least} would be left",
        field="remove",
        value=asked.parts,
        fix="give a larger size, or take a smaller model",
    )


def say_mix(run: Run, mix: Mix, losses: Sequence[tuple[Mix, float]] = ()) -> None:
    """Report the mix that a target size takes. losses: of all that were compared, in nats per token."""
    asked, module = run.recipe.remove, run.model.module
    named = {id(one): ",".join(asked.with_shares(one.shares).parts) for one in (mix, *(one for one, _ in losses))}
    told = f"leaves {_told(mix.left, module)} of {_told(module.num_parameters(), module)}"
    lost = ", ".join(f"{loss:.3f} with {named[id(one)]}" for one, loss in losses)
    compared = f" Predicted loss in nats per token: {lost}." * bool(lost)
    run.reporter.say(f"{','.join(asked.parts)}: {named[id(mix)]} {told}.{compared}")


def _require_countable(run: Run) -> None:
    """Raise BadInput if the saved model's bytes do not follow from its parameters alone."""
    wanted = ("give the share that goes, ", Set("remove", "size=0.25"), ", or ")
    if run.encoding.name == "source":
        cause = "a size in bytes can only be computed for a model saved dense"
        raise BadInput(cause, field="remove", fix=(*wanted, "save it dense: ", Set("encoding", "dense")))
    if run.recipe.prune.allocation.name != "uniform":
        cause = "blocks of different widths are saved as wide as the widest, which is not known in advance"
        raise BadInput(cause, field="remove", fix=(*wanted, "take ", Set("allocation", "uniform")))


def _that_can_go(run: Run, there: Mapping[str, Sequence[Part]]) -> Mapping[str, Sequence[Part]]:
    """Return the parts whose kinds can go, in the group sizes that the source's encoding needs."""
    found: dict[str, list[Part]] = {name: [] for name in there}
    for kind in _kinds(run.recipe.remove.kinds):
        with suppress(UnsupportedModel):
            for name, own in in_steps(
                run, {n: [p for p in all_ if p.kind == kind] for n, all_ in there.items()}
            ).items():
                found[name] += own
    return found


def _told(parameters: int, module: PreTrainedModel) -> str:
    """Return a number of parameters with its size in bytes."""
    kind = str(module.dtype).removeprefix("torch.")
    return f"{parameters:,} parameters ({parameters * module.dtype.itemsize / 1e6:,.1f} MB in {kind})"


def _find(run: Run, there: Mapping[str, Sequence[Part]]) -> Removable:
    """Find the parts to remove for the requested shares. there: all parts, by block."""
    asked, model = run.removal, run.model
    kinds = _kinds(asked.shares)
    parts: Mapping[str, Sequence[Part]] = {
        name: [part for part in found if part.kind in kinds] for name, found in there.items()
    }
    require_align(run, parts)
    for kind in kinds:
        _say_without(run, kind, there)
    parts = in_steps(run, parts)
    found = Removable(parts, find_experts(run) if "experts" in asked.shares else {})
    if found.mixtures and asked.kept_scores is not None and "blocks" not in asked.shares:
        whose = run.loaded.fingerprint(model.every_block)
        run.processes.from_first(lambda: known_scores(run, whose, {}, found.mixtures))
    if "blocks" in asked.shares:
        _require_blocks(run, _counts_of_blocks(run, asked.share("blocks")))
    rest = _plan_of(run, found, ())
    if not rest.keep and not rest.experts:
        return found
    try:
        configure = rehearse(run, rest)
    except UnsupportedModel as error:
        have: dict[str, Collection[str]] = {kind: having(kind, parts) for kind in kinds}
        alone = left_alone(run, have | ({"experts": found.mixtures} if found.mixtures else {}))
        raise alone or _with_a_share_that_works(run, rest, error) from None
    return found if "blocks" in asked.shares else replace(found, rehearsed=(rest, configure))


def _with_a_share_that_works(run: Run, plan: Plan, error: UnsupportedModel) -> UnsupportedModel:
    """Return the error of a plan, suggesting the nearest share of heads that works, if any."""
    heads = plan.keep.get("heads", {})
    if len(heads) != 1:
        return error
    ((units, asked),) = heads.items()
    step = groups_of((part for own in plan.parts.values() for part in own), "heads").get(units, 1)
    counts = range(step, units, step)
    others = [replace(plan, keep={**plan.keep, "heads": {units: kept}}) for kept in counts if kept != asked]
    near = sorted(others, key=lambda other: abs(other.keep["heads"][units] - asked))
    accepted = (one for one in near if refusal_of(run.model.module, resized_by(run, one)) is None)
    for other in islice(accepted, _MOST_SHARES):
        try:
            rehearse(run, other)
        except UnsupportedModel:
            continue
        return error.advised(f"heads={share_of(units, other.keep['heads'][units])} works")
    return error


def plan_removal(run: Run, found: Removable, known: Going | None = None) -> Plan:
    """Choose the blocks to remove and count what stays of the others. Raises BadInput, UnsupportedModel.

    known: the blocks, if a comparison of mixes has chosen them.
    """
    asked = run.removal
    if known is None:
        score, going = blocks_that_go(run, _counts_of_blocks(run, asked.share("blocks")))
    else:
        score, going = asked.score_of("blocks"), known
    several = run.model.blocks[-1].part > 0
    told, mapped = (
        ", ".join(run.model.names[index] if several else str(index) for index in sorted(numbers))
        for numbers in (going.blocks, going.mapped)
    )
    merged = f"; their linear map goes into {mapped}" if mapped else ""
    run.reporter.say(f"Blocks to remove, by {score}: {told}{merged}.")
    return replace(_plan_of(run, found, sorted(going.blocks)), mapped=going.mapped)


def _kinds(shares: Collection[str]) -> list[Kind]:
    return [kind for kind in ("channels", "heads") if kind in shares]


def left_alone(run: Run, there: Mapping[str, Collection[str]]) -> BadInput | None:
    """Return an error if include and exclude spare parts that every block would have to lose, else None.

    there: names of the blocks with removable parts, by kind.
    """
    model, selection = run.model, run.model.chosen.selection
    for kind, names in there.items():
        for block, own in zip(model.blocks, model.chosen.candidates, strict=True):
            if block.name not in names and any(selection.against(matrix.name) is not None for matrix in own):
                cause = f"{kind} are removed from all blocks alike, but matrices of {block.name} are excluded"
                fix = ("loosen ", Setting("include"), " or ", Setting("exclude"))
                return BadInput(cause, field="exclude" if selection.exclude else "include", fix=fix)
    return None


def having(kind: Kind, parts: Mapping[str, Sequence[Part]]) -> set[str]:
    """Return names of the blocks that have parts of a kind."""
    return {name for name, own in parts.items() if any(part.kind == kind for part in own)}


def require_align(run: Run, parts: Mapping[str, Sequence[Part]]) -> None:
    """Raise BadInput if channels are to be kept in multiples larger than their number; the default never raises."""
    align = run.recipe.remove.align
    most = max((part.count for own in parts.values() for part in own if part.kind == "channels"), default=align)
    if align > most and align != RemovePart.model_fields["align"].default:
        cause = f"the blocks have {most} channels at most, which cannot be kept in multiples of {align}"
        raise BadInput(cause, field="align", value=align, fix=f"give {step_of(most, most)} or less")


def _say_without(run: Run, kind: Kind, parts: Mapping[str, Sequence[Part]]) -> None:
    """Report the blocks without parts of a kind. Raises UnsupportedModel, naming the cause, if none has any."""
    there = having(kind, parts)
    without = [name for name in parts if name not in there]
    if len(without) == len(parts):
        others = [other for other in _kinds(("channels", "heads")) if having(other, parts)]
        raise left_alone(run, {kind: there}) or UnsupportedModel(
            read_together(run.model, kind)
            or f"no {kind} of the model's blocks could be proved to be removable, so nothing was removed",
            fix=f"remove {' or '.join([*others, 'blocks'])} instead",
        )
    if without:
        have = " has" if len(without) == 1 else f" and {len(without) - 1} other blocks have"
        run.reporter.say(f"Left alone: {without[0]}{have} no {kind} that can be removed.")


def _plan_of(run: Run, found: Removable, dropped: Sequence[int]) -> Plan:
    """Return the plan with some blocks removed. Raises BadInput if none of the requested parts would go."""
    asked, keep = run.removal, dict[Kind, dict[int, int]]()
    rest = found.without({run.model.names[index] for index in dropped})
    for kind in _kinds(asked.shares):
        groups = groups_of((part for own in rest.parts.values() for part in own), kind)
        if not groups:
            raise UnsupportedModel(f"none of the remaining blocks has removable {kind}")
        keep[kind] = _kept(kind, groups, asked.share(kind), asked.align)
    left = {mixture.count: experts_left(mixture, asked) for mixture in rest.mixtures.values()}
    return Plan(dropped, (), rest.parts, keep, rest.mixtures, left)


def _counts_of_blocks(run: Run, share: float) -> list[int]:
    """Return the number of blocks to remove from each list; a list without selected matrices loses none.

    Raises BadInput if that is none, a whole list, or more than may go.
    """
    model, untouched = run.model, run.model.chosen.untouched()
    lists = [[block.index for block in own] for own in by_list(model.blocks)]
    counts = [0 if untouched.issuperset(own) else round(share * len(own)) for own in lists]
    sizes = [len(own) for own in lists]
    if not any(counts) or any(count == size for count, size in zip(counts, sizes, strict=True)):
        cause = f"{share:g} of {_and(sizes)} blocks is {_and(counts)}"
        raise BadInput(cause, field="remove", fix="give another share")
    for own, count, free in zip(lists, counts, may_go(model), strict=True):
        if count > len(free):
            needed = len(model.structure.producers.intersection(own) - untouched)
            why = [f"{len(untouched.intersection(own))} are excluded"] * bool(untouched.intersection(own))
            why += [f"later blocks read what {needed} of them compute{'s' * (needed == 1)} for them"] * bool(needed)
            cause = f"{count} of {len(own)} blocks cannot be removed, since {' and '.join(why)}"
            fix = ("give a smaller share, or loosen ", Setting("include"), " or ", Setting("exclude"))
            raise BadInput(cause, field="remove", fix=fix)
    return counts


def _and(numbers: Sequence[int]) -> str:
    return " and ".join(map(str, numbers))


def _require_blocks(run: Run, counts: Sequence[int]) -> None:
    """Raise UnsupportedModel if no configuration can express the smaller number of blocks, wherever they are removed."""
    refused = UnsupportedModel("no block can be removed")
    of_lists = map(_somewhere, may_go(run.model), counts)
    for some in zip(*of_lists, strict=True):
        try:
            rehearse(run, Plan([*chain.from_iterable(some)]))
        except UnsupportedModel as error:
            refused = error
        else:
            return
    raise refused


def _somewhere(blocks: Sequence[int], count: int) -> tuple[Sequence[int], ...]:
    """Return `count` blocks of a list: at its end, at its start, and spread evenly."""
    return (blocks[len(blocks) - count :], blocks[:count], blocks[:: -(-len(blocks) // count)]) if count else ((),) * 3


def _kept(kind: Kind, groups: Mapping[int, int], share: float, align: int) -> dict[int, int]:
    """Return the kept number of units by original number. Raises BadInput if none is removed."""
    kept = {old: kept_count(old, share, align if kind == "channels" else 1, group) for old, group in groups.items()}
    if all(new == old for old, new in kept.items()):
        of, fix = " and ".join(map(str, sorted(groups))), "give a larger share, or leave it out"
        together = f", where {max(groups.values())} go together" if max(groups.values()) > 1 else ""
        raise BadInput(f"{share:g} of {of} {kind} rounds to none{together}", field="remove", fix=fix)
    return kept


def blocks_that_go(run: Run, counts: Sequence[int]) -> tuple[Choice, Going]:
    """Choose the least important blocks; if no map is possible and none was asked for, by the next score.

    Args:
        run: the run.
        counts: number of blocks to remove from each list.

    Returns:
        The score used and its choice.
    """
    asked, scores = run.recipe.remove.score_of("blocks"), SCORES["blocks"]
    try:
        if run.recipe.output.as_gguf and asked.name == scores[0]:
            raise UnsupportedModel("a map would change values, but a GGUF file's bytes are copied unchanged")
        return asked, _going(run, asked, counts)
    except UnsupportedModel as error:
        if asked.name != scores[0] or asked in run.recipe.remove.score:
            raise
        run.reporter.say(f"Blocks are removed without a map in their place: {say(error.cause)}.")
        return (other := Choice(name=scores[1])), _going(run, other, counts)


def _going(run: Run, score: Choice, counts: Sequence[int]) -> Going:
    assert run.samples is not None
    with run.reporter.bar("Choosing blocks", 1.0) as advance:
        batches = run.task.inputs.batches(run.samples.tokens)
        return block_score_named(score).choose(run.model, batches, counts, advance, run.processes)


def find_maps(run: Run, plan: Plan, finished: Collection[str]) -> dict[int, FoundMap]:
    """Solve the plan's maps, by the number of the block that absorbs each; none if all such blocks are finished.

    Args:
        run: the run; its model is still dense.
        plan: the plan.
        finished: names of blocks finished by an earlier run.
    """
    spans = spans_of(plan.dropped, plan.mapped)
    if all(run.model.names[span.before] in finished for span in spans):
        return {}
    assert run.samples is not None
    score, processes = block_score_named(run.removal.score_of("blocks")), run.processes
    assert isinstance(score, Mapped)
    batches = processes.own(first_batches(run.task.inputs.batches(run.samples.tokens), score.tokens))
    walk = MapWalk(run.model, find_writers(run.model), batches, processes)
    with run.reporter.bar("Solving the map", 1 + max(span.last for span in spans)) as advance:
        found = walk.merged(spans, advance)
    return_free_memory()  # of the inputs
    return found


def only_consumers(model: ProvenModel, plan: Plan) -> ProvenModel:
    """Return the model with only the matrices whose inputs are needed."""
    wanted = {m.name for parts in plan.parts.values() for part in parts for m in part.fold.consumers}
    blocks = [[matrix for matrix in own if matrix.name in wanted] for own in model.chosen.blocks]
    groups = [[g for group in own if (g := [m for m in group if m.name in wanted])] for own in model.structure.groups]
    chosen = replace(model.chosen, blocks=blocks, outside=[])
    return replace(model, chosen=chosen, structure=replace(model.structure, groups=groups))


_MOST = 512


def in_steps(run: Run, parts: Mapping[str, Sequence[Part]]) -> dict[str, list[Part]]:
    """Return the parts with units grouped as the source's encoding requires.

    Raises:
        UnsupportedModel: its scales cover so many values that no group of units can be removed.
    """
    encoding = run.encoding
    if encoding.name != "source":
        return {name: [*own] for name, own in parts.items()}
    groups: dict[tuple[str, int], int] = {}
    for own in parts.values():
        for part in own:
            key = part.kind, part.count
            groups[key] = _group(run, encoding, part, groups.get(key, 1))
    return {name: [replace(part, group=groups[part.kind, part.count]) for part in own] for name, own in parts.items()}


def _group(run: Run, encoding: Encoding, part: Part, least: int) -> int:
    """Return the smallest group of units that can be removed together. least: where to start."""
    refused = UnsupportedModel(f"no {part.kind} of {part.block} can be removed")
    powers = (1 << power for power in range(_MOST.bit_length()))
    for group in powers:
        rest = part.count % group
        if group < least or 2 * group > part.count or (rest and part.kind != "channels"):
            continue
        every_other = torch.arange(part.count) // group % 2 == 0
        every_other[part.count - rest :] = False
        masks = part.masks([every_other] * len(part.fold.consumers))
        layout = partial(run.model.weights.layout, part.block)
        try:
            for name, kept in slices_kept(run.model.module, part.block, masks, layout).items():
                encoding.require_cut(name, kept)
        except UnsupportedModel as error:
            refused = error
        else:
            return group
    raise refused
