"""The embedded demo corpus: connected digits and short commands, spoken by espeak-ng voices out of a wheel.

    plan_demo(seed) -> prompts of train, dev and test -> speak() -> FLAC files -> train.jsonl, dev.jsonl, test.jsonl

Beside each manifest lies a .ctm file with the times at which espeak-ng spoke each word, against which forced alignment
can be measured.

The plan is a pure function of the seed. espeak-ng is not: its pitch flutter, cycle count and gain control live in
static variables that neither a new voice nor espeak_Terminate resets, and its breath noise is seeded by the clock. So
every voice speaks its prompts, in the order of the plan, in a process of its own, from a fixed seed: the samples depend
on the plan alone, not on the number of workers nor on what was spoken before.
"""

import ctypes
import dataclasses
import hashlib
import io
import itertools
import json
import multiprocessing
import os
import random
import re
import shlex
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from jaxds2.audio import AudioError, probe_audio
from jaxds2.data.manifest import Utterance, write_manifest
from jaxds2.evaluation.sclite import Words, format_ctm
from jaxds2.files import write_whole
from jaxds2.worker import prepare_worker

RECIPE = 1
"""Raise it when the sound of a prompt changes: a corpus of an older recipe is spoken anew."""
SAMPLE_RATE = 16_000
"""Of the files, in Hz; espeak-ng speaks at 22,050."""

# ACCENT+VARIANT, fixed before anything was trained. A variant is a timbre, and no timbre serves two splits, nor do near
# relatives: the mean log-mel spectra of variants in different splits, saying the same words, are 0.56 or more apart
# (root mean square, nepers of power), which is why Mike, Alex, Nguyen, rob, victor, Gene2, john, steph2 and steph3 are
# in none. Left out as well: whispers, croaks, robots, the Klatt synthesizers, and `fast`, which is the plain voice.
# Women are fewer, so in training each speaks in two accents.
TRAIN_VOICES = (
    *("en-us+f1", "en-gb-x-rp+f3", "en-gb-scotland+f4", "en-us-nyc+aunty", "en-029+linda"),
    *("en-gb-x-gbclan+belinda", "en-us+Andrea", "en-gb-x-rp+anika", "en-gb-x-gbcwmd+grandma", "en-us+shelby"),
    *("en-gb-scotland+f1", "en-us+f3", "en-us-nyc+f4", "en-gb-x-rp+aunty", "en-us+linda"),
    *("en-us-nyc+belinda", "en-gb-scotland+Andrea", "en-us+anika", "en-gb-x-rp+grandma", "en-029+shelby"),
    *("en-us+m1", "en-gb-x-rp+m4", "en-gb-scotland+m5", "en-us-nyc+m8", "en-029+Diogo"),
    *("en-gb-x-gbclan+Hugo", "en-us+michel", "en-gb-x-rp+antonio", "en-gb-x-gbcwmd+pedro", "en-us+boris"),
    *("en-gb-scotland+ed", "en-us-nyc+grandpa", "en-029+gustave", "en-gb-x-gbclan+Mario", "en-us+marcelo"),
    *("en-gb-x-rp+max", "en-gb-scotland+sandro", "en-us+iven2", "en-us-nyc+iven4", "en-gb-x-gbcwmd+Storm"),
)
DEV_VOICES = ("en-us+steph", "en-gb-x-rp+Gene", "en-gb-scotland+Denis", "en-us-nyc+m2", "en-029+quincy", "en-us+pablo")
TEST_VOICES = (
    *("en-us+f2", "en-gb-x-rp+f5", "en-gb-scotland+Annie", "en-us-nyc+m3"),
    *("en-029+m6", "en-us+m7", "en-gb-x-rp+paul", "en-gb-x-gbclan+robert"),
)
SPLITS = {
    # split: voices, digit strings and commands that each of them speaks
    "train": (TRAIN_VOICES, 16, 14),
    "dev": (DEV_VOICES, 5, 5),
    "test": (TEST_VOICES, 8, 8),
}

