"""What estimates rest on: live bytes that are counted exactly, growth that is extrapolated, and proposals that fit."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from coprune.base.devices import DeviceMemory
from coprune.base.errors import BadInput
from coprune.base.memory import available_bytes
from coprune.model.matrices import Matrix
from coprune.model.walk.activations import DeviceRoom
from coprune.model.walk.inputs import Inputs, InputSample
from coprune.pruning.methods import METHODS
from coprune.pruning.pruner import Solver, prune_matrix
from coprune.recipe.pattern import NM, Target
from coprune.run.estimate.block import BlockCosts, Busyness, HeadCosts, LiveBytes
from coprune.run.estimate.estimate import SLACK, STEADY, Settings, Training, Workload, estimate
from coprune.run.estimate.found import BUSY, Estimate
from coprune.run.estimate.solving import WORKSPACE, SolveCosts, Trials, _extrapolate, measure_solving
from support.limits import data_of_imports
from support.pico_folder import save_pico, write_words

MIB = 1 << 20


def test_live_bytes_are_those_of_the_tensors_alive() -> None:
    x = torch.ones(256, 256)  # made before: does not count, nor do views of it
    size = x.nbytes
    live = LiveBytes()
    with live:
        y = x.T[3:].T
        assert live.now == 0
        a = x + 1
        b = a * 2
        assert live.now == 2 * size
        del a
        assert live.now == size
        b += x @ x
        assert live.now == size
        assert y.shape == (256, 253)
    assert live.most == 2 * size


@settings(deadline=None, max_examples=30)
@given(st.floats(1e-9, 1e-3), st.floats(1e-12, 1e-6), st.sampled_from([512, 4096]))
def test_extrapolation_finds_square_and_cubic_growth(square: float, cubic: float, width: int) -> None:
    def time_of(w: int) -> float:
        return square * w**2 + cubic * w**3

    assert _extrapolate([(128, time_of(128)), (256, time_of(256))], width) == pytest.approx(time_of(width), rel=1e-3)


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_bytes_of_a_solve_are_extrapolated_from_smaller_ones(method: str) -> None:
    """Against those of a matrix of the full size, whose statistic is gathered and which is solved."""
    rows, width, solver, target = 512, 1024, Solver(METHODS[method]), Target(NM(2, 4), 0.5)
    trials = Trials(solver, target, layer_error=True, device=torch.device("cpu"))
    told = measure_solving((rows, width), trials, 0.0)
    linear = nn.Linear(width, rows, bias=False).requires_grad_(False)
    assert solver.statistic is not None
    gathering, solving = LiveBytes(), LiveBytes()
    x = torch.randn(2 * width, width)
    with gathering:
        inputs = Inputs(solver.statistic(width), InputSample(width, 1))
        inputs.update(x)
    assert told.statistic_bytes == pytest.approx(gathering.now, rel=0.01)
    with solving:
        prune_matrix(Matrix("solved", linear, "weight", input_dim=1), inputs, solver, target, True)
    workspace = 0 if method == "wanda" else WORKSPACE
    assert 0.95 < (told.most_bytes - workspace) / solving.most < 1.25


BLOCK = BlockCosts(
    read_seconds=0.1,
    weight_bytes=100 * MIB,
    seconds_per_token=1e-4,
    bytes_per_token=40_000,
    waiting_bytes_per_token=30_000,
    hidden_bytes_per_token=8_000,
    training_bytes_per_token=80_000,
    groups=(((2048, 2048),),),
)
SOLVING = {
    (2048, 2048): SolveCosts(
        seconds=1.0,
        seconds_again=0.5,
        most_bytes=80 * MIB,
        statistic_bytes=20 * MIB,
        statistic_seconds_per_token=1e-5,
    )
}
WORK = Workload(
    resident=600 * MIB,
    peak_so_far=600 * MIB,
    unread_bytes=0,
    rest_bytes=200 * MIB,
    total_bytes=3400 * MIB,
    blocks=32,
    block=BLOCK,
    solving=SOLVING,
    matrices=Counter({(2048, 2048): 32}),
    leaders=Counter({(2048, 2048): 32}),
    head=HeadCosts(vocabulary=16_000, bytes_per_value=4, seconds_per_token=1e-5, compared_positions=32),
)
RUN = Settings(
    samples=128,
    seqlen=512,
    batch=8,
    evaluation_tokens=(100_000,),
    evaluation_batch=4096,
    evaluations=2,
    propagation="sequential",
    streamed=True,
    dense_beside=False,
    reconstruction_steps=0,
    activation_limit=None,
    saved=True,
    dtype="float32",
)


def test_more_work_takes_more() -> None:
    base = estimate(WORK, RUN, None)
    for more in (
        replace(RUN, samples=256),
        replace(RUN, evaluation_tokens=(200_000,)),
        replace(RUN, reconstruction_steps=100),
        replace(RUN, dense_beside=True),
    ):
        other = estimate(WORK, more, None)
        assert other.seconds > base.seconds
        assert other.peak_bytes >= base.peak_bytes
    assert estimate(WORK, replace(RUN, activation_limit=0), None).peak_bytes < base.peak_bytes


def test_samples_of_several_lengths_take_what_their_tokens_take() -> None:
    alike = replace(RUN, mean_length=512.0, batch_length=512)
    assert estimate(WORK, alike, None) == estimate(WORK, RUN, None)
    half = replace(RUN, mean_length=256.0, batch_length=512)
    assert half.tokens == replace(RUN, samples=64).tokens == 128 * 256
    assert estimate(WORK, half, None).seconds == estimate(WORK, replace(RUN, samples=64), None).seconds
    assert replace(RUN, batch_length=1024).batch_tokens == 2 * RUN.batch_tokens == 8 * 1024


def test_dense_propagation_takes_one_pass_and_the_memory_of_block() -> None:
    block, dense, sequential = (
        estimate(WORK, replace(RUN, propagation=name), None) for name in ("block", "dense", "sequential")
    )
    assert dense.peak_bytes == block.peak_bytes
    assert dense.seconds == sequential.seconds < block.seconds
    unfit = replace(RUN, propagation="dense")
    refused = estimate(WORK, unfit, MIB).proposal
    assert refused is not None
    assert "propagation" not in refused.settings


@settings(deadline=None, max_examples=50)
@given(st.integers(50, 8000), st.booleans(), st.sampled_from(["block", "sequential", "dense"]))
def test_what_is_proposed_fits(mebibytes: int, streamed: bool, propagation: str) -> None:
    run = replace(RUN, streamed=streamed, propagation=propagation)
    available = mebibytes * MIB
    found = estimate(WORK, run, available)
    if found.fits:
        assert found.proposal is None
        return
    assert found.proposal is not None
    if not found.proposal.enough:
        return
    changed = run
    for name, value in found.proposal.settings.items():
        changed = {
            "batch_size": lambda s, v: replace(s, batch=v, evaluation_batch=s.seqlen * v),
            "activation_memory": lambda s, v: replace(s, activation_limit=v),
            "propagation": lambda s, v: replace(s, propagation=v),
            "nsamples": lambda s, v: replace(s, samples=v),
            "stream": lambda s, v: replace(s, streamed=v),
        }[name](changed, value)
    resident = WORK.resident - (WORK.total_bytes - WORK.rest_bytes if changed.streamed and not streamed else 0)
    assert replace(estimate(replace(WORK, resident=resident), changed, available), resident_bytes=WORK.resident).fits


ON_A_GPU = replace(
    WORK,
    device=DeviceMemory("cuda:0", allocated=200 * MIB, peak=200 * MIB, available=80 << 30),
)


def test_a_run_on_a_device_is_held_against_the_devices_memory() -> None:
    """Host memory then holds what passes through it; what is computed with is on the device, and refused there."""
    here, there = estimate(WORK, RUN, None), estimate(ON_A_GPU, RUN, 2 << 30)
    assert there.fits, "16 samples of a large model on a GPU need little of a small host"
    assert not estimate(WORK, RUN, 2 << 30).fits
    assert there.device is not None
    assert there.device.phases.keys() == here.phases.keys()
    for phase, size in there.device.phases.items():
        on_the_host = here.phases[phase] - WORK.resident - STEADY
        assert size - ON_A_GPU.device.allocated == pytest.approx(on_the_host, abs=2)
    assert there.peak_bytes < here.peak_bytes
    small = replace(ON_A_GPU, device=DeviceMemory("cuda:0", 200 * MIB, 200 * MIB, available=1 << 30))
    refused = estimate(small, RUN, 64 << 30)
    assert not refused.fits
    assert refused.proposal is not None
    assert "GiB on cuda:0" in refused.line()
    assert "of 1.2 GiB on cuda:0" in refused.line()
    with pytest.raises(BadInput, match="would not fit"):
        refused.require()


def test_hidden_states_that_a_device_has_no_room_for_are_held_by_the_host() -> None:
    """Room for none of them on the device takes them all off it; pinned memory may be twice as large."""
    assert ON_A_GPU.device is not None
    run = replace(RUN, propagation="block", streamed=True, samples=1000, batch=1, evaluation_batch=RUN.seqlen)
    full = replace(run, device_room=DeviceRoom(1 << 40, asked=False))
    none = replace(run, device_room=DeviceRoom(0, asked=True))
    all_there, aside = estimate(ON_A_GPU, full, None), estimate(ON_A_GPU, none, None)
    assert all_there.device is not None
    assert aside.device is not None
    hidden = SLACK * run.tokens * WORK.block.hidden_bytes_per_token
    assert hidden > 100 * MIB
    assert all_there.device.phases["pruning"] - aside.device.phases["pruning"] == pytest.approx(hidden, abs=2)
    assert aside.phases["pruning"] - all_there.phases["pruning"] == pytest.approx(2 * hidden, abs=2)
    on_disk = estimate(ON_A_GPU, replace(none, activation_limit=0), None)
    assert on_disk.phases["pruning"] == all_there.phases["pruning"]
    needed = aside.device.peak_bytes - ON_A_GPU.device.allocated
    proposal = estimate(replace(ON_A_GPU, device=replace(ON_A_GPU.device, available=needed)), full, None).proposal
    assert proposal is not None
    assert proposal.settings == {"device_activation_memory": 0}


def test_a_block_that_is_fetched_beside_another_takes_its_own_memory() -> None:
    """Only where blocks are streamed; pinned memory may be twice as large."""
    both = replace(ON_A_GPU, ahead_bytes=BLOCK.weight_bytes)
    one, two = estimate(ON_A_GPU, RUN, None), estimate(both, RUN, None)
    assert one.device is not None
    assert two.device is not None
    weights = SLACK * BLOCK.weight_bytes
    assert two.device.phases["pruning"] - one.device.phases["pruning"] == pytest.approx(weights, abs=2)
    assert two.phases["reading"] - one.phases["reading"] == pytest.approx(2 * weights, abs=2)
    whole = replace(RUN, streamed=False)
    assert estimate(both, whole, None) == estimate(ON_A_GPU, whole, None)


def test_people_are_told_what_takes_the_memory() -> None:
    first, host, device = str(estimate(ON_A_GPU, RUN, 2 << 30)).splitlines()
    assert first.startswith("Estimate: ")
    assert host.startswith("By phase: reading 0.")
    assert host.endswith("GiB; 0.59 of that are held already.")
    assert device.startswith("On cuda:0: proof 0.")
    assert str(estimate(WORK, RUN, MIB)).splitlines()[-1].startswith("It would not fit. ")
    found = estimate(ON_A_GPU, RUN, 2 << 30)
    assert found.device is not None
    rows = {row[0]: row[1] for row in found.sheet().rows}
    there = found.device.phases
    assert rows["available"] == "2.59 GiB, 80.20 GiB on cuda:0"
    assert rows["proof"] == f"{there['proof'] / (1 << 30):.2f} GiB on cuda:0"
    assert rows["pruning"].startswith(f"{found.phases['pruning'] / (1 << 30):.2f} GiB, ")
    assert "cuda" not in str(rows["reading"])


def test_several_lists_of_hidden_states_share_the_limit() -> None:
    limited = replace(RUN, propagation="block", activation_limit=64 * MIB, evaluation_tokens=())
    one, two = (estimate(WORK, replace(limited, dense_beside=dense), None).peak_bytes for dense in (False, True))
    assert one == two


def test_the_proof_takes_the_logits_that_it_compares() -> None:
    """32 positions' where the model can give those alone; with a large vocabulary those of all would be most of the run."""
    large = replace(WORK, head=replace(WORK.head, vocabulary=256_000))
    every = replace(large, head=replace(large.head, compared_positions=512))
    few, all_of_them = (estimate(work, RUN, None).phases["proof"] for work in (large, every))
    assert few < WORK.resident + 300 * MIB
    assert all_of_them > WORK.resident + 1000 * MIB


