"""The CTC loss and its gradient in float64, which benchmarks and tests hold ours against."""

import numpy as np


def float64_loss_and_gradient(logits_UV, label) -> tuple[float, np.ndarray]:
    """Forward and backward variables in log space, in float64."""
    logits = np.asarray(logits_UV, np.float64)
    log_probs = logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)
    states = np.zeros(2 * len(label) + 1, int)
    states[1::2] = label
    skips = np.zeros(len(states), bool)
    skips[2:] = (states[2:] != 0) & (states[2:] != states[:-2])

    def paths_up_to(emissions, skips):
        """Log of the probability of all paths to each state, its frame included."""
        alpha = np.full((len(emissions), len(states)), -np.inf)
        alpha[0, :2] = emissions[0, :2]
        for t in range(1, len(emissions)):
            stay = alpha[t - 1]
            near = np.concatenate([[-np.inf], stay])[: len(stay)]
            far = np.where(skips, np.concatenate([[-np.inf, -np.inf], stay])[: len(stay)], -np.inf)
            alpha[t] = np.logaddexp(np.logaddexp(stay, near), far) + emissions[t]
        return alpha

    emissions = log_probs[:, states]
    turned = np.concatenate([[False, False], skips[::-1]])[: len(skips)]
    both = paths_up_to(emissions, skips) + paths_up_to(emissions[::-1, ::-1], turned)[::-1, ::-1] - emissions
    likelihood = np.logaddexp.reduce(both[0])
    gradient = np.exp(log_probs)
    for i, s in enumerate(states):
        gradient[:, s] -= np.exp(both[:, i] - likelihood)
    return -likelihood, gradient
