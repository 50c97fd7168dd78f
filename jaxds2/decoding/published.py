"""Language models that others have published."""

import gzip
import io
import zlib
from pathlib import Path

from tqdm import tqdm

from jaxds2.data.download import DownloadError, fetch
from jaxds2.decoding.lm import load_unigrams, vocabulary_path
from jaxds2.files import replacing, write_whole

SOURCE = "https://www.openslr.org/resources/11/"
"""Panayotov et al. 2015, "LibriSpeech": estimated on 14,500 books without those of the test sets."""

MODELS = {
    "librispeech-3gram-pruned": ("3-gram.pruned.1e-7.arpa.gz", "md5:9a0f1325bcaf3a0f7b7be4be10823c2a"),
    "librispeech-3gram": ("3-gram.arpa.gz", "md5:74cbb837e582378c26c602e1c8cbcb9c"),
    "librispeech-4gram": ("4-gram.arpa.gz", "md5:6abdcd5b055bd482e4f9defe91d40408"),
}
"""File and checksum by name; 34 MB, 760 MB and 1.4 GB to fetch, several times that unpacked."""


def download_model(name: str, folder: Path, *, progress: bool = True) -> Path:
    """Fetch a model and write it as our alphabets have it, in lower case, with its word list.

    What is there already is not done again; what breaks off goes on where it was.

    Args:
      name: one of MODELS.
      folder: for the archive and NAME.arpa.
      progress: show bars.

    Returns:
      The ARPA file.

    Raises:
      DownloadError: as fetch, or a damaged archive. WriteError: a file cannot be written.
    """
    file, checksum = MODELS[name]
    archive, arpa = folder / file, folder / f"{name}.arpa"
    if arpa.exists() and vocabulary_path(arpa).exists():
        return arpa
    fetch(SOURCE + file, archive, checksum=checksum, progress=progress)
    total = archive.stat().st_size
    try:
        with (
            archive.open("rb") as packed,
            gzip.open(packed, "rt", encoding="utf-8") as lines,
            replacing(arpa) as partial,
            partial.open("w", encoding="utf-8") as out,
            tqdm(total=total, desc=f"write {arpa.name}", unit="B", unit_scale=True, disable=not progress) as bar,
        ):
            while block := lines.readlines(io.DEFAULT_BUFFER_SIZE * 64):
                out.writelines(line.lower() for line in block)
                bar.update(packed.tell() - bar.n)
    except (EOFError, zlib.error, gzip.BadGzipFile, UnicodeDecodeError) as e:
        raise DownloadError(f"{archive}: is damaged; delete it and run the same command again ({e})") from None
    # The list last: with it the model is whole.
    write_whole(vocabulary_path(arpa), "".join(f"{word}\n" for word in sorted(load_unigrams(arpa))))
    return arpa
