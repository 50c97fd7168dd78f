"""Decoders side by side: word error rate and utterances a second of every back end that is installed, by its pruning.

    python benchmarks/decoding.py                                       # made-up log-probabilities
    python benchmarks/decoding.py --logprobs runs/an4-*/eval/lp --lm lm.arpa --tuned runs/an4-dev

The made-up ones are of a seeded language of 2,000 words: 27 words an utterance, each character a peak of one or two
frames among blanks; of the characters some are in doubt and some are wrong beyond doubt. There each back end's weights
are chosen on a development part, with the default pruning. Real ones are of one model or of several, all on the same
manifest; weights are what the command line says, or `--tuned RUN`: what `jaxds2 lm tune` found for each back end with
RUN, pruning too. Speed and WER stand beside those of the first row, pyctcdecode with its default pruning where both are
asked for: times as fast, and the difference in points with its paired interval of 95 %. Intervals are over speakers, as
those of eval.py, or utterances. One core each, by process time. The JSON also says which models, which language model
and which tuned run the numbers are of.

Each row decodes all utterances, so a wide search takes minutes: pyctcdecode reads 0.8 of the made-up ones a second.
`--backends`, `--prunings` and `--blank-thresholds` choose the rows; the others stand beside the first one. For the
table of wide ones:

    python benchmarks/decoding.py --prunings default wide --blank-thresholds no
"""

import argparse
import datetime
import hashlib
import itertools
import json
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import side_by_side

from jaxds2.data.manifest import ManifestError, manifest_path
from jaxds2.data.shards import ShardError, read_utterances
from jaxds2.decoding.blanks import kept_frames
from jaxds2.decoding.decoder import BACKENDS, DecoderChoice, make_decoder
from jaxds2.decoding.hypothesis import DecoderError
from jaxds2.decoding.lm import LMError, WordModel, build_ngram, open_model
from jaxds2.decoding.settings import BeamSettings
from jaxds2.decoding.tuned import read_tuned
from jaxds2.evaluation.logprobs import LogProbs, LogProbsError, check_same, read_log_probs
from jaxds2.evaluation.metrics import align_words, count_alignment
from jaxds2.evaluation.sclite import format_trn
from jaxds2.evaluation.significance import Units, percentile_interval, resample, resampling_units
from jaxds2.text import Vocabulary

CHARACTERS = "abcdefghijklmnopqrstuvwxyz' "
WORDS, UTTERANCE, FOLLOWERS = 2_000, 27, 20
DOUBTFUL, WRONG = 0.06, 0.015
ALPHAS, BETAS = (0.1, 0.2, 0.3, 0.5, 1.0, 1.5), (-1.0, 0.0, 0.5, 1.0, 2.0, 3.0, 4.0)
PRUNINGS = {
    "default": {},  # first, since all others stand beside pyctcdecode's
    "narrow": {"beam_width": 25},
    "wide": {"beam_width": 200, "beam_prune_logp": -20.0, "token_min_logp": -8.0},
}
BLANK_THRESHOLDS = (None, 0.999)
PACKAGES = ("pyctcdecode", "kenlm-ex", "flashlight-text", "ctc-beam-decoder")


class Language:
    """Sentences in which a word has FOLLOWERS likely successors, the likelier the commoner."""

    def __init__(self, rng: np.random.Generator) -> None:
        letters = np.array(list("etaoinshrdlucmfwypvbgk"))
        chances = 1 / np.arange(3, 3 + len(letters))
        words: dict[str, None] = {}
        while len(words) < WORDS:
            words["".join(rng.choice(letters, rng.integers(2, 9), p=chances / chances.sum()))] = None
        self.words = list(words)
        self._rng = rng
        common = 1 / np.arange(10, 10 + WORDS)
        self._followers = rng.choice(WORDS, (WORDS, FOLLOWERS), p=common / common.sum())

    def sentence(self) -> str:
        """UTTERANCE words."""
        at, out = int(self._rng.integers(WORDS)), []
        for _ in range(UTTERANCE):
            out.append(self.words[at])
            at = int(self._followers[at, min(self._rng.geometric(0.15) - 1, FOLLOWERS - 1)])
        return " ".join(out)


