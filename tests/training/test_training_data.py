"""Data order and reading: pure functions of (seed, step), checked against the shards."""

import itertools
import re
import shutil
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from latent_dataset import ENCODERS, train_settings, write_dataset
from model_directory import model_config as parent_config

from pipeline.schema import decode_tensor
from streamdit.config import DiTConfig, PartitionConfig, PartitionEntry
from streamdit.errors import UserError
from streamdit.partition import PartitionMixture
from training.config import DataConfig
from training.data import LatentDataset
from training.loader import BatchLoader
from training.objective import MixtureDraw
from training.order import BatchOrder, sample_generator
from training.row_groups import RowGroups

BUCKETS = {"wide": list(range(0, 23)), "tall": list(range(23, 40))}


@pytest.fixture(scope="module")
def dataset_dir(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("data") / "dataset")


def test_batches_never_mix_buckets_and_depend_on_seed_and_step_only():
    order, again = BatchOrder(BUCKETS, 4, seed=3), BatchOrder(BUCKETS, 4, seed=3)
    later = [again.batch(step) for step in reversed(range(50))][::-1]
    assert [order.batch(step) for step in range(50)] == later
    for step in range(50):
        batch = set(order.batch(step))
        assert batch <= set(BUCKETS["wide"]) or batch <= set(BUCKETS["tall"])
    assert [BatchOrder(BUCKETS, 4, seed=4).batch(step) for step in range(50)] != later


def test_every_clip_is_seen_once_an_epoch_and_remainders_carry_over():
    order = BatchOrder(BUCKETS, 4, seed=0)
    seen = dict.fromkeys(range(40), 0)
    epochs = 12
    steps = 0
    while order.epoch(steps) < epochs:
        for clip in order.batch(steps):
            seen[clip] += 1
        steps += 1
    # 12 epochs are 12 * 23 and 12 * 17 clips; whole batches of 4 leave nothing over.
    assert steps == (12 * 23 + 12 * 17) // 4
    assert set(seen.values()) == {epochs}


def test_an_epoch_is_shuffled_and_differs_from_the_next():
    order = BatchOrder({"only": list(range(32))}, 8, seed=0)
    first = [clip for step in range(4) for clip in order.batch(step)]
    second = [clip for step in range(4, 8) for clip in order.batch(step)]
    assert sorted(first) == sorted(second) == list(range(32))
    assert first != second
    assert first != list(range(32))


def test_a_batch_larger_than_a_bucket_takes_several_epochs_of_it():
    order = BatchOrder({"only": [0, 1, 2]}, 8, seed=0)
    counts = [order.batch(0).count(clip) for clip in range(3)]
    assert sum(counts) == 8
    assert max(counts) - min(counts) <= 1


def test_clips_come_within_a_few_row_groups_of_their_own():
    """40 row groups of 8 clips, 5 in use: each is read once an epoch by a cache of 1.5 times 5."""
    groups = np.arange(320) // 8
    order = BatchOrder({"only": list(range(320))}, 4, 0, groups, shuffle_groups=5)
    for epoch in (0, 1):
        clips = [clip for step in range(80 * epoch, 80 * epoch + 80) for clip in order.batch(step)]
        assert sorted(clips) == list(range(320))
        first, last = {}, {}
        for place, clip in enumerate(clips):
            first.setdefault(groups[clip], place)
            last[groups[clip]] = place
        in_use = [sum(first[g] <= place <= last[g] for g in first) for place in range(320)]
        assert max(in_use) <= 7
        assert np.mean(in_use[40:-40]) > 3
        assert list(first) != sorted(first)
        neighbours = np.mean([groups[a] == groups[b] for a, b in itertools.pairwise(clips)])
        assert neighbours < 0.4
        cache, reads = OrderedDict(), 0
        for clip in clips:
            reads += groups[clip] not in cache
            cache[groups[clip]] = None
            cache.move_to_end(groups[clip])
            if len(cache) > 7:
                cache.popitem(last=False)
        assert reads <= 42


