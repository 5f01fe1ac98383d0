"""Timing by turns: percentiles, paired ratios, rounds and seconds."""

import math
import time

import numpy as np
import pytest
import torch

from jobs.bench_rows import Effort
from jobs.bench_subject import random_subject
from jobs.bench_variants import decoders_of, networks_of
from jobs.measure import (
    Timings,
    float8_matmul_action,
    interleave,
    matmul_action,
    sustain,
    weight_bytes,
)
from streamdit.decoding import DecoderConfig
from streamdit.model.fast import FastConfig
from streamdit.model.quantise import TOKEN_LAYERS

CPU = torch.device("cpu")


def test_percentiles_and_paired_ratios_equal_numpys():
    first, second = Timings([3.0, 9.0, 1.0, 4.0, 7.5]), Timings([1.0, 2.0, 4.0, 1.0, 2.5])
    for percent in (0, 5, 50, 95, 100):
        expected = np.percentile(first.milliseconds, percent)
        assert first.percentile(percent) == pytest.approx(expected)
    ratios = np.array(first.milliseconds) / np.array(second.milliseconds)
    assert first.ratio_to(second) == pytest.approx(np.median(ratios))


def test_every_variant_runs_once_a_round_and_each_takes_every_turn():
    calls = []
    variants = {name: (lambda name=name: calls.append(name)) for name in "abc"}
    timings = interleave(variants, CPU, rounds=4, warm_up=2, parts=2)
    rounds = [calls[place : place + 3] for place in range(0, len(calls), 3)]
    assert len(rounds) == 6
    assert all(sorted(order) == ["a", "b", "c"] for order in rounds)
    assert {order[0] for order in rounds} == {"a", "b", "c"}
    assert all(len(entry.milliseconds) == 4 for entry in timings.values())


def test_matrix_products_are_counted_as_two_operations_a_multiply_add():
    run, flops = matmul_action([(4, 8, 16), (2, 3, 5)], CPU, torch.float32)
    run()
    assert flops == 2 * 4 * 8 * 16 + 2 * 2 * 3 * 5
    assert matmul_action([(4, 8, 16)], CPU, torch.float32, repeats=3)[1] == 3 * 2 * 4 * 8 * 16


def test_rounds_stop_when_the_time_is_up_but_for_the_least_number_of_them():
    timings = interleave({"a": lambda: None}, CPU, rounds=50, seconds=0.0)
    assert len(timings["a"].milliseconds) == 3


def test_what_runs_alone_is_timed_from_one_end_to_the_next():
    timings = sustain(lambda: time.sleep(0.002), CPU, seconds=0.05)
    assert sum(timings.milliseconds) >= 50
    assert min(timings.milliseconds) >= 2
    assert timings.mean == pytest.approx(np.mean(timings.milliseconds))


def test_matrix_products_in_float8_run_and_are_counted_like_others():
    run, flops = float8_matmul_action([(16, 32, 48)], CPU)
    run()
    assert flops == 2 * 16 * 32 * 48


def test_rounds_and_seconds_bound_what_is_timed():
    assert Effort().bounds == {"rounds": 30, "warm_up": 0, "seconds": 90.0}
    assert Effort(rounds=5).bounds == {"rounds": 5, "warm_up": 0, "seconds": math.inf}
    assert Effort(rounds=5, seconds=2.0).bounds == {"rounds": 5, "warm_up": 0, "seconds": 2.0}
    assert Effort(seconds=2.0).bounds["seconds"] == 2.0


def test_weights_that_modules_share_count_once():
    linear = torch.nn.Linear(8, 4)
    other = torch.nn.Linear(8, 4, bias=False)
    other.weight = linear.weight
    normal = torch.nn.BatchNorm1d(3)
    assert weight_bytes([linear, other]) == 4 * (8 * 4 + 4)
    # weight, bias, running mean and variance; and how many batches it saw, in 8 bytes
    assert weight_bytes([linear, normal]) == 4 * (8 * 4 + 4) + 4 * 4 * 3 + 8


def test_weights_of_a_variant_are_those_of_the_model_and_what_it_makes_beside_them():
    subject = random_subject("demo", None, 10, CPU, torch.bfloat16)
    plain = weight_bytes(networks_of(subject.model, FastConfig()))
    assert plain == 2 * sum(p.numel() for p in subject.model.parameters())
    rounded = weight_bytes(networks_of(subject.model, FastConfig(float8=True)))
    tokens = sum(
        block.get_submodule(name).weight.numel()
        for block in subject.model.blocks
        for name in TOKEN_LAYERS
    )
    assert plain + tokens < rounded < plain + 1.1 * tokens  # a byte a weight, and scales
    whole = weight_bytes([subject.autoencoder])
    assert weight_bytes(decoders_of(subject.autoencoder, DecoderConfig())) == whole
    halved = weight_bytes(decoders_of(subject.autoencoder, DecoderConfig(bfloat16=True)))
    assert whole * 1.4 < halved <= whole * 1.5


def test_a_variant_that_fails_is_left_out_from_then_on_if_somebody_wants_to_know():
    calls, told = [], []

    def fails_in_the_second_round():
        calls.append("b")
        if len(calls) == 2:
            raise RuntimeError("lost")

    variants = {"a": lambda: None, "b": fails_in_the_second_round, "c": lambda: None}
    timings = interleave(
        variants, CPU, rounds=5, warm_up=0, on_error=lambda name, error: told.append(name)
    )
    assert told == ["b"]
    assert len(calls) == 2
    assert {name: len(one.milliseconds) for name, one in timings.items()} == {"a": 5, "c": 5}
    calls.clear()
    with pytest.raises(RuntimeError, match="lost"):
        interleave(variants, CPU, rounds=5, warm_up=0)