MAX_DIGITS = 7
"""Words in the longest digit string; strings of 1, 2, ... words are equally many."""
HELD_OUT_WORDS = 4
"""A dev or test sentence of at least so many words stands nowhere in the training text, not even inside a sentence."""
SENTENCES_PER_WORD = 2
"""Commands with a word that at least are left for training, whatever dev and test take."""

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
GRAMMAR: dict[str, tuple[str, ...]] = {
    "command": (
        "turn {switch} the {room} {device}",
        "turn the {room} {device} {switch}",
        "set a timer for {number} {unit}",
        "set the heater to {number}",
        "set an alarm for {hour}",
        "wake me at {hour}",
        "call {person}",
        "call {person} at {place}",
        "what's the weather in {city} {day}",
        "what's the time in {city}",
        "what's the time",
        "{change} the music",
        "cancel the {clock}",
    ),
    "switch": ("on", "off"),
    "room": ("kitchen", "bedroom", "bathroom", "garden"),
    "device": ("light", "fan", "heater"),
    "number": ("{digit}", "ten", "fifteen", "{tens}", "{tens} {digit}"),
    "tens": ("twenty", "thirty", "forty", "fifty"),
    "digit": DIGITS[2:],
    "unit": ("minutes", "seconds"),
    "hour": ("{early}", "{early} fifteen", "{early} thirty", "{early} forty five"),
    "early": ("five", "six", "seven", "eight", "nine", "ten"),
    "person": ("anna", "emma", "peter", "david"),
    "place": ("home", "work"),
    "city": ("boston", "austin", "london"),
    "day": ("today", "tomorrow", "tonight"),
    "change": ("play", "stop"),
    "clock": ("timer", "alarm"),
}
"""Every sentence of `command` is drawn equally often. Words that sound alike (for and four, to and two, boston and
austin, fifteen and fifty) are told apart by their neighbours, which is what a language model knows."""

SPEAKING_RATES = (140, 180)
"""Words per minute, from and to, of a prompt."""
PITCHES = (40, 60)
"""espeak-ng's scale of 0 to 99, where 50 is the voice's own: 11 % lower to 13 % higher."""
PEAK_DB = (-9.0, -1.0)
"""Highest sample of the speech, relative to full scale: louder and softer, and never clipped."""
NOISE_DB = (-70.0, -55.0)
"""White noise under everything, RMS relative to full scale: no recording is digitally silent."""
MARGIN_SECONDS = (0.05, 0.15)
"""Noise before and after the speech."""

_MARKER = "demo.json"
_ESPEAK_SEED = 1
# espeak-ng cuts the path of its data at 160 bytes, and then looks for it on the machine that built the wheel.
_ESPEAK_PATH_BYTES = 120


class SpokenError(ValueError):
    """The demo corpus cannot be spoken; the message is one line."""


@dataclass(frozen=True)
class Prompt:
    """One utterance to be spoken."""

    id: str
    voice: str
    """espeak-ng's name: accent+variant."""
    text: str
    rate: int
    """Words per minute."""
    pitch: int
    """0 to 99, 50 is the voice's own."""
    sound_seed: tuple[int, int]
    """(seed, number of the prompt): keys its loudness, noise and margins."""

    def path(self, out: Path) -> Path:
        """Where its audio lies."""
        return out / "audio" / self.voice / f"{self.id}.flac"


@dataclass(frozen=True, eq=False)
class Speech:
    """What espeak-ng said."""

    samples_S: np.ndarray
    """int16."""
    words: Words
    """(word, start, end) in seconds from the first sample; a word ends where the next one starts. Words that espeak-ng
    runs together, such as `on the`, are one, `on_the`: it does not say where within it the second begins."""


