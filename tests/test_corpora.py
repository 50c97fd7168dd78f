"""Every utterance of a corpus' index is in a manifest or named as left out; held-out speakers stay held out."""

import functools
import hashlib
import shutil
import tarfile
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import soundfile

from jaxds2 import cli
from jaxds2.config import DataConfig
from jaxds2.data.corpora import (
    AN4_DEV_SPEAKERS,
    ARCHIVES,
    LIBRISPEECH_SPLITS,
    LJSPEECH_HELD_OUT,
    MINI_LIBRISPEECH_DEV_SPEAKERS,
    Archive,
    CorpusError,
    download_corpus,
    prepare_an4,
    prepare_common_voice,
    prepare_librispeech,
    prepare_ljspeech,
    prepare_mini_librispeech,
)
from jaxds2.data.manifest import Utterance, read_manifest
from jaxds2.text import Vocabulary

SECONDS = 0.125


def make_audio(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    kinds = {".sph": ("NIST", "BIG"), ".opus": ("OGG", None)}
    kind, endian = kinds.get(path.suffix, (None, None))
    subtype = "OPUS" if path.suffix == ".opus" else None
    soundfile.write(path, np.zeros(2000, np.int16), 16_000, format=kind, endian=endian, subtype=subtype)


def make_index(path: Path, *lines: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes("".join(line + "\n" for line in lines).encode())


def make_an4(root: Path, suffix: str = ".wav") -> Path:
    """One utterance of every dev speaker, three of other speakers, one for test."""
    train = [f"{s}/an1-{s}-b" for s in AN4_DEV_SPEAKERS] + ["fash/an2-fash-b", "fash/cen3-fash-b", "mdcs/an4-mdcs-b"]
    for name, folder, ids in (("train", "an4_clstk", train), ("test", "an4test_clstk", ["fcaw/an406-fcaw-b"])):
        make_index(root / f"etc/an4_{name}.fileids", *(f"{folder}/{i}" for i in ids))
        stems = [i.split("/")[1] for i in ids]
        lines = (
            [f"<s> ENTER G M {n} </s> ({s})" for n, s in enumerate(stems)] if name == "train" else ["GO (an406-fcaw-b)"]
        )
        make_index(root / f"etc/an4_{name}.transcription", *(line.replace(" 0 ", " ONE ") for line in lines))
        for i in ids:
            make_audio(root / "wav" / folder / (i + suffix))
    return root


def make_librispeech(split: Path, speakers: dict[str, int], suffix: str = ".flac") -> None:
    for speaker, count in speakers.items():
        chapter = split / speaker / "7"
        ids = [f"{speaker}-7-{n:04}" for n in range(count)]
        make_index(chapter / f"{speaker}-7.trans.txt", *(f"{i} IT'S {speaker} TEXT" for i in ids))
        for i in ids:
            make_audio(chapter / (i + suffix))


def make_common_voice(root: Path) -> Path:
    header = ("client_id", "path", "sentence", "up_votes")
    for name, order in (("train", (0, 1, 2, 3)), ("dev", (2, 3, 1, 0)), ("test", (3, 1, 2, 0))):
        row = (f"speaker of {name}", f"common_voice_en_{name}.mp3", f'"Well," she said, "it’s {name}!"', "2")
        make_index(root / f"{name}.tsv", *("\t".join(fields[i] for i in order) for fields in (header, row)))
        make_audio(root / "clips" / f"common_voice_en_{name}.mp3")
    return root


def make_ljspeech(root: Path, count: int) -> Path:
    make_index(root / "metadata.csv", *(f'LJ001-{n:04}|Dr. {n}|Doctor "so and so"' for n in range(count)))
    for n in range(count):
        make_audio(root / "wavs" / f"LJ001-{n:04}.wav")
    return root


def read_all(paths: list[Path]) -> dict[str, list[Utterance]]:
    return {path.name: read_manifest(path) for path in paths}


def speakers(utterances: list[Utterance]) -> set[str | None]:
    return {u.speaker for u in utterances}


# The layouts.


@pytest.mark.parametrize("suffix", [".wav", ".sph"])
def test_an4_in_wav_and_in_sphere(tmp_path: Path, suffix: str) -> None:
    make_an4(tmp_path / "an4", suffix)
    splits = read_all(prepare_an4(tmp_path / "an4", tmp_path / "out"))
    assert {name: len(u) for name, u in splits.items()} == {"train.jsonl": 3, "dev.jsonl": 7, "test.jsonl": 1}
    assert speakers(splits["dev.jsonl"]) == set(AN4_DEV_SPEAKERS)
    assert splits["dev.jsonl"][0].text == "enter g m one"
    audio = tmp_path / f"an4/wav/an4test_clstk/fcaw/an406-fcaw-b{suffix}"
    assert splits["test.jsonl"] == [Utterance("an406-fcaw-b", audio, SECONDS, "go", "fcaw")]


@pytest.mark.parametrize("suffix", [".flac", ".wav", ".opus"])
@pytest.mark.parametrize("source", [".", "LibriSpeech"])
def test_librispeech_writes_one_manifest_per_split(tmp_path: Path, suffix: str, source: str) -> None:
    for split in ("test-clean", "train-clean-100"):
        make_librispeech(tmp_path / "LibriSpeech" / split, {"19": 2, "26": 1}, suffix)
    paths = prepare_librispeech(tmp_path / source, tmp_path / "out")
    assert [p.name for p in paths] == ["train-clean-100.jsonl", "test-clean.jsonl"]
    for utterances in read_all(paths).values():
        assert [u.id for u in utterances] == ["19-7-0000", "19-7-0001", "26-7-0000"]
        assert [u.speaker for u in utterances] == ["19", "19", "26"]
        assert {u.duration for u in utterances} == {SECONDS}
        assert all(u.audio_filepath.is_file() for u in utterances)
    assert read_manifest(paths[0])[0].text == "it's 19 text"
    chosen = prepare_librispeech(tmp_path / source, tmp_path / "chosen", ["test-clean"])
    assert [p.name for p in chosen] == ["test-clean.jsonl"]


def test_mini_librispeech_takes_its_dev_set_where_it_is_there(tmp_path: Path) -> None:
    train = dict.fromkeys(MINI_LIBRISPEECH_DEV_SPEAKERS, 1) | {"19": 2}
    make_librispeech(tmp_path / "train-clean-5", train)
    held_out = read_all(prepare_mini_librispeech(tmp_path, tmp_path / "out"))
    assert {name: len(u) for name, u in held_out.items()} == {"train.jsonl": 2, "dev.jsonl": 5}
    assert speakers(held_out["dev.jsonl"]) == set(MINI_LIBRISPEECH_DEV_SPEAKERS)
    make_librispeech(tmp_path / "dev-clean-2", {"84": 3})
    official = read_all(prepare_mini_librispeech(tmp_path, tmp_path / "out"))
    assert {name: len(u) for name, u in official.items()} == {"train.jsonl": 7, "dev.jsonl": 3}


def test_common_voice_columns_in_any_order(tmp_path: Path) -> None:
    splits = read_all(prepare_common_voice(make_common_voice(tmp_path), tmp_path / "out"))
    assert list(splits) == ["train.jsonl", "dev.jsonl", "test.jsonl"]
    for name, (utterance,) in splits.items():
        name = name.removesuffix(".jsonl")
        assert (utterance.id, utterance.text) == (f"common_voice_en_{name}", f"well she said it's {name}")
        assert utterance.speaker == f"speaker of {name}"
        assert utterance.duration == pytest.approx(SECONDS, abs=0.1)  # MP3 comes in frames


def test_common_voice_sentences_keep_to_their_line(tmp_path: Path) -> None:
    make_common_voice(tmp_path)
    sentence = "first\u2028second\x85 third\rfourth"  # str.splitlines would make four lines of it
    make_index(tmp_path / "train.tsv", "path\tsentence\tclient_id\r", f"common_voice_en_train\t{sentence}\ta\r")
    (utterance,) = read_manifest(prepare_common_voice(tmp_path, tmp_path / "out")[0])
    assert (utterance.text, utterance.speaker) == ("first second third fourth", "a")


def test_ljspeech_is_split_by_id_alone(tmp_path: Path) -> None:
    count = 2 * LJSPEECH_HELD_OUT + 20
    splits = read_all(prepare_ljspeech(make_ljspeech(tmp_path / "a", count), tmp_path / "out"))
    ids = {name: [u.id for u in utterances] for name, utterances in splits.items()}
    assert [len(i) for i in ids.values()] == [20, LJSPEECH_HELD_OUT, LJSPEECH_HELD_OUT]
    assert len(set().union(*ids.values())) == count
    assert splits["dev.jsonl"][0].text == "doctor so and so"
    lines = (tmp_path / "a/metadata.csv").read_text().splitlines()
    make_index(tmp_path / "a/metadata.csv", *reversed(lines))
    again = read_all(prepare_ljspeech(tmp_path / "a", tmp_path / "out"))
    assert {name: [u.id for u in utterances] for name, utterances in again.items()} == ids


def test_the_vocabulary_decides_how_texts_are_normalised(tmp_path: Path) -> None:
    make_librispeech(tmp_path / "dev-clean", {"19": 1})
    capitals = Vocabulary("ABCDEFGHIJKLMNOPQRSTUVWXYZ ")
    (path,) = prepare_librispeech(tmp_path, tmp_path / "out", vocabulary=capitals)
    assert read_manifest(path)[0].text == "IT S 19 TEXT"


# What cannot be used.


def test_what_is_left_out_is_counted_and_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_librispeech(tmp_path / "dev-clean", {"19": 12})
    chapter = tmp_path / "dev-clean/19/7"
    for n in range(6):
        (chapter / f"19-7-{n:04}.flac").unlink()
    (chapter / "19-7-0006.flac").write_bytes(b"not audio")
    make_audio(chapter / "19-7-0099.flac")
    index = chapter / "19-7.trans.txt"
    lines = index.read_text().splitlines()
    lines[7] = "19-7-0007 -"
    make_index(index, *lines, lines[8])
    (path,) = prepare_librispeech(tmp_path, tmp_path / "out")
    assert [u.id for u in read_manifest(path)] == [f"19-7-{n:04}" for n in range(8, 12)]
    report = capsys.readouterr().err
    missing = ", ".join(str(chapter / f"19-7-{n:04}.flac") for n in range(5))
    assert f"dev-clean: left out 6 of 14, missing audio file: {missing}, ...\n" in report
    assert f"left out 1 of 14, unreadable audio: {chapter / '19-7-0006.flac'}: " in report
    assert "left out 1 of 14, empty transcript: 19-7-0007\n" in report
    assert "left out 1 of 14, no transcript: 19-7-0099\n" in report
    assert "left out 1 of 14, listed before: 19-7-0008\n" in report
    assert f"{path}: 4 utterances, 0.00 hours, 1 speakers\n" in report


def test_an4_names_ids_that_only_one_index_has(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_an4(tmp_path)
    index = tmp_path / "etc/an4_train.transcription"
    index.write_text(index.read_text().replace("(an2-fash-b)", "(an2-fish-b)"))
    train = read_manifest(prepare_an4(tmp_path, tmp_path / "out")[0])
    assert [u.id for u in train] == ["cen3-fash-b", "an4-mdcs-b"]
    report = capsys.readouterr().err
    assert "no transcript: an2-fash-b\n" in report
    assert "not in an4_train.fileids: an2-fish-b\n" in report


def test_common_voice_names_a_line_that_is_cut(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_common_voice(tmp_path)
    with (tmp_path / "train.tsv").open("a") as f:
        f.write("someone\tcommon_voice")
    prepare_common_voice(tmp_path, tmp_path / "out")
    assert f"train: left out 1 of 2, not 4 columns: {tmp_path / 'train.tsv'}:3\n" in capsys.readouterr().err


def test_a_split_of_which_nothing_is_left_is_an_error_and_nothing_is_written(tmp_path: Path) -> None:
    make_librispeech(tmp_path / "dev-clean", {"19": 1})
    make_librispeech(tmp_path / "test-clean", {"26": 1})
    (tmp_path / "test-clean/26/7/26-7-0000.flac").unlink()
    with pytest.raises(CorpusError, match=r"test-clean: no usable utterance is left \(1 missing audio file\)"):
        prepare_librispeech(tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_source_of_another_layout_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match=r"no folder .*nowhere; name the corpus with --source"):
        prepare_an4(tmp_path / "nowhere", tmp_path / "out")
    for prepare, index in (
        (prepare_an4, "etc/an4_train.transcription"),
        (prepare_common_voice, "train.tsv"),
        (prepare_ljspeech, "metadata.csv"),
    ):
        with pytest.raises(CorpusError, match=f"no index {tmp_path}/{index}"):
            prepare(tmp_path, tmp_path / "out")
    with pytest.raises(CorpusError, match=r"none of train-clean-100, .* is there"):
        prepare_librispeech(tmp_path, tmp_path / "out")
    with pytest.raises(CorpusError, match=r"no folder .*/dev-other; unpack dev-other\.tar\.gz"):
        prepare_librispeech(tmp_path, tmp_path / "out", ["dev-other"])
    with pytest.raises(CorpusError, match=r"no split 'dev'; choose from train-clean-100, "):
        prepare_librispeech(tmp_path, tmp_path / "out", ["dev"])
    with pytest.raises(CorpusError, match=r"no folder .*/train-clean-5"):
        prepare_mini_librispeech(tmp_path, tmp_path / "out")


def test_a_malformed_index_names_its_line(tmp_path: Path) -> None:
    make_an4(tmp_path / "an4")
    with (tmp_path / "an4/etc/an4_test.transcription").open("a") as f:
        f.write("GO an407-fcaw-b\n")
    with pytest.raises(CorpusError, match=r"an4_test\.transcription:2: expected `TEXT \(id\)`"):
        prepare_an4(tmp_path / "an4", tmp_path / "out")
    make_index(tmp_path / "metadata.csv", "LJ001-0001|a|a", "LJ001-0002|b")
    with pytest.raises(CorpusError, match=r"metadata\.csv:2: expected `id\|raw text\|normalised text`"):
        prepare_ljspeech(tmp_path, tmp_path / "out")
    make_index(tmp_path / "train.tsv", "path\ttext\tclient_id")
    with pytest.raises(CorpusError, match=r"train\.tsv: no column 'sentence'"):
        prepare_common_voice(tmp_path, tmp_path / "out")
    make_librispeech(tmp_path / "dev-clean", {"19": 1})
    (tmp_path / "dev-clean/19/7/19-7.trans.txt").unlink()
    with pytest.raises(CorpusError, match=r"no index .*/19-7\.trans\.txt"):
        prepare_librispeech(tmp_path, tmp_path / "out")
    (tmp_path / "metadata.csv").write_bytes(b"LJ001-0001|\xff|a\n")
    with pytest.raises(CorpusError, match=r"metadata\.csv: cannot be read"):
        prepare_ljspeech(tmp_path, tmp_path / "out")


# Downloads, from a server on loopback with small archives of the real layout.


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Path, str]]:
    """A folder and the URL under which its files are served."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    folder = tmp_path / "served"
    folder.mkdir()
    with ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(folder))) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield folder, f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


def publish(served: tuple[Path, str], original: Archive, content: Path) -> Archive:
    """The archive of the same name and folder, packed from `content`."""
    folder, url = served
    name = original.url.rsplit("/", 1)[1]
    with tarfile.open(folder / name, "w:bz2" if name.endswith("bz2") else "w:gz") as tar:
        tar.add(content / original.folder, arcname=original.folder)
    md5 = hashlib.md5((folder / name).read_bytes()).hexdigest()
    return Archive(f"{url}/{name}", f"md5:{md5}", original.folder)


def test_downloaded_archives_are_ready_to_prepare(served: tuple[Path, str], tmp_path: Path) -> None:
    content, out = tmp_path / "content", tmp_path / "out"
    make_an4(content / "an4", ".sph")
    make_librispeech(content / "LibriSpeech/train-clean-5", {"19": 1})
    make_librispeech(content / "LibriSpeech/dev-clean-2", {"84": 1})
    make_ljspeech(content / "LJSpeech-1.1", 2 * LJSPEECH_HELD_OUT + 1)
    corpora = {"an4": prepare_an4, "mini-librispeech": prepare_mini_librispeech, "ljspeech": prepare_ljspeech}
    archives = {c: {s: publish(served, a, content) for s, a in ARCHIVES[c].items()} for c in corpora}
    for corpus, prepare in corpora.items():
        source = download_corpus(corpus, out / corpus, archives=archives)
        assert all(read_all(prepare(source, out / corpus)).values())
        # Below the manifest's folder audio is named relative to it, so that the folder can be moved.
        assert '"audio_filepath": "/' not in (out / corpus / "train.jsonl").read_text()


def test_prepare_downloads_and_prepares_by_one_command(
    served: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_an4(tmp_path / "content/an4", ".sph")
    archive = publish(served, ARCHIVES["an4"]["an4"], tmp_path / "content")
    monkeypatch.setitem(ARCHIVES, "an4", {"an4": archive})
    command = ["prepare", "an4", "--download", "--out", str(tmp_path / "out")]
    assert cli.main(command) == 0
    manifests = {name: (tmp_path / "out" / name).read_bytes() for name in ("train.jsonl", "dev.jsonl", "test.jsonl")}
    assert len(read_manifest(tmp_path / "out/train.jsonl")) == 3
    (served[0] / "an4_sphere.tar.gz").unlink()
    assert cli.main(command) == 0  # nothing is fetched again
    assert {name: (tmp_path / "out" / name).read_bytes() for name in manifests} == manifests
    (tmp_path / "out/an4_sphere.tar.gz").unlink()
    shutil.rmtree(tmp_path / "out/an4")
    assert cli.main(command) == cli.FAILURE


def test_librispeech_fetches_the_chosen_splits_once(served: tuple[Path, str], tmp_path: Path) -> None:
    content, out = tmp_path / "content", tmp_path / "out"
    for split in ("dev-clean", "test-clean"):
        make_librispeech(content / "LibriSpeech" / split, {"19": 1})
    official = ARCHIVES["librispeech"]
    archives = {"librispeech": {s: publish(served, official[s], content) for s in ("dev-clean", "test-clean")}}
    source = download_corpus("librispeech", out, ["test-clean"], archives=archives)
    assert [p.name for p in prepare_librispeech(source, out)] == ["test-clean.jsonl"]
    (served[0] / "test-clean.tar.gz").unlink()
    (out / "test-clean.tar.gz").unlink()  # to save space; it is unpacked
    download_corpus("librispeech", out, archives=archives)
    assert [p.name for p in prepare_librispeech(source, out)] == ["dev-clean.jsonl", "test-clean.jsonl"]


def test_a_corpus_that_was_deleted_is_unpacked_again(served: tuple[Path, str], tmp_path: Path) -> None:
    make_an4(tmp_path / "content/an4", ".sph")
    archives = {"an4": {"an4": publish(served, ARCHIVES["an4"]["an4"], tmp_path / "content")}}
    out = tmp_path / "out"
    shutil.rmtree(download_corpus("an4", out, archives=archives))
    assert len(prepare_an4(download_corpus("an4", out, archives=archives), out)) == 3


def test_downloads_that_cannot_be_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match=r"common-voice: .* only after a login; .* --source"):
        download_corpus("common-voice", tmp_path)
    with pytest.raises(CorpusError, match=r"no split 'dev'; choose from train-clean-5, dev-clean-2"):
        download_corpus("mini-librispeech", tmp_path, ["dev"])
    with pytest.raises(CorpusError, match=r"timit: no archive is known; choose from an4, librispeech, "):
        download_corpus("timit", tmp_path)


def test_every_split_of_librispeech_has_its_archive() -> None:
    assert tuple(ARCHIVES["librispeech"]) == LIBRISPEECH_SPLITS
    archives = [a for of_corpus in ARCHIVES.values() for a in of_corpus.values()]
    assert len({a.checksum for a in archives}) == len(archives)
    lengths = {"md5": 32, "sha256": 64}
    assert all(len(a.checksum.split(":")[1]) == lengths[a.checksum.split(":")[0]] for a in archives)


# The real corpora.


def assert_spelled(utterances: list[Utterance]) -> None:
    vocabulary = Vocabulary(DataConfig().characters)
    assert {u.id: vocabulary.unknown(u.text) for u in utterances if vocabulary.unknown(u.text)} == {}


def test_an4_as_published(corpora: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train, dev, test = read_all(prepare_an4(corpora / "an4", tmp_path)).values()
    assert (len(train), len(dev), len(test)) == (859, 89, 130)
    assert sum(len(u.text.split()) for u in test) == 773
    assert sum(len(u.text.split()) for u in dev) == 511
    assert speakers(dev) == set(AN4_DEV_SPEAKERS)
    assert (len(speakers(train)), len(speakers(test))) == (67, 10)
    assert not speakers(train) & speakers(dev)
    assert not speakers(test) & (speakers(train) | speakers(dev))
    assert tuple(sorted(str(s) for s in speakers(train) | speakers(dev))[4::10]) == AN4_DEV_SPEAKERS
    assert sum(u.duration for u in train + dev) / 3600 == pytest.approx(0.71, abs=0.005)
    assert_spelled(train + dev + test)
    assert "left out" not in capsys.readouterr().err


def test_mini_librispeech_as_published(corpora: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train, dev = read_all(prepare_mini_librispeech(corpora / "mini_librispeech", tmp_path)).values()
    assert (len(train) + len(dev), len(speakers(train)), len(speakers(dev))) == (1519, 23, 5)
    assert not speakers(train) & speakers(dev)
    assert sum(u.duration for u in train + dev) / 3600 == pytest.approx(5.31, abs=0.01)
    assert_spelled(train + dev)
    assert "left out" not in capsys.readouterr().err
