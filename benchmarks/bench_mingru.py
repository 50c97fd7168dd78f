"""The minGRU cell and a layer with its matmuls, beside torch's minGRU, nn.GRU and nn.LSTM: forward and backward.

Then the cells' errors against float64 on long inputs and with extreme gates.

python benchmarks/bench_mingru.py
"""

import argparse
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import side_by_side

if TYPE_CHECKING:
    from jaxds2.model import scan

SHAPES = ((16, 800, 512), (4, 3000, 512))
"""(rows B, frames T, channels D)."""
SMALL = ((2, 9, 8),)
FORMS = ("fused", "sequential", "associative")


def main() -> None:
    """Print the tables and write them all."""
    arguments = side_by_side.start("The minGRU cell and layer, side by side.")
    results = []
    for shape in SMALL if arguments.small else SHAPES:
        results.append(compare_cells(*shape, arguments))
        results.append(compare_layers(*shape, arguments))
    results += errors(300 if arguments.small else 20_000, arguments.threads)
    side_by_side.save("mingru", arguments, results)


def compare_cells(rows: int, frames: int, channels: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Time the cell, gates included and matmuls not, with candidate g, which the log-space form needs."""
    import numpy as np

    rng = np.random.default_rng(0)
    gate_TBD, v_TBD, dh_TBD = (rng.standard_normal((frames, rows, channels), np.float32) for _ in range(3))
    ours = {form: compile_cell(form, gate_TBD, v_TBD, dh_TBD) for form in FORMS}
    columns = {form: call for form, (call, _) in ours.items()} | torch_cells(gate_TBD, v_TBD, dh_TBD, arguments.threads)
    exact = float64_cell(gate_TBD, v_TBD, dh_TBD)
    medians = side_by_side.rounds(columns, arguments.rounds)
    table: dict[str, dict[str, float | str]] = {}
    for name, call in columns.items():
        memory = ours[name][1] / gate_TBD.nbytes if name in ours else ""
        table[name] = medians[name] | {"temporaries, arrays": memory}
        table[name] |= cell_errors(call(), exact)
    title = f"minGRU cell, forward + backward, B={rows} T={frames} D={channels}, float32, threads: {arguments.threads}"
    print(side_by_side.table(title, table, base="fused"))
    bars = side_by_side.ratio_bar(table, "torch-log-space", "fused", at_least=15)
    return {"what": "cell", "shape": [rows, frames, channels], "columns": table, "bars": bars}


def compile_cell(form: "scan.Implementation", *arrays) -> tuple[Callable[[], Any], int]:
    """A call that gives the states and both gradients, and the bytes of its temporaries."""
    import jax
    import jax.numpy as jnp

    from jaxds2.model.scan import mingru_recurrence

    def both(gate_TBD, v_TBD, dh_TBD):
        def cell(gate_TBD, v_TBD):
            return mingru_recurrence(gate_TBD, v_TBD, candidate_fn="g", implementation=form)[0]

        h_TBD, pull = jax.vjp(cell, gate_TBD, v_TBD)
        return h_TBD, *pull(dh_TBD)

    inputs = [jnp.asarray(x) for x in arrays]
    step = side_by_side.jit(both).lower(*inputs).compile()
    return lambda: jax.block_until_ready(step(*inputs)), side_by_side.temporaries(step)


def torch_cells(gate_TBD, v_TBD, dh_TBD, threads: int) -> dict[str, Callable[[], Any]]:
    """torch's forms of the same cell; empty where torch is missing."""
    torch = side_by_side.torch_or_none(threads)
    if torch is None:
        return {}
    from torch_peers import linear_space_mingru, log_space_mingru

    gate, v, dh = (torch.from_numpy(x) for x in (gate_TBD, v_TBD, dh_TBD))

    def column(cell):
        def step():
            inputs = [x.detach().requires_grad_() for x in (gate, v)]
            h = cell(*inputs)
            h.backward(dh)
            return [x.numpy() for x in (h.detach(), *(x.grad for x in inputs))]

        return step

    return {"torch-log-space": column(log_space_mingru), "torch-linear": column(linear_space_mingru)}


def cell_errors(got, exact) -> dict[str, float | str]:
    """How far states and gradients are from float64's."""
    return dict(zip(("h", "dgate", "dcandidate"), map(side_by_side.error, got, exact), strict=True))


def errors(longest: int, threads: int) -> list[dict[str, Any]]:
    """Of every cell on one long row: with ordinary gates, and with gates that are open or shut."""
    import numpy as np

    results = []
    for name, spread in (("ordinary gates", 1.0), ("extreme gates", 20.0)):
        rng = np.random.default_rng(1)
        gate_TBD, v_TBD, dh_TBD = (rng.standard_normal((longest, 1, 64), np.float32) for _ in range(3))
        inputs = np.float32(spread) * gate_TBD, v_TBD, dh_TBD
        columns = {form: compile_cell(form, *inputs)[0] for form in FORMS} | torch_cells(*inputs, threads)
        exact = float64_cell(*inputs)
        table = {column: cell_errors(call(), exact) for column, call in columns.items()}
        print(side_by_side.table(f"minGRU cell, error against float64, {name}, T={longest}", table))
        results.append({"errors": name, "frames": longest, "columns": table})
    return results


def float64_cell(gate_TBD, v_TBD, dh_TBD) -> tuple[Any, Any, Any]:
    """States and gradients in float64, step by step."""
    import numpy as np

    gate, v, dh = (x.astype(np.float64) for x in (gate_TBD, v_TBD, dh_TBD))
    z, s = 1 / (1 + np.exp(-gate)), 1 / (1 + np.exp(-v))
    g, slope = np.where(v >= 0, v + 0.5, s), np.where(v >= 0, 1.0, s * (1 - s))
    before, h, total = np.zeros_like(z), np.zeros_like(z), np.zeros_like(z)
    state = np.zeros_like(z[0])
    for t in range(len(z)):
        before[t] = state
        state = h[t] = (1 - z[t]) * state + z[t] * g[t]
    state = np.zeros_like(state)
    for t in reversed(range(len(z))):
        total[t] = dh[t] + state
        state = (1 - z[t]) * total[t]
    return h, total * (g - before) * z * (1 - z), total * z * slope


def compare_layers(rows: int, frames: int, width: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Time one layer of equal width in and out, one direction: outputs, and gradients of its input and weights."""
    import numpy as np

    rng = np.random.default_rng(0)
    x_TBD, dh_TBD = (rng.standard_normal((frames, rows, width), np.float32) for _ in range(2))
    columns: dict[str, Callable[[], Any]] = {form: compile_layer(form, x_TBD, dh_TBD) for form in FORMS}
    columns |= torch_layers(x_TBD, dh_TBD, arguments.threads)
    table = side_by_side.rounds(columns, arguments.rounds)
    title = f"layer, forward + backward, B={rows} T={frames} D={width}, float32, threads: {arguments.threads}"
    print(side_by_side.table(title, table, base="fused"))
    bars = side_by_side.ratio_bar(table, "torch-GRU", "fused", at_least=4)
    bars += side_by_side.ratio_bar(table, "torch-LSTM", "fused", at_least=2)
    return {"what": "layer", "shape": [rows, frames, width], "columns": table, "bars": bars}


def compile_layer(form: "scan.Implementation", x_TBD, dh_TBD) -> Callable[[], Any]:
    """Our MinGRU layer."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from jaxds2.model.mingru import MinGRU

    frames, rows, width = x_TBD.shape
    layer = MinGRU(
        width,
        width,
        candidate="linear",
        gate_bias=0.0,
        implementation=form,
        dtype=jnp.float32,
        rngs=nnx.Rngs(params=0),
    )
    graphdef, params = nnx.split(layer)
    lengths_B = jnp.full((rows,), frames, jnp.int32)

    def both(params, x_TBD, lengths_B, dh_TBD):
        h_TBD, pull = jax.vjp(lambda params, x_TBD: nnx.merge(graphdef, params)(x_TBD, lengths_B)[0], params, x_TBD)
        return h_TBD, pull(dh_TBD)

    inputs = params, jnp.asarray(x_TBD), lengths_B, jnp.asarray(dh_TBD)
    step = side_by_side.jit(both).lower(*inputs).compile()
    return lambda: jax.block_until_ready(step(*inputs))


def torch_layers(x_TBD, dh_TBD, threads: int) -> dict[str, Callable[[], Any]]:
    """torch's minGRU in log and linear space with two linear maps, nn.GRU and nn.LSTM; empty where torch is missing."""
    torch = side_by_side.torch_or_none(threads)
    if torch is None:
        return {}
    from torch_peers import linear_space_mingru, log_space_mingru

    width = x_TBD.shape[-1]
    x, dh = torch.from_numpy(x_TBD), torch.from_numpy(dh_TBD)
    gate, candidate = torch.nn.Linear(width, width), torch.nn.Linear(width, width)
    gru, lstm = torch.nn.GRU(width, width), torch.nn.LSTM(width, width)

    def column(layer, *modules):
        parameters = [p for module in modules for p in module.parameters()]

        def step():
            inputs = x.detach().requires_grad_()
            return torch.autograd.grad(layer(inputs), [inputs, *parameters], dh)

        return step

    return {
        "torch-log-space": column(lambda x: log_space_mingru(gate(x), candidate(x)), gate, candidate),
        "torch-linear": column(lambda x: linear_space_mingru(gate(x), candidate(x)), gate, candidate),
        "torch-GRU": column(lambda x: gru(x)[0], gru),
        "torch-LSTM": column(lambda x: lstm(x)[0], lstm),
    }


if __name__ == "__main__":
    main()
