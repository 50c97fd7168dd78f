"""The weights and the pruning of a beam search, searched on a development set."""

import hashlib
import io
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
from tqdm import tqdm

from jaxds2.config import Config
from jaxds2.data.manifest import manifest_path, set_name
from jaxds2.data.shards import read_utterances
from jaxds2.decoding.decoder import DecoderChoice, make_decoder
from jaxds2.decoding.greedy import GreedyDecoder
from jaxds2.decoding.lm import open_model
from jaxds2.decoding.pool import open_pool
from jaxds2.decoding.settings import BeamSettings
from jaxds2.decoding.tuned import SETTINGS, read_tuned, write_tuned
from jaxds2.evaluation.evaluate import evaluate
from jaxds2.evaluation.logprobs import check_same, read_log_probs
from jaxds2.evaluation.metrics import count_character_edits, count_word_edits
from jaxds2.files import check_writable, write_whole
from jaxds2.inference.recognizer import Recognizer
from jaxds2.text import Vocabulary

ALPHAS = (0.25, 0.5, 1.0, 1.5, 2.0)
BETAS = (0.0, 1.0, 2.0, 3.0)
"""The grid; the best point's surroundings are searched again at half its steps."""

PRUNINGS = {
    "beam_prune_logp": (-6.0, -10.0, -15.0, -25.0),
    "token_min_logp": (-3.0, -5.0, -8.0, -12.0),
    "beam_width": (25, 100, 400),
}
"""Cheapest first, one after the other at the best weights."""


class TuningError(ValueError):
    """A set that must not, or cannot, be tuned on; its message is one line for the user."""


@dataclass(frozen=True)
class Point:
    """One choice of settings and the errors that it makes."""

    choice: DecoderChoice
    word_errors: int
    character_errors: int

    @property
    def cost(self) -> tuple[int, int]:
        """What is minimised: word errors, among equals character errors."""
        return self.word_errors, self.character_errors


@dataclass(frozen=True)
class Tuning:
    """Everything that was tried, in order."""

    points: list[Point]
    grid: list[Point]
    """Those of ALPHAS and BETAS, alphas first."""
    best: Point
    words: int
    """In the references."""

    @property
    def equally_good(self) -> int:
        """How many of the settings that were tried make no more errors than the best."""
        return sum(p.cost == self.best.cost for p in self.points)

    def render(self) -> str:
        """A table of word error rates, alphas down and betas across, and the best point."""
        by_weights = {(p.choice.beam.alpha, p.choice.beam.beta): p for p in self.grid}
        lines = ["WER, %   " + "".join(f"beta {beta:<6g}" for beta in BETAS)]
        for alpha in ALPHAS:
            rates = (100 * by_weights[alpha, beta].word_errors / max(self.words, 1) for beta in BETAS)
            lines.append(f"alpha {alpha:<5g}" + "".join(f"{rate:<11.2f}" for rate in rates).rstrip())
        best = self.best.choice.beam
        lines.append(
            f"best: alpha {best.alpha:g}, beta {best.beta:g}, beam width {best.beam_width}, beam_prune_logp "
            f"{best.beam_prune_logp:g}, token_min_logp {best.token_min_logp:g}: "
            f"{self.best.word_errors} errors in {self.words} words, {self.best.character_errors} in their characters "
            f"({len(self.points)} settings tried)"
        )
        if self.equally_good > 1:
            lines.append(
                f"{self.equally_good} of them are as good in both: the middle of such weights is taken, then the "
                f"cheapest pruning"
            )
        return "\n".join(lines)


def refuse_test_sets(manifest: Path, name: str, tests: Iterable[str] = ()) -> None:
    """Weights are not tuned on what they will be scored on.

    Args:
      manifest: as it was given.
      name: of the set in it.
      tests: the manifests that the run is to be scored on, data.test of its config.

    Raises:
      TuningError: one of `tests`, or the name has a part `test`, as in test.jsonl and test2-clean.jsonl.
    """
    parts = "".join(c if c.isalnum() else " " for c in name.lower()).split()
    why = "by its name" if any(re.fullmatch(r"tests?(set)?\d*", part) for part in parts) else ""
    if manifest_path(manifest).resolve() in [manifest_path(Path(m)).resolve() for m in tests]:
        why = "by the run's config (data.test)"
    if why:
        raise TuningError(
            f"{manifest}: {why} a test set; settings tuned on it would flatter every score on it: "
            f"name a development set"
        )


