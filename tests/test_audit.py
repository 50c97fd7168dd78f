import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
from hypothesis import example, given
from hypothesis import strategies as st

from jaxds2.config import FeatureConfig
from jaxds2.data.audit import CLIPPED_SHARE, SHOWN_PER_KIND, Audit, Finding, _bar, _histogram, audit
from jaxds2.data.manifest import ManifestError, Utterance, write_manifest
from jaxds2.text import Vocabulary

VOCABULARY = Vocabulary("abcdefghijklmnopqrstuvwxyz' ")
WORDS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")


def output_frames(num_samples: int) -> int:
    return num_samples // 640  # 25 a second


def check(*manifests: Path) -> Audit:
    return audit(
        manifests, vocabulary=VOCABULARY, features=FeatureConfig(), output_frames=output_frames, progress=False
    )


def noise(seconds: float, seed: int, amplitude: float = 0.1) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-amplitude, amplitude, round(16_000 * seconds))


class Corpus:
    """Eight faultless utterances per manifest, one of which a test may spoil."""

    def __init__(self, root: Path):
        self.root = root

    def manifest(self, stem: str, seed: int = 0) -> list[Utterance]:
        utterances = []
        for i in range(8):
            path = self.root / stem / f"{stem}-{i}.wav"
            path.parent.mkdir(exist_ok=True)
            soundfile.write(path, noise(2.0 + i / 10, seed * 100 + i), 16_000)
            text = f"{stem} {WORDS[i]}".translate(str.maketrans("", "", "-_0123456789"))
            utterances.append(Utterance(f"{stem}-{i}", path, 2.0 + i / 10, text, f"{stem}-speaker-{i % 2}"))
        return utterances

    def write(self, stem: str, utterances: list[Utterance]) -> Path:
        path = self.root / f"{stem}.jsonl"
        write_manifest(path, utterances)
        return path

    def check_spoilt(self, samples_S: np.ndarray | None = None, **fields) -> tuple[Finding, ...]:
        """The findings when utterance train-3 (2.3 s) has this audio and these fields."""
        utterances = self.manifest("train")
        if samples_S is not None:
            soundfile.write(utterances[3].audio_filepath, samples_S, 16_000, subtype="FLOAT")
        utterances[3] = replace(utterances[3], **fields)
        return check(self.write("train", utterances)).findings


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    return Corpus(tmp_path)


def only(findings: tuple[Finding, ...], kind: str, severity: str, utterance: str | None = "train-3") -> str:
    """The detail of the only finding, which is of this kind."""
    assert [(f.kind, f.severity, f.utterance) for f in findings] == [(kind, severity, utterance)]
    assert Path(findings[0].manifest).name == "train.jsonl"
    return findings[0].detail


def test_a_clean_corpus_has_no_findings(corpus: Corpus):
    paths = [corpus.write(stem, corpus.manifest(stem, seed)) for seed, stem in enumerate(("train", "dev", "test"))]
    report = check(*paths)
    assert report.findings == ()
    assert report.errors == report.warnings == {}
    assert report.utterances == 24
    assert report.speakers == 6
    assert report.hours == pytest.approx(3 * 8 * 2.35 / 3600)
    train = report.manifests[0]
    assert (train.utterances, train.readable, train.speakers, train.words) == (8, 8, 2, 16)
    assert train.characters == 8 * len("train ") + sum(map(len, WORDS[:8]))
    assert (train.min_duration, train.median_duration, train.max_duration) == pytest.approx((2.0, 2.35, 2.7))
    assert report.render().endswith("PASSED: 0 errors, 0 warnings")


def test_bad_lines_are_errors_by_number_and_the_rest_is_audited(corpus: Corpus):
    path = corpus.write("train", corpus.manifest("train"))
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:3], b"{\n", *lines[3:], b'{"text": "\xff"}\n', lines[0]]))
    report = check(path)
    assert [(f.kind, f.severity, f.manifest, f.utterance) for f in report.findings] == [
        ("bad line", "error", str(path), None)
    ] * 3
    for finding, says in zip(
        report.findings,
        ("line 4: not JSON (", "line 10: not UTF-8 (", "line 11: id 'train-0' was already"),
        strict=True,
    ):
        assert finding.detail.startswith(says)
    assert report.utterances == 8
    assert report.render().endswith("FAILED: 3 errors (3 bad line), 0 warnings")
    path.write_text("{\n")
    assert check(path).errors == {"bad line": 1}