def prepare_demo(out: str | Path, *, seed: int = 0, workers: int | None = None, progress: bool = True) -> list[Path]:
    """Write the demo corpus: FLAC files of 16 kHz mono, train.jsonl, dev.jsonl, test.jsonl, and .ctm files beside them.

    Work that stands is kept: a finished corpus of this seed is left alone, a half-finished one is completed, one of
    another seed is replaced.

    Args:
      out: folder of the corpus.
      seed: 0 or more; of sentences, speaking rates, pitches, loudness and noise. The voices do not depend on it.
      workers: voices that are spoken at a time; None: as many as there are cores. The samples do not depend on it.
      progress: show a progress bar on stderr.

    Returns:
      The manifests of train, dev and test.

    Raises:
      SpokenError: espeakng-loader is not installed or its library does not work, or `out` holds something else.
      WriteError: a file cannot be written.
    """
    out = Path(out)
    if seed < 0:
        raise SpokenError(f"seed is {seed}, expected 0 or more")
    if workers is not None and workers < 1:
        raise SpokenError(f"workers is {workers}, expected 1 or more")
    plan = plan_demo(seed)
    manifests = [out / f"{split}.jsonl" for split in plan]
    word_times = [manifest.with_suffix(".ctm") for manifest in manifests]
    prompts = [p for split in plan.values() for p in split]
    _claim(out, {"recipe": RECIPE, "seed": seed, "plan": _digest(prompts)}, [*manifests, *word_times])
    missing = _unspoken(prompts, out)
    if not missing and all(path.exists() for path in (*manifests, *word_times)):
        print(f"the demo corpus of seed {seed} stands in {out} already", file=sys.stderr)
        return manifests
    speak(missing, out, workers=workers or os.cpu_count() or 1, progress=progress)
    for manifest, (split, spoken) in zip(manifests, plan.items(), strict=True):
        utterances = [
            Utterance(p.id, p.path(out), probe_audio(p.path(out)).duration, p.text, speaker=p.voice) for p in spoken
        ]
        write_manifest(manifest, utterances)
        of_voices = sorted({_word_times(out, p.voice) for p in spoken})
        write_whole(manifest.with_suffix(".ctm"), "".join(path.read_text(encoding="utf-8") for path in of_voices))
        words, voices = sum(len(u.text.split()) for u in utterances), len({u.speaker for u in utterances})
        seconds = sum(u.duration for u in utterances)
        summary = f"{len(utterances)} utterances, voices: {voices}, words: {words}, {seconds:.0f} s"
        print(f"{split}: {summary}", file=sys.stderr)
    return manifests


def plan_demo(seed: int) -> dict[str, list[Prompt]]:
    """What is spoken by whom: split -> prompts, those of a voice together. A pure function of the seed."""
    rng = random.Random(seed)
    texts = _draw_texts(rng)
    numbers = itertools.count()
    plan: dict[str, list[Prompt]] = {}
    for split, (voices, *_) in SPLITS.items():
        rng.shuffle(texts[split])
        plan[split] = [
            Prompt(
                id=f"{voice}-{k:02d}",
                voice=voice,
                text=text,
                rate=rng.randint(*SPEAKING_RATES),
                pitch=rng.randint(*PITCHES),
                sound_seed=(seed, next(numbers)),
            )
            for i, voice in enumerate(voices)
            for k, text in enumerate(texts[split][i :: len(voices)])
        ]
    return plan


def speak(prompts: Sequence[Prompt], out: Path, *, workers: int, progress: bool = True) -> None:
    """Speak prompts to their files below `out`, and the times of a voice's words to a file beside them.

    The samples depend on the prompts of the voice and their order alone.

    A file is there whole or not at all.

    Raises:
      SpokenError: espeak-ng is missing, does not work, or does not know a voice.
      WriteError: a file cannot be written.
    """
    by_voice: dict[str, list[Prompt]] = {}
    for p in prompts:
        by_voice.setdefault(p.voice, []).append(p)
    if not by_voice:
        return
    _check_voices(by_voice)
    threads = ThreadPoolExecutor(workers)
    bar = tqdm(total=len(prompts), desc="speak", unit=" utterances", disable=None if progress else True)
    try:
        futures = {threads.submit(_speak_apart, group, out): len(group) for group in by_voice.values()}
        for done in as_completed(futures):
            done.result()
            bar.update(futures[done])
    finally:
        threads.shutdown(cancel_futures=True)
        bar.close()


def commands() -> list[str]:
    """Every sentence of the grammar, in its order."""
    return list(_expand("{command}"))


def _expand(rule: str) -> Iterator[str]:
    """All texts of a rule: the first {symbol} by each of its own rules, and so on."""
    symbol = re.search(r"\{(\w+)\}", rule)
    if symbol is None:
        yield rule
        return
    for choice in GRAMMAR[symbol[1]]:
        yield from _expand(rule[: symbol.start()] + choice + rule[symbol.end() :])


