"""Best path decoding: the most likely class of each frame, collapsed (Graves et al. 2006, section 3.2)."""

from collections.abc import Iterable
from itertools import groupby

import numpy as np

from jaxds2.text import BLANK_ID, Vocabulary


def collapse(ids_U: Iterable[int]) -> list[int]:
    """The labels of a path: runs of a class merged first, blanks dropped then, so a blank parts two equal labels."""
    return [int(i) for i, _ in groupby(ids_U) if i != BLANK_ID]


def greedy_decode(log_probs_UV: np.ndarray, vocabulary: Vocabulary) -> str:
    """The text of one utterance's best path, on the host, with single spaces between words.

    Args:
      log_probs_UV: log-probabilities or logits of its own frames, without padding.
      vocabulary: its characters are the classes 1 ... V - 1.
    """
    return " ".join(vocabulary.decode(collapse(log_probs_UV.argmax(axis=-1).tolist())).split())


def greedy_words(log_probs_UV: np.ndarray, vocabulary: Vocabulary) -> list[tuple[str, int, int]]:
    """The words of greedy_decode with the output frames in which its path writes them.

    Args:
      log_probs_UV: as for greedy_decode.
      vocabulary: as for greedy_decode.

    Returns:
      (word, first frame of its first character, frame behind the last one of its last character), in order.
    """
    words: list[tuple[str, int, int]] = []
    frame, inside = 0, False
    for label, run in groupby(log_probs_UV.argmax(axis=-1).tolist()):
        start, frame = frame, frame + sum(1 for _ in run)
        character = vocabulary.decode([label])
        if character.isspace():
            inside = False
        elif character and inside:
            word, first, _ = words[-1]
            words[-1] = (word + character, first, frame)
        elif character:
            words.append((character, start, frame))
            inside = True
    return words