def test_a_bucket_of_few_row_groups_is_shuffled_as_a_whole():
    clips = {"only": list(range(32))}
    among_all = BatchOrder(clips, 8, seed=0)
    among_groups = BatchOrder(clips, 8, 0, np.arange(32) // 8, shuffle_groups=4)
    fewer = BatchOrder(clips, 8, 0, np.arange(32) // 8, shuffle_groups=2)
    batches = [[order.batch(step) for step in range(9)] for order in (among_all, among_groups)]
    assert batches[0] == batches[1]
    assert [fewer.batch(step) for step in range(9)] != batches[0]


def test_row_groups_are_numbered_and_fit_the_memory_that_is_given(dataset_dir):
    dataset = LatentDataset(dataset_dir, "train")
    index = pq.read_table(dataset_dir / "selection/v1.parquet").to_pylist()
    where = {row["clip_id"]: row["latent_row_group"] for row in index}
    assert dataset.row_groups.tolist() == [where[clip] for clip in dataset.clip_ids]
    files = [dataset_dir / name for name in ("latents/a.parquet", "text/a.parquet")]
    of_a_group = sum(path.stat().st_size for path in files) * 5 / 24
    assert dataset.groups_in(3.5 * of_a_group / 2**20) == 3
    assert dataset.groups_in(1e-6) == 1


def test_draws_of_a_sample_are_its_own():
    def draw(*place):
        return torch.rand((), generator=sample_generator(*place)).item()

    assert draw(0, 5, 3, "draws") == draw(0, 5, 3, "draws")
    others = [(1, 5, 3, "draws"), (0, 6, 3, "draws"), (0, 5, 4, "draws"), (0, 5, 3, "window")]
    assert len({draw(0, 5, 3, "draws"), *(draw(*place) for place in others)}) == 5


def test_sample_is_the_normalised_latent_of_its_clip(dataset_dir):
    dataset = LatentDataset(dataset_dir, "train")
    table = pq.read_table(dataset_dir / "latents/a.parquet").to_pylist()
    identity = dataset.manifest.autoencoder
    for position in (0, 7, 19):
        sample = dataset.sample(position, 4, torch.Generator())
        row = next(row for row in table if row["clip_id"] == sample["clip_id"])
        raw = decode_tensor(row["latent"], row["latent_shape"], row["latent_dtype"]).float()
        shift, scale = torch.tensor(identity.shift), torch.tensor(identity.scale)
        expected = (raw - shift.view(1, -1, 1, 1)) * scale.view(1, -1, 1, 1)
        torch.testing.assert_close(sample["latents"], expected)


def test_windows_of_longer_clips_start_anywhere_in_them(tmp_path):
    dataset = LatentDataset(
        write_dataset(tmp_path / "long", clips=3, held_out=0, frames=6), "train"
    )
    whole = dataset.sample(0, 6, torch.Generator())["latents"]
    starts = set()
    for index in range(40):
        window = dataset.sample(0, 4, sample_generator(0, 0, index, "window"))["latents"]
        starts.add(next(s for s in range(3) if torch.equal(window, whole[s : s + 4])))
    assert starts == {0, 1, 2}


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_ranks_share_out_each_global_batch(dataset_dir, workers):
    dataset = LatentDataset(dataset_dir, "train")
    order = BatchOrder(dataset.buckets, 8, seed=1)
    loaders = [
        BatchLoader(dataset, order, 4, rank, workers, micro_batch=2) for rank in range(workers)
    ]
    whole = BatchLoader(dataset, order, 4, 0, 1, micro_batch=8)
    for step, (expected,) in enumerate(whole.steps(0, 3)):
        parts = [batch for loader in loaders for batch in next(loader.steps(step, step + 1))]
        assert [clip for batch in parts for clip in batch.clip_ids] == expected.clip_ids
        assert torch.equal(torch.cat([batch.latents for batch in parts]), expected.latents)
        assert [i for batch in parts for i in batch.sample_indices] == list(range(8))


def test_loader_started_late_gives_what_the_early_one_would_have(dataset_dir):
    dataset = LatentDataset(dataset_dir, "train")
    order = BatchOrder(dataset.buckets, 8, seed=1)
    loader = BatchLoader(dataset, order, 4, 0, 1, micro_batch=4)
    early = list(loader.steps(0, 6))[4:]
    late = list(BatchLoader(dataset, order, 4, 0, 1, micro_batch=4).steps(4, 6))
    for expected, found in zip(early, late, strict=True):
        for a, b in zip(expected, found, strict=True):
            assert a.clip_ids == b.clip_ids
            assert torch.equal(a.latents, b.latents)


def test_splits_do_not_overlap(dataset_dir):
    def ids(split):
        dataset = LatentDataset(dataset_dir, split)
        return {dataset.sample(i, 4, torch.Generator())["clip_id"] for i in range(len(dataset))}

    assert len(ids("train")) == 20
    assert len(ids("held_out")) == 4
    assert not ids("train") & ids("held_out")


def model_config(**changes):
    return DiTConfig.model_validate(train_settings()["model"] | changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"latent_channels": 8}, "latents have 4 channels but model.latent_channels is 8"),
        ({"text": {"bytes": 32}}, r"text encoders {'bytes': 16} do not match"),
        (
            {"buckets": [{"frames": 4, "height": 8, "width": 4, "window": [2, 2, 2]}]},
            "latents of 4x4, which model.buckets",
        ),
        (
            {"buckets": [{"frames": 8, "height": 4, "width": 4, "window": [2, 2, 2]}]},
            "has 4 latent frames but the buffer needs 8",
        ),
    ],
)
def test_a_data_set_that_does_not_fit_the_model_is_refused_by_name(dataset_dir, changes, message):
    dataset = LatentDataset(dataset_dir, "train")
    dataset.check_fits(model_config())
    with pytest.raises(UserError, match=message):
        dataset.check_fits(model_config(**changes))


