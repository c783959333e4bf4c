"""Mixtures of experts, found in a block by experiment: which module holds the experts and which one routes tokens.

A module counts as a router only if replacing its logits sends tokens to the experts that the new logits name. The same
experiment shows whether experts are chosen within groups, and how many groups a token may use.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from coprune.model.blocks import Block
from coprune.model.leftovers import lists_of
from coprune.model.matrices import Matrix
from coprune.model.routing import NeverChosen, OtherLogits, forward_as
from coprune.model.walk.model_structure import FoundModel
from coprune.removal.expert_calls import ExpertCall, ListedCall, Routed

Run = Callable[[], Tensor]
"""Runs the block on a sample and returns its output."""
_HIGH = 30.0
"""A logit too large for any correction to outweigh."""


@dataclass(frozen=True)
class Mixture:
    """The routed experts of a block; paths are relative to the block."""

    block: str
    experts: str
    """Path of the module that holds the experts."""
    router: str
    """Path of the module whose product is the routing logits."""
    sliced: dict[str, int]
    """Tensors with one entry per expert: path, and the dimension of the experts."""
    added: tuple[str, ...]
    """Tensors added to logits or scores; minus infinity in them excludes an expert."""
    count: int
    top: int
    """Number of experts per token."""
    groups: int
    """Number of equal groups of experts, of which a token uses `used`; 1 if any experts may be combined."""
    used: int
    call: ExpertCall | ListedCall
    owner: str
    """Path of the module called with the tokens: that of the experts, or the holder of their list."""

    def masks(self, module: nn.Module, keep: Tensor) -> dict[str, Tensor]:
        """Return masks of every parameter and buffer, by full name. keep: E bool."""
        found = {}
        for path, dim in self.sliced.items():
            tensor = tensor_at(module, path)
            shape = [-1 if d == dim else 1 for d in range(tensor.ndim)]
            found[f"{self.block}.{path}"] = keep.view(shape).expand(tensor.shape)
        experts = module.get_submodule(self.experts)
        for number, expert in enumerate(experts if isinstance(experts, nn.ModuleList) else ()):
            for name, tensor in [*expert.named_parameters(), *expert.named_buffers()]:
                found[f"{self.block}.{self.experts}.{number}.{name}"] = keep[number].expand(tensor.shape)
        return found

    def routing_matrices(self, module: nn.Module) -> list[Tensor]:
        """Return the router's own tensors with more than one dimension."""
        own = (tensor_at(module, path) for path in self.sliced if path.startswith(f"{self.router}."))
        return [tensor for tensor in own if tensor.ndim > 1]

    def matrices(self, module: nn.Module) -> Iterator[tuple[int, Tensor]]:
        """Yield each matrix of the experts with the expert's number."""
        experts = module.get_submodule(self.experts)
        if isinstance(experts, nn.ModuleList):
            yield from ((n, p) for n, expert in enumerate(experts) for p in expert.parameters() if p.ndim > 1)
            return
        for path, dim in self.sliced.items():
            if path.startswith(f"{self.experts}.") and (table := tensor_at(module, path)).ndim > 2:
                yield from enumerate(table.unbind(dim))

    def never_choose(self, module: nn.Module, keep: Tensor) -> None:
        """Exclude some experts of a block from routing, permanently. keep: E bool."""
        module.get_submodule(self.router).forward = self._without(module, keep)

    @contextmanager
    def silent(self, module: nn.Module, keep: Tensor) -> Iterator[None]:
        """Exclude some experts of a block from routing within the body."""
        before = {path: tensor_at(module, path).detach().clone() for path in self.added}
        try:
            with forward_as(module.get_submodule(self.router), self._without(module, keep)):
                yield
        finally:
            for path, values in before.items():
                tensor_at(module, path).data.copy_(values)

    def _without(self, module: nn.Module, keep: Tensor) -> NeverChosen:
        owners = [(module.get_submodule(path.rpartition(".")[0]), path.rpartition(".")[2]) for path in self.added]
        return NeverChosen(module.get_submodule(self.router), keep, owners)

    @contextmanager
    def watched(self, module: nn.Module, see: Callable[[Routed], None]) -> Iterator[None]:
        """Observe every call of the experts and each answer within the body."""
        owner = module.get_submodule(self.owner)
        own = owner.forward

        def forward(*args: object, **kwargs: object) -> object:
            out, routed = self.call.watch(own, args, kwargs)
            see(routed)
            return out

        with forward_as(owner, forward):
            yield


