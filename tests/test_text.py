"""The alphabet: texts become labels and come back."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxds2.config import DataConfig
from jaxds2.text import BLANK_ID, TextError, Vocabulary

ENGLISH = Vocabulary(DataConfig().characters)
OTHERS = (Vocabulary("abcABC "), Vocabulary("abcéß.,0123 "), Vocabulary("あい。"))


@given(st.text(ENGLISH.characters))
def test_decode_inverts_encode(text: str):
    assert ENGLISH.decode(ENGLISH.encode(text)) == text


@given(st.text())
def test_normalizing_twice_is_normalizing_once(text: str):
    for vocabulary in (ENGLISH, *OTHERS):
        once = vocabulary.normalize(text)
        assert vocabulary.normalize(once) == once


@given(st.text())
def test_a_normalized_text_either_encodes_or_names_what_is_outside(text: str):
    text = ENGLISH.normalize(text)
    unknown = ENGLISH.unknown(text)
    assert set(unknown) == {c for c in text if c not in ENGLISH.characters}
    if unknown:
        with pytest.raises(TextError):
            ENGLISH.encode(text)
    else:
        assert ENGLISH.decode(ENGLISH.encode(text)) == text


def test_labels_are_the_places_in_the_alphabet_after_the_blank():
    vocabulary = Vocabulary("ba ")
    assert BLANK_ID == 0
    assert vocabulary.size == 4
    assert vocabulary.encode("ab ") == [2, 1, 3]


def test_decode_leaves_blanks_out_and_keeps_repeats():
    assert Vocabulary("ab").decode([0, 1, 0, 1, 1, 2, 0]) == "aaab"


@pytest.mark.parametrize(
    ("raw", "normal"),
    [
        ("  HELLO,\tWorld!\n", "hello world"),
        ("don\u2019t \u2018tis o`clock \u02bcn\u02bc it\u00b4s", "don't 'tis o'clock 'n' it's"),
        ("twenty-one", "twenty one"),
        ("\uff46\uff55\uff4c\uff4c \ufb01t", "full fit"),  # full width, ligature
        ("caf\u0065\u0301", "caf\u00e9"),  # composed, and left for `unknown`
        ("2 eggs", "2 eggs"),
        ("", ""),
    ],
)
def test_normalize(raw: str, normal: str):
    assert ENGLISH.normalize(raw) == normal


def test_what_the_alphabet_holds_is_kept():
    assert Vocabulary("abcABC ").normalize("aB c!") == "aB c"
    assert Vocabulary("abc. ").normalize("a.b,c") == "a.b c"
    assert Vocabulary("abc").normalize("a b") == "a b"  # the space is for `unknown` to report


def test_unknown_characters_are_named_once_and_sorted():
    assert ENGLISH.unknown("z\u00e9 2 \u00e9 1") == "12\u00e9"
    with pytest.raises(TextError, match="'a2b1' has '12', outside the alphabet"):
        ENGLISH.encode("a2b1")