def _draw_texts(rng: random.Random) -> dict[str, list[str]]:
    """Split -> sentences. What test, then dev, has drawn is taken away from the splits that follow."""
    pool = commands()
    rng.shuffle(pool)
    texts: dict[str, list[str]] = {}
    held_out: list[str] = []
    for split in ("test", "dev", "train"):
        voices, num_digits, num_commands = SPLITS[split]
        count = len(voices) * num_commands
        if split == "train":
            drawn = list(itertools.islice(itertools.cycle(pool), count))
        else:
            drawn = _hold_out(pool, count)
            pool = [c for c in pool if not _contains_any(c, drawn)]
        texts[split] = drawn + _draw_digits(rng, len(voices) * num_digits, held_out)
        held_out += [t for t in texts[split] if len(t.split()) >= HELD_OUT_WORDS]
    return texts


def _hold_out(pool: Sequence[str], count: int) -> list[str]:
    """The first `count` long sentences that can be spared: no word may become rare, or nothing could learn it."""
    left = Counter(word for c in pool for word in set(c.split()))
    taken: list[str] = []
    for sentence in pool:
        words = sentence.split()
        if len(words) >= HELD_OUT_WORDS and all(left[w] > SENTENCES_PER_WORD for w in words):
            left.subtract(set(words))
            taken.append(sentence)
    return taken[:count]


def _draw_digits(rng: random.Random, count: int, held_out: Collection[str]) -> list[str]:
    drawn: list[str] = []
    while len(drawn) < count:
        text = " ".join(rng.choices(DIGITS, k=len(drawn) % MAX_DIGITS + 1))
        if not _contains_any(text, held_out):
            drawn.append(text)
    return drawn


def _contains_any(text: str, sentences: Collection[str]) -> bool:
    return any(f" {s} " in f" {text} " for s in sentences)


def _digest(prompts: Sequence[Prompt]) -> str:
    return hashlib.sha256(json.dumps([dataclasses.astuple(p) for p in prompts]).encode()).hexdigest()


def _claim(out: Path, identity: dict[str, int | str], files: Sequence[Path]) -> None:
    """Make `out` the folder of this corpus: refuse what is not ours, clear away what is ours but another corpus."""
    marker, audio = out / _MARKER, out / "audio"
    try:
        if json.loads(marker.read_text(encoding="utf-8")) == identity:
            return
    except FileNotFoundError:
        for foreign in (p for p in (audio, *files) if p.exists()):
            raise SpokenError(f"{foreign} is there already and not of a demo corpus; choose another folder") from None
    except (ValueError, UnicodeDecodeError):
        pass  # our marker, damaged
    if marker.exists():
        print(f"{out}: replacing a demo corpus of another seed or recipe", file=sys.stderr)
    for file in files:
        file.unlink(missing_ok=True)
    if audio.exists():
        shutil.rmtree(audio)
    write_whole(marker, json.dumps(identity, indent=2) + "\n")


def _unspoken(prompts: Sequence[Prompt], out: Path) -> list[Prompt]:
    """The prompts of every voice that lacks a file: to get the same samples it must speak all of them again."""
    voices = {p.voice for p in prompts if not (_is_spoken(p.path(out)) and _word_times(out, p.voice).exists())}
    return [p for p in prompts if p.voice in voices]


def _is_spoken(path: Path) -> bool:
    try:
        return probe_audio(path).sample_rate == SAMPLE_RATE
    except AudioError:
        return False


def _word_times(out: Path, voice: str) -> Path:
    """Where the word times of a voice lie; written last, so they belong to all its files."""
    return out / "audio" / voice / "words.ctm"


def _espeak_paths() -> tuple[Path, Path]:
    """The shared library and the data folder of the wheel."""
    try:
        import espeakng_loader
    except ImportError:
        raise SpokenError(
            f"the demo corpus is spoken by espeak-ng, which is not installed: "
            f"{shlex.quote(sys.executable)} -m pip install espeakng-loader"
        ) from None
    package = Path(espeakng_loader.get_library_path()).parent
    library, data = Path(espeakng_loader.get_library_path()), package / "espeak-ng-data"
    for path in (library, data):
        if not path.exists():
            raise SpokenError(
                f"{path} is missing; {shlex.quote(sys.executable)} -m pip install --force-reinstall espeakng-loader"
            )
    return library, data


