import hashlib
import os
import zlib

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from pipeline.config import ShardConfig
from pipeline.ledger import Ledger, Wanted, fingerprint
from pipeline.schema import (
    LATENT_SCHEMA,
    FileRecord,
    decode_tensor,
    encode_tensor,
    load_manifest,
    read_annotations,
    read_clips,
)
from pipeline.select import select_rows, split_of
from pipeline.shards import ShardWriter, bucket_and_part, file_name
from pipeline.store import open_store
from streamdit.errors import UserError


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.int64])
def test_tensors_survive_the_round_trip(dtype):
    tensor = (torch.randn(3, 4, 5) * 100).to(dtype).transpose(0, 2)
    data, shape, name, crc = encode_tensor(tensor)
    assert (shape, name) == ([5, 4, 3], str(dtype).removeprefix("torch."))
    assert len(data) == 60 * tensor.element_size()
    assert crc == zlib.crc32(data)
    again = decode_tensor(data, shape, name)
    assert again.dtype == dtype
    assert torch.equal(again, tensor)


def test_bfloat16_is_stored_as_the_upper_half_of_float32():
    values = torch.tensor([1.0, -2.5, 0.0])
    data, *_ = encode_tensor(values.to(torch.bfloat16))
    assert data == b"".join(encode_tensor(value)[0][2:] for value in values)


def latent_rows(count, size):
    for i in range(count):
        payload = os.urandom(size)
        yield {
            "clip_id": f"clip{i:03d}",
            "source_id": "s",
            "frames": 16,
            "latent": payload,
            "latent_shape": [size],
            "latent_dtype": "uint8",
            "latent_crc": zlib.crc32(payload),
        }


@pytest.mark.parametrize(("compression", "codec"), [("none", "UNCOMPRESSED"), ("zstd", "ZSTD")])
def test_row_groups_and_shards_are_cut_by_bytes(tmp_path, compression, codec):
    config = ShardConfig(row_group_mb=0.03, shard_mb=0.1, compression=compression)
    rows = list(latent_rows(25, 10_000))
    with ShardWriter(
        open_store(tmp_path), "latent", "u", "16x8x8", LATENT_SCHEMA, config
    ) as writer:
        for row in rows:
            writer.add(row)
    assert [record.rows for record in writer.records] == [10, 10, 5]
    assert [record.path for record in writer.records] == [
        file_name("latent", "u", "16x8x8", part) for part in range(3)
    ]
    read = []
    for record in writer.records:
        path = tmp_path / record.path
        assert record.bytes == path.stat().st_size
        assert record.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
        file = pq.ParquetFile(path)
        sizes = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
        assert sizes == ([3, 3, 3, 1] if record.rows == 10 else [3, 2])
        assert file.metadata.row_group(0).column(3).compression == codec
        read += file.read().to_pylist()
    assert read == rows


def test_a_failed_shard_is_not_published(tmp_path):
    def write():
        with ShardWriter(
            open_store(tmp_path), "latent", "u", "b", LATENT_SCHEMA, ShardConfig()
        ) as writer:
            for row in latent_rows(2, 10):
                writer.add(row)
            raise RuntimeError("encoder failed")

    with pytest.raises(RuntimeError):
        write()
    assert list(tmp_path.rglob("*.parquet")) == []


def test_file_names_tell_bucket_and_part():
    assert bucket_and_part(file_name("latent", "0af3", "16x32x32", 7)) == ("16x32x32", 7)


def record_of(path, root):
    content = path.read_bytes()
    return FileRecord(
        path=path.relative_to(root).as_posix(),
        kind="latent",
        rows=0,
        bytes=len(content),
        sha256=hashlib.sha256(content).hexdigest(),
    )


FIRST, SECOND = Wanted(settings="f1"), Wanted(settings="f2")


def test_a_marker_counts_only_with_its_settings_inputs_and_files(tmp_path):
    ledger = Ledger(tmp_path, "latents")
    path = tmp_path / file_name("latent", "u", "b", 0)
    path.parent.mkdir()
    path.write_bytes(b"12345")
    assert ledger.read_done({"u": FIRST}.items()) == {}
    ledger.finish("u", FIRST, [record_of(path, tmp_path)], {"clips": 3})
    assert ledger.read_done({"u": FIRST, "v": FIRST}.items()) == {"u": {"clips": 3}}
    assert ledger.read_matching("u", FIRST).counters == {"clips": 3}
    for other in (SECOND, Wanted(settings="f1", inputs={"a": "1"})):
        assert ledger.read_done({"u": other}.items()) == {}
        assert ledger.read_matching("u", other) is None
    path.write_bytes(b"123")
    assert ledger.read_done({"u": FIRST}.items()) == {}
    assert ledger.read_matching("u", FIRST) is None
    path.unlink()
    assert ledger.read_done({"u": FIRST}.items()) == {}


def test_a_unit_begun_with_other_settings_has_no_marker_until_it_is_finished(tmp_path):
    ledger = Ledger(tmp_path, "latents")
    path = tmp_path / file_name("latent", "u", "b", 0)
    path.parent.mkdir()
    path.write_bytes(b"12345")
    ledger.finish("u", FIRST, [record_of(path, tmp_path)], {"clips": 3})
    ledger.begin("u", FIRST)
    assert ledger.read_matching("u", FIRST) is not None
    ledger.begin("u", SECOND)
    path.write_bytes(b"54321")  # as large as what it replaces, and then the job dies
    assert ledger.read_done({"u": FIRST}.items()) == {}


