"""What users type: exit codes, one clear line for bad input and never a traceback, and the whole way once."""

import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile
import soxr

from jaxds2 import cli
from jaxds2.data.manifest import read_manifest, write_manifest
from jaxds2.files import WriteError
from jaxds2.inference.recognizer import Recognizer

ROOT = Path(__file__).parent.parent

CONFIG = """
from jaxds2.config import AugmentConfig, Config, DataConfig, FeatureConfig, ModelConfig, OptimizerConfig, TrainingConfig

def get_config():
    return Config(
        name="tones",
        data=DataConfig(train=("{tones}/train.jsonl",), dev="{tones}/dev.jsonl", characters="abc ", batch_seconds=8.0,
                        num_buckets=1, rows_multiple=2),
        features=FeatureConfig(n_mels=20),
        augment=AugmentConfig(freq_masks=0, time_masks=0),
        model=ModelConfig(conv_channels=(8,), conv_kernels=((3, 3),), conv_strides=((2, 2),), width=32, hidden=16,
                          layers=1),
        optimizer=OptimizerConfig(learning_rate=2e-2, warmup_steps=5),
        training=TrainingConfig(steps=150, ema_decay=0.5),
    )
"""


@pytest.fixture(scope="module")
def run(tones, tmp_path_factory) -> Path:
    """A trained run, by the command line."""
    folder = tmp_path_factory.mktemp("cli runs")  # with a space
    (folder / "tones.py").write_text(CONFIG.format(tones=tones))
    assert cli.train(["--config", str(folder / "tones.py"), "--run", str(folder / "tones")]) == 0
    return folder / "tones"


def fails(capfd, arguments, code: int, *says: str, entry=cli.main) -> None:
    """The command ends with this code and one line that says these things."""
    try:
        got = entry([str(a) for a in arguments])
    except SystemExit as e:  # argparse
        got = e.code
    err = capfd.readouterr().err
    assert got == code, err
    assert "Traceback" not in err
    lines = [line for line in re.split(r"[\r\n]", err) if "error: " in line]
    assert len(lines) == 1, err
    for what in says:
        assert what in lines[0]


def test_from_training_to_a_word_error_rate(run, tones, capfd):
    assert cli.evaluate(["--run", str(run), "--manifest", str(tones / "dev.jsonl")]) == 0
    out = capfd.readouterr().out
    assert "%WER 0.00 [0 / 9, 0 ins, 0 del, 0 sub]\n" in out
    assert "%CER" in out
    assert "95 % intervals: WER 0.00 to 0.00, CER 0.00 to 0.00 (bootstrap, 10000 resamples of 6 utterances)\n" in out
    report = json.loads((run / f"eval/{tones.name}-dev-greedy/report.json").read_text())
    assert report["wer"] == 0
    assert report["utterances"] == 6
    assert report["decoder"] == {"name": "greedy"}
    assert report["checkpoint_step"] > 0
    assert report["rtfx"] > 0


def test_without_a_manifest_the_test_manifests_of_the_config_are_scored(run, tones, tmp_path, capfd):
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    config = json.loads((copy / "config.json").read_text())
    config["data"]["test"] = [str(tones / "dev.jsonl"), str(tones / "train.jsonl")]
    (copy / "config.json").write_text(json.dumps(config))
    assert cli.evaluate(["--run", str(copy)]) == 0
    assert capfd.readouterr().out.count("%WER") == 2
    assert {p.name for p in (copy / "eval").iterdir()} == {f"{tones.name}-{m}-greedy" for m in ("dev", "train")}
    fails(capfd, ["--run", copy, "--name", "x"], 2, "--name is for one manifest", entry=cli.evaluate)


def test_odd_recordings_are_scored_and_damaged_ones_named(run, tones, tmp_path, capfd):
    spoken = read_manifest(tones / "dev.jsonl")[0]
    samples_S, rate = soundfile.read(spoken.audio_filepath)

    def score(samples_S, rate, subtype="PCM_16", *, cut: int | None = None):
        path, manifest = tmp_path / "clip.wav", tmp_path / "clip.jsonl"
        soundfile.write(path, samples_S, rate, subtype=subtype)
        if cut is not None:
            path.write_bytes(path.read_bytes()[:cut])
        write_manifest(manifest, [dataclasses.replace(spoken, audio_filepath=path)])
        return ["--run", str(run), "--manifest", str(manifest)]

    slow_S = soxr.resample(samples_S, rate, 8000)
    for arguments in (
        score(samples_S, rate, "PCM_24"),
        score(slow_S, 8000),
        score(np.stack([samples_S, samples_S], 1), rate),
    ):
        assert cli.evaluate(arguments) == 0
        assert "%WER 0.00" in capfd.readouterr().out
    assert cli.evaluate(score(np.zeros_like(samples_S), rate)) == 0  # silence: its words are missing, not the utterance
    words = len(spoken.text.split())
    assert f"[{words} / {words}, 0 ins, {words} del, 0 sub]" in capfd.readouterr().out
    fails(capfd, score(samples_S, rate, cut=2000), 1, "1 of 1", "clip.wav", entry=cli.evaluate)
    fails(capfd, score(samples_S[:0], rate), 1, "1 of 1", "clip.wav", entry=cli.evaluate)
    fails(capfd, score(np.full_like(samples_S, np.nan), rate, "FLOAT"), 1, "1 of 1", "clip.wav", entry=cli.evaluate)