def test_latents_of_another_kind_of_autoencoder_are_refused(dataset_dir):
    dataset = LatentDataset(dataset_dir, "train")
    dataset.check_fits(model_config(), "causal")
    with pytest.raises(UserError, match=r"come from a causal autoencoder but .* is wan"):
        dataset.check_fits(model_config(), "wan")


def test_clips_as_long_as_the_buffer_serve_where_a_first_frame_stands_alone(dataset_dir):
    """Ingestion leaves that frame's latent out, so all that is stored may be trained on."""
    dataset = LatentDataset(dataset_dir, "train")
    alone = {
        "autoencoder": dataset.manifest.autoencoder.model_copy(update={"first_frame_alone": True})
    }
    dataset.manifest = dataset.manifest.model_copy(update=alone)
    dataset.check_fits(model_config())
    assert dataset.sample(0, 4, torch.Generator())["latents"].shape[0] == 4


def spoil_checksums(copy):
    table = pq.read_table(copy / "latents/a.parquet")
    crc = table.schema.get_field_index("latent_crc")
    wrong = [value + 1 for value in table.column("latent_crc").to_pylist()]
    table = table.set_column(crc, table.schema.field(crc), [wrong])
    pq.write_table(table, copy / "latents/a.parquet", row_group_size=5)


def test_damaged_latents_are_noticed(dataset_dir, tmp_path):
    copy = shutil.copytree(dataset_dir, tmp_path / "copy")
    spoil_checksums(copy)
    with pytest.raises(UserError, match=r"latent of clip clip-0\d\d is damaged"):
        LatentDataset(copy, "train").sample(0, 4, torch.Generator())


def test_latents_and_text_of_other_encoders_than_the_parents_are_refused(dataset_dir, tmp_path):
    dataset = LatentDataset(dataset_dir, "train")
    identity = dataset.manifest.autoencoder
    dataset.check_continues(parent_config(identity))
    other = identity.model_copy(update={"sha256": "f" * 64})
    with pytest.raises(UserError, match="but the model to start from knows those of ffffffffffff"):
        dataset.check_continues(parent_config(other))
    longer = (ENCODERS[0].model_copy(update={"max_tokens": 99}),)
    with pytest.raises(UserError, match=r"bytes \(bytes, 99 tokens\)"):
        dataset.check_continues(parent_config(identity, text_encoders=longer))


def test_loader_processes_give_the_batches_of_the_thread(dataset_dir):
    dataset = LatentDataset(dataset_dir, "train")
    order = BatchOrder(dataset.buckets, 8, seed=1)

    def loader(processes):
        config = DataConfig(processes=processes, ahead=2)
        return BatchLoader(dataset, order, 4, 0, 1, micro_batch=4, config=config)

    for expected, found in zip(loader(0).steps(2, 7), loader(2).steps(2, 7), strict=True):
        for a, b in zip(expected, found, strict=True):
            assert a.clip_ids == b.clip_ids
            assert a.sample_indices == b.sample_indices
            assert torch.equal(a.latents, b.latents)
            for name, (values, mask) in a.text.items():
                assert torch.equal(values, b.text[name][0])
                assert (mask is None) == (b.text[name][1] is None)
                assert mask is None or torch.equal(mask, b.text[name][1])


@pytest.mark.parametrize(("processes", "workers"), [(0, 1), (0, 2), (2, 1)])
def test_draws_come_with_the_batch_whoever_reads_it(dataset_dir, processes, workers):
    dataset = LatentDataset(dataset_dir, "train")
    order = BatchOrder(dataset.buckets, 4, seed=7)
    parts = (PartitionEntry(chunk_frames=1), PartitionEntry(chunk_frames=4))
    draw = MixtureDraw(PartitionMixture(PartitionConfig(entries=parts), 4), 0.5)
    config = DataConfig(processes=processes)
    share = 4 // workers
    loaders = [
        BatchLoader(dataset, order, 4, rank, workers, share, config, draw, run_steps=9)
        for rank in range(workers)
    ]
    for step, batches in enumerate(zip(*(each.steps(2, 4) for each in loaders), strict=True), 2):
        for rank, (batch,) in enumerate(batches):
            for row in range(share):
                generator = sample_generator(7, step, rank * share + row, "draws")
                expected = draw(batch.latents.shape[1:], generator)
                for name, value in expected.items():
                    assert torch.equal(batch.draws[name][row], value)


