import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from jaxds2.audio import probe_audio, read_audio
from jaxds2.config import DataConfig
from jaxds2.data import spoken
from jaxds2.data.manifest import read_manifest
from jaxds2.data.spoken import (
    DIGITS,
    HELD_OUT_WORDS,
    MARGIN_SECONDS,
    SPLITS,
    Prompt,
    SpokenError,
    plan_demo,
    prepare_demo,
    speak,
)

VOICES = ("en-us+f2", "en-gb-scotland+m3", "en-us+shelby")  # f2 breathes: its noise is random unless seeded


def small_plan(texts: tuple[str, ...] = ("stop", "call anna"), voices: tuple[str, ...] = VOICES) -> list[Prompt]:
    return [
        Prompt(f"{voice}-{k:02d}", voice, text, rate=160, pitch=50, sound_seed=(0, 10 * i + k))
        for i, voice in enumerate(voices)
        for k, text in enumerate(texts)
    ]


SPOKEN = small_plan(voices=VOICES[:2])


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def spoken_by_one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("one")
    speak(SPOKEN, out, workers=1, progress=False)
    return out


def stub_speech(prompts, out, *, workers, progress=True):
    """In place of `speak`: noise, so that the folder's life can be tested in milliseconds."""
    for p in prompts:
        rng = np.random.default_rng(p.sound_seed)
        p.path(out).parent.mkdir(parents=True, exist_ok=True)
        p.path(out).write_bytes(spoken._encode_flac(rng.integers(-999, 999, 4000).astype(np.int16)))
    for voice in {p.voice for p in prompts}:
        rows = [f"{p.id} A 0.1 0.1 {word}\n" for p in prompts if p.voice == voice for word in p.text.split()]
        spoken._word_times(out, voice).write_text("".join(rows))


@pytest.fixture
def small_demo(monkeypatch: pytest.MonkeyPatch):
    """prepare_demo over one voice per split, without espeak-ng; returns the list of calls to `speak`."""
    calls: list[list[str]] = []

    def plan(seed: int) -> dict[str, list[Prompt]]:
        prompts = small_plan()
        by_voice = {s: [p for p in prompts if p.voice == v] for s, v in zip(SPLITS, VOICES, strict=True)}
        return {s: [replace(p, sound_seed=(seed, p.sound_seed[1])) for p in ps] for s, ps in by_voice.items()}

    def counted(prompts, out, **options):
        calls.append([p.id for p in prompts])
        stub_speech(prompts, out, **options)

    monkeypatch.setattr(spoken, "plan_demo", plan)
    monkeypatch.setattr(spoken, "speak", counted)
    return calls


def test_voices_and_timbres_of_the_splits_are_disjoint_and_exist():
    voices = [v for split_voices, *_ in SPLITS.values() for v in split_voices]
    assert len(voices) == len(set(voices))
    timbres = [{v.split("+")[1] for v in split_voices} for split_voices, *_ in SPLITS.values()]
    assert sum(map(len, timbres)) == len(set.union(*timbres))
    spoken._check_voices(voices)


@pytest.mark.parametrize("voice", ["en-us+nobody", "en-us", "en-us+F2", "en-gb+f2", "f2", "en-us+fabric/../f2"])
def test_a_voice_that_espeak_would_replace_in_silence_is_refused(voice: str, tmp_path: Path):
    with pytest.raises(SpokenError, match="espeak-ng has no"):
        speak(small_plan(voices=(voice,)), tmp_path, workers=1, progress=False)


def test_the_plan_is_a_pure_function_of_the_seed():
    assert plan_demo(3) == plan_demo(3)
    assert plan_demo(3) != plan_demo(4)
    assert [p.voice for p in plan_demo(3)["test"]] == [p.voice for p in plan_demo(4)["test"]]