def test_shards_are_scored_as_their_manifest(run, tones, tmp_path, capfd):
    shards = tmp_path / "dev"
    assert cli.main(["shard", str(tones / "dev.jsonl"), "--out", str(shards), "--workers", "1"]) == 0
    for manifest in (shards, shards / "index.jsonl"):
        assert cli.evaluate(["--run", str(run), "--manifest", str(manifest)]) == 0
        assert "%WER 0.00 [0 / 9, 0 ins, 0 del, 0 sub]" in capfd.readouterr().out
    assert cli.main(["lm", "build", str(shards), "--order", "2", "--out", str(tmp_path / "lm.arpa")]) == 0


def test_language_model_beam_search_and_transcripts(run, tones, tmp_path, capfd):
    lm = tmp_path / "lm.arpa"
    assert cli.main(["lm", "build", str(tones / "train.jsonl"), "--order", "2", "--out", str(lm)]) == 0
    beam = ["--decoder", "beam", "--lm", str(lm), "--beam-width", "20", "--alpha", "0.1"]
    assert cli.evaluate(["--run", str(run), "--manifest", str(tones / "dev.jsonl"), "--name", "x", *beam]) == 0
    settings = json.loads((run / "eval/x/report.json").read_text())["decoder"]
    assert settings["beam_width"] == 20
    assert settings["alpha"] == 0.1
    capfd.readouterr()
    assert cli.main(["transcribe", "--run", str(run), str(tones / "dev-00.wav")]) == 0
    assert capfd.readouterr().out.strip() == read_manifest(tones / "dev.jsonl")[0].text
    assert cli.main(["transcribe", "--run", str(run), str(tones / "dev-00.wav"), "gone.wav"]) == 1
    both = capfd.readouterr()
    assert "dev-00.wav: " in both.out
    assert "gone.wav" in both.err


def test_log_probabilities_are_decoded_again_without_the_model(run, tones, tmp_path, capfd, monkeypatch):
    dev, lm = str(tones / "dev.jsonl"), tmp_path / "lm.arpa"
    assert cli.main(["lm", "build", str(tones / "train.jsonl"), "--order", "2", "--out", str(lm)]) == 0
    assert cli.evaluate(["--run", str(run), "--manifest", dev, "--name", "kept", "--save-logprobs"]) == 0
    bare = tmp_path / "bare"
    shutil.copytree(run, bare, ignore=shutil.ignore_patterns("checkpoints", "eval"))
    beam = ["--logprobs", str(run / "eval/kept"), "--decoder", "beam", "--lm", str(lm), "--alpha", "0.1"]
    reports = []
    for name, extra in (("here", []), ("pool", ["--decode-workers", "2", "--nbest", "1"])):
        assert cli.evaluate(["--run", str(bare), *beam, "--name", name, *extra]) == 0
        reports.append(json.loads((bare / "eval" / name / "report.json").read_text()))
        assert (bare / "eval" / name / "nbest.jsonl").exists() == bool(extra)
    assert cli.evaluate(["--run", str(run), "--manifest", dev, "--name", "model", *beam[2:]]) == 0
    reports.append(json.loads((run / "eval/model/report.json").read_text()))
    assert reports[0]["log_probs"] == str(run / "eval/kept")
    assert [{k: v for k, v in r.items() if k not in ("rtfx", "log_probs")} for r in reports[1:]] == [
        {k: v for k, v in reports[0].items() if k not in ("rtfx", "log_probs")}
    ] * 2
    for name in ("recogs.txt", "hyp.ctm"):
        assert (bare / "eval/pool" / name).read_text() == (run / "eval/model" / name).read_text()
    listed = [json.loads(line) for line in (bare / "eval/pool/nbest.jsonl").read_text().splitlines()]
    assert [row["id"] for row in listed] == sorted(u.id for u in read_manifest(dev))
    assert set(listed[0]["hypotheses"][0]) == {"text", "total", "acoustic", "lm", "words"}

    config = json.loads((bare / "config.json").read_text())
    config["data"]["characters"] = "abcd "
    (bare / "config.json").write_text(json.dumps(config))
    capfd.readouterr()
    fails(capfd, ["--run", bare, *beam[:2]], 1, "over the alphabet 'abc ', the run's is 'abcd '", entry=cli.evaluate)
    fails(capfd, ["--run", run, "--logprobs", tones], 1, "holds no log-probabilities", entry=cli.evaluate)
    fails(capfd, ["--run", run, "--logprobs", tmp_path / "no"], 2, "no does not exist", entry=cli.evaluate)
    kept = ["--run", run, "--logprobs", run / "eval/kept"]
    fails(capfd, [*kept, "--save-logprobs"], 2, "they are kept already", entry=cli.evaluate)
    fails(capfd, [*kept, "--checkpoint", "last"], 2, "leave out --checkpoint last", entry=cli.evaluate)
    monkeypatch.setattr(Recognizer, "load", lambda *_: pytest.fail("the model was loaded first"))
    mute = tmp_path / "mute.jsonl"
    write_manifest(mute, [dataclasses.replace(u, text="") for u in read_manifest(dev)])
    fails(capfd, ["--run", run, "--manifest", mute], 1, str(mute), "has a reference text", entry=cli.evaluate)