def tensor_at(module: nn.Module, path: str) -> Tensor:
    """Return a parameter or buffer by its path."""
    owner, _, name = path.rpartition(".")
    found: Tensor = getattr(module.get_submodule(owner), name)
    return found


def may_have_experts(model: FoundModel) -> bool:
    """Return whether a model's blocks could contain a mixture of experts, judging without running it."""
    stacked = any(matrix.expert is not None for block in model.chosen.candidates for matrix in block)
    return stacked or any(lists_of(block) for block in model.blocks)


def find_mixtures(block: Block, matrices: Sequence[Matrix], run: Run) -> Iterator[Mixture | str]:
    """Find the mixtures of a block and prove their properties.

    Args:
        block: the block; restored at the end.
        matrices: of the block; experts are slices of one parameter.
        run: runs it.

    Yields:
        A mixture, or the reason why its experts cannot be removed.
    """
    owners = {matrix.parameter.rpartition(".")[0] for matrix in matrices if matrix.expert is not None}
    tables = {matrix.parameter.rpartition(".")[0] for matrix in matrices if matrix.experts is not None}
    for owner in sorted(owners):
        if owner in tables:
            yield f"{owner} holds its experts as rows of one table"
            continue
        yield _Search(block, owner.removeprefix(block.name).removeprefix("."), run).found()
    for path in lists_of(block):  # any list of modules may match; those that are not mixtures are ignored
        found = _Search(block, path.removeprefix(f"{block.name}."), run).found()
        if isinstance(found, Mixture):
            yield found


def _alone_and_in_pairs(tokens: int, shape: tuple[int, int], top: int) -> tuple[Tensor, Tensor]:
    """Return logits T × E whose highest are alone in `top` groups, and whose next highest come in pairs in the other groups.

    shape: groups × experts per group. Also returns which are alone, T × E bool. Scores may grow like the exponential of a
    logit, so the highest are chosen to score less than two of the next.
    """
    generator = torch.Generator().manual_seed(0)
    random = torch.rand(tokens, *shape, generator=generator)
    rank = random.argsort(dim=2).argsort(dim=2)
    alone = torch.rand(tokens, shape[0], 1, generator=generator).argsort(dim=1).argsort(dim=1) < top
    highest = alone & (rank == 0)
    logits = torch.full_like(random, -_HIGH)
    logits = torch.where(~alone & (rank < 2), 1 + random / 10, logits)
    logits = torch.where(highest, 1.3 + random / 5, logits)
    return logits.flatten(1), highest.flatten(1)


class _Stop(Exception):
    """Raised at the experts' call to end a run that only needs its arguments."""


