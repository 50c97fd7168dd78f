"""The part of the GPU suite that sets our training step beside a torch BiLSTM of the same layer plan."""

import contextlib
from functools import partial
from typing import TYPE_CHECKING, Any

from gpu_suite import Block, Column, Suite, jax_column, named, timed, torch_column, torch_columns

if TYPE_CHECKING:
    from bench_step import Plan
    from jax.stages import Lowered

    from jaxds2.model.scan import Implementation

PRECISIONS = {
    "bfloat16": "matmuls and convolutions in bfloat16, weights float32: our compute dtype, torch's autocast",
    "float32": "float32 without TF32: jax.default_matmul_precision('float32'), torch's allow_tf32 off",
}
"""What is the same on both sides."""


def peer(suite: Suite) -> dict[str, Block]:
    """The step of bench_step.py's plan: our forms, and torch with nn.LSTM."""
    return {dtype: partial(beside, suite, dtype) for dtype in PRECISIONS}


def beside(suite: Suite, dtype: str) -> dict[str, Any]:
    """One precision."""
    from bench_step import SMALL, Plan

    plan = SMALL if suite.small else Plan(rows=64)
    forms = suite.forms(plan.hidden, "associative", "fused")[: 1 if suite.small else None]
    columns = named(forms, lambda form: our_step(plan, form, dtype))
    columns |= torch_columns(("torch-BiLSTM",), lambda torch, device, _: torch_step(torch, device, plan, dtype))
    title = f"training step, {plan.rows} utterances of {plan.seconds} s, {dtype}"
    found = timed(title, columns, suite, base="associative")
    return found | {"plan": vars(plan), "precision": PRECISIONS[dtype]}


def our_step(plan: "Plan", form: "Implementation", dtype: str) -> Column:
    """Our step; every call goes on from the last one's weights."""
    lowered, held, batch = lowered_step(plan, form, dtype)
    program = lowered.compile()

    def call() -> Any:
        held[0], held[1], value = program(*held, *batch)
        return held, value

    return jax_column(call, program)


def lowered_step(plan: "Plan", form: "Implementation", dtype: str) -> "tuple[Lowered, list[Any], tuple[Any, ...]]":
    """Our model, optax's AdamW, our CTC, as one program; weights and optimizer state, and the batch that it takes."""
    import jax
    import jax.numpy as jnp
    import optax
    from bench_step import CLASSES, MELS, batch_of

    from jaxds2.ctc import ctc_loss
    from jaxds2.model.deepspeech2 import create

    apply, params = create(MELS, CLASSES, plan.model(form), dtype=jnp.dtype(dtype))
    optimizer = optax.adamw(1e-3)
    features_BTF, labels_BN = map(jnp.asarray, batch_of(plan))
    frames_B = jnp.full((plan.rows,), features_BTF.shape[1], jnp.int32)
    labels_B = jnp.full((plan.rows,), plan.labels, jnp.int32)
    batch = features_BTF, frames_B, labels_BN, labels_B

    def step(params, state, features_BTF, frames_B, labels_BN, labels_B):
        def loss(params):
            logits_BUV, lengths_B = apply(params, features_BTF, frames_B)
            return jnp.mean(ctc_loss(logits_BUV, lengths_B, labels_BN, labels_B, implementation="fused"))

        value, grads = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    held = [params, optimizer.init(params)]
    with jax.default_matmul_precision("float32") if dtype == "float32" else contextlib.nullcontext():
        return jax.jit(step, donate_argnums=(0, 1)).lower(*held, *batch), held, batch


def torch_step(torch: Any, device: str, plan: "Plan", dtype: str) -> Column:
    """torch's model and AdamW in their fastest forms, its CTC, which is float32 in both precisions."""
    from bench_step import batch_of, torch_model

    features_BTF, labels_BN = (torch.from_numpy(x).to(device) for x in batch_of(plan))
    counts_B = torch.full((plan.rows,), plan.labels)
    model = torch_model(plan, None).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, fused=device == "cuda")

    def step() -> Any:
        optimizer.zero_grad()
        with torch.autocast(device, torch.bfloat16, enabled=dtype == "bfloat16"):
            log_probs_UBV = model(features_BTF)
        lengths_B = torch.full((plan.rows,), len(log_probs_UBV))
        loss = torch.nn.functional.ctc_loss(log_probs_UBV.float(), labels_BN, lengths_B, counts_B)
        loss.backward()
        optimizer.step()
        return loss

    return torch_column(torch, device, step)
