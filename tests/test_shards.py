"""Shards: what is packed is what is read, packing goes on where it stopped, and no damage passes in silence."""

import contextlib
import errno
import json
import os
import pickle
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxds2 import cli
from jaxds2.audio import AudioError, EncodedAudio
from jaxds2.config import Config, DataConfig, FeatureConfig, TrainingConfig
from jaxds2.data import shards
from jaxds2.data.audit import audit
from jaxds2.data.manifest import Utterance, manifest_digest, read_manifest, write_manifest
from jaxds2.data.pipeline import load_batches
from jaxds2.data.plan import BatchPlan
from jaxds2.data.shards import Recordings, ShardError, partition, read_utterances, shard_faults, write_shards
from jaxds2.files import WriteError
from jaxds2.text import Vocabulary
from jaxds2.training.selection import read_dev_data, read_training_data, training_plan

RATE = 16_000
FORMATS = (
    ("wav", "WAV", "PCM_16"),
    ("flac", "FLAC", "PCM_16"),
    ("opus", "OGG", "OPUS"),
    ("mp3", "MP3", "MPEG_LAYER_III"),
)
VOCABULARY = Vocabulary("abc ")
COUNT = 12
SHARD_BYTES = 30_000


def record_corpus(folder: Path, name: str = "u") -> Path:
    """A manifest of twelve recordings in four formats, 5 to 40 kB each."""
    rng = np.random.default_rng(0)
    utterances = []
    for i in range(COUNT):
        suffix, container, subtype = FORMATS[i % len(FORMATS)]
        path = folder / "audio" / f"{name}{i}.{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        samples = 9600 + 800 * i
        soundfile.write(path, rng.normal(0, 0.1, samples), RATE, format=container, subtype=subtype)
        utterances.append(Utterance(f"{name}{i}", path, samples / RATE, "abc"[i % 3] * (1 + i % 4), f"speaker {i % 2}"))
    write_manifest(folder / "train.jsonl", utterances)
    return folder / "train.jsonl"


def pack(manifest: Path, out: Path, **options) -> Path:
    return write_shards(manifest, out, **{"shard_bytes": SHARD_BYTES, "workers": 1, "progress": False} | options)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return record_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def packed(corpus: Path) -> Path:
    """Not to be changed; see `copied`."""
    return pack(corpus, corpus.parent / "shards").parent


@pytest.fixture
def copied(packed: Path, tmp_path: Path) -> Path:
    """Shards that a test may spoil."""
    shutil.copytree(packed, tmp_path / "shards")
    return tmp_path / "shards"


def content(folder: Path) -> dict[str, bytes]:
    """Every file but the lock, which names a process."""
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.name != "lock"}


def shard_names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.glob("*.arrayrecord"))


def recording(recordings: Recordings, utterance: Utterance) -> bytes:
    found = recordings.of(utterance)
    assert isinstance(found, EncodedAudio)
    return found.content


def refusal(capfd: pytest.CaptureFixture[str], *arguments: object, code: int = 1) -> str:
    """The one line of a command that fails."""
    capfd.readouterr()
    try:
        got = cli.main([str(a) for a in arguments])
    except SystemExit as e:  # argparse
        got = e.code
    err = capfd.readouterr().err
    assert got == code, err
    (line,) = (x for x in err.replace("\r", "\n").split("\n") if "error: " in x)
    assert "Traceback" not in err
    return line


# What is packed is what is read.


@given(st.lists(st.integers(0, 50)), st.integers(1, 100))
def test_shards_take_what_fits_in_order(sizes: list[int], limit: int):
    ranges = partition(sizes, limit)
    assert [i for start, stop in ranges for i in range(start, stop)] == list(range(len(sizes)))
    for number, (start, stop) in enumerate(ranges):
        assert stop > start
        assert sum(sizes[start:stop]) <= limit or stop == start + 1
        if number + 1 < len(ranges):
            assert sum(sizes[start : stop + 1]) > limit


characters = st.characters(exclude_categories=["Cs"])
recorded = st.lists(
    st.tuples(
        st.text(characters, min_size=1), st.floats(0, 14_400), st.text(characters), st.none() | st.text(characters)
    )
    .filter(lambda fields: fields[0].strip() != "")
    .flatmap(lambda fields: st.tuples(st.just(fields), st.binary(max_size=300))),
    min_size=1,
    max_size=12,
    unique_by=lambda entry: entry[0][0],
)


