"""Features to log-probabilities with the plan of bench_step.py, beside the same plan in torch.

python benchmarks/bench_inference.py
"""

import argparse
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import side_by_side
from bench_step import CLASSES, MELS, SMALL, Plan, batch_of, torch_model

if TYPE_CHECKING:
    from jaxds2.model import scan


def main() -> None:
    """Print the table and write it."""
    arguments = side_by_side.start("Inference, side by side.", threads=2)
    plan = SMALL if arguments.small else Plan()
    side_by_side.save("inference", arguments, [compare(plan, arguments)])


def compare(plan: Plan, arguments: argparse.Namespace) -> dict[str, Any]:
    """Time every column."""
    columns: dict[str, Callable[[], Any]] = {form: ours(plan, form) for form in ("fused", "associative")}
    columns |= torch_columns(plan, arguments.threads)
    medians = side_by_side.rounds(columns, arguments.rounds)
    seconds = plan.rows * plan.seconds
    table = {name: ms | {"times real time": 1e3 * seconds / ms["wall ms"]} for name, ms in medians.items()}
    title = f"inference, {plan.title}; float32, threads: {arguments.threads}"
    print(side_by_side.table(title, table, base="fused", by="wall ms"))
    bars = side_by_side.ratio_bar(table, "torch-log-space", "fused", by="wall ms", at_least=2.2)
    bars += side_by_side.ratio_bar(table, "torch-BiLSTM", "fused", by="wall ms", at_least=1.9)
    return {"what": "inference", "plan": vars(plan), "columns": table, "bars": bars}


def ours(plan: Plan, form: "scan.Implementation") -> Callable[[], Any]:
    """Our model."""
    import jax
    import jax.numpy as jnp

    from jaxds2.model.deepspeech2 import create

    apply, params = create(MELS, CLASSES, plan.model(form), dtype=jnp.float32)
    features_BTF = jnp.asarray(batch_of(plan)[0])
    frames_B = jnp.full((plan.rows,), features_BTF.shape[1], jnp.int32)

    def log_probs(params, features_BTF, frames_B):
        return jax.nn.log_softmax(apply(params, features_BTF, frames_B)[0])

    inputs = params, features_BTF, frames_B
    compiled = side_by_side.jit(log_probs).lower(*inputs).compile()
    return lambda: jax.block_until_ready(compiled(*inputs))


def torch_columns(plan: Plan, threads: int) -> dict[str, Callable[[], Any]]:
    """The same plan in torch, without gradients; empty where torch is missing."""
    torch = side_by_side.torch_or_none(threads)
    if torch is None:
        return {}
    from torch_peers import linear_space_mingru, log_space_mingru

    features_BTF = torch.from_numpy(batch_of(plan)[0])

    def column(cell):
        model = torch_model(plan, cell).eval()

        def call():
            with torch.inference_mode():
                return model(features_BTF)

        return call

    cells = {"torch-log-space": log_space_mingru, "torch-linear": linear_space_mingru, "torch-BiLSTM": None}
    return {name: column(cell) for name, cell in cells.items()}


if __name__ == "__main__":
    main()
