"""The MLflow run that a registered model belongs to."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from streamdit.config import StreamDiTConfig
from training.records import RUN_FILE
from training.tracking import is_gone


def with_run_id(config: StreamDiTConfig, directory: Path) -> StreamDiTConfig:
    """The configuration of a model in its run's directory, with a run that was made after it was.

    Where the store was away from the beginning of a run to its end, the model knows of no run.
    """
    path = directory.parent / RUN_FILE
    if config.lineage.get("run_id") or not path.is_file():
        return config
    known = json.loads(path.read_text())
    if known["fingerprint"] != config.lineage.get("fingerprint"):
        return config
    lineage = {**config.lineage, "run_id": known["run_id"]}
    return config.model_copy(update={"lineage": lineage})


@contextmanager
def run_for(client: Any, experiment_id: str, config: StreamDiTConfig, name: str) -> Iterator[str]:
    """Id of the run that a version belongs to: the one that made the model, if this store has it.

    That one stays as it ended. Otherwise a run is made for the registration alone.
    """
    from mlflow.exceptions import MlflowException

    made_by = config.lineage.get("run_id")
    if made_by and not is_gone(client, made_by):
        yield str(made_by)
        return
    own = str(client.create_run(experiment_id, run_name=f"register-{name}").info.run_id)
    try:
        yield own
    except BaseException:
        with suppress(MlflowException):  # the store may be what failed
            client.set_terminated(own, "FAILED")
        raise
    client.set_terminated(own, "FINISHED")