def test_tuned_settings_are_found_used_and_said(run, tones, tmp_path, capfd):
    copy, lm = tmp_path / "run", tmp_path / "lm.arpa"
    shutil.copytree(run, copy)
    assert cli.main(["lm", "build", str(tones / "train.jsonl"), "--order", "2", "--out", str(lm)]) == 0
    assert cli.main(["lm", "tune", "--run", str(copy), "--lm", str(lm)]) == 0
    tuned = json.loads((copy / "decoding.json").read_text())["pyctcdecode"]
    assert f"best: alpha {tuned['settings']['alpha']:g}," in capfd.readouterr().out
    assert (copy / "decoding-pyctcdecode.png").stat().st_size > 0
    dev = ["--manifest", str(tones / "dev.jsonl"), "--name", "x"]
    assert cli.evaluate(["--run", str(copy), *dev, "--decoder", "beam", "--lm", str(lm), "--beta", "1"]) == 0
    assert "tuned settings of" in capfd.readouterr().err
    settings = json.loads((copy / "eval/x/report.json").read_text())["decoder"]
    assert (settings["alpha"], settings["beta"]) == (tuned["settings"]["alpha"], 1.0)
    assert (settings["sources"]["alpha"], settings["sources"]["beta"]) == ("decoding.json", "command line")
    assert cli.evaluate(["--run", str(copy), *dev, "--decoder", "beam"]) == 0  # in the same folder
    err = capfd.readouterr().err
    assert f"decoding.json: its settings were tuned with {lm}; for a search without one the defaults hold\n" in err
    assert re.search(rf"the scores of 20.* in {copy}/eval/x are replaced \(.*lm .*; --name keeps both\n", err)
    tune = ["lm", "tune", "--run", copy, "--lm", lm, "--manifest"]
    fails(capfd, [*tune, tones / "train.jsonl"], 1, "the run was trained on it")
    shutil.copy(tones / "dev.jsonl", tmp_path / "test.jsonl")
    fails(capfd, [*tune, tmp_path / "test.jsonl"], 1, "by its name a test set")
    fails(capfd, ["lm", "tune", "--run", copy], 2, "--lm FILE")


def test_what_a_score_leaves_behind(run, tones, tmp_path, capfd):
    arguments = ["--run", str(run), "--manifest", str(tones / "dev.jsonl"), "--name", "left"]
    assert cli.evaluate(arguments) == 0
    folder = run / "eval/left"
    assert {path.name for path in folder.iterdir()} == {
        *("report.json", "utterances.jsonl", "recogs.txt", "errs.txt"),
        *("ref.trn", "hyp.trn", "ref.stm", "hyp.ctm", "report.html"),
    }
    report = json.loads((folder / "report.json").read_text())
    assert report["word_times"] is True
    assert [row["speaker"] for row in report["breakdown"]["speaker"]] == ["dev-speaker"]
    assert "data:audio/flac" in (folder / "report.html").read_text()
    # Each word is where its tones sound: 0.05 s of noise, then 0.16 s a character, the spaces too.
    spoken = read_manifest(tones / "dev.jsonl")
    lines = [line.split() for line in (folder / "hyp.ctm").read_text().splitlines()]
    for u in spoken:
        words = [line for line in lines if line[0] == u.id]
        assert [word for *_, word in words] == u.text.split()
        for (_, channel, start, seconds, word), first in zip(
            words, (match.start() for match in re.finditer(r"\S+", u.text)), strict=True
        ):
            assert channel == "A"
            assert abs(float(start) - (0.05 + 0.16 * first)) < 0.15
            assert abs(float(start) + float(seconds) - (0.05 + 0.16 * (first + len(word)))) < 0.15
    assert cli.evaluate([*arguments, "--no-html"]) == 0
    assert not (folder / "report.html").exists()