def test_missing_file(corpus: Corpus):
    findings = corpus.check_spoilt(audio_filepath=corpus.root / "gone.wav")
    assert "gone.wav: no such file" in only(findings, "unreadable", "error")


def test_truncated_file(corpus: Corpus):
    utterances = corpus.manifest("train")
    path = utterances[3].audio_filepath
    path.write_bytes(path.read_bytes()[:-5000])
    assert "truncated" in only(check(corpus.write("train", utterances)).findings, "unreadable", "error")


def test_empty_file(corpus: Corpus):
    assert "holds no samples" in only(corpus.check_spoilt(np.zeros(0)), "empty", "error")


def test_non_finite_samples(corpus: Corpus):
    samples_S = noise(2.3, 3)
    samples_S[7] = np.nan
    assert "sample 7 is nan" in only(corpus.check_spoilt(samples_S), "non-finite", "error")


@pytest.mark.parametrize("declared", [2.15, 2.45, 0.0])
def test_wrong_declared_duration(corpus: Corpus, declared: float):
    detail = only(corpus.check_spoilt(duration=declared), "wrong duration", "error")
    assert detail == f"declared {declared:.2f} s, decoded 2.30 s"


def test_a_duration_rounded_to_a_digit_is_right(corpus: Corpus):
    assert corpus.check_spoilt(duration=2.35) == ()


@pytest.mark.parametrize("text", ["", "  ", "?!"])
def test_empty_text(corpus: Corpus, text: str):
    only(corpus.check_spoilt(text=text), "empty text", "error")


def test_characters_outside_the_vocabulary(corpus: Corpus):
    detail = only(corpus.check_spoilt(text="train über 4"), "outside the vocabulary", "error")
    assert detail == "'4ü' in 'train über 4'"


def test_a_text_is_judged_as_training_normalises_it(corpus: Corpus):
    assert corpus.check_spoilt(text="Train — FOUR, isn’t?") == ()


def test_a_label_must_fit_its_frames_with_a_blank_between_equal_neighbours(corpus: Corpus):
    """2.3 s are 57 frames. 57 different neighbours just fit; one doubled letter needs the 58th."""
    fits = corpus.check_spoilt(text="abcdefgh" * 7 + "a")
    fails = corpus.check_spoilt(text="abcdefgh" * 7 + "h")
    assert [f.kind for f in fits] == ["speaking rate"]
    assert [f.kind for f in fails] == ["infeasible", "speaking rate"]
    assert (fails[0].severity, fails[0].utterance) == ("error", "train-3")
    assert fails[0].detail.startswith("58 frames needed, 57 there (2.30 s): 'abcdefgh")


@pytest.mark.parametrize("offset", [0.0, 0.3])
def test_silence_even_with_an_offset(corpus: Corpus, offset: float):
    only(corpus.check_spoilt(offset + noise(2.3, 0, 0.0005)), "silent", "warning")


def test_quiet_speech_is_not_silence(corpus: Corpus):
    assert corpus.check_spoilt(noise(2.3, 0, 0.002)) == ()


def test_clipping_but_not_normalisation_to_full_scale(corpus: Corpus):
    samples_S = noise(2.3, 3)
    limit = int(len(samples_S) * CLIPPED_SHARE)
    samples_S[:limit] = 1.0
    assert corpus.check_spoilt(samples_S) == ()
    samples_S[limit] = -1.0
    assert "at full scale" in only(corpus.check_spoilt(samples_S), "clipped", "warning")


@pytest.mark.parametrize(("text", "rate"), [("seven eight nine ten eleven", "11.7"), ("a", "0.4")])
def test_speaking_rate_far_from_that_of_the_manifest(corpus: Corpus, text: str, rate: str):
    detail = only(corpus.check_spoilt(text=text), "speaking rate", "warning")
    assert detail.startswith(f"{rate} characters/s (median here ")


