"""Peak memory and time of a run before it is done: from shapes and a short calibration of this machine.

The memory is what is held already plus the largest of the run's phases, each of which holds the weights and activations
that it needs; the time is the sum of all passes, solves and transfers. A run that would not fit is refused with settings
that would.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from coprune.model.walk.activations import DeviceRoom
from coprune.run.estimate.found import DevicePeak, Estimate
from coprune.run.estimate.memory import device_phases, host_phases
from coprune.run.estimate.proposal import Proposal
from coprune.run.estimate.seconds import seconds_of
from coprune.run.estimate.work import Settings, Workload


def estimate(workload: Workload, settings: Settings, available: int | None) -> Estimate:
    """Estimate peak and time, and find settings that fit if these do not.

    Args:
        workload: what was measured.
        settings: what is asked for.
        available: bytes of host memory that the process may still take; None if the system does not tell.

    Returns:
        The estimate, with a proposal if the run would not fit.
    """
    found = _peaks(workload, settings, available)
    seconds = seconds_of(workload, settings)
    found = replace(found, seconds=seconds, busy_seconds=seconds * max(1.0, workload.busy))
    return found if found.fits else replace(found, proposal=_proposal(workload, settings, available))


def _peaks(work: Workload, run: Settings, available: int | None) -> Estimate:
    """The memory of a run, and whether that fits."""
    phases, there = host_phases(work, run), device_phases(work, run)
    on_device = None
    if work.device is not None:
        peak = max(there.values())
        on_device = DevicePeak(work.device.name, peak, work.device.available, work.device.allocated, there)
    return Estimate(
        peak_bytes=max(work.peak_so_far, *phases.values()),
        seconds=0.0,
        available_bytes=available,
        resident_bytes=work.resident,
        phases=phases,
        processes=run.processes,
        device=on_device,
    )


def _proposal(work: Workload, run: Settings, available: int | None) -> Proposal:
    """The first single change that makes the run fit, or several together."""
    fewer = max(1, run.samples // 4)
    changes: list[tuple[str, bool | int | str, Callable[[Settings], Settings]]] = [
        ("batch_size", 1, lambda s: replace(s, batch=1, evaluation_batch=s.seqlen)),
        ("activation_memory", 0, lambda s: replace(s, activation_limit=0)),
        # `dense` holds as much at once as `block`.
        ("propagation", "block", lambda s: replace(s, propagation="block") if s.propagation == "sequential" else s),
        ("nsamples", fewer, lambda s: replace(s, samples=fewer)),
    ]
    if work.device is not None:
        none = DeviceRoom(0, asked=True)
        changes.insert(1, ("device_activation_memory", 0, lambda s: replace(s, device_room=none)))
    if not run.streamed:
        # What the blocks hold now is let go of.
        changes.insert(0, ("stream", True, lambda s: replace(s, streamed=True)))

    def fits(settings: Settings) -> bool:
        return _peaks(
            _without_blocks(work) if settings.streamed and not run.streamed else work, settings, available
        ).fits

    halves = run.dtype == "float32"
    useful = [(name, value, change) for name, value, change in changes if change(run) != run]
    for name, value, change in useful:
        if fits(change(run)):
            return Proposal({name: value}, True, halves)
    settings = run
    taken: dict[str, bool | int | str] = {}
    for name, value, change in useful:
        settings, taken[name] = change(settings), value
        if fits(settings):
            return Proposal(taken, True, halves)
    return Proposal(taken, False, halves)


def _without_blocks(work: Workload) -> Workload:
    """The same where the blocks, which are in memory, stay on the disk."""
    blocks = work.total_bytes - work.rest_bytes
    if work.device is not None:
        held = work.device.allocated - blocks
        return replace(
            work, device=replace(work.device, allocated=held, available=_more(work.device.available, blocks))
        )
    unread = min(work.unread_bytes, blocks)
    return replace(work, unread_bytes=work.unread_bytes - unread, resident=work.resident - (blocks - unread))


def _more(available: int | None, freed: int) -> int | None:
    return None if available is None else available + freed