@settings(max_examples=40)
@given(recorded, st.integers(1, 900))
def test_what_is_packed_is_read_back(tmp_path_factory: pytest.TempPathFactory, entries, shard_bytes: int):
    folder = tmp_path_factory.mktemp("any")
    lines = []
    for i, ((name, duration, text, speaker), audio) in enumerate(entries):
        (folder / f"{i}.x").write_bytes(audio)
        line = {"audio_filepath": f"{i}.x", "id": name, "duration": duration, "text": text, "speaker": speaker}
        lines.append(json.dumps(line) + "\n")
    manifest = folder / "m.jsonl"
    manifest.write_text("".join(lines), encoding="utf-8")
    given_utterances = read_manifest(manifest)
    pack(manifest, folder / "out", shard_bytes=shard_bytes)
    found = read_utterances(folder / "out")
    with Recordings() as recordings:
        assert [recording(recordings, u) for u in found] == [audio for _, audio in entries]
    back = [
        replace(u, audio_filepath=v.audio_filepath, shard_record=None)
        for u, v in zip(found, given_utterances, strict=True)
    ]
    assert back == given_utterances
    assert manifest_digest(found) == manifest_digest(given_utterances)
    assert len(shard_names(folder / "out")) == len(partition([len(a) for _, a in entries], shard_bytes))
    assert shard_faults(folder / "out", found, checksums=True) == []


def test_the_bytes_do_not_depend_on_the_number_of_processes(corpus: Path, packed: Path, tmp_path: Path):
    pack(corpus, tmp_path / "two", workers=2)
    assert content(tmp_path / "two") == content(packed)
    assert len(shard_names(packed)) > 4


def test_a_folder_of_shards_may_be_moved(packed: Path, copied: Path, corpus: Path):
    (copied / "deeper").mkdir()
    moved = copied.rename(copied.with_name("moved"))
    with Recordings() as recordings:
        for u, original in zip(read_utterances(moved), read_manifest(corpus), strict=True):
            assert recording(recordings, u) == original.audio_filepath.read_bytes()


# Training cannot tell shards from a manifest.


def make_plan(utterances: list[Utterance]) -> BatchPlan:
    data = DataConfig(batch_seconds=4, num_buckets=3, rows_multiple=2)
    durations, lengths = [u.duration for u in utterances], [len(u.text) for u in utterances]
    return BatchPlan(durations, lengths, digest=manifest_digest(utterances), data=data, seed=3, speed=0.1)


def load(utterances: list[Utterance], workers: int):
    plan = make_plan(utterances)
    stop = plan.steps_for_epochs(2)
    with load_batches(utterances, plan, vocabulary=VOCABULARY, stop_step=stop, workers=workers) as batches:
        return list(batches)


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_batches_from_shards_are_those_from_the_manifest(corpus: Path, tmp_path: Path, workers: int):
    listed = read_manifest(corpus)
    spoilt = tmp_path / "spoilt.opus"  # its failure is the same too
    spoilt.write_bytes(listed[6].audio_filepath.read_bytes()[:-100])
    manifest = tmp_path / "m.jsonl"
    write_manifest(manifest, [*listed[:6], replace(listed[6], audio_filepath=spoilt), *listed[7:]])
    from_files = load(read_manifest(manifest), 0)
    from_shards = load(read_utterances(pack(manifest, tmp_path / "shards")), workers)
    assert len(from_files) == len(from_shards) > 4
    for a, b in zip(from_files, from_shards, strict=True):
        assert a.step == b.step
        for f in fields(a.batch):
            x, y = getattr(a.batch, f.name), getattr(b.batch, f.name)
            assert x.dtype == y.dtype
            np.testing.assert_array_equal(x, y)
        assert [name for name, _ in a.failures] == [name for name, _ in b.failures]
    failures = [x for b in from_shards for x in b.failures]
    assert len(failures) == 2
    assert all("spoilt.opus: truncated" in why and ".arrayrecord[" in why for _, why in failures)


