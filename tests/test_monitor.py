"""What training reports is all there, once, and readable by TensorBoard."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxds2.text import Vocabulary
from jaxds2.training.monitor import Monitor, MonitorError, alignment_picture

VOCABULARY = Vocabulary("abc ")


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def tensorboard(run_dir: Path) -> Any:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run_dir / "tensorboard"))
    events.Reload()
    return events


def monitor(run_dir: Path, resume_step: int = 0) -> Monitor:
    return Monitor(run_dir, total_steps=100, resume_step=resume_step, progress=False)


def test_scalars_are_in_metrics_jsonl_and_tensorboard(tmp_path: Path):
    with monitor(tmp_path / "my run") as m:
        m.scalars(10, {"train/loss": 2.5, "train/skipped": np.int32(1)})
        m.scalars(20, {"train/loss": np.float32(0.5), "dev/wer": 0.25})
    lines = metrics(tmp_path / "my run")
    assert [{k: v for k, v in line.items() if k != "time"} for line in lines] == [
        {"step": 10, "train/loss": 2.5, "train/skipped": 1.0},
        {"step": 20, "train/loss": 0.5, "dev/wer": 0.25},
    ]
    assert 1.7e9 < lines[0]["time"] <= lines[1]["time"]
    events = tensorboard(tmp_path / "my run")
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [(10, 2.5), (20, 0.5)]
    assert [(e.step, e.value) for e in events.Scalars("dev/wer")] == [(20, 0.25)]


def test_non_finite_numbers_are_null_in_json(tmp_path: Path):
    with monitor(tmp_path) as m:
        m.scalars(1, {"a": float("nan"), "b": float("inf"), "c": 1.0})
    line = (tmp_path / "metrics.jsonl").read_text()
    parsed = json.loads(line, parse_constant=lambda constant: pytest.fail(f"{constant} is not JSON"))
    assert (parsed["a"], parsed["b"], parsed["c"]) == (None, None, 1.0)
    assert np.isnan(tensorboard(tmp_path).Scalars("a")[0].value)


@pytest.mark.parametrize("resume_step", [0, 10, 19, 20, 30])
def test_a_resumed_run_has_each_step_once(tmp_path: Path, resume_step: int):
    with monitor(tmp_path) as m:
        m.text(0, "config", "first start")
        for step in (10, 20, 30):
            m.scalars(step, {"loss": 1.0})
            m.sample_table(step, [("a", "b", "c")])
    with monitor(tmp_path, resume_step) as m:
        if not resume_step:
            m.text(0, "config", "second start")
        for step in (10, 20, 30, 40):
            if step > resume_step:
                m.scalars(step, {"loss": 2.0})
                m.sample_table(step, [("a", "b", "c")])
    expected = [(step, 1.0 if step <= resume_step else 2.0) for step in (10, 20, 30, 40)]
    assert [(line["step"], line["loss"]) for line in metrics(tmp_path)] == expected
    events = tensorboard(tmp_path)
    assert [(e.step, e.value) for e in events.Scalars("loss")] == expected

    from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator

    displayed = EventAccumulator(str(tmp_path / "tensorboard"))  # what TensorBoard's pages read
    displayed.Reload()
    assert [e.step for e in displayed.Tensors("loss")] == [10, 20, 30, 40]
    assert [e.step for e in displayed.Tensors("dev/samples/text_summary")] == [10, 20, 30, 40]
    (config,) = displayed.Tensors("config/text_summary")
    assert config.tensor_proto.string_val[0] == (b"first start" if resume_step else b"second start")


def test_a_line_that_was_half_written_is_dropped(tmp_path: Path):
    with monitor(tmp_path) as m:
        m.scalars(10, {"loss": 1.0})
    with (tmp_path / "metrics.jsonl").open("a") as f:
        f.write('{"step": 20, "lo')
    with monitor(tmp_path, resume_step=10) as m:
        m.scalars(20, {"loss": 2.0})
    assert [(line["step"], line["loss"]) for line in metrics(tmp_path)] == [(10, 1.0), (20, 2.0)]


def test_messages_are_printed_and_logged_across_starts(tmp_path: Path, capsys):
    with monitor(tmp_path) as m:
        m.message("step 10: %WER 6.31")
        assert capsys.readouterr().out == "step 10: %WER 6.31\n"
        assert (tmp_path / "train.log").read_text().endswith(" step 10: %WER 6.31\n")
    with monitor(tmp_path, resume_step=10) as m:
        m.message("resumed: é")
    lines = (tmp_path / "train.log").read_text(encoding="utf-8").splitlines()
    assert [line.split(" ", 2)[2] for line in lines] == ["step 10: %WER 6.31", "resumed: é"]


def test_the_bar_is_on_stderr_and_starts_where_training_does(tmp_path: Path, capsys):
    with Monitor(tmp_path, total_steps=100, resume_step=40) as m:
        m.advance(41, loss=2.0, lr=1e-3)
        m.advance(43, loss=1.25)
        m.message("line")
    out, err = capsys.readouterr()
    assert out == "line\n"
    last = err.split("\r")[-1]
    assert "43/100" in last
    assert "loss=1.25" in last
    assert "lr=0.001" in last


def test_a_bar_in_a_file_is_not_redrawn_at_every_step(tmp_path: Path, capsys):
    with Monitor(tmp_path, total_steps=500) as m:
        for step in range(1, 501):
            m.advance(step, loss=1.0)
    assert capsys.readouterr().err.count("\r") <= 3


def test_no_bar_without_progress(tmp_path: Path, capsys):
    with monitor(tmp_path) as m:
        m.advance(1, loss=1.0)
    assert capsys.readouterr().err == ""


def test_sample_table_is_markdown_whatever_the_text(tmp_path: Path):
    with monitor(tmp_path) as m:
        m.sample_table(5, [("utt|1", "one two", "one too"), ("utt2", "three", "")])
    event = tensorboard(tmp_path).Tensors("dev/samples/text_summary")[0]
    assert event.step == 5
    assert event.tensor_proto.string_val[0].decode() == (
        "| id | reference | hypothesis |\n|---|---|---|\n| utt\\|1 | one two | one too |\n| utt2 | three |  |"
    )


def log_probs(classes: list[int]) -> np.ndarray:
    """Log-probabilities with these winners, the surer the later in the utterance."""
    logits_UV = np.zeros((len(classes), VOCABULARY.size), np.float32)
    logits_UV[np.arange(len(classes)), classes] = 3 + np.arange(len(classes)) / 1000
    return logits_UV - np.log(np.exp(logits_UV).sum(axis=1, keepdims=True))


@pytest.mark.parametrize("num_frames", [0, 1, 160, 161])
def test_a_picture_of_any_length_reaches_tensorboard(tmp_path: Path, num_frames: int):
    log_probs_UV = log_probs([i % 5 for i in range(num_frames)])
    with monitor(tmp_path) as m:
        m.figure(7, "dev/alignment", alignment_picture(log_probs_UV, VOCABULARY))
    (image,) = tensorboard(tmp_path).Images("dev/alignment")
    rows = max(1, -(-num_frames // 160))
    assert (image.step, image.width, image.height) == (7, 1300, 230 * rows)
    assert image.encoded_image_string.startswith(b"\x89PNG")


def test_each_greedy_character_stands_above_its_peak():
    (axes,) = alignment_picture(log_probs([0, 1, 1, 0, 1, 4, 3, 0]), VOCABULARY).axes
    labels = [(text.get_text(), text.get_position()[0]) for text in axes.texts]
    assert labels == [("a", 2.5), ("a", 4.5), ("␣", 5.5), ("c", 6.5)]
    assert len(axes.lines) == 4  # blank, a, c, space


def test_an_alphabet_that_the_font_lacks_is_drawn_without_a_warning(tmp_path: Path):
    vocabulary = Vocabulary("語音話 ")
    with monitor(tmp_path) as m:
        m.figure(1, "dev/alignment", alignment_picture(log_probs([0, 1, 2, 3]), vocabulary))
    assert tensorboard(tmp_path).Images("dev/alignment")


REPORT_UNTIL_FULL = """
import resource, sys
from pathlib import Path
from jaxds2.training.monitor import Monitor, MonitorError

