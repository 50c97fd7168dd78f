"""Published corpora in their original layout -> manifests.

Every `prepare_*` function reads the corpus' own index, looks at the header of each audio file for its duration, brings
the transcripts to the form that the model is trained on, and writes one manifest per split into `out`. Utterances that
cannot be used are left out, counted and named on stderr; a split of which nothing is left is a CorpusError.
"""

import hashlib
import re
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from jaxds2.audio import AudioError, probe_audio
from jaxds2.config import DataConfig
from jaxds2.data.download import extract, fetch, is_extracted
from jaxds2.data.manifest import Utterance, write_manifest
from jaxds2.text import Vocabulary

AN4_DEV_SPEAKERS = ("ffmm", "fnsv", "mcel", "meab", "mjgk", "mmsh", "msjm")
"""Training speakers of AN4 that make its dev set: of the 74 in alphabetical order the 5th, 15th, ... 65th, a rule fixed
before anything was trained. Two women and five men, 89 utterances, 511 words. (Beginning with the 10th would have split
mdcs from mdcs2, who may be one person.)"""

MINI_LIBRISPEECH_DEV_SPEAKERS = ("1737", "32", "7312", "669", "2136")
"""Speakers of train-clean-5 that make the dev set where dev-clean-2 is not there."""

LIBRISPEECH_SPLITS = (
    "train-clean-100",
    "train-clean-360",
    "train-other-500",
    "dev-clean",
    "dev-other",
    "test-clean",
    "test-other",
)

LJSPEECH_HELD_OUT = 100
"""Utterances of LJSpeech in the dev set, and as many in the test set."""

AUDIO_SUFFIXES = (".flac", ".wav", ".sph", ".opus", ".ogg", ".mp3")
"""What a corpus' audio may be stored as, in the order in which it is looked for."""

HEADER_THREADS = 8

_NAMED = 5


class CorpusError(ValueError):
    """A corpus that is not in its original layout or of which nothing is left; the message is one line."""


@dataclass(frozen=True)
class Archive:
    """An official archive of a corpus."""

    url: str
    checksum: str
    """As `fetch` takes it."""
    folder: str
    """What it unpacks to."""


def _openslr(number: int, split: str, md5: str) -> Archive:
    url = f"https://www.openslr.org/resources/{number}/{split}.tar.gz"
    return Archive(url, f"md5:{md5}", f"LibriSpeech/{split}")


ARCHIVES: dict[str, dict[str, Archive]] = {
    # The copy of speech.cs.cmu.edu/databases/an4/an4_sphere.tar.gz that is served over https. Its audio is NIST
    # SPHERE, which libsndfile reads; the other archives that CMU offers hold headerless samples.
    "an4": {
        "an4": Archive(
            "https://dldata-public.s3.us-east-2.amazonaws.com/an4_sphere.tar.gz",
            "sha256:a0525579493735d32b60fb6fa5975dd0eaacde087b0a4eeb7f13b7ef33077b12",
            "an4",
        )
    },
    # The MD5 sums are those of md5sum.txt beside the archives.
    "librispeech": {
        "train-clean-100": _openslr(12, "train-clean-100", "2a93770f6d5c6c964bc36631d331a522"),
        "train-clean-360": _openslr(12, "train-clean-360", "c0e676e450a7ff2f54aeade5171606fa"),
        "train-other-500": _openslr(12, "train-other-500", "d1a0fd59409feb2c614ce4d30c387708"),
        "dev-clean": _openslr(12, "dev-clean", "42e2234ba48799c1f50f24a7926300a1"),
        "dev-other": _openslr(12, "dev-other", "c8d0bcc9cca99d4f8b62fcc847357931"),
        "test-clean": _openslr(12, "test-clean", "32fa31d27d2e1cad72775fee3f4849a9"),
        "test-other": _openslr(12, "test-other", "fb5a50374b501bb3bac4815ee91d3135"),
    },
    "mini-librispeech": {
        "train-clean-5": _openslr(31, "train-clean-5", "5df7d4e78065366204ca6845bb08f490"),
        "dev-clean-2": _openslr(31, "dev-clean-2", "6d7ab67ac6a1d2c993d050e16d61080d"),
    },
    "ljspeech": {
        "LJSpeech-1.1": Archive(
            "https://data.keithito.com/data/speech/LJSpeech-1.1.tar.bz2",
            "sha256:be1a30453f28eb8dd26af4101ae40cbf2c50413b1bb21936cbcdc6fae3de8aa5",
            "LJSpeech-1.1",
        )
    },
}