def speak(text: str, vocabulary: Vocabulary, rng: np.random.Generator) -> np.ndarray:
    """log_probs_UV of a text, float32."""
    rows = []
    letters = vocabulary.encode("abcdefghijklmnopqrstuvwxyz")
    for label in vocabulary.encode(text):
        peak, other, kind = rng.uniform(0.85, 0.999), int(rng.choice(letters)), rng.random()
        probs_V = rng.dirichlet(np.full(vocabulary.size, 0.05)) * (1 - peak)
        if kind < WRONG:
            probs_V[other] += peak
        elif kind < WRONG + DOUBTFUL:
            share = rng.uniform(0.3, 0.6)
            probs_V[[label, other]] += peak * share, peak * (1 - share)
        else:
            probs_V[label] += peak
        rows += [probs_V] * int(rng.integers(1, 3))
        for _ in range(int(rng.integers(1, 4))):
            sure = 1 - 10 ** -rng.uniform(2, 6)
            blank_V = rng.dirichlet(np.full(vocabulary.size, 0.05)) * (1 - sure)
            blank_V[0] += sure
            rows.append(blank_V)
    return np.log(np.maximum(rows, 1e-12)).astype(np.float32)


@dataclass(frozen=True)
class Score:
    """Of one decoder."""

    errors_UM: np.ndarray
    """Of each utterance as each model hears it."""
    words_U: np.ndarray
    """Of its reference."""
    units: Units
    """Over which intervals are."""
    speed: float
    """Utterances a second of one core."""
    hyps: list[list[str]] = field(default_factory=list)
    """Of each model."""

    @property
    def wers(self) -> list[float]:
        """Of each model, in percent."""
        return (100 * self.errors_UM.sum(axis=0) / self.words_U.sum()).tolist()

    @property
    def wer(self) -> float:
        """The mean of the models."""
        return float(np.mean(self.wers))

    def interval(self, base: "Score | None" = None) -> tuple[float, float]:
        """Of the WER, or of what it has more than the base, in points."""
        errors_UM = self.errors_UM if base is None else self.errors_UM - base.errors_UM
        sums_RK = resample(np.stack([errors_UM.sum(axis=1), self.words_U], axis=1), self.units)
        return percentile_interval(100 * sums_RK[:, 0] / (sums_RK[:, 1] * errors_UM.shape[1]))


@dataclass(frozen=True)
class Material:
    """What is decoded."""

    refs: list[str]
    log_probs: list[list[np.ndarray]]
    """Of each model, of each reference, (U, V)."""
    units: Units
    models: list[dict[str, Any]] = field(default_factory=list)
    """Whose log-probabilities they are, for JSON; empty: made up."""

    def part(self, rows: slice) -> "Material":
        """Some of the utterances."""
        units = resampling_units([None] * len(self.refs[rows]))
        return Material(self.refs[rows], [model[rows] for model in self.log_probs], units)


def make_up(utterances: int, lm: Path) -> tuple[Vocabulary, Material]:
    """Of the seeded language, whose 3-gram is written to `lm`."""
    rng = np.random.default_rng(0)
    vocabulary, language = Vocabulary(CHARACTERS), Language(rng)
    build_ngram([language.sentence() for _ in range(6_000)], lm)
    refs = [language.sentence() for _ in range(utterances)]
    log_probs = [speak(ref, vocabulary, rng) for ref in refs]
    return vocabulary, Material(refs, [log_probs], resampling_units([None] * len(refs)))


def read_real(folders: list[Path]) -> tuple[Vocabulary, Material]:
    """What eval.py --save-logprobs kept, of one manifest, which is as it was then.

    Raises:
      LogProbsError: damaged ones, or of another alphabet or manifest. ManifestError, ShardError: a bad manifest.
    """
    models = [read_log_probs(folder) for folder in folders]
    first = models[0]
    manifest = Path(first.manifest)
    vocabulary, utterances = Vocabulary(first.characters), read_utterances(manifest)
    digest, ids = hashlib.sha256(manifest_path(manifest).read_bytes()).hexdigest(), [u.id for u in utterances]
    for folder, model in zip(folders, models, strict=True):
        check_same(model, characters=first.characters, ids=ids, manifest_sha256=digest, where=str(folder))
    refs = [vocabulary.normalize(u.text) for u in utterances]
    units = resampling_units([u.speaker for u in utterances])
    log_probs = [list(model.log_probs) for model in models]
    return vocabulary, Material(refs, log_probs, units, [origin(model) for model in models])


def origin(model: LogProbs) -> dict[str, Any]:
    """Which model it was, for JSON: without the folders of this machine."""
    said = {name: getattr(model, name) for name in ("checkpoint", "checkpoint_step", "manifest_sha256")}
    return {"run": Path(model.run).name or model.run, **said}


