"""`make demo`: speak a corpus, train on it, and read unseen voices, in a few minutes on two cores."""

import json
import sys
from pathlib import Path

from jaxds2.config import Config
from jaxds2.data.manifest import read_manifest
from jaxds2.data.spoken import prepare_demo
from jaxds2.decoding.beam import BeamDecoder
from jaxds2.decoding.lm import build_ngram
from jaxds2.evaluation.metrics import EditCounts
from jaxds2.evaluation.report import score_run
from jaxds2.inference.recognizer import Recognizer
from jaxds2.text import Vocabulary
from jaxds2.training.loop import FINISHED, train

ALPHA, BETA = 0.5, 1.0
"""Weight of the language model and bonus per word, chosen on the dev voices."""
EXAMPLES = 8


def demo(config: Config, run_dir: Path) -> int:
    """Prepare, train, evaluate greedily and with an n-gram of the training text, and show what came out.

    What stands already is not done again.

    Returns:
      The exit code of training.
    """
    folder = Path(config.data.train[0]).parent
    greedy, beam = (run_dir / "eval" / name / "report.json" for name in ("test-greedy", "test-beam-lm"))
    if greedy.exists() and beam.exists():
        print(f"the demo is done already; delete {run_dir} to train again")
    else:
        prepare_demo(folder)
        status = train(config, run_dir)
        if status != FINISHED:
            return status
        _evaluate(config, run_dir, folder)
    _show(run_dir, folder)
    return FINISHED


def _evaluate(config: Config, run_dir: Path, folder: Path) -> None:
    vocabulary = Vocabulary(config.data.characters)
    sentences = [vocabulary.normalize(u.text) for path in config.data.train for u in read_manifest(path)]
    lm = build_ngram(sentences, run_dir / "lm.arpa")
    recognizer = Recognizer.load(run_dir)
    test = folder / "test.jsonl"
    score_run(recognizer, test, None, folder=run_dir / "eval" / "test-greedy", checkpoint="best")
    beam = BeamDecoder(vocabulary, lm=lm, alpha=ALPHA, beta=BETA)
    score_run(recognizer, test, beam, folder=run_dir / "eval" / "test-beam-lm", checkpoint="best")


def _show(run_dir: Path, folder: Path) -> None:
    """Print both rates, some utterances that the language model changed, and where the curves are."""
    hyps = {name: _read_hyps(run_dir / "eval" / name / "recogs.txt") for name in ("test-greedy", "test-beam-lm")}
    test = read_manifest(folder / "test.jsonl")
    changed = [u for u in test if hyps["test-greedy"][u.id] != hyps["test-beam-lm"][u.id]]
    for u in (changed + [u for u in test if u not in changed])[:EXAMPLES]:
        print(f"\n  ref     {u.text}\n  greedy  {hyps['test-greedy'][u.id]}\n  with LM {hyps['test-beam-lm'][u.id]}")
    print(f"\n{len(test)} utterances of voices that the model has never heard:")
    for name, label in (("test-greedy", "greedy"), ("test-beam-lm", "with LM")):
        report = json.loads((run_dir / "eval" / name / "report.json").read_text(encoding="utf-8"))
        counts = EditCounts(
            reference=report["words"],
            insertions=report["insertions"],
            deletions=report["deletions"],
            substitutions=report["substitutions"],
        )
        print(f"  {label:<8}{counts.format('WER')}")
    print(f"\ncurves: {sys.executable} -m tensorboard.main --logdir {run_dir.parent}\nreports: {run_dir / 'eval'}")


def _read_hyps(path: Path) -> dict[str, str]:
    """Hypotheses by utterance id, from a recogs.txt."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return {line.partition(": hyp=")[0]: line.partition(": hyp=")[2] for line in lines if ": hyp=" in line}
