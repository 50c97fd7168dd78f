"""What XLA is told when it compiles."""

import functools

import jax

_ON_CPU = {"xla_cpu_experimental_ynn_fusion_type": ""}


def compiler_options(platform: str) -> dict[str, str] | None:
    """Options for `jax.jit`: None but on CPUs.

    There XLA hands convolutions and matmuls to YNNPACK (jax 0.10), which computes a convolution on one core however
    many there are; the empty list of what it may have leaves them to Eigen, which uses all (docs/performance.md). An
    XLA that does not know the option is left alone.
    """
    return _ON_CPU if platform == "cpu" and _known() else None


@functools.cache
def _known() -> bool:
    try:
        jax.jit(lambda x: x, compiler_options=_ON_CPU).lower(0.0).compile()
    except jax.errors.JaxRuntimeError:
        return False
    return True
