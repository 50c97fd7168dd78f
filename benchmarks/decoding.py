"""Decoders side by side: word error rate and utterances a second of every back end that is installed, by its pruning.

    python benchmarks/decoding.py                                       # made-up log-probabilities
    python benchmarks/decoding.py --logprobs runs/an4/eval/an4-test-greedy --lm runs/an4/lm.arpa --beta 2

The made-up ones are of a seeded language of 2,000 words: 27 words an utterance, each character a peak of one or two
frames among blanks; of the characters some are in doubt and some are wrong beyond doubt. There each back end's weights
are chosen on a development part, with the default pruning; on real ones they are what the command line says. Speed and
WER stand beside those of the first row, pyctcdecode with its default pruning where both are asked for: times as fast,
and the difference in points with its paired interval of 95 % over utterances. One core each, by process time.

Each row decodes all utterances, so a wide search takes minutes: pyctcdecode reads 0.8 of the made-up ones a second.
`--backends`, `--prunings` and `--blank-thresholds` choose the rows; the others stand beside the first one. For the
table of wide ones:

    python benchmarks/decoding.py --prunings default wide --blank-thresholds no
"""

import argparse
import datetime
import itertools
import json
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import side_by_side

from jaxds2.data.shards import read_utterances
from jaxds2.decoding.blanks import kept_frames
from jaxds2.decoding.decoder import BACKENDS, DecoderChoice, make_decoder
from jaxds2.decoding.hypothesis import DecoderError
from jaxds2.decoding.lm import WordModel, build_ngram, open_model
from jaxds2.decoding.settings import BeamSettings
from jaxds2.evaluation.logprobs import read_log_probs
from jaxds2.evaluation.metrics import align_words, count_alignment
from jaxds2.evaluation.significance import percentile_interval, resample, resampling_units
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

    errors_U: np.ndarray
    """Of each utterance."""
    words_U: np.ndarray
    """Of its reference."""
    speed: float
    """Utterances a second of one core."""

    @property
    def wer(self) -> float:
        """In percent."""
        return 100 * float(self.errors_U.sum() / self.words_U.sum())


def measure(choice: DecoderChoice, lm: WordModel, vocabulary: Vocabulary, log_probs, refs) -> Score:
    """Decode and count."""
    decode = make_decoder(choice, vocabulary, lm)
    start = time.process_time()
    texts = [decode(log_probs_UV)[0].text for log_probs_UV in log_probs]
    seconds = time.process_time() - start
    counts = [count_alignment(pairs) for pairs in align_words(refs, texts)]
    errors_U, words_U = np.array([c.errors for c in counts]), np.array([c.reference for c in counts])
    return Score(errors_U, words_U, len(texts) / seconds)


def threshold(text: str) -> float | None:
    """Of the command line."""
    return None if text == "no" else float(text)


def searched(log_probs, blank: float | None) -> float:
    """The share of the frames that a search sees, 0 to 1."""
    kept = sum(len(x) if blank is None else len(kept_frames(x, blank)) for x in log_probs)
    return kept / sum(map(len, log_probs))


def difference(base: Score, other: Score) -> tuple[float, float, float]:
    """Points of WER that the other has more, and the ends of their paired interval."""
    columns_UK = np.stack([other.errors_U - base.errors_U, base.words_U], axis=1)
    sums_RK = resample(columns_UK, resampling_units([None] * len(columns_UK)))
    low, high = percentile_interval(100 * sums_RK[:, 0] / sums_RK[:, 1])
    return other.wer - base.wer, low, high