def progress_draw(latent_shape, generator, progress=0.0):
    return {"progress": torch.tensor(progress)}


def test_draws_are_told_how_far_the_run_is(dataset_dir):
    dataset = LatentDataset(dataset_dir, "train")
    order = BatchOrder(dataset.buckets, 2, seed=1)
    loader = BatchLoader(dataset, order, 4, 0, 1, 2, draw=progress_draw, run_steps=8)
    seen = [batch.draws["progress"].tolist() for (batch,) in loader.steps(5, 7)]
    assert seen == [[5 / 8] * 2, [6 / 8] * 2]


@pytest.mark.parametrize("processes", [0, 2])
def test_a_run_without_steps_left_reads_nothing(dataset_dir, processes):
    dataset = LatentDataset(dataset_dir, "train")
    order = BatchOrder(dataset.buckets, 8, seed=1)
    loader = BatchLoader(dataset, order, 4, 0, 1, 8, config=DataConfig(processes=processes))
    assert list(loader.steps(5, 5)) == []


def test_a_mistake_met_by_a_loader_process_is_the_same_one_line(dataset_dir, tmp_path):
    copy = shutil.copytree(dataset_dir, tmp_path / "copy")
    spoil_checksums(copy)
    dataset = LatentDataset(copy, "train")
    order = BatchOrder(dataset.buckets, 8, seed=1)
    loader = BatchLoader(dataset, order, 4, 0, 1, 8, DataConfig(processes=1))
    with pytest.raises(UserError, match=r"latent of clip clip-0\d\d is damaged") as caught:
        next(loader.steps(0, 3))
    assert "\n" not in str(caught.value)


def test_the_cache_of_row_groups_stays_within_its_budget(dataset_dir):
    addresses = [(group, row) for group in range(4) for row in range(5)] * 2
    groups = RowGroups(dataset_dir, budget_bytes=1)
    roomy = RowGroups(dataset_dir)
    for group, row in addresses:
        assert groups.row("latents/a.parquet", group, row) == roomy.row(
            "latents/a.parquet", group, row
        )
        assert len(groups._cache) == 1
    assert len(roomy._cache) == 4
    size = pq.read_table(dataset_dir / "latents/a.parquet").nbytes
    assert roomy._bytes <= size


def test_footers_are_read_once_for_as_many_files_as_are_kept(dataset_dir, monkeypatch):
    read, parquet_file = [], pq.ParquetFile

    def counting(source, metadata=None, **options):
        read.append((Path(source).parent.name, metadata is None))
        return parquet_file(source, metadata=metadata, **options)

    monkeypatch.setattr("training.row_groups.pq.ParquetFile", counting)
    monkeypatch.setattr("training.row_groups.MOST_FOOTERS", 1)
    groups = RowGroups(dataset_dir, budget_bytes=1)
    for path, group in (("latents", 0), ("latents", 1), ("text", 0), ("text", 1), ("latents", 0)):
        groups.row(f"{path}/a.parquet", group, 0)
    # The last one was given up for the text's.
    assert [anew for _, anew in read] == [True, False, True, False, True]


@pytest.mark.parametrize(
    ("path", "damage", "told"),
    [
        ("latents/a.parquet", lambda path: path.unlink(), "latents/a.parquet is missing"),
        (
            "text/a.parquet",
            lambda path: path.write_bytes(path.read_bytes()[:-9]),
            r"text/a.parquet has \d+ bytes instead of \d+",
        ),
        (
            "selection/v1.parquet",
            lambda path: path.write_bytes(path.read_bytes()[:-9] + b"123456789"),
            "selection/v1.parquet has another content",
        ),
    ],
)
def test_files_that_are_not_the_manifests_are_refused_by_name(
    dataset_dir, tmp_path, path, damage, told
):
    copy = shutil.copytree(dataset_dir, tmp_path / "copy")
    dataset = LatentDataset(copy, "train")
    dataset.check_files()
    damage(copy / path)
    found = []
    for share in range(3):
        try:
            dataset.check_files(share, 3)
        except UserError as error:
            found.append(str(error))
    assert len(found) == 1
    assert re.search(told, found[0])
