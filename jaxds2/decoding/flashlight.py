"""Beam search over a lexicon with an n-gram language model: flashlight-text over its own KenLM.

Every word must be one of the lexicon, a trie whose nodes look ahead to their likeliest word (smearing). A text
scores the maximum over its alignments, not their sum: log P_path + alpha log P_LM + beta (number of words).
"""

import math
import shlex
import sys
from pathlib import Path
from typing import Any

import numpy as np

from jaxds2.config import ConfigError
from jaxds2.decoding.hypothesis import (
    NOTHING,
    DecoderError,
    Hypothesis,
    check_log_probs,
    path_words,
)
from jaxds2.decoding.lm import WordModel, silence
from jaxds2.decoding.settings import BeamSettings
from jaxds2.text import BLANK_ID, Vocabulary

INSTALL = f"{shlex.quote(sys.executable)} -m pip install flashlight-text==0.0.7"

_NEVER = -1e4  # of a class that is not tried; not -inf, whose differences are no numbers


class FlashlightDecoder:
    """Words of a lexicon; or any string of characters where there is neither a lexicon nor a language model."""

    def __init__(
        self,
        vocabulary: Vocabulary,
        settings: BeamSettings,
        *,
        lm: WordModel | None = None,
        lexicon: Path | None = None,
    ) -> None:
        """Build the trie and set up the search.

        Args:
          vocabulary: the model's alphabet.
          settings: weights and pruning.
          lm: of `open_model` with the same vocabulary.
          lexicon: file of the words to choose from, one a line; None: those of the language model.

        Raises:
          ConfigError: hot words are asked for. DecoderError: flashlight-text is missing, or a lexicon that cannot be
            used.
        """
        if settings.hot_words:
            raise ConfigError("--backend flashlight has no hot words; take --backend pyctcdecode")
        try:
            from flashlight.lib.text import decoder as fl  # pyright: ignore[reportMissingImports]
            from flashlight.lib.text.decoder.kenlm import KenLM  # pyright: ignore[reportMissingImports]
            from flashlight.lib.text.dictionary import Dictionary  # pyright: ignore[reportMissingImports]
        except ImportError as e:
            raise DecoderError(
                f"--backend flashlight needs flashlight-text ({e}), which Python 3.11 and 3.12 have: {INSTALL}"
            ) from None

        self.vocabulary = vocabulary
        self._lm, self._search = lm, settings
        self.settings = settings.described("flashlight-text")
        words = read_lexicon(lexicon, vocabulary) if lexicon else lm.words if lm else []
        self._constrained = bool(words)
        if lm:
            self.settings |= lm.described
        if words:
            self.settings |= settings.weights | {
                "lexicon": str(lexicon or (lm and lm.path)),
                "lexicon_words": len(words),
            }
        space = vocabulary.encode(" ")[0] if " " in vocabulary.characters else -1
        common = {
            "beam_size": settings.beam_width,
            "beam_size_token": vocabulary.size,
            "beam_threshold": -settings.beam_prune_logp,
            "lm_weight": settings.alpha * math.log(10),  # KenLM's scores are decimal logarithms
            "sil_score": 0.0,
            "log_add": False,
            "criterion_type": fl.CriterionType.CTC,
        }
        if not words:
            self._scorer: Any = fl.ZeroLM()
            options = fl.LexiconFreeDecoderOptions(**common)
            self._decoder: Any = fl.LexiconFreeDecoder(options, self._scorer, space, BLANK_ID, [])
            return
        if space < 0:
            raise DecoderError(f"a lexicon needs a space in the alphabet {vocabulary.characters!r}, to end its words")
        dictionary = Dictionary()
        for word in [*words, "<unk>"]:
            dictionary.add_entry(word)
        with silence():
            self._scorer = KenLM(str(lm.path), dictionary) if lm else fl.ZeroLM()
        trie = fl.Trie(vocabulary.size, space)
        start = self._scorer.start(False)
        for index, word in enumerate(words):
            trie.insert([*vocabulary.encode(word), space], index, self._scorer.score(start, index)[1])
        trie.smear(fl.SmearingMode.MAX)
        options = fl.LexiconDecoderOptions(**common, word_score=settings.beta, unk_score=-math.inf)
        unknown = dictionary.get_index("<unk>")
        self._decoder = fl.LexiconDecoder(options, trie, self._scorer, space, BLANK_ID, unknown, [], False)

    def __call__(self, log_probs_UV: np.ndarray) -> list[Hypothesis]:
        """The best texts of one utterance; as many as `nbest`, or as the pruning left.

        Where no text of whole words is left, the best one's last, broken word is dropped and its scores lie below -1e4.

        Args:
          log_probs_UV: log-probabilities of its own frames, without padding.

        Raises:
          DecoderError: another number of classes than the vocabulary's, or values that are not numbers.
        """
        check_log_probs(log_probs_UV, self.vocabulary)
        if len(log_probs_UV) == 0:
            return [NOTHING]
        tried_UV = log_probs_UV >= self._search.token_min_logp
        tried_UV |= log_probs_UV == log_probs_UV.max(axis=-1, keepdims=True)
        emissions_UV = np.where(tried_UV, log_probs_UV, _NEVER).astype(np.float32)
        if " " in self.vocabulary.characters:  # which ends the last word too
            end_V = np.full((1, self.vocabulary.size), _NEVER, np.float32)
            end_V[0, self.vocabulary.encode(" ")] = 0.0
            emissions_UV = np.concatenate([emissions_UV, end_V])
        results = self._decoder.decode(emissions_UV.ctypes.data, *emissions_UV.shape)
        found: dict[str, Hypothesis] = {}
        for result in results:
            # Its tokens begin with a state before the first frame, and end with one or two behind the last.
            path_U = result.tokens[1 : len(log_probs_UV) + 1]
            words = path_words(path_U, log_probs_UV, self.vocabulary)
            if self._constrained:  # of a word that the utterance breaks off nothing is said
                words = words[: sum(index >= 0 for index in result.words)]
            text = " ".join(word.text for word in words)
            if text in found:  # by another state of the language model, further down
                continue
            lm = self._lm.log_prob(text) if self._lm else 0.0
            found[text] = Hypothesis(text, words, result.emittingModelScore, lm, result.score)
            if len(found) == self._search.nbest:
                break
        return list(found.values())


def read_lexicon(path: Path, vocabulary: Vocabulary) -> list[str]:
    """The words of a file, one a line, in its order; blank lines are left out, as is what stands behind a tab.

    Raises:
      DecoderError: not to be read, no words, or one that the alphabet cannot spell.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as e:
        raise DecoderError(f"{path}: cannot be read as a list of words ({e})") from None
    words = list(dict.fromkeys(word for line in lines if (word := line.partition("\t")[0].strip())))
    if not words:
        raise DecoderError(f"{path}: holds no words; expected one a line")
    if foreign := [word for word in words if vocabulary.unknown(word) or " " in word]:
        raise DecoderError(
            f"{path}: {len(foreign)} of its {len(words)} words, such as {foreign[0]!r}, cannot be spelled in the "
            f"alphabet {vocabulary.characters!r}"
        )
    return words
