"""Rollouts made before the run: the same targets as live ones, and only for the same run."""

import json
import os
import shutil
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from latent_dataset import write_dataset
from model_directory import write_model_directory
from processes import run

from distillation.cache import CachedRollouts, rollout_rows, write_rollouts
from distillation.config import DistillConfig
from distillation.objective import MultistepDistillation
from distillation.rollout import LiveRollouts
from distillation.teacher import load_teacher
from jobs.distill import distillation_job, teacher_plan
from jobs.rollouts import RolloutActor, make_rollouts, plan_units
from jobs.runtime import ray_runtime
from pipeline.graph import stop_ray
from pipeline.lock import writing
from pipeline.store import open_store
from streamdit.errors import UserError
from streamdit.io import load_model, read_model_config
from training.data import Batch
from training.metrics import read_metrics
from training.objective import stack_draws
from training.order import sample_generator


def settings(**changes):
    values = {
        "teacher": {"chunk_frames": 1, "micro_steps": 2, "guidance_scale": 2.0},
        "steps": 3,
        "global_batch": 4,
        "precision": "float32",
        "optimizer": {"learning_rate": 1e-3},
        "ema_decay": 0.5,
        "log_every": 1,
        "validation": {"samples": 2},
    }
    return DistillConfig.model_validate(values | changes)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cache")
    write_dataset(folder / "data")
    write_model_directory(folder)
    return folder


@pytest.fixture(scope="module")
def actor(folder):
    (folder / "made").mkdir()
    return RolloutActor(
        str(folder / "data"), str(folder / "model"), str(folder / "made"), settings()
    )


@pytest.fixture(scope="module")
def rollouts_dir(folder):
    with ray_runtime():
        make_rollouts(folder / "data", folder / "model", folder / "rollouts", settings(), 2)
    return folder / "rollouts"


def test_cached_target_is_the_live_target_of_the_same_draws(folder, actor, tmp_path):
    unit = plan_units(folder / "data", per_clip=1)[0]
    batch, live = actor.roll_out(unit, unit.positions)
    rows = list(rollout_rows(live, batch.clip_ids, 0, torch.float32))
    write_rollouts(open_store(tmp_path), "one.parquet", rows)
    plan = teacher_plan(settings(), folder / "model")
    manifest = {
        "teacher_sha256": "",
        "dataset_fingerprint": "",
        "plan": {},
        "seed": 0,
        "precision": "float32",
        "per_clip": 1,
        "files": ["one.parquet"],
    }
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    cached = CachedRollouts(tmp_path)
    choice = {"choice": torch.zeros(len(batch.clip_ids), dtype=torch.long)}
    found = cached(None, batch, choice)
    for name in ("start", "target", "positions", "moving", "kind"):
        assert torch.equal(getattr(found, name).to(getattr(live, name)), getattr(live, name)), name

    # So is the loss, and its gradient.
    def loss_of(source, draws):
        student, _ = load_model(folder / "model")
        loss, _ = MultistepDistillation(source, plan)(student, batch, draws)
        loss.backward()
        return loss.item(), student.patch_embedding.weight.grad

    class Given:
        def __call__(self, student, batch, draws):
            return live

    (cached_loss, cached_grad), (live_loss, live_grad) = (
        loss_of(cached, choice),
        loss_of(Given(), {}),
    )
    assert cached_loss == live_loss
    assert torch.equal(cached_grad, live_grad)


def test_actor_makes_what_the_live_source_makes(folder, actor):
    unit = plan_units(folder / "data", per_clip=1)[0]
    batch, made = actor.roll_out(unit, unit.positions[:4])
    plan = teacher_plan(settings(), folder / "model")
    teacher = load_teacher(str(folder / "model"), settings(), torch.device("cpu"))
    draws = stack_draws(
        [
            plan.draw(batch.latents.shape[1:], sample_generator(0, 0, place, "train-draws"))
            for place in unit.positions[:4]
        ]
    )
    live = LiveRollouts(teacher, plan)(None, batch, draws)
    assert torch.equal(made.start, live.start)
    assert torch.equal(made.target, live.target)