DEFAULT_VOCABULARY = Vocabulary(DataConfig().characters)


def download_corpus(
    corpus: str,
    out: str | Path,
    splits: Sequence[str] | None = None,
    *,
    archives: Mapping[str, Mapping[str, Archive]] = ARCHIVES,
    progress: bool = True,
) -> Path:
    """Fetch and unpack the official archives of a corpus; what is there already is not fetched again.

    Args:
      corpus: "an4", "librispeech", "mini-librispeech" or "ljspeech".
      out: folder for the archives and what they unpack to. An archive may be deleted once it is unpacked.
      splits: which archives; None: all (LibriSpeech: 60 GB packed).
      archives: corpus -> split -> Archive; for a mirror, and for tests.

    Returns:
      The folder to hand to the corpus' prepare function as `source`.

    Raises:
      CorpusError: an unknown split, or a corpus that cannot be had without a login.
      DownloadError: as `fetch` and `extract`.
    """
    if corpus == "common-voice":
        raise CorpusError(
            "common-voice: Mozilla hands it out only after a login; download the archive of your language from "
            "https://commonvoice.mozilla.org/datasets, unpack it, and give the folder with train.tsv as --source"
        )
    if corpus not in archives:
        raise CorpusError(f"{corpus}: no archive is known; choose from {', '.join(archives)}")
    known, out = archives[corpus], Path(out)
    chosen = _choose_splits(splits, known)
    for split in chosen:
        archive = known[split]
        path = out / archive.url.rsplit("/", 1)[1]
        if is_extracted(path, out) and (out / archive.folder).is_dir():
            continue
        fetch(archive.url, path, checksum=archive.checksum, progress=progress)
        extract(path, out, progress=progress)
        if not (out / archive.folder).is_dir():
            raise CorpusError(f"{path}: unpacked, but holds no folder {archive.folder}")
    return out / Path(known[chosen[0]].folder).parts[0]


def _choose_splits(splits: Sequence[str] | None, known: Mapping[str, object] | Sequence[str]) -> list[str]:
    chosen = list(dict.fromkeys(known if splits is None else splits))
    if unknown := [s for s in chosen if s not in known]:
        raise CorpusError(f"no split {unknown[0]!r}; choose from {', '.join(known)}")
    if not chosen:
        raise CorpusError(f"no split chosen; choose from {', '.join(known)}")
    return chosen


@dataclass(frozen=True)
class _Fault:
    """Why an utterance cannot be used."""

    kind: str
    detail: str
    """The id or the file."""


@dataclass(frozen=True)
class _Entry:
    """An utterance as a corpus' index lists it."""

    id: str
    audio: Path | _Fault
    """Where the audio should be, or what is wrong with the index."""
    text: str
    speaker: str | None


def prepare_an4(source: str | Path, out: str | Path, *, vocabulary: Vocabulary = DEFAULT_VOCABULARY) -> list[Path]:
    """AN4: `etc/an4_{train,test}.{fileids,transcription}` and `wav/`, as WAV or as the official archive's SPHERE.

    The dev set is AN4_DEV_SPEAKERS, held out of train: to train on all 948 utterances name train.jsonl and dev.jsonl.

    Returns:
      train.jsonl (859 utterances), dev.jsonl (89), test.jsonl (130).

    Raises:
      CorpusError: an index is missing or malformed, or nothing is left of a split.
    """
    source = _descend(Path(source), "an4")
    train, test = (list(_read_an4(source, name)) for name in ("train", "test"))
    return _write_splits(
        out,
        {
            "train": [e for e in train if e.speaker not in AN4_DEV_SPEAKERS],
            "dev": [e for e in train if e.speaker in AN4_DEV_SPEAKERS],
            "test": test,
        },
        vocabulary,
    )