def test_a_config_names_shards_where_it_names_manifests(corpus: Path, packed: Path):
    def chosen(train: Path, dev: Path) -> tuple[list[str], BatchPlan, list[str]]:
        data = DataConfig(train=(str(train),), dev=str(dev), characters="abc ", batch_seconds=4, min_duration=0.7)
        config = Config("x", data=data, training=TrainingConfig(epochs=1))
        kept, left_out = read_training_data(config, VOCABULARY)
        assert left_out == {"shorter than 0.7 s": ["u0", "u1"]}
        return (
            [u.id for u in kept],
            training_plan(config, kept, VOCABULARY),
            [u.id for u in read_dev_data(config, VOCABULARY)],
        )

    of_manifest, of_folder, of_index = (chosen(p, p) for p in (corpus, packed, packed / "index.jsonl"))
    for ids, plan, dev in (of_folder, of_index):
        assert (ids, dev) == (of_manifest[0], of_manifest[2])
        for step in range(plan.steps_for_epochs(3)):
            a, b = of_manifest[1].step(step), plan.step(step)
            assert (a.epoch, a.bucket) == (b.epoch, b.bucket)
            np.testing.assert_array_equal(a.indices_B, b.indices_B)


def check(*manifests: Path):
    return audit(
        manifests, vocabulary=VOCABULARY, features=FeatureConfig(), output_frames=lambda n: n // 640, progress=False
    )


def test_an_audit_finds_in_shards_what_it_finds_in_the_manifest(corpus: Path, tmp_path: Path):
    listed = read_manifest(corpus)
    (tmp_path / "text.wav").write_text("no audio")
    listed[2] = replace(listed[2], audio_filepath=tmp_path / "text.wav")
    listed[3] = replace(listed[3], duration=9.0, text="")
    write_manifest(tmp_path / "m.jsonl", listed)
    files = check(tmp_path / "m.jsonl")
    packed = check(pack(tmp_path / "m.jsonl", tmp_path / "shards").parent)
    assert files.errors == packed.errors == {"unreadable": 1, "wrong duration": 1, "empty text": 1}
    assert [(f.kind, f.utterance) for f in files.findings] == [(f.kind, f.utterance) for f in packed.findings]
    assert files.hours == packed.hours


def test_shards_of_a_test_set_go_by_the_name_of_their_folder(corpus: Path, packed: Path, tmp_path: Path):
    pack(corpus, tmp_path / "test")
    for test in (tmp_path / "test", tmp_path / "test/index.jsonl"):
        assert check(corpus, test).errors == {"speaker shared with test": 2}
    with pytest.raises(ValueError, match="given 2 times"):
        check(packed, packed / "index.jsonl")


# Packing goes on where it stopped.


def stamps(folder: Path) -> dict[str, int]:
    return {p.name: p.stat().st_mtime_ns for p in folder.iterdir() if p.name != "lock"}