def test_a_sweep_removes_what_no_marker_lists(tmp_path):
    ledger = Ledger(tmp_path, "latents")
    folder = tmp_path / "latents"
    folder.mkdir()
    names = ["latent-u-b-00000.parquet", "latent-u-b-00001.parquet", ".latent-u-b-00002.parquet"]
    for name in [*names[:2], names[2] + ".partial", "latent-v-b-00000.parquet", "mine.txt"]:
        (folder / name).write_bytes(b"x")
    for unit in ("u", "v"):
        shard = folder / f"latent-{unit}-b-00000.parquet"
        ledger.finish(unit, FIRST, [record_of(shard, tmp_path)])
    ledger.sweep(["u", "v", "w"])
    left = sorted(path.name for path in folder.iterdir())
    assert left == [names[0], "latent-v-b-00000.parquet", "mine.txt"]


def test_passing_failures_get_three_runs(tmp_path):
    ledger = Ledger(tmp_path, "curate")
    for run in (1, 2, 3):
        assert ledger.attempt("u", FIRST) == run
        assert ledger.read_done({"u": FIRST}.items()) == {}
        ledger.finish("u", FIRST, [], {"retryable": 1, "dead": 1}, run)
    assert ledger.read_done({"u": FIRST}.items()) == {"u": {"retryable": 1, "dead": 1}}
    assert ledger.read_done({"u": FIRST}.items(), retry_dead=True) == {}
    assert ledger.attempt("u", SECOND) == 1


def test_unit_done_again_because_its_worker_died_is_the_same_run(tmp_path):
    ledger = Ledger(tmp_path, "curate")
    ledger.finish("u", FIRST, [], {"clips": 3, "dead": 0}, ledger.attempt("u", FIRST))
    assert ledger.attempt("u", FIRST) == 1


def test_fingerprints_tell_values_apart():
    assert fingerprint(1, ["a"]) == fingerprint(1, ("a",))
    assert len({fingerprint(1, ["a"]), fingerprint([1, "a"]), fingerprint(1, ["b"])}) == 3
    assert fingerprint(ShardConfig()) != fingerprint(ShardConfig(shard_mb=1))


TABLE = pa.table(
    {
        "clip_id": ["a", "b", "c", "d"],
        "motion": [0.1, 0.5, 0.9, None],
        "width": [64, 64, 128, 128],
        "caption": ["x", "", "y", "z"],
        "duplicate": [False, True, False, False],
        "licence": ["CC0", None, "CC-BY", None],
    }
)


@pytest.mark.parametrize(
    ("expression", "kept"),
    [
        ("true", "abcd"),
        ("False", ""),
        ("motion > 0.3", "bc"),
        ("motion > 0.3 and not duplicate", "c"),
        ("0.05 < motion <= 0.5", "ab"),
        ("motion > 0.8 or caption == 'x'", "ac"),
        ("motion * 2 + 0.1 >= 1.1", "bc"),
        ("-motion > -0.2", "a"),
        ("caption in ['x', 'z']", "ad"),
        ("caption not in ('x', 'z') and width / 64 == 1", "b"),
        ('caption != ""', "acd"),
        ("not motion > 0.3", "a"),  # d has no motion: unknown, and so is its opposite
        ("motion > 0.3 or duplicate", "bc"),
        ("motion > 0.3 or width == 128", "bcd"),
        ("motion is None or motion < 0.2", "ad"),
        ("licence is not None and motion > 0", "ac"),
        ("licence in ['CC0']", "a"),
        ("licence not in ['CC0']", "c"),
        ("not licence in ['CC0']", "c"),
    ],
)
def test_selection_expressions(expression, kept):
    assert "".join(select_rows(TABLE, expression)["clip_id"].to_pylist()) == kept


@pytest.mark.parametrize(
    ("expression", "reason"),
    [
        ("motoin > 0.3", "no column 'motoin'.*motion"),
        ("motion >", "not an expression"),
        ("__import__('os').system('true')", "not allowed"),
        ("[x for x in 'ab']", "not allowed"),
        ("caption > 3", "does not fit the columns"),
        ("motion", "does not fit the columns"),
        ("caption in motion", "not a list"),
        ("motion is 3", "not allowed"),
    ],
)
def test_wrong_selections_are_named(expression, reason):
    with pytest.raises(UserError, match=reason) as error:
        select_rows(TABLE, expression)
    assert "\n" not in str(error.value)


def test_the_split_is_a_stable_share_of_sources():
    splits = [split_of(f"source{i}", 0.25) for i in range(2000)]
    assert splits == [split_of(f"source{i}", 0.25) for i in range(2000)]
    assert 0.2 < splits.count("held_out") / 2000 < 0.3
    assert {split_of(f"source{i}", 0.0) for i in range(50)} == {"train"}
    smaller = [split_of(f"source{i}", 0.1) for i in range(2000)]
    assert all(b == "held_out" for a, b in zip(smaller, splits, strict=True) if a == "held_out")


def test_a_directory_without_dataset_is_named(tmp_path):
    with pytest.raises(UserError, match=r"has no manifest\.json"):
        load_manifest(tmp_path)
    with pytest.raises(UserError, match=r"has no clip table"):
        read_clips(tmp_path)
    with pytest.raises(UserError, match=r"has no annotation table"):
        read_annotations(tmp_path)
    (tmp_path / "manifest.json").write_text('{"format_version": 9}')
    with pytest.raises(UserError, match=r"does not fit format version 1 \(format_version"):
        load_manifest(tmp_path)
