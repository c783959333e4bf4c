"""Choose what to prune: the selected matrices of the blocks, and the reasons for those left alone.

At first every 3-D parameter counts as a mixture of experts. Then a forward shows the products (`Evidence`), and the choice is
repeated: a parameter without a multiplied slice is not a mixture, and only mixtures have routers.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase

from torch import nn

from coprune.base.errors import BadInput, UnsupportedModel
from coprune.base.words import Command, Set, Setting
from coprune.model.blocks import Block
from coprune.model.checkpoint.deferred import address_of
from coprune.model.leftovers import LeftOut, kind_of, large_parameters, left_out, refuse_mostly_other, routers_of
from coprune.model.matrices import Matrix, find_matrices

UNUSED = "not used in a forward"
UNOBSERVED = "in no product that coprune can observe"
BACKWARDS = "multiplied along its outputs"
NO_MIXTURE = "three dimensions, and none of its matrices is multiplied"
OF_BLOCKS = "weights that several blocks share"
OF_BLOCKS_AND_MORE = "weights that several blocks and another part of the model share"
OF_ANOTHER_PART = "weights shared with another part of the model"


@dataclass(frozen=True)
class Evidence:
    """What one forward showed about a block's matrices, by name."""

    multiplied: frozenset[str]
    backwards: frozenset[str] = frozenset()
    """Multiplied along their outputs."""
    touched: frozenset[str] = frozenset()
    """Used in any operation at all."""
    ranked: frozenset[int] = frozenset()
    """Numbers of values among which the largest were taken."""


@dataclass(frozen=True)
class Selection:
    """The user's choice of matrices, as shell-like patterns (`*.q_proj`, `model.layers.0.*`).

    They match a matrix's name, or the name without an expert's bracket.
    """

    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()

    def against(self, name: str) -> str | None:
        """Return why a matrix is not selected; None if it is."""
        if any(_matches(name, pattern) for pattern in self.exclude):
            return "excluded"
        return None if not self.include or self._hits(name) else "not included"

    def spells_out(self, name: str) -> bool:
        """Return whether an include pattern gives the end of a name literally, and no pattern excludes it."""
        named = any(name.endswith(pattern.rpartition("*")[2] or "\n") for pattern in self._hits(name))
        return named and self.against(name) is None

    def _hits(self, name: str) -> list[str]:
        return [pattern for pattern in self.include if _matches(name, pattern)]


@dataclass(frozen=True)
class Chosen:
    """The matrices to prune: those of every block, and named ones outside the blocks (lm_head)."""

    blocks: list[list[Matrix]]
    outside: list[Matrix]
    left_out: list[LeftOut] = field(default_factory=list)
    """The other tensors of the blocks with more than one dimension, with the reasons."""
    candidates: list[list[Matrix]] = field(default_factory=list)
    """All candidates of every block, chosen or not."""
    selection: Selection = Selection()
    shared: Mapping[str, str] = field(default_factory=dict)
    """Parameters of blocks that are shared with other parts, with the reason to leave them alone."""
    several: list[list[Matrix]] = field(default_factory=list)
    """Matrices that several blocks share, which are pruned once and not in a block: each under every block's name for it,
    first block first."""

    @classmethod
    def nothing(cls, blocks: int) -> Chosen:
        """Return an empty choice for `blocks` blocks."""
        return cls([[] for _ in range(blocks)], [], candidates=[[] for _ in range(blocks)])

    def untouched(self) -> set[int]:
        """Return the numbers of blocks without a selected matrix."""
        pairs = enumerate(zip(self.candidates, self.blocks, strict=True))
        return {index for index, (all_of_it, own) in pairs if all_of_it and not own}

    def all(self) -> Iterator[Matrix]:
        """Yield every chosen matrix, in the order of the model."""
        for matrices in self.blocks:
            yield from matrices
        yield from (uses[0] for uses in self.several)
        yield from self.outside