def test_every_clip_has_its_rollouts_and_a_second_run_makes_none(folder, rollouts_dir):
    cached = CachedRollouts(rollouts_dir)
    plan = teacher_plan(settings(), folder / "model")
    cached.check_fits(plan, read_model_config(folder / "model"), folder / "data")
    assert {len(places) for places in cached._places.values()} == {2}
    files = {path.name: path.stat().st_mtime_ns for path in rollouts_dir.glob("*.parquet")}
    with ray_runtime():
        count = make_rollouts(folder / "data", folder / "model", rollouts_dir, settings(), 2)
    assert count == 48
    assert files == {path.name: path.stat().st_mtime_ns for path in rollouts_dir.glob("*.parquet")}


def test_rollouts_may_lie_in_an_s3_store(folder, rollouts_dir, s3):
    """What a cluster whose nodes share no folder writes there, and a run reads from there."""
    address = "s3://videos/rollouts"
    with pytest.raises(UserError, match=f"{address} holds no finished rollouts"):
        CachedRollouts(address)
    with ray_runtime():
        count = make_rollouts(folder / "data", folder / "model", address, settings(), 2)
    assert count == 48
    there, here = CachedRollouts(address), CachedRollouts(rollouts_dir)
    assert there.manifest == here.manifest
    clip_id, places = next(iter(here._places.items()))
    assert there._places[clip_id] == places
    for place in places:
        assert there._groups.row(*place) == here._groups.row(*place)
    job = distillation_job(
        settings(rollouts=address), folder / "data", folder / "model", folder / "out"
    )
    same = distillation_job(
        settings(rollouts=str(rollouts_dir)), folder / "data", folder / "model", folder / "out"
    )
    assert job.fingerprint() == same.fingerprint()
    assert isinstance(job.make_objective(job, torch.device("cpu")).source, CachedRollouts)


def test_data_that_does_not_fit_the_teacher_is_refused_before_any_rollout(folder, tmp_path):
    other = write_dataset(tmp_path / "data")
    manifest = json.loads((other / "manifest.json").read_text())
    manifest["autoencoder"]["sha256"] = "0" * 64
    (other / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"its latents come from autoencoder 000000000000"):
        make_rollouts(other, folder / "model", tmp_path / "out", settings(), 1)
    assert not list((tmp_path / "out").glob("*.parquet"))


def test_damaged_rollout_is_named_with_its_file_and_what_mends_it(rollouts_dir, tmp_path):
    copy = shutil.copytree(rollouts_dir, tmp_path / "rollouts")
    for file in copy.glob("*.parquet"):
        table = pq.read_table(file)
        crc = pa.array([0] * len(table), table.schema.field("target_crc").type)
        index = table.schema.get_field_index("target_crc")
        pq.write_table(table.set_column(index, table.schema.field(index), crc), file)
    cached = CachedRollouts(copy)
    clip = next(iter(cached._places))
    batch = Batch(torch.zeros(1, 4, 4, 4, 4), {}, {}, [clip], [0])
    with pytest.raises(UserError) as caught:
        cached(lambda *given: given, batch, {"choice": torch.zeros(1, dtype=torch.long)})
    assert f"{copy}/rollouts-" in str(caught.value)
    assert f"column target of clip {clip} is damaged" in str(caught.value)
    assert "the same `streamdit rollouts` makes it anew" in str(caught.value)


def test_rollouts_of_another_teacher_plan_or_data_set_are_refused(folder, rollouts_dir, tmp_path):
    cached = CachedRollouts(rollouts_dir)
    parent, data = read_model_config(folder / "model"), folder / "data"
    plan = teacher_plan(settings(), folder / "model")
    with pytest.raises(UserError, match="was made by teacher"):
        cached.check_fits(plan, parent.model_copy(update={"weights_sha256": "0" * 64}), data)
    other = teacher_plan(settings(teacher={"chunk_frames": 2, "micro_steps": 2}), folder / "model")
    with pytest.raises(UserError, match="was made with scheme="):
        cached.check_fits(other, parent, data)
    grown = write_dataset(tmp_path / "grown", clips=30)
    manifest = (grown / "manifest.json").read_text()
    (grown / "manifest.json").write_text(manifest.replace('"test"', '"grown"'))
    with pytest.raises(UserError, match="was made from data set test, not from grown"):
        cached.check_fits(plan, parent, grown)
    with pytest.raises(UserError, match="holds rollouts with another dataset_fingerprint"):
        make_rollouts(grown, folder / "model", rollouts_dir, settings(), 2)
    manifest = cached.manifest
    cached.manifest = manifest.model_copy(update={"precision": "bfloat16"})
    with pytest.raises(UserError, match=r"was made in bfloat16 but the run is in float32"):
        cached.check_fits(plan, parent, data, "float32")
    cached.check_fits(plan, parent, data, "bfloat16")
    cached.manifest = manifest
    with pytest.raises(UserError, match="holds no finished rollouts"):
        CachedRollouts(tmp_path)
    with pytest.raises(UserError, match="holds rollouts with another plan"):
        make_rollouts(
            data,
            folder / "model",
            rollouts_dir,
            settings(teacher={"chunk_frames": 2, "micro_steps": 2}),
            2,
        )


