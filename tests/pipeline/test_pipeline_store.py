"""Datasets in folders and under S3 prefixes behave the same."""

import hashlib
from pathlib import Path

import boto3
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import write_shots

from pipeline import storage
from pipeline.annotate import annotate
from pipeline.check import check_dataset
from pipeline.curate import curate
from pipeline.encode import encode
from pipeline.removal import remove_source
from pipeline.schema import load_manifest, read_clips
from pipeline.shards import open_parquet, write_table
from pipeline.store import open_store, walk_parquet
from streamdit.autoencoder import load_autoencoder


@pytest.fixture(scope="module")
def endpoint():
    """An S3 store on this machine."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def bucket(endpoint, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    storage._s3_client.cache_clear()
    boto3.client("s3").create_bucket(Bucket="data")
    yield "s3://data/some/set"
    for path in open_store("s3://data/some").files():
        open_store("s3://data/some").delete(path)
    storage._s3_client.cache_clear()


@pytest.fixture(params=["disk", "s3"])
def store(request, tmp_path):
    root = tmp_path / "set" if request.param == "disk" else request.getfixturevalue("bucket")
    return open_store(root)


def test_files_are_written_listed_read_and_deleted(store):
    assert store.files() == {}
    assert store.size("a/x.txt") is None
    with pytest.raises(FileNotFoundError):
        store.read_text("a/x.txt")
    store.write_text("b.txt", "later")
    store.write_text("a/x.txt", "first")
    store.write_text("a/x.txt", "grüße")
    assert store.read_text("a/x.txt") == "grüße"
    assert store.files() == {"a/x.txt": 7, "b.txt": 5}
    assert store.files("a") == {"a/x.txt": 7}
    assert store.sha256("b.txt") == hashlib.sha256(b"later").hexdigest()
    store.delete("a/x.txt")
    store.delete("a/x.txt")
    assert not store.exists("a/x.txt")
    assert store.exists("b.txt")


def test_a_table_appears_whole_with_its_size_and_hash(store):
    schema = pa.schema([("a", pa.int64())])
    record = write_table(store, "t/x.parquet", "clip", [{"a": i} for i in range(1000)], schema)
    assert record.rows == 1000
    assert record.bytes == store.size("t/x.parquet")
    assert record.sha256 == store.sha256("t/x.parquet")
    assert pq.read_table(store.source("t/x.parquet"))["a"].to_pylist() == list(range(1000))
    assert list(walk_parquet(store, "t")) == ["t/x.parquet"]


def test_nothing_is_visible_before_a_file_is_finished(store):
    sink = store.sink("t/x.parquet")
    writer = open_parquet(sink.file, pa.schema([("a", pa.int64())]))
    writer.write_table(pa.table({"a": [1]}))
    assert list(walk_parquet(store, "t")) == []
    writer.close()
    sink.discard()
    assert store.files() == {}


def test_more_files_than_a_page_are_listed(store):
    for i in range(7):
        store.write_text(f"many/{i}", "x")
    if store.root.startswith("s3://"):
        real = storage.call_s3

        def short_pages(uri, operation, **arguments):
            limit = {"MaxKeys": 3} if operation == "list_objects_v2" else {}
            return real(uri, operation, **arguments, **limit)

        storage.call_s3 = short_pages
        try:
            assert len(store.files("many")) == 7
        finally:
            storage.call_s3 = real
    assert list(store.files("many")) == [f"many/{i}" for i in range(7)]


def test_folders_are_put_and_replaced_whole(store, tmp_path):
    local = tmp_path / "local"
    (local / "deep").mkdir(parents=True)
    (local / "deep" / "a").write_text("1")
    (local / "b").write_text("2")
    store.put_folder(local, "copy")
    (local / "b").unlink()
    (local / "c").write_text("3")
    store.put_folder(local, "copy")
    with store.local_folder("copy") as folder:
        found = {p.name: p.read_text() for p in Path(folder).rglob("*") if p.is_file()}
    assert found == {"a": "1", "c": "3"}


def test_a_path_that_merged_the_slashes_still_names_the_bucket():
    assert open_store(Path("s3://data/x/")).root == "s3://data/x"
    assert open_store("s3://data/x/").uri("y") == "s3://data/x/y"


def test_a_dataset_on_s3_holds_what_one_on_disk_does(
    tmp_path, bucket, autoencoder_dir, small_config, without_ray
):
    write_shots(tmp_path / "videos" / "one.mp4", ["red", "green"])
    write_shots(tmp_path / "videos" / "two.mp4", ["blue"])
    found = {}
    for root in (str(tmp_path / "data"), bucket):
        curate([str(tmp_path / "videos")], root, small_config)
        annotate(root, small_config)
        encode(root, autoencoder_dir, small_config)
        assert check_dataset(root).problems == ()
        store = open_store(root)
        found[root] = {path: store.sha256(path) for path in store.files()}
    on_disk, on_s3 = found.values()
    assert on_s3 == on_disk
    manifest = load_manifest(bucket)
    with open_store(bucket).local_folder(manifest.autoencoder.source) as folder:
        assert load_autoencoder(folder).identity.sha256 == manifest.autoencoder.sha256
    assert len(read_clips(bucket)) == 6
    remove_source(bucket, "two.mp4")
    assert check_dataset(bucket).problems == ()
    assert load_manifest(bucket).selection.rows == 4
