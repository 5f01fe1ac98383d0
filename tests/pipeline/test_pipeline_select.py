import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest
from conftest import SMALL, run_in_a_loop, write_shots
from typer.testing import CliRunner

from jobs.cli import app
from pipeline.annotate import annotate
from pipeline.config import IngestConfig
from pipeline.curate import curate
from pipeline.encode import encode
from pipeline.pending import candidate_table
from pipeline.plan import read_plan
from pipeline.reselect import preview, reselect
from pipeline.schema import load_manifest
from pipeline.store import open_store
from streamdit.errors import UserError


@pytest.fixture(scope="module")
def encoded(tmp_path_factory, autoencoder_dir):
    """A dataset of eight clips, all encoded."""
    folder = tmp_path_factory.mktemp("select")
    write_shots(folder / "videos" / "a.mp4", ["red", "green"], step=1)
    write_shots(folder / "videos" / "b.mp4", ["blue", "yellow"], step=3)
    config = IngestConfig.model_validate(SMALL)
    with pytest.MonkeyPatch.context() as patch:
        for module in ("curate", "annotate", "encode"):
            patch.setattr(f"pipeline.{module}.run_units", run_in_a_loop)
        curate([str(folder / "videos")], folder / "data", config)
        annotate(folder / "data", config)
        encode(folder / "data", autoencoder_dir, config)
    return folder / "data"


@pytest.fixture
def dataset(encoded, tmp_path):
    return shutil.copytree(encoded, tmp_path / "data")


def all_rows(dataset):
    store = open_store(dataset)
    tables = [candidate_table(store, unit.name) for unit in read_plan(store)]
    return [row for table in tables for row in table.to_pylist()]


def test_the_preview_counts_what_each_condition_drops(dataset):
    rows = all_rows(dataset)
    level = float(np.median([row["motion"] for row in rows]))
    choice = preview(dataset, f"motion > {level} and scene == 0 and text_area < 0.5")
    fails = [(not r["motion"] > level, r["scene"] != 0, r["text_area"] is None) for r in rows]
    assert all(row["text_area"] is None for row in rows)
    assert (choice.clips, choice.selected) == (8, 0)
    assert [clause.drops for clause in choice.clauses] == np.sum(fails, 0).tolist()
    alone = [sum(f[i] and sum(f) == 1 for f in fails) for i in range(3)]
    assert [clause.alone for clause in choice.clauses] == alone
    assert [clause.unknown for clause in choice.clauses] == [0, 0, 8]
    assert [clause.text for clause in choice.clauses][1] == "scene == 0"
    single = preview(dataset, "scene == 0 or scene == 1")
    assert (single.selected, len(single.clauses)) == (8, 1)


def test_a_stricter_rule_writes_an_index_and_encodes_nothing(dataset):
    before = load_manifest(dataset)
    shards = {record.path: record for record in before.files_of("latent")}
    published = reselect(dataset, "scene == 1 and not duplicate")
    after = load_manifest(dataset)
    assert (published.version, after.selection.version) == (2, 2)
    assert {record.path: record for record in after.files_of("latent")} == shards
    assert after.fingerprint != before.fingerprint
    kept = pq.read_table(dataset / after.selection.path)["clip_id"].to_pylist()
    rows = all_rows(dataset)
    assert sorted(kept) == sorted(
        row["clip_id"] for row in rows if row["scene"] == 1 and not row["duplicate"]
    )
    assert (dataset / before.selection.path).exists()
    assert reselect(dataset, "scene == 1 and not duplicate").version == 2


def run(*arguments):
    return CliRunner().invoke(app, ["select", *arguments])


def test_the_command_shows_each_condition_and_writes_unless_told_not_to(dataset):
    dry = run(str(dataset), "scene == 0 and width > 8", "--dry-run")
    assert dry.exit_code == 0
    assert "scene == 0" in dry.output
    assert "4 of 8 clips would be kept" in dry.output
    assert load_manifest(dataset).selection.version == 1
    done = run(str(dataset), "scene == 0")
    assert "4 of 8 clips kept; selection version 2 holds 4" in done.output
    assert load_manifest(dataset).selection.rows == 4


def test_a_wrong_expression_names_the_columns(dataset):
    with pytest.raises(UserError, match=r"no column 'motoin'.*duplicate.*letterbox.*motion"):
        preview(dataset, "motoin > 1")
    with pytest.raises(UserError, match=r"none of the selected clips .* has latents"):
        reselect(dataset, "false")
    nothing = run(str(dataset), "motion > 1000")
    assert nothing.exit_code == 2
    assert "keeps no clip" in nothing.output