def test_rollouts_are_known_to_a_run_by_what_they_hold(folder, rollouts_dir, tmp_path):
    """A moved folder is the same run; another number of rollouts, or other draws, is not."""

    def fingerprint(directory):
        config = settings(rollouts=str(directory))
        return distillation_job(
            config, folder / "data", folder / "model", tmp_path / "out"
        ).fingerprint()

    known = fingerprint(rollouts_dir)
    moved = shutil.copytree(rollouts_dir, tmp_path / "moved")
    assert fingerprint(moved) == known
    manifest = json.loads((moved / "manifest.json").read_text())
    for change in ({"per_clip": 3}, {"seed": 1}):
        (moved / "manifest.json").write_text(json.dumps(manifest | change))
        assert fingerprint(moved) != known
    (moved / "manifest.json").unlink()
    with pytest.raises(UserError, match="holds no finished rollouts"):
        fingerprint(moved)


def test_rollouts_are_stored_as_they_are_read(rollouts_dir):
    """Without compression, so that a mapped file is read without a copy."""
    file = pq.ParquetFile(next(rollouts_dir.glob("*.parquet")))
    columns = file.metadata.row_group(0)
    found = {columns.column(index).compression for index in range(columns.num_columns)}
    assert found == {"UNCOMPRESSED"}


@pytest.fixture
def one_cpu():
    """A Ray runtime with room for one actor."""
    import ray

    ray.init(address="local", num_cpus=1, include_dashboard=False, logging_level="ERROR")
    yield
    stop_ray()


@pytest.mark.timeout(120)
def test_actors_that_find_no_room_leave_their_part_to_the_others(folder, one_cpu, tmp_path):
    wide = settings(launch={"workers": 3})
    with pytest.raises(UserError, match="3 workers need 3 CPU but this machine has 1"):
        make_rollouts(
            folder / "data", folder / "model", tmp_path / "own", wide, 4, own_runtime=True
        )
    count = make_rollouts(folder / "data", folder / "model", tmp_path / "out", wide, 4)
    assert count == 4 * 24
    assert len(CachedRollouts(tmp_path / "out").manifest.files) == 8


def test_manifest_is_not_written_before_every_file_has_arrived(folder, tmp_path, monkeypatch):
    """As when actors on other nodes write into a folder of their own."""
    import jobs.rollouts

    monkeypatch.setattr(jobs.rollouts, "_work_off", lambda actors, units, launch: iter(units))
    with ray_runtime(), pytest.raises(UserError, match=r"and 1 more\) was made but is not there"):
        make_rollouts(folder / "data", folder / "model", tmp_path, settings(), 1)
    assert not (tmp_path / "manifest.json").exists()


def test_drift_is_refused_for_rollouts_made_beforehand(folder, tmp_path):
    drifting = settings(drift={"teacher": [[0.0, 0.5]]})
    with pytest.raises(UserError, match="leave out the drift settings"):
        make_rollouts(folder / "data", folder / "model", tmp_path / "out", drifting, 1)


WORKER = """
import json, sys
from pathlib import Path
from distillation.config import DistillConfig
from jobs.distill import distillation_job
from training.loop import train_loop

settings, data, teacher, out, forbid = json.loads(sys.argv[1])
if forbid:
    import distillation.teacher
    def refuse(*_):
        raise AssertionError("a teacher was loaded")
    distillation.teacher.load_teacher = refuse
elif settings["teacher"]["placement"] == "sharded":
    import distillation.teacher
    load = distillation.teacher.load_teacher
    def load_and_weigh(*arguments):
        engine = load(*arguments)
        weights = list(engine.module.parameters())
        held, whole = sum(w.numel() for w in weights), sum(w.ds_numel for w in weights)
        assert held < 0.1 * whole, f"{held} of {whole} weights lie whole on a worker"
        return engine
    distillation.teacher.load_teacher = load_and_weigh
config = DistillConfig.model_validate(settings)
train_loop(distillation_job(config, Path(data), Path(teacher), Path(out)))
"""


