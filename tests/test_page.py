import base64
import io
import json
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
import soundfile

from jaxds2.config import FeatureConfig
from jaxds2.data.manifest import Utterance, write_manifest
from jaxds2.data.shards import read_utterances, write_shards
from jaxds2.evaluation import page
from jaxds2.evaluation.breakdown import score_utterances
from jaxds2.evaluation.page import Media, Posteriors, build_page, collect_media, read_curve
from jaxds2.evaluation.report import write_report
from jaxds2.text import Vocabulary

VOCABULARY = Vocabulary("ab ")
FEATURES = FeatureConfig(n_mels=20)
IDS = ["evil </script><script>alert(1)</script>", "right", "wrong"]


def scored():
    return score_utterances(
        IDS, ["anna", None, "ben"], [1.0, 2.0, 1.5], ["a b", "b", "a a b"], ["<b> & é", "b", "a b b"]
    )


def build(tmp_path: Path, media=None) -> str:
    html: list[str] = []

    def render(report):
        audio = {i: tmp_path / f"{k} é.wav" for k, i in enumerate(IDS)}
        words = {"wrong": [("a", 0.1, 0.30004), ("b", 0.4, 0.5), ("b", 0.6, 0.7)]}
        html.append(
            build_page(
                report, scored(), audio=audio, media=media or {}, words=words, run="r", curve=[(1, 0.5), (2, 0.2)]
            )
        )
        return html[0]

    metadata = {"rtfx": 1.0, "manifest": "m.jsonl", "manifest_sha256": "ab" * 32, "checkpoint": "best"}
    write_report(tmp_path, scored(), checkpoint_step=7, decoder={"name": "greedy"}, page=render, **metadata)
    return html[0]


class Scripts(HTMLParser):
    """The scripts of a page, by id, as a browser would part them."""

    def __init__(self, html: str):
        super().__init__()
        self.found: dict[str, str] = {}
        self.inside: str | None = None
        self.links: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.links += [value or "" for name, value in attrs if name in ("src", "href")]
        self.inside = dict(attrs).get("id") or "" if tag == "script" else None

    def handle_endtag(self, tag):
        self.inside = None

    def handle_data(self, data):
        if self.inside is not None:
            self.found[self.inside] = self.found.get(self.inside, "") + data


def decoded(url: str) -> io.BytesIO:
    head, _, body = url.partition(";base64,")
    assert head.startswith("data:")
    return io.BytesIO(base64.b64decode(body))


def test_the_page_holds_every_utterance_whatever_its_texts_hold(tmp_path):
    scripts = Scripts(build(tmp_path)).found
    assert sorted(scripts) == ["", "data"]
    data = json.loads(scripts["data"])
    assert data["report"]["manifest_sha256"] == "ab" * 32
    assert data["curve"] == [[1, 0.5], [2, 0.2]]
    assert [u["id"] for u in data["utterances"]] == sorted(IDS)
    evil, right, wrong = data["utterances"]
    assert evil["pairs"] == [[None, "<b>"], ["a", "&"], ["b", "é"]]
    assert right["pairs"] == ["b"]
    assert wrong["pairs"] == ["a", ["a", "b"], "b"]
    assert (wrong["errors"], wrong["words"], wrong["characterErrors"], wrong["characters"]) == (1, 3, 1, 5)
    assert wrong["times"] == [["a", 0.1, 0.3], ["b", 0.4, 0.5], ["b", 0.6, 0.7]]
    assert right["times"] is None
    assert wrong["audio"] == (tmp_path / "2 é.wav").as_uri()


def test_the_page_asks_nothing_of_the_network(tmp_path):
    html = build(tmp_path)
    assert Scripts(html).links == []
    assert set(re.findall(r"https?://[^\"' ]+", html)) == {"http://www.w3.org/2000/svg"}  # a name, never fetched
    assert "@import" not in html
    assert "url(" not in html


