"""What is benchmarked, and which variants: random presets, trained decoders, peers."""

import pytest
import torch
from bench_command import bench
from wan_pipeline import write_pipeline

from jobs.bench_facts import decoding_facts
from jobs.bench_subject import (
    DecodingSubject,
    full_attention,
    most_text_tokens,
    preset_decoding,
    prompt_of,
    random_autoencoder,
    random_subject,
)
from jobs.bench_variants import FLOAT8, PLAIN, decoder_variants, step_variants
from streamdit.autoencoder import load_autoencoder
from streamdit.autoencoder.io import save_autoencoder
from streamdit.decoding import ChunkDecoder
from streamdit.errors import UserError
from streamdit.model.fast import FastConfig
from streamdit.text.hashed_bytes import tokenise

CPU = torch.device("cpu")


def test_prompt_has_the_tokens_that_were_asked_for():
    assert [len(tokenise(prompt_of(count))) for count in (2, 7, 100)] == [2, 7, 100]


def test_variants_for_a_cpu_need_no_gpu_and_add_one_switch_each():
    names = list(step_variants(compiled=True, capability=None, dtype=torch.bfloat16))
    assert names == [PLAIN, "+ modulation table", "+ text memory", "+ compiled blocks"]
    assert list(decoder_variants(compiled=False, capability=None)) == [
        PLAIN,
        "+ channels last",
        "+ bfloat16",
    ]


@pytest.mark.parametrize("compiled", [False, True])
def test_variants_for_a_gpu_end_with_float8_where_it_multiplies_in_it(compiled):
    steps = step_variants(compiled, (9, 0), torch.bfloat16)
    assert list(steps)[-3:] == ["+ CUDA graph", "+ cuDNN attention", FLOAT8]
    assert steps[FLOAT8] == FastConfig(
        compile=compiled, cuda_graph=True, attention="cudnn", float8=True
    )
    older = step_variants(compiled, (8, 0), torch.bfloat16)
    assert older == {name: fast for name, fast in steps.items() if name != FLOAT8}
    assert step_variants(compiled, (9, 0), torch.float32) == older
    tuned = step_variants(compiled, (9, 0), torch.bfloat16, autotune=True)
    assert ("+ autotuning" in tuned) is compiled
    assert tuned[FLOAT8] == steps[FLOAT8].model_copy(update={"autotune": compiled})
    decoders = list(decoder_variants(compiled, capability=(8, 0)).values())
    assert decoders[-1].cudnn_autotune
    assert decoders[-1].compile is compiled


def test_prompts_are_as_long_as_each_text_encoder_allows():
    assert [most_text_tokens(name) for name in ("ul2", "byt5", "metaclip")] == [128, 256, 77]
    subject = random_subject("demo", None, None, CPU, torch.float32)
    assert subject.max_text_tokens == most_text_tokens("bytes") == 64


def test_full_attention_shares_the_weights_of_windows():
    subject = random_subject("demo", None, 5, CPU, torch.float32)
    whole = full_attention(subject)
    bucket = whole.config.model.buckets[0]
    assert tuple(bucket.window) == whole.config.model.token_grid(bucket)
    for mine, theirs in zip(subject.model.parameters(), whole.model.parameters(), strict=True):
        assert mine.data_ptr() == theirs.data_ptr()
    assert full_attention(whole) is None


def test_decoder_is_measured_without_a_transformer(monkeypatch):
    monkeypatch.setattr("jobs.bench_subject.StreamDiT", None)
    subject = preset_decoding("streamdit-4b", "demo", CPU)
    assert subject.latent_shape == (8, 64, 64)
    assert subject.chunk_frames == 2
    assert subject.autoencoder.identity.latent_channels == 8


def test_a_preset_can_be_measured_with_a_trained_decoder(tmp_path):
    for channels in (4, 16):
        folder = tmp_path / str(channels)
        trained = random_autoencoder("demo", channels, CPU)
        save_autoencoder(trained, folder, training={"psnr": 31.25, "psnr_split": "held_out"})
    figures, output = bench(tmp_path, "decode", "--autoencoder", str(tmp_path / "16"))
    assert figures["autoencoder_trained"]
    assert "PSNR 31.2 dB" in output
    with pytest.raises(UserError, match="makes latents of 4 channels but preset demo takes 16"):
        preset_decoding("demo", str(tmp_path / "4"), CPU)


def test_a_model_with_a_vae_of_diffusers_has_no_quality_to_state(tmp_path):
    """Its directory is diffusers' own and holds no record of training."""
    vae = load_autoencoder(str(write_pipeline(tmp_path)))
    assert vae.identity.kind == "wan"
    facts = decoding_facts(DecodingSubject(vae, (16, 4, 4), 1, CPU), "demo", None)
    assert facts["autoencoder_trained"]
    assert facts["autoencoder_psnr"] is None


@pytest.mark.slow
def test_wans_autoencoder_is_benchmarked_in_its_real_size():
    wan = random_autoencoder("wan", 16, CPU)
    assert sum(p.numel() for p in wan.parameters()) == pytest.approx(127e6, rel=0.01)
    latents = torch.randn(1, 2, 16, 4, 4)
    decoder = ChunkDecoder(wan, CPU)
    assert [decoder.submit(latents).wait().shape for _ in range(2)] == [
        (5, 32, 32, 3),  # a stream's first latent is one frame
        (8, 32, 32, 3),
    ]
    with pytest.raises(UserError, match="Wan's VAE has 16 latent channels but the model 8"):
        random_autoencoder("wan", 8, CPU)
