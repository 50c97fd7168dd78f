"""Audio files to text."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from jaxds2.audio import AudioError, probe_audio
from jaxds2.data.manifest import Utterance
from jaxds2.decoding.hypothesis import Decode, Hypothesis
from jaxds2.inference.recognizer import Recognizer


@dataclass(frozen=True)
class Transcript:
    """What became of one file: what was heard, best first, or why there is nothing."""

    path: Path
    hypotheses: tuple[Hypothesis, ...] = ()
    error: str | None = None

    @property
    def text(self) -> str:
        """The best text; empty where there is an error."""
        return self.hypotheses[0].text if self.hypotheses else ""


def transcribe(recognizer: Recognizer, paths: Sequence[Path], decode: Decode) -> list[Transcript]:
    """Transcribe files of any rate, channel count and format that libsndfile reads, several at a time.

    A file that cannot be read does not keep the others from coming out.

    Args:
      recognizer: the model and its weights.
      paths: audio files; the transcripts come in this order.
      decode: log-probabilities to hypotheses.
    """
    transcripts: list[Transcript] = [Transcript(path) for path in paths]
    utterances: list[Utterance] = []
    positions: list[int] = []
    for position, path in enumerate(paths):
        try:
            duration = probe_audio(path).duration
        except AudioError as e:
            transcripts[position] = Transcript(path, error=str(e))
            continue
        utterances.append(Utterance(id=str(position), audio_filepath=path, duration=duration, text=""))
        positions.append(position)
    if not utterances:
        return transcripts
    for batch, output, failures in recognizer.run(utterances, recognizer.plan(utterances), with_labels=False):
        for row, index in enumerate(batch.index_B.tolist()):
            if index >= 0:
                found = decode(np.asarray(output.log_probs_BUV[row, : output.logit_lengths_B[row]]))
                transcripts[positions[index]] = Transcript(paths[positions[index]], tuple(found))
        for line in failures:
            identifier, _, message = line.partition(": ")
            transcripts[int(identifier)] = Transcript(paths[int(identifier)], error=message)
    return transcripts
