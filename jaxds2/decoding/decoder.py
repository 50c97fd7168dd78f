"""The decoder that somebody asked for: the one place that knows them all."""

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from jaxds2.config import ConfigError
from jaxds2.decoding.blanks import BlanksCollapsed
from jaxds2.decoding.greedy import GreedyDecoder
from jaxds2.decoding.hypothesis import Decoder
from jaxds2.decoding.lm import WordModel, open_model
from jaxds2.decoding.settings import BeamSettings
from jaxds2.text import Vocabulary

BACKENDS = ("pyctcdecode", "flashlight", "ctc-beam-decoder")

HOT_WORD_WEIGHT = 10.0
"""In nats, of a hot word without one; pyctcdecode's own."""


@dataclass(frozen=True)
class DecoderChoice:
    """A decoder by its settings: small, and what a process needs to make its own."""

    name: str = "greedy"
    """greedy or beam; what follows is for beam."""
    backend: str = "pyctcdecode"
    """One of BACKENDS; never chosen by what happens to be installed."""
    lm: Path | None = None
    """ARPA file or KenLM binary."""
    lexicon: Path | None = None
    """flashlight: words to choose from, instead of those of the language model."""
    blank_threshold: float | None = None
    """See blanks.kept_frames; None searches every frame."""
    beam: BeamSettings = field(default_factory=BeamSettings)
    sources: Mapping[str, str] = field(default_factory=dict)
    """Where each setting came from, for the report."""


def make_decoder(choice: DecoderChoice, vocabulary: Vocabulary, lm: WordModel | None = None) -> Decoder:
    """Make the decoder.

    Args:
      choice: which.
      vocabulary: the model's alphabet.
      lm: choice.lm where it is open already.

    Raises:
      ConfigError: settings that do not go together. DecoderError: its package is missing. LMError: as open_model.
    """
    if choice.name == "greedy":
        return GreedyDecoder(vocabulary)
    if choice.lexicon and choice.backend != "flashlight":
        raise ConfigError(f"--backend {choice.backend} has no lexicon; take --backend flashlight")
    threshold = choice.blank_threshold
    if threshold is not None and not 0.5 <= threshold < 1:
        raise ConfigError(f"blank threshold {threshold}: expected a probability, at least 0.5 and below 1")
    for word, _ in choice.beam.hot_words:
        if unknown := vocabulary.unknown(word):
            raise ConfigError(
                f"hot word {word!r}: {' '.join(unknown)} not in the alphabet {vocabulary.characters!r} of the model, "
                f"which can never write it; leave it out"
            )
    if choice.lm and lm is None:
        lm = open_model(choice.lm, vocabulary)
    if choice.backend == "pyctcdecode":
        from jaxds2.decoding.beam import BeamDecoder

        decoder: Decoder = BeamDecoder(vocabulary, choice.beam, lm=lm)
    elif choice.backend == "flashlight":
        from jaxds2.decoding.flashlight import FlashlightDecoder

        decoder = FlashlightDecoder(vocabulary, choice.beam, lm=lm, lexicon=choice.lexicon)
    elif choice.backend == "ctc-beam-decoder":
        from jaxds2.decoding.native_beam import NativeBeamDecoder

        decoder = NativeBeamDecoder(vocabulary, choice.beam, lm=lm)
    else:
        raise ConfigError(f"back end {choice.backend!r}: expected one of {', '.join(BACKENDS)}")
    if threshold is not None:
        decoder = BlanksCollapsed(decoder, threshold)
    decoder.settings.update(backend=choice.backend, sources=dict(choice.sources))
    return decoder


def read_hot_words(text: str, vocabulary: Vocabulary) -> tuple[tuple[str, float], ...]:
    """Hot words of `word:weight,word:weight`, or of a file with one such a line; weight 10 where there is none.

    Raises:
      ConfigError: no word, more than one in a place, one with two weights, a weight that is no finite number, or a file
        that is no text.
    """
    entries = text.split(",")
    if os.path.isfile(text):  # Path.is_file raises where a list is longer than a name may be
        try:
            entries = Path(text).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as e:
            raise ConfigError(f"hot words {text}: cannot be read as text ({e})") from None
    found: dict[str, float] = {}
    for entry in entries:
        if not entry.strip():
            continue
        word, colon, weight = entry.strip().rpartition(":")
        word, weight = (word, weight) if colon else (weight, str(HOT_WORD_WEIGHT))
        try:
            nats = float(weight)
        except ValueError:
            nats = math.nan
        if not math.isfinite(nats):
            raise ConfigError(f"hot word {entry.strip()!r}: expected word:weight, the weight a finite number")
        word = vocabulary.normalize(word)
        if found.setdefault(word, nats) != nats:
            raise ConfigError(f"hot word {word!r} has two weights, {found[word]:g} and {nats:g}; give it one")
    if not found or any(len(word.split()) != 1 for word in found):
        raise ConfigError(f"hot words {text!r}: expected single words, as word:weight,word:weight or a file of them")
    return tuple(found.items())
