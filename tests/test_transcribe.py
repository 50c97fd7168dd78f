"""Long files: as a model that reads each frame by itself would read them whole, whatever the windows are."""

import dataclasses
import types
from pathlib import Path
from typing import cast

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxds2.config import Config, DataConfig, TrainingConfig
from jaxds2.decoding.greedy import GreedyDecoder
from jaxds2.inference import transcribe as module
from jaxds2.inference.recognizer import Recognizer, frame_seconds, output_frames
from jaxds2.inference.transcribe import transcribe
from jaxds2.inference.transcript import decode_stretch
from jaxds2.inference.windows import LONG_PAUSE_SECONDS, Grid
from jaxds2.text import Vocabulary

CONFIG = Config("fake", data=DataConfig(characters="abcd ", batch_seconds=60.0), training=TrainingConfig(steps=1))
VOCABULARY = Vocabulary(CONFIG.data.characters)
GRID = Grid.of(CONFIG)
LOUD = 1000
SILENT = -1


def write(path: Path, class_U: np.ndarray) -> None:
    """A recording whose frames say, in their first samples, which class they are; SILENT ones are quiet as well.

    The samples behind those count the frames, in an alphabet too quiet to be heard.
    """
    loud_U = (LOUD + 100 * (class_U + 1)).astype(np.int16)
    frames_US = np.repeat(loud_U[:, None], GRID.stride, axis=1)
    frames_US[class_U == SILENT] = 10
    number_U = np.arange(len(class_U))
    frames_US[:, 1], frames_US[:, 2] = number_U // 100, number_U % 100
    soundfile.write(path, frames_US.reshape(-1), 16_000, subtype="PCM_16")


