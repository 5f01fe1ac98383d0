"""The summary page and its charts."""

import itertools
import re
from html.parser import HTMLParser
from urllib.parse import unquote
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image
from pydantic import ValidationError

from evaluation.charts import Chart, Series, line_chart, smooth
from evaluation.report import (
    Clip,
    Command,
    Fact,
    Media,
    Metric,
    ModelScores,
    Place,
    RunSummary,
    Sample,
    SampleGroup,
    SampleRow,
    ScoreTable,
    Stage,
    StreamedVideo,
    TimedPrompt,
    duration,
    save_media,
    write_summary,
)
from evaluation.sheets import read_video
from evaluation.sprites import SpritePrompt, render
from streamdit.errors import UserError

VOID = {"meta", "source", "img", "br", "link", "input"}


class Page(HTMLParser):
    """Elements of a page with their attributes and text, and whether tags are balanced."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)
        assert not self.open, f"unclosed {self.open}"

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture
def media(tmp_path) -> Media:
    prompt = SpritePrompt("red", "circle", "left", "blue")
    frames, _ = render(prompt, 8, 32, 16, np.random.default_rng(0))
    return save_media(tmp_path, "media/a sample #1", frames, 16, upscale=2)


@pytest.fixture
def summary(media) -> RunSummary:
    right, wrong = (Sample(media=media, marks={"colour": good}) for good in (True, False))
    return RunSummary(
        title="A run <of> something",
        lead="It went well & fast.",
        facts=[Fact(label="Clips", value="12")],
        inputs=[Clip(media=media, caption="a caption with <b>markup</b>")],
        stream=StreamedVideo(
            media=media,
            seconds=8,
            prompts=[TimedPrompt(start=0, text="one thing"), TimedPrompt(start=6, text="another")],
        ),
        groups=[
            SampleGroup(
                title="Side by side",
                columns=["teacher", "student"],
                rows=[SampleRow(prompt="a prompt", samples=[wrong, right])],
            )
        ],
        scores=ScoreTable(
            metrics=[
                Metric(key="colour", label="Colour", minimum=0.8, chance=0.25),
                Metric(key="area", label="Area", percent=False, minimum=0.5, maximum=2.0),
            ],
            models=[
                ModelScores(model="teacher", values={"colour": 0.5}),
                ModelScores(model="student", values={"colour": 0.79, "area": 1.5}, judged=True),
            ],
        ),
        charts=[Chart(title="Loss", series=[Series(name="l", steps=[0, 1, 2], values=[3, 2, 1])])],
        stages=[Stage(name="train", seconds=90), Stage(name="distil", seconds=30)],
        places=[Place(label="Page media", path="media"), Place(label="Store", path="../store")],
        commands=[Command(purpose="Open the MLflow UI", line="mlflow ui --port 5000")],
        reproducibility=[Fact(label="Seed", value="7")],
    )


def test_page_links_only_files_that_lie_beside_it(tmp_path, summary):
    page = Page(write_summary(tmp_path, summary).read_text(encoding="utf-8"))
    links = [
        attributes[key]
        for _, attributes in page.elements
        for key in ("src", "href", "poster", "xlink:href")
        if attributes.get(key) and not attributes[key].startswith("#")
    ]
    assert len(links) >= 4 * 3
    assert all((tmp_path / unquote(link)).exists() for link in links)
    assert not page.all("script")
    assert not page.all("link")


def test_page_shows_everything_in_the_summary(tmp_path, summary):
    html = write_summary(tmp_path, summary).read_text(encoding="utf-8")
    page = Page(html)
    for text in (
        "A run <of> something",
        "It went well & fast.",
        "a caption with <b>markup</b>",
        "✗ colour",
        "✓ colour",
        "0.0–6.0 s",
        "6.0–8.0 s",
        "mlflow ui --port 5000",
        "2 min 00 s",
        "at least 80\u00a0%",
        "chance 25\u00a0%",
        "✗ 79\u00a0%",
        "✓ 1.50×",
        "../store",
        "Seed",
    ):
        assert text in page.text
    assert "<b>markup</b>" not in html
    assert "✗ 50" not in page.text  # thresholds judge the distilled model only
    assert len(page.all("svg")) == 1


def test_videos_play_by_themselves_and_have_a_poster(tmp_path, summary):
    page = Page(write_summary(tmp_path, summary).read_text(encoding="utf-8"))
    videos = page.all("video")
    assert len(videos) == 4
    for attributes in videos:
        assert {"muted", "loop", "autoplay", "playsinline", "controls", "poster"} <= set(attributes)


def test_bars_and_timeline_are_proportional(tmp_path, summary):
    html = write_summary(tmp_path, summary).read_text(encoding="utf-8")
    assert re.findall(r'class="tint-\d" style="flex: ([\d.]+)"', html) == ["6.0000", "2.0000"]
    widths = re.findall(r'<b style="width: ([\d.]+)%"', html)
    assert widths == ["50.0", "79.0", "75.0", "100.0", "33.3"]
    assert re.findall(r'<u style="left: ([\d.]+)%"', html) == ["80.0", "80.0", "25.0", "100.0"]


def test_empty_parts_are_left_out(tmp_path):
    page = write_summary(tmp_path, RunSummary(title="Nothing yet", lead="Not run."))
    parsed = Page(page.read_text(encoding="utf-8"))
    assert not parsed.all("section")
    assert not parsed.all("video")
    assert [p.name for p in tmp_path.iterdir()] == ["summary.html"]


@pytest.mark.parametrize("video", ["media/none.mp4", "../outside.mp4", "/etc/hostname"])
def test_media_outside_the_folder_are_refused(tmp_path, media, video):
    (tmp_path.parent / "outside.mp4").touch()
    clip = Clip(media=media.model_copy(update={"video": video}), caption="")
    with pytest.raises(UserError, match="save_media"):
        write_summary(tmp_path, RunSummary(title="", lead="", inputs=[clip]))


def test_saved_media_are_the_frames(tmp_path):
    prompt = SpritePrompt("white", "square", "up", "black")
    frames, _ = render(prompt, 9, 32, 16, np.random.default_rng(0))
    media = save_media(tmp_path, "deep/er/v1.5", frames, 16, upscale=2)
    assert (media.video, media.poster) == ("deep/er/v1.5.mp4", "deep/er/v1.5.png")
    assert (media.width, media.height) == (64, 64)
    assert read_video(tmp_path / media.video).shape == (9, 64, 64, 3)
    poster = np.asarray(Image.open(tmp_path / media.poster))
    np.testing.assert_array_equal(poster[::2, ::2], frames[4])


def test_rows_and_prompts_that_do_not_fit_are_refused(media):
    with pytest.raises(ValidationError, match="one per column"):
        SampleGroup(
            title="",
            columns=["a", "b"],
            rows=[SampleRow(prompt="p", samples=[Sample(media=media)])],
        )
    with pytest.raises(ValidationError, match="ascending"):
        StreamedVideo(media=media, seconds=4, prompts=[TimedPrompt(start=5, text="late")])


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.04, "0.0\u00a0s"),
        (59.9, "59.9\u00a0s"),
        (59.97, "1 min 00 s"),
        (252, "4 min 12 s"),
        (3599.7, "1 h 00 min"),
        (3900, "1 h 05 min"),
    ],
)
def test_durations_read_naturally(seconds, words):
    assert duration(seconds) == words


def test_smoothing_is_the_mean_of_the_neighbours():
    generator = np.random.default_rng(0)
    for count, window in itertools.product((1, 2, 7, 40), (1, 3, 5)):
        values = generator.normal(size=count)
        values[generator.uniform(size=count) < 0.2] = np.nan
        for index, mean in enumerate(smooth(values, window)):
            near = values[max(0, index - window // 2) : index + window // 2 + 1]
            near = near[np.isfinite(near)]
            assert mean == pytest.approx(near.mean() if len(near) else np.nan, nan_ok=True)


def axis_labels(svg: str) -> list[str]:
    texts = ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")
    return ["".join(text.itertext()) for text in texts]


def test_charts_take_colours_and_font_from_the_page():
    series = [Series(name=name, steps=[0, 1], values=[1.0, 0.5]) for name in ("raw", "held out")]
    svg = line_chart(Chart(title="Loss", series=series))
    assert {"var(--series-1)", "var(--series-2)", "var(--faint)"} <= set(
        re.findall(r"var\([^)]*\)", svg)
    )
    assert not re.search(r"#[0-9a-f]{6}", svg)
    assert "DejaVu" not in svg
    assert {"raw", "held out", "step", "loss"} <= set(axis_labels(svg))


def test_linear_axes_start_at_zero_and_wide_ranges_say_that_they_are_logarithmic():
    steps = list(range(100))
    level = Series(name="a", steps=steps, values=[0.9 + 0.001 * step for step in steps])
    labels = axis_labels(line_chart(Chart(title="t", series=[level])))
    assert "0.0" in labels
    wide = Series(name="a", steps=steps, values=[10.0 ** (-step / 25) for step in steps])
    labels = axis_labels(line_chart(Chart(title="t", series=[wide])))
    assert "loss (log scale)" in labels


def test_charts_survive_values_that_are_not_finite():
    values = [1.0, float("nan"), float("inf"), 0.5]
    svg = line_chart(Chart(title="t", series=[Series(name="a", steps=[0, 1, 2, 3], values=values)]))
    assert "nan" not in svg.lower()
    nothing = Series(name="a", steps=[0], values=[float("nan")])
    assert line_chart(Chart(title="t", series=[nothing])).startswith("<svg")


def test_series_of_unequal_lengths_are_refused():
    with pytest.raises(ValidationError, match="one value per step"):
        Series(name="a", steps=[0, 1], values=[1.0])
