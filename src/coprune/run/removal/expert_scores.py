"""The scores of experts that a run keeps beside it, so that another one can blend its domains anew without a pass."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Self

import torch
from pydantic import BaseModel, ConfigDict, ValidationError

from coprune.base.errors import BadInput
from coprune.base.files import write_text
from coprune.base.validation import reason
from coprune.model.removal.experts import Mixture
from coprune.pruning.structure.experts import ExpertSums
from coprune.run.session import Session

EXPERTS_FILE = "experts.json"
"""In a run's folder."""
Scored = dict[str, dict[str, ExpertSums]]
"""What was summed up of every mixture, by domain and block."""


class _Kept(BaseModel):
    """Sums of the experts of one block, over the tokens of one domain."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    tokens: list[float]
    weighted: list[float]


class ExpertScores(BaseModel):
    """What was summed up, and of which model and samples."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str
    """Fingerprint of its weights."""
    data: dict[str, str]
    """Fingerprint of the samples, by domain."""
    sums: dict[str, dict[str, _Kept]]
    """By domain and block."""

    @classmethod
    def of(cls, model: str, data: dict[str, str], scored: Scored) -> Self:
        """What a pass gave."""
        sums = {
            name: {block: _Kept(tokens=s.tokens.tolist(), weighted=s.weighted.tolist()) for block, s in blocks.items()}
            for name, blocks in scored.items()
        }
        return cls(model=model, data=data, sums=sums)

    def scored(self) -> Scored:
        """As a pass gives it."""
        return {
            name: {
                block: ExpertSums(*(torch.tensor(values, dtype=torch.float64) for values in (s.tokens, s.weighted)))
                for block, s in blocks.items()
            }
            for name, blocks in self.sums.items()
        }

    def tells_of(self, block: str, mixture: Mixture) -> bool:
        """Whether every domain has sums of all experts of a mixture."""
        found = [own.get(block) for own in self.sums.values()]
        return bool(found) and all(
            one is not None and len(one.tokens) == len(one.weighted) == mixture.count for one in found
        )

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read a file. Raises BadInput where it is missing or damaged."""
        try:
            return cls.model_validate_json(path.read_bytes())
        except OSError as error:
            raise BadInput(f"{path} cannot be read: {error.strerror}", field="domains", value=path) from None
        except ValidationError as error:
            detail = reason(error.errors()[0])
            raise BadInput(f"{path} holds no scores of experts: {detail}", field="domains", value=path) from None


def own_file(session: Session) -> Path:
    """Where a run keeps its scores."""
    return session.opened.recipe.run_folder / EXPERTS_FILE


def known_scores(session: Session, model: str, data: dict[str, str], mixtures: Mapping[str, Mixture]) -> Scored | None:
    """Scores that need no pass: those that the recipe names, or those of this run before it was killed.

    Args:
        session: the run.
        model: fingerprint of its weights.
        data: fingerprints of the samples, by domain.
        mixtures: by block, those whose scores are wanted.

    Raises:
        BadInput: the file that is named is of another model, lacks a mixture, or has other domains than have weights.
    """
    asked = session.opened.recipe.structure
    if asked.kept_scores is not None:
        kept = ExpertScores.read(asked.kept_scores)
        if kept.model != model:
            raise BadInput(
                f"{asked.kept_scores} holds scores of another model", field="domains", value=asked.kept_scores
            )
        if (
            lacking := next((block for block, one in mixtures.items() if not kept.tells_of(block, one)), None)
        ) is not None:
            raise BadInput(
                f"{asked.kept_scores} holds no scores of the experts in {lacking}",
                field="domains",
                value=asked.kept_scores,
                fix="name the texts of the domains, or the scores of a run that removed experts alone",
            )
        if asked.weights is not None and asked.weights.keys() != kept.sums.keys():
            named = ", ".join(kept.sums)
            raise BadInput(f"weights are of the domains that there are ({named})", field="blend", value=asked.blend)
        return kept.scored()
    path = own_file(session)
    if not session.opened.around.writes or not path.is_file():
        return None
    try:
        kept = ExpertScores.read(path)
    except BadInput:
        return None  # cut off when the run was killed, or something else's
    return kept.scored() if (kept.model, kept.data) == (model, data) else None


def keep_scores(session: Session, model: str, data: dict[str, str], scored: Scored) -> None:
    """Keep a pass's sums beside the run, where it leaves anything."""
    if session.opened.around.writes:
        write_text(own_file(session), ExpertScores.of(model, data, scored).model_dump_json() + "\n")
