"""The parts of the GPU suite that time training: the step of three models, a trace of it, a real run."""

import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpu_suite import PEAK_FLOPS, ROOT, Block, Column, Suite, compiled, jax_column, timed

if TYPE_CHECKING:
    from jax.stages import Compiled

    from jaxds2.config import ModelConfig
    from jaxds2.data.pipeline import Batch
    from jaxds2.model.scan import Implementation

CLASSES = 29
LINES = 200
"""Of a run's metrics that are kept."""
SAVING = 40.0
"""Seconds that a training run has to stop in and save."""


def models(small: bool) -> dict[str, "ModelConfig"]:
    """The models of the step, the largest first: seven layers of 1,024 states a direction, and what fits less."""
    from jaxds2.config import ModelConfig

    base = ModelConfig(dropout=0.1, feed_forward=0)
    if small:
        return {"tiny": replace(base, conv_channels=(2, 2), width=8, hidden=8, layers=1)}
    return {
        "large": replace(base, width=1024, hidden=1024, layers=7),
        "medium": replace(base, width=512, hidden=512, layers=5),
        "small": base,
    }


def step(suite: Suite) -> dict[str, Block]:
    """The training step in bfloat16 by size of the model, length and form of the scan; what its parts take."""
    blocks: dict[str, Block] = {}
    for seconds in (1,) if suite.small else (16, 4):
        for form in suite.forms(128, "fused", "associative")[: 1 if suite.small else None]:
            for name, model in models(suite.small).items():
                setting = Setting(name, replace(model, scan=form), seconds, (4 if suite.small else 1600) // seconds)
                blocks[f"{name}-{seconds}s-{form}"] = partial(one_step, suite, setting)
        for name, model in models(suite.small).items():
            setting = Setting(name, model, seconds, (4 if suite.small else 1600) // seconds)
            blocks[f"{name}-{seconds}s-parts"] = partial(parts_of_step, suite, setting)
    return blocks


@dataclass(frozen=True)
class Setting:
    """A model and its batch: rows of one length, 1,600 seconds of audio in all."""

    name: str
    model: "ModelConfig"
    seconds: int
    rows: int

    def describe(self, params: Any) -> str:
        """For the head of a table."""
        count = sum(p.size for p in params.values())
        return f"{self.name} model, {count:,} parameters, {self.rows} utterances of {self.seconds} s, bfloat16"


def host_batch(setting: Setting) -> "Batch":
    """Random audio and labels, on the host."""
    import numpy as np

    from jaxds2.data.pipeline import Batch

    rows, samples, labels = setting.rows, 16_000 * setting.seconds, 12 * setting.seconds
    rng = np.random.default_rng(0)
    return Batch(
        rng.integers(-3000, 3000, (rows, samples)).astype(np.int16),
        np.full(rows, samples, np.int32),
        rng.integers(1, CLASSES, (rows, labels)).astype(np.int32),
        np.full(rows, labels, np.int32),
        np.arange(rows, dtype=np.int32),
        np.array(0, np.int32),
    )


def placed_batch(setting: Setting) -> "Batch":
    """The same on the device."""
    from jaxds2.data.placement import data_mesh, place

    return place(host_batch(setting), data_mesh(1, rows_multiple=1))


def gradient_of(setting: Setting) -> "tuple[Compiled, Any, Batch]":
    """The gradient step of training as a program, with the parameters and the batch that it takes."""
    import jax
    import jax.numpy as jnp

    from jaxds2.config import AugmentConfig, FeatureConfig
    from jaxds2.data.placement import data_mesh
    from jaxds2.model.deepspeech2 import create
    from jaxds2.training.step import make_gradient_step

    features, mesh, batch = FeatureConfig(), data_mesh(1, rows_multiple=1), placed_batch(setting)
    apply, params = create(features.n_mels, CLASSES, setting.model, dtype=jnp.bfloat16)
    gradient = make_gradient_step(apply, features, AugmentConfig(), mesh=mesh, seed=0, ctc="fused")
    return jax.jit(gradient).lower(params, batch).compile(), params, batch


def one_step(suite: Suite, setting: Setting) -> dict[str, Any]:
    """Gradient and update as training runs them, one behind the other, the state's buffers taken over."""
    import jax

    from jaxds2.config import FeatureConfig, OptimizerConfig
    from jaxds2.features import num_frames
    from jaxds2.training.dryrun import TRAINING_FACTOR, flops
    from jaxds2.training.optimizer import make_optimizer
    from jaxds2.training.step import TrainState, make_update_step

    features = FeatureConfig()
    gradient, params, batch = gradient_of(setting)
    title = setting.describe(params)  # the parameters themselves go with the first update
    optimizer = make_optimizer(OptimizerConfig(), 1000)
    state = TrainState.create(params, optimizer, ema_decay=0.999)
    grads, loss = gradient(params, batch)
    update = jax.jit(make_update_step(optimizer, ema_decay=0.999), donate_argnums=0)
    update = update.lower(state, grads, loss.mean).compile()
    held = [state]

    def updated(grads: Any, loss: Any) -> Any:
        held[0], metrics = update(held[0], grads, loss.mean)
        return held[0], metrics

    columns: dict[str, Callable[[], Column]] = {
        "step": lambda: jax_column(lambda: updated(*gradient(held[0].params, batch)), gradient, update),
        "gradient": lambda: jax_column(lambda: gradient(held[0].params, batch), gradient),
        "update": lambda: jax_column(lambda: updated(grads, loss), update),
    }
    found = timed(f"{title}, {setting.model.scan} scan", columns, suite)
    frames = num_frames(16_000 * setting.seconds, features)
    count = TRAINING_FACTOR * sum(flops(setting.model, features.n_mels, CLASSES, frames, setting.rows).values())
    if "step" not in found["columns"]:
        return found
    seconds, peak = found["columns"]["step"]["wall ms"] / 1e3, suite.peak(PEAK_FLOPS)
    found["figures"] = {
        "audio hours a second": setting.rows * setting.seconds / 3600 / seconds,
        "TFLOP/s": count / seconds / 1e12,
        "MFU": None if peak is None else count / seconds / peak,
    }
    print("  ".join(f"{key} {value:.3g}" for key, value in found["figures"].items() if value is not None))
    return found


def parts_of_step(suite: Suite, setting: Setting) -> dict[str, Any]:
    """What a step consists of, each by itself: its batch's way to the device, features, front end, scans, loss."""
    import jax
    import jax.numpy as jnp

    from jaxds2.config import FeatureConfig
    from jaxds2.ctc import ctc_loss
    from jaxds2.data.placement import data_mesh, place
    from jaxds2.features import log_mel
    from jaxds2.model.deepspeech2 import create

    features, model, mesh = FeatureConfig(), setting.model, data_mesh(1, rows_multiple=1)
    on_host, batch = host_batch(setting), placed_batch(setting)
    apply, params = create(features.n_mels, CLASSES, model, dtype=jnp.bfloat16)
    features_BTF, frames_B = log_mel(batch.audio_BS, batch.audio_lengths_B, features)
    logits_BUV, logit_lengths_B = jax.eval_shape(apply, params, features_BTF, frames_B)
    shape = logits_BUV.shape
    scanned = jax.random.normal(jax.random.key(0), (shape[1], setting.rows, model.hidden), jnp.bfloat16)
    random = jax.random.normal(jax.random.key(1), shape, logits_BUV.dtype)
    lengths_B = jnp.full(logit_lengths_B.shape, shape[1], logit_lengths_B.dtype)

    def total(logits_BUV, *given):
        return jnp.sum(ctc_loss(logits_BUV, *given, implementation="fused"))

    losses = random, lengths_B, batch.labels_BN, batch.label_lengths_B
    columns: dict[str, Callable[[], Column]] = {
        "batch to device": lambda: jax_column(lambda: place(on_host, mesh)),
        "features": lambda: compiled(lambda a, n: log_mel(a, n, features), batch.audio_BS, batch.audio_lengths_B),
        "front-end": lambda: front_end(model, features_BTF, frames_B),
        "ctc": lambda: compiled(jax.grad(total), *losses),
    }
    forms = suite.forms(model.hidden, "fused", "associative")
    for form in forms:
        columns[f"scan-of-a-layer-{form}"] = lambda form=form: scan_of_a_layer(scanned, form)
    found = timed(f"parts of the step, {setting.describe(params)}", columns, suite)
    found["scan of all layers, ms"] = {
        form: model.layers * found["columns"][column]["wall ms"]
        for form in forms
        if (column := f"scan-of-a-layer-{form}") in found["columns"]
    }
    return found


def front_end(model: "ModelConfig", features_BTF: Any, frames_B: Any) -> Column:
    """Convolutions and projection, forward and backward."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from jaxds2.model.deepspeech2 import FrontEnd

    module = FrontEnd(features_BTF.shape[2], model, dtype=jnp.bfloat16, rngs=nnx.Rngs(params=0))
    graphdef, params = nnx.split(module)

    def total(params, features_BTF, frames_B):
        return jnp.sum(jnp.square(nnx.merge(graphdef, params)(features_BTF, frames_B)[0].astype(jnp.float32)))

    return compiled(jax.grad(total), params, features_BTF.astype(jnp.bfloat16), frames_B)


def scan_of_a_layer(states_UBH: Any, form: "Implementation") -> Column:
    """Both directions of one layer's recurrence, without its matmuls, forward and backward."""
    import jax
    import jax.numpy as jnp
    from gpu_kernels import both_ways

    def total(pre_UBE):
        return jnp.sum(jnp.square(both_ways(pre_UBE, form)[0].astype(jnp.float32)))

    return compiled(jax.grad(total), jnp.concatenate([states_UBH] * 4, axis=-1))


def trace(suite: Suite) -> dict[str, Block]:
    """Where the device's time goes in three gradient steps of the largest model."""
    return {next(iter(models(suite.small))): partial(traced, suite)}


def traced(suite: Suite) -> dict[str, Any]:
    """The 40 longest operations by name, and all time by line of the device's plane."""
    import jax

    name, model = next(iter(models(suite.small).items()))
    form = suite.forms(model.hidden, "fused", "associative")[0]
    seconds = 1 if suite.small else 16
    setting = Setting(name, replace(model, scan=form), seconds, (4 if suite.small else 1600) // seconds)
    program, params, batch = gradient_of(setting)
    jax.block_until_ready(program(params, batch))
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(3):
                jax.block_until_ready(program(params, batch))
        (path,) = Path(folder).rglob("*.xplane.pb")
        planes = list(jax.profiler.ProfileData.from_file(str(path)).planes)
        device = [plane for plane in planes if plane.name.startswith("/device:")]
        lines, operations = spent(device or planes)
    for operation, milliseconds in list(operations.items())[:10]:
        print(f"{milliseconds:10.2f} ms  {operation}")
    found = {"scan": form, "steps": 3, "measured on": "device" if device else "host", "milliseconds": operations}
    return found | {"planes": [plane.name for plane in planes], "lines": lines}


def spent(planes: Iterable[Any]) -> tuple[dict[str, float], dict[str, float]]:
    """Milliseconds by line, and of the longest operations by name.

    Of a GPU's plane the streams count alone where there are any: other lines show the same time in other words.
    """
    lines: Counter[str] = Counter()
    operations: dict[bool, Counter[str]] = {True: Counter(), False: Counter()}
    for plane in planes:
        for line in plane.lines:
            for event in line.events:
                lines[f"{plane.name} {line.name}"[:120]] += event.duration_ns / 1e6
                operations[line.name.startswith("Stream")][event.name[:120]] += event.duration_ns / 1e6
    return dict(lines.most_common(20)), dict((operations[True] or operations[False]).most_common(40))


def train(suite: Suite) -> dict[str, Block]:
    """A real training run of a config; stopped and saved where it does not end in time, which the next call resumes."""
    return {} if suite.config is None else {Path(suite.config).stem: partial(one_run, suite, suite.config)}


def one_run(suite: Suite, config: str) -> dict[str, Any]:
    """train.py as users start it, by itself on the device; its scalars, thinned."""
    environment = {name: value for name, value in os.environ.items() if name != "XLA_PYTHON_CLIENT_PREALLOCATE"}
    begin = time.monotonic()
    left = suite.until - begin
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile() as output:
        run = Path(folder) / "run" if suite.small else ROOT / "runs" / f"gpu-{Path(config).stem}"
        command = [sys.executable, str(ROOT / "train.py"), "--config", config, "--run", str(run)]
        done = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT)
        ends = {signal.SIGTERM: max(left - SAVING, left / 2), signal.SIGKILL: min(0.95 * left, left - 2)}
        for number, end in ends.items():
            try:
                done.wait(max(begin + end - time.monotonic(), 0))
            except subprocess.TimeoutExpired:
                done.send_signal(number)
        done.wait()
        output.seek(0)
        lines = output.read().decode(errors="replace").splitlines()[-20:]
        metrics = read_metrics(run / "metrics.jsonl")
    print(*lines, sep="\n")
    waits = [m["train/data_wait_share"] for m in metrics if "train/data_wait_share" in m]
    found: dict[str, Any] = {
        "command": command[1:],
        "exit code": done.returncode,
        "ran for": time.monotonic() - begin,
        "data wait share": statistics.median(waits) if waits else None,
        "output": lines,
        "metrics": metrics[:: max(1, len(metrics) // LINES)],
    }
    if done.returncode == 75:
        found["stopped"] = "saved; the same command goes on"
    elif done.returncode:
        found["error"] = f"train.py ended with {done.returncode}: {lines[-1] if lines else 'it said nothing'}"
    return found


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a metrics.jsonl; none where it is not there."""
    found = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            found.append(json.loads(line))
        except ValueError:  # the last one, of a run that was killed
            continue
    return found
