"""Muon: momentum whose update is orthogonalised, for the weight matrices (K. Jordan et al., 2024).

Learns this small mixture in fewer tokens than AdamW, which matters where a CPU trains. All matrices that it is given are
square and of one size, so they are orthogonalised in one batched product, in fp32.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["Muon", "orthogonalised"]


def orthogonalised(matrices: Tensor, num_steps: int = 5) -> Tensor:
    """matrices: [num_matrices, rows, columns] fp32 -> about U V^T of each one's singular value decomposition.

    Newton-Schulz iteration of fifth order with the coefficients of the paper: singular values end in 0.7 to 1.2.
    """
    x: Tensor = matrices / (matrices.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(num_steps):
        gram = x @ x.mT
        x = 3.4445 * x + torch.matmul(-4.7750 * gram + 2.0315 * torch.matmul(gram, gram), x)
    return x


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalised; decoupled weight decay."""

    def __init__(self, parameters: Sequence[Tensor], lr: float, momentum: float = 0.95, weight_decay: float = 0.01) -> None:
        super().__init__(list(parameters), {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            gradients = torch.stack([parameter.grad for parameter in group["params"]])
            state = self.state[group["params"][0]]
            buffer = state.setdefault("momentum_buffer", torch.zeros_like(gradients))
            buffer.lerp_(gradients, 1 - group["momentum"])
            updates = orthogonalised(gradients.lerp(buffer, group["momentum"]))
            for parameter, update in zip(group["params"], updates.unbind(), strict=True):
                parameter.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-group["lr"])