def measure(choice: DecoderChoice, lm: WordModel | None, vocabulary: Vocabulary, material: Material) -> Score:
    """Decode and count."""
    decode = make_decoder(choice, vocabulary, lm)
    start = time.process_time()
    texts = [[decode(log_probs_UV)[0].text for log_probs_UV in model] for model in material.log_probs]
    seconds = time.process_time() - start
    counts = [[count_alignment(pairs) for pairs in align_words(material.refs, hyps)] for hyps in texts]
    errors_UM = np.array([[c.errors for c in model] for model in counts]).T
    words_U = np.array([c.reference for c in counts[0]])
    return Score(errors_UM, words_U, material.units, errors_UM.size / seconds, texts)


def write_trn(folder: Path | None, name: str, texts: list[str]) -> None:
    """One text of each utterance as sclite reads it; None: nowhere."""
    if folder:
        folder.mkdir(parents=True, exist_ok=True)
        ids = [f"utt{number:03}" for number in range(len(texts))]
        (folder / f"{name}.trn").write_text(format_trn(ids, [None] * len(ids), texts), encoding="utf-8")


def threshold(text: str) -> float | None:
    """Of the command line."""
    return None if text == "no" else float(text)


def searched(material: Material, blank: float | None) -> float:
    """The share of the frames that a search sees, 0 to 1."""
    frames = list(itertools.chain.from_iterable(material.log_probs))
    return sum(len(x) if blank is None else len(kept_frames(x, blank)) for x in frames) / sum(map(len, frames))


def searches(arguments: argparse.Namespace, best: DecoderChoice) -> Iterator[tuple[str, DecoderChoice]]:
    """The rows of a back end, with the name of their pruning."""
    if arguments.tuned:
        yield "tuned", best
        return
    for name, blank in itertools.product(arguments.prunings, arguments.blank_thresholds):
        yield name, replace(best, blank_threshold=blank, beam=replace(best.beam, **PRUNINGS[name]))


def candidates(arguments: argparse.Namespace, backend: str, lm: Path) -> list[DecoderChoice]:
    """What may be the best weights of a back end: all of a grid for made-up material, else one pair."""
    if arguments.tuned:
        entry = read_tuned(arguments.tuned).get(backend)
        if entry is None:
            raise DecoderError(f"{arguments.tuned}: no settings for it; jaxds2 lm tune --backend {backend}")
        settings = entry["settings"]
        beam = BeamSettings(**{name: value for name, value in settings.items() if name != "blank_threshold"})
        return [DecoderChoice("beam", backend, lm=lm, blank_threshold=settings["blank_threshold"], beam=beam)]
    pair = (arguments.alpha, arguments.beta)
    weights = [pair] if arguments.logprobs else itertools.product(ALPHAS, BETAS)
    return [DecoderChoice("beam", backend, lm=lm, beam=BeamSettings(alpha=a, beta=b)) for a, b in weights]


HEAD = ("back end", "alpha / beta", "beam, prune, token", "blanks collapsed", "frames, %", "WER, %", "interval")
HEAD += ("of each model", "more, points", "interval", "utterances/s", "times as fast")


def row(name: str, choice: DecoderChoice, score: Score, base: Score, seen: float) -> tuple[list[str], dict[str, Any]]:
    """A line of the table, and the same for JSON."""
    beam, interval, more = choice.beam, score.interval(), score.interval(base)
    record: dict[str, Any] = {"backend": choice.backend, **beam.weights, **beam.pruning}
    record |= {"blank_threshold": choice.blank_threshold, "frames": seen}
    record |= {"wer": score.wer, "wer_interval": interval, "wers": score.wers, "wer_more": score.wer - base.wer}
    record |= {"interval": more, "utterances_per_second": score.speed, "times_as_fast": score.speed / base.speed}
    cells = [choice.backend, f"{beam.alpha:g} / {beam.beta:g}"]
    cells += [f"{name}: {beam.beam_width}, {beam.beam_prune_logp:g}, {beam.token_min_logp:g}"]
    cells += [str(choice.blank_threshold or "no"), f"{100 * seen:.0f}", f"{score.wer:.2f}"]
    cells += ["{:.2f} to {:.2f}".format(*interval), ", ".join(f"{wer:.2f}" for wer in score.wers)]
    cells += [f"{score.wer - base.wer:+.2f}", "{:+.2f} to {:+.2f}".format(*more)]
    return [*cells, f"{score.speed:.1f}", f"{score.speed / base.speed:.2f}"], record


