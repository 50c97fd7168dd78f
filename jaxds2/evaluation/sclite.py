"""Files that NIST's scoring toolkit reads: `.trn` and `.stm` transcripts and `.ctm` word times.

With them `sclite -s -e utf-8 -i spu_id -r ref.trn trn -h hyp.trn trn` counts again what a report says, and
`sclite -s -e utf-8 -r ref.stm stm -h hyp.ctm ctm` counts by time.
"""

import re
from collections.abc import Sequence
from urllib.parse import quote

Words = Sequence[tuple[str, float, float]]
"""(word, start, end) in seconds."""
ScoredWords = Sequence[tuple[str, float, float, float]]
"""(word, start, end, confidence), the last 0 to 1."""


def format_trn(ids: Sequence[str], speakers: Sequence[str | None], texts: Sequence[str]) -> str:
    """One line an utterance: `the cat sat (anna-utt1)`, the speaker before the first dash.

    Raises:
      ValueError: ids, speakers and texts differ in number.
    """
    rows = zip(ids, speakers, texts, strict=True)
    return "".join(f"{text} ({_speaker(speaker)}-{_name(i)})\n".lstrip() for i, speaker, text in rows)


def format_stm(
    ids: Sequence[str], speakers: Sequence[str | None], durations: Sequence[float], texts: Sequence[str]
) -> str:
    """One line an utterance: `utt1 A anna 0.000 2.500 the cat sat`, sorted by name.

    Raises:
      ValueError: the arguments differ in number.
    """
    rows = sorted(zip(map(_name, ids), map(_speaker, speakers), durations, texts, strict=True))
    return "".join(f"{name} A {speaker} 0.000 {end:.3f} {text}".rstrip() + "\n" for name, speaker, end, text in rows)


def format_ctm(ids: Sequence[str], words: Sequence[Words | ScoredWords]) -> str:
    """One line a word: `utt1 A 0.360 0.240 cat` (start, duration in seconds), sorted by name and time.

    Behind a word stands the confidence in it, where it has one: `utt1 A 0.360 0.240 cat 0.970`.

    Raises:
      ValueError: ids and words differ in number.
    """
    rows = sorted(zip(map(_name, ids), words, strict=True))
    return "".join(
        " ".join([name, "A", f"{start:.3f}", f"{end - start:.3f}", word, *(f"{c:.3f}" for c in confidence)]) + "\n"
        for name, w in rows
        for word, start, end, *confidence in w
    )


def _name(utterance_id: str) -> str:
    """An id without what ends one in these files; %XX stands in its place."""
    return re.sub(r"[\s()%;\"]", lambda match: quote(match[0], safe=""), utterance_id)


def _speaker(speaker: str | None) -> str:
    """A speaker without what parts speaker and utterance; sclite refuses an id without a speaker."""
    return re.sub("[-_]", ".", _name(speaker or "unknown"))