@pytest.mark.parametrize("finished", range(7))
def test_packing_that_was_stopped_goes_on(
    corpus: Path, packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, finished: int
):
    names = shard_names(packed)
    finished = min(finished, len(names))
    out = tmp_path / "shards"
    original, calls = shards._write_shard, []

    def stops(path, *rest):
        if len(calls) == finished:
            path.with_name(path.name + ".partial").write_bytes(b"as a kill leaves it")
            raise KeyboardInterrupt
        calls.append(path.name)
        return original(path, *rest)

    def stops_before_the_index(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(shards, "_write_shard", stops)
        patched.setattr(shards, "_write_index", stops_before_the_index)
        with pytest.raises(KeyboardInterrupt):
            pack(corpus, out)
    assert shard_names(out) == names[:finished]
    with pytest.raises(ValueError, match=r"a folder without index\.jsonl: no shards, or not all of them yet"):
        read_utterances(out)
    before = stamps(out)
    pack(corpus, out)
    after = stamps(out)
    assert all(after[name] == before[name] for name in names[:finished])
    assert content(out) == content(packed)
    pack(corpus, out)
    assert stamps(out) == after


STOPS_AT_TWO = """
import sys, time
from jaxds2 import cli
from jaxds2.data import shards
write = shards._write_contents
def write_and_stay(folder, contents):
    write(folder, contents)
    if len(contents.shards) == 2:
        print("two are listed", flush=True)
        time.sleep(600)
shards._write_contents = write_and_stay
cli.main(sys.argv[1:])
"""


def test_a_packing_keeps_others_out_and_when_it_is_killed_leaves_no_worker(
    corpus: Path, packed: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    out = tmp_path / "shards"
    command = ["shard", str(corpus), "--out", str(out), "--shard-size", str(SHARD_BYTES / 1e6), "--workers", "2"]
    program = [sys.executable, "-c", STOPS_AT_TWO, *command]
    with subprocess.Popen(program, stdout=subprocess.PIPE, text=True, start_new_session=True) as first:
        try:
            assert first.stdout is not None
            assert first.stdout.readline() == "two are listed\n"
            line = refusal(capfd, *command)
            assert line.startswith(f"error: {out}: process {first.pid} on ")
            assert line.endswith(" packs here; stop it first, or choose another folder with --out")
            first.kill()
            first.communicate(timeout=60)  # ends when the last worker does: they write to the same pipe
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(first.pid, signal.SIGKILL)
    assert not (out / "index.jsonl").exists()
    assert cli.main(command) == 0
    assert content(out) == content(packed)


def test_a_shard_that_was_finished_but_not_listed_is_packed_again(corpus: Path, packed: Path, copied: Path):
    listed = json.loads((copied / "shards.json").read_text())
    dropped = listed["shards"].pop(1)["name"]
    (copied / "shards.json").write_text(json.dumps({**listed, "index_sha256": None}))
    (copied / "index.jsonl").unlink()
    (copied / dropped).write_bytes(b"half")
    pack(corpus, copied)
    assert content(copied) == content(packed)


def test_a_finished_shard_that_was_damaged_is_named_and_packed_again(
    corpus: Path, packed: Path, copied: Path, capfd: pytest.CaptureFixture[str]
):
    flip(copied / shard_names(copied)[1], 20_000)
    (copied / shard_names(copied)[3]).unlink()
    pack(corpus, copied, workers=2)
    err = capfd.readouterr().err
    assert "shard-00001.arrayrecord: SHA-256 is" in err
    assert "shard-00003.arrayrecord: no such shard" in err
    assert ", 2 packed now" in err
    assert content(copied) == content(packed)


# Damage never passes in silence.


def flip(path: Path, position: int, bit: int = 0) -> None:
    damaged = bytearray(path.read_bytes())
    damaged[position] ^= 1 << bit
    path.write_bytes(damaged)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1000])


def swap(path: Path) -> None:
    """A shard of another manifest that has the same size."""
    folder = path.parent.parent / "other"
    pack(record_corpus(folder, "v"), folder / "shards")
    other = folder / "shards" / path.name
    assert other.stat().st_size == path.stat().st_size
    other.replace(path)