def main() -> None:
    """Print the table and write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--utterances", type=int, default=300, help="made up to be measured (default: 300)")
    parser.add_argument("--dev", type=int, default=30, help="made up to choose weights on (default: 30)")
    parser.add_argument(
        "--logprobs", type=Path, nargs="+", metavar="EVAL_DIR", help="real ones, as eval.py --save-logprobs kept"
    )
    parser.add_argument("--lm", type=Path, help="for real ones")
    parser.add_argument("--alpha", type=float, default=0.5)
    parser.add_argument("--beta", type=float, default=2.0)
    parser.add_argument("--tuned", type=Path, metavar="RUN", help="settings of each back end, by jaxds2 lm tune")
    parser.add_argument("--prunings", nargs="+", choices=PRUNINGS, default=list(PRUNINGS), help="default: all")
    parser.add_argument("--backends", nargs="+", choices=BACKENDS, default=list(BACKENDS), help="default: all")
    parser.add_argument(
        "--blank-thresholds",
        nargs="+",
        type=threshold,
        default=list(BLANK_THRESHOLDS),
        metavar="no|P",
        help="collapse blank frames beyond P; no: search every frame (default: no 0.999)",
    )
    parser.add_argument("--trn", type=Path, metavar="DIR", help="also write the texts of the first model for sclite")
    parser.add_argument("--json", type=Path, metavar="FILE", help="default: benchmarks/results/DATE-cpu-decoding.json")
    arguments = parser.parse_args()
    if arguments.logprobs and not arguments.lm:
        parser.error("--logprobs needs --lm, a language model of the same words")
    if arguments.tuned and not arguments.logprobs:
        parser.error("--tuned goes with --logprobs; the weights of made-up ones are chosen here")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        lm_path = arguments.lm if arguments.logprobs else Path(folder) / "lm.arpa"
        if arguments.logprobs:
            vocabulary, material = read_real(arguments.logprobs)
            dev = material
        else:
            vocabulary, both = make_up(arguments.dev + arguments.utterances, lm_path)
            dev, material = both.part(slice(arguments.dev)), both.part(slice(arguments.dev, None))
        lm = open_model(lm_path, vocabulary)
        greedy = measure(DecoderChoice(), None, vocabulary, material)
        write_trn(arguments.trn, "ref", material.refs)
        write_trn(arguments.trn, "greedy", greedy.hyps[0])
        wers, interval = ", ".join(f"{wer:.2f}" for wer in greedy.wers), "{:.2f} to {:.2f}".format(*greedy.interval())
        print(f"{greedy.errors_UM.size} utterances, intervals over {material.units.count} {material.units.kind}")
        print(f"greedy: WER {greedy.wer:.2f} % ({interval}), of each model {wers}; {greedy.speed:.0f} utterances/s\n")
        print(f"| {' | '.join(HEAD)} |\n" + "|---" * len(HEAD) + "|")
        base: Score | None = None
        for backend in arguments.backends:
            try:
                choices = candidates(arguments, backend, lm_path)
                make_decoder(choices[0], vocabulary, lm)
            except DecoderError as e:
                print(f"| {backend} | left out: {e} |" + " |" * (len(HEAD) - 2))
                continue
            tuned = [measure(c, lm, vocabulary, dev).wer for c in choices] if len(choices) > 1 else [0.0]
            for name, choice in searches(arguments, choices[int(np.argmin(tuned))]):
                score = measure(choice, lm, vocabulary, material)
                base = base or score
                write_trn(arguments.trn, f"{backend}-{name}", score.hyps[0])
                cells, record = row(name, choice, score, base, searched(material, choice.blank_threshold))
                rows.append(record)
                print("| " + " | ".join(cells) + " |", flush=True)
    path = arguments.json or side_by_side.RESULTS / f"{datetime.date.today().isoformat()}-cpu-decoding.json"
    content = {
        "benchmark": "decoding",
        "log_probs": "real" if arguments.logprobs else "made up",
        "models": material.models,
        "lm": lm.described | {"lm": lm_path.name},
        "tuned": arguments.tuned and arguments.tuned.absolute().name,
        "utterances": greedy.errors_UM.size,
        "versions": side_by_side.versions(PACKAGES),
        "greedy": {
            "wer": greedy.wer,
            "wer_interval": greedy.interval(),
            "wers": greedy.wers,
            "utterances_per_second": greedy.speed,
        },
        "rows": rows,
    }
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    try:
        main()
    except (DecoderError, LMError, LogProbsError, ManifestError, ShardError) as e:
        raise SystemExit(f"error: {e}") from None
