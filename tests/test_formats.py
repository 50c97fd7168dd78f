"""Each format is read back by a parser of its own."""

import html
import json
import re
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxds2.cli import TRANSCRIPT_FORMATS
from jaxds2.decoding.hypothesis import Hypothesis, Word
from jaxds2.inference.formats import LINES, LONGEST, PAUSE, SHORTEST, WIDTH, cues, render
from jaxds2.inference.transcript import Transcript

FRAME = 0.03
CLOCK = r"(\d\d+):([0-5]\d):([0-5]\d)[,.](\d{3})"


@st.composite
def transcripts(draw) -> Transcript:
    """Words in order, some longer than a line, some long after the one before."""
    words, frame = [], 0
    some = st.text("ab&<'>é", min_size=1, max_size=8)
    for text in draw(st.lists(some | some.map(lambda text: 50 * text[0]), max_size=25)):
        start = frame + draw(st.sampled_from([0, 1, 5, 20, 33, 34, 40, 200_000]))
        frame = start + draw(st.sampled_from([1, 2, 10, 60]))
        words.append(Word(text, start, frame, draw(st.floats(0, 1))))
    hypothesis = Hypothesis(" ".join(w.text for w in words), tuple(words), 0.0, 0.0, 0.0)
    return Transcript(Path("x"), (hypothesis,), duration=frame * FRAME, frame_seconds=FRAME)


def clock(text: str) -> int:
    """Milliseconds."""
    matched = re.fullmatch(CLOCK, text)
    assert matched, text
    hours, minutes, seconds, rest = map(int, matched.groups())
    return ((hours * 60 + minutes) * 60 + seconds) * 1000 + rest


def parse_subtitles(text: str, form: str) -> list[tuple[int, int, list[str]]]:
    """Cues as (start, end, lines), by the rules of the two formats that are used here."""
    blocks = [block.rstrip("\n") for block in text.split("\n\n") if block]
    if form == "vtt":
        assert blocks.pop(0) == "WEBVTT"
    found = []
    for number, block in enumerate(blocks, start=1):
        lines = block.split("\n")
        if form == "srt":
            assert lines.pop(0) == str(number)
        start, end = lines.pop(0).split(" --> ")
        assert ("," in start) == (form == "srt")
        assert form == "srt" or not re.search("[<>]", "".join(lines))
        found.append((clock(start), clock(end), [html.unescape(x) if form == "vtt" else x for x in lines]))
    return found


@pytest.mark.parametrize("form", ["srt", "vtt"])
@given(transcripts())
@settings(max_examples=50)
def test_subtitles_hold_every_word_once_in_order_and_in_its_time(form, transcript):
    shown = parse_subtitles(render(transcript, form, name="x"), form)
    assert " ".join(" ".join(lines) for *_, lines in shown) == transcript.text
    assert [start for start, *_ in shown] == [round(cue[0].start * 1000) for cue in cues(transcript.words)]
    position = 0
    for (start, end, _), cue in zip(shown, cues(transcript.words), strict=True):
        assert position <= start < end
        assert end >= round(cue[-1].end * 1000)
        position = end
    for (start, end, _), (following, *_) in pairwise(shown):
        assert end - start >= min(1000 * SHORTEST, following - start)
    words = parse_subtitles(render(transcript, form, name="x", word_times=True), form)
    assert [(a, b, lines[0]) for a, b, lines in words] == [
        (round(w.start * 1000), round(w.end * 1000), w.text) for w in transcript.words
    ]


@given(transcripts())
@settings(max_examples=50)
def test_a_cue_fits_the_screen_and_ends_at_a_pause(transcript):
    found = cues(transcript.words)
    assert [w for cue in found for w in cue] == list(transcript.words)
    for (*_, lines), cue in zip(parse_subtitles(render(transcript, "srt", name="x"), "srt"), found, strict=True):
        if len(cue) > 1:
            assert cue[-1].end - cue[0].start <= LONGEST
            assert len(lines) <= LINES
        assert all(len(line) <= WIDTH or " " not in line for line in lines)
        assert all(b.start - a.end <= PAUSE for a, b in pairwise(cue))


@given(transcripts())
@settings(max_examples=50)
def test_tables_and_json_read_back(transcript):
    found = cues(transcript.words)
    header, *rows = (line.split("\t") for line in render(transcript, "tsv", name="x").splitlines())
    assert header == ["start", "end", "text"]
    assert [(int(a), int(b), text) for a, b, text in rows] == [
        (round(c[0].start * 1000), round(c[-1].end * 1000), " ".join(w.text for w in c)) for c in found
    ]
    timed = [(w.start, w.end, w.confidence, w.text) for w in transcript.words]
    header, *rows = (line.split("\t") for line in render(transcript, "tsv", name="x", word_times=True).splitlines())
    assert header == ["start", "end", "text", "confidence"]
    assert [(int(a) / 1000, int(b) / 1000, float(c), text) for a, b, text, c in rows] == near(timed)
    text, *lines = render(transcript, "txt", name="x", word_times=True).splitlines()
    assert text == transcript.text
    rows = [line.split("\t") for line in lines]
    assert [(float(a), float(b), float(c), text) for a, b, c, text in rows] == near(timed)
    assert render(transcript, "txt", name="x") == transcript.text + "\n"
    record = json.loads(render(transcript, "json", name="a/b.wav"))
    assert record["path"] == "a/b.wav"
    assert record["text"] == transcript.text
    assert record["empty"] == (not transcript.text)
    assert [s["text"] for s in record["segments"]] == [" ".join(w.text for w in c) for c in found]
    assert all("words" not in s for s in record["segments"])
    segments = json.loads(render(transcript, "json", name="x", word_times=True))["segments"]
    assert [(w["start"], w["end"], w["confidence"], w["word"]) for s in segments for w in s["words"]] == near(timed)


def near(timed):
    return [tuple(pytest.approx(v, abs=6e-4) if isinstance(v, float) else v for v in row) for row in timed]


def test_nothing_heard_is_a_whole_file_too():
    nothing = {form: render(Transcript(Path("x"), duration=1.0), form, name="x") for form in TRANSCRIPT_FORMATS}
    record = json.loads(nothing.pop("json"))
    assert (record["empty"], record["text"], record["segments"]) == (True, "", [])
    assert nothing == {"txt": "\n", "srt": "", "vtt": "WEBVTT\n", "tsv": "start\tend\ttext\n"}