DAMAGE: dict[str, tuple[Callable[[Path], None], str, bool]] = {
    # how, what is said, whether the size tells
    "truncated": (cut, "truncated, or of another manifest", True),
    "flipped": (lambda path: flip(path, 20_000), "SHA-256 is", False),
    "missing": (lambda path: path.unlink(), "no such shard", True),
    "of another manifest": (swap, "SHA-256 is", False),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_bad_shard_is_one_line(copied: Path, kind: str, capfd: pytest.CaptureFixture[str], tmp_path: Path):
    damage, says, size_tells = DAMAGE[kind]
    bad = copied / shard_names(copied)[1]
    damage(bad)
    assert cli.main(["check", str(copied), "--json", str(tmp_path / "found.json")]) == 1
    found = json.loads((tmp_path / "found.json").read_text())
    (finding,) = (f for f in found["findings"] if f["kind"] == "damaged shard")
    assert finding["detail"].startswith(f"{bad}: ")
    assert says in finding["detail"]
    assert "1 damaged shard" in capfd.readouterr().out

    config = tmp_path / "config.py"
    config.write_text(
        "from jaxds2.config import *\ndef get_config():\n"
        f"    return Config('x', data=DataConfig(train=({str(copied)!r},)), training=TrainingConfig(steps=1))\n"
    )
    if size_tells:
        line = refusal(capfd, "train", "--config", config, "--run", tmp_path / "run")
        assert line.startswith(f"error: {bad}: ")
        assert says in line
    else:
        read_utterances(copied)
    with Recordings() as recordings:
        faults = [fault for u in read_manifest(copied) if (fault := refused(recordings, u))]
    assert faults
    assert all(fault.startswith(f"{bad}: ") and "\n" not in fault for fault in faults)


def refused(recordings: Recordings, utterance: Utterance) -> str | None:
    """Why its recording cannot be had."""
    try:
        recordings.of(utterance)
    except AudioError as e:
        return str(e)
    return None


@settings(max_examples=100)
@given(st.data())
def test_a_flipped_bit_is_found_and_never_read(
    packed: Path, corpus: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
):
    folder = tmp_path_factory.getbasetemp() / "flipped"
    shutil.copytree(packed, folder, dirs_exist_ok=True)
    path = folder / data.draw(st.sampled_from(shard_names(packed)))
    flip(path, data.draw(st.integers(0, path.stat().st_size - 1)), data.draw(st.integers(0, 7)))
    utterances = read_utterances(folder)
    (fault,) = shard_faults(folder, utterances, checksums=True)
    assert fault.startswith(f"{path}: SHA-256 is")
    with Recordings() as recordings:
        for u, original in zip(utterances, read_manifest(corpus), strict=True):
            if fault := refused(recordings, u):
                assert fault.startswith(f"{path}: ")
            else:
                assert recording(recordings, u) == original.audio_filepath.read_bytes()


@settings(max_examples=30)
@given(st.data())
def test_a_truncated_shard_is_found_and_never_read(
    packed: Path, corpus: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
):
    folder = tmp_path_factory.getbasetemp() / "truncated"
    shutil.copytree(packed, folder, dirs_exist_ok=True)
    path = folder / data.draw(st.sampled_from(shard_names(packed)))
    path.write_bytes(path.read_bytes()[: data.draw(st.integers(0, path.stat().st_size - 1))])
    with pytest.raises(ShardError, match="truncated"):
        read_utterances(folder)
    with Recordings() as recordings:
        for u, original in zip(read_manifest(folder), read_manifest(corpus), strict=True):
            if u.audio_filepath == path:
                with pytest.raises(AudioError, match=r"truncated or damaged|holds 0 records|is damaged"):
                    recordings.of(u)
            else:
                assert recording(recordings, u) == original.audio_filepath.read_bytes()


def test_a_record_of_another_utterance_is_refused(packed: Path):
    first, second, *_, last = read_utterances(packed)
    with Recordings() as recordings:
        with pytest.raises(AudioError, match=r"record 0 is 'u0', 'u1' is asked for: a shard of another manifest\?"):
            recordings.find(first.audio_filepath, 0, second.id)
        with pytest.raises(AudioError, match="number 99 is asked for"):
            recordings.find(last.audio_filepath, 99, last.id)


def test_a_file_of_arrayrecord_that_is_not_ours_is_refused(tmp_path: Path):
    from array_record.python.array_record_module import ArrayRecordWriter

    writer = ArrayRecordWriter(str(tmp_path / "x"), "group_size:1")
    for record in (
        b"",
        b"abc",
        b"\xff\xff\xff\xffabc",
        b"\x02\x00\x00\x00{}",
        b"\x02\x00\x00\x0012",
        b"\x01\x00\x00\x00{",
    ):
        writer.write(record)
    writer.close()
    with Recordings() as recordings:
        for number in range(6):
            with pytest.raises(AudioError, match=f"record {number} is no recording of `jaxds2 shard`"):
                recordings.find(tmp_path / "x", number, "u")


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda f: (f / "shards.json").unlink(), "shards.json: missing"),
        (lambda f: (f / "shards.json").write_text("{"), "shards.json: cannot be read"),
        (lambda f: (f / "shards.json").write_text('{"version": 1}'), "shards.json: cannot be read"),
        (lambda f: (f / "shards.json").write_text('{"version": 2}'), "shards.json: of version 2, this jaxds2 reads 1"),
        (lambda f: drop_line(f / "index.jsonl"), "is not the index that was written with the shards"),
        (
            lambda f: edit(f / "index.jsonl", "shard-00001", "shard-00077"),
            "shard-00077.arrayrecord: .* knows of no record",
        ),
    ],
)
def test_an_index_that_does_not_fit_its_shards_is_one_line(
    copied: Path, spoil, says: str, capfd: pytest.CaptureFixture[str]
):
    spoil(copied)
    with pytest.raises(ShardError, match=says) as caught:
        read_utterances(copied)
    assert "\n" not in str(caught.value)
    assert cli.main(["check", str(copied)]) == 1
    assert "damaged shard" in capfd.readouterr().out


def edit(path: Path, old: str, new: str) -> None:
    path.write_text(path.read_text().replace(old, new))


def drop_line(path: Path) -> None:
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))


