"""Prefix beam search with an n-gram language model: pyctcdecode over KenLM.

A text scores log P_CTC + alpha log P_LM + beta (number of words), summed over the alignments that survive the pruning
(Hannun et al. 2014, "First-Pass Large Vocabulary Continuous Speech Recognition").
"""

import hashlib
import logging
import math
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
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
from jaxds2.decoding.lm import LMError, load_model, load_unigrams
from jaxds2.text import Vocabulary

if TYPE_CHECKING:
    import kenlm
    from pyctcdecode.language_model import LanguageModel

INSTALL = "pip install --no-deps pyctcdecode==0.5.0 && pip install pygtrie"

UNKNOWN_OFFSET = -10.0
"""Added to log10 P_LM of a word that the language model does not know."""


class BeamDecoder:
    """Beam search over characters, words ending at spaces."""

    def __init__(
        self,
        vocabulary: Vocabulary,
        *,
        lm: Path | None = None,
        alpha: float = 0.5,
        beta: float = 1.0,
        beam_width: int = 100,
        beam_prune_logp: float = -10.0,
        token_min_logp: float = -5.0,
        nbest: int = 1,
    ) -> None:
        """Load the language model and check that the alphabet spells its words.

        Args:
          vocabulary: the model's alphabet.
          lm: ARPA file or KenLM binary; None searches without one.
          alpha: weight of the language model.
          beta: bonus per word, in nats; like alpha without effect where there is no language model.
          beam_width: prefixes kept after each frame.
          beam_prune_logp: prefixes further than this below the best, in nats, are dropped.
          token_min_logp: classes of a frame below this log-probability are not tried, but for the best one.
          nbest: hypotheses to give.

        Raises:
          DecoderError: pyctcdecode is missing, a setting out of range, or a language model of another alphabet.
          LMError: the language model cannot be read.
        """
        if beam_width < 1:
            raise DecoderError(f"beam width {beam_width}: must be at least 1")
        if nbest < 1:
            raise DecoderError(f"{nbest} hypotheses: must be at least 1")
        if max(beam_prune_logp, token_min_logp) >= 0:
            raise DecoderError(f"pruning at {beam_prune_logp} and {token_min_logp} nats: both must be below 0")
        if not (np.isfinite(alpha) and np.isfinite(beta) and alpha >= 0):
            raise DecoderError(f"alpha {alpha}, beta {beta}: alpha must be 0 or more, both finite")
        # Its remarks, such as on small word lists, are for its own command line; what matters here is an error.
        logging.getLogger("pyctcdecode").setLevel(logging.ERROR)
        try:
            from pyctcdecode.alphabet import Alphabet
            from pyctcdecode.decoder import BeamSearchDecoderCTC
        except ImportError as e:
            raise DecoderError(f"beam search needs pyctcdecode ({e}): {INSTALL}") from None

        self.vocabulary = vocabulary
        self._pruning = {
            "beam_width": beam_width,
            "beam_prune_logp": float(beam_prune_logp),
            "token_min_logp": float(token_min_logp),
            # Of prefixes with the same last words the best one is kept, since no n-gram can tell them apart any more;
            # a list of hypotheses would then hardly differ but at the end.
            "prune_history": nbest == 1,
        }
        self.settings: dict[str, Any] = {"name": "beam", "library": f"pyctcdecode {version('pyctcdecode')}"}
        self.settings |= self._pruning
        self._nbest = nbest
        self._model: kenlm.Model | None = None
        scorer = None
        if lm is not None:
            self._model, words, described = _language_model(lm, vocabulary)
            scorer = _word_model(self._model, words, float(alpha), float(beta))
            self.settings |= described | {
                "alpha": float(alpha),
                "beta": float(beta),
                "unknown_offset": UNKNOWN_OFFSET,
            }
        self._decoder = BeamSearchDecoderCTC(Alphabet(["", *vocabulary.characters], is_bpe=False), scorer)

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
        logits: Any = np.asarray(log_probs_UV, np.float32)
        beams = self._decoder.decode_beams(logits, **self._pruning)[: self._nbest]
        return [self._hypothesis(log_probs_UV, *beam) for beam in beams]

    def _hypothesis(
        self, log_probs_UV: np.ndarray, text: str, _: Any, frames: list, acoustic: float, total: float
    ) -> Hypothesis:
        path_U = best_path(log_probs_UV, self.vocabulary.encode(text))
        words = path_words(path_U.tolist(), log_probs_UV, self.vocabulary)
        if [word for word, _ in frames] == text.split():
            spans = [(int(start), int(end)) for _, (start, end) in frames]
            words = tuple(replace(w, start=start, end=end) for w, (start, end) in zip(words, spans, strict=True))
        lm = self._model.score(text) * math.log(10) if self._model else 0.0
        return Hypothesis(text, words, float(acoustic), lm, float(total))


def _language_model(path: Path, vocabulary: Vocabulary) -> tuple["kenlm.Model", list[str], dict[str, Any]]:
    """The language model, its words that the vocabulary can spell, and what a report says of it."""
    words = load_unigrams(path)
    if " " not in vocabulary.characters:
        raise DecoderError(f"{path}: a model of words needs a space in the alphabet {vocabulary.characters!r}")
    spelled = [word for word in words if not vocabulary.unknown(word)]
    if 2 * len(spelled) < len(words):
        foreign = next(word for word in words if vocabulary.unknown(word))
        hint = "; write its words in lower case" if foreign.lower() != foreign else ""
        raise DecoderError(
            f"{path}: {len(words) - len(spelled)} of its {len(words)} words, such as {foreign!r}, cannot be spelled in "
            f"the alphabet {vocabulary.characters!r}: this is the language model of another vocabulary{hint}"
        )
    model = load_model(path)
    known = [word for word in spelled if word in model]
    if 2 * len(known) < len(spelled):
        raise LMError(
            f"{path}: knows {len(known)} of the {len(spelled)} words listed for it: the list is another model's"
        )
    described = {
        "lm": str(path),
        "lm_sha256": _sha256(path),
        "lm_order": model.order,
        "lm_words": len(known),
    }
    return model, known, described


def _word_model(model: "kenlm.Model", words: list[str], alpha: float, beta: float) -> "LanguageModel":
    """pyctcdecode's language model, but that it takes the nothing behind a last space for no word.

    pyctcdecode 0.5.0 scores it as one more, unknown word. Since it merges `a b` with `a b `, and keeps the language
    score of whichever stood higher, right texts are lost wherever beta outweighs the price of a last word.
    """
    import kenlm
    from pyctcdecode.language_model import LanguageModel

    class WordModel(LanguageModel):
        def score(self, prev_state, word, is_last_word=False):
            if word:
                return super().score(prev_state, word, is_last_word)
            end = model.BaseScore(prev_state, "</s>", kenlm.State()) if is_last_word else 0.0
            return self.alpha * end * math.log(10), prev_state

    return WordModel(model, words, alpha=alpha, beta=beta, unk_score_offset=UNKNOWN_OFFSET)


def _sha256(path: Path) -> str:
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()