def ctm(path):
    """(word, start, end) by utterance."""
    times: dict[str, list[tuple[str, float, float]]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        name, channel, start, seconds, word, score = line.split()
        assert channel == "A"
        assert 0 <= float(score) <= 1
        times.setdefault(name, []).append((word, float(start), float(start) + float(seconds)))
    return times


def test_known_texts_are_found_where_they_are_spoken(run, tones, tmp_path, capfd):
    manifest = tones / "dev.jsonl"
    assert cli.main(["align", "--run", str(run), "--manifest", str(manifest)]) == 0
    folder = run / f"align/{tones.name}-dev"
    out = capfd.readouterr().out
    assert f"aligned 6 of 6 utterances, 9 words; 0 score below -1: their text may not match; written to {folder}" in out
    spoken = {u.id: u for u in read_manifest(manifest)}
    words, characters = ctm(folder / "words.ctm"), ctm(folder / "characters.ctm")
    lines = [json.loads(line) for line in (folder / "alignments.jsonl").read_text().splitlines()]
    assert [line["id"] for line in lines] == sorted(spoken)
    for line in lines:
        u = spoken[line["id"]]
        # Each character is where its tone sounds: 0.05 s of noise, then 0.16 s a character, the spaces too.
        places = [match.start() for match in re.finditer(r"\S+", u.text)]
        assert [word for word, _, _ in words[u.id]] == u.text.split()
        for (word, start, end), first in zip(words[u.id], places, strict=True):
            assert abs(start - (0.05 + 0.16 * first)) < 0.15
            assert abs(end - (0.05 + 0.16 * (first + len(word)))) < 0.15
        assert "".join(c for c, _, _ in characters[u.id]) == u.text.replace(" ", "")
        assert [(w["word"], round(w["start"], 3)) for w in line["words"]] == [(w, s) for w, s, _ in words[u.id]]
        assert -0.1 < line["score"] <= 0
        textgrid = (folder / f"textgrids/{u.id}.TextGrid").read_text(encoding="utf-8")
        tiers = [re.findall(r'text = "(.+)"', tier) for tier in textgrid.split('name = "')[1:]]
        assert tiers == [u.text.split(), list(u.text.replace(" ", ""))]
    # The file is a manifest too: of the same recordings.
    again = {u.id: u for u in read_manifest(folder / "alignments.jsonl")}
    assert {i: (u.text, u.duration) for i, u in again.items()} == {i: (u.text, u.duration) for i, u in spoken.items()}
    assert all(u.audio_filepath.exists() for u in again.values())
    shards = tmp_path / "dev"
    assert cli.main(["shard", str(manifest), "--out", str(shards), "--workers", "1"]) == 0
    assert cli.main(["align", "--run", str(run), "--manifest", str(shards), "--out", str(tmp_path / "out")]) == 0
    for name in ("words.ctm", "characters.ctm", "mismatches.tsv", "failed.txt"):
        assert (tmp_path / "out" / name).read_bytes() == (folder / name).read_bytes()


def test_texts_that_do_not_match_their_audio_are_listed_worst_first(run, tones, tmp_path, capfd):
    spoken, manifest = read_manifest(tones / "dev.jsonl"), tmp_path / "swapped.jsonl"
    wrong = [dataclasses.replace(u, text={"a": "b", "b": "c", "c": "a"}[u.text[0]] + u.text[1:]) for u in spoken]
    write_manifest(manifest, [*wrong[:2], *spoken[2:]])
    align = ["align", "--run", str(run), "--manifest", str(manifest), "--out", str(tmp_path / "out")]
    assert cli.main(align) == 0
    out = capfd.readouterr().out
    header, *rows = (line.split("\t") for line in (tmp_path / "out/mismatches.tsv").read_text().splitlines())
    assert header == ["score", "id", "text", "heard"]
    assert {(i, text, heard) for _, i, text, heard in rows} == {
        (bad.id, bad.text, good.text) for bad, good in zip(wrong[:2], spoken[:2], strict=True)
    }
    assert [float(score) for score, *_ in rows] == sorted(float(score) for score, *_ in rows)
    assert out.count("mismatch: ") == 2
    assert "2 score below -1" in out
    assert cli.main([*align, "--min-score", "-1000"]) == 0
    assert "0 score below -1000" in capfd.readouterr().out


def test_what_cannot_be_aligned_is_named_and_the_others_come_out(run, tones, tmp_path, capfd):
    spoken, manifest, out = read_manifest(tones / "dev.jsonl"), tmp_path / "odd.jsonl", tmp_path / "out"
    align = ["align", "--run", str(run), "--manifest", str(manifest), "--out", str(out)]
    short = tmp_path / "short.wav"
    soundfile.write(short, np.zeros(100, np.int16), 16_000)
    odd = [
        dataclasses.replace(spoken[0], id="a/b", text="zebra"),
        dataclasses.replace(spoken[0], id="long", text="ab" * 500),
        dataclasses.replace(spoken[0], id="short", audio_filepath=short, duration=100 / 16_000, text="a"),
        dataclasses.replace(spoken[0], id="gone", audio_filepath=tmp_path / "gone.wav"),
        dataclasses.replace(spoken[0], id="mute", text=" ."),
    ]
    write_manifest(manifest, [dataclasses.replace(u, text=spoken[0].text) for u in odd[:1]])
    assert cli.main(align) == 0
    assert (out / "textgrids/a%2Fb.TextGrid").exists()
    write_manifest(manifest, [*odd, *spoken])
    capfd.readouterr()
    assert cli.main(align) == 1
    both = capfd.readouterr()
    failed = (out / "failed.txt").read_text().splitlines()
    for line, says in zip(
        failed,
        (
            "a/b: its text has 'erz', outside the alphabet 'abc '",
            "gone: ",
            "long: its text needs 1000 frames, its audio has ",
            "mute: has no text",
            "short: its text needs 1 frames, its audio has 0 (",
        ),
        strict=True,
    ):
        assert line.startswith(says)
        assert f"error: {line}" in both.err
    assert "gone.wav" in failed[1]
    assert "aligned 6 of 11 utterances" in both.out
    assert ctm(out / "words.ctm").keys() == {u.id for u in spoken}
    # Nothing is left of the alignment that an earlier call could make.
    assert {path.stem for path in (out / "textgrids").iterdir()} == {u.id for u in spoken}
    # Nor of utterances that the manifest has no more. What somebody else put there stays.
    foreign = {"textgrids/notes.txt": "mine", "textgrids/phones.TextGrid": 'name = "phones"', "own.TextGrid": "mine"}
    for name, content in foreign.items():
        (out / name).write_text(content)
    write_manifest(manifest, spoken[:2])
    assert cli.main(align) == 0
    left = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.suffix in (".TextGrid", ".txt")}
    assert left == {"failed.txt", *foreign, *(f"textgrids/{u.id}.TextGrid" for u in spoken[:2])}
    write_manifest(manifest, [dataclasses.replace(u, text=" .") for u in spoken])
    fails(capfd, align, 1, "none of 6 utterances has a text", "transcribe")
    fails(capfd, [*align[:-1], manifest], 1, str(manifest), "cannot be written")
    fails(capfd, [*align, "--min-scores=-2"], 2, "did you mean --min-score?")
    fails(capfd, [*align, "--min-score", "nan"], 2, "--min-score nan", "0 or less")
    fails(capfd, ["align", "--run", run, "--manifest", tmp_path / "gone.jsonl"], 2, "gone.jsonl")
    fails(capfd, ["align", "--run", run], 2, "--manifest")