def test_a_manifest_may_pick_from_shards(packed: Path, tmp_path: Path):
    picked = read_manifest(packed)[::5]
    write_manifest(tmp_path / "picked.jsonl", picked)
    assert read_utterances(tmp_path / "picked.jsonl") == picked
    with pytest.raises(ShardError, match="its recordings are in shards already"):
        pack(tmp_path / "picked.jsonl", tmp_path / "out")


# What cannot be packed is said, and nothing is left out.


def test_missing_recordings_are_named_and_counted_before_anything_is_packed(
    corpus: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    listed = read_manifest(corpus)
    gone = [replace(u, audio_filepath=tmp_path / f"gone{i}.wav") for i, u in enumerate(listed[:7])]
    write_manifest(tmp_path / "m.jsonl", [*gone, *listed[7:-1], replace(listed[-1], audio_filepath=tmp_path)])
    line = refusal(capfd, "shard", tmp_path / "m.jsonl", "--out", tmp_path / "out")
    assert "8 of 12 recordings cannot be packed" in line
    assert all(f"gone{i}.wav: No such file" in line for i in range(5))
    assert "and 3 more" in line
    assert not (tmp_path / "out").exists()
    write_manifest(tmp_path / "m.jsonl", [*listed[:-1], replace(listed[-1], audio_filepath=tmp_path)])
    assert f"{tmp_path}: not a file" in refusal(capfd, "shard", tmp_path / "m.jsonl", "--out", tmp_path / "out")


@pytest.mark.parametrize("workers", [1, 2])
def test_recordings_that_go_while_packing_leave_no_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int):
    manifest, out = record_corpus(tmp_path), tmp_path / "out"
    first, second, *_ = (u.audio_filepath for u in read_manifest(manifest))
    kept, claim = first.read_bytes(), shards._claim

    def lose(*arguments):
        first.unlink()
        second.write_bytes(b"shorter")
        return claim(*arguments)

    grown = second.read_bytes()
    with monkeypatch.context() as patched:
        patched.setattr(shards, "_claim", lose)
        with pytest.raises(ShardError) as caught:
            pack(manifest, out, workers=workers)
    message = str(caught.value)
    assert "2 of 12 recordings could not be packed" in message
    assert f"{first}: No such file" in message
    assert f"{second}: 7 bytes, {len(grown)} when packing began" in message
    assert shard_names(out) == [s["name"] for s in json.loads((out / "shards.json").read_text())["shards"]] != []
    assert sorted(content(out)) == [*shard_names(out), "shards.json"]  # no index, and nothing half
    first.write_bytes(kept)
    second.write_bytes(grown)
    pack(manifest, out, workers=workers)
    assert len(read_utterances(out)) == COUNT


@pytest.mark.parametrize("workers", [1, 2])
def test_a_full_disk_is_one_line_and_what_is_there_stays(corpus: Path, packed: Path, tmp_path: Path, workers: int):
    out = tmp_path / "out"
    pack(corpus, out)
    big = shard_names(out)[1]
    (out / big).unlink()
    before = content(out)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, hard))
    try:
        with pytest.raises(WriteError) as caught:
            pack(corpus, out, workers=workers)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert str(caught.value) == (
        f"{out / big}: cannot be written (File too large); make room, then run the same command again"
    )
    assert content(out) == before
    pack(corpus, out)
    assert content(out) == content(packed)


def test_a_read_only_folder_is_one_line(corpus: Path, tmp_path: Path, monkeypatch, capfd: pytest.CaptureFixture[str]):
    def refuse(*_, **__):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    with monkeypatch.context() as patched:
        patched.setattr(Path, "mkdir", refuse)
        line = refusal(capfd, "shard", corpus, "--out", tmp_path / "new", "--workers", 1)
        assert line.startswith(f"error: {tmp_path}/new/lock: cannot be written (Read-only file system); make")
        assert line.endswith("or choose another folder with --out")
    with monkeypatch.context() as patched:
        patched.setattr("os.replace", refuse)
        line = refusal(capfd, "shard", corpus, "--out", tmp_path / "new", "--workers", 1)
        assert "cannot be written (Read-only file system)" in line
    (tmp_path / "file").touch()
    line = refusal(capfd, "shard", corpus, "--out", tmp_path / "file", "--workers", 1)
    assert line == f"error: {tmp_path}/file: a file, not a folder; choose another with --out"


def test_a_shard_that_cannot_be_opened_is_refused(tmp_path: Path):
    """array_record says so at the first record."""
    with pytest.raises(OSError, match="No such file or directory"), shards._writing(tmp_path / "gone/x") as write:
        write(b"record")


