"""The alphabet: transcripts to label ids and back."""

import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

BLANK_ID = 0
"""Class of the CTC blank; the characters follow as 1, 2, ..."""

_APOSTROPHES = str.maketrans({"’": "'", "‘": "'", "ʼ": "'", "`": "'", "´": "'"})


class TextError(ValueError):
    """A transcript that the vocabulary cannot spell."""


@dataclass(frozen=True)
class Vocabulary:
    """The characters that the model can write, in the order of its output classes 1, 2, ..."""

    characters: str

    @property
    def size(self) -> int:
        """Number of output classes, the blank included."""
        return len(self.characters) + 1

    @cached_property
    def _ids(self) -> dict[str, int]:
        return {c: i for i, c in enumerate(self.characters, start=BLANK_ID + 1)}

    def normalize(self, text: str) -> str:
        """Bring a transcript to the form that the model is trained on.

        Unicode NFKC, typographic apostrophes made plain, lower case unless the alphabet has capitals, punctuation that
        is not in the alphabet turned into spaces, white space collapsed. Letters and digits outside the alphabet stay:
        they are for `unknown` to report, not for us to drop.
        """
        text = unicodedata.normalize("NFKC", text.translate(_APOSTROPHES))
        if not any(c.isupper() for c in self.characters):
            text = text.lower()
        kept = (" " if c not in self._ids and unicodedata.category(c)[0] == "P" else c for c in text)
        return " ".join("".join(kept).split())

    def unknown(self, text: str) -> str:
        """The characters of `text` outside the alphabet, each once, sorted."""
        return "".join(sorted(set(text) - set(self.characters)))

    def encode(self, text: str) -> list[int]:
        """Label ids of a normalised transcript.

        Raises:
          TextError: a character is outside the alphabet.
        """
        if unknown := self.unknown(text):
            raise TextError(f"{text!r} has {unknown!r}, outside the alphabet {self.characters!r}")
        return [self._ids[c] for c in text]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of label ids, blanks left out (repeats are kept: collapsing them is the decoder's work)."""
        return "".join(self.characters[i - 1] for i in ids if i != BLANK_ID)