m = Monitor(Path(sys.argv[1]), total_steps=100, progress=False)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
try:
    for step in range(100):
        REPORT
except MonitorError as e:
    print(e)
m.close()
"""


@pytest.mark.parametrize(
    "report",
    [
        'm.text(step, "config", "x" * 5_000)',  # TensorBoard's alone, written by its thread
        'm.scalars(step, {"loss" + "x" * 5_000: 1.0})',
        'm.message("x" * 5_000)',
    ],
)
def test_a_full_disk_ends_reporting_with_one_error_and_nothing_waits(tmp_path: Path, report: str):
    command = [sys.executable, "-c", REPORT_UNTIL_FULL.replace("REPORT", report), str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    said = [line for line in done.stdout.splitlines() if not line.startswith("xxx")]
    expected = "cannot be written (File too large); make room, then resume with the same command"
    assert said == [f"{tmp_path / 'run'}: {expected}"]


@pytest.fixture
def no_room_for_tensorboard(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("os.fsync", fail)


@pytest.mark.usefixtures("no_room_for_tensorboard")
def test_a_failure_that_no_report_has_met_is_raised_by_closing_once(tmp_path: Path):
    m = monitor(tmp_path)
    with pytest.raises(MonitorError, match="No space left on device"):
        m.close()
    m.close()


@pytest.mark.usefixtures("no_room_for_tensorboard")
def test_a_failure_to_close_does_not_hide_the_error_that_is_under_way(tmp_path: Path):
    with pytest.raises(KeyboardInterrupt), monitor(tmp_path):
        raise KeyboardInterrupt


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path):
    (tmp_path / "file").touch()
    with pytest.raises(MonitorError, match=r"file/run: cannot be written \(Not a directory\); put that right"):
        monitor(tmp_path / "file/run")
