"""What a person sees of a dataset: overview, page, one clip."""

import re
from html.parser import HTMLParser

import numpy as np
import pytest
from conftest import write_shots

from pipeline.annotate import annotate
from pipeline.curate import curate
from pipeline.encode import encode
from pipeline.overview import find_clip, read_overview, stage_settings, thresholds
from pipeline.pictures import clip_frames, strip
from pipeline.report import histogram, write_report
from pipeline.reselect import reselect
from streamdit.errors import UserError


@pytest.fixture
def curated(tmp_path, small_config, without_ray):
    write_shots(tmp_path / "videos" / "one.mp4", ["red", "green"])
    write_shots(tmp_path / "videos" / "two.mp4", ["blue"], step=3)
    (tmp_path / "videos" / "two.vtt").unlink()
    (tmp_path / "videos" / "bad & <odd>.mp4").write_text("no video")
    selection = small_config.selection.model_copy(update={"expression": "motion > 0.5"})
    config = small_config.model_copy(update={"selection": selection})
    curate([str(tmp_path / "videos")], tmp_path / "data", config)
    return tmp_path / "data", config


@pytest.fixture
def dataset(curated, autoencoder_dir):
    dataset, config = curated
    annotate(dataset, config)
    encode(dataset, autoencoder_dir, config)
    return dataset


def test_the_overview_counts_what_the_tables_hold(dataset):
    found = read_overview(dataset)
    assert (len(found.sources), len(found.clips), found.video_s) == (2, 6, pytest.approx(6.0))
    assert found.statuses == {"ok": 4, "missing": 2}
    assert found.buckets == {"16x32x32": 6}
    assert [(stage.name, stage.done == stage.units) for stage in found.stages] == [
        ("curate", True),
        ("annotate", True),
        ("latents", True),
        ("text", True),
    ]
    (reason,) = found.dead
    assert (reason.stage, reason.error_class, reason.count) == ("curate", "InvalidDataError", 1)
    motion = np.array(found.clips["motion"].to_pylist())
    assert found.kept.tolist() == (motion > 0.5).tolist()
    assert found.thresholds("motion") == [0.5]
    assert {"motion", "blur", "brightness", "colourfulness"} <= set(found.scores)
    assert not {"start_s", "fps"} & set(found.scores)
    assert stage_settings(dataset)["curate"]["clip.frames"] == 16


def test_the_overview_of_an_unfinished_dataset_says_how_far_it_is(curated):
    found = read_overview(curated[0])
    assert [stage.done for stage in found.stages] == [2, 0, 0, 0]
    assert found.selected is None
    assert found.manifest is None
    assert found.statuses == {}
    assert found.kept.all()


@pytest.mark.parametrize(
    ("expression", "limits"),
    [
        ("motion > 0.3 and not blur < 5", [0.3]),
        ("0.1 < motion <= 0.7", [0.1, 0.7]),
        ("motion > -2 or motion * 2 > 5", [-2.0]),
        ("blur > 1", []),
        ("true", []),
    ],
)
def test_thresholds_are_read_off_the_selection(expression, limits):
    assert thresholds(expression, "motion") == limits


class Page(HTMLParser):
    """Text, pictures and links of a page."""

    def __init__(self, path):
        super().__init__()
        self.text, self.sources, self.tags = "", [], []
        self.feed(path.read_text())

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        values = dict(attributes)
        self.sources += [values[name] for name in ("src", "href") if values.get(name)]

    def handle_data(self, data):
        self.text += data


def test_the_page_is_one_file_with_counts_charts_pictures_and_reasons(dataset, tmp_path):
    found = read_overview(dataset)
    page = Page(write_report(found, tmp_path / "out" / "page.html"))
    assert all(source.startswith(("data:image/", "#")) for source in page.sources)
    assert page.tags.count("svg") == len(found.scores) + 1
    assert "bad & <odd>.mp4" in page.text
    assert "odd" not in page.tags
    assert "selection: 0.5" in page.text
    assert "a square over red" in page.text or "a square over green" in page.text
    assert page.tags.count("img") >= len(found.scores) + int(found.kept.sum())
    again = write_report(found, tmp_path / "again.html").read_bytes()
    assert again == (tmp_path / "out" / "page.html").read_bytes()


def test_the_page_counts_what_each_condition_of_the_selection_rejects(dataset, tmp_path):
    reselect(dataset, "motion > 0.5 and start_s < 1")
    page = Page(write_report(read_overview(dataset), tmp_path / "page.html"))
    rows = [line for line in page.text.splitlines() if line.startswith(("motion >", "start_s <"))]
    assert rows == ["motion > 0.5" + "000", "start_s < 1" + "440"]


def test_the_page_can_be_made_while_further_videos_are_on_their_way(curated, dataset, tmp_path):
    write_shots(tmp_path / "videos" / "three.mp4", ["cyan"])
    curate([str(tmp_path / "videos")], dataset, curated[1])
    page = Page(write_report(read_overview(dataset), tmp_path / "page.html"))
    assert "Ready for training" in page.text
    assert "Rejected by the selection" not in page.text


def test_the_page_of_a_dataset_without_latents_says_so(curated, tmp_path):
    page = Page(write_report(read_overview(curated[0]), tmp_path / "page.html"))
    assert "Not ready for training yet" in page.text
    assert "not annotated yet" in page.text


def test_a_page_outlives_videos_that_are_gone(dataset, tmp_path):
    for path in (tmp_path / "videos").glob("*.mp4"):
        path.unlink()
    page = Page(write_report(read_overview(dataset), tmp_path / "page.html"))
    assert "No clip can be shown." in page.text
    assert "img" not in page.tags


def test_bars_of_a_histogram_are_as_high_as_the_counts():
    values = np.array([0.0, 0.0, 1.0, np.nan, 2.0])
    svg = histogram(values, values < 1.5, [1.5], "x")
    assert "var(--kept)" in svg
    assert "var(--left)" in svg
    assert not re.search(r"#0[0-9]0[0-9]0[0-9]", svg)


def test_a_clip_is_found_by_the_beginning_of_its_id_and_played_out_in_order(dataset):
    found = read_overview(dataset)
    rows = found.clips.to_pylist()
    row = next(row for row in rows if row["uri"].endswith("two.mp4") and row["start_s"] == 0)
    assert find_clip(dataset, row["clip_id"][:8]) == row
    assert find_clip(dataset, "zzz") is None
    frames = clip_frames(row, 4, 64)
    picture = strip(frames, gap=2)
    assert picture.shape == (64, 4 * 64 + 3 * 2, 3)
    left = [int(np.argmax(frame[30, :, 0] > 200)) for frame in frames]
    assert left == sorted(left)
    assert left[0] < left[-1]
    assert clip_frames({**row, "uri": "/gone.mp4"}, 4, 64) is None


def test_there_must_be_a_dataset(tmp_path):
    with pytest.raises(UserError, match="holds no sources"):
        read_overview(tmp_path)
