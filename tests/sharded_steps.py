"""A program, for a process of its own with four CPU devices: training with its state split over 1, 2 and 4 of them.

Prints a JSON object: for each split and each optimizer the losses, the shape of each array of the state and of its
part on the first device, and how often each collective stands in the compiled programs.
"""

import json
import re
from collections import Counter

import jax
import jax.numpy as jnp
from test_step import AUGMENT, FEATURES, V, batch

from jaxds2.config import ModelConfig, OptimizerConfig
from jaxds2.data.placement import data_mesh, distribute, place, shardings_of
from jaxds2.model.deepspeech2 import create
from jaxds2.training.optimizer import make_optimizer
from jaxds2.training.step import TrainState, make_gradient_step, make_update_step

STEPS = 4
MODEL = ModelConfig(
    conv_channels=(4,),
    conv_kernels=((3, 3),),
    conv_strides=((2, 2),),
    width=128,
    hidden=64,
    layers=1,
    scan="sequential",
)
COLLECTIVES = re.compile(r" (all-\w+|reduce-scatter|collective-\w+?)(?:-start)?\(")


def collectives(compiled) -> Counter:
    """Collectives in a compiled program, by name."""
    return Counter(COLLECTIVES.findall(str(compiled.as_text())))


def train(optimizers: dict, fsdp: int) -> dict:
    """A few steps with each optimizer, as training.loop compiles them."""
    mesh = data_mesh(4, rows_multiple=4, fsdp=fsdp)
    whole, first = jax.NamedSharding(mesh, jax.P()), place(batch(), mesh)
    apply, params = create(FEATURES.n_mels, V, MODEL, dtype=jnp.float32)
    params = distribute(params, shardings_of(params, mesh))
    gradient_step = make_gradient_step(apply, FEATURES, AUGMENT, mesh=mesh, seed=0, ctc="fused")
    gradient_step = jax.jit(gradient_step, out_shardings=(shardings_of(params, mesh), whole))
    gradient_step = gradient_step.lower(params, first).compile()
    grads, loss = gradient_step(params, first)
    found = {}
    for name, optimizer in optimizers.items():
        state = TrainState.create(params, optimizer, ema_decay=0.9)
        shardings = shardings_of(state, mesh)
        state = distribute(state, shardings)
        update_step = make_update_step(optimizer, ema_decay=0.9)
        update_step = jax.jit(update_step, out_shardings=(shardings, whole)).lower(state, grads, loss.mean).compile()
        losses = []
        for step in range(STEPS):
            grads, loss = gradient_step(state.params, place(batch(seed=step), mesh))
            state, metrics = update_step(state, grads, loss.mean)
            losses.append(float(metrics.loss))
        leaves = jax.tree.leaves_with_path(state)
        found[name] = {
            "losses": losses,
            "shapes": {
                jax.tree_util.keystr(path): [list(x.shape), list(x.addressable_shards[0].data.shape)]
                for path, x in leaves
            },
            "gradient": collectives(gradient_step),
            "update": collectives(update_step),
        }
    return found


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", 4)
    optimizers = {
        name: make_optimizer(OptimizerConfig(name=name, warmup_steps=2, learning_rate=1e-2), STEPS)
        for name in ("adamw", "muon")
    }
    print(json.dumps({parts: train(optimizers, parts) for parts in (1, 2, 4)}))
