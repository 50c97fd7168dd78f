"""What people would use instead, in torch, written from the published equations and torch's public API.

Arrays are time-major (T, B, D) like ours, so that no column pays for a transpose that another one does not.
"""
# torch is in the environment of `make bench` only.
# pyright: reportMissingImports=false, reportInvalidTypeForm=false

import torch
import torch.nn.functional as F  # noqa: N812

Tensor = torch.Tensor


def log_space_mingru(gate_TBD: Tensor, candidate_TBD: Tensor) -> Tensor:
    """The minGRU cell in log space (Feng et al. 2024, appendix B), candidate g, from a zero state.

    log h_t = a_t + logcumsumexp_t(log(z_s g(c_s)) - a_s), where a_t is the running sum of log(1 - z); a zero state
    adds nothing.
    """
    log_decay_TBD = -F.softplus(gate_TBD)
    log_g_TBD = torch.where(candidate_TBD >= 0, (F.relu(candidate_TBD) + 0.5).log(), -F.softplus(-candidate_TBD))
    log_input_TBD = log_g_TBD - F.softplus(-gate_TBD)
    total_TBD = torch.cumsum(log_decay_TBD, dim=0)
    return (total_TBD + torch.logcumsumexp(log_input_TBD - total_TBD, dim=0)).exp()


class _Recurrence(torch.autograd.Function):
    """h_t = a_t h_{t-1} + b_t, one fused multiply-add a step into an array that is there, and the same in reverse."""

    @staticmethod
    def forward(ctx, a_TBD: Tensor, b_TBD: Tensor) -> Tensor:
        """The states, from zero."""
        h_TBD = torch.empty_like(b_TBD)
        h_TBD[0] = b_TBD[0]
        for a_BD, b_BD, before_BD, h_BD in zip(a_TBD[1:], b_TBD[1:], h_TBD[:-1], h_TBD[1:], strict=True):
            torch.addcmul(b_BD, a_BD, before_BD, out=h_BD)
        ctx.save_for_backward(a_TBD, h_TBD)
        return h_TBD

    @staticmethod
    def backward(ctx, dh_TBD: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of a and b."""
        a_TBD, h_TBD = ctx.saved_tensors
        db_TBD = torch.empty_like(dh_TBD)
        db_TBD[-1] = dh_TBD[-1]
        for t in range(len(a_TBD) - 2, -1, -1):
            torch.addcmul(dh_TBD[t], a_TBD[t + 1], db_TBD[t + 1], out=db_TBD[t])
        da_TBD = torch.zeros_like(a_TBD)
        torch.mul(db_TBD[1:], h_TBD[:-1], out=da_TBD[1:])
        return da_TBD, db_TBD


def linear_space_mingru(gate_TBD: Tensor, candidate_TBD: Tensor) -> Tensor:
    """The same cell in linear space: the fastest form that we could write in torch without a kernel of its own."""
    z_TBD = torch.sigmoid(gate_TBD)
    g_TBD = torch.where(candidate_TBD >= 0, candidate_TBD + 0.5, torch.sigmoid(candidate_TBD))
    return _Recurrence.apply(1 - z_TBD, z_TBD * g_TBD)


class _MinGRU(torch.nn.Module):
    """A direction of minGRU with its two linear maps."""

    def __init__(self, width: int, hidden: int, cell):
        super().__init__()
        self.gate, self.candidate = torch.nn.Linear(width, hidden), torch.nn.Linear(width, hidden)
        self.cell = cell

    def forward(self, x_TBD: Tensor) -> Tensor:
        """States of all frames."""
        return self.cell(self.gate(x_TBD), self.candidate(x_TBD))


class _Layer(torch.nn.Module):
    """x + W [forward; backward](norm(x)), the recurrence a BiLSTM or minGRU in both directions."""

    def __init__(self, width: int, hidden: int, cell):
        super().__init__()
        self.norm = torch.nn.LayerNorm(width)
        self.output = torch.nn.Linear(2 * hidden, width)
        self.lstm = torch.nn.LSTM(width, hidden, bidirectional=True) if cell is None else None
        self.directions = torch.nn.ModuleList(() if cell is None else (_MinGRU(width, hidden, cell) for _ in range(2)))

    def forward(self, x_TBD: Tensor) -> Tensor:
        """One layer; every utterance has full length, so the backward direction is a flip."""
        y_TBD = self.norm(x_TBD)
        if self.lstm is not None:
            h_TBD = self.lstm(y_TBD)[0]
        else:
            forward, backward = self.directions
            h_TBD = torch.cat([forward(y_TBD), backward(y_TBD.flip(0)).flip(0)], -1)
        return x_TBD + self.output(h_TBD)


class DeepSpeech2(torch.nn.Module):
    """Our layer plan in torch: 3 x 3 convolutions with GELU, a linear map, residual layers, a CTC head.

    Convolutions like ours, without the residuals and norms that are usual here, so that both do the same.

    Args:
      mels: bins of the input.
      classes: outputs, blank included.
      channels: of every convolution; the first has stride 2 in time and frequency.
      convs: how many.
      width: of the residual stream.
      hidden: states per direction.
      layers: how many.
      cell: `log_space_mingru`, `linear_space_mingru`, or None for nn.LSTM.
    """

    def __init__(
        self, mels: int, classes: int, *, channels: int, convs: int, width: int, hidden: int, layers: int, cell
    ):
        super().__init__()
        self.convs = torch.nn.ModuleList(
            torch.nn.Conv2d(1 if i == 0 else channels, channels, 3, stride=2 if i == 0 else 1, padding=1)
            for i in range(convs)
        )
        self.linear = torch.nn.Linear(channels * ((mels + 1) // 2), width)
        self.layers = torch.nn.ModuleList(_Layer(width, hidden, cell) for _ in range(layers))
        self.norm, self.head = torch.nn.LayerNorm(width), torch.nn.Linear(width, classes)

    def forward(self, features_BTF: Tensor) -> Tensor:
        """Features to time-major log-probabilities (U, B, V)."""
        x_BCTF = features_BTF[:, None]
        for conv in self.convs:
            x_BCTF = F.gelu(conv(x_BCTF), approximate="tanh")
        x_UBD = self.linear(x_BCTF.permute(2, 0, 3, 1).flatten(2))
        for layer in self.layers:
            x_UBD = layer(x_UBD)
        return torch.log_softmax(self.head(self.norm(x_UBD)), -1)