def distil(folder, out, workers, forbid_teacher=False, **changes):
    """Losses of a distillation under torchrun."""
    tracking = {"directory": str(out / "mlflow")}
    values = settings(tracking=tracking, **changes).model_dump(mode="json")
    (out.parent / "worker.py").write_text(WORKER)
    arguments = [values, str(folder / "data"), str(folder / "model"), str(out), forbid_teacher]
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
        *(f"--nproc-per-node={workers}", str(out.parent / "worker.py"), json.dumps(arguments)),
    ]
    root = str(Path(__file__).parents[2])
    environment = os.environ | {"PYTHONPATH": root, "OMP_NUM_THREADS": "1"}
    status, said = run(*command, env=environment, timeout=300)
    assert status == 0, said
    return {
        row["step"]: row["loss"] for row in read_metrics(out / "metrics.jsonl") if "loss" in row
    }


@pytest.mark.slow
def test_distillation_from_rollouts_needs_no_teacher(folder, rollouts_dir, tmp_path):
    losses = distil(folder, tmp_path / "out", 1, forbid_teacher=True, rollouts=str(rollouts_dir))
    assert len(losses) == 3
    student = read_model_config(tmp_path / "out" / "model")
    assert student.distilled.teacher_sha256 == read_model_config(folder / "model").weights_sha256


@pytest.mark.slow
def test_one_unguided_step_leaves_a_student_nothing_to_learn(folder, tmp_path):
    """At first the student is the teacher, so where both take the same step the loss is zero."""
    teacher = {"chunk_frames": 1, "micro_steps": 1, "guidance_scale": 1.0}
    losses = distil(folder, tmp_path / "out", 1, teacher=teacher)
    assert losses[1] < 1e-8


@pytest.mark.slow
def test_sharded_teacher_gives_the_losses_of_a_whole_one(folder, tmp_path):
    """ZeRO-3 teacher and ZeRO-3 student on two workers, with both kinds of drift."""
    teacher = {"chunk_frames": 1, "micro_steps": 2, "guidance_scale": 2.0}
    drift = {"teacher": [[0.0, 0.4]], "student": [[0.0, 0.4]], "chunks": 2}
    whole = distil(folder, tmp_path / "whole", 2, teacher=teacher, drift=drift, zero_stage=2)
    sharded = distil(
        folder,
        tmp_path / "sharded",
        2,
        teacher=teacher | {"placement": "sharded"},
        drift=drift,
        zero_stage=3,
    )
    assert len(whole) == 3
    for step, loss in whole.items():
        assert sharded[step] == pytest.approx(loss, rel=1e-5)


def test_job_takes_the_rollouts_along(folder, rollouts_dir):
    config = settings(rollouts=str(rollouts_dir))
    job = distillation_job(config, folder / "data", folder / "model", folder / "out")
    objective = job.make_objective(job, torch.device("cpu"))
    assert isinstance(objective.source, CachedRollouts)


def test_one_command_at_a_time_makes_rollouts_in_a_folder(folder, tmp_path):
    busy = pytest.raises(UserError, match="streamdit rollouts")
    with writing(tmp_path, "streamdit rollouts", print), busy:
        make_rollouts(folder / "data", folder / "model", tmp_path, settings(), 1)
    assert not list(tmp_path.glob("*.parquet"))


@pytest.mark.timeout(120)
def test_a_cluster_without_room_for_any_actor_is_said_and_waited_for(
    folder, one_cpu, tmp_path, monkeypatch
):
    class Told(Exception):
        pass

    def tell(text):
        raise Told(text)

    monkeypatch.setattr("jobs.rollouts.PATIENCE_S", 0.2)
    monkeypatch.setattr("jobs.rollouts.say", tell)
    wide = settings(launch={"workers": 2, "cpus_per_worker": 2})
    with pytest.raises(Told, match="each takes 2 CPU and 0 GPU; the cluster has 1 CPU and 0 GPU"):
        make_rollouts(folder / "data", folder / "model", tmp_path / "out", wide, 1)
