"""Ingestion on two hosts, of which one is cut off for a while."""

import json
import sys
from pathlib import Path

import pytest
from conftest import file_hashes, write_shots
from ray_hosts import address_of_node, hold_until_cut_off, join, ray_on, wait_until

from pipeline.annotate import annotate
from pipeline.config import IngestConfig
from pipeline.curate import curate
from pipeline.encode import encode
from pipeline.graph import run_units

COLOURS = ["red", "green", "blue", "yellow", "purple", "cyan"]
HELD = ("curate_unit", "EncodeLatents")
"""A stage of functions and one of actors, during which the second host is cut off."""


def held(stage, folder, head):
    """`stage`, whose first unit on the second host is cut off, and then done again.

    The first host waits for a unit of the second one's new life, so that there is one.
    """

    def meet():
        if address_of_node() == head:
            wait_until((folder / "again").exists, "a unit on the second host after its return")
        elif not hold_until_cut_off(folder):
            wait_until((folder / "back").exists, "the second host's return")
            (folder / "again").touch()

    if not isinstance(stage, type):
        return lambda row: (meet(), stage(row))[1]

    class Held(stage):
        def __call__(self, row):
            meet()
            return super().__call__(row)

    return Held


def drive(arguments):
    """The driver, in a process of the first host."""
    import pipeline.curate
    import pipeline.encode

    address, folder, videos, dataset, autoencoder, settings = json.loads(arguments)
    folders = {name: Path(folder) / name for name in HELD}
    join(address, *folders.values())

    def run(tasks, stage, **resources):
        name = getattr(stage, "__name__", "")
        if name in HELD:
            stage = held(stage, folders[name], address.partition(":")[0])
        return run_units(tasks, stage, **resources)

    pipeline.curate.run_units = pipeline.encode.run_units = run
    config = IngestConfig.model_validate(settings)
    curate([videos], dataset, config)
    annotate(dataset, config)
    encode(dataset, autoencoder, config)


def split_ledger(dataset):
    """Content of every file, and which units are done: the ledger counts how often, too."""
    files = file_hashes(dataset)
    done = {name for name in files if name.startswith("ledger/")}
    return {name: content for name, content in files.items() if name not in done}, done


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_units_of_a_host_that_is_cut_off_are_done_again_and_it_works_on_when_it_is_back(
    hosts, tmp_path, autoencoder_dir, small_config, without_ray
):
    for step, (first, second) in enumerate(zip(COLOURS, COLOURS[::-1], strict=True)):
        write_shots(tmp_path / "videos" / f"{step}.mp4", [first, second], step=step)
    config = small_config.model_copy(update={"unit_sources": 1})
    curate([str(tmp_path / "videos")], tmp_path / "alone", config)
    annotate(tmp_path / "alone", config)
    encode(tmp_path / "alone", autoencoder_dir, config)

    for name in HELD:
        (tmp_path / name).mkdir()
    settings = json.loads(config.model_dump_json())
    program = "import sys; from test_pipeline_cut_off import drive; drive(sys.argv[1])"
    with ray_on(hosts, tmp_path, Path(__file__).parent) as cluster:
        places = [tmp_path, tmp_path / "videos", tmp_path / "together", autoencoder_dir]
        arguments = json.dumps([cluster.address, *map(str, places), settings])
        driver = cluster.run(hosts[0], sys.executable, "-c", program, arguments)
        for name in HELD:
            cluster.lose_and_regain_worker(tmp_path / name, driver)
        assert driver.wait(700) == 0, cluster.logs()
    for name in HELD:
        assert (tmp_path / name / "again").exists()
    together, alone = (split_ledger(tmp_path / name) for name in ("together", "alone"))
    assert together == alone
    assert not list((tmp_path / "together" / "dead").rglob("*.parquet"))