def test_two_scores_are_compared_and_what_cannot_be_is_refused(run, tones, tmp_path, capfd):
    folders = [run / "eval" / name for name in ("one", "two", "other")]
    for folder, manifest in zip(folders, ("dev", "dev", "train"), strict=True):
        arguments = ["--run", str(run), "--manifest", str(tones / f"{manifest}.jsonl"), "--no-html"]
        assert cli.evaluate([*arguments, "--name", folder.name]) == 0
    capfd.readouterr()
    assert cli.evaluate(["--compare", str(folders[0]), str(folders[1])]) == 0
    out = capfd.readouterr().out
    assert out.count("%WER 0.00") == 2
    assert "B - A: +0.00 points" in out
    assert "MAPSSWE: 0 segments" in out
    compare = ["--compare", folders[0]]
    fails(capfd, [*compare, folders[0]], 1, "same folder", entry=cli.evaluate)
    fails(capfd, [*compare, folders[2]], 1, "same manifest", "train.jsonl", entry=cli.evaluate)
    fails(capfd, [*compare, tmp_path], 1, "no report.json", entry=cli.evaluate)
    fails(capfd, [*compare, tmp_path / "gone"], 2, "gone", entry=cli.evaluate)
    fails(capfd, [*compare, folders[1], "--run", run], 2, "leave out --run", entry=cli.evaluate)
    fails(capfd, [*compare, folders[1], "--decoder", "beam"], 2, "--decoder", entry=cli.evaluate)
    others = ["--checkpoint", "last", "--nbest", "2", "--no-html", "--logprobs", folders[0]]
    ignored = "leave out --checkpoint --nbest --logprobs --no-html"
    fails(capfd, [*compare, folders[1], *others], 2, ignored, entry=cli.evaluate)
    fails(capfd, compare, 2, "--compare", entry=cli.evaluate)
    fails(capfd, [], 2, "--run DIR", "--compare", entry=cli.evaluate)
    (folders[1] / "utterances.jsonl").unlink()
    fails(capfd, [*compare, folders[1]], 1, "utterances.jsonl", entry=cli.evaluate)


def test_a_score_goes_by_its_corpus_and_set(run, tones, tmp_path, capfd):
    assert cli._name_of_set(Path("data/an4/test.jsonl")) == "an4-test"
    for folder, name in (("x/shards/test-clean", "x-test-clean"), ("x/v1.5", "x-v1.5")):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "index.jsonl").touch()
        for path in (folder, f"{folder}/index.jsonl"):
            assert cli._name_of_set(tmp_path / path) == name
    config = json.loads((run / "config.json").read_text())
    config["data"]["test"] = [str(tones / "dev.jsonl")] * 2
    (tmp_path / "config.json").write_text(json.dumps(config))
    fails(capfd, ["--run", tmp_path], 2, "go by one name", entry=cli.evaluate)


def test_a_manifest_is_scored_whole_or_not_at_all(run, tones, tmp_path, capfd):
    spoken, manifest = read_manifest(tones / "dev.jsonl"), tmp_path / "odd.jsonl"
    arguments = ["--run", run, "--manifest", manifest, "--name", "odd"]
    write_manifest(manifest, [dataclasses.replace(u, text=" .") for u in spoken])
    fails(capfd, arguments, 1, "none of 6 utterances has a reference", "transcribe", entry=cli.evaluate)
    short = tmp_path / "short.wav"
    soundfile.write(short, np.zeros(100, np.int16), 16_000)
    utterances = [*spoken, dataclasses.replace(spoken[0], id="short", audio_filepath=short, duration=100 / 16_000)]
    write_manifest(manifest, utterances)
    fails(capfd, arguments, 1, "1 of 7", "short: too short for one frame", "short.wav", entry=cli.evaluate)
    assert not (run / "eval/odd").exists()
    # One text of several that is empty, such as noise, is scored: what is heard there is inserted.
    write_manifest(manifest, [dataclasses.replace(spoken[0], text=""), *spoken[1:]])
    assert cli.evaluate([str(a) for a in arguments]) == 0
    words = len(spoken[0].text.split())
    assert f" {words} ins, 0 del, 0 sub]" in capfd.readouterr().out


def test_digest_and_check(run, tones, capfd, tmp_path):
    assert cli.main(["digest", "--run", str(run)]) == 0
    assert re.fullmatch(r"[0-9a-f]{64} 150\n", capfd.readouterr().out)
    found = tmp_path / "found.json"
    manifests = [str(tones / "train.jsonl"), str(tones / "dev.jsonl")]
    assert cli.main(["check", *manifests, "--json", str(found)]) == 0
    assert json.loads(found.read_text())["passed"]
    assert not (tones / "check.json").exists()
    shutil.copytree(tones, tmp_path / "tones")
    (tmp_path / "tones/dev.jsonl").write_text((tones / "dev.jsonl").read_text() + "{\n")
    capfd.readouterr()
    assert cli.main(["check", str(tmp_path / "tones/dev.jsonl")]) == 1
    assert f"written to {tmp_path / 'tones/check.json'}\n" in capfd.readouterr().out
    assert json.loads((tmp_path / "tones/check.json").read_text())["errors"] == {"bad line": 1}


def test_findings_beside_a_manifest_that_may_not_be_written_are_said_to_be_lost(tones, capfd, monkeypatch):
    def refuse(path, data):
        raise WriteError(f"{path}: cannot be written (Read-only file system)")

    monkeypatch.setattr("jaxds2.files.write_whole", refuse)
    assert cli.main(["check", str(tones / "dev.jsonl")]) == 0
    both = capfd.readouterr()
    assert both.err.endswith(
        f"{tones / 'check.json'}: cannot be written (Read-only file system); --json FILE says where else to write the "
        f"findings\n"
    )
    assert "written to" not in both.out


