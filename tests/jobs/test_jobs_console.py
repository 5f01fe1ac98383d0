"""Progress and numbers as people read them, on a terminal and in a log file."""

import io
import re

import pytest
from rich.console import Console

import jobs.console
from jobs.console import (
    format_bytes,
    format_counters,
    format_duration,
    format_flops,
    format_number,
    format_parameters,
    progress,
    say,
)


@pytest.fixture
def output(monkeypatch):
    """What lands on stderr; `output(terminal)` chooses what stderr is."""

    def make(terminal):
        file = io.StringIO()
        console = Console(file=file, force_terminal=terminal, width=80, highlight=False)
        monkeypatch.setattr(jobs.console, "console", console)
        return file

    return make


def test_log_file_gets_plain_whole_lines(output):
    file = output(terminal=False)
    with progress("curate") as on_progress:
        on_progress(0, 3, {})
        on_progress(1, 3, {"clips": 1200})
        on_progress(3, 3, {"clips": 3600, "loss": 0.03125} | {f"count{i}": i for i in range(1, 7)})
    lines = file.getvalue().splitlines()
    assert "\x1b" not in file.getvalue()
    assert lines[0] == "curate: 0/3 units  0.0 s"
    # One second in, nothing new is worth a line; the end always is, and is not wrapped.
    counts = "  ".join(f"count{i} {i}" for i in range(1, 7))
    assert lines[1] == f"curate: 3/3 units  0.0 s  clips 3,600  loss 0.03125  {counts}"
    assert lines[2] == "curate: finished in 0.0 s"
    assert len(lines) == 3


def test_log_file_gets_a_line_per_interval(output, monkeypatch):
    file = output(terminal=False)
    clock = iter([0.0, 0.0, 5.0, 12.0, 23.0, 24.0, 24.0])  # 9 s a step after the first
    monkeypatch.setattr(jobs.console.time, "monotonic", lambda: next(clock))
    with progress("train", unit="steps") as on_progress:
        for done in (1, 2, 3, 4):
            on_progress(done, 9, {})
    assert file.getvalue().splitlines() == [
        "train: 1/9 steps  5.0 s",
        "train: 3/9 steps  23 s  about 54 s left",
        "train: finished in 24 s",
    ]


def test_what_an_earlier_run_did_does_not_count_as_speed(output, monkeypatch):
    file = output(terminal=False)
    clock = iter([0.0, 0.0, 0.0, 60.0, 61.0])
    monkeypatch.setattr(jobs.console.time, "monotonic", lambda: next(clock))
    with progress("curate") as on_progress:
        on_progress(900, 1000, {})
        on_progress(910, 1000, {"clips": 20})
    assert file.getvalue().splitlines()[:2] == [
        "curate: 900/1000 units  0.0 s",
        "curate: 910/1000 units  1 min 00 s  about 9 min 00 s left  clips 20",
    ]


def test_terminal_gets_a_live_bar_that_leaves_one_line(output):
    file = output(terminal=True)
    with progress("curate") as on_progress:
        on_progress(1, 2, {"clips": 5})
        on_progress(2, 2, {"clips": 9})
    text = file.getvalue()
    assert "\x1b[" in text
    assert "2/2" in text
    assert re.search(r"curate: finished in \d\.\d s\n$", text)


def test_failed_stage_is_not_called_finished(output):
    file = output(terminal=False)
    with pytest.raises(RuntimeError), progress("curate"):
        raise RuntimeError("broken")
    assert "finished" not in file.getvalue()


def test_messages_are_neither_wrapped_nor_taken_for_markup(output):
    file = output(terminal=False)
    say("path [bold]/" + "x" * 200)
    assert file.getvalue() == "path [bold]/" + "x" * 200 + "\n"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (1204, "1,204"),
        (3.0, "3"),
        (0.03125, "0.03125"),
        (12345.678, "12,346"),
        (2e-05, "2.000e-05"),
        (float("nan"), "nan"),
        (float("inf"), "inf"),
    ],
)
def test_numbers_are_short(value, text):
    assert format_number(value) == text


def test_counters_name_their_numbers():
    assert format_counters({"clips": 1204, "loss": 0.5}) == "clips 1,204  loss 0.5"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.04, "0.0 s"),
        (9.94, "9.9 s"),
        (59.4, "59 s"),
        (59.6, "1 min 00 s"),
        (185, "3 min 05 s"),
        (3599.6, "1 h 00 min"),
        (7620, "2 h 07 min"),
    ],
)
def test_durations_are_read_at_a_glance(seconds, text):
    assert format_duration(seconds) == text


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (512, "512 B"),
        (1500, "1.5 kB"),
        (99600, "100 kB"),
        (3400000.0, "3.4 MB"),
        (999999, "1.0 MB"),
        (7900000000.0, "7.9 GB"),
        (2500000000000.0, "2.5 TB"),
    ],
)
def test_sizes_have_decimal_units(count, text):
    assert format_bytes(count) == text


def test_parameters_and_operations_have_three_digits():
    assert format_parameters(863) == "863"
    assert format_parameters(7_148_352) == "7.15M"
    assert format_parameters(4_096_250_784) == "4.1B"
    assert format_flops(1_646_264_320) == "1.65 GFLOP"
    assert format_flops(3.01e15) == "3.01 PFLOP"
    assert format_flops(5e18) == "5,000 PFLOP"
