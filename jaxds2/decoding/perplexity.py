"""How well a language model foresees a text."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

from jaxds2.decoding.lm import LMError


@dataclass(frozen=True)
class SentencePerplexity:
    """Of one sentence, its end included."""

    text: str
    log10: float
    """log10 P(<s> text </s>), unknown words by the probability of `<unk>`."""
    known_log10: float
    """Of it, what known words and the end make up."""
    words: int
    unknown: int
    """Words outside the model's vocabulary."""

    @property
    def perplexity(self) -> float:
        """Per token: its words and its end."""
        return 10 ** (-self.log10 / (self.words + 1))


@dataclass(frozen=True)
class CorpusPerplexity:
    """Of all sentences; each token counts the same."""

    sentences: list[SentencePerplexity]

    @property
    def words(self) -> int:
        """In all sentences."""
        return sum(s.words for s in self.sentences)

    @property
    def unknown(self) -> int:
        """Words outside the model's vocabulary."""
        return sum(s.unknown for s in self.sentences)

    @property
    def perplexity(self) -> float:
        """Per token, unknown words by the probability of `<unk>`."""
        return 10 ** (-math.fsum(s.log10 for s in self.sentences) / (self.words + len(self.sentences)))

    @property
    def known_perplexity(self) -> float:
        """Per token, without the unknown words."""
        tokens = self.words - self.unknown + len(self.sentences)
        return 10 ** (-math.fsum(s.known_log10 for s in self.sentences) / tokens)

    def render(self) -> str:
        """One line."""
        share = 100 * self.unknown / max(self.words, 1)
        return (
            f"perplexity {self.perplexity:.2f}, without unknown words {self.known_perplexity:.2f}; "
            f"{len(self.sentences):,} sentences, {self.words:,} words, {self.unknown:,} unknown ({share:.2f} %)"
        )


def perplexity(model, sentences: Iterable[str]) -> CorpusPerplexity:
    """Score sentences.

    Args:
      model: of `lm.load_model`.
      sentences: normalised as the model's text was; blank ones are left out.

    Raises:
      LMError: no sentence.
    """
    scored = []
    for text in sentences:
        if not text.strip():
            continue
        tokens = list(model.full_scores(text, bos=True, eos=True))
        scored.append(
            SentencePerplexity(
                text,
                log10=math.fsum(log10 for log10, _, _ in tokens),
                known_log10=math.fsum(log10 for log10, _, unknown in tokens if not unknown),
                words=len(tokens) - 1,
                unknown=sum(unknown for _, _, unknown in tokens),
            )
        )
    if not scored:
        raise LMError("the text holds no sentence to score; expected one a line (or a .jsonl manifest)")
    return CorpusPerplexity(scored)
