"""`make demo`: speak a corpus, train on it, and read unseen voices, in a few minutes on two cores."""

import json
import shlex
import sys
from pathlib import Path

from jaxds2.config import Config, differences, read_config
from jaxds2.data.manifest import read_manifest
from jaxds2.data.spoken import prepare_demo
from jaxds2.decoding.beam import BeamDecoder
from jaxds2.decoding.greedy import GreedyDecoder
from jaxds2.decoding.lm import build_ngram, open_model
from jaxds2.decoding.settings import BeamSettings
from jaxds2.evaluation.metrics import EditCounts
from jaxds2.evaluation.report import score_run
from jaxds2.inference.recognizer import Recognizer
from jaxds2.text import Vocabulary
from jaxds2.training.loop import FINISHED, train

ALPHA, BETA = 0.5, 1.0
"""Weight of the language model and bonus per word; the customary values, not tuned."""
EXAMPLES = 8


def demo(config: Config, run_dir: Path) -> int:
    """Prepare, train, evaluate greedily and with an n-gram of the training text, and show what came out.

    What stands already is not done again.

    Returns:
      The exit code of training.
    """
    test = Path(config.data.test[0])
    reports = [run_dir / "eval" / f"{test.parent.name}-{test.stem}-{kind}" for kind in ("greedy", "beam-lm")]
    if all((r / "report.json").exists() for r in reports) and not differences(
        read_config(run_dir / "config.json"), config
    ):
        print(f"the demo is done already; delete {run_dir} to train again")
    else:
        prepare_demo(test.parent)
        status = train(config, run_dir)
        if status != FINISHED:
            return status
        _evaluate(config, run_dir, test, *reports)
    _show(run_dir, test, *reports)
    return FINISHED


def _evaluate(config: Config, run_dir: Path, test: Path, greedy: Path, beam: Path) -> None:
    vocabulary = Vocabulary(config.data.characters)
    sentences = [vocabulary.normalize(u.text) for path in config.data.train for u in read_manifest(path)]
    lm = build_ngram(sentences, run_dir / "lm.arpa")
    recognizer = Recognizer.load(run_dir)
    score_run(recognizer, test, GreedyDecoder(vocabulary), folder=greedy, checkpoint="best", run_dir=run_dir)
    decoder = BeamDecoder(vocabulary, BeamSettings(alpha=ALPHA, beta=BETA), lm=open_model(lm, vocabulary))
    score_run(recognizer, test, decoder, folder=beam, checkpoint="best", run_dir=run_dir)


def _show(run_dir: Path, manifest: Path, greedy: Path, beam: Path) -> None:
    """Print both rates, some utterances that the language model changed, and where the curves are."""
    plain, with_lm = _read_hyps(greedy / "recogs.txt"), _read_hyps(beam / "recogs.txt")
    test = read_manifest(manifest)
    changed = [u for u in test if plain[u.id] != with_lm[u.id]]
    for u in (changed + [u for u in test if u not in changed])[:EXAMPLES]:
        print(f"\n  ref     {u.text}\n  greedy  {plain[u.id]}\n  with LM {with_lm[u.id]}")
    print(f"\n{len(test)} utterances of voices that the model has never heard:")
    for folder, label in ((greedy, "greedy"), (beam, "with LM")):
        report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
        counts = EditCounts(
            reference=report["words"],
            insertions=report["insertions"],
            deletions=report["deletions"],
            substitutions=report["substitutions"],
        )
        print(f"  {label:<8}{counts.format('WER')}")
    python = shlex.quote(sys.executable)
    print(f"\ncurves: {python} -m tensorboard.main --logdir {shlex.quote(str(run_dir.parent))}")
    print(f"reports: {run_dir / 'eval'}")


def _read_hyps(path: Path) -> dict[str, str]:
    """Hypotheses by utterance id, from a recogs.txt."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return {line.partition(": hyp=")[0]: line.partition(": hyp=")[2] for line in lines if ": hyp=" in line}