# `<s> TEXT </s> (id)` in train, `TEXT (id)` in test.
_AN4_LINE = re.compile(r"(?:<s>)?(?P<text>[^()<>]*)(?:</s>)?\s*\((?P<id>[^()\s]+)\)")


def _read_an4(source: Path, name: str) -> Iterator[_Entry]:
    index = source / "etc" / f"an4_{name}.transcription"
    texts: dict[str, str] = {}
    for number, line in _read_lines(index):
        match = _AN4_LINE.fullmatch(line.strip())
        if match is None:
            raise CorpusError(f"{index}:{number}: expected `TEXT (id)` or `<s> TEXT </s> (id)`, got {line!r}")
        texts[match["id"]] = match["text"]
    for _, line in _read_lines(source / "etc" / f"an4_{name}.fileids"):
        fileid = Path(line.strip())
        entry_id, speaker = fileid.name, fileid.parent.name
        if entry_id not in texts:
            yield _Entry(entry_id, _Fault("no transcript", entry_id), "", speaker)
            continue
        folder = source / "wav" / fileid.parent
        yield _Entry(entry_id, _find_audio(folder, entry_id), texts.pop(entry_id), speaker)
    for entry_id in texts:
        yield _Entry(entry_id, _Fault(f"not in an4_{name}.fileids", entry_id), "", None)


def prepare_librispeech(
    source: str | Path,
    out: str | Path,
    splits: Sequence[str] | None = None,
    *,
    vocabulary: Vocabulary = DEFAULT_VOCABULARY,
) -> list[Path]:
    """LibriSpeech: `<split>/<speaker>/<chapter>/<speaker>-<chapter>.trans.txt` with the audio beside it.

    Args:
      source: `LibriSpeech/` or the folder that holds it.
      splits: names from LIBRISPEECH_SPLITS; None: all that are there.

    Returns:
      One manifest per split, `<split>.jsonl`, in the order of LIBRISPEECH_SPLITS (or of `splits`).

    Raises:
      CorpusError: an unknown or absent split, a chapter without its index, or nothing left of a split.
    """
    source = _descend(Path(source), "LibriSpeech")
    present = [s for s in LIBRISPEECH_SPLITS if (source / s).is_dir()]
    if splits is None and not present:
        raise CorpusError(f"{source}: none of {', '.join(LIBRISPEECH_SPLITS)} is there; give the folder LibriSpeech")
    chosen = present if splits is None else _choose_splits(splits, LIBRISPEECH_SPLITS)
    return _write_splits(out, {s: list(_read_librispeech(source / s)) for s in chosen}, vocabulary)


def prepare_mini_librispeech(
    source: str | Path, out: str | Path, *, vocabulary: Vocabulary = DEFAULT_VOCABULARY
) -> list[Path]:
    """mini LibriSpeech (OpenSLR 31): LibriSpeech's layout with the splits train-clean-5 and dev-clean-2.

    Without dev-clean-2 the dev set is MINI_LIBRISPEECH_DEV_SPEAKERS, held out of train-clean-5.

    Returns:
      train.jsonl, dev.jsonl.

    Raises:
      CorpusError: as `prepare_librispeech`.
    """
    source = _descend(Path(source), "LibriSpeech")
    train = list(_read_librispeech(source / "train-clean-5"))
    if (source / "dev-clean-2").is_dir():
        dev = list(_read_librispeech(source / "dev-clean-2"))
    else:
        dev = [e for e in train if e.speaker in MINI_LIBRISPEECH_DEV_SPEAKERS]
        train = [e for e in train if e.speaker not in MINI_LIBRISPEECH_DEV_SPEAKERS]
        _say(f"no dev-clean-2 in {source}: dev is the speakers {', '.join(MINI_LIBRISPEECH_DEV_SPEAKERS)}")
    return _write_splits(out, {"train": train, "dev": dev}, vocabulary)