def test_a_limit_on_the_process_counts() -> None:
    script = (
        "import resource; from coprune.base.memory import available_bytes, _numbers; from pathlib import Path;"
        "used = _numbers(Path('/proc/self/status'))['VmData'];"
        "resource.setrlimit(resource.RLIMIT_DATA, (used + 100 * 2**20, used + 100 * 2**20));"
        "print(available_bytes())"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert int(done.stdout) <= 100 * MIB < (available_bytes() or 0)


def test_a_run_that_would_not_fit_says_so_and_leaves_nothing(tmp_path: Path) -> None:
    """Samples whose hidden states alone are beyond the limit, which is far above what the process holds."""
    save_pico(tmp_path / "model", max_position_embeddings=4096)
    words = write_words(tmp_path / "words.txt", 30_000)
    arguments = ["--dataset", str(words), "--nsamples", "1024", "--seqlen", "2048", "--no-eval", "--device", "cpu"]
    limit = data_of_imports() + 500 * MIB

    def run(command: str, *more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "coprune", command, str(tmp_path / "model"), *arguments, *more],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_DATA, (limit, limit)),
        )

    refused = run("prune", "--save", str(tmp_path / "run"), "--save-model", str(tmp_path / "out"))
    assert refused.returncode == 2
    assert "would not fit" in refused.stderr
    assert "--activation-memory 0" in refused.stderr
    assert not (tmp_path / "out").exists()
    found = json.loads(run("estimate", "--json").stdout)
    assert not found["fits"]
    assert found["peak_bytes"] > 1024 * 2048 * 64 * 4


