"""Which partitions to train with: the paper's Tab. 3 in small, on the sprite world.

    make demo                                                          # once: makes the data set
    python benchmarks/mixed_partitions.py runs/demo --out runs/mixed [--steps 1600] [--prompts 64]

Three models are trained from the same start, on the same clips, for as many steps: with chunks of
one frame only, with the whole buffer as one chunk only, and with all chunk sizes mixed (the demo's
own teacher, if it was trained so). All are then streamed with c = 1 (arXiv:2507.03745v4, Tab. 3)
on prompts whose combination no training clip shows, and the exact scorer says what they got right.
A stream begins either as an ordinary video or as a ramp; a model that never saw the one may still
do the other, so both are shown.

It can be stopped at any time: the same command continues. Results: OUT/mixed_partitions.md.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
from collections.abc import Sequence
from pathlib import Path

from evaluation.sprite_score import summarise
from evaluation.sprites import SpritePrompt, held_out_prompts
from jobs.config import load_config
from jobs.console import progress, say
from jobs.demo import DemoSettings
from jobs.evaluate import cached_videos, generate_videos, score_videos
from jobs.launch import launch
from jobs.runtime import ray_runtime
from jobs.training_job import training_job
from streamdit.config import PartitionConfig, PartitionEntry, SamplingConfig, StartKind
from streamdit.io import CONFIG_FILE, read_model_config
from training.config import TrackingConfig, TrainConfig

STARTS: tuple[StartKind, ...] = ("text-to-video", "ramp")
COLUMNS = ("colour", "background", "direction", "shape", "all_right")


def mixes(config: TrainConfig) -> dict[str, PartitionConfig]:
    """The training mixes that are compared, by the name of their row."""
    frames = config.model.buffer_frames
    mixed = config.partition

    def only(chunk_frames: int) -> PartitionConfig:
        entry = PartitionEntry(chunk_frames=chunk_frames)
        return mixed.model_copy(update={"entries": (entry,)})

    sizes = ", ".join(f"{entry.chunk_frames}" for entry in mixed.entries)
    return {
        "c = 1 only": only(1),
        f"c = {frames} only (B: ordinary text-to-video)": only(frames),
        f"mixed, c = {sizes}": mixed,
    }


def train(
    demo: DemoSettings, name: str, partition: PartitionConfig, options: argparse.Namespace
) -> Path:
    """Train one model, or find it finished; returns its model directory."""
    if partition == demo.train.partition and options.steps == demo.train.steps:
        config = demo.train.model_copy(update={"seed": options.seed})
        demos = training_job(config, options.demo / "dataset", options.demo / "teacher")
        if demos.finished():
            say(f"{name}: the demo's own teacher")
            return demos.model_directory
    chunk = partition.entries[0].chunk_frames
    config = TrainConfig.model_validate(
        demo.train.model_dump()
        | {
            "partition": partition.model_dump(),
            "sampling": {"chunk_frames": chunk, "micro_steps": 4, "start": "ramp"},
            "steps": options.steps,
            "seed": options.seed,
            "tracking": TrackingConfig(directory=str(options.out / "mlflow")).model_dump(),
        }
    )
    label = name.split(",")[0].split(" (")[0].replace(" ", "")
    run = options.out / f"{label}-{options.steps}-{options.seed}"
    return launch(training_job(config, options.demo / "dataset", run, name=label))


def declared_for_all(model: Path, partition: PartitionConfig) -> Path:
    """A copy of a model that claims to have been trained with every chunk size.

    What is measured here is how a model does with chunks that it never saw, which `streamdit.load`
    rightly refuses.
    """
    given = read_model_config(model)
    if given.partition == partition:
        return model
    copy = model.with_name("model-any-scheme")
    config = given.model_copy(update={"partition": partition})
    if not (copy / CONFIG_FILE).is_file() or read_model_config(copy) != config:
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(model, copy)
    (copy / CONFIG_FILE).write_text(config.model_dump_json(indent=2) + "\n")
    return copy


def score(
    model: Path,
    sampling: SamplingConfig,
    prompts: Sequence[SpritePrompt],
    options: argparse.Namespace,
) -> dict[str, float]:
    """What a model gets right of `prompts`; its videos are kept in the output folder."""
    captions = [prompt.caption() for prompt in prompts]
    key = {
        "weights": read_model_config(model).weights_sha256,
        "sampling": sampling.model_dump(),
        "prompts": captions,
    }

    def make():
        with progress(f"score {model.parent.name} {sampling.start}", unit="videos") as shown:
            return generate_videos(str(model), sampling, captions, 1000, 32, on_progress=shown)

    path = options.out / "scored" / f"{model.parent.name}-{sampling.start}.npz"
    return summarise(
        [video.score for video in score_videos(cached_videos(path, key, make), prompts)]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("demo", type=Path, help="directory of a finished `make demo`")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=1600)
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="as of `streamdit demo`")
    options = parser.parse_intermixed_args()
    demo = load_config(
        DemoSettings,
        stage="demo",
        preset="demo",
        overrides=options.overrides,
        sections=("ingest", "autoencoder", "train", "distill"),
    )
    options.out.mkdir(parents=True, exist_ok=True)
    prompts = held_out_prompts(demo.world)[: options.prompts]
    own = demo.train.sampling
    rows = []
    with ray_runtime():
        for name, partition in mixes(demo.train).items():
            model = declared_for_all(train(demo, name, partition, options), demo.train.partition)
            for start in STARTS:
                sampling = SamplingConfig(
                    chunk_frames=1,
                    micro_steps=own.micro_steps,
                    guidance_scale=own.guidance_scale,
                    start=start,
                )
                rows.append((name, start, score(model, sampling, prompts, options)))
    table = render(rows, options, own.micro_steps)
    (options.out / "mixed_partitions.md").write_text(table)
    print(table)
    say(f"written to {options.out / 'mixed_partitions.md'}")


def render(
    rows: Sequence[tuple[str, str, dict[str, float]]], options: argparse.Namespace, micro_steps: int
) -> str:
    """The table, with what it was made by."""
    count = int(rows[0][2]["count"])
    # Twice the standard error of a share of one half: the most that chance moves a figure.
    margin = 2 * (0.25 / count) ** 0.5
    headings = " | ".join(COLUMNS).replace("_", " ")
    lines = [
        f"`python benchmarks/mixed_partitions.py runs/demo --out runs/mixed "
        f"--steps {options.steps} --prompts {options.prompts} --seed {options.seed}`",
        "",
        f"All streamed with c = 1, s = {micro_steps}; {count} prompts never trained on; shares of "
        f"videos that got it right (chance moves a share by up to ±{margin:.2f}).",
        "",
        f"| trained with | stream begins as | {headings} | mean of four |",
        f"|---|---|{'---|' * (len(COLUMNS) + 1)}",
    ]
    for name, start, summary in rows:
        mean = statistics.fmean(summary[column] for column in COLUMNS[:4])
        cells = [f"{summary[column]:.2f}" for column in COLUMNS] + [f"{mean:.3f}"]
        lines.append(f"| {name} | {start} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
