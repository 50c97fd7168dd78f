"""Forced alignment: word times against those in a .ctm file beside the manifest, and wrong texts found out.

    python benchmarks/alignment.py --run runs/demo --dev data/demo/dev.jsonl --test data/demo/test.jsonl
    python benchmarks/alignment.py --run runs/an4 --test data/an4/test.jsonl

A model writes a word a little after it began, by a delay that is its own: the median on dev is taken off on test. For
the second table each text of test is replaced by another utterance's, or has one word exchanged, left out or put in.
"""

import argparse
import dataclasses
import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from jaxds2.data.manifest import Utterance, read_manifest
from jaxds2.decoding.alignment import Span
from jaxds2.inference.align import MIN_SCORE, AlignedUtterance, align
from jaxds2.inference.recognizer import Recognizer, frame_seconds

Times = Mapping[str, Sequence[Span]]
"""Words of each utterance, by id."""


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description="Word times against a reference, and wrong texts found out.")
    parser.add_argument("--run", type=Path, required=True, help="folder of a trained run")
    parser.add_argument("--dev", type=Path, help="manifest with a .ctm file beside it, to estimate the delay on")
    parser.add_argument("--test", type=Path, required=True, help="manifest; with --dev it has a .ctm file too")
    arguments = parser.parse_args()
    recognizer = Recognizer.load(arguments.run)
    test = read_manifest(arguments.test)
    aligned = align_all(recognizer, test)
    found = times(aligned, recognizer)
    good = sum(in_order(found[a.utterance.id], a.utterance.duration) for a in aligned)
    print(f"{arguments.test}: {len(aligned)} of {len(test)} utterances aligned, ", end="")
    print(f"{sum(map(len, found.values()))} words; in order and inside the file in {good} utterances")
    if arguments.dev:
        dev = times(align_all(recognizer, read_manifest(arguments.dev)), recognizer)
        print_times(offsets(read_ctm(arguments.dev), dev), offsets(read_ctm(arguments.test), found))
    print_faults(recognizer, test)


def align_all(recognizer: Recognizer, utterances: Sequence[Utterance]) -> list[AlignedUtterance]:
    """Those that can be aligned; the others are named."""
    aligned, failed = align(recognizer, utterances)
    for identifier, why in failed.items():
        print(f"not aligned: {identifier}: {why}")
    return aligned


def times(aligned: Sequence[AlignedUtterance], recognizer: Recognizer) -> Times:
    """Where the words are found."""
    seconds = frame_seconds(recognizer.config)
    return {a.utterance.id: [w.span for w in a.alignment.words(seconds, a.utterance.duration)] for a in aligned}


def in_order(words: Sequence[Span], duration: float) -> bool:
    """Whether words follow each other inside the file and take some time."""
    bounds = [0.0, *(bound for w in words for bound in (w.start, w.end)), duration]
    return bounds == sorted(bounds) and all(w.start < w.end for w in words)


def read_ctm(manifest: Path) -> Times:
    """The reference beside a manifest; words run together are one, `on_the`."""
    found: dict[str, list[Span]] = {}
    for line in manifest.with_suffix(".ctm").read_text(encoding="utf-8").splitlines():
        identifier, _, start, seconds, word = line.split()
        found.setdefault(identifier, []).append(Span(word, float(start), float(start) + float(seconds), 1.0))
    return found


def offsets(reference: Times, found: Times) -> np.ndarray:
    """(words, 2) seconds by which start and end are found later than the reference has them."""
    rows = []
    for identifier, spans in found.items():
        rest = iter(spans)
        for word in reference[identifier]:
            together = [next(rest) for _ in word.text.split("_")]
            assert "_".join(s.text for s in together) == word.text, (identifier, word, together)
            rows.append((together[0].start - word.start, together[-1].end - word.end))
        assert next(rest, None) is None, identifier
    return np.array(rows)


def print_times(dev: np.ndarray, test: np.ndarray) -> None:
    """Errors on test, behind the delay on dev."""
    print(f"\n{'':8}{'words':>8}{'delay, dev':>14}{'median error':>14}{'95 % within':>14}{'largest':>10}   seconds")
    for column, name in enumerate(("start", "end")):
        delay = np.median(dev[:, column])
        errors = np.abs(test[:, column] - delay)
        figures = (f"{delay:>+14.3f}", f"{np.median(errors):>14.3f}", f"{np.quantile(errors, 0.95):>14.3f}")
        print(f"{name:8}{len(errors):>8}{''.join(figures)}{errors.max():>10.3f}")


def print_faults(recognizer: Recognizer, utterances: Sequence[Utterance]) -> None:
    """Share of the texts, right and wrong, that the score lists."""
    kinds: dict[str, list[float]] = {}
    unfit: dict[str, int] = {}
    wrong = list(faults([dataclasses.replace(u, text=recognizer.vocabulary.normalize(u.text)) for u in utterances]))
    aligned, failed = align(recognizer, [dataclasses.replace(u, id=f"{kind}|{u.id}") for kind, u in wrong])
    for a in aligned:
        kinds.setdefault(a.utterance.id.partition("|")[0], []).append(a.alignment.score)
    for identifier in failed:
        kind = identifier.partition("|")[0]
        unfit[kind] = unfit.get(kind, 0) + 1
    print(f"\n{'text':20}{'utterances':>12}{'do not fit':>12}{'median score':>14}{f'below {MIN_SCORE:g}':>12}")
    for kind, scores in kinds.items():
        listed = sum(score < MIN_SCORE for score in scores)
        share = f"{100 * listed / len(scores):.1f} %"
        print(f"{kind:20}{len(scores):>12}{unfit.get(kind, 0):>12}{np.median(scores):>14.2f}{share:>12}")


def faults(utterances: Sequence[Utterance], seed: int = 0) -> Iterator[tuple[str, Utterance]]:
    """(kind, utterance) with its text as it is, and with each fault that its text admits."""
    rng = random.Random(seed)
    vocabulary = sorted({word for u in utterances for word in u.text.split()})
    for u in utterances:
        words = u.text.split()
        place = rng.randrange(len(words))
        other = rng.choice([word for word in vocabulary if word != words[place]])
        texts = {
            "right": words,
            "another's": rng.choice([v.text for v in utterances if v.text != u.text]).split(),
            "one word exchanged": [*words[:place], other, *words[place + 1 :]],
            "one word left out": words[:place] + words[place + 1 :],
            "one word put in": [*words[:place], other, *words[place:]],
        }
        for kind, text in texts.items():
            if text:
                yield kind, dataclasses.replace(u, text=" ".join(text))


if __name__ == "__main__":
    main()
