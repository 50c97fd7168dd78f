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


class _Spaces(dict[int, str]):
    """For str.translate, which is quick over texts of millions of utterances: a character to itself, or to a space."""

    def __init__(self, characters: str):
        super().__init__((ord(c), c) for c in characters)

    def __missing__(self, code: int) -> str:
        character = chr(code)
        self[code] = " " if unicodedata.category(character)[0] == "P" else character
        return self[code]


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

    @cached_property
    def _alphabet(self) -> frozenset[str]:
        return frozenset(self.characters)

    @cached_property
    def _spaces(self) -> _Spaces:
        return _Spaces(self.characters)

    @cached_property
    def _has_capitals(self) -> bool:
        return any(c.isupper() for c in self.characters)

    def normalize(self, text: str) -> str:
        """Bring a transcript to the form that the model is trained on.

        Unicode NFKC, typographic apostrophes made plain, lower case unless the alphabet has capitals, punctuation that
        is not in the alphabet turned into spaces, white space collapsed. Letters and digits outside the alphabet stay:
        they are for `unknown` to report, not for us to drop.
        """
        text = unicodedata.normalize("NFKC", text.translate(_APOSTROPHES))
        if not self._has_capitals:
            text = text.lower()
        return " ".join(text.translate(self._spaces).split())

    def unknown(self, text: str) -> str:
        """The characters of `text` outside the alphabet, each once, sorted."""
        return "" if self._alphabet.issuperset(text) else "".join(sorted(set(text) - self._alphabet))

    def encode(self, text: str) -> list[int]:
        """Label ids of a normalised transcript, one a character.

        Raises:
          TextError: a character is outside the alphabet.
        """
        self.require(text)
        return [self._ids[c] for c in text]

    def require(self, text: str) -> None:
        """Raises TextError: a character is outside the alphabet."""
        if unknown := self.unknown(text):
            raise TextError(f"{text!r} has {unknown!r}, outside the alphabet {self.characters!r}")

    def decode(self, ids: Iterable[int]) -> str:
        """The text of label ids, blanks left out (repeats are kept: collapsing them is the decoder's work)."""
        return "".join(self.characters[i - 1] for i in ids if i != BLANK_ID)