def test_a_folder_that_holds_something_else_is_left_alone(
    corpus: Path, copied: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    before = content(copied)
    size = ("--shard-size", SHARD_BYTES / 1e6, "--workers", 1)
    listed = read_manifest(corpus)
    manifest = tmp_path / "m.jsonl"
    write_manifest(manifest, listed[1:])
    line = refusal(capfd, "shard", manifest, "--out", copied, *size)
    assert f"{copied}: holds shards of another manifest than {manifest}" in line
    line = refusal(capfd, "shard", corpus, "--out", copied, "--shard-size", 1)
    assert f"{copied}: holds shards of 0.03 MB, not 1" in line
    longer = tmp_path / "longer.wav"
    longer.write_bytes(listed[0].audio_filepath.read_bytes() + b"x")
    write_manifest(manifest, [replace(listed[0], audio_filepath=longer), *listed[1:]])
    assert "have changed since it was packed there" in refusal(capfd, "shard", manifest, "--out", copied, *size)
    write_manifest(manifest, [replace(listed[0], speaker="another"), *listed[1:]])
    assert "have changed since it was packed there" in refusal(capfd, "shard", manifest, "--out", copied, *size)
    assert content(copied) == before
    for name in ("index.jsonl", "shard-00000.arrayrecord"):
        foreign = tmp_path / name.partition(".")[0]
        foreign.mkdir()
        (foreign / name).touch()
        assert f"{foreign / name}: is there, but no shards.json" in refusal(
            capfd, "shard", corpus, "--out", foreign, *size
        )
        assert os.listdir(foreign) == [name]


def test_wrong_use_is_two(corpus: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    out = ("--out", tmp_path / "out")
    assert "gone.jsonl does not exist" in refusal(capfd, "shard", tmp_path / "gone.jsonl", *out, code=2)
    for size in (0, -1, "nan", "inf"):
        assert "expected megabytes" in refusal(capfd, "shard", corpus, *out, "--shard-size", size, code=2)
    assert "must be 1 or more" in refusal(capfd, "shard", corpus, *out, "--workers", 0, code=2)
    assert "--out" in refusal(capfd, "shard", corpus, code=2)
    assert not (tmp_path / "out").exists()


# Shards are opened when they are needed, and closed.


def open_shards() -> list[str]:
    links = []
    for number in os.listdir("/proc/self/fd"):
        try:
            links.append(os.readlink(f"/proc/self/fd/{number}"))
        except OSError:
            continue
    return [link for link in links if link.endswith(".arrayrecord")]


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="no /proc to look at open files in")
def test_shards_are_opened_when_needed_and_closed(packed: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(shards, "OPEN_SHARDS", 2)
    utterances = read_utterances(packed)
    with Recordings() as recordings:
        assert open_shards() == []
        recordings.of(utterances[0])
        assert open_shards() == [str(utterances[0].audio_filepath)]
        for u in utterances:
            recordings.of(u)
            assert str(u.audio_filepath) in open_shards()
            assert len(open_shards()) <= 2
        elsewhere = pickle.loads(pickle.dumps(recordings))
        assert len(open_shards()) == 2
        assert recording(elsewhere, utterances[0]) == recording(recordings, utterances[0])
        elsewhere.close()
    assert open_shards() == []
    recordings.of(utterances[0])  # by a thread that had not heard of the end
    assert open_shards() == []
    plan = make_plan(utterances)
    with load_batches(utterances, plan, vocabulary=VOCABULARY) as batches:
        next(batches)
        assert open_shards()
    for _ in range(100):  # the loader's threads end with the step that they are at
        if not open_shards():
            break
        time.sleep(0.1)
    assert open_shards() == []


def test_threads_may_share_recordings(packed: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(shards, "OPEN_SHARDS", 2)  # so that shards are closed under each other's hands
    utterances = read_utterances(packed)
    expected = {u.id: u.audio_filepath.read_bytes() for u in read_manifest(corpus)}
    wrong: list[str] = []

    def read(seed: int) -> None:
        for i in np.random.default_rng(seed).integers(0, COUNT, 500):
            if recording(recordings, utterances[i]) != expected[utterances[i].id]:
                wrong.append(utterances[i].id)

    with Recordings() as recordings:
        threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert wrong == []
