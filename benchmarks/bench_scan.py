"""The bare recurrence h_t = a_t h_{t-1} + b_t: its forms and a single pass in C, side by side; errors against float64.

python benchmarks/bench_scan.py
"""

import argparse
import ctypes
import functools
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import side_by_side

if TYPE_CHECKING:
    from jaxds2.model import scan

SHAPES = ((16, 800, 512), (4, 3000, 512))
"""(rows B, frames T, channels D)."""
SMALL = ((2, 7, 8),)
FORMS = ("fused", "sequential", "associative")

# The floor: each value read once and written once. The reverse pass runs lambda_t = dh_t + a_{t+1} lambda_{t+1}.
C_SOURCE = """
void forward(const float *a, const float *b, float *h, int T, int R) {
    for (int i = 0; i < R; i++) h[i] = b[i];
    for (int t = 1; t < T; t++)
        for (int i = 0; i < R; i++) {
            long k = (long)t * R + i;
            h[k] = a[k] * h[k - R] + b[k];
        }
}
void backward(const float *restrict a, const float *restrict h, const float *restrict dh, float *restrict da,
              float *restrict db, int T, int R) {
    for (int i = 0; i < R; i++) db[(long)(T - 1) * R + i] = dh[(long)(T - 1) * R + i];
    for (int t = T - 2; t >= 0; t--)
        for (int i = 0; i < R; i++) {
            long k = (long)t * R + i;
            db[k] = dh[k] + a[k + R] * db[k + R];
            da[k + R] = db[k + R] * h[k];
        }
    for (int i = 0; i < R; i++) da[i] = 0;
}
"""


def c_pass(a, b, dh) -> dict[str, Callable[[], object]]:
    """The two passes in C over preallocated time-major arrays; empty where there is no compiler."""
    import numpy as np

    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        print("no C compiler, so the floor is missing; install gcc")
        return {}
    folder = Path(tempfile.mkdtemp())
    (folder / "scan.c").write_text(C_SOURCE)
    flags = ["-O3", "-march=native", "-shared", "-fPIC"]
    subprocess.run([compiler, *flags, str(folder / "scan.c"), "-o", str(folder / "scan.so")], check=True)
    library = ctypes.CDLL(str(folder / "scan.so"))
    shutil.rmtree(folder)
    arrays = {"a": a, "b": b, "dh": dh} | {name: np.zeros_like(a) for name in ("h", "da", "db")}
    pointers = {name: array.ctypes.data_as(ctypes.c_void_p) for name, array in arrays.items()}
    steps, states = a.shape[0], a[0].size

    def forward() -> object:
        library.forward(pointers["a"], pointers["b"], pointers["h"], steps, states)
        return arrays

    def both() -> object:
        forward()
        library.backward(*(pointers[name] for name in ("a", "h", "dh", "da", "db")), steps, states)
        return arrays

    return {"forward": forward, "forward + backward": both}


def main() -> None:
    """Print the tables and write them all."""
    arguments = side_by_side.start("The bare recurrence, side by side.")
    results = [table for shape in (SMALL if arguments.small else SHAPES) for table in compare(*shape, arguments)]
    side_by_side.save("scan", arguments, results + errors(longest=100 if arguments.small else 20_000))


