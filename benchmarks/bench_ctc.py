"""CTC loss and gradient: ours, optax's and torch's, side by side; and how far each gradient is from float64.

python benchmarks/bench_ctc.py
"""

import argparse
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import side_by_side

if TYPE_CHECKING:
    from jaxds2 import ctc

SHAPES = ((16, 800, 200, 29), (8, 1600, 300, 1024))
"""(rows B, frames U, labels N, classes V)."""
SMALL = ((2, 20, 4, 5),)


def main() -> None:
    """Print a table for each shape and write them all."""
    arguments = side_by_side.start("CTC loss and gradient, side by side.")
    results = [compare(*shape, arguments) for shape in (SMALL if arguments.small else SHAPES)]
    side_by_side.save("ctc", arguments, results)


def compare(rows: int, frames: int, labels: int, classes: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Time all columns on one shape; every row has full length."""
    import numpy as np
    from ctc_float64 import float64_loss_and_gradient

    rng = np.random.default_rng(0)
    logits_BUV = rng.standard_normal((rows, frames, classes), np.float32)
    labels_BN = rng.integers(1, classes, (rows, labels)).astype(np.int32)
    lengths = np.full(rows, frames, np.int32), labels_BN, np.full(rows, labels, np.int32)
    ours = {form: compile_form(form, logits_BUV, lengths) for form in ("fused", "optax")}
    columns = {form: call for form, (call, _) in ours.items()}
    memory = {form: mebibytes for form, (_, mebibytes) in ours.items()}
    columns |= torch_column(logits_BUV, lengths, arguments.threads)
    exact = np.stack([float64_loss_and_gradient(logits_BUV[b], labels_BN[b])[1] for b in range(rows)])
    medians = side_by_side.rounds(columns, arguments.rounds)
    table = {
        name: medians[name]
        | {
            "temporaries, MiB": memory.get(name, ""),
            "gradient error": float(np.abs(np.asarray(call()) - exact).max()),
        }
        for name, call in columns.items()
    }
    title = f"CTC loss and gradient, B={rows} U={frames} N={labels} V={classes}, float32, threads: {arguments.threads}"
    print(side_by_side.table(title, table, base="fused"))
    bars = side_by_side.ratio_bar(table, "torch", "fused", at_least=1.5)
    bars += side_by_side.ratio_bar(table, "optax", "fused", at_least=1.2)
    share = memory["fused"] / memory["optax"]
    bars += [
        side_by_side.bar("temporaries, fused over optax", share, at_most=0.65),
        side_by_side.bar("gradient error, fused", float(table["fused"]["gradient error"]), at_most=3e-5),
    ]
    return {"shape": [rows, frames, labels, classes], "columns": table, "bars": bars}


def compile_form(form: "ctc.Implementation", logits_BUV, lengths) -> tuple[Callable[[], Any], float]:
    """A call that gives the gradient, and its temporary memory in MiB."""
    import jax
    import jax.numpy as jnp

    from jaxds2.ctc import ctc_loss

    def total(logits_BUV, *lengths):
        return jnp.sum(ctc_loss(logits_BUV, *lengths, implementation=form))

    inputs = [jnp.asarray(x) for x in (logits_BUV, *lengths)]
    step = side_by_side.jit(jax.value_and_grad(total)).lower(*inputs).compile()
    return lambda: jax.block_until_ready(step(*inputs))[1], side_by_side.temporaries(step) / 2**20


def torch_column(logits_BUV, lengths, threads: int) -> dict[str, Callable[[], Any]]:
    """torch's own loss on the CPU; empty where torch is missing."""
    torch = side_by_side.torch_or_none(threads)
    if torch is None:
        return {}
    logits = torch.from_numpy(logits_BUV)
    frames, labels, counts = (torch.from_numpy(x.astype("int64")) for x in lengths)

    def step():
        x = logits.detach().requires_grad_()
        log_probs = torch.log_softmax(x, -1).transpose(0, 1)
        torch.nn.functional.ctc_loss(log_probs, labels, frames, counts, reduction="sum").backward()
        return x.grad.numpy()

    return {"torch": step}


if __name__ == "__main__":
    main()
