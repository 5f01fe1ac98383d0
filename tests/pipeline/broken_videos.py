"""Videos that are broken in one way each, and decoders that are."""

import contextlib
import os
from pathlib import Path

import av
import numpy as np
from conftest import COLOURS, scene_pictures, write_video

from pipeline.child import close_shared_child


def noise(frames, size=64):
    return list(np.random.default_rng(0).integers(0, 256, (frames, size, size, 3), np.uint8))


def write_index_first(path, pictures):
    """A video whose index is at the front, so that a cut file still opens."""
    with av.open(str(path), "w", options={"movflags": "faststart"}) as container:
        stream = container.add_stream("libx264", rate=16)
        stream.height, stream.width = pictures[0].shape[:2]
        stream.pix_fmt = "yuv420p"
        for picture in pictures:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())


def packet_end(path, count):
    """Byte after the first `count` packets in the file."""
    with av.open(str(path)) as container:
        packets = [packet for packet in container.demux(video=0) if packet.size]
    return sorted(packet.pos + packet.size for packet in packets)[count - 1]


def cut_index(path):
    write_video(path, noise(16))
    content = path.read_bytes()
    path.write_bytes(content[: content.index(b"moov") + 40])


def lose_index(path):
    write_video(path, noise(16))
    content = path.read_bytes()
    path.write_bytes(content[: content.index(b"moov") // 2])


def cut_pictures(path):
    write_index_first(path, noise(64))
    path.write_bytes(path.read_bytes()[: packet_end(path, 40)])


def cut_inside_a_picture(path):
    write_index_first(path, noise(64))
    path.write_bytes(path.read_bytes()[: packet_end(path, 40) - 100])


def overstate_frames(path: Path, times: int) -> Path:
    """Multiply the frame counts in an AVI header."""
    data = bytearray(path.read_bytes())
    for tag, offset in ((b"avih", 24), (b"strh", 40)):
        place = data.index(tag) + offset
        count = int.from_bytes(data[place : place + 4], "little")
        data[place : place + 4] = (count * times).to_bytes(4, "little")
    path.write_bytes(data)
    return path


def take_all_duration(path):
    """Set the time from frame to frame to zero in the index of an MP4."""
    write_video(path, scene_pictures(COLOURS["blue"], 16), options={"bf": "0"})
    data = bytearray(path.read_bytes())
    delta = data.index(b"stts") + 16
    data[delta : delta + 4] = bytes(4)
    path.write_bytes(data)


def write_sound(path):
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000)
        samples = np.zeros((1, 16000), np.float32)
        frame = av.AudioFrame.from_ndarray(samples, format="fltp", layout="mono")
        frame.sample_rate = 16000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())


@contextlib.contextmanager
def decoder_that(monkeypatch, tmp_path, code):
    """Decoder processes run `code` before anything else."""
    plugin = tmp_path / "plugin"
    plugin.mkdir()
    lines = "\n".join(f"    {line}" for line in code.splitlines())
    head = "import sys\nif 'pipeline.child' in ' '.join(sys.orig_argv):\n"
    (plugin / "sitecustomize.py").write_text(head + lines)
    close_shared_child()
    with monkeypatch.context() as patch:
        patch.setenv("PYTHONPATH", f"{plugin}:{os.environ.get('PYTHONPATH', '')}")
        try:
            yield
        finally:
            close_shared_child()
