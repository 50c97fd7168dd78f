"""What a config trains on and is evaluated on: its manifests read, normalised, selected and planned."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from jaxds2.audio import AudioError, probe_audio
from jaxds2.config import Config, ConfigError
from jaxds2.data.manifest import Utterance, manifest_digest
from jaxds2.data.plan import BatchPlan, select_utterances
from jaxds2.data.shards import Recordings, read_utterances
from jaxds2.inference.recognizer import output_frames
from jaxds2.text import TextError, Vocabulary

LOOKED_AT = 10
"""Recordings of a training manifest of which one at least must open before training starts."""


def read_training_data(
    config: Config, vocabulary: Vocabulary, *, look: bool = True
) -> tuple[list[Utterance], dict[str, list[str]]]:
    """The utterances to train on, normalised, and the ids of those left out by reason.

    With `look` a few recordings of each manifest are looked for: of a corpus that was moved all would be left out.

    Raises:
      ManifestError, ShardError, TextError: a manifest cannot be used. AudioError: its recordings are not there.
      ConfigError: none is named, one is not there, or nothing is left of them.
    """
    if not config.data.train:
        raise ConfigError("data.train names no manifest; set it in the config, or with data.train=FILE")
    kept: list[Utterance] = []
    left_out: dict[str, list[str]] = {}
    for path in config.data.train:
        _must_exist(path, "data.train")
        found = _read_normalized(path, vocabulary)
        if look:
            _look_for(found, path)
        try:
            of_path, left_out_of_path = select_utterances(
                found,
                config.data,
                vocabulary=vocabulary,
                output_frames=lambda num_samples: output_frames(num_samples, config),
                speed=config.augment.speed,
                sample_rate=config.features.sample_rate,
            )
        except TextError as e:
            raise _unspelt(path, e) from None
        kept += of_path
        for reason, ids in left_out_of_path.items():
            left_out.setdefault(reason, []).extend(ids)
    if not kept:
        reasons = ", ".join(f"{len(ids)} {reason}" for reason, ids in left_out.items())
        count = sum(map(len, left_out.values()))
        raise ConfigError(f"nothing to train on: all {count} utterances are left out ({reasons})")
    return kept, left_out


def _read_normalized(path: str, vocabulary: Vocabulary) -> list[Utterance]:
    utterances = read_utterances(path)
    for i, u in enumerate(utterances):  # in place: no text is held twice
        utterances[i] = dataclasses.replace(u, text=vocabulary.normalize(u.text))
    return utterances


def _unspelt(path: str, error: TextError) -> TextError:
    return TextError(f"{path}: {error}; `jaxds2 check --config CONFIG {path}` lists all such texts")


def _must_exist(path: str, field: str) -> None:
    if not Path(path).exists():
        raise ConfigError(
            f"{field}: no manifest {path}; write it with `jaxds2 prepare` (a folder of shards: `jaxds2 shard`), "
            f"or name another: {field}=FILE"
        )


def _look_for(utterances: Sequence[Utterance], path: str) -> None:
    """Open recordings until one can be. Raises AudioError: none of a few spread over the manifest can."""
    fault: AudioError | None = None
    with Recordings() as recordings:
        for u in utterances[:: max(1, len(utterances) // LOOKED_AT)]:
            try:
                probe_audio(recordings.of(u))
            except AudioError as e:
                fault = e
            else:
                return
    raise AudioError(f"{path}: its recordings cannot be opened: {fault}; is the corpus where the manifest says?")


def training_plan(config: Config, utterances: Sequence[Utterance], vocabulary: Vocabulary) -> BatchPlan:
    """Which utterances each step trains on."""
    return plan_batches(
        config,
        np.fromiter((u.duration for u in utterances), np.float64, len(utterances)),
        np.fromiter((len(u.text) for u in utterances), np.int64, len(utterances)),  # a label is a character
        digest=manifest_digest(utterances),
    )


def plan_batches(config: Config, durations_s_N: np.ndarray, label_lengths_N: np.ndarray, *, digest: str) -> BatchPlan:
    """The batches of a training run. Raises PlanError: there are none.

    Args:
      config: the whole configuration.
      durations_s_N: seconds, before speed perturbation.
      label_lengths_N: labels of each.
      digest: of the manifests, see `manifest_digest`.
    """
    return BatchPlan(
        durations_s_N,
        label_lengths_N,
        digest=digest,
        data=config.data,
        seed=config.training.seed,
        speed=config.augment.speed,
        sample_rate=config.features.sample_rate,
    )


def num_updates(config: Config, plan: BatchPlan) -> int:
    """Steps of the whole run; the last one is filled up from the epoch after the last."""
    return config.training.steps or -(-plan.steps_for_epochs(config.training.epochs or 0) // config.training.accumulate)


def read_dev_data(config: Config, vocabulary: Vocabulary) -> list[Utterance]:
    """The utterances to evaluate on, normalised; empty where the config names none.

    They are looked at before training starts, since a fault would otherwise come up after the first epoch.

    Raises:
      ManifestError, ShardError: a bad manifest. AudioError: a recording cannot be opened, or is too short for a frame.
      TextError: a text outside the alphabet. ConfigError: it is not there, or no utterance has a
        text.
    """
    if config.data.dev is None:
        return []
    _must_exist(config.data.dev, "data.dev")
    utterances = _read_normalized(config.data.dev, vocabulary)
    with Recordings() as recordings:
        for u in utterances:
            try:
                vocabulary.encode(u.text)
            except TextError as e:
                raise _unspelt(config.data.dev, TextError(f"utterance {u.id!r}: {e}")) from None
            seconds = probe_audio(recordings.of(u)).duration
            if output_frames(round(seconds * config.features.sample_rate), config) < 1:
                raise AudioError(f"{u.audio_filepath}: too short for one frame ({seconds:.3f} s); leave out {u.id!r}")
    if not any(u.text for u in utterances):
        raise ConfigError(f"{config.data.dev}: no utterance has a text, so there is no error rate; set data.dev=None")
    return utterances
