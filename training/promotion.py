"""When an alias moves to a new version: at once, or if its score is better."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from streamdit.errors import UserError

ASKS_TAG = "asks_for."
"""With an alias: a version that was to have it for a higher or lower score, as this says."""
TOGETHER_MS = 60_000
"""Versions made within this time may have been compared with the same holder of an alias."""
SCORE_TAG = "score."
"""What tags with scores begin with."""


@dataclass(frozen=True)
class Promotion:
    """Condition for an alias to move: the new version must be better in a metric.

    Attributes:
        metric: name of the score.
        lower_is_better: direction.
    """

    metric: str
    lower_is_better: bool = False

    @property
    def wanted(self) -> str:
        """What is asked for, in words."""
        return f"{self._direction} {self.metric}"

    @property
    def _direction(self) -> str:
        return "lower" if self.lower_is_better else "higher"

    def beats(self, new: float, old: float) -> bool:
        """Whether a score is better than another."""
        return new < old if self.lower_is_better else new > old

    def judge(self, new: float, old: str | None, holder: str) -> tuple[bool, str]:
        """Whether `new` beats the score `old` of the version that has the alias, and a reason."""
        beaten = read_score(old)
        if beaten is None:
            return True, f"{holder} has no score {self.metric} to beat"
        better = self.beats(new, beaten)
        return better, (
            f"{self.metric} {new:.6g} is {'' if better else 'not '}{self._direction} than "
            f"{beaten:.6g} of {holder}"
        )


def read_score(tag: str | None) -> float | None:
    """A score from its tag; None for one that is no finite number, as people may write any tag."""
    try:
        score = float(tag or "nan")
    except ValueError:
        return None
    return score if math.isfinite(score) else None


def check_metric(promotion: Promotion, scores: Mapping[str, float]) -> None:
    """Refuse to judge by a score that is not there.

    Raises:
        UserError: naming it.
    """
    if promotion.metric not in scores:
        raise UserError(
            f"metric {promotion.metric} is not among the scores "
            f"({', '.join(scores) or 'none were given'}); add --score {promotion.metric}=VALUE"
        )


def move_alias(
    client: Any,
    name: str,
    alias: str | None,
    version: str,
    scores: Mapping[str, float],
    promotion: Promotion | None,
) -> tuple[bool, str]:
    """Point the alias to the version if it deserves it; whether it did, and why."""
    if alias is None:
        return False, "no alias was asked for"
    better, note = True, ""
    holder = client.get_registered_model(name).aliases.get(alias)
    if str(holder) == version:
        return True, "given by another that asked at the same time"
    if promotion is not None and holder is not None:
        old = client.get_model_version(name, str(holder)).tags.get(SCORE_TAG + promotion.metric)
        better, note = promotion.judge(scores[promotion.metric], old, f"version {holder}")
    if better:
        client.set_registered_model_alias(name, alias, version)
        if promotion is not None:
            rival = _better_rival(client, name, alias, version, scores, promotion)
            if rival is not None:
                client.set_registered_model_alias(name, alias, rival)
                return False, f"version {rival}, registered meanwhile, is better"
    return better, note


def _better_rival(
    client: Any,
    name: str,
    alias: str,
    version: str,
    scores: Mapping[str, float],
    promotion: Promotion,
) -> str | None:
    """The best version that asked for the alias at the same time, if this one is not.

    A registry cannot move an alias on a condition: of two that both beat its holder the last to
    move it wins, whatever it is worth. So whoever has moved it looks around.
    """
    made_ms = client.get_model_version(name, version).creation_timestamp
    best, rival = scores[promotion.metric], None
    for other in every_result(client.search_model_versions, f"name = '{name}'"):
        asked = other.tags.get(ASKS_TAG + alias) == promotion.wanted
        if str(other.version) == version or not asked:
            continue
        score = read_score(other.tags.get(SCORE_TAG + promotion.metric))
        together = abs(other.creation_timestamp - made_ms) < TOGETHER_MS
        if together and score is not None and promotion.beats(score, best):
            best, rival = score, str(other.version)
    return rival


def every_result(search: Callable[..., Any], condition: str | None = None) -> list[Any]:
    """What a search of MLflow's finds, on all its pages."""
    page = search(condition)
    found = list(page)
    while page.token:
        page = search(condition, page_token=page.token)
        found += page
    return found