def test_wrong_use_is_two(run, tones, tmp_path, capfd):
    config = run.parent / "tones.py"
    fails(capfd, ["--config", config, "training.stps=3"], 2, "training.stps", "steps", entry=cli.train)
    fails(capfd, ["--config", config, "model.scan=fast"], 2, "associative", entry=cli.train)
    fails(capfd, ["--config", tmp_path / "gone.py"], 2, "gone.py", entry=cli.train)
    fails(capfd, ["--config", config, "--run", run, "training.seed=7"], 2, "training.seed: 0 -> 7", entry=cli.train)
    fails(
        capfd,
        ["--run", tmp_path, "--manifest", tones / "dev.jsonl"],
        2,
        f"is {tmp_path} a run of train.py?",
        entry=cli.evaluate,
    )
    fails(capfd, ["digest", "--run", tmp_path], 2, f"is {tmp_path} a run of train.py?")
    new = ["--config", config, "--run", tmp_path / "new", "--init-from"]
    fails(capfd, [*new, tmp_path / "gone"], 2, f"--init-from {tmp_path / 'gone'}", entry=cli.train)
    assert not (tmp_path / "new").exists()
    arguments = ["--run", run, "--manifest", tones / "dev.jsonl"]
    for text in ("newest", "\u00b2"):
        fails(capfd, [*arguments, "--checkpoint", text], 2, "best, last or a step", entry=cli.evaluate)
    for name in ("../x", ".."):
        fails(capfd, [*arguments, "--name", name], 2, f"--name {name}:", "no path", entry=cli.evaluate)
    fails(capfd, [*arguments, "--lm", "x.arpa"], 2, "--decoder beam", entry=cli.evaluate)
    fails(capfd, [*arguments, "--lm", tmp_path / "gone.arpa", "--decoder", "beam"], 2, "gone.arpa", entry=cli.evaluate)
    fails(capfd, ["--run", run, "--manifest", tmp_path / "gone.jsonl"], 2, "gone.jsonl", entry=cli.evaluate)
    fails(capfd, ["--run", run], 2, "names no test manifest", entry=cli.evaluate)
    fails(capfd, [*arguments, "--decodr=beam"], 2, "did you mean --decoder?", entry=cli.evaluate)
    fails(capfd, ["check", tmp_path / "gone.jsonl"], 2, "gone.jsonl")
    for field in ("data.train", "data.dev"):
        new = ["--config", config, "--run", tmp_path / "new", f"{field}={tmp_path}/gone.jsonl"]
        fails(capfd, new, 2, f"{field}: no manifest {tmp_path}/gone.jsonl", "jaxds2 shard", entry=cli.train)
    beam = [*arguments, "--decoder", "beam"]
    for option, value in (("--beam-width", "0"), ("--alpha", "nan"), ("--blank-threshold", "2"), ("--nbest", "-1")):
        fails(capfd, [*beam, option, value], 2, value, entry=cli.evaluate)
    fails(capfd, [*beam, "--nbest", "0"], 2, "0 hypotheses: must be at least 1", entry=cli.evaluate)
    fails(capfd, [*arguments, "--nbest", "2"], 2, "--nbest 2: greedy decoding has one", entry=cli.evaluate)
    fails(capfd, [*beam, "--lexicon", config], 2, "pyctcdecode has no lexicon", entry=cli.evaluate)
    fails(capfd, [*beam, "--hot-words", "a:x"], 2, "word:weight", entry=cli.evaluate)
    fails(capfd, [*arguments, "--decode-workers", "-1"], 2, "-1 decoding processes", entry=cli.evaluate)
    fails(capfd, ["trian"], 2, "'trian'", "did you mean train?")
    fails(capfd, ["lm", "biuld"], 2, "did you mean build?")
    fails(capfd, ["prepare", "librspeech"], 2, "did you mean librispeech?")
    fails(capfd, [*arguments, "--decoder", "beem"], 2, "did you mean beam?", entry=cli.evaluate)
    fails(capfd, ["lm", "build", tmp_path / "gone.txt", "--out", tmp_path / "lm"], 2, "gone.txt")
    fails(capfd, ["prepare", "an4", "--source", tmp_path / "gone"], 2, "gone")
    fails(capfd, ["prepare", "an4"], 2, "--source")
    fails(capfd, ["prepare", "nothing"], 2, "an4")
    fails(capfd, ["prepare", "demo", "--seed", "-1"], 2, "--seed -1")
    fails(capfd, ["prepare", "demo", "--workers", "0"], 2, "--workers 0")
    text = tmp_path / "text.txt"
    text.write_text("a b\n")
    fails(capfd, ["lm", "build", text, "--order", "9", "--out", tmp_path / "lm"], 2, "--order 9", "2 to 6")
    fails(capfd, ["prepare", "an4", "--splits", "train-clean-100", "--source", tmp_path], 2, "librispeech")


def test_a_run_starts_from_the_weights_of_another(run, tones, tmp_path, capfd):
    config = run.parent / "tones.py"
    arguments = ["--config", str(config), "--run", str(tmp_path / "next"), "--init-from", str(run), "training.steps=1"]
    assert cli.train(arguments) == 0
    assert f"weights from {run}; new: none" in capfd.readouterr().out


@pytest.mark.parametrize("command", [["-m", "jaxds2", "eval"], [str(ROOT / "eval.py")]])
def test_the_package_and_the_script_are_the_same_command(command, tmp_path):
    arguments = [sys.executable, *command, "--run", str(tmp_path)]
    done = subprocess.run(arguments, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2
    assert done.stderr == f"error: no {tmp_path}/config.json: is {tmp_path} a run of train.py?\n"


def test_a_corpus_is_prepared_under_data_unless_told_otherwise(corpora, tmp_path, monkeypatch):
    source = (corpora / "an4").absolute()
    monkeypatch.chdir(tmp_path)
    assert cli.main(["prepare", "an4", "--source", str(source)]) == 0
    names = {path.name: len(read_manifest(path)) for path in (tmp_path / "data/an4").iterdir()}
    assert names == {"train.jsonl": 859, "dev.jsonl": 89, "test.jsonl": 130}


def test_failure_is_one(run, tones, tmp_path, capfd):
    arguments = ["--run", run, "--manifest"]
    fails(capfd, [*arguments, tones / "dev.jsonl", "--checkpoint", "3"], 1, "3", "150", entry=cli.evaluate)
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"audio_filepath": "gone.wav", "duration": 1.0, "text": "a"}\n')
    fails(capfd, [*arguments, bad], 1, "1 of 1", "gone.wav", entry=cli.evaluate)
    bad.write_text('{"audio_filepath": "gone.wav", "duration": 1.0}\n')
    fails(capfd, [*arguments, bad], 1, "bad.jsonl:1", "text", entry=cli.evaluate)
    fails(capfd, ["prepare", "an4", "--source", tmp_path, "--out", tmp_path / "out"], 1, str(tmp_path))


