"""What a config trains and evaluates on is looked at before training starts."""

import numpy as np
import pytest
import soundfile

from jaxds2.audio import AudioError
from jaxds2.config import Config, ConfigError, DataConfig, TrainingConfig
from jaxds2.data.manifest import Utterance, write_manifest
from jaxds2.text import Vocabulary
from jaxds2.training.loop import is_due
from jaxds2.training.selection import num_updates, plan_batches, read_dev_data

VOCABULARY = Vocabulary("abc ")


def dev_set(folder, *, text, samples):
    """A config whose dev set is one recording of so many samples at 16 kHz."""
    soundfile.write(folder / "a.wav", np.ones(samples, np.int16), 16_000)
    write_manifest(folder / "dev.jsonl", [Utterance("u1", folder / "a.wav", samples / 16_000, text)])
    return Config(
        "x", data=DataConfig(dev=str(folder / "dev.jsonl"), characters="abc "), training=TrainingConfig(steps=1)
    )


def test_dev_utterances_are_normalised(tmp_path):
    assert [u.text for u in read_dev_data(dev_set(tmp_path, text="A  b", samples=8000), VOCABULARY)] == ["a b"]


def test_a_dev_recording_too_short_for_a_frame_is_named(tmp_path):
    with pytest.raises(AudioError, match=r"a\.wav: too short for one frame .*'u1'"):
        read_dev_data(dev_set(tmp_path, text="a", samples=100), VOCABULARY)


def test_a_dev_set_without_any_text_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="no utterance has a text"):
        read_dev_data(dev_set(tmp_path, text="", samples=8000), VOCABULARY)


@pytest.mark.parametrize("accumulate", [1, 2, 3, 7])
def test_with_accumulated_batches_an_epoch_is_over_in_the_step_that_holds_its_last_batch(accumulate):
    config = Config("x", data=DataConfig(batch_seconds=8.0), training=TrainingConfig(epochs=4, accumulate=accumulate))
    plan = plan_batches(config, np.linspace(1, 4, 50), np.full(50, 3), digest="x")
    ends = [plan.steps_for_epochs(epochs) for epochs in range(1, 5)]
    steps = num_updates(config, plan)
    assert (steps - 1) * accumulate < ends[-1] <= steps * accumulate
    want = [any((s - 1) * accumulate < end <= s * accumulate for end in ends) for s in range(1, steps + 1)]
    assert [is_due(s, None, plan, steps, accumulate) for s in range(1, steps + 1)] == want
