"""The parts of the GPU suite that time one operation: the recurrence, a layer, the loss; and whether each is right."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import side_by_side
from gpu_suite import FORMS, LOSSES, PEAK_BYTES, Suite, clock, compiled, torch_cuda, waiting

if TYPE_CHECKING:
    from jaxds2.ctc import Implementation as Loss
    from jaxds2.model.scan import Implementation


def forms(suite: Suite) -> Any:
    """Is every form of the recurrence and of CTC right on this device? Largest relative errors against float64."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from bench_mingru import float64_cell
    from ctc_float64 import float64_loss_and_gradient

    from jaxds2.ctc import ctc_loss
    from jaxds2.model.scan import mingru_recurrence

    kernel = probe_kernel(suite)

    rng = np.random.default_rng(0)
    shape = (33, 2, 8) if suite.small else (4096, 4, 256)
    gate, v, dh = (rng.standard_normal(shape, np.float32) for _ in range(3))
    exact = float64_cell(gate, v, dh)
    table: dict[str, dict[str, float | str]] = {}
    for form in FORMS:

        def both(gate, v, dh, form: "Implementation" = form):
            h, pull = jax.vjp(lambda g, v: mingru_recurrence(g, v, candidate_fn="g", implementation=form)[0], gate, v)
            return h, *pull(dh)

        got = jax.jit(both)(*map(jnp.asarray, (gate, v, dh)))
        table[form] = {
            what: float(np.abs(np.asarray(value) - want).max() / np.abs(want).max())
            for what, value, want in zip(("h", "dgate", "dcandidate"), got, exact, strict=True)
        }
    print(side_by_side.table(f"minGRU against float64, {shape}", table))

    rows, frames, labels, classes = (2, 20, 4, 5) if suite.small else (4, 800, 200, 29)
    logits = rng.standard_normal((rows, frames, classes), np.float32)
    labels_BN = rng.integers(1, classes, (rows, labels)).astype(np.int32)
    lengths = jnp.full((rows,), frames), jnp.asarray(labels_BN), jnp.full((rows,), labels)
    wanted = np.stack([float64_loss_and_gradient(logits[b], labels_BN[b])[1] for b in range(rows)])
    losses: dict[str, dict[str, float | str]] = {}
    for form in LOSSES:

        def total(logits, form: "Loss" = form):
            return jnp.sum(ctc_loss(logits, *lengths, implementation=form))

        losses[form] = {"gradient error": float(np.abs(jax.jit(jax.grad(total))(jnp.asarray(logits)) - wanted).max())}
    print(side_by_side.table("CTC against float64", losses))
    return {"kernel": kernel, "mingru": table, "ctc": losses}


def probe_kernel(suite: Suite) -> dict[str, Any]:
    """Does the fused kernel work here, how exact is it, and does a split over all devices gather anything?"""
    import jax
    import jax.numpy as jnp
    from jax.sharding import NamedSharding, PartitionSpec, use_abstract_mesh

    from jaxds2.data.placement import data_mesh
    from jaxds2.model import mosaic
    from jaxds2.model.scan import mingru_recurrence

    found: dict[str, Any] = {"missing": mosaic.missing()}
    if found["missing"] is None:
        shapes = ((1, 2, 128), (19, 3, 256), (4096, 4, 256))
        found["errors"] = {str(shape): mosaic.probe(*shape) for shape in shapes}
    mesh = data_mesh(None, rows_multiple=jax.local_device_count())
    shape = (16, 2 * mesh.size, mosaic.CHANNELS) if suite.small else (512, 8 * mesh.size, 512)
    x = jax.device_put(jnp.ones(shape), NamedSharding(mesh, PartitionSpec(None, "data")))

    def total(gate, v):
        return jnp.sum(mingru_recurrence(gate, v, implementation="fused")[0] ** 2)

    with use_abstract_mesh(mesh.abstract_mesh):
        program = str(jax.jit(jax.grad(total, (0, 1))).lower(x, x).compile().as_text())
    found |= {"devices": mesh.size, "kernels": program.count("mosaic_gpu"), "all-gathers": program.count("all-gather(")}
    print(found, flush=True)
    return found