def compare(rows: int, frames: int, channels: int, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Time all columns on one shape, forward and with the gradient."""
    import numpy as np

    rng = np.random.default_rng(0)
    shape = (frames, rows, channels)
    a_TBD = (1 / (1 + np.exp(-rng.standard_normal(shape)))).astype(np.float32)
    b_TBD, dh_TBD = rng.standard_normal(shape, np.float32), rng.standard_normal(shape, np.float32)
    floor = c_pass(a_TBD, b_TBD, dh_TBD)
    results = []
    for what in ("forward", "forward + backward"):
        ours = {form: compile_form(form, what, a_TBD, b_TBD, dh_TBD) for form in FORMS}
        columns = {"C": floor[what]} if floor else {}
        columns |= {form: call for form, (call, _) in ours.items()}
        medians = side_by_side.rounds(columns, arguments.rounds)
        temporaries = {form: count / a_TBD.nbytes for form, (_, count) in ours.items()}
        table = {name: medians[name] | {"temporaries, arrays": temporaries.get(name, 0.0)} for name in columns}
        if floor:
            moved = 3 if what == "forward" else 8  # arrays, each read or written once a pass
            table["C"]["GB a second"] = moved * a_TBD.nbytes / medians["C"]["CPU ms"] / 1e6
        title = f"bare scan, {what}, B={rows} T={frames} D={channels}, float32, threads: {arguments.threads}"
        print(side_by_side.table(title, table, base="C" if floor else "fused"))
        bars = []
        if floor:
            slower = float(table["fused"]["CPU ms"]) / float(table["C"]["CPU ms"])
            bars = [side_by_side.bar("CPU ms, fused over C", slower, at_most=1.5 if what == "forward" else 1.0)]
        results.append({"shape": [rows, frames, channels], "what": what, "columns": table, "bars": bars})
    return results


def compile_form(form: "scan.Implementation", what: str, *arrays) -> tuple[Callable[[], Any], int]:
    """A call of one form, and the bytes of its temporaries."""
    import jax
    import jax.numpy as jnp

    from jaxds2.model.scan import linear_recurrence

    def forward(a_TBD, b_TBD, dh_TBD):
        del dh_TBD
        return linear_recurrence(a_TBD, b_TBD, implementation=form)[0]

    def both(a_TBD, b_TBD, dh_TBD):
        h_TBD, pull = jax.vjp(lambda a, b: linear_recurrence(a, b, implementation=form)[0], a_TBD, b_TBD)
        return h_TBD, pull(dh_TBD)

    inputs = [jnp.asarray(x) for x in arrays]
    step = side_by_side.jit(forward if what == "forward" else both).lower(*inputs).compile()
    return lambda: jax.block_until_ready(step(*inputs)), side_by_side.temporaries(step)


def errors(longest: int) -> list[dict[str, Any]]:
    """Largest error of value and gradient over the largest value, against float64, with long and extreme gates."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from jaxds2.model.scan import linear_recurrence

    def recurrence(a_TBD, b_TBD, form):
        return linear_recurrence(a_TBD, b_TBD, implementation=form)[0]

    results = []
    for name, frames, spread in (("random gates", longest, 2.0), ("extreme gates", longest, 20.0)):
        rng = np.random.default_rng(1)
        a = (1 / (1 + np.exp(-spread * rng.standard_normal((frames, 1, 64))))).astype(np.float32)
        b, dh = rng.standard_normal(a.shape, np.float32), rng.standard_normal(a.shape, np.float32)
        a64, b64, dh64 = (x.astype(np.float64) for x in (a, b, dh))
        h64, da64, db64 = np.zeros_like(a64), np.zeros_like(a64), np.zeros_like(a64)
        state = np.zeros_like(a64[0])
        for t in range(frames):
            state = h64[t] = a64[t] * state + b64[t]
        state = np.zeros_like(state)
        for t in reversed(range(frames)):
            state = db64[t] = dh64[t] + (a64[t + 1] * state if t + 1 < frames else 0)
            da64[t] = state * (h64[t - 1] if t else 0)
        table = {}
        for form in FORMS:
            h, pull = jax.vjp(functools.partial(recurrence, form=form), jnp.asarray(a), jnp.asarray(b))
            da, db = pull(jnp.asarray(dh))
            pairs = {"h": (h, h64), "da": (da, da64), "db": (db, db64)}
            table[form] = {name: side_by_side.error(value, exact) for name, (value, exact) in pairs.items()}
        print(side_by_side.table(f"error against float64, {name}, T={frames}", table))
        results.append({"errors": name, "frames": frames, "columns": table})
    return results


if __name__ == "__main__":
    main()
