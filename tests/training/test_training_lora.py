"""Fine-tuning by adapters: the base stays, merged equals apart, resume is exact."""

import json
from pathlib import Path

import pytest
import torch
from latent_dataset import ENCODERS, train_settings, write_dataset
from safetensors.torch import load_file
from training_runs import losses, train

from jobs.config import load_config
from jobs.train import parent_layers
from jobs.training_job import training_job
from streamdit.config import DiTConfig
from streamdit.errors import UserError
from streamdit.hashing import file_sha256
from streamdit.io import load_model
from streamdit.model import build_dit
from streamdit.text import build_text_encoders
from training.checkpoint import find_checkpoints
from training.config import AdapterConfig, TrainConfig
from training.export import export_checkpoint
from training.lora import add_adapters, load_adapter

LORA = {"rank": 2, "alpha": 4.0}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("data") / "dataset")


@pytest.fixture(scope="module")
def parent(dataset, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "parent"
    train(dataset, out, steps=3, validation={"samples": 0})
    return out / "model"


@pytest.fixture(scope="module")
def tuned(dataset, parent, tmp_path_factory):
    """Directory of a finished fine-tuning."""
    out = tmp_path_factory.mktemp("runs") / "tuned"
    train(dataset, out, parent=str(parent), lora=LORA, validation={"samples": 0})
    return out


def outputs(model):
    generator = torch.Generator().manual_seed(3)
    latents = torch.randn(2, 4, 4, 4, 4, generator=generator)
    text = build_text_encoders(ENCODERS).encode(["a red circle", "nothing"])
    with torch.no_grad():
        return model.eval()(latents, torch.rand(2, 4, generator=generator), text)


def adapted(parent, directory):
    model = add_adapters(load_model(parent)[0], AdapterConfig(**LORA))
    model.load_state_dict(load_adapter(directory), strict=False)
    return model


def test_merged_model_answers_as_the_parent_with_its_adapters(parent, tuned):
    merged, apart = load_model(tuned / "model")[0], adapted(parent, tuned / "adapter")
    torch.testing.assert_close(outputs(merged), outputs(apart), rtol=1e-4, atol=1e-5)
    before = outputs(load_model(parent)[0])
    assert (outputs(merged) - before).abs().max() > 1e-3


def test_only_targets_change_and_by_the_product_of_the_adapters(parent, tuned):
    before = load_file(parent / "model.safetensors")
    after = load_file(tuned / "model" / "model.safetensors")
    adapters = load_adapter(tuned / "adapter")
    assert set(before) == set(after)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    targets = AdapterConfig().targets
    assert changed == {
        name
        for name in before
        if name.removesuffix(".weight").endswith(tuple(targets))
        and name.startswith("blocks.")
        and name.endswith(".weight")
    }
    for name in changed:
        layer = name.removesuffix(".weight")
        down = adapters[f"{layer}.lora_A.default.weight"]
        up = adapters[f"{layer}.lora_B.default.weight"]
        assert down.shape[0] == up.shape[1] == 2
        expected = before[name] + 4.0 / 2 * up @ down
        torch.testing.assert_close(after[name], expected, rtol=1e-5, atol=1e-7)


def test_checkpoints_hold_adapters_only_and_the_parent_stays_as_it_was(parent, tuned):
    config = json.loads((parent / "config.json").read_text())
    assert file_sha256(parent / "model.safetensors") == config["weights_sha256"]
    (newest, *_) = find_checkpoints(tuned / "checkpoints")
    state = torch.load(
        next(newest.glob("deepspeed/*model_states.pt")), weights_only=False, map_location="cpu"
    )
    assert state["module"]
    assert all(".lora_" in name for name in state["module"])
    total = sum(path.stat().st_size for path in newest.rglob("*") if path.is_file())
    assert total < 4 * (parent / "model.safetensors").stat().st_size


def test_peft_itself_loads_the_adapter(parent, tuned):
    from peft import PeftModel

    model = PeftModel.from_pretrained(load_model(parent)[0], str(tuned / "adapter"))
    theirs = outputs(model.base_model.model)
    torch.testing.assert_close(theirs, outputs(adapted(parent, tuned / "adapter")))


@pytest.mark.parametrize("stage", [1, 3])
def test_interrupted_fine_tuning_continues_exactly(stage, dataset, parent, tuned, tmp_path):
    options = {"parent": str(parent), "lora": LORA, "validation": {"samples": 0}}
    if stage != 1:
        options["zero_stage"] = stage
    broken = tmp_path / "broken"
    train(dataset, broken, crash_at=4, **options)
    assert not (broken / "model").exists()
    train(dataset, broken, **options)
    straight = losses(tuned)
    assert losses(broken) == (straight if stage == 1 else pytest.approx(straight, rel=1e-5))
    one, two = (load_file(out / "adapter/adapter_model.safetensors") for out in (tuned, broken))
    assert set(one) == set(two)
    for name in one:
        torch.testing.assert_close(
            one[name], two[name], rtol=0 if stage == 1 else 1e-4, atol=0 if stage == 1 else 1e-6
        )


def test_checkpoint_of_a_fine_tuning_is_exported_merged_averaged_or_not(tuned, tmp_path):
    export_checkpoint(tuned, tmp_path / "ema")
    export_checkpoint(tuned, tmp_path / "raw", weights="raw")
    averaged, raw, finished = (
        load_file(folder / "model.safetensors")
        for folder in (tmp_path / "ema", tmp_path / "raw", tuned / "model")
    )
    assert all(torch.equal(averaged[name], finished[name]) for name in finished)
    assert any(not torch.equal(raw[name], averaged[name]) for name in raw)


def test_adapters_take_the_shape_and_partitions_of_their_parent(parent, dataset):
    changes = ["lora.rank=4", "sampling.micro_steps=3"]
    config = load_config(
        TrainConfig,
        stage="train",
        preset="small",
        overrides=changes,
        more=parent_layers(parent, None, changes),
    )
    mine = TrainConfig.model_validate(train_settings())
    assert (config.model, config.partition) == (mine.model, mine.partition)
    assert config.sampling.micro_steps == 3
    (shape,) = parent_layers(parent, None, ["steps=3"])
    assert set(shape.values) == {"model"}
    assert parent_layers(None) == []
    with pytest.raises(UserError, match=r"trains adapters on a model, but none is given.*--from"):
        training_job(config, dataset, Path("out"))


def test_target_that_is_no_linear_layer_is_refused_with_those_that_are():
    model = build_dit(DiTConfig.model_validate(train_settings()["model"]))
    for target in ("ffn", "atention.qkv"):
        with pytest.raises(UserError, match=rf"{target} names no linear layer .*attention.qkv, "):
            add_adapters(model, AdapterConfig(targets=(target,)))
