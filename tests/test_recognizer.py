"""A trained run as a recogniser: whatever recordings and devices there are, and nothing left out unnamed."""

import dataclasses
import json
import shutil

import numpy as np
import pytest

from jaxds2.config import (
    ConfigError,
)
from jaxds2.data.manifest import read_manifest
from jaxds2.decoding.greedy import GreedyDecoder
from jaxds2.decoding.hypothesis import NOTHING
from jaxds2.evaluation.evaluate import EvaluationError, evaluate
from jaxds2.inference.recognizer import Recognizer
from jaxds2.inference.transcribe import transcribe


def test_transcribe_reads_any_file_and_reports_the_bad_one(tones, learnt, tmp_path):
    import soundfile

    recognizer = Recognizer.load(learnt)
    waveform, _ = soundfile.read(tones / "dev-00.wav")
    stereo = np.repeat(np.stack([waveform, waveform], axis=1), 2, axis=0)  # 32 kHz, two channels
    soundfile.write(tmp_path / "stereo.flac", stereo, 32_000)
    (tmp_path / "bad.wav").write_text("this is no audio")
    paths = [tmp_path / "stereo.flac", tmp_path / "bad.wav", tones / "dev-01.wav", tmp_path / "missing.wav"]
    texts = transcribe(recognizer, paths, GreedyDecoder(recognizer.vocabulary))
    refs = [u.text for u in read_manifest(tones / "dev.jsonl")]
    assert [t.path for t in texts] == paths
    assert texts[0].text == refs[0]
    assert texts[2].text == refs[1]
    assert "bad.wav" in str(texts[1].error)
    assert "missing.wav" in str(texts[3].error)


def test_a_manifest_with_a_bad_file_is_not_scored_on_the_rest(tones, learnt, tmp_path):
    dev = read_manifest(tones / "dev.jsonl")
    dev[1] = dataclasses.replace(dev[1], audio_filepath=tmp_path / "gone.wav")
    recognizer = Recognizer.load(learnt)
    with pytest.raises(EvaluationError, match=r"1 of 6 .*gone\.wav"):
        evaluate(recognizer, dev, lambda log_probs_UV: [NOTHING], progress=False)


def test_the_dev_loss_leaves_out_by_name_what_cannot_fit(tones, learnt):
    dev = read_manifest(tones / "dev.jsonl")
    recognizer = Recognizer.load(learnt)
    decode = GreedyDecoder(recognizer.vocabulary)
    clean = evaluate(recognizer, dev[1:], decode, with_loss=True, progress=False)
    dev[0] = dataclasses.replace(dev[0], text="ab" * 500)
    scores = evaluate(recognizer, dev, decode, with_loss=True, progress=False)
    assert scores.infeasible == [dev[0].id]
    assert clean.infeasible == []
    assert scores.loss == pytest.approx(clean.loss, rel=1e-3)


def test_a_run_is_evaluated_on_whatever_devices_are_there(tones, learnt, tmp_path):
    shutil.copytree(learnt, tmp_path / "run")
    settings = json.loads((tmp_path / "run/config.json").read_text())
    settings["training"] |= {"devices": 64, "precision": "bfloat16"}
    (tmp_path / "run/config.json").write_text(json.dumps(settings))
    recognizer = Recognizer.load(tmp_path / "run")
    texts = transcribe(recognizer, [tones / "dev-00.wav"], GreedyDecoder(recognizer.vocabulary))
    assert texts[0].text == read_manifest(tones / "dev.jsonl")[0].text


def test_evaluating_a_folder_that_is_no_run_is_one_clear_line(tmp_path):
    with pytest.raises(ConfigError, match=r"is .* a run"):
        Recognizer.load(tmp_path)