def choose_matrices(
    model: nn.Module, blocks: Sequence[Block], include: Sequence[str] = (), exclude: Sequence[str] = ()
) -> Chosen:
    """Choose the matrices to prune, as far as possible before anything has run.

    Args:
        model: the whole model; its parameters may be on the meta device.
        blocks: its blocks.
        include: patterns (see `Selection`) of matrices to prune; by default everything in the blocks except routers. Routers
            and matrices outside the blocks are pruned only if a pattern spells out the end of their name.
        exclude: patterns of matrices to leave alone.

    Raises:
        BadInput: a pattern matches nothing, nothing is left, or a head is tied to the embeddings.
        UnsupportedModel: most of a block's weights are not in matrices.
    """
    candidates = [list(find_matrices(block.module, block.name)) for block in blocks]
    inside = {matrix.name for matrices in candidates for matrix in matrices}
    rest = [matrix for matrix in find_matrices(model) if matrix.name not in inside]
    names = [*sorted(inside), *(matrix.name for matrix in rest)]
    others = [parameter.name for block in blocks for parameter in large_parameters(block)]
    _check_patterns("include", include, names, [])
    _check_patterns("exclude", exclude, names, others)
    selection = Selection(tuple(include), tuple(exclude))
    outside = [matrix for matrix in rest if selection.spells_out(matrix.name)]
    _refuse_tied_head(model, outside, selection)
    shared = _shared(model, blocks)
    return _chosen(Chosen([], outside, [], candidates, selection, shared), blocks, [({}, ()) for _ in blocks])


def confirm(chosen: Chosen, blocks: Sequence[Block], evidence: Sequence[Evidence]) -> Chosen:
    """Choose again after every block has run once.

    Args:
        chosen: the earlier choice.
        blocks: the model's.
        evidence: for every block, what its run showed about all candidates.

    Raises:
        UnsupportedModel: a chosen matrix is used in a way that cannot be observed, or see `choose_matrices`.
        BadInput: nothing is left.
    """
    if not any(chosen.candidates):
        return chosen
    shown = [(_no_matrices(own, seen), seen.ranked) for own, seen in zip(chosen.candidates, evidence, strict=True)]
    confirmed = _chosen(chosen, blocks, shown)
    for matrices, seen in zip(confirmed.blocks, evidence, strict=True):
        for matrix in matrices:
            if matrix.name in seen.backwards:
                raise _unobservable(matrix, f"is {BACKWARDS}")
    return confirmed


def _chosen(
    chosen: Chosen, blocks: Sequence[Block], shown: Sequence[tuple[Mapping[str, str], Collection[int]]]
) -> Chosen:
    """Choose among the candidates.

    shown: for every block, those that are not matrices, by name with the reason; and `ranked`, as in `routers_of`.
    """
    selection, reasons, others = chosen.selection, dict[str, str](), list[list[tuple[str, str]]]()
    parts: list[tuple[Block, set[str], set[str]]] = []
    for block, candidates, (no_matrices, ranked) in zip(blocks, chosen.candidates, shown, strict=True):
        matrices = [matrix for matrix in candidates if matrix.name not in no_matrices]
        parameters = large_parameters(block)
        routers = routers_of(block, matrices, parameters, ranked)
        reasons |= no_matrices
        for matrix in matrices:
            against = selection.against(matrix.name)
            if against is None and matrix.name in routers and not selection.spells_out(matrix.name):
                against = "a router"
            if against is not None:
                reasons[matrix.name] = against
        unused = {matrix.parameter for matrix in candidates if no_matrices.get(matrix.name) == UNUSED}
        parts.append((block, {matrix.parameter for matrix in matrices}, unused))
        seen = {matrix.parameter for matrix in candidates}
        others.append([(p.name, "a router" if p.name in routers else p.why) for p in parameters if p.path not in seen])
    refuse_mostly_other(parts)
    several = _several(chosen, reasons)
    once = {matrix.name for uses in several for matrix in uses}
    for matrix in (matrix for own in chosen.candidates for matrix in own if matrix.name not in once):
        if (why := chosen.shared.get(matrix.parameter)) is not None:
            reasons.setdefault(matrix.name, why)
    found = [[m for m in own if m.name not in reasons and m.name not in once] for own in chosen.candidates]
    if not any(found) and not several and not chosen.outside:
        loosen = ("loosen ", Setting("include"), " or ", Setting("exclude"))
        raise BadInput("no matrix is left to prune", field="exclude", value=selection.exclude, fix=loosen)
    alone: list[tuple[str, str]] = []
    for own, more in zip(chosen.candidates, others, strict=True):
        alone += [(matrix.name, reasons[matrix.name]) for matrix in own if matrix.name in reasons] + more
    return replace(chosen, blocks=found, left_out=left_out(alone), several=several)


