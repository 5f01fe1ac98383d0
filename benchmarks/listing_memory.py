"""What a source costs the driver of `curate` in memory: `python benchmarks/listing_memory.py`.

Folders of few and of many tiny files are listed, identified and planned, each in a fresh process;
printed is the growth of its peak of resident memory, per source. Option: `--sources N...`.
"""

import argparse
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

from pipeline.plan import extend_plan
from pipeline.sources import list_sources

FOLDER_FILES = 1000
UNIT_SOURCES = 32


def make_files(folder: Path, count: int) -> None:
    """Files whose content tells them apart; nobody decodes them here."""
    for i in range(count):
        parent = folder / f"{i // FOLDER_FILES:04d}"
        parent.mkdir(parents=True, exist_ok=True)
        (parent / f"video-{i:08d}.mp4").write_text(str(i))


def list_and_plan(folder: Path) -> None:
    """Print what each step added to the peak."""
    start = peak_bytes()
    listing = list_sources([str(folder / "videos")])
    listed = peak_bytes()
    count = len(listing.sources)
    extend_plan(folder / "data", listing.sources, UNIT_SOURCES)
    planned = peak_bytes()
    print(
        f"{count:9,} sources   listing {(listed - start) / count:6.0f} B each   "
        f"with the plan {(planned - start) / count:6.0f} B each"
    )


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    """Measure each number of sources in a process of its own."""
    parser = argparse.ArgumentParser(description="Memory of listing and planning.")
    parser.add_argument("--sources", type=int, nargs="+", default=[50_000, 200_000])
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.folder:
        list_and_plan(options.folder)
        return
    for count in options.sources:
        with tempfile.TemporaryDirectory(prefix="listing-") as temporary:
            make_files(Path(temporary) / "videos", count)
            subprocess.run([sys.executable, __file__, "--folder", temporary], check=True)


if __name__ == "__main__":
    main()