def _check_voices(voices: Collection[str]) -> None:
    """Refuse names that the data folder lacks: espeak-ng speaks an unknown variant as the plain voice and says nothing.

    Names are compared as they are listed, since some file systems would find `F1` under `f1`.
    """
    _, data = _espeak_paths()
    accents = {p.name.lower() for p in (data / "lang" / "gmw").iterdir()}
    variants = {p.name for p in (data / "voices" / "!v").iterdir()}
    for voice in voices:
        accent, _, variant = voice.partition("+")
        if accent not in accents or variant not in variants:
            part = f"accent {accent!r}" if accent not in accents else f"variant {variant!r}"
            raise SpokenError(f"voice {voice}: espeak-ng has no {part} in {data}")


def _speak_apart(prompts: Sequence[Prompt], out: Path) -> None:
    """Speak the prompts of one voice in a process of their own, which leaves an interrupt to its parent."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context, initializer=prepare_worker) as process:
        try:
            process.submit(_speak_voice, prompts, out).result()
        except BrokenProcessPool:
            raise SpokenError(
                f"the process that spoke {prompts[0].voice} died (killed, or out of memory?); run it again"
            ) from None


def _speak_voice(prompts: Sequence[Prompt], out: Path) -> None:
    """Speak the prompts of one voice; only once in the life of a process (see the head of this file)."""
    with tempfile.TemporaryDirectory() as scratch:
        library, data = _espeak_paths()
        if len(os.fsencode(data)) > _ESPEAK_PATH_BYTES:
            link = Path(scratch) / data.name
            link.symlink_to(data)
            data = link
        espeak = _Espeak(library, data)
        words: list[Words] = []
        for p in prompts:
            speech = espeak.say(p)
            waveform_S, margin = _record(speech.samples_S, espeak.sample_rate, p)
            write_whole(p.path(out), _encode_flac(waveform_S))
            words.append([(word, margin + start, margin + end) for word, start, end in speech.words])
        write_whole(_word_times(out, prompts[0].voice), format_ctm([p.id for p in prompts], words))


def _record(speech_S: np.ndarray, sample_rate: int, prompt: Prompt) -> tuple[np.ndarray, float]:
    """int16 speech at `sample_rate` -> int16 recording at 16 kHz: margins, loudness and noise of the prompt's own.

    Returns:
      The recording, and the seconds before the speech in it.
    """
    import soxr

    rng = np.random.default_rng(prompt.sound_seed)
    x_S = soxr.resample(speech_S.astype(np.float32), sample_rate, SAMPLE_RATE, quality="HQ")
    x_S *= 10 ** (rng.uniform(*PEAK_DB) / 20) / np.abs(x_S).max()
    before, after = (round(SAMPLE_RATE * rng.uniform(*MARGIN_SECONDS)) for _ in range(2))
    x_S = np.pad(x_S, (before, after))
    x_S = x_S + 10 ** (rng.uniform(*NOISE_DB) / 20) * rng.standard_normal(len(x_S), dtype=np.float32)
    return np.rint(np.clip(x_S, -1, 1) * 32767).astype(np.int16), before / SAMPLE_RATE


def _encode_flac(waveform_S: np.ndarray) -> bytes:
    # In memory, so that a full disk is an OSError of Python's rather than libsndfile's.
    import soundfile

    file = io.BytesIO()
    soundfile.write(file, waveform_S, SAMPLE_RATE, format="FLAC", subtype="PCM_16")
    return file.getvalue()


class _Event(ctypes.Structure):
    """espeak_EVENT of espeak-ng's speak_lib.h."""

    _fields_ = (
        ("type", ctypes.c_int),
        ("unique_identifier", ctypes.c_uint),
        ("text_position", ctypes.c_int),  # of a word: its first character, counted from 1
        ("length", ctypes.c_int),
        ("audio_position", ctypes.c_int),  # milliseconds
        ("sample", ctypes.c_int),  # from the start of the speech
        ("user_data", ctypes.c_void_p),
        ("id", ctypes.c_void_p),  # a union of that size
    )


