"""What a model may be asked for: the schemes and starts that it was trained or distilled for."""

from __future__ import annotations

from torch import Tensor

from streamdit.config import PartitionConfig, SamplingConfig, StreamDiTConfig
from streamdit.errors import UserError
from streamdit.partition import PartitionMixture, PartitionScheme


def check_scheme(config: StreamDiTConfig, sampling: SamplingConfig) -> PartitionScheme:
    """The scheme that `sampling` stands for.

    Raises:
        UserError: if the model does not serve it, with the list of what it serves.
    """
    frames = config.model.buffer_frames
    scheme = PartitionScheme.from_sampling(frames, sampling)
    if config.distilled is not None:
        asked = (scheme.K, scheme.c, scheme.s, sampling.guidance_scale)
        served = [(s.reference_frames, s.chunk_frames, 1, 1.0) for s in config.distilled.schemes]
        if asked not in served:
            known = ", ".join(f"K={K} c={c} s=1 w=1" for K, c, *_ in served)
            raise UserError(
                f"scheme K={scheme.K} c={scheme.c} s={scheme.s} w={sampling.guidance_scale:g} is "
                f"not what this distilled model was distilled for; choose one of {known}, or take "
                "its teacher"
            )
        return scheme
    mixture = PartitionMixture(config.partition, frames)
    if not mixture.serves(scheme):
        raise UserError(
            f"scheme K={scheme.K} c={scheme.c} was not in this model's training mix; choose "
            f"one of {mixture.describe()} (with any s)"
        )
    return scheme


def check_start(config: StreamDiTConfig, sampling: SamplingConfig) -> None:
    """Refuse a way of filling the first buffer that the model has not learnt.

    Raises:
        UserError: naming the ways that there are.
    """
    if config.distilled is not None:
        if sampling.start not in config.distilled.starts:
            raise UserError(
                f"start {sampling.start} was not part of this model's distillation; use "
                f"{' or '.join(config.distilled.starts)}"
            )
        return
    problem = cold_start_problem(config.partition, config.model.buffer_frames, sampling)
    if problem:
        raise UserError(f"this model cannot start a stream: {problem}")


def cold_start_problem(
    partition: PartitionConfig, buffer_frames: int, sampling: SamplingConfig
) -> str | None:
    """Why a model of this mix cannot make the first video of a stream, and what to do; or None.

    A stream begins as ordinary text-to-video (arXiv:2507.03745v4, Fig. 13), all frames at one
    time, which the model only knows if K = 0, c = B was in its mix. The ramp does without.
    """
    if sampling.start == "ramp" or PartitionMixture(partition, buffer_frames).makes_first_video:
        return None
    return (
        f"ordinary text-to-video, K=0 c={buffer_frames}, which makes its first video, is not in "
        f"the training mix; add {{chunk_frames: {buffer_frames}}} to partition.entries, or set "
        "sampling.start=ramp"
    )


def check_references(
    config: StreamDiTConfig, references: Tensor, scheme: PartitionScheme
) -> Tensor:
    """The last K frames of the latents `[b, f, C, h, w]` that a stream continues.

    Raises:
        UserError: if the scheme has no references, there are too few latents, or the model has not
            learnt to fill its buffer behind them.
    """
    if scheme.K == 0:
        raise UserError(
            "a scheme with K=0 has no reference frames to continue a video from; choose one with "
            "K>0 that the model was trained for, or follow the video with a strength instead"
        )
    if references.shape[1] < scheme.K:
        raise UserError(
            f"the video to continue has {references.shape[1]} latent frames but the scheme needs "
            f"K={scheme.K} references; give a longer video"
        )
    if not fills_behind_references(config, scheme):
        remedy = (
            f"train one with {behind_references(scheme)} in partition.entries too"
            if config.distilled is None
            else "distil one with teacher.continued_share (about 0.2)"
        )
        raise UserError(
            f"this model cannot continue a video with K={scheme.K} c={scheme.c}: it has not learnt "
            f"to fill the buffer behind the references all at one level; {remedy}, or follow the "
            "video with a strength instead"
        )
    return references[:, -scheme.K :]


def fills_behind_references(config: StreamDiTConfig, scheme: PartitionScheme) -> bool:
    """Whether the model knows references before frames of one level, as such a stream begins."""
    if scheme.N == 1:
        return True
    if config.distilled is not None:
        return config.distilled.continues
    mixture = PartitionMixture(config.partition, scheme.buffer_frames)
    return any((known.K, known.N) == (scheme.K, 1) for known in mixture.schemes)


def behind_references(scheme: PartitionScheme) -> str:
    """Entry of a training mix that teaches this, for messages."""
    return f"{{chunk_frames: {scheme.N * scheme.c}, reference_frames: {scheme.K}}}"
