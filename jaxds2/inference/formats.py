"""Transcripts as text, subtitles, a table or JSON."""

import json
import textwrap
from collections.abc import Sequence

from jaxds2.inference.transcript import TimedWord, Transcript

PAUSE = 1.0
"""Seconds without a word that end a cue."""
LONGEST = 7.0
"""Seconds from the first word of a cue to the end of its last."""
WIDTH, LINES = 42, 2
"""Characters in a line and lines of a cue."""
SHORTEST = 1.0
"""Seconds that a cue of subtitles stays unless the next begins or the file ends; its words may be shorter."""

Cue = Sequence[TimedWord]
"""Words that are shown together."""


def cues(words: Sequence[TimedWord]) -> list[Cue]:
    """Parts of a transcript to show one after the other; a word that is itself too long for one stands alone."""
    found: list[list[TimedWord]] = []
    for word in words:
        if found:
            together = [*found[-1], word]
            fits = word.start - found[-1][-1].end <= PAUSE and word.end - together[0].start <= LONGEST
            if fits and len(_lines(together)) <= LINES:
                found[-1].append(word)
                continue
        found.append([word])
    return list(found)


def render(transcript: Transcript, form: str, *, name: str, word_times: bool = False) -> str:
    """A transcript as the content of a file.

    Args:
      transcript: without an error.
      form: txt is the text; srt (SubRip) and vtt (WebVTT) are cues, which stay SHORTEST at least unless the next begins
        or the file ends; tsv is a line a cue, times in milliseconds; json is one object on one line, with a list of
        cues called segments.
      name: what the recording is called in json.
      word_times: txt, tsv and json also have each word's start, end and confidence, in seconds but for tsv; srt and
        vtt have a cue a word, as long as the word.
    """
    if form == "txt":
        return transcript.text + "\n" + ("".join(map(_word_line, transcript.words)) if word_times else "")
    if form == "tsv":
        return _tsv(transcript.words, word_times)
    if form == "json":
        return _json(transcript, name, word_times)
    shown = [[w] for w in transcript.words] if word_times else cues(transcript.words)
    starts = [_milliseconds(cue[0].start) for cue in shown]
    ends = [_milliseconds(cue[-1].end) for cue in shown]
    if not word_times:
        following = [*starts, _milliseconds(transcript.duration)][1:]
        shortest = _milliseconds(SHORTEST)
        ends = [max(e, min(s + shortest, f)) for s, e, f in zip(starts, ends, following, strict=True)]
    parts = [] if form == "srt" else ["WEBVTT\n"]
    for number, (cue, start, end) in enumerate(zip(shown, starts, ends, strict=True), start=1):
        text = "\n".join(_lines(cue))
        if form == "srt":
            parts.append(f"{number}\n{_clock(start, ',')} --> {_clock(end, ',')}\n{text}\n")
        else:
            text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
            parts.append(f"{_clock(start, '.')} --> {_clock(end, '.')}\n{text}\n")
    return "\n".join(parts)


def _text(cue: Cue) -> str:
    return " ".join(w.text for w in cue)


def _lines(cue: Cue) -> list[str]:
    return textwrap.wrap(_text(cue), WIDTH, break_long_words=False, break_on_hyphens=False)


def _word_line(w: TimedWord) -> str:
    return f"{w.start:.3f}\t{w.end:.3f}\t{w.confidence:.3f}\t{w.text}\n"


def _tsv(words: Sequence[TimedWord], word_times: bool) -> str:
    if word_times:
        rows = [f"{_milliseconds(w.start)}\t{_milliseconds(w.end)}\t{w.text}\t{w.confidence:.3f}\n" for w in words]
        return "start\tend\ttext\tconfidence\n" + "".join(rows)
    rows = [f"{_milliseconds(c[0].start)}\t{_milliseconds(c[-1].end)}\t{_text(c)}\n" for c in cues(words)]
    return "start\tend\ttext\n" + "".join(rows)


def _json(transcript: Transcript, name: str, word_times: bool) -> str:
    segments = []
    for cue in cues(transcript.words):
        segment = {"start": round(cue[0].start, 3), "end": round(cue[-1].end, 3), "text": _text(cue)}
        if word_times:
            segment["words"] = [
                {
                    "word": w.text,
                    "start": round(w.start, 3),
                    "end": round(w.end, 3),
                    "confidence": round(w.confidence, 3),
                }
                for w in cue
            ]
        segments.append(segment)
    record = {
        "path": name,
        "duration": round(transcript.duration, 3),
        "silence": round(transcript.silence, 3),
        "text": transcript.text,
        "empty": not transcript.text,
        "segments": segments,
    }
    return json.dumps(record, ensure_ascii=False) + "\n"


def _milliseconds(seconds: float) -> int:
    return round(seconds * 1000)


def _clock(milliseconds: int, point: str) -> str:
    """HH:MM:SS and a fraction; the hours grow as they need."""
    seconds, rest = divmod(milliseconds, 1000)
    return f"{seconds // 3600:02}:{seconds // 60 % 60:02}:{seconds % 60:02}{point}{rest:03}"
