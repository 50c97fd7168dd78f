"""What the clock of a score counts, and what it leaves out."""

import contextlib
from types import SimpleNamespace

import numpy as np

from jaxds2.data.manifest import Utterance
from jaxds2.data.pipeline import LoadedBatch, filler_batch
from jaxds2.data.plan import Bucket
from jaxds2.decoding.greedy import GreedyDecoder
from jaxds2.evaluation import evaluate as module
from jaxds2.evaluation.evaluate import evaluate
from jaxds2.inference import recognizer as recognizer_module
from jaxds2.inference.recognizer import Recognizer
from jaxds2.text import Vocabulary


def test_the_clock_counts_the_model_and_the_decoder_but_not_the_start_of_the_loader(monkeypatch):
    """Two batches of one utterance: 3 s each for the model, 2 s each for the decoder, 5 s for the second batch."""
    now = 0.0

    def take(seconds):
        nonlocal now
        now += seconds

    @contextlib.contextmanager
    def load_batches(*_, **__):
        take(100)  # imports, processes

        def batches():
            for step, seconds in enumerate((50, 5)):
                take(seconds)
                batch = filler_batch(Bucket(1, 16_000, 1))
                batch.index_B[0] = step
                yield LoadedBatch(step, batch, ())

        yield batches()

    vocabulary = Vocabulary("ab ")
    decode = GreedyDecoder(vocabulary)

    def eval_step(params, batch):
        take(3)
        return SimpleNamespace(
            log_probs_BUV=np.log(np.full((1, 2, 4), 0.25, np.float32)),
            logit_lengths_B=np.array([2]),
            loss_B=np.zeros(1),
            feasible_B=np.ones(1, bool),
        )

    monkeypatch.setattr(module.time, "perf_counter", lambda: now)
    for name, value in {"load_batches": load_batches, "place": lambda batch, _: batch, "own_rows": lambda x: x}.items():
        monkeypatch.setattr(recognizer_module, name, value)
    monkeypatch.setattr(Recognizer, "plan", lambda self, _: SimpleNamespace(num_steps=lambda epoch: 2))
    config = SimpleNamespace(data=SimpleNamespace(workers=0))
    recognizer = Recognizer(config, vocabulary, None, eval_step, {}, 1)  # type: ignore[arg-type]
    utterances = [Utterance(f"u{i}", recognizer_module.Path(f"{i}.wav"), 10.0, "a") for i in range(2)]
    scores = evaluate(recognizer, utterances, lambda x: (take(2), decode(x))[1], warm_up=False, progress=False)
    assert scores.wall_seconds == 3 + 2 + 5 + 3 + 2
    assert scores.rtfx == 20 / 15