def test_a_training_takes_the_time_of_its_tokens_and_the_memory_of_its_moments() -> None:
    base = estimate(WORK, RUN, None)
    alone, taught = (
        estimate(WORK, replace(RUN, training=Training(10_000, 0.0, 7 << 30, distils)), None)
        for distils in (False, True)
    )
    one_pass = WORK.block.seconds_per_token * WORK.blocks + WORK.head.seconds_per_token
    assert alone.seconds - base.seconds == pytest.approx(30_000 * one_pass)
    assert taught.seconds - alone.seconds == pytest.approx(10_000 * one_pass)
    assert taught.peak_bytes > 7 << 30


def test_a_busy_machine_gets_a_second_time() -> None:
    with Busyness(torch.device("cpu")) as waited:
        time.sleep(0.1)
    assert waited.factor > BUSY
    with Busyness(torch.device("meta")) as elsewhere:
        time.sleep(0.1)
    assert elsewhere.factor == 1
    idle, busy = (estimate(replace(WORK, busy=factor), RUN, None) for factor in (1.1, 3.0))
    assert "others" not in idle.line()
    assert busy.busy_seconds == pytest.approx(3 * busy.seconds)
    told = replace(Estimate(0, 120.0, None, 0), busy_seconds=360.0).line()
    assert told.endswith("about 2 min, or 6 min if others keep this machine as busy as now.")
