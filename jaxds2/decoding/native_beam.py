"""The search of beam.py in C++: ctc-beam-decoder, which takes pyctcdecode's settings and finds its texts."""

import shlex
import sys
from typing import Any

import numpy as np

from jaxds2.config import ConfigError
from jaxds2.decoding.beam import UNKNOWN_OFFSET, described_beam, described_search, search_pruning
from jaxds2.decoding.hypothesis import NOTHING, DecoderError, Hypothesis, check_log_probs
from jaxds2.decoding.lm import WordModel, silence
from jaxds2.decoding.settings import BeamSettings
from jaxds2.text import BLANK_ID, Vocabulary

INSTALL = f"{shlex.quote(sys.executable)} -m pip install ctc-beam-decoder==0.2.0"

_NEVER = -1e4


class NativeBeamDecoder:
    """Beam search over characters, words ending at spaces."""

    def __init__(
        self,
        vocabulary: Vocabulary,
        settings: BeamSettings,
        *,
        lm: WordModel | None = None,
    ) -> None:
        """As BeamDecoder.

        Raises:
          DecoderError: ctc-beam-decoder is missing. ConfigError: hot words of more than one weight.
        """
        try:
            from ctc_beam_decoder import BeamSearchDecoder  # pyright: ignore[reportMissingImports]
        except ImportError as e:
            raise DecoderError(f"--backend ctc-beam-decoder needs ctc-beam-decoder ({e}): {INSTALL}") from None
        weights = {weight for _, weight in settings.hot_words}
        if len(weights) > 1:
            raise ConfigError(
                f"--backend ctc-beam-decoder has one weight for all hot words, got {len(weights)}: give them the same, "
                f"or take --backend pyctcdecode"
            )
        self.vocabulary = vocabulary
        self._lm, self._nbest = lm, settings.nbest
        self.settings = described_search("ctc-beam-decoder", settings, lm)
        self._pruning = search_pruning(settings)
        labels = ["", *vocabulary.characters]
        if lm:
            with silence():
                self._decoder = BeamSearchDecoder(
                    labels,
                    kenlm_model_path=lm.path,
                    unigrams=lm.words,
                    alpha=settings.alpha,
                    beta=settings.beta,
                    unk_score_offset=UNKNOWN_OFFSET,
                )
        else:
            self._decoder = BeamSearchDecoder(labels)
        self._hot_words: dict[str, Any] = {}
        if settings.hot_words:
            self._hot_words = {"hotwords": [word for word, _ in settings.hot_words], "hotword_weight": weights.pop()}

    def __call__(self, log_probs_UV: np.ndarray) -> list[Hypothesis]:
        """As BeamDecoder."""
        check_log_probs(log_probs_UV, self.vocabulary)
        if len(log_probs_UV) == 0:
            return [NOTHING]
        logits_UV = _without_last_space(np.asarray(log_probs_UV, np.float32), self.vocabulary)
        beams = self._decoder.decode_beams(logits_UV, **self._pruning, **self._hot_words)
        return [
            described_beam(text, frames, acoustic, total, log_probs_UV, self.vocabulary, self._lm)
            for text, _, frames, acoustic, total in beams[: self._nbest]
        ]


def _without_last_space(log_probs_UV: np.ndarray, vocabulary: Vocabulary) -> np.ndarray:
    """What is said of a space behind the last character is said of the blank there.

    The text is the same. But the library, as pyctcdecode does, takes the nothing behind a last space for an unknown
    word (see `beam._language_model`), which cannot be mended from outside.
    """
    if " " not in vocabulary.characters:
        return log_probs_UV
    space = vocabulary.encode(" ")[0]
    spoken = np.flatnonzero(~np.isin(log_probs_UV.argmax(axis=-1), (BLANK_ID, space)))
    tail = slice(spoken[-1] + 1 if len(spoken) else 0, None)
    folded_UV = log_probs_UV.copy()
    folded_UV[tail, BLANK_ID] = np.logaddexp(log_probs_UV[tail, BLANK_ID], log_probs_UV[tail, space])
    folded_UV[tail, space] = _NEVER
    return folded_UV