def test_media_lie_beside_the_data_under_the_number_of_their_utterance(tmp_path):
    media = {"wrong": Media("data:a", "data:m", "data:p", ["a", "</script>", "blank"])}
    scripts = Scripts(build(tmp_path, media)).found
    assert json.loads(scripts["m2"]) == {
        "audio": "data:a",
        "mel": "data:m",
        "posteriors": "data:p",
        "labels": ["a", "</script>", "blank"],
    }
    data = json.loads(scripts["data"])
    assert (data["withAudio"], data["withPictures"]) == (1, 1)


def test_posteriors_keep_the_likely_classes_and_the_blank_last():
    probs_UV = np.array([[0.97, 0.01, 0.01, 0.01], [0.05, 0.9, 0.04, 0.01], [0.3, 0.05, 0.05, 0.6]])
    kept = Posteriors.of(np.log(probs_UV), VOCABULARY)
    assert kept.labels == ["a", "␣", "blank"]
    np.testing.assert_array_equal(kept.levels_RU, np.rint(31 * probs_UV[:, [1, 3, 0]].T))


def test_pictures_are_what_was_drawn_brighter_for_more():
    levels_HW = np.arange(60, dtype=np.uint8).reshape(4, 15) % 32
    pixels_HWC = matplotlib.image.imread(decoded(page._png(levels_HW)))
    assert pixels_HWC.shape[:2] == (4, 15)
    light_HW = pixels_HWC[..., :3] @ np.array([0.3, 0.6, 0.1])
    by_level = [light_HW[levels_HW == level] for level in range(32)]
    assert all(np.ptp(same) == 0 for same in by_level)
    assert (np.diff([same[0] for same in by_level]) > 0).all()


def utterance(utterance_id, path):
    return Utterance(audio_filepath=path, duration=1.0, text="", id=utterance_id)


@pytest.fixture
def recordings(tmp_path):
    """Three recordings, silent but for a tone in the middle third (1, 2, 3 kHz), and what a model thought of them."""
    utterances, posteriors = [], {}
    for k, i in enumerate(IDS):
        t = np.arange(16_000) / 16_000
        utterances.append(utterance(i, tmp_path / f"{k}.wav"))
        tone = np.sin(2 * np.pi * 1000 * (k + 1) * t) * (np.abs(t - 0.5) < 1 / 6)
        soundfile.write(utterances[k].audio_filepath, np.rint(8000 * tone).astype(np.int16), 16_000)
        posteriors[i] = Posteriors.of(np.log(np.full((25, 4), 0.25)), VOCABULARY)
    return utterances, posteriors


