"""Manifests: what is written is read back, and each bad line is one line that names file and line."""

import dataclasses
import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxds2.audio import MAX_DURATION
from jaxds2.data.manifest import ManifestError, Utterance, manifest_digest, read_manifest, write_manifest

GOOD = {"audio_filepath": "a.wav", "duration": 1.5, "text": "hello"}
UTTERANCES = (
    Utterance("a", Path("/c/wav/a.wav"), 1.5, "hello", "ann"),
    Utterance("b", Path("/c/wav/b.wav"), 2.25, "don't", None),
)


def write_lines(path: Path, *lines: str) -> Path:
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


def refusal(path: Path) -> str:
    with pytest.raises(ManifestError) as caught:
        read_manifest(path)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith((str(path), f"no manifest {path}"))
    return message


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "not JSON"),
        ('["a"]', "expected an object with audio_filepath, duration and text"),
        ("3", "expected an object"),
        (json.dumps({**GOOD, "text": "a\ud83d"}), "holds one half of a surrogate pair"),
        *((json.dumps({k: v for k, v in GOOD.items() if k != key}), f"missing key '{key}'") for key in GOOD),
        (json.dumps({**GOOD, "duration": "1.5"}), "duration is '1.5', expected a number"),
        (json.dumps({**GOOD, "duration": True}), "duration is True, expected a number"),
        (json.dumps({**GOOD, "duration": -1}), "duration is -1, expected seconds"),
        (json.dumps({**GOOD, "duration": float("nan")}), "duration is nan, expected seconds"),
        (json.dumps({**GOOD, "duration": float("inf")}), "duration is inf, expected seconds"),
        (json.dumps({**GOOD, "duration": 1e300}), "duration is 1e+300, expected seconds, 0 to 14400"),
        (json.dumps({**GOOD, "duration": 10**400}), "duration is 10000000000000000000..., expected seconds"),
        (json.dumps({**GOOD, "duration": 14400.001}), "duration is 14400.001, expected seconds, 0 to 14400"),
        ("[" * 100_000, "brackets nested too deeply"),
        (json.dumps({**GOOD, "text": None}), "text is None, expected a string"),
        (json.dumps({**GOOD, "audio_filepath": 3}), "audio_filepath is 3, expected a string"),
        (json.dumps({**GOOD, "audio_filepath": ""}), "audio_filepath is empty"),
        (json.dumps({**GOOD, "id": "u", "shard_record": -1}), "shard_record is -1, expected the number of a recording"),
        (json.dumps({**GOOD, "id": "u", "shard_record": True}), "shard_record is True, expected the number"),
        (json.dumps({**GOOD, "id": "u", "shard_record": "1"}), "shard_record is '1', expected the number"),
        (json.dumps({**GOOD, "id": "u", "shard_record": 2**40}), "shard_record is 1099511627776, expected the number"),
        (json.dumps({**GOOD, "shard_record": 1}), "missing key 'id'"),
    ],
)
def test_a_bad_line_is_named_by_file_and_line(tmp_path: Path, line: str, said: str):
    path = write_lines(tmp_path / "m.jsonl", json.dumps({**GOOD, "id": "first"}), "", line)
    message = refusal(path)
    assert message.startswith(f"{path}:3: ")
    assert said in message


def test_an_id_twice_names_both_lines(tmp_path: Path):
    path = write_lines(tmp_path / "m.jsonl", json.dumps(GOOD), json.dumps({**GOOD, "audio_filepath": "b/a.flac"}))
    own = "give each line an `id` of its own (default: the file's stem)"
    assert refusal(path) == f"{path}:2: id 'a' was already used in line 1; {own}"


def test_an_id_may_be_zero_and_the_first_line_may_have_a_byte_order_mark(tmp_path: Path):
    path = tmp_path / "m.jsonl"
    lines = [json.dumps({**GOOD, "id": i}) for i in (0, 1)]
    path.write_text("\n".join(lines), encoding="utf-8-sig")
    assert [u.id for u in read_manifest(path)] == ["0", "1"]


def test_all_bad_lines_are_named_at_once(tmp_path: Path):
    path = tmp_path / "m.jsonl"
    good = '{"audio_filepath": "a.wav", "duration": 1, "text": "a"}\n'
    path.write_text(good + "{\n" + good + "7\n" * 6)
    message = refusal(path)
    assert "\n" not in message
    assert message.startswith(f"{path}: 8 bad lines: 2: not JSON")
    assert "| 3: id 'a' was already used in line 1; give each line an `id` of its own" in message
    assert " | 4: expected an object" in message
    assert message.endswith("| and 3 more")


def test_a_manifest_without_utterances_is_refused(tmp_path: Path):
    assert "holds no utterances" in refusal(write_lines(tmp_path / "m.jsonl", "", "  "))


def test_a_missing_manifest_says_how_to_write_one(tmp_path: Path):
    assert "jaxds2 prepare" in refusal(tmp_path / "nothing.jsonl")