@pytest.mark.parametrize("seed", range(5))
def test_no_long_sentence_of_dev_or_test_stands_in_the_training_text(seed: int):
    plan = plan_demo(seed)
    texts = {split: {p.text for p in prompts} for split, prompts in plan.items()}

    def runs(text: str) -> set[str]:
        words = text.split()
        ends = range(len(words) + 1)
        return {" ".join(words[i:j]) for i in ends for j in ends if j - i >= HELD_OUT_WORDS}

    said_in_training = set.union(*map(runs, texts["train"]))
    long = {split: {t for t in texts[split] if len(t.split()) >= HELD_OUT_WORDS} for split in texts}
    assert len(long["test"]) > 64
    assert not long["test"] & said_in_training
    assert not long["dev"] & said_in_training
    assert not long["test"] & set.union(*map(runs, texts["dev"]))


@pytest.mark.parametrize("seed", range(5))
def test_training_teaches_every_word_of_the_plan_and_the_alphabet_spells_it(seed: int):
    plan = plan_demo(seed)
    words = {split: {w for p in prompts for w in p.text.split()} for split, prompts in plan.items()}
    assert words["dev"] | words["test"] <= words["train"]
    assert 40 <= len(words["train"]) <= 65
    assert set("".join(words["train"])) <= set(DataConfig().characters)
    for split, (voices, digits, commands) in SPLITS.items():
        assert len(plan[split]) == len(voices) * (digits + commands)
        spelled = [p for p in plan[split] if set(p.text.split()) <= set(DIGITS)]
        assert len(spelled) == len(voices) * digits
        assert {len(p.text.split()) for p in spelled} == set(range(1, spoken.MAX_DIGITS + 1))
    assert sum(len(p.text.split()) for p in plan["test"]) >= 500
    ids = [p.id for prompts in plan.values() for p in prompts]
    assert len(ids) == len(set(ids))


def test_one_worker_and_two_and_another_order_of_voices_write_the_same_bytes(spoken_by_one: Path, tmp_path: Path):
    speak(SPOKEN[2:] + SPOKEN[:2], tmp_path, workers=2, progress=False)
    assert len(files(spoken_by_one)) == len(SPOKEN) + 2  # and the word times of each voice
    assert files(tmp_path) == files(spoken_by_one)


def test_the_flac_reads_back_with_the_duration_and_level_of_its_speech(spoken_by_one: Path):
    for prompt in SPOKEN:
        path = prompt.path(spoken_by_one)
        info, waveform_S = probe_audio(path), read_audio(path)
        assert (info.sample_rate, info.channels, info.num_samples) == (16_000, 1, len(waveform_S))
        syllables = {"stop": 1, "call anna": 3}[prompt.text]
        assert 0.15 * syllables < info.duration - 2 * MARGIN_SECONDS[0] < 0.6 + 0.3 * syllables
        assert 32_768 * 10 ** (-9.5 / 20) < np.abs(waveform_S.astype(int)).max() < 32_767 * 10 ** (-0.5 / 20)
        margin_S = waveform_S[: int(16_000 * MARGIN_SECONDS[0])].astype(float)
        assert 32_768 * 10 ** (-71 / 20) < margin_S.std() < 32_768 * 10 ** (-54 / 20)


LEVELS = {
    # prompt: samples, root mean squares of eight equal parts; espeakng-loader 0.2.4, before word times were written
    "en-us+f2-00": (10745, [10.7, 1292.9, 3682.4, 6699.3, 4441.2, 1729.5, 321.3, 12.5]),
    "en-us+f2-01": (14340, [54.1, 1785.6, 10909.0, 5330.8, 5802.5, 2439.8, 4128.7, 53.5]),
    "en-gb-scotland+m3-00": (9762, [17.3, 682.8, 1553.0, 6243.5, 3094.5, 248.8, 148.3, 18.5]),
    "en-gb-scotland+m3-01": (12390, [13.2, 1160.1, 4250.8, 1938.7, 3359.8, 961.0, 2771.2, 59.6]),
}