def test_nobody_speaks_faster_than_the_absolute_limit(corpus: Corpus):
    utterances = [replace(u, text=WORDS[i] * 15) for i, u in enumerate(corpus.manifest("train"))]
    report = audit(
        [corpus.write("train", utterances)],
        vocabulary=VOCABULARY,
        features=FeatureConfig(),
        output_frames=lambda num_samples: num_samples,
        progress=False,
    )
    fast = {u.id for u in utterances if len(u.text) / u.duration > 30}
    assert 0 < len(fast) < 8
    assert {f.utterance for f in report.findings if f.kind == "speaking rate"} == fast


def test_the_same_audio_twice(corpus: Corpus):
    utterances = corpus.manifest("train")
    twice = corpus.root / "twice.flac"  # the same samples in another container
    samples_S, _ = soundfile.read(utterances[1].audio_filepath, dtype="int16")
    soundfile.write(twice, samples_S, 16_000)
    utterances[3] = replace(utterances[3], audio_filepath=twice, duration=utterances[1].duration)
    detail = only(check(corpus.write("train", utterances)).findings, "duplicate", "warning")
    assert detail.startswith("same audio as train-1 in ")


def test_the_same_id_in_two_manifests(corpus: Corpus):
    train, dev = corpus.manifest("train", 0), corpus.manifest("dev", 1)
    train[3] = replace(train[3], id="dev-5")
    findings = check(corpus.write("dev", dev), corpus.write("train", train)).findings
    assert only(findings, "duplicate", "warning", "dev-5").startswith("same id in ")


def test_a_speaker_shared_with_a_test_manifest_is_an_error(corpus: Corpus):
    train, test = corpus.manifest("train", 0), corpus.manifest("test-clean", 1)
    train[3] = replace(train[3], speaker="test-clean-speaker-1")
    for order in (1, -1):
        paths = [corpus.write("train", train), corpus.write("test-clean", test)][::order]
        detail = only(check(*paths).findings, "speaker shared with test", "error", None)
        assert detail.startswith("speaker test-clean-speaker-1: 1 here, 4 in ")
        assert detail.endswith("test-clean.jsonl")


@pytest.mark.parametrize(
    ("stem", "kind"),
    [
        *((stem, "speaker shared with test") for stem in ("test", "an4_test", "Test2", "mini.test-other")),
        *((stem, "speaker shared") for stem in ("latest", "contest-dev", "testing")),
    ],
)
def test_test_is_a_word_of_the_name_of_a_manifest(corpus: Corpus, stem: str, kind: str):
    train = corpus.manifest("train")[:1]
    (corpus.root / "test").mkdir()  # nor does a folder make a test manifest
    other = [replace(train[0], id="other", audio_filepath=corpus.root / "gone.wav", text="other")]
    findings = check(corpus.write("train", train), corpus.write(f"test/{stem}", other)).findings
    assert [f.kind for f in findings if "speaker" in f.kind] == [kind]


def test_a_speaker_shared_with_another_manifest_is_a_warning(corpus: Corpus):
    train, dev = corpus.manifest("train", 0), corpus.manifest("dev", 1)
    train[3] = replace(train[3], speaker="dev-speaker-1")
    findings = check(corpus.write("train", train), corpus.write("dev", dev)).findings
    only(findings, "speaker shared", "warning", None)


def test_utterances_without_a_speaker_share_none(corpus: Corpus):
    train, test = ([replace(u, speaker=None) for u in corpus.manifest(s, i)] for i, s in enumerate(("train", "test")))
    report = check(corpus.write("train", train), corpus.write("test", test))
    assert report.findings == ()
    assert report.speakers == 0


def test_a_text_shared_between_manifests_is_a_warning_once(corpus: Corpus):
    train, test = corpus.manifest("train", 0), corpus.manifest("test", 1)
    train[3] = replace(train[3], text="Test one.")
    findings = check(corpus.write("train", train), corpus.write("test", test)).findings
    assert only(findings, "text shared", "warning", None).startswith("'test one': 1 here, 1 in ")