def test_a_file_that_is_no_text_and_a_folder_are_refused(tmp_path: Path):
    (tmp_path / "m.jsonl").write_bytes(b"RIFF\xff\xfe\x00")
    assert refusal(tmp_path / "m.jsonl").endswith("m.jsonl:1: not UTF-8 (invalid start byte at byte 4)")
    (tmp_path / "folder").mkdir()
    assert "a folder without index.jsonl" in refusal(tmp_path / "folder")
    (tmp_path / "folder/index.jsonl").mkdir()
    with pytest.raises(ManifestError, match=r"index\.jsonl: cannot be read"):
        read_manifest(tmp_path / "folder")


def test_defaults_and_keys_of_other_tools(tmp_path: Path):
    lines = (json.dumps({**GOOD, "offset": 0.0}), json.dumps({**GOOD, "id": 7, "speaker": 12}))
    first, second = read_manifest(write_lines(tmp_path / "m.jsonl", *lines))
    assert (first.id, first.speaker) == ("a", None)
    assert (second.id, second.speaker) == ("7", "12")


def test_characters_may_be_escaped(tmp_path: Path):
    (utterance,) = read_manifest(write_lines(tmp_path / "m.jsonl", json.dumps({**GOOD, "text": "é\U0001f600"})))
    assert utterance.text == "é\U0001f600"


def test_a_recording_may_be_as_long_as_an_audio_file(tmp_path: Path):
    (utterance,) = read_manifest(write_lines(tmp_path / "m.jsonl", json.dumps({**GOOD, "duration": 14400})))
    assert utterance.duration == MAX_DURATION


def test_audio_is_relative_to_the_manifest_not_to_the_working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write_manifest(tmp_path / "corpus/m.jsonl", [Utterance("a", tmp_path / "corpus/wav/a.wav", 1.0, "x")])
    (tmp_path / "corpus").rename(tmp_path / "moved")
    monkeypatch.chdir(tmp_path)
    (utterance,) = read_manifest("moved/m.jsonl")
    assert utterance.audio_filepath.resolve() == tmp_path / "moved/wav/a.wav"


def test_audio_elsewhere_is_named_by_its_absolute_path(tmp_path: Path):
    write_manifest(tmp_path / "m.jsonl", UTTERANCES)
    assert [u.audio_filepath for u in read_manifest(tmp_path / "m.jsonl")] == [u.audio_filepath for u in UTTERANCES]


texts = st.text(st.characters(exclude_categories=["Cs"]))
utterances = st.builds(
    Utterance,
    id=texts.filter(bool),
    audio_filepath=st.just(Path("/corpus/a.wav")),
    duration=st.integers(0, 10**9).map(lambda us: us / 1e6),
    text=texts,
    speaker=st.none() | texts,
    shard_record=st.none() | st.integers(0, 2**31 - 1),
)


@settings(max_examples=50)
@given(st.lists(utterances, min_size=1, unique_by=lambda u: u.id))
def test_what_is_written_is_read_back(tmp_path_factory: pytest.TempPathFactory, written: list[Utterance]):
    path = tmp_path_factory.getbasetemp() / "round_trip.jsonl"
    write_manifest(path, written)
    assert read_manifest(path) == written


def test_a_folder_of_shards_is_named_by_its_index(tmp_path: Path):
    shard = tmp_path / "shard-00000.arrayrecord"
    written = [dataclasses.replace(u, audio_filepath=shard, shard_record=i) for i, u in enumerate(UTTERANCES)]
    write_manifest(tmp_path / "index.jsonl", written)
    assert read_manifest(tmp_path) == read_manifest(tmp_path / "index.jsonl") == written
    first, second = read_manifest(tmp_path)
    assert first.audio_filepath is second.audio_filepath  # of ten million, not as many paths


def test_a_manifest_is_there_whole_or_not_at_all(tmp_path: Path):
    path = tmp_path / "m.jsonl"
    write_manifest(path, UTTERANCES)
    before = path.read_bytes()

    def breaks_off() -> Iterator[Utterance]:
        yield UTTERANCES[1]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_manifest(path, breaks_off())
    assert path.read_bytes() == before
    write_manifest(path, UTTERANCES)  # and what the break left does no harm
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["m.jsonl"]


def test_the_digest_ignores_the_folder_and_the_speaker():
    elsewhere = [
        dataclasses.replace(u, audio_filepath=Path("/other") / u.audio_filepath.name, speaker="x") for u in UTTERANCES
    ]
    assert manifest_digest(elsewhere) == manifest_digest(UTTERANCES)


def test_the_digest_depends_on_id_duration_text_and_order():
    first, second = UTTERANCES
    others = (
        [second, first],
        [first],
        [dataclasses.replace(first, id="c"), second],
        [dataclasses.replace(first, duration=1.500001), second],
        [dataclasses.replace(first, text="hullo"), second],
    )
    digests = {manifest_digest(m) for m in (UTTERANCES, *others)}
    assert len(digests) == len(others) + 1


def test_the_digest_survives_writing_and_reading(tmp_path: Path):
    uneven = [dataclasses.replace(UTTERANCES[0], duration=1 / 3)]
    write_manifest(tmp_path / "m.jsonl", uneven)
    assert manifest_digest(read_manifest(tmp_path / "m.jsonl")) == manifest_digest(uneven)