class _Espeak:
    """espeak-ng in this process, speaking into memory. Constants are those of its speak_lib.h."""

    _OUTPUT_SYNCHRONOUS = 2
    _DONT_EXIT = 0x8000  # without it a missing data folder ends the process
    _RATE, _PITCH = 1, 3
    _POSITION_CHARACTER = 1
    _UTF8 = 1
    _OK = 0
    _LAST_EVENT, _WORD, _END = 0, 1, 5

    def __init__(self, library: Path, data: Path):
        try:
            self._lib = ctypes.CDLL(str(library))
        except OSError as e:
            raise SpokenError(f"{library}: cannot be loaded ({e})") from None
        self._lib.espeak_Synth.argtypes = [
            *(ctypes.c_char_p, ctypes.c_size_t, ctypes.c_uint, ctypes.c_int, ctypes.c_uint, ctypes.c_uint),
            *(ctypes.c_void_p, ctypes.c_void_p),
        ]
        self._lib.espeak_ng_SetRandSeed.argtypes = [ctypes.c_long]
        self.sample_rate: int = self._lib.espeak_Initialize(
            self._OUTPUT_SYNCHRONOUS, 0, os.fsencode(data), self._DONT_EXIT
        )
        if self.sample_rate <= 0:
            raise SpokenError(
                f"espeak-ng cannot use its data in {data}; "
                f"{shlex.quote(sys.executable)} -m pip install --force-reinstall espeakng-loader"
            )
        self._lib.espeak_ng_SetRandSeed(_ESPEAK_SEED)
        self._pieces: list[np.ndarray] = []
        self._events: list[tuple[int, int, int]] = []  # type, position in the text, sample
        callback = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.POINTER(_Event))
        self._callback = callback(self._receive)  # kept: espeak-ng does not own it
        self._lib.espeak_SetSynthCallback(self._callback)

    def _receive(
        self, samples: "ctypes._Pointer[ctypes.c_short]", count: int, events: "ctypes._Pointer[_Event]"
    ) -> int:
        if samples and count > 0:
            self._pieces.append(np.ctypeslib.as_array(samples, (count,)).copy())
        number = 0
        while (event := events[number]).type != self._LAST_EVENT:
            self._events.append((event.type, event.text_position, event.sample))
            number += 1
        return 0

    def say(self, prompt: Prompt) -> Speech:
        """Speech at `sample_rate`."""
        self._pieces.clear()
        self._events.clear()
        text = prompt.text.encode()
        statuses = (
            self._lib.espeak_SetVoiceByName(prompt.voice.encode()),
            self._lib.espeak_SetParameter(self._RATE, prompt.rate, 0),
            self._lib.espeak_SetParameter(self._PITCH, prompt.pitch, 0),
            self._lib.espeak_Synth(text, len(text) + 1, 0, self._POSITION_CHARACTER, 0, self._UTF8, None, None),
        )
        if any(s != self._OK for s in statuses) or not any(p.any() for p in self._pieces):
            raise SpokenError(f"espeak-ng did not speak {prompt.text!r} as {prompt.voice} (status {statuses})")
        return Speech(np.concatenate(self._pieces), self._words(prompt.text))

    def _words(self, text: str) -> Words:
        """When each word was spoken, from the events; they name the words by their places in the text."""
        starts = {position - 1: sample for kind, position, sample in self._events if kind == self._WORD}
        ends = [sample for kind, _, sample in self._events if kind == self._END]
        places = sorted(starts)
        if places[:1] != [0] or len(ends) != 1 or any(text[place - 1] != " " for place in places[1:]):
            raise SpokenError(f"espeak-ng did not say when it spoke the words of {text!r} (events {self._events})")
        words = [text[i:j].strip().replace(" ", "_") for i, j in itertools.pairwise([*places, len(text)])]
        seconds = [sample / self.sample_rate for sample in (*(starts[place] for place in places), *ends)]
        return list(zip(words, seconds[:-1], seconds[1:], strict=True))