def test_training_texts_outside_the_alphabet_are_refused_by_name(run, tones, tmp_path, capfd):
    config = run.parent / "tones.py"
    arguments = ["--config", config, "--run", tmp_path / "run", "data.characters=ab "]
    fails(capfd, arguments, 1, "'c'", "train-", entry=cli.train)


def test_a_dry_run_needs_no_data_and_trains_nothing(tmp_path, capfd):
    config = ROOT / "configs/librispeech_960.py"
    before = os.getcwd()
    os.chdir(ROOT)
    try:
        assert cli.train(["--config", str(config), "--dry-run", "--run", str(tmp_path / "run")]) == 0
    finally:
        os.chdir(before)
    out = capfd.readouterr().out
    assert "parameters" in out
    assert "estimate" in out
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_leaves_with_75(run, tmp_path, number):
    command = [sys.executable, str(ROOT / "train.py"), "--config", str(run.parent / "tones.py"), "--run"]
    command += [str(tmp_path / "run"), "training.steps=100000", "data.workers=1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        metrics = tmp_path / "run/metrics.jsonl"
        for _ in range(600):
            if process.poll() is not None or (metrics.exists() and metrics.read_text()):
                break
            time.sleep(0.2)
        process.send_signal(number)
        out, _ = process.communicate(timeout=120)
    assert process.returncode == 75, out
    assert "the same command resumes" in out
    assert "Traceback" not in out
    assert cli.main(["digest", "--run", str(tmp_path / "run")]) == 0


def test_transcripts_in_every_format_of_files_folders_and_standard_input(run, tones, tmp_path, capfd, monkeypatch):
    texts = [u.text for u in read_manifest(tones / "dev.jsonl")][:2]
    folder, out = tmp_path / "in", tmp_path / "out"
    (folder / "more").mkdir(parents=True)
    shutil.copy(tones / "dev-00.wav", folder / "a.wav")
    shutil.copy(tones / "dev-01.wav", folder / "more/a.wav")
    transcribe = ["transcribe", "--run", str(run)]
    (folder / "more/bad.flac").write_text("this is no audio")
    soundfile.write(folder / "short.wav", np.zeros(100, np.int16), 16_000)
    assert cli.main([*transcribe, str(folder), "--format", "all", "--out", str(out), "--word-times"]) == 1
    both = capfd.readouterr()
    assert both.out == ""
    lines = [line for line in both.err.splitlines() if line.startswith(("error", "transcribed"))]
    assert sum("short.wav: too short for one frame" in line for line in lines) == 1
    assert sum("bad.flac: not an audio file" in line for line in lines) == 1
    assert lines[-1].startswith("transcribed 2 of 4 files")
    assert lines[-1].endswith(f"written to {out}")
    written = sorted(str(path.relative_to(out)) for path in out.rglob("*") if path.is_file())
    forms = ("json", "srt", "tsv", "txt", "vtt")
    assert written == [*(f"a.{form}" for form in forms), *(f"more/a.{form}" for form in forms)]
    for name, text in zip(("a", "more/a"), texts, strict=True):
        record = json.loads((out / f"{name}.json").read_text())
        assert record["text"] == text
        words = [w for segment in record["segments"] for w in segment["words"]]
        assert [w["word"] for w in words] == text.split()
        assert all(0 <= w["start"] < w["end"] <= record["duration"] for w in words)
        assert (out / f"{name}.srt").read_text().count(" --> ") == len(text.split())
        assert (out / f"{name}.txt").read_text().splitlines()[0] == text

    with (tones / "dev-01.wav").open() as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        assert cli.main([*transcribe, "-", str(tones / "dev-00.wav"), "--format", "json"]) == 0
    records = [json.loads(line) for line in capfd.readouterr().out.splitlines()]
    assert [r["path"] for r in records] == ["standard input", str(tones / "dev-00.wav")]
    assert [r["text"] for r in records] == texts[::-1]
    assert cli.main([*transcribe, str(tones / "dev-00.wav"), "--format", "vtt"]) == 0
    assert capfd.readouterr().out.startswith("WEBVTT\n\n00:00:00.")
    with Path(os.devnull).open() as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        fails(capfd, [*transcribe, "-"], 1, "standard input: the file is empty")


def test_wrong_use_of_transcribe_is_said_before_the_work(run, tones, tmp_path, capfd):
    transcribe, file = ["transcribe", "--run", run], tones / "dev-00.wav"
    fails(capfd, [*transcribe, file, "--format", "all"], 2, "--out DIR")
    fails(capfd, [*transcribe, file, "--format", "doc"], 2, "doc", "srt")
    fails(capfd, [*transcribe, file, tones / "dev-01.wav", "--format", "srt"], 2, "2 recordings", "--out DIR")
    fails(capfd, [*transcribe, "-", "-"], 2, "twice")
    fails(capfd, [*transcribe, file, tones, "--out", tmp_path / "out"], 2, "both be written to dev-00.*")
    fails(capfd, [*transcribe, file, "--out", file], 2, "not a folder")
    fails(capfd, [*transcribe, file, "--pause", "0.1"], 2, "--pause 0.1", "0.2 to 5")
    (tmp_path / "empty").mkdir()
    fails(capfd, [*transcribe, tmp_path / "empty"], 1, "holds no audio files")
    fails(capfd, [*transcribe, tmp_path / "empty", file, "--out", tmp_path / "out"], 1, "holds no audio files")
    assert (tmp_path / "out/dev-00.txt").read_text().strip()


def test_an_unknown_option_shows_the_usage_of_its_own_command(capfd):
    with pytest.raises(SystemExit):
        cli.main(["lm", "perplexity", "--lm", "lm.arpa", "text"])
    usage, error = capfd.readouterr().err.split("\n", 1)
    assert usage.startswith("usage: ")
    assert "lm perplexity" in usage
    assert "unrecognized arguments: --lm" in error


def test_a_language_model_of_another_alphabet_is_warned_of(tmp_path, capfd):
    text = tmp_path / "ru.txt"
    text.write_text("\u0434\u0430 yes\n" * 3, encoding="utf-8")
    assert cli.main(["lm", "build", str(text), "--order", "2", "--out", str(tmp_path / "lm.arpa")]) == 0
    assert "warning: 3 of 6 words, '\u0434\u0430' first, have characters outside the alphabet" in capfd.readouterr().err
    foreign = tmp_path / "foreign.txt"
    foreign.write_text("\u043c\u0438\u0440\n\u043d\u0435\u0442\n", encoding="utf-8")
    fails(capfd, ["lm", "build", foreign, "--out", tmp_path / "none.arpa"], 2, "2 of 2 words", "--characters")
    assert not (tmp_path / "none.arpa").exists()
    assert cli.main(["lm", "perplexity", str(tmp_path / "lm.arpa"), str(foreign)]) == 0
    assert "does not know most of its words" in capfd.readouterr().err


def test_a_language_model_does_not_replace_its_text(tmp_path, capfd):
    text = tmp_path / "text.txt"
    text.write_text("one two\ntwo one\n")
    (tmp_path / "link").symlink_to(text)
    for out in (text, tmp_path / "link"):
        fails(capfd, ["lm", "build", text, "--out", out], 2, "is one of the texts")
    assert text.read_text() == "one two\ntwo one\n"


def test_a_language_model_is_normalised_by_the_alphabet_of_a_run(run, tones, tmp_path, capfd):
    (tmp_path / "text.txt").write_text("A b d\n" * 3)
    build = ["lm", "build", str(tmp_path / "text.txt"), "--run", str(run), "--out", str(tmp_path / "lm.arpa")]
    assert cli.main(build) == 0
    assert "warning: 3 of 9 words, 'd' first, have characters outside the alphabet 'abc '" in capfd.readouterr().err
    fails(capfd, [*build, "--characters", "abc "], 2, "--run and --characters both say the alphabet")
    fails(capfd, ["lm", "perplexity", tmp_path / "lm.arpa", tmp_path / "text.txt", "--run", tmp_path], 2, "config.json")
    score = ["--run", str(run), "--manifest", str(tones / "dev.jsonl"), "--name", "left", "--no-html"]
    assert cli.evaluate([*score, "--decoder", "beam", "--lm", build[-1]]) == 0
    assert "lm.arpa: 1 of its 3 words are left out: the alphabet 'abc ' cannot spell them" in capfd.readouterr().err


def test_lmplz_estimates_where_it_is_on_the_path(tmp_path, monkeypatch, capfd):
    (tmp_path / "bin").mkdir()
    (tmp_path / "text.txt").write_text("a b\n" * 3)
    build = ["lm", "build", str(tmp_path / "text.txt"), "--order", "2", "--out", str(tmp_path / "lm.arpa")]
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}")
    fails(capfd, [*build, "--estimator", "lmplz"], 1, "lmplz is not on the PATH")
    assert cli.main(build) == 0
    assert "2-grams of 3 sentences by kaldingram" in capfd.readouterr().out
    (tmp_path / "bin/lmplz").write_text('#!/bin/sh\nfor last; do :; done; /bin/cat > "$last"\n')
    (tmp_path / "bin/lmplz").chmod(0o755)
    assert cli.main(build) == 0
    assert "2-grams of 3 sentences by lmplz" in capfd.readouterr().out
    assert (tmp_path / "lm.arpa").read_text() == "a b\n" * 3
    assert cli.main([*build, "--estimator", "kaldingram"]) == 0
    assert "ngram 1=" in (tmp_path / "lm.arpa").read_text()


def test_the_binary_is_written_where_its_program_is(tmp_path, monkeypatch, capfd):
    (tmp_path / "bin").mkdir()
    (tmp_path / "text.txt").write_text("a b\n" * 3)
    build = ["lm", "build", str(tmp_path / "text.txt"), "--order", "2", "--out", str(tmp_path / "lm.arpa")]
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    assert cli.main(build) == 0
    fails(capfd, [*build, "--binary"], 1, "build_binary is not on the PATH")
    (tmp_path / "bin/build_binary").write_text('#!/bin/sh\n/bin/cp "$1" "$2"\n')
    (tmp_path / "bin/build_binary").chmod(0o755)
    assert cli.main([*build, "--no-binary"]) == 0
    assert not (tmp_path / "lm.binary").exists()
    assert cli.main(build) == 0
    assert (tmp_path / "lm.binary").read_bytes() == (tmp_path / "lm.arpa").read_bytes()
    assert f"wrote {tmp_path}/lm.binary" in capfd.readouterr().out