def test_a_text_may_recur_within_a_manifest(corpus: Corpus):
    assert corpus.check_spoilt(text="train one") == ()


def test_a_manifest_error_passes_through(corpus: Corpus):
    with pytest.raises(ManifestError, match="no manifest"):
        check(corpus.root / "gone.jsonl")
    train = corpus.write("train", corpus.manifest("train"))
    with pytest.raises(ManifestError, match="given 2 times"):
        check(train, corpus.root / "train" / ".." / "train.jsonl")


def test_a_manifest_of_unreadable_files_is_still_reported(corpus: Corpus):
    utterances = [Utterance(f"u{i}", corpus.root / f"{i}.wav", 1.0, "one") for i in range(SHOWN_PER_KIND + 5)]
    report = check(corpus.write("train", utterances))
    assert report.errors == {"unreadable": SHOWN_PER_KIND + 5}
    page = report.render()
    assert page.count("no such file") == SHOWN_PER_KIND
    assert "... and 5 more" in page
    assert page.endswith(f"FAILED: {SHOWN_PER_KIND + 5} errors ({SHOWN_PER_KIND + 5} unreadable), 0 warnings")


def test_render_and_json_hold_every_kind_of_fault(corpus: Corpus):
    utterances = corpus.manifest("train")
    utterances[2] = replace(utterances[2], text="größe")
    utterances[3] = replace(utterances[3], duration=9.0)
    soundfile.write(utterances[5].audio_filepath, np.zeros(40_000), 16_000)
    report = check(corpus.write("train", utterances))
    assert report.errors == {"wrong duration": 1, "outside the vocabulary": 1}
    assert report.warnings == {"silent": 1}
    page = report.render()
    verdict = "FAILED: 2 errors (1 wrong duration, 1 outside the vocabulary), 1 warning (1 silent)"
    assert page.splitlines()[-1] == verdict
    for expected in ("error: wrong duration (1)", "train-2: 'ßö' in 'größe'", "warning: silent (1)"):
        assert expected in page
    tree = json.loads(json.dumps(report.to_dict()))
    assert tree["passed"] is False
    assert [f["severity"] for f in tree["findings"]] == ["error", "error", "warning"]
    assert sum(tree["durations"]["counts"]) == sum(tree["speaking_rates"]["counts"]) == 8


@given(st.lists(st.floats(1e-3, 1e5), min_size=1, max_size=50))
@example([1.0, 2.0])  # a multiple of the width that floating point puts one bin too low
def test_a_histogram_counts_every_value_in_few_bins(values: list[float]):
    histogram = _histogram(values)
    assert sum(histogram.counts) == len(values)
    assert 1 <= len(histogram.counts) <= 12
    assert len(histogram.edges) == len(histogram.counts) + 1
    assert histogram.edges[0] - 1e-3 <= min(values)
    assert max(values) <= histogram.edges[-1] + 1e-3
    assert histogram.counts[0] > 0


def test_bars_are_as_long_as_their_share():
    assert _bar(1.0) == "█" * 40
    assert _bar(0.5 + 1 / 80) == "█" * 20 + "▌"
    assert _bar(1e-9) == "▏"
    assert _bar(0.0) == ""


def test_an4_has_no_errors(corpora: Path, tmp_path: Path):
    for split in ("train", "test"):
        utterances = []
        for line in (corpora / f"an4/etc/an4_{split}.transcription").read_text().splitlines():
            text, _, name = line.rstrip(")").rpartition("(")
            path = next((corpora / "an4/wav").glob(f"*/{name.split('-')[1]}/{name}.wav"))
            seconds = soundfile.info(path).duration
            words = text.replace("<s>", "").replace("</s>", "").strip().lower()
            utterances.append(Utterance(name, path, seconds, words, name.split("-")[1]))
        write_manifest(tmp_path / f"{split}.jsonl", utterances)
    report = check(tmp_path / "train.jsonl", tmp_path / "test.jsonl")
    assert report.utterances == 1078
    assert report.errors == {}
    assert set(report.warnings) == {"text shared"}
