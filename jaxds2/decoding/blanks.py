"""Frames that are blank beyond doubt are left out of the search: a run of them says no more than one of them does."""

from dataclasses import replace
from typing import Any

import numpy as np

from jaxds2.decoding.hypothesis import Decoder, Hypothesis
from jaxds2.text import BLANK_ID


def kept_frames(log_probs_UV: np.ndarray, threshold: float) -> np.ndarray:
    """The frames that a search needs: all but those in a run of blanks after its first.

    Args:
      log_probs_UV: log-probabilities of an utterance's own frames.
      threshold: a frame with a posterior of the blank above this is blank.

    Returns:
      Their indices, ascending. One blank of a run stays, so that two equal labels stay apart.
    """
    blank_U = np.exp(log_probs_UV[:, BLANK_ID].astype(np.float64)) > threshold
    kept_U = np.ones(len(blank_U), bool)
    kept_U[1:] = ~(blank_U[1:] & blank_U[:-1])
    return np.flatnonzero(kept_U)


class BlanksCollapsed:
    """A decoder that another decodes for, without the blank frames; words have their frames among all of them."""

    def __init__(self, decoder: Decoder, threshold: float) -> None:
        """See kept_frames."""
        self._decoder, self._threshold = decoder, threshold
        self.settings: dict[str, Any] = {**decoder.settings, "blank_threshold": threshold}

    def __call__(self, log_probs_UV: np.ndarray) -> list[Hypothesis]:
        """As the decoder inside; what was left out counts as blank in the scores."""
        kept_K = kept_frames(log_probs_UV, self._threshold)
        left_out = float(np.delete(log_probs_UV[:, BLANK_ID], kept_K).sum(dtype=np.float64))
        return [
            replace(
                h,
                words=tuple(replace(w, start=int(kept_K[w.start]), end=int(kept_K[w.end - 1]) + 1) for w in h.words),
                acoustic=h.acoustic + left_out,
                total=h.total + left_out,
            )
            for h in self._decoder(log_probs_UV[kept_K])
        ]
