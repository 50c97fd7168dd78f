"""A whole training step of Deep Speech 2, from features to updated weights, beside the same layer plan in torch.

Strided convolution, four more, three bidirectional layers of 512, CTC, AdamW. The four stand, in every column, for the
two residual blocks of two convolutions each that the usual PyTorch Deep Speech 2 has: our front end adds no residuals
and has no norms there, so torch's has none either, and all columns do the same matmuls and convolutions. A second table
shows that a frame costs the same in a short and in a long utterance.

python benchmarks/bench_step.py
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import side_by_side

if TYPE_CHECKING:
    from jaxds2.config import ModelConfig
    from jaxds2.model import scan

MELS, CLASSES, FRAMES_PER_SECOND = 80, 29, 100


@dataclass(frozen=True)
class Plan:
    """The layer plan and the batch that all columns share."""

    rows: int = 16
    seconds: int = 16
    channels: int = 32
    convs: int = 5
    width: int = 512
    hidden: int = 512
    layers: int = 3

    @property
    def labels(self) -> int:
        """Characters of an utterance, at 12 a second."""
        return 12 * self.seconds

    @property
    def title(self) -> str:
        """What a table says of it."""
        return (
            f"{self.rows} utterances of {self.seconds} s; {self.convs} convolutions of {self.channels}, none residual; "
            f"{self.layers} bidirectional layers of {self.hidden}"
        )

    def model(self, form: "scan.Implementation") -> "ModelConfig":
        """Our config of this plan."""
        from jaxds2.config import ModelConfig

        return ModelConfig(
            conv_channels=(self.channels,) * self.convs,
            conv_kernels=((3, 3),) * self.convs,
            conv_strides=((2, 2), *((1, 1),) * (self.convs - 1)),
            width=self.width,
            hidden=self.hidden,
            layers=self.layers,
            candidate="g",
            depthwise_kernel=0,
            dropout=0.0,
            scan=form,
        )


SMALL = Plan(rows=2, seconds=1, channels=2, convs=2, width=8, hidden=8, layers=1)


def main() -> None:
    """Print the tables and write them all."""
    arguments = side_by_side.start("A training step, side by side.", threads=2)
    plan = SMALL if arguments.small else Plan()
    results = []
    for measure in (compare, lengths):
        results.append(measure(plan, arguments))
        side_by_side.save("step", arguments, results)


def batch_of(plan: Plan) -> tuple[Any, Any]:
    """Random features_BTF and labels_BN; every row has full length."""
    import numpy as np

    rng = np.random.default_rng(0)
    features_BTF = rng.standard_normal((plan.rows, plan.seconds * FRAMES_PER_SECOND, MELS), np.float32)
    return features_BTF, rng.integers(1, CLASSES, (plan.rows, plan.labels)).astype(np.int32)


def compare(plan: Plan, arguments: argparse.Namespace) -> dict[str, Any]:
    """Time a step of every column."""
    columns: dict[str, Callable[[], Any]] = {form: our_step(plan, form) for form in ("fused", "associative")}
    columns |= torch_steps(plan, arguments.threads)
    table = side_by_side.rounds(columns, arguments.rounds)
    title = f"training step, {plan.title}; float32, threads: {arguments.threads}"
    print(side_by_side.table(title, table, base="fused", by="wall ms"))
    bars = side_by_side.ratio_bar(table, "torch-log-space", "fused", by="wall ms", at_least=1.8)
    bars += side_by_side.ratio_bar(table, "torch-BiLSTM", "fused", by="wall ms", at_least=1.6)
    return {"what": "step", "plan": vars(plan), "columns": table, "bars": bars}


def our_step(plan: Plan, form: "scan.Implementation") -> Callable[[], Any]:
    """Our model, optax's AdamW, our CTC, compiled as one program; every call goes on from the last one's weights."""
    import jax
    import jax.numpy as jnp
    import optax

    from jaxds2.ctc import ctc_loss
    from jaxds2.model.deepspeech2 import create

    apply, params = create(MELS, CLASSES, plan.model(form), dtype=jnp.float32)
    optimizer = optax.adamw(1e-3)
    features_BTF, labels_BN = map(jnp.asarray, batch_of(plan))
    frames_B = jnp.full((plan.rows,), features_BTF.shape[1], jnp.int32)
    labels_B = jnp.full((plan.rows,), plan.labels, jnp.int32)

    batch = features_BTF, frames_B, labels_BN, labels_B

    def loss(params, features_BTF, frames_B, labels_BN, labels_B):
        logits_BUV, lengths_B = apply(params, features_BTF, frames_B)
        return jnp.mean(ctc_loss(logits_BUV, lengths_B, labels_BN, labels_B, implementation="fused"))

    def step(params, state, *batch):
        value, grads = jax.value_and_grad(loss)(params, *batch)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    state = [params, optimizer.init(params)]
    compiled = side_by_side.jit(step, donate_argnums=(0, 1)).lower(*state, *batch).compile()

    def call():
        state[0], state[1], value = compiled(*state, *batch)
        return jax.block_until_ready(value)

    return call


def torch_steps(plan: Plan, threads: int) -> dict[str, Callable[[], Any]]:
    """The same plan in torch, with minGRU in two forms and with nn.LSTM; empty where torch is missing."""
    torch = side_by_side.torch_or_none(threads)
    if torch is None:
        return {}
    from torch_peers import linear_space_mingru, log_space_mingru

    features_BTF, labels_BN = map(torch.from_numpy, batch_of(plan))
    labels_B = torch.full((plan.rows,), plan.labels)

    def column(cell):
        model = torch_model(plan, cell)
        optimizer = torch.optim.AdamW(model.parameters(), 1e-3)

        def step():
            optimizer.zero_grad()
            log_probs_UBV = model(features_BTF)
            lengths_B = torch.full((plan.rows,), len(log_probs_UBV))
            loss = torch.nn.functional.ctc_loss(log_probs_UBV, labels_BN, lengths_B, labels_B)
            loss.backward()
            optimizer.step()
            return loss.item()

        return step

    cells = {"torch-log-space": log_space_mingru, "torch-linear": linear_space_mingru, "torch-BiLSTM": None}
    return {name: column(cell) for name, cell in cells.items()}


def torch_model(plan: Plan, cell) -> Any:
    """The plan as a torch module."""
    from torch_peers import DeepSpeech2

    sizes = {"channels": plan.channels, "convs": plan.convs, "width": plan.width}
    return DeepSpeech2(MELS, CLASSES, **sizes, hidden=plan.hidden, layers=plan.layers, cell=cell)


def lengths(plan: Plan, arguments: argparse.Namespace) -> dict[str, Any]:
    """The same seconds of audio as few long or many short utterances: encoder forward and backward, and whole step."""
    from dataclasses import replace

    total = plan.rows * plan.seconds
    plans = {
        f"fused-{seconds}s": replace(plan, rows=total // seconds, seconds=seconds)
        for seconds in ((1, 2) if plan is SMALL else (2, 4, 8, 16, 32))
    }
    encoders = side_by_side.rounds({name: our_encoder(p) for name, p in plans.items()}, arguments.rounds)
    steps = side_by_side.rounds({name: our_step(p, "fused") for name, p in plans.items()}, arguments.rounds)
    table = {name: encoders[name] | {"whole step, wall ms": steps[name]["wall ms"]} for name in plans}
    title = f"encoder, {total} s of audio as utterances of a length, float32, threads: {arguments.threads}"
    print(side_by_side.table(title, table, base=next(iter(plans)), by="wall ms"))
    times = [row["wall ms"] for row in encoders.values()]
    bars = [side_by_side.bar("encoder, slowest over fastest length", max(times) / min(times), at_most=1.1)]
    return {"what": "lengths", "plan": vars(plan), "columns": table, "bars": bars}


def our_encoder(plan: Plan) -> Callable[[], Any]:
    """Front end and layers, forward and backward, without the loss."""
    import jax
    import jax.numpy as jnp

    from jaxds2.model.deepspeech2 import create

    apply, params = create(MELS, CLASSES, plan.model("fused"), dtype=jnp.float32)
    features_BTF = jnp.asarray(batch_of(plan)[0])
    frames_B = jnp.full((plan.rows,), features_BTF.shape[1], jnp.int32)

    def total(params, features_BTF, frames_B):
        return jnp.sum(jnp.square(apply(params, features_BTF, frames_B)[0]))

    inputs = params, features_BTF, frames_B
    gradient = side_by_side.jit(jax.grad(total)).lower(*inputs).compile()
    return lambda: jax.block_until_ready(gradient(*inputs))


if __name__ == "__main__":
    main()