def _several(chosen: Chosen, reasons: Collection[str]) -> list[list[Matrix]]:
    """Return the matrices that several blocks share, unless there is a reason to leave them alone.

    reasons: names of matrices that are left alone in any case.
    """
    shared: dict[tuple[str, int], list[tuple[int, Matrix]]] = defaultdict(list)
    for block, candidates in enumerate(chosen.candidates):
        for matrix in candidates:
            if chosen.shared.get(matrix.parameter) == OF_BLOCKS and matrix.expert is None:
                shared[_place(getattr(matrix.owner, matrix.attribute))].append((block, matrix))
    several = []
    for uses in shared.values():
        blocks, same = {block for block, _ in uses}, [matrix for _, matrix in uses]
        alike = len({(matrix.shape, matrix.input_dim) for matrix in same}) == 1
        if alike and len(blocks) == len(uses) > 1 and not any(matrix.name in reasons for matrix in same):
            several.append(same)
    return several


def _no_matrices(candidates: Sequence[Matrix], seen: Evidence) -> dict[str, str]:
    """Return the candidates of a block that cannot be pruned, by name with the reason."""
    multiplied = seen.multiplied | seen.backwards
    mixtures = {matrix.parameter for matrix in candidates if matrix.expert is not None and matrix.name in multiplied}
    # Includes layers whose siblings in a list ran, such as an expert module without tokens.
    kinds = {kind_of(name) for name in multiplied}
    dropped = {}
    for matrix in candidates:
        if matrix.expert is not None:
            if matrix.parameter not in mixtures:
                dropped[matrix.name] = NO_MIXTURE
        elif matrix.is_of_heads and matrix.name in seen.backwards:
            dropped[matrix.name] = BACKWARDS
        elif matrix.name in multiplied:
            continue
        elif matrix.name in seen.touched:
            dropped[matrix.name] = UNOBSERVED
        elif kind_of(matrix.name) not in kinds:
            dropped[matrix.name] = UNUSED
    return dropped


def _unobservable(matrix: Matrix, what: str) -> UnsupportedModel:
    return UnsupportedModel(f"{matrix.name} {what}", fix=("leave it out with ", Set("exclude", matrix.name)))


def _check_patterns(field: str, patterns: Sequence[str], names: Sequence[str], others: Sequence[str]) -> None:
    """Raise BadInput for patterns that match no name. others: names of modules that are not matrices but may be excluded."""
    for pattern in patterns:
        if not any(_matches(name, pattern) for name in [*names, *others]):
            raise BadInput(
                f"the pattern {pattern!r} matches none of the {len(names)} matrices",
                field=field,
                value=pattern,
                fix=(f"names look like {names[0]!r}, and ", Command("inspect", "MODEL"), " lists them all"),
            )


def _matches(name: str, pattern: str) -> bool:
    # The expert's number in brackets at the end of a name is not a character class.
    literal = re.sub(r"\[(\d+)\]$", r"[[]\1]", pattern)
    return fnmatchcase(name, literal) or fnmatchcase(name.partition("[")[0], pattern)


def _refuse_tied_head(model: nn.Module, outside: Sequence[Matrix], selection: Selection) -> None:
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    for matrix in outside:
        if id(getattr(matrix.owner, matrix.attribute)) in embeddings:
            raise BadInput(
                f"{matrix.name} shares its weights with the embeddings, which pruning it would change too",
                field="include",
                value=selection.include,
                fix=("name other matrices with ", Setting("include")),
            )


def _shared(model: nn.Module, blocks: Sequence[Block]) -> dict[str, str]:
    """Return the parameters of blocks that another block or part of the model shares, with the reason."""
    places: dict[tuple[str, int], dict[str, nn.Module]] = defaultdict(dict)
    for path, module in model.named_modules(remove_duplicate=False):
        for attribute, parameter in module.named_parameters(recurse=False):
            places[_place(parameter)][f"{path}.{attribute}"] = module
    owners = {path: block.index for block in blocks for path in _below(block)}
    found: dict[str, str] = {}
    for same in places.values():
        inside = {owners[path] for path in same if path in owners}
        # Two names for a layer within a block are one matrix.
        if len(inside | {owners.get(path) for path in same}) > 1 or len({id(module) for module in same.values()}) > 1:
            of_blocks = OF_BLOCKS if all(path in owners for path in same) else OF_BLOCKS_AND_MORE
            why = of_blocks if len(inside) > 1 else OF_ANOTHER_PART
            found |= dict.fromkeys((path for path in same if path in owners), why)
    return found


def _below(block: Block) -> Iterator[str]:
    for path, module in block.module.named_modules(prefix=block.name, remove_duplicate=False):
        yield from (f"{path}.{attribute}" for attribute, _ in module.named_parameters(recurse=False))


def _place(parameter: nn.Parameter) -> tuple[str, int]:
    """Return a parameter's address in memory, or its identity without one."""
    address = 0 if parameter.is_meta else address_of(parameter)
    return ("memory", address) if address else ("object", id(parameter))
