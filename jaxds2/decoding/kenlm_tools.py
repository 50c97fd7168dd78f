"""KenLM's own programs, where they are on the machine: lmplz, which estimates, and build_binary.

No wheel brings them; they are built from https://github.com/kpu/kenlm. lmplz's models are others than those of
`lm.build_ngram`; a binary is the same model once more.
"""

import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import IO

from jaxds2.decoding.lm import MAX_ORDER, MIN_ORDER, LMError, check_text, vocabulary_path
from jaxds2.files import replacing, write_whole


def estimate_by_lmplz(sentences: Iterable[str], out: Path, *, order: int, prune: Sequence[int] = ()) -> Path:
    """As `lm.build_ngram`, by lmplz: modified Kneser-Ney smoothing, three discounts per order (Heafield et al. 2013).

    Raises:
      LMError: lmplz is not on the PATH, or refuses the text; `lm.check_text` does. WriteError: as build_ngram.
    """
    if not MIN_ORDER <= order <= MAX_ORDER:
        raise LMError(f"order {order}: KenLM reads models of order {MIN_ORDER} to {MAX_ORDER}")
    kept = [s for s in sentences if s.strip()]
    words = {word for s in kept for word in s.split()}
    check_text(len(kept), max((len(s.split()) + 2 for s in kept), default=0), words, order)
    # Little text leaves no discounts to estimate; lmplz then takes these instead of giving up.
    command = ["--order", str(order), "--discount_fallback"]
    command += ["--prune", *map(str, prune)] if prune else []
    with replacing(out) as partial, tempfile.TemporaryFile() as text:
        text.write("".join(f"{s}\n" for s in kept).encode())
        text.seek(0)
        _run("lmplz", [*command, "--arpa", str(partial)], stdin=text)
    write_whole(vocabulary_path(out), "".join(f"{word}\n" for word in sorted(words)))
    return out


def build_binary(arpa: Path) -> Path:
    """Write KenLM's binary form beside an ARPA file, which loads at once; their word list is one (`.vocab.txt`).

    Raises:
      LMError: build_binary is not on the PATH, or refuses the model. WriteError: it cannot be written.
    """
    binary = arpa.with_suffix(".binary")
    with replacing(binary) as partial:
        _run("build_binary", [str(arpa), str(partial)])
    return binary


def is_installed(program: str) -> bool:
    """Is it on the PATH?"""
    return shutil.which(program) is not None


def _run(program: str, arguments: Sequence[str], stdin: IO[bytes] | int = subprocess.DEVNULL) -> None:
    path = shutil.which(program)
    if path is None:
        raise LMError(f"{program} is not on the PATH; it is one of KenLM's programs: https://github.com/kpu/kenlm")
    done = subprocess.run([path, *arguments], stdin=stdin, capture_output=True, check=False)
    if done.returncode:
        lines = done.stderr.decode(errors="replace").split("\n")
        reason = next((line.strip() for line in reversed(lines) if line.strip()), f"exit code {done.returncode}")
        raise LMError(f"{program} failed: {reason}")
