"""The parts of the GPU suite that run one operation: the kernel, the recurrence, a layer, the loss."""

import re
import traceback
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import side_by_side
from gpu_suite import LOSSES, PEAK_BYTES, Block, Column, Suite, compiled, named, timed, torch_column, torch_columns

if TYPE_CHECKING:
    from jaxds2.ctc import Implementation as Loss
    from jaxds2.model.scan import Implementation


def kernel(suite: Suite) -> dict[str, Block]:
    """Does the fused kernel work here, and in every shape that later parts give it? Before any of them uses it."""
    return {
        "probe": partial(probe, suite),
        "program": partial(program, suite),
        **{
            f"{'x'.join(map(str, shape))}-{dtype}": partial(at_size, suite, shape, dtype)
            for shape, dtype in sizes(suite)
        },
    }


def sizes(suite: Suite) -> list[tuple[tuple[int, int, int], str]]:
    """(T, B, D) and dtype of recurrences, layers and steps: the smallest, the longest, the widest."""
    if suite.small:
        return [((33, 2, 8), "float32")]
    return [((512, 64, 512), "float32"), ((4096, 64, 512), "bfloat16"), ((800, 100, 1024), "bfloat16")]


def kernel_fault(blocks: Mapping[str, Any], untried: Sequence[str]) -> str | None:
    """Why the kernel is not to be used, by the blocks of its part and what that has not tried; None: it has passed."""
    for name, block in blocks.items():
        if "error" in block:
            return f"{name}: {block['error']}"
    if missing := blocks.get("probe", {}).get("missing"):
        return missing
    return f"not tried yet: {' '.join(untried)}" if untried else None


def probe(suite: Suite) -> dict[str, Any]:
    """What keeps the recurrence's kernel from being used here; its errors against float64."""
    from jaxds2.model.mingru_kernel import TOLERANCES, missing, probe

    found: dict[str, Any] = {"missing": missing()}
    if found["missing"] is None:
        shapes = ((1, 2, 128), (19, 3, 256), (1024, 4, 256))
        found["errors"] = {f"{dtype} {x}": probe(*x, dtype=dtype) for x in shapes for dtype in TOLERANCES}
    elif suite.platform != "cpu":  # the one line may not be enough to mend it
        try:
            probe()
            probe(dtype="bfloat16")
        except Exception:
            found["traceback"] = traceback.format_exc()[-4000:]
    print(found, flush=True)
    return found


def program(suite: Suite) -> dict[str, Any]:
    """What is in the compiled gradient of a layer's recurrence whose rows are split over all devices."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import NamedSharding, PartitionSpec, use_abstract_mesh

    from jaxds2.data.placement import data_mesh
    from jaxds2.model.mingru_kernel import CHANNELS

    mesh = data_mesh(None, rows_multiple=jax.local_device_count())
    shape = (16, 2 * mesh.size, 4 * CHANNELS) if suite.small else (512, 8 * mesh.size, 2048)
    x = jax.device_put(jnp.ones(shape), NamedSharding(mesh, PartitionSpec(None, "data")))

    def total(pre_TBE):
        return jnp.sum(both_ways(pre_TBE, "fused")[0] ** 2)

    with use_abstract_mesh(mesh.abstract_mesh):
        text = str(jax.jit(jax.grad(total)).lower(x).compile().as_text())
    found = {
        "devices": mesh.size,
        "kernels": kernels_in(text),
        # On one device there is nothing to gather, so none would say nothing.
        "all-gathers": text.count("all-gather(") if mesh.size > 1 else None,
    }
    print(found, flush=True)
    return found


def kernels_in(program: str) -> int:
    """How often a compiled program calls a Mosaic kernel."""
    return len(re.findall(r'custom_call_target="mosaic_gpu', program))


def both_ways(pre_TBE: Any, form: "Implementation", lengths_B: Any = None) -> tuple[Any, Any]:
    """States and last states of a layer's two directions, by default of whole rows, without biases."""
    import jax.numpy as jnp

    from jaxds2.model.scan import mingru_layer

    frames, rows, width = pre_TBE.shape
    lengths_B = jnp.full((rows,), frames) if lengths_B is None else lengths_B
    options: Any = {"candidate_fn": "linear", "reverses": (False, True), "implementation": form}
    return mingru_layer(pre_TBE, jnp.zeros((width,)), lengths_B, **options)


