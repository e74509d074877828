"""Muon, for the weights of many heads: momentum whose singular values are all made about 1.

Axes: `h` heads, `i` inputs, `o` outputs.
"""

from collections.abc import Iterable
from typing import Any

import torch

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the polynomial that brings singular values towards 1
ITERATIONS = 5


class Muon(torch.optim.Optimizer):
    """W ← W − lr · step_size · √max(i, o) · orthogonal(M), M ← momentum · M + (1 − momentum) · ∂loss/∂W, for each head.

    The root mean square of an update is about lr · step_size, whatever the gradient's size. `torch.optim.Muon` is for single
    matrices; these are `[h, i, o]`, each head on its own, all of them at once.

    Source: Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024.
    """

    def __init__(self, parameters: Iterable[torch.nn.Parameter], lr: float, momentum: float = 0.9, step_size: float = 0.3):
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "step_size": step_size})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["mean"] = torch.zeros_like(parameter)
                state["mean"].lerp_(parameter.grad, 1 - group["momentum"])
                size = group["lr"] * group["step_size"] * max(parameter.shape[-2:]) ** 0.5
                parameter.add_(orthogonal(state["mean"]), alpha=-size)


def orthogonal(matrices: torch.Tensor) -> torch.Tensor:
    """U Vᵀ of the singular value decomposition U S Vᵀ of each of `[h, i, o]`, nearly: singular values of 0.7 to 1.2.

    A matrix of zeros stays one.
    """
    a, b, c = COEFFICIENTS
    tiny = torch.finfo(matrices.dtype).tiny
    x = matrices / matrices.abs().amax(dim=(-2, -1), keepdim=True).clamp_min(tiny)  # squares of small numbers would be 0
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp_min(tiny)
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    for _ in range(ITERATIONS):
        square = x @ x.mT
        x = a * x + (b * square + c * square @ square) @ x
    return x.mT if tall else x