class _Search:
    """The search for the parts of one mixture of a block."""

    def __init__(self, block: Block, experts: str, run: Run) -> None:
        self._block, self._path, self._run = block, experts, run
        self._module = block.module
        self._experts = block.module.get_submodule(experts)
        self._above = experts.rpartition(".")[0]
        stacks = [p for p in self._experts.parameters(recurse=False) if p.ndim == 3]
        self._counts = {len(stack) for stack in stacks}
        self._list = self._experts if isinstance(self._experts, nn.ModuleList) else None
        if self._list is not None:
            self._counts = {len(self._list)}
        self._owner_path = experts if self._list is None else self._above
        self._owner = block.module.get_submodule(self._owner_path)
        self._call: ExpertCall | ListedCall | None = None

    def found(self) -> Mixture | str:
        name = f"{self._block.name}.{self._path}"
        if len(self._counts) > 1:
            return f"{name} holds tables of different numbers of experts"
        (count,) = self._counts
        if not any(self._candidates(count)):
            return f"nothing beside {name} has a table of {count} rows"
        if not self._told():
            return f"{name} is not given the experts of each token"
        router = next((path for path in self._candidates(count) if self._decides(path, count)), None)
        if router is None:
            return f"no module beside {name} routes tokens by {count} logits"
        return self._described(router, count)

    def _told(self) -> bool:
        """Return whether the experts' call shows the routing, and the answers add up to the output."""
        seen: list[bool] = []
        own = self._owner.forward

        def forward(*args: object, **kwargs: object) -> object:
            self._call = ExpertCall.seen(args, kwargs) if self._list is None else ListedCall(self._list)
            seen.append(self._call is not None and self._call.explains(own, args, kwargs))
            return own(*args, **kwargs)

        with forward_as(self._owner, forward):
            self._run()
        return seen == [True]

    def _candidates(self, count: int) -> Iterator[str]:
        """Yield paths of modules beside the experts that hold a table with one row or column per expert."""
        above = self._module.get_submodule(self._above)
        for path, module in above.named_modules():
            whole = ".".join(part for part in (self._above, path) if part)
            inside = whole == self._path or whole.startswith(f"{self._path}.")
            if not inside and any(
                p.ndim == 2 and count in p.shape and min(p.shape) > 1 for p in module.parameters(recurse=False)
            ):
                yield whole

    def _decides(self, router: str, count: int) -> bool:
        """Return whether replacing a module's logits changes the routing accordingly."""

        def turn(logits: Tensor) -> Tensor:
            tokens = torch.arange(len(logits), device=logits.device)
            return torch.full_like(logits, -_HIGH).index_put((tokens, tokens % count), logits.new_tensor(_HIGH))

        index = self._chosen(router, count, turn)
        if index is None or (
            self._list is not None and index.shape[1] == count
        ):  # calling every expert of a list is not routing
            return False
        wanted = torch.arange(len(index), device=index.device) % count
        return bool((index == wanted[:, None]).any(dim=1).all())

    def _chosen(self, router: str, count: int, logits: Callable[[Tensor], Tensor]) -> Tensor | None:
        """Return the experts of tokens (T × k) under replaced logits of a router, with all added tensors zeroed."""
        added = {path: tensor_at(self._module, path) for path in self._vectors(router, count)}
        before = {path: tensor.detach().clone() for path, tensor in added.items()}
        module, seen = self._module.get_submodule(router), list[Tensor]()
        own, call, whole = module.forward, self._call, self._owner.forward
        assert call is not None

        def routed(*args: object, **kwargs: object) -> object:
            with OtherLogits(count, lambda found: logits(found.reshape(-1, count)).view_as(found)):
                return own(*args, **kwargs)

        def stop(*args: object, **kwargs: object) -> Tensor:
            seen.append(call.index_of(whole, args, kwargs))
            raise _Stop

        for tensor in added.values():
            tensor.data.zero_()
        try:
            with forward_as(module, routed), forward_as(self._owner, stop):
                self._run()
        except _Stop:
            pass
        finally:
            for path, values in before.items():
                added[path].data.copy_(values)
        return seen[0] if seen else None

    def _vectors(self, router: str, count: int) -> list[str]:
        """Return the vectors with one value per expert, in the router and directly beside the experts."""
        found = []
        for path, deep in dict.fromkeys([(router, True), (self._above, False)]):
            module = self._module.get_submodule(path)
            named = [*module.named_parameters(recurse=deep), *module.named_buffers(recurse=deep)]
            found += [
                ".".join(part for part in (path, name) if part)
                for name, tensor in named
                if tensor.shape[-1:] == (count,) and tensor.numel() == count
            ]
        return list(dict.fromkeys(found))

    def _groups(self, router: str, count: int) -> tuple[int, int]:
        """Return the number of expert groups, and of groups used per token; (1, 1) if there are none."""
        found: list[tuple[int, int]] = []
        for groups in (number for number in range(2, count) if count % number == 0):
            size = count // groups
            generator = torch.Generator().manual_seed(0)

            def one_of_each(logits: Tensor, size: int = size, generator: torch.Generator = generator) -> Tensor:
                """Send every other token to one expert of each of the first groups, the others anywhere."""
                other = torch.randn(logits.shape, generator=generator)
                places = torch.randint(size, (len(other), count // size), generator=generator)
                drawn = places + torch.arange(count // size) * size
                other[::2].scatter_add_(1, drawn[::2], _HIGH - torch.arange(count // size).expand(drawn[::2].shape) / 8)
                return other.to(logits)

            index = self._chosen(router, count, one_of_each)
            if index is None:
                continue
            most = max(len(set(row)) for row in (index // size).tolist())
            if most < min(index.shape[1], groups):
                found.append((groups, most))
        fewest = min((used for _, used in found), default=1)
        return max(((groups, used) for groups, used in found if used == fewest), default=(1, 1))

    def _groups_by_two(self, router: str, count: int, top: int) -> int:
        """Return the number of expert groups that are scored by their best two experts, or 1 if there are none.

        The experts with the highest logits are then alone in their groups and lose to pairs in other groups.
        """
        found: list[tuple[int, int]] = []
        for groups in (number for number in range(top + 1, count // 2 + 1) if count % number == 0):
            alone: list[Tensor] = []

            def some_alone(logits: Tensor, groups: int = groups, alone: list[Tensor] = alone) -> Tensor:
                made, highest = _alone_and_in_pairs(len(logits), (groups, count // groups), top)
                alone.append(highest)
                return made.to(logits)

            index = self._chosen(router, count, some_alone)
            if index is not None and alone:
                most = int(alone[-1].gather(1, index.cpu()).sum(dim=1).max())
                if most < top:
                    found.append((most, -groups))
        return -min(found)[1] if found else 1

    def _described(self, router: str, count: int) -> Mixture | str:
        assert self._call is not None
        vectors = self._vectors(router, count)
        sliced = dict.fromkeys(vectors, -1)
        tables = [(self._path, self._experts)] if self._list is None else []
        places = [*tables, (router, self._module.get_submodule(router))]
        for place, module in places:
            for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
                path = f"{place}.{name}"
                if path not in sliced and count in tensor.shape and tensor.ndim >= (1 if place == self._path else 2):
                    sliced[path] = tensor.shape.index(count)
        sliced = {path: dim % tensor_at(self._module, path).ndim for path, dim in sliced.items()}
        sliced |= dict(self._taken_by_choice(count, sliced))
        index = self._chosen(router, count, lambda logits: logits)
        assert index is not None
        top, call, owner = index.shape[1], self._call, self._owner_path
        groups, used = self._groups(router, count) if top > 1 else (1, 1)
        if groups == 1 and (by_two := self._groups_by_two(router, count, top)) > 1:
            groups, used = by_two, top
        for added in dict.fromkeys([tuple(vectors), ()]):
            mixture = Mixture(
                self._block.name, self._path, router, sliced, added, count, top, groups, used, call, owner
            )
            if self._avoids(mixture):
                return mixture
        return f"experts of {self._block.name}.{self._path} are chosen even with logits of minus infinity"

    def _taken_by_choice(self, count: int, known: Collection[str]) -> Iterator[tuple[str, int]]:
        """Yield tensors around the experts with one entry per expert that reaches only this expert's tokens.

        Yields:
            The path in the block and the experts' dimension.
        """
        index: Tensor | None = None
        above = self._module.get_submodule(self._above)
        for name, tensor in [*above.named_parameters(), *above.named_buffers()]:
            path = ".".join(part for part in (self._above, name) if part)
            if path in known or path.startswith(f"{self._path}.") or not tensor.is_floating_point():
                continue
            for dim in (dim for dim, size in enumerate(tensor.shape) if size == count):
                index = self._routing()[0] if index is None else index
                if self._is_taken(tensor.movedim(dim, 0), index, count):
                    yield path, dim
                    break

    def _is_taken(self, entries: Tensor, index: Tensor, count: int) -> bool:
        """Return whether a NaN in an expert's entry (first axis) reaches exactly the outputs of its tokens."""
        tokens = torch.stack([(index == expert).any(dim=1) for expert in range(count)])
        some = [expert for expert, own in enumerate(tokens) if 0 < int(own.sum()) < len(own)]
        for expert in some[:2]:
            before = entries.data[expert].clone()
            entries.data[expert] = torch.nan
            try:
                out = self._run()
            finally:
                entries.data[expert] = before
            reached = torch.isnan(out.reshape(len(index), -1)).any(dim=1)
            if not torch.equal(reached.cpu(), tokens[expert].cpu()):
                return False
        return bool(some)

    def _routing(self) -> tuple[Tensor, Tensor]:
        """Run the block; return each token's experts, T × k, and the output."""
        seen: list[Tensor] = []
        own, call = self._owner.forward, self._call
        assert call is not None

        def forward(*args: object, **kwargs: object) -> object:
            seen.append(call.index_of(own, args, kwargs))
            return own(*args, **kwargs)

        with forward_as(self._owner, forward):
            out = self._run()
        return seen[-1], out

    def _avoids(self, mixture: Mixture) -> bool:
        """Return whether excluded experts are never chosen, tried with the most frequent one of each group."""
        chosen = torch.bincount(self._routing()[0].flatten().cpu(), minlength=mixture.count)
        worst = chosen.view(mixture.groups, -1).argmax(dim=1)
        keep = torch.ones(mixture.groups, mixture.count // mixture.groups, dtype=torch.bool)
        keep[torch.arange(mixture.groups), worst] = False
        if int(keep.sum()) < mixture.top:
            return True  # none of its experts can be removed anyway
        with mixture.silent(self._module, keep.flatten()):
            index, out = self._routing()
        return bool(keep.flatten()[index.cpu()].all()) and bool(torch.isfinite(out).all())