def test_the_speech_is_that_of_the_published_figures(spoken_by_one: Path):
    for prompt in SPOKEN:
        waveform_S = read_audio(prompt.path(spoken_by_one)).astype(float)
        length, levels = LEVELS[prompt.id]
        assert len(waveform_S) == length
        np.testing.assert_allclose([part.std() for part in np.array_split(waveform_S, 8)], levels, rtol=0.01)


def test_word_times_follow_each_other_and_are_where_the_voice_sounds(spoken_by_one: Path):
    for prompt in SPOKEN:
        waveform_S = read_audio(prompt.path(spoken_by_one)).astype(float)
        lines = (spoken_by_one / "audio" / prompt.voice / "words.ctm").read_text().splitlines()
        words = [line.split()[2:] for line in lines if line.startswith(f"{prompt.id} ")]
        assert [word for *_, word in words] == prompt.text.split()
        starts = [float(start) for start, _, _ in words]
        ends = [float(start) + float(seconds) for start, seconds, _ in words]
        np.testing.assert_allclose(ends[:-1], starts[1:], atol=0.0015)
        assert ends[-1] <= len(waveform_S) / 16_000 - MARGIN_SECONDS[0] + 0.001
        before_S = waveform_S[: int(16_000 * (starts[0] - 0.01))]
        first_S = waveform_S[int(16_000 * starts[0]) : int(16_000 * ends[0])]
        assert before_S.std() < 32_768 * 10 ** (-54 / 20) < first_S.std() / 3


def test_variants_differ_from_each_other_in_their_spectra(spoken_by_one: Path):
    prompts = [p for p in SPOKEN if p.text == "stop"]
    spectra = [np.abs(np.fft.rfft(read_audio(p.path(spoken_by_one)), 32_000)) for p in prompts]
    bands = [np.log(s[400:8000].reshape(-1, 200).mean(axis=1)) for s in spectra]  # 200 Hz to 4 kHz in 100 Hz bands
    shapes = [b - b.mean() for b in bands]
    assert np.sqrt(np.mean((shapes[0] - shapes[1]) ** 2)) > 0.3