def _read_librispeech(split: Path) -> Iterator[_Entry]:
    if not split.is_dir():
        raise CorpusError(f"no folder {split}; unpack {split.name}.tar.gz there, or choose other splits")
    for chapter in sorted(p for p in split.glob("*/*") if p.is_dir()):
        speaker = chapter.parent.name
        audio = {p.stem: p for p in sorted(chapter.iterdir()) if p.suffix in AUDIO_SUFFIXES}
        for _, line in _read_lines(chapter / f"{speaker}-{chapter.name}.trans.txt"):
            entry_id, _, text = line.strip().partition(" ")
            yield _Entry(entry_id, audio.pop(entry_id, chapter / f"{entry_id}.flac"), text, speaker)
        for entry_id in audio:
            yield _Entry(entry_id, _Fault("no transcript", entry_id), "", speaker)


def prepare_common_voice(
    source: str | Path, out: str | Path, *, vocabulary: Vocabulary = DEFAULT_VOCABULARY
) -> list[Path]:
    """Common Voice: `train.tsv`, `dev.tsv`, `test.tsv` with `path`, `sentence` and `client_id` in any order; `clips/`.

    Args:
      source: the folder of one language, such as cv-corpus-17.0-2024-03-15/cy.

    Returns:
      train.jsonl, dev.jsonl, test.jsonl.

    Raises:
      CorpusError: an index or a column is missing, or nothing is left of a split.
    """
    source = Path(source)
    names = ("train", "dev", "test")
    return _write_splits(out, {n: list(_read_common_voice(source, n)) for n in names}, vocabulary)


def _read_common_voice(source: Path, name: str) -> Iterator[_Entry]:
    index = source / f"{name}.tsv"
    lines = _read_lines(index)
    columns = next(lines, (1, ""))[1].split("\t")
    if missing := [c for c in ("path", "sentence", "client_id") if c not in columns]:
        raise CorpusError(f"{index}: no column {missing[0]!r} in its first line, {columns}")
    for number, line in lines:
        # Plain tabs, no quoting: sentences hold quotation marks of their own.
        fields = line.split("\t")
        if len(fields) != len(columns):
            where = f"{index}:{number}"
            yield _Entry(where, _Fault(f"not {len(columns)} columns", where), "", None)
            continue
        row = dict(zip(columns, fields, strict=True))
        clip = Path(row["path"])  # the earliest releases leave out .mp3
        audio = source / "clips" / clip if clip.suffix else _find_audio(source / "clips", clip.name)
        yield _Entry(clip.stem, audio, row["sentence"], row["client_id"] or None)


def prepare_ljspeech(source: str | Path, out: str | Path, *, vocabulary: Vocabulary = DEFAULT_VOCABULARY) -> list[Path]:
    """LJSpeech 1.1: `metadata.csv` with lines `id|raw text|normalised text`, and `wavs/`; the normalised text is used.

    It has no official splits: of all ids in the order of their SHA-256, the first LJSPEECH_HELD_OUT are test, the next
    as many dev, the rest train. One woman reads everything, so every split has the same speaker and none is written.

    Returns:
      train.jsonl (12,900 utterances), dev.jsonl (100), test.jsonl (100).

    Raises:
      CorpusError: the index is missing or malformed, or nothing is left of a split.
    """
    source = _descend(Path(source), "LJSpeech-1.1")
    entries = sorted(_read_ljspeech(source), key=lambda e: hashlib.sha256(e.id.encode()).digest())
    held_out = LJSPEECH_HELD_OUT
    splits = {"train": entries[2 * held_out :], "dev": entries[held_out : 2 * held_out], "test": entries[:held_out]}
    return _write_splits(out, {name: sorted(e, key=lambda e: e.id) for name, e in splits.items()}, vocabulary)


def _read_ljspeech(source: Path) -> Iterator[_Entry]:
    index = source / "metadata.csv"
    for number, line in _read_lines(index):
        fields = line.split("|")
        if len(fields) != 3:
            raise CorpusError(f"{index}:{number}: expected `id|raw text|normalised text`, got {line!r}")
        yield _Entry(fields[0], _find_audio(source / "wavs", fields[0]), fields[2], None)


