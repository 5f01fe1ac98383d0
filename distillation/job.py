"""The training job of a distillation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from distillation.cache import MANIFEST_FILE, read_manifest
from distillation.config import DistillConfig
from pipeline.store import open_store
from training.job import TrainJob


@dataclass(frozen=True)
class DistillationJob(TrainJob):
    """A training job whose cached rollouts are known by what they hold, not by where they lie."""

    def identity(self) -> dict[str, Any]:
        """See :meth:`TrainJob.identity`.

        Raises:
            UserError: if the rollouts that the run asks for are not there.
        """
        settings = super().identity()
        assert isinstance(self.config, DistillConfig)
        if self.config.rollouts:
            store = open_store(self.config.rollouts)
            read_manifest(store)
            settings["rollouts"] = store.sha256(MANIFEST_FILE)
        return settings