def test_an_installation_under_a_long_path_speaks_the_same(
    spoken_by_one: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    library, data = spoken._espeak_paths()
    far = tmp_path / ("x" * 100) / ("y" * 100) / data.name
    far.parent.mkdir(parents=True)
    far.symlink_to(data)
    seen = []

    class Espeak:
        sample_rate = 22_050

        def __init__(self, _library, data):
            seen.append((data, (data / "phontab").exists()))

        def say(self, _prompt):
            return spoken.Speech(np.arange(-500, 500, dtype=np.int16), [])

    monkeypatch.setattr(spoken, "_espeak_paths", lambda: (library, far))
    monkeypatch.setattr(spoken, "_Espeak", Espeak)
    spoken._speak_voice(small_plan()[:1], tmp_path)
    [(given, works)] = seen
    assert works
    assert len(str(given)) <= spoken._ESPEAK_PATH_BYTES


def test_a_recording_is_never_clipped():
    square_S = np.where(np.arange(22_050) % 200 < 100, 32_767, -32_768).astype(np.int16)
    peaks = []
    for number in range(20):
        prompt = replace(small_plan()[0], sound_seed=(0, number))
        peaks.append(int(np.abs(spoken._record(square_S, 22_050, prompt)[0].astype(int)).max()))
    assert max(peaks) < 32_767
    assert max(peaks) / min(peaks) > 1.5


def test_manifests_name_every_utterance_of_the_plan(small_demo, tmp_path: Path):
    manifests = prepare_demo(tmp_path / "with space", seed=1, progress=False)
    assert [m.name for m in manifests] == ["train.jsonl", "dev.jsonl", "test.jsonl"]
    for manifest, prompts in zip(manifests, spoken.plan_demo(1).values(), strict=True):
        utterances = read_manifest(manifest)
        assert [(u.id, u.text, u.speaker) for u in utterances] == [(p.id, p.text, p.voice) for p in prompts]
        assert all(u.duration == probe_audio(u.audio_filepath).duration == 0.25 for u in utterances)
        assert not any(
            Path(json.loads(line)["audio_filepath"]).is_absolute() for line in manifest.read_text().splitlines()
        )
        timed = [line.split() for line in manifest.with_suffix(".ctm").read_text().splitlines()]
        assert [(i, word) for i, *_, word in timed] == [(p.id, word) for p in prompts for word in p.text.split()]


def test_a_second_call_does_nothing_and_says_so(small_demo, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    first = prepare_demo(tmp_path, progress=False)
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
    capsys.readouterr()
    assert prepare_demo(tmp_path, progress=False) == first
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")} == before
    assert len(small_demo) == 1
    assert "already" in capsys.readouterr().err


@pytest.mark.parametrize("damage", ["gone", "truncated", "manifest", "marker", "words"])
def test_a_half_finished_folder_is_completed_to_the_same_bytes(damage: str, small_demo, tmp_path: Path):
    manifests = prepare_demo(tmp_path, progress=False)
    whole = files(tmp_path)
    victim = spoken.plan_demo(0)["dev"][1].path(tmp_path)
    if damage == "gone":
        victim.unlink()
    elif damage == "truncated":
        victim.write_bytes(victim.read_bytes()[:20])
    elif damage == "manifest":
        manifests[0].unlink()
    elif damage == "words":  # as a corpus of a version that did not write them
        spoken._word_times(tmp_path, VOICES[1]).unlink()
    else:
        (tmp_path / "demo.json").write_text("{")
    prepare_demo(tmp_path, progress=False)
    assert files(tmp_path) == whole
    # A voice with a missing file speaks all its prompts again: the state of espeak-ng runs through them.
    again = {"gone": 2, "truncated": 2, "manifest": 0, "marker": 6, "words": 2}[damage]
    assert len(small_demo[1]) == again


def test_a_corpus_of_another_seed_is_replaced(small_demo, tmp_path: Path):
    prepare_demo(tmp_path / "a", seed=0, progress=False)
    prepare_demo(tmp_path / "a", seed=1, progress=False)
    prepare_demo(tmp_path / "b", seed=1, progress=False)
    assert files(tmp_path / "a") == files(tmp_path / "b")


@pytest.mark.parametrize("name", ["train.jsonl", "audio/mine.flac"])
def test_a_folder_of_something_else_is_refused_and_left_alone(name: str, small_demo, tmp_path: Path):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("precious")
    with pytest.raises(SpokenError, match="not of a demo corpus"):
        prepare_demo(tmp_path, progress=False)
    assert files(tmp_path) == {name: b"precious"}


def test_without_espeak_the_command_to_install_it_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setitem(sys.modules, "espeakng_loader", None)
    with pytest.raises(SpokenError, match=r"-m pip install espeakng-loader"):
        prepare_demo(tmp_path, progress=False)


def test_a_library_or_data_that_do_not_load_are_one_clear_line(tmp_path: Path):
    library, _ = spoken._espeak_paths()
    fake = tmp_path / "libespeak-ng.so"
    fake.write_text("not a library")
    with pytest.raises(SpokenError, match="cannot be loaded"):
        spoken._Espeak(fake, tmp_path)
    with pytest.raises(SpokenError, match="cannot use its data"):
        spoken._Espeak(library, tmp_path)


@pytest.mark.parametrize(("seed", "workers"), [(-1, 1), (0, 0)])
def test_impossible_numbers_are_refused(seed: int, workers: int, tmp_path: Path):
    with pytest.raises(SpokenError, match="expected"):
        prepare_demo(tmp_path, seed=seed, workers=workers)


def test_words_that_espeak_runs_together_have_one_time(tmp_path: Path):
    [prompt] = small_plan(("turn on the light",), VOICES[1:2])
    speak([prompt], tmp_path, workers=1, progress=False)
    lines = spoken._word_times(tmp_path, prompt.voice).read_text().splitlines()
    assert [line.split()[-1] for line in lines] == ["turn", "on_the", "light"]