def _descend(source: Path, folder: str) -> Path:
    """`source` may be the corpus' own folder or the one that holds it."""
    if not source.is_dir():
        raise CorpusError(f"no folder {source}; name the corpus with --source, or fetch it with --download")
    return source / folder if (source / folder).is_dir() else source


def _read_lines(index: Path) -> Iterator[tuple[int, str]]:
    """Numbered lines of an index, the blank ones left out.

    Only a line feed ends a line: sentences hold other characters at which str.splitlines would break them.
    """
    try:
        lines = index.read_bytes().decode("utf-8-sig").split("\n")
    except FileNotFoundError:
        raise CorpusError(f"no index {index}; is the source the corpus in its original layout?") from None
    except (OSError, UnicodeDecodeError) as e:
        raise CorpusError(f"{index}: cannot be read ({e})") from None
    return ((number, line.removesuffix("\r")) for number, line in enumerate(lines, start=1) if line.strip())


def _find_audio(folder: Path, stem: str) -> Path:
    candidates = [folder / (stem + suffix) for suffix in AUDIO_SUFFIXES]
    return next((path for path in candidates if path.is_file()), candidates[0])


def _write_splits(out: str | Path, splits: Mapping[str, Sequence[_Entry]], vocabulary: Vocabulary) -> list[Path]:
    """One manifest per split, written only when every split has something left."""
    kept: dict[Path, list[Utterance]] = {}
    for name, entries in splits.items():
        utterances, left_out = _examine_all(name, entries, vocabulary)
        for kind, details in left_out.items():
            shown = ", ".join(details[:_NAMED]) + (", ..." if len(details) > _NAMED else "")
            _say(f"{name}: left out {len(details)} of {len(entries)}, {kind}: {shown}")
        if not utterances:
            faults = ", ".join(f"{len(details)} {kind}" for kind, details in left_out.items()) or "its index is empty"
            raise CorpusError(f"{name}: no usable utterance is left ({faults}); no manifest was written")
        kept[Path(out) / f"{name}.jsonl"] = utterances
    for path, utterances in kept.items():
        write_manifest(path, utterances)
        speakers = {u.speaker for u in utterances if u.speaker is not None}
        hours = sum(u.duration for u in utterances) / 3600
        _say(f"{path}: {len(utterances)} utterances, {hours:.2f} hours, {len(speakers) or 'unnamed'} speakers")
    return list(kept)


def _examine_all(
    name: str, entries: Sequence[_Entry], vocabulary: Vocabulary
) -> tuple[list[Utterance], dict[str, list[str]]]:
    """The usable utterances in order, and the others by kind of fault, named."""
    utterances: list[Utterance] = []
    left_out: defaultdict[str, list[str]] = defaultdict(list)
    seen: set[str] = set()
    with ThreadPoolExecutor(HEADER_THREADS) as pool:
        results = pool.map(lambda entry: _examine(entry, vocabulary), entries)
        for result in tqdm(
            results, desc=f"{name}: reading headers", total=len(entries), unit="file", leave=False, disable=None
        ):
            if isinstance(result, _Fault):
                left_out[result.kind].append(result.detail)
            elif result.id in seen:
                left_out["listed before"].append(result.id)
            else:
                seen.add(result.id)
                utterances.append(result)
    return utterances, dict(left_out)


def _examine(entry: _Entry, vocabulary: Vocabulary) -> Utterance | _Fault:
    if isinstance(entry.audio, _Fault):
        return entry.audio
    text = vocabulary.normalize(entry.text)
    if not text:
        return _Fault("empty transcript", entry.id)
    if not entry.audio.is_file():
        return _Fault("missing audio file", str(entry.audio))
    try:
        duration = probe_audio(entry.audio).duration
    except AudioError as e:
        return _Fault("unreadable audio", str(e))
    return Utterance(entry.id, entry.audio, duration, text, entry.speaker)


def _say(line: str) -> None:
    print(line, file=sys.stderr)