def recurrence(suite: Suite) -> Any:
    """The recurrence against the time that its bytes need, and a layer against cuDNN, over lengths 512 to 4096."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from jaxds2.model.scan import mingru_recurrence

    results = []
    rows, width = (2, 8) if suite.small else (64, 512)
    for frames in (16,) if suite.small else (512, 1024, 2048, 4096):
        rng = np.random.default_rng(0)
        gate, v, dh = (jnp.asarray(rng.standard_normal((frames, rows, width), np.float32)) for _ in range(3))
        columns, memory = {}, {}
        for form in FORMS:

            def both(gate, v, dh, form: "Implementation" = form):
                h, pull = jax.vjp(lambda gate, v: mingru_recurrence(gate, v, implementation=form)[0], gate, v)
                return h, pull(dh)

            columns[form], memory[form] = compiled(both, gate, v, dh)
        table: dict[str, dict[str, float | str]] = {
            name: {**row, "temporaries, arrays": memory[name] / gate.nbytes}
            for name, row in clock(columns, suite.rounds).items()
        }
        if (bandwidth := suite.peak(PEAK_BYTES)) is not None:
            floor = 1e3 * 9 * gate.nbytes / bandwidth  # gate, v, h; then gate, v, h, dh, dgate, dv
            for row in table.values():
                row["times the bytes' time"] = float(row["wall ms"]) / floor
        title = f"minGRU recurrence, forward + backward, B={rows} T={frames} D={width}, float32"
        print(side_by_side.table(title, table, base="associative", by="wall ms"))
        results.append({"what": "recurrence", "shape": [rows, frames, width], "columns": table})
        results.append(layer(suite, frames, rows, width))
    return results


def layer(suite: Suite, frames: int, rows: int, width: int) -> dict[str, Any]:
    """One direction of width D, forward and backward, in bfloat16 with a float32 recurrence; torch's in bfloat16."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from jaxds2.model.mingru import MinGRU

    x = jax.random.normal(jax.random.key(0), (frames, rows, width), jnp.bfloat16)
    lengths_B = jnp.full((rows,), frames, jnp.int32)
    columns = {}
    for form in FORMS[:2]:
        module = MinGRU(
            width, width, candidate="linear", gate_bias=0.0, implementation=form, dtype=jnp.bfloat16, rngs=nnx.Rngs(0)
        )
        graphdef, params = nnx.split(module)

        def both(params, x, graphdef=graphdef):
            h, pull = jax.vjp(lambda params, x: nnx.merge(graphdef, params)(x, lengths_B)[0], params, x)
            return h, pull(h)

        columns[form], _ = compiled(both, params, x)
    columns |= torch_layers(frames, rows, width)
    table = clock(columns, suite.rounds)
    title = f"layer, forward + backward, B={rows} T={frames} D={width}, bfloat16"
    print(side_by_side.table(title, table, base="associative", by="wall ms"))
    return {"what": "layer", "shape": [rows, frames, width], "columns": table}


def torch_layers(frames: int, rows: int, width: int) -> dict[str, Callable[[], Any]]:
    """cuDNN's GRU and LSTM."""
    if (found := torch_cuda()) is None:
        return {}
    torch, device = found
    x = torch.randn(frames, rows, width, device=device, dtype=torch.bfloat16)
    columns = {}
    for name, kind in (("torch-GRU", torch.nn.GRU), ("torch-LSTM", torch.nn.LSTM)):
        module = kind(width, width).to(device, torch.bfloat16)

        def step(module=module):
            inputs = x.detach().requires_grad_()
            h = module(inputs)[0]
            return torch.autograd.grad(h, [inputs, *module.parameters()], h.detach())

        columns[name] = waiting(torch, device, step)
    return columns


def ctc(suite: Suite) -> Any:
    """CTC loss and gradient: ours, optax's, torch's."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from jaxds2.ctc import ctc_loss

    results = []
    shapes = ((2, 20, 4, 5),) if suite.small else ((64, 400, 200, 29), (16, 800, 200, 29), (32, 1600, 300, 1024))
    for rows, frames, labels, classes in shapes:
        rng = np.random.default_rng(0)
        logits = rng.standard_normal((rows, frames, classes), np.float32)
        labels_BN = rng.integers(1, classes, (rows, labels)).astype(np.int32)
        lengths = jnp.full((rows,), frames), jnp.asarray(labels_BN), jnp.full((rows,), labels)
        columns, memory = {}, {}
        for form in LOSSES:

            def total(logits, form: "Loss" = form, lengths=lengths):
                return jnp.sum(ctc_loss(logits, *lengths, implementation=form))

            columns[form], memory[form] = compiled(jax.value_and_grad(total), jnp.asarray(logits))
        if (found := torch_cuda()) is not None:
            torch, device = found
            columns["torch"] = torch_ctc(torch, device, logits, labels_BN)
        table: dict[str, dict[str, float | str]] = {
            name: {**row, "temporaries, MiB": memory[name] / 2**20 if name in memory else ""}
            for name, row in clock(columns, suite.rounds).items()
        }
        title = f"CTC loss and gradient, B={rows} U={frames} N={labels} V={classes}, float32"
        print(side_by_side.table(title, table, base="optax", by="wall ms"))
        results.append({"shape": [rows, frames, labels, classes], "columns": table})
    return results


def torch_ctc(torch: Any, device: str, logits_BUV: Any, labels_BN: Any) -> Callable[[], Any]:
    """torch's loss and gradient."""
    logits = torch.from_numpy(logits_BUV).to(device)
    labels = torch.from_numpy(labels_BN).to(device)
    frames = torch.full((len(logits),), logits.shape[1])
    counts = torch.full((len(logits),), labels.shape[1])

    def step():
        x = logits.detach().requires_grad_()
        log_probs = torch.log_softmax(x, -1).transpose(0, 1)
        torch.nn.functional.ctc_loss(log_probs, labels, frames, counts, reduction="sum").backward()
        return x.grad

    return waiting(torch, device, step)
