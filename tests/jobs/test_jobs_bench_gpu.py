"""`streamdit bench` on a CUDA device: every variant runs, agrees with plain, and has a rate."""

import pytest
import torch
from bench_command import bench

from jobs.bench_peer import PAIR
from jobs.bench_rows import CEILING, FLOAT8_CEILING
from jobs.bench_variants import FLOAT8, decoder_variants, step_variants
from streamdit.model.fast import FLOAT8_CAPABILITY
from streamdit.model.quantise import ERROR_BOUND

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
BARE = {CEILING, FLOAT8_CEILING, *PAIR}
"""Rows of what makes no frames."""


def check_rows(rows, difference):
    """All ran; what streams has a rate, memory, and a result near to plain's."""
    for name, row in rows.items():
        assert not (row["verdict"] or "").startswith("failed"), row
        assert row["p50_ms"] > 0
        if name not in BARE:
            assert row["fps"] > 0
        if row["difference"] is not None:
            bound = ERROR_BOUND if name == FLOAT8 else difference
            assert row["difference"] < bound, row
            assert row["peak_bytes"] > 0


def test_steps_streams_and_decoding_are_measured_with_every_variant(tmp_path):
    pytest.importorskip("diffusers", reason="the peer is diffusers'")
    figures, output = bench(tmp_path, "all", "--no-compile", "--sustained", "1")
    capability = torch.cuda.get_device_capability()
    steps = {row["variant"]: row for row in figures["step"]["rows"]}
    decoding = {row["variant"]: row for row in figures["decode"]["rows"]}
    streams = {row["variant"]: row for row in figures["stream"]["rows"]}
    assert set(step_variants(False, capability, torch.bfloat16)) <= set(steps)
    assert set(decoder_variants(False, capability)) <= set(decoding)
    check_rows(steps, difference=0.03)
    check_rows(decoding, difference=0.05)
    float8 = streams.pop(FLOAT8, None)
    check_rows(streams, difference=0.1)
    if capability >= FLOAT8_CAPABILITY:
        assert steps[FLOAT8]["verdict"] in ("kept", "dropped: not faster")
        assert float8["verdict"] in ("kept", "dropped: not faster")
    assert any("alone 1 s" in name for name in streams)
    assert torch.cuda.get_device_name() in output
    weights = 2 * figures["step"]["parameters"]
    assert all(row["peak_bytes"] > weights for row in steps.values() if row["peak_bytes"])


def test_training_steps_state_their_share_of_the_makers_peak(tmp_path, one_worker):
    figures, _ = bench(tmp_path, "train", "--batch", "2", "model.depth=2")
    rows = {row["variant"]: row for row in figures["rows"]}
    assert all(row["verdict"] is None for row in rows.values())
    shares = [row["model_flops_utilisation"] for name, row in rows.items() if name not in BARE]
    if figures["device"].startswith(("NVIDIA H100", "NVIDIA H200")):
        assert all(0 < share < 1 for share in shares)
