"""A recipe: training in stages, each starting from the model that the one before it made.

Recipes that ship are `configs/recipe/*.yaml`; what a stage's settings mean is said by
:class:`training.config.TrainConfig` and `distillation.config.DistillConfig`.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator

from streamdit.config import StrictModel


class StageConfig(StrictModel):
    """One stage of a recipe."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9-]*$")
    """Name of the stage and of its run's directory."""
    kind: Literal["train", "distill"] = "train"
    """Buffered flow matching, or distillation of the stage before."""
    preset: str | None = None
    """Preset of its kind to begin with; default: the recipe's."""
    dataset: str | None = None
    """Which of several data sets it is trained on, by a name that the command line gives a
    directory to; default: the data set of the command line."""
    settings: dict[str, Any] = Field(default_factory=dict)
    """Settings over those of the preset and of the recipe."""


class RecipeConfig(StrictModel):
    """Stages in their order."""

    preset: str | None = None
    """Preset that every stage begins with."""
    settings: dict[str, Any] = Field(default_factory=dict)
    """Settings of every stage of kind `train`, over the preset."""
    stages: tuple[StageConfig, ...] = Field(min_length=1)
    """What is done, first to last."""

    @field_validator("stages")
    @classmethod
    def _check_stages(cls, stages: tuple[StageConfig, ...]) -> tuple[StageConfig, ...]:
        names = [stage.name for stage in stages]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice:
            raise ValueError(f"two stages are named {twice}; give each a name of its own")
        return stages
