"""Writes a report.html of many synthetic utterances, for a browser: python benchmarks/big_page.py OUT [UTTERANCES].

Prints its size and how long it took to build. The page itself says in <html data-drawn-ms data-loaded-ms> after how
many milliseconds its first rows were drawn and all of it was read:

    chromium --headless --no-sandbox --disable-gpu --dump-dom file://$PWD/OUT/report.html | head -2
"""

import sys
import time
from pathlib import Path

import numpy as np
import soundfile

from jaxds2.config import DataConfig, FeatureConfig
from jaxds2.data.manifest import Utterance
from jaxds2.evaluation.breakdown import score_utterances, worst_first
from jaxds2.evaluation.page import Posteriors, build_page, collect_media
from jaxds2.evaluation.report import write_report
from jaxds2.text import Vocabulary

SECONDS = 7.4
"""Mean length of an utterance of LibriSpeech's test sets."""
VOCABULARY = Vocabulary(DataConfig().characters)


def main(out: Path, count: int) -> None:
    """Write the page and its recordings into a folder."""
    rng = np.random.default_rng(0)
    words = ["".join(rng.choice(list("etaoinshrdlu"), rng.integers(1, 9))) for _ in range(2000)]
    refs = [[str(w) for w in rng.choice(words, 20)] for _ in range(count)]
    hyps = [[str(rng.choice(words)) if rng.random() < 0.1 else w for w in ref if rng.random() > 0.02] for ref in refs]
    ids = [f"utt-{i:05}" for i in range(count)]
    out.mkdir(parents=True, exist_ok=True)
    audio = {}
    for i in ids:
        samples = int(16_000 * rng.uniform(0.3, 1.7) * SECONDS)
        pitch, loud = rng.uniform(90, 250), np.repeat(rng.uniform(0, 1, samples // 2000 + 1), 2000)[:samples]
        t = np.arange(samples) / 16_000
        voice = sum(np.sin(2 * np.pi * pitch * k * t) / k for k in range(1, 20))
        audio[i] = out / f"{i}.flac"
        soundfile.write(audio[i], 0.1 * loud * (voice + 0.3 * rng.standard_normal(samples)), 16_000)
    durations = [soundfile.info(audio[i]).duration for i in ids]
    by_id = {
        i: Utterance(audio_filepath=audio[i], duration=s, text="", id=i) for i, s in zip(ids, durations, strict=True)
    }
    speakers = [f"speaker {i % 40}" for i in range(count)]
    begin = time.perf_counter()
    scored = score_utterances(ids, speakers, durations, [" ".join(r) for r in refs], [" ".join(h) for h in hyps])
    posteriors, times = {}, {}
    for u in scored:
        path = VOCABULARY.encode(u.hyp)
        logits_UV = rng.normal(0, 1, (max(int(33 * u.duration), 2 * len(path)), VOCABULARY.size))
        logits_UV[:, 0] += 6
        places = np.arange(len(path)) * len(logits_UV) // max(len(path), 1)
        logits_UV[places, path] += 12
        log_probs_UV = logits_UV - np.log(np.exp(logits_UV).sum(-1, keepdims=True))
        posteriors[u.id] = Posteriors.of(log_probs_UV, VOCABULARY)
        each = u.duration / max(len(u.hyp.split()), 1)
        times[u.id] = [(w, k * each, (k + 1) * each) for k, w in enumerate(u.hyp.split())]

    def page(report):
        media = collect_media([by_id[u.id] for u in worst_first(scored)], posteriors, FeatureConfig())
        print(
            f"{sum(bool(m.audio) for m in media.values())} sounds, {sum(bool(m.mel) for m in media.values())} pictures"
        )
        curve = [(500 * k, 0.12 + np.exp(-k / 6)) for k in range(40)]
        return build_page(report, scored, audio=audio, media=media, words=times, run="big", curve=curve)

    metadata = {"rtfx": 100.0, "manifest": "synthetic", "manifest_sha256": "0" * 64, "checkpoint": "best"}
    write_report(out, scored, checkpoint_step=1, decoder={"name": "greedy"}, times=times, page=page, **metadata)
    size = (out / "report.html").stat().st_size
    print(
        f"{count} utterances, {sum(durations):.0f} s: {size / 1e6:.1f} MB, {time.perf_counter() - begin:.1f} s to build"
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 1000)
