"""Time of a run: the sum of all passes, solves and transfers, on a machine that does nothing else."""

from __future__ import annotations

from coprune.run.estimate.block import PROBE_TOKENS
from coprune.run.estimate.work import Settings, Workload


def seconds_of(work: Workload, run: Settings) -> float:
    """Seconds from now to the end."""
    block, read = work.block, work.block.read_seconds * work.blocks if run.streamed else 0.0
    tokens, head = run.tokens, work.head
    one_pass = block.seconds_per_token * work.blocks
    passes = 2 if run.propagation == "block" else 1
    passes += 1 if run.dense_beside else 0
    statistics = sum(work.solving[s].statistic_seconds_per_token * count for s, count in work.leaders.items())
    first = sum(work.solving[s].seconds * count for s, count in work.leaders.items())
    again = sum(work.solving[s].seconds_again * (count - work.leaders[s]) for s, count in work.matrices.items())
    probed = min(PROBE_TOKENS, run.seqlen)
    proof = 2 * (probed * one_pass + min(probed, head.compared_positions) * head.seconds_per_token)
    evaluation = sum(run.evaluation_tokens) * (one_pass + head.seconds_per_token) * run.evaluations
    # Half of a step's passes are forward, the rest backward; and a tenth of the batches watch after every tenth step.
    trained = 3.0 * run.reconstruction_steps * run.batch * (run.batch_length or run.seqlen)
    trained += 1.1 * tokens if run.reconstruction_steps else 0
    # Reading for the proof, for every evaluation, for pruning and for verifying, and writing, which takes about as long
    # as reading and its checksum once more.
    transfers = read * (2 + run.evaluations * len(run.evaluation_tokens)) + 3 * read * run.saved
    afterwards = 0.0
    if run.training is not None:
        # A step goes forward, and back in twice the time; a teacher goes forward beside it.
        each = (3 + run.training.distils) * (one_pass + head.seconds_per_token)
        afterwards = run.training.seconds + run.training.tokens * each
    return (
        proof
        + afterwards
        + evaluation
        + passes * tokens * one_pass
        + tokens * statistics
        + ((first + again) / run.processes + trained * one_pass + transfers)
    )
