"""A path to times, and times to files and back: what is read from a file is what was aligned."""

import itertools
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxds2.decoding.alignment import Span, TextAlignment, format_textgrid
from jaxds2.text import Vocabulary

VOCABULARY = Vocabulary('ab" ')
FRAME = 0.03


@st.composite
def paths(draw):
    """A text and the label position of each frame of some path that spells it, at least one frame a character."""
    words = draw(st.lists(st.text('ab"', min_size=1, max_size=3), min_size=1, max_size=3))
    text = " ".join(words)
    positions = [-1] * draw(st.integers(0, 2))
    for n, character in enumerate(text):
        parted = n > 0 and character == text[n - 1]
        positions += [-1] * draw(st.integers(int(parted), 2))
        positions += [n] * draw(st.integers(1, 3))
    return text, np.array(positions + [-1] * draw(st.integers(0, 2)), np.int32)


def align(text, position_U, seed=0):
    logits_UV = np.random.default_rng(seed).standard_normal((len(position_U), VOCABULARY.size))
    log_probs_UV = logits_UV - np.log(np.exp(logits_UV).sum(-1, keepdims=True))
    return log_probs_UV, TextAlignment.of(log_probs_UV.astype(np.float32), position_U, text, VOCABULARY)


def read_textgrid(content):
    """(tier, start, end, text) of each interval, by a reader that knows only Praat's manual."""
    assert content.startswith('File type = "ooTextFile"\nObject class = "TextGrid"\n')
    found, tier, bounds = [], "", {}
    for line in content.splitlines():
        name, _, value = (part.strip() for part in line.partition("="))
        if name == "name":
            tier = value.strip('"')
        elif name in ("xmin", "xmax"):
            bounds[name] = value
        elif name == "text":
            assert re.fullmatch(r'"(?:[^"]|"")*"', value)
            found.append((tier, bounds["xmin"], bounds["xmax"], value[1:-1].replace('""', '"')))
    sizes = [int(n) for n in re.findall(r"intervals: size = (\d+)", content)]
    assert sizes == [len(list(rows)) for _, rows in itertools.groupby(found, key=lambda row: row[0])]
    return found


@given(paths(), st.floats(0, 0.029))
def test_words_are_in_order_inside_the_file_and_last_a_frame_each(path, missing):
    text, position_U = path
    duration = len(position_U) * FRAME - missing
    words = align(text, position_U)[1].words(FRAME, duration)
    assert [w.span.text for w in words] == text.split()
    for word in words:
        assert "".join(c.text for c in word.characters) == word.span.text
        assert (word.characters[0].start, word.characters[-1].end) == (word.span.start, word.span.end)
    for spans in ([w.span for w in words], [c for w in words for c in w.characters]):
        ends = [0.0, *(s.end for s in spans)]
        assert all(before <= s.start + 1e-9 for before, s in zip(ends, spans, strict=False))
        assert all(s.end - s.start > FRAME - 1e-9 or s.end == duration for s in spans)
        assert ends[-1] <= duration


@given(paths(), st.integers(0, 100))
def test_scores_are_those_of_the_frames_that_write_a_character(path, seed):
    text, position_U = path
    log_probs_UV, aligned = align(text, position_U, seed)
    classes_U = [VOCABULARY.encode(text)[n] if n >= 0 else 0 for n in position_U]
    of_path_U = log_probs_UV[np.arange(len(position_U)), classes_U]
    words = aligned.words(FRAME, len(position_U) * FRAME)
    first = 0
    for word in words:
        inside = (position_U >= first) & (position_U < first + len(word.span.text))
        np.testing.assert_allclose(word.span.score, np.exp(of_path_U[inside].mean()), rtol=1e-5)
        for n, c in enumerate(word.characters):
            np.testing.assert_allclose(c.score, np.exp(of_path_U[position_U == first + n].mean()), rtol=1e-5)
        first += len(word.span.text) + 1
    behind = (of_path_U - log_probs_UV.max(axis=-1)).sum() / len(text)
    np.testing.assert_allclose(aligned.score, behind, rtol=1e-5)


def test_a_text_that_the_model_writes_itself_scores_zero():
    position_U = np.array([-1, 0, 0, -1, 1, 2])
    logits_UV = 9 * np.eye(VOCABULARY.size)[[0, 1, 1, 0, 4, 2]]
    log_probs_UV = logits_UV - np.log(np.exp(logits_UV).sum(-1, keepdims=True))
    assert TextAlignment.of(log_probs_UV, position_U, "a b", VOCABULARY).score == 0
    assert TextAlignment.of(log_probs_UV, position_U, "b b", VOCABULARY).score == pytest.approx(-2 * 9 / 3)


@given(paths(), st.floats(0, 0.029))
def test_a_textgrid_tiles_the_file_and_reads_back_as_the_text(path, missing):
    text, position_U = path
    duration = len(position_U) * FRAME - missing
    words = align(text, position_U)[1].words(FRAME, duration)
    characters = [c for w in words for c in w.characters]
    content = format_textgrid([("words", [w.span for w in words]), ("characters", characters)], duration)
    intervals = read_textgrid(content)
    for tier, spans in (("words", [w.span for w in words]), ("characters", characters)):
        rows = [row[1:] for row in intervals if row[0] == tier]
        assert rows[0][0] == "0"
        assert all(a[1] == b[0] for a, b in itertools.pairwise(rows))  # as text: no gap of a rounding either
        assert float(rows[-1][1]) == pytest.approx(duration, abs=1e-6)
        assert all(float(start) < float(end) for start, end, _ in rows)
        spoken = [row for row in rows if row[2]]
        assert [row[2] for row in spoken] == [s.text for s in spans]
        np.testing.assert_allclose([float(row[0]) for row in spoken], [s.start for s in spans], atol=1e-6)
    assert " ".join(row[3] for row in intervals if row[0] == "words" and row[3]) == text


def test_a_textgrid_is_as_praats_manual_has_it():
    content = format_textgrid([("words", [Span('say "hi"', 0.5, 1.25, 0.9)])], 2.3)
    assert content.splitlines() == [
        'File type = "ooTextFile"',
        'Object class = "TextGrid"',
        "",
        "xmin = 0",
        "xmax = 2.3",
        "tiers? <exists>",
        "size = 1",
        "item []:",
        "    item [1]:",
        '        class = "IntervalTier"',
        '        name = "words"',
        "        xmin = 0",
        "        xmax = 2.3",
        "        intervals: size = 3",
        "        intervals [1]:",
        "            xmin = 0",
        "            xmax = 0.5",
        '            text = ""',
        "        intervals [2]:",
        "            xmin = 0.5",
        "            xmax = 1.25",
        '            text = "say ""hi"""',
        "        intervals [3]:",
        "            xmin = 1.25",
        "            xmax = 2.3",
        '            text = ""',
    ]
