"""The parts of the GPU suite that time training: the step of three models, a torch peer, a trace, a real run."""

import json
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import side_by_side
from gpu_suite import FORMS, PEAK_FLOPS, ROOT, Suite, clock, compiled, torch_cuda, waiting

if TYPE_CHECKING:
    from jaxds2.config import ModelConfig
    from jaxds2.data.pipeline import Batch
    from jaxds2.model.scan import Implementation

CLASSES = 29


def models(small: bool) -> dict[str, "ModelConfig"]:
    """The models of the step: three sizes of ours, the largest as in the estimate of docs/performance.md."""
    from jaxds2.config import ModelConfig

    base = ModelConfig(dropout=0.1, feed_forward=0)
    if small:
        return {"tiny": replace(base, conv_channels=(2, 2), width=8, hidden=8, layers=1)}
    return {
        "small": base,
        "medium": replace(base, width=512, hidden=512, layers=5),
        "large": replace(base, width=1024, hidden=1024, layers=7),
    }


def step(suite: Suite) -> Any:
    """The training step in bfloat16 by size of the model and form of the scan: MFU, hours of audio, memory, parts."""
    results = []
    for name, model in models(suite.small).items():
        for seconds in (1,) if suite.small else (4, 16):
            results.append(one_step(suite, name, model, seconds))
    return results


def batch_of(suite: Suite, seconds: int) -> "Batch":
    """Rows of random audio and labels, all of one length, 1,600 seconds of audio in all."""
    import numpy as np

    from jaxds2.data.pipeline import Batch
    from jaxds2.data.placement import data_mesh, place

    rows, samples, labels = (4 if suite.small else 1600) // seconds, 16_000 * seconds, 12 * seconds
    rng = np.random.default_rng(0)
    batch = Batch(
        rng.integers(-3000, 3000, (rows, samples)).astype(np.int16),
        np.full(rows, samples, np.int32),
        rng.integers(1, CLASSES, (rows, labels)).astype(np.int32),
        np.full(rows, labels, np.int32),
        np.arange(rows, dtype=np.int32),
        np.array(0, np.int32),
    )
    return place(batch, data_mesh(1, rows_multiple=1))


def gradient_of(model: "ModelConfig", batch: "Batch") -> tuple[Callable[[], Any], int]:
    """The gradient step of training, in bfloat16, and the bytes of its temporaries."""
    import jax.numpy as jnp

    from jaxds2.config import AugmentConfig, FeatureConfig
    from jaxds2.data.placement import data_mesh
    from jaxds2.model.deepspeech2 import create
    from jaxds2.training.step import make_gradient_step

    features, mesh = FeatureConfig(), data_mesh(1, rows_multiple=1)
    apply, params = create(features.n_mels, CLASSES, model, dtype=jnp.bfloat16)
    gradient = make_gradient_step(apply, features, AugmentConfig(), mesh=mesh, seed=0, ctc="fused")
    return compiled(gradient, params, batch)


def one_step(suite: Suite, name: str, model: "ModelConfig", seconds: int) -> dict[str, Any]:
    """Time gradient, update, and what of the gradient is features, front end, scan and loss, on rows of a length."""
    import jax
    import jax.numpy as jnp

    from jaxds2.config import FeatureConfig, OptimizerConfig
    from jaxds2.ctc import ctc_loss
    from jaxds2.features import log_mel, num_frames
    from jaxds2.model.deepspeech2 import create
    from jaxds2.training.dryrun import flops
    from jaxds2.training.optimizer import make_optimizer
    from jaxds2.training.step import TrainState, make_update_step

    features, classes = FeatureConfig(), CLASSES
    batch = batch_of(suite, seconds)
    rows, samples = batch.audio_BS.shape
    apply, params = create(features.n_mels, classes, model, dtype=jnp.bfloat16)
    columns, memory = {}, {}
    for form in FORMS[:2]:
        columns[f"gradient-{form}"], memory[f"gradient-{form}"] = gradient_of(replace(model, scan=form), batch)
    optimizer = make_optimizer(OptimizerConfig(), 1000)
    state = TrainState.create(params, optimizer, ema_decay=0.999)
    grads, loss = columns["gradient-associative"]()
    columns["update"], memory["update"] = compiled(
        make_update_step(optimizer, ema_decay=0.999), state, grads, loss.mean
    )
    columns["features"], _ = compiled(lambda a, n: log_mel(a, n, features), batch.audio_BS, batch.audio_lengths_B)
    features_BTF, frames_B = log_mel(batch.audio_BS, batch.audio_lengths_B, features)
    logits_BUV, logit_lengths_B = jax.jit(apply)(params, features_BTF, frames_B)
    columns["front-end"] = front_end(model, features_BTF, frames_B)
    states_UBH = jnp.ones((logits_BUV.shape[1], rows, model.hidden), jnp.bfloat16)
    for form in FORMS[:2]:
        columns[f"scan-of-a-layer-{form}"] = scan_of_a_layer(states_UBH, form)

    def total(logits_BUV):
        labels = batch.labels_BN, batch.label_lengths_B
        return jnp.sum(ctc_loss(logits_BUV, logit_lengths_B, labels[0], labels[1], implementation="fused"))

    columns["ctc"], _ = compiled(jax.grad(total), logits_BUV)
    table: dict[str, dict[str, float | str]] = {
        column: {**row, "temporaries, MiB": memory.get(column, 0) / 2**20}
        for column, row in clock(columns, suite.rounds).items()
    }
    frames = int(num_frames(samples, features))
    count = 3 * sum(flops(model, features.n_mels, classes, frames, rows).values())
    best = min(float(row["wall ms"]) for column, row in table.items() if column.startswith("gradient"))
    best += float(table["update"]["wall ms"])
    figures: dict[str, float | None] = {
        "step, ms": best,
        "audio hours a second": rows * seconds / 3600 / (best / 1e3),
        "TFLOP/s": count / best / 1e9,
        "MFU": None if (peak := suite.peak(PEAK_FLOPS)) is None else count / (best / 1e3) / peak,
    }
    parameters = sum(p.size for p in params.values())
    title = f"{name} model, {parameters:,} parameters, {rows} utterances of {seconds} s, bfloat16"
    print(side_by_side.table(title, table))
    print("  ".join(f"{key} {value:.3g}" for key, value in figures.items() if value is not None), flush=True)
    return {"model": name, "parameters": parameters, "batch": [rows, seconds], "columns": table, "figures": figures}