def at_size(suite: Suite, shape: tuple[int, int, int], dtype: str) -> dict[str, Any]:
    """Largest difference between the kernel and the associative form, of states and gradients, over their largest."""
    import jax
    import jax.numpy as jnp

    from jaxds2.model.mingru_kernel import missing

    if suite.platform != "cpu" and (why := missing()):
        return {"missing": why}
    frames, rows, width = shape
    pre_TBE = jax.random.normal(jax.random.key(0), (frames, rows, 4 * width), dtype)
    lengths_B = frames - jnp.arange(rows) * (frames // (2 * rows))

    def differences(pre_TBE):
        def relative(x, y):
            x, y = x.astype(jnp.float32), y.astype(jnp.float32)
            return jnp.max(jnp.abs(x - y)) / jnp.max(jnp.abs(y))

        def both(form: "Implementation"):
            states, pull = jax.vjp(lambda pre_TBE: both_ways(pre_TBE, form, lengths_B), pre_TBE)
            return states, pull(states)

        return jnp.max(jnp.stack(jax.tree.leaves(jax.tree.map(relative, both("fused"), both("associative")))))

    worst = float(jax.jit(differences)(pre_TBE))
    found: dict[str, Any] = {"difference": worst}
    if not worst < (1e-4 if dtype == "float32" else 0.05):  # NaN too
        found["error"] = f"the kernel differs from the associative form by {worst:.1e} of the largest value"
    print(found, flush=True)
    return found


def ctc_probe(suite: Suite) -> dict[str, Any]:
    """What keeps CTC's kernel from being used here; its errors against float64."""
    from jaxds2 import ctc_kernel

    found: dict[str, Any] = {"missing": ctc_kernel.missing()}
    if found["missing"] is None:
        shapes = ((1, 2, 1), (19, 2, 5), (400, 3, 200), (100, 2, 1000))
        found["errors"] = {str(shape): ctc_kernel.probe(*shape) for shape in shapes}
    elif suite.platform != "cpu":
        try:
            ctc_kernel.probe()
        except Exception:
            found["traceback"] = traceback.format_exc()[-4000:]
    print(found, flush=True)
    return found


def forms(suite: Suite) -> dict[str, Block]:
    """Is every form of the recurrence and of CTC right on this device? Largest errors against float64."""
    return {
        "ctc-probe": partial(ctc_probe, suite),
        "mingru": partial(mingru_errors, suite),
        "ctc": partial(ctc_errors, suite),
    }


def mingru_errors(suite: Suite) -> dict[str, Any]:
    """Of states and gradients, over the largest exact value."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from bench_mingru import float64_cell

    from jaxds2.model.scan import mingru_layer

    rng = np.random.default_rng(0)
    frames, rows, width = shape = (33, 2, 8) if suite.small else (4096, 4, 256)
    gate, v, dh = (rng.standard_normal(shape, np.float32) for _ in range(3))
    exact = float64_cell(gate, v, dh)
    table: dict[str, dict[str, float | str]] = {}
    for form in suite.forms(width, "associative", "fused", "sequential"):

        def both(pre_TBE, dh, form: "Implementation" = form):
            def states(pre_TBE):
                given = pre_TBE, jnp.zeros((2 * width,)), jnp.full((rows,), frames)
                return mingru_layer(*given, candidate_fn="g", reverses=(False,), implementation=form)[0]

            h, pull = jax.vjp(states, pre_TBE)
            return h, *jnp.split(pull(dh)[0], 2, axis=-1)

        got = jax.jit(both)(jnp.concatenate([gate, v], axis=-1), jnp.asarray(dh))
        table[form] = {
            what: side_by_side.error(value, want)
            for what, value, want in zip(("h", "dgate", "dcandidate"), got, exact, strict=True)
        }
    print(side_by_side.table(f"minGRU against float64, {shape}", table))
    require_right(table, 1e-4)
    return {"shape": shape, "errors": table}


def ctc_errors(suite: Suite) -> dict[str, Any]:
    """Of the gradient."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from ctc_float64 import float64_loss_and_gradient

    from jaxds2.ctc import ctc_loss

    rows, frames, labels, classes = (2, 20, 4, 5) if suite.small else (4, 800, 200, 29)
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((rows, frames, classes), np.float32)
    labels_BN = rng.integers(1, classes, (rows, labels)).astype(np.int32)
    lengths = jnp.full((rows,), frames), jnp.asarray(labels_BN), jnp.full((rows,), labels)
    wanted = np.stack([float64_loss_and_gradient(logits[b], labels_BN[b])[1] for b in range(rows)])
    losses: dict[str, dict[str, float | str]] = {}
    for form in LOSSES:

        def total(logits, form: "Loss" = form):
            return jnp.sum(ctc_loss(logits, *lengths, implementation=form))

        losses[form] = {"gradient error": side_by_side.error(jax.jit(jax.grad(total))(jnp.asarray(logits)), wanted)}
    print(side_by_side.table("CTC against float64", losses))
    require_right(losses, 0.02)
    return {"shape": (rows, frames, labels, classes), "errors": losses}


def require_right(errors: Mapping[str, Mapping[str, float | str]], bound: float) -> None:
    """Raises ArithmeticError: one of the errors is beyond the bound, or no number."""
    for form, of_form in errors.items():
        for what, value in of_form.items():
            if not (isinstance(value, float) and value <= bound):
                raise ArithmeticError(f"{form}: {what} is off by {value}, expected at most {bound:g}")


def recurrence(suite: Suite) -> dict[str, Block]:
    """The recurrence against the time that its bytes need, and a layer against cuDNN, over lengths 512 to 4096."""
    blocks: dict[str, Block] = {}
    for frames in (16,) if suite.small else (512, 2048, 1024, 4096):
        blocks[f"recurrence-{frames}"] = partial(bare, suite, frames)
        blocks[f"layer-{frames}"] = partial(layer, suite, frames)
    return blocks


def _rows_and_width(suite: Suite) -> tuple[int, int]:
    return (2, 8) if suite.small else (64, 512)


def bare(suite: Suite, frames: int) -> dict[str, Any]:
    """Both directions' recurrence alone, forward and backward, float32; no matmul, so no question of precision."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    rows, width = _rows_and_width(suite)
    rng = np.random.default_rng(0)
    pre, dh = (jnp.asarray(rng.standard_normal((frames, rows, k * width), np.float32)) for k in (4, 2))

    def column(form: "Implementation") -> Column:
        def both(pre, dh):
            h, pull = jax.vjp(lambda pre: both_ways(pre, form)[0], pre)
            return h, pull(dh)

        return compiled(both, pre, dh)

    title = f"minGRU recurrence, both ways, forward + backward, B={rows} T={frames} D={width}, float32"
    columns = named(suite.forms(width, "associative", "fused", "sequential"), column)
    found = timed(title, columns, suite, base="associative")
    if (bandwidth := suite.peak(PEAK_BYTES)) is not None:
        # gate, v, h; then gate, v, h, dh, dgate, dv
        found["bytes' time, ms"] = floor = 1e3 * 9 * dh.nbytes / bandwidth
        found["over bytes' time"] = {name: row["wall ms"] / floor for name, row in found["columns"].items()}
        print("times what the bytes need by the data sheet:", found["over bytes' time"])
    return found | {"shape": [rows, frames, width]}


def layer(suite: Suite, frames: int) -> dict[str, Any]:
    """One direction of width D, forward and backward, in bfloat16 with a float32 recurrence; torch's in bfloat16."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from jaxds2.model.mingru import MinGRU

    rows, width = _rows_and_width(suite)
    x = jax.random.normal(jax.random.key(0), (frames, rows, width), jnp.bfloat16)
    lengths_B = jnp.full((rows,), frames, jnp.int32)

    def column(form: "Implementation") -> Column:
        options: Any = {"candidate": "linear", "gate_bias": 0.0, "implementation": form}
        graphdef, params = nnx.split(MinGRU(width, width, **options, dtype=jnp.bfloat16, rngs=nnx.Rngs(0)))

        def both(params, x):
            h, pull = jax.vjp(lambda params, x: nnx.merge(graphdef, params)(x, lengths_B)[0], params, x)
            return h, pull(h)

        return compiled(both, params, x)

    title = f"layer, forward + backward, B={rows} T={frames} D={width}, bfloat16"
    columns = named(suite.forms(width, "associative", "fused"), column) | torch_layers(frames, rows, width)
    found = timed(title, columns, suite, base="associative")
    return found | {"shape": [rows, frames, width], "precision": "bfloat16; our weights and the recurrence float32"}


def torch_layers(frames: int, rows: int, width: int) -> dict[str, Callable[[], Column]]:
    """cuDNN's GRU and LSTM."""

    def column(torch: Any, device: str, name: str) -> Column:
        kind = {"torch-GRU": torch.nn.GRU, "torch-LSTM": torch.nn.LSTM}[name]
        x = torch.randn(frames, rows, width, device=device, dtype=torch.bfloat16)
        module = kind(width, width).to(device, torch.bfloat16)
        module.flatten_parameters()  # else it would put them together in every call

        def step():
            inputs = x.detach().requires_grad_()
            h = module(inputs)[0]
            return torch.autograd.grad(h, [inputs, *module.parameters()], h.detach())

        return torch_column(torch, device, step)

    return torch_columns(("torch-GRU", "torch-LSTM"), column)


def ctc(suite: Suite) -> dict[str, Block]:
    """CTC loss and gradient: ours, optax's, torch's."""
    shapes = ((2, 20, 4, 5),) if suite.small else ((64, 400, 200, 29), (16, 800, 200, 29), (32, 1600, 300, 1024))
    return {"x".join(map(str, shape)): partial(one_ctc, suite, *shape) for shape in shapes}


def one_ctc(suite: Suite, rows: int, frames: int, labels: int, classes: int) -> dict[str, Any]:
    """One shape, float32."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from jaxds2.ctc import ctc_loss

    rng = np.random.default_rng(0)
    logits = rng.standard_normal((rows, frames, classes), np.float32)
    labels_BN = rng.integers(1, classes, (rows, labels)).astype(np.int32)
    given = jnp.asarray(logits), jnp.full((rows,), frames), jnp.asarray(labels_BN), jnp.full((rows,), labels)

    def column(form: "Loss") -> Column:
        return compiled(jax.value_and_grad(lambda *given: jnp.sum(ctc_loss(*given, implementation=form))), *given)

    columns = named(LOSSES, column)
    columns |= torch_columns(("torch",), lambda torch, device, _: torch_ctc(torch, device, logits, labels_BN))
    title = f"CTC loss and gradient, B={rows} U={frames} N={labels} V={classes}, float32"
    return timed(title, columns, suite, base="optax") | {"shape": [rows, frames, labels, classes]}


def torch_ctc(torch: Any, device: str, logits_BUV: Any, labels_BN: Any) -> Column:
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

    return torch_column(torch, device, step)
