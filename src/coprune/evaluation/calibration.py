"""Calibration samples of a language model, of one source or of several, some of which it may write itself."""

from __future__ import annotations

from coprune.base.errors import BadInput
from coprune.base.processes import Processes
from coprune.base.progress import Reporter
from coprune.base.words import Set
from coprune.data import Windows
from coprune.data.mixture import length_of, marked, mixed, packed, reads_conversations, source_windows
from coprune.data.tokenizing import Tokenizes
from coprune.data.windows import Sampling, draw_samples
from coprune.evaluation.own_text import own_documents
from coprune.model.generation import positions_of
from coprune.model.opened import Loaded
from coprune.recipe.sources import Source, counts_of, split_sources


def read_samples(
    data: str,
    loaded: Loaded,
    tokenizer: Tokenizes | None,
    sampling: Sampling,
    processes: Processes,
    reporter: Reporter,
) -> Windows:
    """Draw calibration samples.

    Args:
        data: the sources, as `split_sources` reads them.
        loaded: the dense model.
        tokenizer: as it begins a text.
        sampling: how many, and how.
        processes: those that need them; the first one writes.
        reporter: hears of what takes long.

    Raises:
        BadInput: a source cannot be read, or has not enough.
    """
    sources, nsamples = split_sources(data), sampling.nsamples
    if len(sources) == 1 and sources[0].is_plain and not reads_conversations(sources[0]):
        return draw_samples(sources[0].name, tokenizer, sampling)
    counts, lengths = (
        counts_of([source.share for source in sources], nsamples),
        sample_lengths(data, loaded, sampling[1]),
    )
    found: list[tuple[Source, Windows]] = []
    each = zip(sources, counts, lengths, strict=True)
    for source, count, length in sorted(each, key=lambda one: one[0].is_own):
        if count == 0:
            continue  # so small a share of so few samples is none
        if source.is_own:
            windows = _own(source, loaded, sampling._replace(nsamples=count, seqlen=length), processes, reporter)
        else:
            own = sampling._replace(nsamples=count, seqlen=length)
            windows = source_windows(source, (tokenizer, loaded.tokenizer), own)
        found.append((source, windows))
    order = {source.name: place for place, source in enumerate(sources)}
    return mixed(sorted(found, key=lambda pair: order[pair[0].name]), sampling.seed)


def sample_lengths(data: str, loaded: Loaded, seqlen: int) -> list[int]:
    """Tokens of a sample of every source. Raises BadInput for more than the model has positions."""
    limit, found = positions_of(loaded.model), list[int]()
    for source in split_sources(data):
        length = length_of(source, seqlen)
        if limit is not None and length > limit:
            raise BadInput(
                f"samples of {source.name} have {length} tokens, and the model {limit} positions",
                field="dataset",
                value=data,
                fix="give it a smaller seqlen",
            )
        found.append(length)
    return found


def _own(source: Source, loaded: Loaded, sampling: Sampling, processes: Processes, reporter: Reporter) -> Windows:
    nsamples, seqlen, seed = sampling[:3]
    documents = processes.from_first(lambda: own_documents(source, loaded, nsamples, seqlen, seed, reporter))
    said = "the dense model's own text" if source.prompts is None else f"the dense model's answers to {source.prompts}"
    return packed(documents, nsamples, seqlen, None, said)


def require_generated(windows: Windows) -> Windows:
    """Raise BadInput if nobody says which tokens a model wrote, or it wrote none of them."""
    if windows.generated is None or not bool(windows.generated.any()):
        raise BadInput(
            "no token of the calibration data is marked as generated",
            field="calibrate_on",
            value="generated",
            fix=("calibrate on what a model wrote, such as ", Set("dataset", "self"), ", or leave it out"),
        )
    return marked(windows)