def tune(
    log_probs: Sequence[np.ndarray],
    refs: Sequence[str],
    vocabulary: Vocabulary,
    choice: DecoderChoice,
    *,
    workers: int = 0,
    progress: bool = True,
) -> Tuning:
    """Search weights on a grid and around its best point, then the pruning.

    The same input gives the same settings, by whatever number of processes: of equally good weights
    those in the middle are taken, since at the edge another set may fall off, and of equally good pruning the cheapest.

    Args:
      log_probs: log_probs_UV of each utterance.
      refs: their normalised references.
      vocabulary: of both.
      choice: back end, language model, blank threshold, and the pruning to search the weights with.
      workers: processes; 0: this one.
      progress: show a bar.

    Raises:
      ConfigError, DecoderError, LMError: as make_decoder.
    """
    make_decoder(choice, vocabulary)  # what is wrong with the choice is said here, not in a process
    make = partial(_Scorer, list(log_probs), list(refs), vocabulary, choice.lm)
    words = sum(len(ref.split()) for ref in refs)
    total = len(ALPHAS) * len(BETAS) + 8 + sum(map(len, PRUNINGS.values())) - len(PRUNINGS)
    with (
        open_pool(make, workers) as pool,
        tqdm(total=total, desc="tune", unit="setting", disable=None if progress else True, leave=False) as bar,
    ):
        run: Callable[[Iterable[DecoderChoice]], Iterator[Point]] = pool.map if pool else partial(map, make())
        points: list[Point] = []

        def score(choices: Iterable[DecoderChoice]) -> Iterator[Point]:
            for point in run(choices):
                points.append(point)
                bar.update()
                yield point

        grid = list(score(_with(choice, alpha=a, beta=b) for a in ALPHAS for b in BETAS))
        best = _middle(grid)
        beam = best.choice.beam
        around = [
            _with(best.choice, alpha=a, beta=b)
            for a in _between(ALPHAS, beam.alpha)
            for b in _between(BETAS, beam.beta)
            if (a, b) != (beam.alpha, beam.beta)
        ]
        best = _middle([*grid, *score(around)])
        for name, values in PRUNINGS.items():
            tried = {getattr(best.choice.beam, name): best}
            others = [value for value in values if value not in tried]
            tried |= dict(zip(others, score(_with(best.choice, **{name: v}) for v in others), strict=True))
            best = min((tried[value] for value in sorted(tried, key=abs)), key=lambda p: p.cost)
    return Tuning(points, grid, best, words)


