"""Optimizer and learning-rate schedule."""

from typing import Any

import jax
import optax

from jaxds2.config import OptimizerConfig


def learning_rate_schedule(optimizer: OptimizerConfig, total_steps: int) -> optax.Schedule:
    """Linear warmup from 0 to the peak, then half a cosine down to 0 at `total_steps`."""
    warmup_steps = min(optimizer.warmup_steps, total_steps)
    return optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=optimizer.learning_rate,
        warmup_steps=warmup_steps,
        decay_steps=max(total_steps, warmup_steps + 1),
    )


def _is_matrix(params: Any) -> Any:
    """Weight decay is for matrices and convolution kernels, not for biases and norms."""
    return jax.tree.map(lambda p: p.ndim >= 2, params)


def make_optimizer(optimizer: OptimizerConfig, total_steps: int) -> optax.GradientTransformation:
    """AdamW (Loshchilov and Hutter 2019), or Muon (Jordan et al. 2024) for the matrices with AdamW for the rest.

    Gradients are clipped to `clip_norm` first. Muon's updates are scaled to a root mean square of 0.2, about that of
    Adam's, so that both share one learning rate (Liu et al. 2025, arXiv 2502.16982).
    """
    schedule = learning_rate_schedule(optimizer, total_steps)
    if optimizer.name == "adamw":
        update = optax.adamw(
            schedule, b1=optimizer.b1, b2=optimizer.b2, weight_decay=optimizer.weight_decay, mask=_is_matrix
        )
    else:
        update = optax.contrib.muon(
            schedule,
            weight_decay=optimizer.weight_decay,
            adam_b1=optimizer.b1,
            adam_b2=optimizer.b2,
            consistent_rms=0.2,
        )
    if optimizer.clip_norm is None:
        return update
    return optax.chain(optax.clip_by_global_norm(optimizer.clip_norm), update)
