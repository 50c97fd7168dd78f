"""Best path decoding: the most likely class of each frame, collapsed (Graves et al. 2006, section 3.2)."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxds2.decoding.hypothesis import Hypothesis, collapse, path_words
from jaxds2.text import Vocabulary


@dataclass(frozen=True)
class GreedyDecoder:
    """One hypothesis, on the host: the best path's; its score is that path's alone."""

    vocabulary: Vocabulary
    """Its characters are the classes 1 ... V - 1."""

    @property
    def settings(self) -> dict[str, Any]:
        """For the report."""
        return {"name": "greedy"}

    def __call__(self, log_probs_UV: np.ndarray) -> list[Hypothesis]:
        """Decode one utterance.

        Args:
          log_probs_UV: log-probabilities of its own frames, without padding.
        """
        path_U = log_probs_UV.argmax(axis=-1).tolist()
        text = " ".join(self.vocabulary.decode(collapse(path_U)).split())
        score = float(log_probs_UV.max(axis=-1).sum(dtype=np.float64))
        return [Hypothesis(text, path_words(path_U, log_probs_UV, self.vocabulary), score, 0.0, score)]