def draw_surface(tuning: Tuning, path: Path) -> None:
    """The grid as a picture: word error rate over alpha and beta, all points marked, the best one by a star.

    Raises:
      WriteError: it cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    wer_AB = np.array([p.word_errors for p in tuning.grid], float).reshape(len(ALPHAS), len(BETAS))
    wer_AB *= 100 / max(tuning.words, 1)
    figure = Figure(figsize=(6, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    surface = axes.contourf(BETAS, ALPHAS, wer_AB, levels=20, cmap="viridis_r")
    figure.colorbar(surface, label="WER, %")
    weights = [(p.choice.beam.beta, p.choice.beam.alpha) for p in tuning.points]
    axes.plot(*zip(*weights, strict=True), "k.", markersize=4)
    best = tuning.best.choice.beam
    axes.plot(best.beta, best.alpha, "r*", markersize=14)
    axes.set(xlabel="beta, nats per word", ylabel="alpha", title=f"best: alpha {best.alpha:g}, beta {best.beta:g}")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    write_whole(path, buffer.getvalue())


def tune_run(
    run_dir: Path,
    config: Config,
    manifest: Path | None,
    *,
    lm: Path,
    backend: str,
    blank_threshold: float | None,
    checkpoint: str | int,
    log_probs: Path | None = None,
    workers: int = 0,
) -> Tuning:
    """Tune for a run, print the table, and write decoding.json and a picture of the surface into its folder.

    Args:
      run_dir: the run.
      config: of the run.
      manifest: the development set; None: that of the log-probabilities.
      lm, backend, blank_threshold: what to tune for.
      checkpoint: `best`, `last` or a step.
      log_probs: folder with the set's log-probabilities; None: the model computes them, once.
      workers: processes that decode.

    Raises:
      TuningError: a test set, or one without references. LogProbsError: log-probabilities of something else.
      The rest as Recognizer.load, evaluate, tune, write_tuned.
    """
    vocabulary = Vocabulary(config.data.characters)
    saved = read_log_probs(log_probs) if log_probs else None
    manifest = manifest or Path(saved.manifest if saved else "")
    refuse_test_sets(manifest, set_name(manifest), config.data.test)
    if manifest_path(manifest).resolve() in [manifest_path(m).resolve() for m in config.data.train]:
        raise TuningError(
            f"{manifest}: the run was trained on it, so that its sound alone seems enough: name a development set that "
            f"was held out"
        )
    choice = DecoderChoice("beam", backend, lm=lm, blank_threshold=blank_threshold)
    # Before a search for nothing: can it be made, and its result be written beside those that are there?
    make_decoder(choice, vocabulary)
    check_writable(run_dir)
    read_tuned(run_dir)
    utterances = read_utterances(manifest)
    digest = hashlib.sha256(manifest_path(manifest).read_bytes()).hexdigest()
    if saved:
        ids = [u.id for u in utterances]
        check_same(saved, characters=vocabulary.characters, ids=ids, manifest_sha256=digest, where=str(log_probs))
        emitted, step = list(saved.log_probs), saved.checkpoint_step
    else:
        recognizer = Recognizer.load(run_dir, checkpoint)
        found: dict[int, np.ndarray] = {}
        evaluate(recognizer, utterances, GreedyDecoder(vocabulary), warm_up=False, keep=found.__setitem__)
        emitted, step = [found[i] for i in range(len(utterances))], recognizer.step
    refs = [vocabulary.normalize(u.text) for u in utterances]
    if not any(refs):
        raise TuningError(f"{manifest}: none of its {len(refs)} utterances has a reference text to tune on")
    tuning = tune(emitted, refs, vocabulary, choice, workers=workers)
    print(tuning.render())
    best, values = tuning.best, asdict(tuning.best.choice.beam)
    entry = {
        "manifest": str(manifest),
        "manifest_sha256": digest,
        "checkpoint_step": step,
        "lm": str(lm),
        "lm_sha256": make_decoder(choice, vocabulary).settings["lm_sha256"],
        "settings": {name: values[name] for name in SETTINGS if name in values} | {"blank_threshold": blank_threshold},
        "word_errors": best.word_errors,
        "character_errors": best.character_errors,
        "words": tuning.words,
        "equally_good": tuning.equally_good,
        "tried": [
            {name: getattr(p.choice.beam, name) for name in SETTINGS if name in values}
            | {"word_errors": p.word_errors, "character_errors": p.character_errors}
            for p in tuning.points
        ],
    }
    picture = run_dir / f"decoding-{backend}.png"
    draw_surface(tuning, picture)
    written = write_tuned(run_dir, backend, entry)
    print(
        f"written to {written}, which eval.py --run {run_dir} --decoder beam --backend {backend} --lm {lm} uses; "
        f"{picture}"
    )
    return tuning


class _Scorer:
    """Counts the errors of settings; in each process one, with its own copy of the language model."""

    def __init__(self, log_probs: list[np.ndarray], refs: list[str], vocabulary: Vocabulary, lm: Path | None) -> None:
        self._log_probs, self._refs, self._vocabulary = log_probs, refs, vocabulary
        self._lm = open_model(lm, vocabulary) if lm else None

    def __call__(self, choice: DecoderChoice) -> Point:
        decode = make_decoder(choice, self._vocabulary, self._lm)
        texts = [decode(log_probs_UV)[0].text for log_probs_UV in self._log_probs]
        return Point(
            choice, count_word_edits(self._refs, texts).errors, count_character_edits(self._refs, texts).errors
        )


def _with(choice: DecoderChoice, **settings: float) -> DecoderChoice:
    return replace(choice, beam=replace(choice.beam, **settings))


def _middle(points: Sequence[Point]) -> Point:
    """Of the points with the least cost the one that the others are nearest to, counted in steps of the grid.

    Of several such, the one with the smaller weights.
    """

    def apart(a: BeamSettings, b: BeamSettings) -> float:
        alphas = np.interp([a.alpha, b.alpha], ALPHAS, range(len(ALPHAS)))
        betas = np.interp([a.beta, b.beta], BETAS, range(len(BETAS)))
        return float(abs(np.diff(alphas)[0]) + abs(np.diff(betas)[0]))

    least = min(p.cost for p in points)
    good = {p.choice.beam: p for p in points if p.cost == least}
    middle = min(good, key=lambda beam: (sum(apart(beam, other) for other in good), beam.alpha, beam.beta))
    return good[middle]


def _between(steps: Sequence[float], value: float) -> list[float]:
    """A grid value and the middles of the steps beside it."""
    i = steps.index(value)
    middles = [(steps[j] + steps[j + 1]) / 2 for j in (i - 1, i) if 0 <= j < len(steps) - 1]
    return sorted([value, *middles])
