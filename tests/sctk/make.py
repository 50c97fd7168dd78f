"""The inputs of sclite in this folder: a reference and two systems' hypotheses with errors of every kind, seeded."""

from pathlib import Path

import numpy as np

TEXT = "the a cat sat on mat red blue don't it's one two three four naïve café over under light off"
WORDS = TEXT.split()
UTTERANCES, SPEAKERS = 120, 8


def corrupt(rng: np.random.Generator, ref: list[str], rate: float) -> list[str]:
    """Words deleted, substituted and inserted, bursts included, also at both ends."""
    hyp = [] if rng.random() > rate else [str(rng.choice(WORDS))]
    for word in ref:
        draw = rng.random()
        if draw >= 0.25 * rate:
            hyp.append(word if draw >= rate else str(rng.choice(WORDS)))
        while rng.random() < 0.4 * rate:
            hyp.append(str(rng.choice(WORDS)))
    return hyp


def main() -> None:
    """Write ref.trn, a.trn and b.trn."""
    rng = np.random.default_rng(0)
    refs = [[str(w) for w in rng.choice(WORDS, rng.integers(1, 25))] for _ in range(UTTERANCES)]
    systems = {"ref": refs}
    systems["a"] = [corrupt(rng, ref, 0.15) for ref in refs]
    # The second system's errors are in part the first one's, as they are between two models of one kind.
    systems["b"] = [a if rng.random() < 0.3 else corrupt(rng, r, 0.13) for r, a in zip(refs, systems["a"], strict=True)]
    for name, texts in systems.items():
        lines = [f"{' '.join(t)} (spk{i % SPEAKERS}-utt{i:03})\n" for i, t in enumerate(texts)]
        (Path(__file__).parent / f"{name}.trn").write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