def test_sound_and_log_mel_are_those_of_the_recording(recordings):
    utterances, posteriors = recordings
    media = collect_media(utterances, posteriors, FEATURES)
    assert list(media) == IDS
    peaks = []
    for u in utterances:
        i = u.id
        samples_S, rate = soundfile.read(decoded(media[i].audio), dtype="int16")
        assert rate == 16_000
        np.testing.assert_array_equal(samples_S, soundfile.read(u.audio_filepath, dtype="int16")[0])
        light_HW = matplotlib.image.imread(decoded(media[i].mel))[..., :3].sum(axis=-1)
        assert light_HW.shape[0] == FEATURES.n_mels
        bright = light_HW.max(axis=0) > 0.5 * light_HW.max()
        assert bright[len(bright) // 2]
        assert not bright[0]
        assert not bright[-1]
        peaks.append(light_HW[:, len(bright) // 2].argmax())
        assert matplotlib.image.imread(decoded(media[i].posteriors)).shape[:2] == (4, 25)
    assert peaks == sorted(peaks, reverse=True)  # higher tones stand higher


def test_sound_of_a_long_set_is_compressed(recordings, monkeypatch):
    utterances, posteriors = recordings
    monkeypatch.setattr(page, "LOSSLESS_SECONDS", sum(u.duration for u in utterances) - 0.1)
    media = collect_media(utterances, posteriors, FEATURES)
    for u in utterances:
        assert media[u.id].audio.startswith("data:audio/mpeg;base64,")
        samples_S, rate = soundfile.read(decoded(media[u.id].audio))
        assert rate == 16_000
        given_S = soundfile.read(u.audio_filepath)[0]
        assert abs(len(samples_S) - len(given_S)) < 0.2 * rate  # the encoder's own delay and padding
        assert np.abs(np.fft.rfft(samples_S, 16_000)).argmax() == np.abs(np.fft.rfft(given_S, 16_000)).argmax()


def test_a_recording_shorter_than_a_frame_still_has_a_picture(tmp_path):
    soundfile.write(tmp_path / "a.wav", np.ones(FEATURES.n_fft, np.int16), 16_000)
    posteriors = {"a": Posteriors.of(np.zeros((1, 4)), VOCABULARY)}
    media = collect_media([utterance("a", tmp_path / "a.wav")], posteriors, FEATURES)
    assert matplotlib.image.imread(decoded(media["a"].mel)).shape[:2] == (FEATURES.n_mels, 1)


def test_the_first_get_sound_and_pictures_until_each_budget_is_spent(recordings):
    utterances, posteriors = recordings
    media = collect_media(utterances, posteriors, FEATURES, audio_bytes=1, picture_bytes=1 << 20)
    assert [bool(media[i].audio) for i in IDS] == [True, False, False]
    assert all(media[i].mel and media[i].posteriors for i in IDS)
    media = collect_media(utterances[::-1], posteriors, FEATURES, audio_bytes=1, picture_bytes=1)
    assert list(media) == [IDS[2]]


def test_sound_out_of_shards_is_that_of_the_files(recordings, tmp_path):
    utterances, posteriors = recordings
    write_manifest(tmp_path / "m.jsonl", [replace(u, text="a") for u in utterances])
    write_shards(tmp_path / "m.jsonl", tmp_path / "shards", workers=1, progress=False)
    packed = read_utterances(tmp_path / "shards")
    assert collect_media(packed, posteriors, FEATURES) == collect_media(utterances, posteriors, FEATURES)


def test_a_recording_that_is_gone_since_leaves_the_others(recordings):
    utterances, posteriors = recordings
    utterances[0].audio_filepath.unlink()
    assert list(collect_media(utterances, posteriors, FEATURES)) == IDS[1:]


def test_the_curve_is_of_the_evaluations_in_metrics_jsonl(tmp_path):
    lines = [
        '{"step": 10, "time": 1.0, "train/loss": 2.0}',
        '{"step": 20, "time": 2.0, "dev/wer": 0.5}',
        '{"step": 30, "time": 3.0, "dev/wer": null}',
        "[1]",
        '{"step": 40, "time": 4.0, "dev/wer": 0.25}',
        '{"step": 50, "ti',
    ]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    assert read_curve(tmp_path / "metrics.jsonl") == [(20, 0.5), (40, 0.25)]
    assert read_curve(tmp_path / "gone.jsonl") == []


def test_a_browser_draws_it(tmp_path):
    chromium = shutil.which("chromium") or pytest.skip("chromium is not installed")
    build(tmp_path)
    (tmp_path / "opened.html").write_text(
        (tmp_path / "report.html").read_text(encoding="utf-8")
        + "<script>document.querySelector('.utterance button').click();</script>",
        encoding="utf-8",
    )
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
    flags += ["--disable-background-networking", "--disable-component-update"]
    flags += [f"--user-data-dir={tmp_path / 'profile'}"]
    command = [chromium, *flags, "--dump-dom", (tmp_path / "opened.html").as_uri()]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    assert "3 of 3" in dom
    assert dom.count('class="utterance"') == 3
    assert "&lt;b&gt;" in dom
    assert "<polyline" in dom
    assert "The pictures of this utterance are not in this file." in dom
    assert "data-loaded-ms" in dom