class FrameReader:
    """A Recognizer that reads each frame, but none in the outer half of an overlap, for lack of context."""

    def __init__(self, class_U: np.ndarray) -> None:
        self.config, self.vocabulary, self.mesh = CONFIG, VOCABULARY, types.SimpleNamespace(size=1)
        self.class_U, self.shapes = class_U, set()

    def emit(self, batch):
        self.shapes.add(batch.audio_BS.shape)
        lengths_B = np.asarray(output_frames(batch.audio_lengths_B, CONFIG))
        log_probs_BUV = np.full((len(lengths_B), int(lengths_B.max()), VOCABULARY.size), -20.0, np.float32)
        for row, frames in enumerate(lengths_B.tolist()):
            if not frames:
                continue
            frames_US = batch.audio_BS[row, : frames * GRID.stride].reshape(frames, GRID.stride)
            number_U = frames_US[:, 1].astype(int) * 100 + frames_US[:, 2]
            np.testing.assert_array_equal(number_U, number_U[0] + np.arange(frames))  # on the grid
            heard_U = np.where(frames_US[:, 0] < LOUD, 0, (frames_US[:, 0] - LOUD) // 100 - 1)
            for edge, outside in ((slice(None, GRID.overlap // 2), -1), (slice(-GRID.overlap // 2, None), 1)):
                number = int(number_U[edge][0 if outside < 0 else -1]) + outside
                if 0 <= number < len(self.class_U) and self.class_U[number] != SILENT:
                    heard_U[edge] = 1
            log_probs_BUV[row, np.arange(frames), heard_U] = 0.0
        return types.SimpleNamespace(log_probs_BUV=log_probs_BUV, logit_lengths_B=lengths_B)


def fake(class_U: np.ndarray) -> Recognizer:
    return cast(Recognizer, FrameReader(class_U))


def speech(rng: np.random.Generator, frames: int) -> np.ndarray:
    """Classes of words of two-frame letters without a silence, spaces and blanks around."""
    class_U = rng.choice([1, 2, 3, 4, 5, 5, 0], frames // 2).repeat(2)[:frames]
    class_U[:4] = class_U[-4:] = 0
    class_U[4:6] = class_U[-6:-4] = 5
    return class_U


@given(st.lists(st.tuples(st.integers(20, 2600), st.integers(1, 60)), min_size=2, max_size=5), st.integers(0, 2**32))
@settings(max_examples=15)
def test_no_word_is_lost_or_doubled_or_moved_where_windows_join(tmp_path_factory, runs, seed):
    rng, path = np.random.default_rng(seed), tmp_path_factory.mktemp("long") / "long.wav"
    pieces = [p for n, silent in runs for p in (speech(rng, n), np.full(silent, SILENT))]
    class_U = np.concatenate([np.full(200, SILENT), *pieces, np.full(900, SILENT)])
    write(path, class_U)
    greedy = GreedyDecoder(VOCABULARY)
    one_hot_UV = np.log(np.eye(VOCABULARY.size)[np.maximum(class_U, 0)] + 1e-9)
    expected = greedy(one_hot_UV)[0]
    (transcript,) = transcribe(fake(class_U), [path], greedy)
    assert transcript.error is None
    (found,) = transcript.hypotheses
    assert [(w.text, w.start, w.end) for w in found.words] == [(w.text, w.start, w.end) for w in expected.words]
    assert found.text == expected.text


def test_long_files_share_batches_of_few_shapes_and_are_told_apart(tmp_path):
    rng = np.random.default_rng(0)
    silent = np.full(40, SILENT)
    class_U = np.concatenate([p for _ in range(60) for p in (speech(rng, int(rng.integers(8, 300))), silent)])
    write(tmp_path / "a.wav", class_U)
    write(tmp_path / "b.wav", class_U)
    (tmp_path / "bad.wav").write_bytes((tmp_path / "a.wav").read_bytes()[:5_000_000])
    recognizer = FrameReader(class_U)
    kept: list[int] = []
    paths = [tmp_path / name for name in ("a.wav", "bad.wav", "b.wav")]
    found = transcribe(cast(Recognizer, recognizer), paths, GreedyDecoder(VOCABULARY), keep=lambda i, t: kept.append(i))
    assert sorted(kept) == [0, 1, 2]
    assert [t.error is None for t in found] == [True, False, True]
    assert found[0].text == found[2].text != ""
    assert found[0].hypotheses == found[2].hypotheses
    assert len(recognizer.shapes) <= 1 + module.HALVINGS
    assert all(rows * samples <= 60.0 * 16_000 for rows, samples in recognizer.shapes)
    assert 0 < found[0].silence < found[0].duration


def test_a_short_file_is_given_whole_unless_it_holds_a_long_pause(tmp_path, monkeypatch):
    rng, whole = np.random.default_rng(2), []
    monkeypatch.setattr(module, "_short", lambda _, utterances, decode: iter(whole.extend(utterances) or ()))
    long_pause = round(LONG_PAUSE_SECONDS / frame_seconds(CONFIG))
    for name, silent in (("plain", long_pause), ("paused", long_pause + 1)):
        around = np.full(2 * long_pause, SILENT)
        class_U = np.concatenate([around, speech(rng, 200), np.full(silent, SILENT), speech(rng, 200), around])
        path = tmp_path / f"{name}.wav"
        write(path, class_U)
        (transcript,) = transcribe(fake(class_U), [path], GreedyDecoder(VOCABULARY))
        assert ([u.audio_filepath for u in whole] == [path]) == (name == "plain")
        assert bool(transcript.text) == (name == "paused")
        whole.clear()


def test_damage_in_the_middle_of_a_long_file_spares_the_others(tmp_path, monkeypatch):
    class_U = np.concatenate([speech(np.random.default_rng(1), 2500), np.full(100, SILENT)])
    for name in ("a.wav", "b.wav"):
        write(tmp_path / name, class_U)
    read = module.read_blocks

    def breaks(path, **options):
        for number, block_S in enumerate(read(path, **options)):
            if path.name == "a.wav" and number == 2:
                raise module.AudioError(f"{path}: damaged")
            yield block_S

    monkeypatch.setattr(module, "read_blocks", breaks)
    paths = [tmp_path / "a.wav", tmp_path / "b.wav"]
    damaged, whole = transcribe(fake(class_U), paths, GreedyDecoder(VOCABULARY))
    assert (damaged.error, damaged.text) == (f"{paths[0]}: damaged", "")
    assert whole.text


@given(st.integers(0, 2**32), st.integers(20, 400))
@settings(max_examples=30)
def test_a_stretch_in_pieces_reads_as_the_whole(seed, longest):
    rng = np.random.default_rng(seed)
    log_probs_UV = np.log(np.eye(VOCABULARY.size)[speech(rng, 1500)] * 0.9 + 0.1 / VOCABULARY.size)
    log_probs_UV = (log_probs_UV - rng.uniform(0, 0.1, log_probs_UV.shape)).astype(np.float32)
    greedy, lengths = GreedyDecoder(VOCABULARY), []

    def decode(piece_UV):
        lengths.append(len(piece_UV))
        return greedy(piece_UV)

    (whole,), pieces = greedy(log_probs_UV), decode_stretch(log_probs_UV, decode, VOCABULARY, longest=longest)
    assert dataclasses.replace(pieces, acoustic=0, total=0) == dataclasses.replace(whole, acoustic=0, total=0)
    assert pieces.total == pytest.approx(whole.total)
    longest_word = max(w.end - w.start for w in whole.words)
    assert max(lengths) <= max(longest, 2 * longest_word + 60)
    assert sum(lengths) == 1500


def test_a_silence_parts_words_though_no_space_is_heard(tmp_path):
    class_U = np.full(1200, SILENT)
    class_U[900:1060] = 0
    class_U[1010:1014], class_U[1050:1054] = 1, 2
    for silent, text in ((GRID.border, "ab"), (GRID.border + 1, "a b"), (GRID.pause + 1, "a b")):
        class_U[1020:1040] = 0
        class_U[1020 : 1020 + silent] = SILENT
        write(tmp_path / "a.wav", class_U)
        (transcript,) = transcribe(fake(class_U), [tmp_path / "a.wav"], GreedyDecoder(VOCABULARY))
        assert transcript.text == text


def test_frame_times_are_seconds_of_the_file(tmp_path):
    class_U = np.full(1200, SILENT)
    class_U[1000:1020] = [0, 0, *[1] * 16, 0, 0]
    write(tmp_path / "a.wav", class_U)
    (transcript,) = transcribe(fake(class_U), [tmp_path / "a.wav"], GreedyDecoder(VOCABULARY))
    (word,) = transcript.words
    seconds = frame_seconds(CONFIG)
    assert (word.start, word.end) == (pytest.approx(1002 * seconds), pytest.approx(1018 * seconds))
