"""Contact sheets and mp4 files."""

import av
import numpy as np
import pytest
from PIL import Image

from evaluation.sheets import (
    INK,
    PAPER,
    contact_sheet,
    evenly_spaced,
    read_video,
    write_still,
    write_video,
)
from streamdit.errors import UserError


def moving_bar(count: int = 20, size: int = 64) -> np.ndarray:
    """A white bar that moves one pixel per frame over a dark blue ground."""
    frames = np.full((count, size, size, 3), (20, 30, 120), np.uint8)
    for index in range(count):
        frames[index, :, index : index + 16] = 240
    return frames


def test_video_reads_back_as_written(tmp_path):
    frames = moving_bar()
    path = write_video(tmp_path / "bar.mp4", frames, 16)
    back = read_video(path)
    assert back.shape == frames.shape
    assert np.abs(back.astype(int) - frames).mean() < 3
    assert list(tmp_path.iterdir()) == [path]


def test_video_is_what_browsers_play(tmp_path):
    path = write_video(tmp_path / "bar.mp4", moving_bar(), 23.976, upscale=2)
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.pix_fmt) == ("h264", "yuv420p")
        assert (stream.width, stream.height, stream.frames) == (128, 128, 20)
        assert float(stream.average_rate) == pytest.approx(23.976, abs=0.001)
    content = path.read_bytes()
    assert content.index(b"moov") < content.index(b"mdat")  # plays before it is all there


def test_writing_the_same_frames_gives_the_same_bytes(tmp_path):
    first = write_video(tmp_path / "a.mp4", moving_bar(), 16).read_bytes()
    for _ in range(20):
        assert write_video(tmp_path / "b.mp4", moving_bar(), 16).read_bytes() == first


def test_upscaling_repeats_pixels(tmp_path):
    frames = moving_bar(4)
    path = write_still(tmp_path / "bar.png", frames[3], upscale=3)
    expected = np.kron(frames[3], np.ones((3, 3, 1), np.uint8))
    np.testing.assert_array_equal(np.asarray(Image.open(path)), expected)


@pytest.mark.parametrize("shape", [(0, 64, 64, 3), (4, 63, 64, 3), (4, 64, 63, 3)])
def test_frames_that_h264_cannot_hold_are_refused(tmp_path, shape):
    with pytest.raises(UserError, match="at least one frame and even sides"):
        write_video(tmp_path / "bad.mp4", np.zeros(shape, np.uint8), 16)
    assert not list(tmp_path.iterdir())


def test_odd_frames_can_be_written_at_an_even_upscale(tmp_path):
    path = write_video(tmp_path / "odd.mp4", np.zeros((2, 33, 35, 3), np.uint8), 16, upscale=2)
    assert read_video(path).shape == (2, 66, 70, 3)


def test_unreadable_videos_are_named(tmp_path):
    (tmp_path / "text.mp4").write_text("not a video")
    for name in ("text.mp4", "missing.mp4"):
        with pytest.raises(UserError, match=name):
            read_video(tmp_path / name)


def test_evenly_spaced_frames_include_both_ends():
    assert evenly_spaced(32, 8) == [0, 4, 9, 13, 18, 22, 27, 31]
    assert evenly_spaced(5, 5) == [0, 1, 2, 3, 4]
    assert evenly_spaced(9, 1) == [0]


def test_sheet_shows_the_frames_in_order_under_their_labels():
    frames = np.stack([np.full((16, 16, 3), 10 * index, np.uint8) for index in range(9)])
    sheet = np.asarray(contact_sheet([("first", frames), ("second", frames)], 5, 4))
    cell, gap, margin = 64, 4, 24
    assert sheet.shape[1] == 2 * margin + 5 * cell + 4 * gap
    centres = [margin + cell // 2 + column * (cell + gap) for column in range(5)]
    rows = [margin + 26 + cell // 2, margin + 26 + cell + 16 + 26 + cell // 2]
    for row in rows:
        np.testing.assert_array_equal(sheet[row, centres, 0], [0, 20, 40, 60, 80])
    label = sheet[margin : margin + 20, margin : margin + 80]
    assert (np.abs(label.astype(int) - INK).sum(axis=-1) < 60).sum() > 20  # there is writing
    assert tuple(sheet[2, 2]) == PAPER


def test_long_labels_do_not_run_into_the_frame_count():
    frames = np.zeros((8, 32, 32, 3), np.uint8)
    long, empty = (
        np.asarray(contact_sheet([(label, frames)], 8, 1)) for label in ("caption " * 40, "")
    )
    # The count fills the same pixels at the right, whatever the label.
    np.testing.assert_array_equal(long[:50, -84:], empty[:50, -84:])
    assert (long[:50] != empty[:50]).any()


def test_sheets_accept_rows_of_different_sizes_and_lengths():
    rows = [
        ("short", np.zeros((3, 32, 32, 3), np.uint8)),
        ("wide", np.zeros((20, 24, 48, 3), np.uint8)),
    ]
    sheet = contact_sheet(rows, 6, 1)
    assert sheet.width == 2 * 24 + 6 * 48 + 5 * 4


def test_empty_sheets_are_refused():
    with pytest.raises(UserError, match="at least one row"):
        contact_sheet([])
