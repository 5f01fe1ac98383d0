import json

import numpy as np
import pytest
import torch

from pipeline.captioners import SidecarCaptions
from pipeline.captions import CaptionFileError, Cue, caption_for, parse_vtt, read_cues
from pipeline.catalogue import Source
from pipeline.coca import CocaCaptioner
from streamdit.errors import UserError

VTT = """WEBVTT - title

NOTE 00:00 --> nothing
a note

intro
00:01.500 --> 00:04.000 align:left
<v Speaker>a <b>red</b> car
&amp; a dog

1:00:00.000 --> 1:00:02.250
later

00:05.000 --> 00:06.000

"""


def test_vtt_cues_have_times_and_plain_text():
    assert parse_vtt(VTT) == [Cue("a red car & a dog", 1.5, 4.0), Cue("later", 3600.0, 3602.25)]
    assert parse_vtt(VTT.replace("\n", "\r\n")) == parse_vtt(VTT)


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.txt", "  a cat\nsleeps \n", [Cue("a cat sleeps")]),
        ("b.json", '"a cat"', [Cue("a cat")]),
        ("c.json", '{"caption": "a cat"}', [Cue("a cat")]),
        (
            "d.json",
            '{"captions": [{"start": 1, "end": 2.5, "caption": "a"}, {"start": 3, '
            '"caption": "b"}]}',
            [Cue("a", 1.0, 2.5), Cue("b", 3.0)],
        ),
        ("e.json", '["x", {"caption": "y"}]', [Cue("x"), Cue("y")]),
        ("f.txt", "\ufeffwith a mark", [Cue("with a mark")]),
        ("g.txt", "\n", []),
    ],
)
def test_caption_files(tmp_path, name, content, expected):
    path = tmp_path / name
    path.write_text(content, encoding="utf-8")
    assert read_cues(str(path)) == expected


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("latin.txt", "caf\xe9".encode("latin-1")),
        ("utf16.vtt", "WEBVTT\n".encode("utf-16")),
        ("no.vtt", b"1\n00:00.000 --> 00:01.000\nhi\n"),
        ("broken.json", b'{"caption": '),
        ("other.json", b'{"title": "x"}'),
        ("number.json", b"7"),
        ("numbers.json", b"[1, 2]"),
        ("nested.json", b'{"captions": [["a cat"]]}'),
        ("when.json", b'{"caption": "a", "start": [1]}'),
        ("time.vtt", b"WEBVTT\n\nab:cd --> 00:01.000\nhi\n"),
    ],
)
def test_wrong_caption_files_are_named(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(CaptionFileError, match=name):
        read_cues(str(path))


def test_whatever_is_wrong_with_a_caption_file_fails_the_captions_of_its_video_alone(tmp_path):
    def describe(content):
        sidecar = tmp_path / "a.json"
        sidecar.write_bytes(content)
        source = Source("id", str(tmp_path / "a.mp4"), 1, (str(sidecar),))
        clip = {"clip_id": "c", "start_s": 0.0, "end_s": 1.0}
        return SidecarCaptions().describe(source, [clip], {})["c"]

    assert describe(b'"a cat"').text == "a cat"
    for content in (b"[1, 2]", b"[" * 100_000):
        caption = describe(content)
        assert (caption.status, caption.text) == ("failed", "")
        assert caption.error is not None
        assert not caption.error.retryable


def test_a_clip_takes_the_cue_that_covers_most_of_its_middle():
    cues = [Cue("one", 0.0, 2.0), Cue("two", 2.0, 4.0), Cue("three", 4.0, 8.0)]
    assert caption_for(cues, 0.0, 2.0) == "one"
    assert caption_for(cues, 1.1, 3.1) == "two"
    assert caption_for(cues, 1.0, 3.0) == "one"  # a tie: the earlier
    assert caption_for(cues, 3.5, 5.5) == "three"
    assert caption_for(cues, 7.5, 9.5) is None  # only the clip's first quarter is described
    assert caption_for([Cue("all")], 5.0, 6.0) == "all"


@pytest.fixture(scope="module")
def tiny_coca(tmp_path_factory):
    """A CoCa with random weights, as a directory that open_clip loads."""
    import open_clip
    from safetensors.torch import save_file

    tower = {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
    config = {
        "embed_dim": 32,
        "vision_cfg": {
            "image_size": 32,
            "patch_size": 8,
            "width": 32,
            "head_width": 16,
            "layers": 1,
            "attentional_pool": True,
            "attn_pooler_queries": 8,
            "attn_pooler_heads": 2,
            "output_tokens": True,
        },
        "text_cfg": {**tower, "embed_cls": True, "output_tokens": True},
        "multimodal_cfg": {**tower, "attn_pooler_heads": 2},
        "custom_text": True,
    }
    folder = tmp_path_factory.mktemp("coca")
    text = json.dumps({"model_cfg": config, "preprocess_cfg": {}})
    (folder / "open_clip_config.json").write_text(text)
    torch.manual_seed(3)
    model = open_clip.create_model(f"local-dir:{folder}", load_weights=False)
    # open_clip leaves this projection uninitialised.
    torch.nn.init.normal_(model.text_decoder.text_projection)
    weights = {name: tensor.contiguous() * 3 for name, tensor in model.state_dict().items()}
    save_file(weights, folder / "open_clip_model.safetensors")
    return f"local-dir:{folder}"


def pictures(count):
    generator = np.random.default_rng(5)
    return [generator.integers(0, 256, (40, 60, 3), np.uint8) for _ in range(count)]


def test_coca_captions_equal_slow_greedy_decoding_picture_by_picture(tiny_coca):
    captioner = CocaCaptioner(tiny_coca, None, batch=3, max_tokens=12)
    captions = captioner.caption(pictures(5))
    assert len(set(captions)) > 1
    tokenizer, network = captioner.tokenizer, captioner.network
    for picture, caption in zip(pictures(5), captions, strict=True):
        from PIL import Image

        image = captioner.preprocess(Image.fromarray(picture))[None]
        tokens = [tokenizer.sot_token_id]
        while len(tokens) < 12 and tokens[-1] != tokenizer.eot_token_id:
            with torch.no_grad():
                output = network(image, torch.tensor([tokens]), output_labels=False)
            scores = output["logits"][0, -1]
            forbidden = {tokenizer.sot_token_id, network.pad_id}
            if len(tokens) == 1:
                forbidden.add(tokenizer.eot_token_id)
            ranked = scores.argsort(descending=True).tolist()
            tokens.append(next(token for token in ranked if token not in forbidden))
        words = [t for t in tokens[1:] if t != tokenizer.eot_token_id]
        assert caption == " ".join(tokenizer.decode(words).split())


def test_coca_stops_each_picture_at_its_own_end(tiny_coca):
    captioner = CocaCaptioner(tiny_coca, None, batch=4, max_tokens=8)
    tokenizer, network = captioner.tokenizer, captioner.network
    wanted = [[320, 1000, 2000], [500], [700, 800]]

    class Scripted(torch.nn.Module):
        pad_id = network.pad_id

        def forward(self, image, text=None, **_):
            if text is None:
                return {"image_features": image, "image_embs": image}
            logits = torch.zeros(3, text.shape[1], 49408)
            for row, tokens in enumerate(wanted):
                place = text.shape[1] - 1
                done = place >= len(tokens)
                logits[row, -1, tokenizer.eot_token_id if done else tokens[place]] = 1.0
            return {"logits": logits}

    captioner.network = Scripted()
    tokens = captioner.decode_greedily(torch.zeros(3, 3, 32, 32)).tolist()
    start, end, padding = tokenizer.sot_token_id, tokenizer.eot_token_id, network.pad_id
    assert tokens == [
        [start, 320, 1000, 2000, end],
        [start, 500, end, padding, padding],
        [start, 700, 800, end, padding],
    ]


def test_a_model_without_text_decoder_is_refused():
    with pytest.raises(UserError, match="no weights"):
        CocaCaptioner("coca_ViT-B-32", None, batch=1, max_tokens=8)
    with pytest.raises(UserError, match="cannot be loaded"):
        CocaCaptioner("local-dir:/no/such/folder", None, batch=1, max_tokens=8)
