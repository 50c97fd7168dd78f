"""Reading what NIST's scoring toolkit reads and writes, and finding it."""

import re
import shutil
from pathlib import Path

import pytest

GOLDEN = Path(__file__).parent / "sctk"


def toolkit(program: str) -> str:
    """How sclite or sc_stats is called here; Debian hides both behind `sctk`. Skips where neither is installed."""
    if shutil.which(program):
        return program
    if shutil.which("sctk"):
        return f"sctk {program}"
    pytest.skip(f"{program} is not installed (Debian: sctk)")


def read_trn(path: Path) -> dict[str, str]:
    """Texts by their id, `speaker-utterance`."""
    lines = path.read_text(encoding="utf-8").splitlines()
    found = [re.fullmatch(r"(.*?) ?\(([^()]+)\)", line) for line in lines]
    return {match[2]: match[1] for match in found if match}


def read_alignments(path: Path) -> dict[str, list[tuple[str | None, str | None]]]:
    """Aligned words (ref, hyp) by utterance, of sclite's `.sgml`."""
    alignments = {}
    for block in re.findall(r'<PATH id="\((.*?)\)".*?>\n(.*)\n</PATH>', path.read_text(encoding="utf-8")):
        pairs = re.findall(r'([CSDI]),(?:"([^"]*)")?,(?:"([^"]*)")?', block[1])
        alignments[block[0]] = [(ref or None, hyp or None) for _, ref, hyp in pairs]
    return alignments


def read_sum(path: Path) -> dict[str, int]:
    """The row `Sum` of sclite's `.raw`."""
    row = re.search(r"\| Sum +\|([\d |]+)\|", path.read_text(encoding="utf-8"))
    assert row
    names = ("utterances", "words", "correct", "substitutions", "deletions", "insertions", "errors", "wrong")
    return dict(zip(names, map(int, re.findall(r"\d+", row[1])), strict=True))