def main() -> None:
    """Print the table and write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--utterances", type=int, default=300, help="made up to be measured (default: 300)")
    parser.add_argument("--dev", type=int, default=30, help="made up to choose weights on (default: 30)")
    parser.add_argument("--logprobs", type=Path, metavar="EVAL_DIR", help="real ones, as eval.py --save-logprobs kept")
    parser.add_argument("--lm", type=Path, help="for real ones")
    parser.add_argument("--alpha", type=float, default=0.5)
    parser.add_argument("--beta", type=float, default=2.0)
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
    parser.add_argument("--json", type=Path, metavar="FILE", help="default: benchmarks/results/DATE-cpu-decoding.json")
    arguments = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        if arguments.logprobs:
            saved = read_log_probs(arguments.logprobs)
            vocabulary = Vocabulary(saved.characters)
            refs = [vocabulary.normalize(u.text) for u in read_utterances(Path(saved.manifest))]
            log_probs, path, dev = list(saved.log_probs), arguments.lm, 0
        else:
            rng = np.random.default_rng(0)
            vocabulary, language = Vocabulary(CHARACTERS), Language(rng)
            path = build_ngram([language.sentence() for _ in range(6_000)], Path(folder) / "lm.arpa")
            dev = arguments.dev
            refs = [language.sentence() for _ in range(dev + arguments.utterances)]
            log_probs = [speak(ref, vocabulary, rng) for ref in refs]
        lm = open_model(path, vocabulary)
        weights = [(a, b) for a in ALPHAS for b in BETAS] if dev else [(arguments.alpha, arguments.beta)]
        greedy = measure(DecoderChoice(), lm, vocabulary, log_probs[dev:], refs[dev:])
        print(f"{len(refs) - dev} utterances; greedy: WER {greedy.wer:.2f} %, {greedy.speed:.0f} utterances/s\n")
        head = [
            "back end",
            "alpha / beta",
            "pruning",
            "blanks collapsed",
            "frames, %",
            "WER, %",
            "more, points",
            "interval",
        ]
        head += ["utterances/s", "times as fast"]
        print(f"| {' | '.join(head)} |\n" + "|---" * len(head) + "|")
        base: Score | None = None
        for backend in arguments.backends:
            try:
                choices = [
                    DecoderChoice("beam", backend, lm=path, beam=BeamSettings(alpha=a, beta=b)) for a, b in weights
                ]
                tuned = [measure(c, lm, vocabulary, log_probs[:dev], refs[:dev]).wer if dev else 0.0 for c in choices]
            except DecoderError as e:
                print(f"| {backend} | left out: {e} |" + " |" * (len(head) - 2))
                continue
            best = choices[int(np.argmin(tuned))]
            for name, blank in itertools.product(arguments.prunings, arguments.blank_thresholds):
                choice = replace(best, blank_threshold=blank, beam=replace(best.beam, **PRUNINGS[name]))
                score = measure(choice, lm, vocabulary, log_probs[dev:], refs[dev:])
                base = base or score
                more, low, high = difference(base, score)
                ratio = score.speed / base.speed
                row = [backend, f"{best.beam.alpha:g} / {best.beam.beta:g}", name, str(blank or "no")]
                record = {"backend": backend, **choice.beam.weights, **choice.beam.pruning}
                record |= {
                    "blank_threshold": blank,
                    "frames": searched(log_probs[dev:], blank),
                    "wer": score.wer,
                    "utterances_per_second": score.speed,
                }
                record |= {"wer_more": more, "interval": [low, high], "times_as_fast": ratio}
                rows.append(record)
                row += [f"{100 * searched(log_probs[dev:], blank):.0f}"]
                row += [f"{score.wer:.2f}", f"{more:+.2f}", f"{low:+.2f} to {high:+.2f}"]
                row += [f"{score.speed:.1f}", f"{ratio:.2f}"]
                print("| " + " | ".join(row) + " |", flush=True)
    path = arguments.json or side_by_side.RESULTS / f"{datetime.date.today().isoformat()}-cpu-decoding.json"
    content = {
        "benchmark": "decoding",
        "log_probs": "real" if arguments.logprobs else "made up",
        "utterances": len(refs) - dev,
        "versions": side_by_side.versions(PACKAGES),
        "greedy": {"wer": greedy.wer, "utterances_per_second": greedy.speed},
        "rows": rows,
    }
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
