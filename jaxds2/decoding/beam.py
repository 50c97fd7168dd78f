"""Prefix beam search with an n-gram language model: pyctcdecode over KenLM.

A text scores log P_CTC + alpha log P_LM + beta (number of words), summed over the alignments that survive the pruning
(Hannun et al. 2014, "First-Pass Large Vocabulary Continuous Speech Recognition").
"""

import logging
import math
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxds2.decoding.hypothesis import (
    NOTHING,
    DecoderError,
    Hypothesis,
    best_path,
    check_log_probs,
    path_words,
)
from jaxds2.decoding.lm import WordModel
from jaxds2.decoding.settings import BeamSettings
from jaxds2.text import Vocabulary

if TYPE_CHECKING:
    from pyctcdecode.language_model import HotwordScorer, LanguageModel

INSTALL = f"{shlex.quote(sys.executable)} -m pip install --no-deps pyctcdecode==0.5.0 pygtrie"

UNKNOWN_OFFSET = -10.0
"""Added to log10 P_LM of a word that the language model does not know."""

_MIN_PROBABILITY = 1e-15  # where pyctcdecode clips


class BeamDecoder:
    """Beam search over characters, words ending at spaces."""

    def __init__(
        self,
        vocabulary: Vocabulary,
        settings: BeamSettings,
        *,
        lm: WordModel | None = None,
    ) -> None:
        """Set up the search.

        Args:
          vocabulary: the model's alphabet.
          settings: weights and pruning; part of a hot word's bonus is paid as it is spelled.
          lm: of `open_model` with the same vocabulary; None searches without one.

        Raises:
          DecoderError: pyctcdecode is missing.
        """
        # Its remarks, such as on small word lists, are for its own command line; what matters here is an error.
        logging.getLogger("pyctcdecode").setLevel(logging.ERROR)
        try:
            from pyctcdecode.alphabet import Alphabet
            from pyctcdecode.decoder import BeamSearchDecoderCTC
        except ImportError as e:
            raise DecoderError(f"--backend pyctcdecode needs pyctcdecode ({e}): {INSTALL}") from None

        self.vocabulary = vocabulary
        self._lm, self._nbest = lm, settings.nbest
        self.settings = described_search("pyctcdecode", settings, lm)
        pruning = search_pruning(settings)
        scorer = _language_model(lm, **settings.weights) if lm else None
        decoder = BeamSearchDecoderCTC(Alphabet(["", *vocabulary.characters], is_bpe=False), scorer)
        if settings.hot_words:
            weights = dict(settings.hot_words)
            self._search = partial(_decode_log_probs, decoder, hotword_scorer=_hot_word_scorer(weights), **pruning)
        else:
            self._search = partial(decoder.decode_beams, **pruning)

    def __call__(self, log_probs_UV: np.ndarray) -> list[Hypothesis]:
        """The best texts of one utterance; as many as `nbest`, or as the pruning left.

        A word has the frames that pyctcdecode gives it, or the best path's where those are not as many as the words.

        Args:
          log_probs_UV: log-probabilities of its own frames, without padding.

        Raises:
          DecoderError: another number of classes than the vocabulary's, or values that are not numbers.
        """
        check_log_probs(log_probs_UV, self.vocabulary)
        if len(log_probs_UV) == 0:
            return [NOTHING]
        beams: Any = self._search(np.asarray(log_probs_UV, np.float32))
        return [
            described_beam(text, frames, acoustic, total, log_probs_UV, self.vocabulary, self._lm)
            for text, _, frames, acoustic, total in beams[: self._nbest]
        ]


def search_pruning(settings: BeamSettings) -> dict[str, Any]:
    """The pruning of pyctcdecode's search, by the names of its arguments."""
    # Of prefixes with the same last words the best one is kept, since no n-gram can tell them apart any more; a
    # list of hypotheses would then hardly differ but at the end.
    return settings.pruning | {"prune_history": settings.nbest == 1}


def described_search(package: str, settings: BeamSettings, lm: WordModel | None) -> dict[str, Any]:
    """What decides the text of pyctcdecode's search, by whichever package, for a report."""
    described = settings.described(package) | search_pruning(settings)
    if lm:
        described |= lm.described | settings.weights | {"unknown_offset": UNKNOWN_OFFSET}
    if settings.hot_words:
        described["hot_words"] = dict(settings.hot_words)
    return described


def described_beam(
    text: str,
    frames: Sequence[tuple[str, tuple[int, int]]],
    acoustic: float,
    total: float,
    log_probs_UV: np.ndarray,
    vocabulary: Vocabulary,
    lm: WordModel | None,
) -> Hypothesis:
    """A beam of pyctcdecode's form as a Hypothesis."""
    path_U = best_path(log_probs_UV, vocabulary.encode(text))
    words = path_words(path_U.tolist(), log_probs_UV, vocabulary)
    if [word for word, _ in frames] == text.split():
        spans = [(int(start), int(end)) for _, (start, end) in frames]
        words = tuple(replace(w, start=start, end=end) for w, (start, end) in zip(words, spans, strict=True))
    return Hypothesis(text, words, float(acoustic), lm.log_prob(text) if lm else 0.0, float(total))


def _language_model(lm: WordModel, alpha: float, beta: float) -> "LanguageModel":
    """pyctcdecode's language model, but that it takes the nothing behind a last space for no word.

    pyctcdecode 0.5.0 scores it as one more, unknown word. Since it merges `a b` with `a b `, and keeps the language
    score of whichever stood higher, right texts are lost wherever beta outweighs the price of a last word.
    """
    import kenlm
    from pyctcdecode.language_model import LanguageModel

    class NoEmptyWord(LanguageModel):
        def score(self, prev_state, word, is_last_word=False):
            if word:
                return super().score(prev_state, word, is_last_word)
            end = lm.model.BaseScore(prev_state, "</s>", kenlm.State()) if is_last_word else 0.0
            return self.alpha * end * math.log(10), prev_state

    return NoEmptyWord(lm.model, lm.words, alpha=alpha, beta=beta, unk_score_offset=UNKNOWN_OFFSET)


def _decode_log_probs(decoder: Any, log_probs_UV: np.ndarray, **settings: Any) -> list:
    """pyctcdecode's decode_beams with a scorer of hot words of our own, since its own has one weight for all."""
    return decoder._decode_logits(np.clip(log_probs_UV, math.log(_MIN_PROBABILITY), 0), **settings)


def _hot_word_scorer(weights: Mapping[str, float]) -> "HotwordScorer":
    """pyctcdecode's scorer with a weight for each word."""
    import re

    from pyctcdecode.language_model import HotwordScorer
    from pygtrie import CharTrie

    class Weighted(HotwordScorer):
        def score(self, text):
            return sum(weights.get(word, 0.0) for word in text.split())

        def score_partial_token(self, token):
            if token not in self:
                return 0.0
            return max(weights[word] * len(token) / len(word) for word in self._char_trie.iterkeys(token))

    return Weighted(re.compile(r"(?!)"), CharTrie.fromkeys(weights))
