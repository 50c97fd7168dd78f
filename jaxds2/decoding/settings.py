"""Settings of a beam search, by the names and in the units that all back ends share."""

import math
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from jaxds2.config import ConfigError


@dataclass(frozen=True)
class BeamSettings:
    """What decides the text, but for the language model itself.

    Raises:
      ConfigError: a value out of range.
    """

    alpha: float = 0.5
    """Weight of the language model's natural logarithm."""
    beta: float = 1.0
    """Bonus per word, in nats; like alpha without effect where there is no language model."""
    beam_width: int = 100
    """Prefixes kept after each frame."""
    beam_prune_logp: float = -10.0
    """Prefixes further than this below the best, in nats, are dropped."""
    token_min_logp: float = -5.0
    """Classes of a frame below this log-probability are not tried, but for the best one."""
    hot_words: tuple[tuple[str, float], ...] = ()
    """Words with a bonus in nats for each time that they come."""
    nbest: int = 1
    """Hypotheses to give."""

    def __post_init__(self) -> None:
        if self.beam_width < 1:
            raise ConfigError(f"beam width {self.beam_width}: must be at least 1")
        if not all(-math.inf < nats < 0 for nats in (self.beam_prune_logp, self.token_min_logp)):  # nor NaN
            raise ConfigError(
                f"pruning at {self.beam_prune_logp} and {self.token_min_logp} nats: both must be below 0 and finite; "
                f"-1e4 drops nothing"
            )
        if not (math.isfinite(self.alpha) and math.isfinite(self.beta) and self.alpha >= 0):
            raise ConfigError(f"alpha {self.alpha}, beta {self.beta}: alpha must be 0 or more, both finite")
        if self.nbest < 1:
            raise ConfigError(f"{self.nbest} hypotheses: must be at least 1")

    def described(self, package: str) -> dict[str, Any]:
        """What every back end says of itself in a report: its package, with the version, and the pruning."""
        return {"name": "beam", "library": f"{package} {version(package)}"} | self.pruning

    @property
    def weights(self) -> dict[str, float]:
        """Of the language model."""
        return {"alpha": float(self.alpha), "beta": float(self.beta)}

    @property
    def pruning(self) -> dict[str, Any]:
        """What is not searched."""
        return {
            "beam_width": self.beam_width,
            "beam_prune_logp": float(self.beam_prune_logp),
            "token_min_logp": float(self.token_min_logp),
        }
