"""What a decoder makes of an utterance: texts, best first, with their words and scores."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from typing import Any, Protocol

import numpy as np

from jaxds2.text import BLANK_ID, Vocabulary


class DecoderError(ValueError):
    """A decoder that cannot be set up, or input that it cannot decode; its message is one line for the user."""


@dataclass(frozen=True)
class Word:
    """A word and the output frames in which it was found."""

    text: str
    start: int
    """First frame of its first character."""
    end: int
    """Frame behind the last one of its last character."""
    confidence: float
    """Mean posterior, 0 to 1, of its characters over the frames in which the best path of the text writes them; blanks
    between them do not count. What the model thought of the sound: no language model has a part in it."""


@dataclass(frozen=True)
class Hypothesis:
    """One text that an utterance may hold; the scores are natural logarithms."""

    text: str
    """Single spaces between words."""
    words: tuple[Word, ...]
    acoustic: float
    """log P_CTC(text | sound) over the alignments that the decoder kept: one for best path decoding and where it takes
    the maximum, those that survive the pruning where it sums."""
    lm: float
    """log P_LM(<s> text </s>) as KenLM has it, unweighted; 0 without a language model."""
    total: float
    """What the decoder ranks by: acoustic + alpha lm + beta (number of words) + its own bonuses and penalties."""


Decode = Callable[[np.ndarray], list[Hypothesis]]
"""log_probs_UV of one utterance, its own frames without padding, to at least one hypothesis, best first."""


class Decoder(Protocol):
    """A decoder as a score needs it: a Decode that knows its settings."""

    @property
    def settings(self) -> dict[str, Any]:
        """Everything that decides the text, for the report."""
        ...

    def __call__(self, log_probs_UV: np.ndarray, /) -> list[Hypothesis]:
        """As Decode."""
        ...


NOTHING = Hypothesis("", (), 0.0, 0.0, 0.0)
"""What an utterance without frames holds."""


def collapse(path_U: Iterable[int]) -> list[int]:
    """The labels of a path: runs of a class merged first, blanks dropped then, so a blank parts two equal labels."""
    return [int(i) for i, _ in groupby(path_U) if i != BLANK_ID]


def path_words(path_U: Sequence[int], log_probs_UV: np.ndarray, vocabulary: Vocabulary) -> tuple[Word, ...]:
    """The words that a path writes, in order.

    Args:
      path_U: class of each frame.
      log_probs_UV: for the confidences.
      vocabulary: its characters are the classes 1 ... V - 1; words are what white space parts.
    """
    words: list[tuple[str, int, int, list[int]]] = []
    frame, inside = 0, False
    for label, run in groupby(path_U):
        start, frame = frame, frame + sum(1 for _ in run)
        character = vocabulary.decode([label])
        if character.isspace():
            inside = False
        elif character:
            text, first, _, frames = words.pop() if inside else ("", start, frame, [])
            words.append((text + character, first, frame, [*frames, *range(start, frame)]))
            inside = True
    on_path_U = np.exp(log_probs_UV[np.arange(len(path_U)), np.asarray(path_U, np.intp)].astype(np.float64))
    return tuple(Word(text, start, end, float(on_path_U[frames].mean())) for text, start, end, frames in words)


def best_path(log_probs_UV: np.ndarray, labels: Sequence[int]) -> np.ndarray:
    """The likeliest path of all that collapse to these labels (Viterbi over the lattice of Graves et al. 2006).

    Args:
      log_probs_UV: log-probabilities of an utterance's own frames.
      labels: classes, no blanks among them.

    Returns:
      path_U, intp.

    Raises:
      ValueError: fewer frames than the labels and their repeats need.
    """
    states_S = np.zeros(2 * len(labels) + 1, np.intp)  # blanks around and between the labels
    states_S[1::2] = labels
    if len(log_probs_UV) < len(labels) + sum(a == b for a, b in pairwise(labels)):
        raise ValueError(f"{len(log_probs_UV)} frames cannot hold {len(labels)} labels")
    if not len(log_probs_UV):
        return np.zeros(0, np.intp)
    emissions_US = log_probs_UV[:, states_S].astype(np.float64)
    may_skip_S = states_S != BLANK_ID
    may_skip_S[2:] &= states_S[2:] != states_S[:-2]
    score_S = np.full(len(states_S) + 2, -np.inf)  # two states of padding in front
    score_S[2:4] = emissions_US[0, :2]
    steps_US = np.zeros(emissions_US.shape, np.int8)
    arrivals_3S = np.full((3, len(states_S)), -np.inf)  # from the state itself, the one before, the one before that
    for u in range(1, len(emissions_US)):
        arrivals_3S[0], arrivals_3S[1] = score_S[2:], score_S[1:-1]
        np.copyto(arrivals_3S[2], score_S[:-2], where=may_skip_S)
        steps_US[u] = arrivals_3S.argmax(axis=0)
        score_S[2:] = arrivals_3S.max(axis=0) + emissions_US[u]
    state = len(states_S) - 1
    if labels and score_S[-2] > score_S[-1]:
        state -= 1
    path_U = np.zeros(len(emissions_US), np.intp)
    for u in range(len(emissions_US) - 1, -1, -1):
        path_U[u] = states_S[state]
        state -= int(steps_US[u, state])
    return path_U


def check_log_probs(log_probs_UV: np.ndarray, vocabulary: Vocabulary) -> None:
    """Refuse what a beam search would silently make nonsense of.

    Raises:
      DecoderError: another number of classes than the vocabulary's, or values that are not numbers.
    """
    if log_probs_UV.ndim != 2 or log_probs_UV.shape[1] != vocabulary.size:
        raise DecoderError(f"log-probabilities of shape {log_probs_UV.shape}: expected (U, {vocabulary.size})")
    if np.isnan(log_probs_UV).any():
        raise DecoderError("log-probabilities hold NaN: the model's weights or its input are damaged")