def front_end(model: "ModelConfig", features_BTF: Any, frames_B: Any) -> Callable[[], Any]:
    """Convolutions and projection, forward and backward."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from jaxds2.model.deepspeech2 import FrontEnd

    module = FrontEnd(features_BTF.shape[2], model, dtype=jnp.bfloat16, rngs=nnx.Rngs(params=0))
    graphdef, params = nnx.split(module)

    def total(params, features_BTF):
        return jnp.sum(jnp.square(nnx.merge(graphdef, params)(features_BTF, frames_B)[0].astype(jnp.float32)))

    return compiled(jax.grad(total), params, features_BTF.astype(jnp.bfloat16))[0]


def scan_of_a_layer(states_UBH: Any, form: "Implementation") -> Callable[[], Any]:
    """Both directions of one layer's recurrence, without its matmuls, forward and backward."""
    import jax
    import jax.numpy as jnp

    from jaxds2.model.scan import mingru_recurrences

    def total(gates, candidates):
        options: Any = {"candidate_fn": "linear", "reverses": (False, True), "implementation": form}
        hs, _ = mingru_recurrences(gates, candidates, (None, None), **options)
        return sum(jnp.sum(jnp.square(h.astype(jnp.float32))) for h in hs)

    return compiled(jax.grad(total, (0, 1)), (states_UBH, states_UBH), (states_UBH, states_UBH))[0]


def peer(suite: Suite) -> Any:
    """The step of bench_step.py's plan beside the torch BiLSTM of the same plan, both in float32 with TF32 off."""
    from bench_step import SMALL, Plan, our_step, torch_model

    plan = SMALL if suite.small else Plan(rows=64)
    columns: dict[str, Callable[[], Any]] = {form: our_step(plan, form) for form in FORMS[:2]}
    if (found := torch_cuda()) is not None:
        torch, device = found
        from bench_step import batch_of

        features_BTF, labels_BN = (torch.from_numpy(x).to(device) for x in batch_of(plan))
        counts = torch.full((plan.rows,), plan.labels)
        model = torch_model(plan, None).to(device)
        optimizer = torch.optim.AdamW(model.parameters(), 1e-3)

        def one() -> Any:
            optimizer.zero_grad()
            log_probs_UBV = model(features_BTF)
            lengths = torch.full((plan.rows,), len(log_probs_UBV))
            torch.nn.functional.ctc_loss(log_probs_UBV, labels_BN, lengths, counts).backward()
            optimizer.step()

        columns["torch-BiLSTM"] = waiting(torch, device, one)
    table = clock(columns, suite.rounds)
    title = f"training step, {plan.rows} utterances of {plan.seconds} s, float32"
    print(side_by_side.table(title, table, base="associative", by="wall ms"))
    return {"plan": vars(plan), "columns": table}


def trace(suite: Suite) -> Any:
    """Where the device's time goes in three gradient steps of the largest model: the 40 longest operations by name."""
    import jax

    name, model = list(models(suite.small).items())[-1]
    call, _ = gradient_of(model, batch_of(suite, 1 if suite.small else 16))
    call()
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(3):
                call()
        (path,) = Path(folder).rglob("*.xplane.pb")
        planes = list(jax.profiler.ProfileData.from_file(str(path)).planes)
        device = [plane for plane in planes if plane.name.startswith("/device:")] or planes
        spent: Counter[str] = Counter()
        for plane in device:
            for line in plane.lines:
                for event in line.events:
                    spent[event.name[:120]] += event.duration_ns / 1e6
    longest = dict(spent.most_common(40))
    for operation, milliseconds in list(longest.items())[:10]:
        print(f"{milliseconds:10.2f} ms  {operation}")
    return {"model": name, "steps": 3, "milliseconds": longest}


def train(suite: Suite) -> Any:
    """A real training run of a shipped config; its scalars come back whole, thinned to 200 lines."""
    run = ROOT / "runs" / f"gpu-{Path(suite.config).stem}"
    command = [sys.executable, str(ROOT / "train.py"), "--config", suite.config, "--run", str(run)]
    if suite.small:
        return {"command": command[1:], "skipped": "--small"}
    begin = time.perf_counter()
    done = subprocess.run(command, cwd=ROOT, check=False)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {
        "command": command[1:],
        "exit code": done.returncode,
        "seconds": time.perf_counter() - begin,
        "metrics": lines[:: max(1, len(lines) // 200)],
    }
