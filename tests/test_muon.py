"""Muon: updates of one size for every head, whatever its gradient's."""

import pytest
import torch

from less_cache.training.muon import Muon, orthogonal


@pytest.mark.parametrize("shape", [(3, 8, 8), (2, 16, 4), (2, 4, 16), (1, 5, 1)])
def test_singular_values_become_about_one(shape):
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    u, _, v = torch.linalg.svd(matrices, full_matrices=False)
    along = u.mT @ orthogonal(matrices) @ v.mT  # in the directions of U and V
    singular = along.diagonal(dim1=-2, dim2=-1)
    assert singular.min() > 0.5 and singular.max() < 1.3
    torch.testing.assert_close(along, torch.diag_embed(singular), atol=1e-4, rtol=0)


def test_heads_do_not_see_each_other():
    matrices = torch.randn(3, 6, 4, generator=torch.Generator().manual_seed(0))
    alone = torch.cat([orthogonal(each[None]) for each in matrices])
    torch.testing.assert_close(orthogonal(matrices), alone)


def test_zeros_stay():
    assert torch.equal(orthogonal(torch.zeros(2, 3, 4)), torch.zeros(2, 3, 4))


@pytest.mark.parametrize("size", [1e-30, 1e-20, 1.0, 1e8])
def test_an_update_has_one_size(size):
    parameter = torch.nn.Parameter(torch.zeros(2, 8, 32))
    optimizer = Muon([parameter], lr=0.1, step_size=0.3)
    parameter.grad = size * torch.randn(2, 8, 32, generator=torch.Generator().manual_seed(0))
    optimizer.step()
    assert parameter.square().mean().sqrt().item() == pytest.approx(0.03, rel=0.2)
    assert (parameter * parameter.grad).sum() < 0


def test_momentum_is_a_running_mean():
    """Two steps, gradients a quarter turn apart: the older weighs 0.9 of what it did, the newer the same."""
    parameter = torch.nn.Parameter(torch.zeros(1, 2, 2))
    optimizer = Muon([parameter], lr=0.1)
    first, second = torch.eye(2)[None], torch.tensor([[[0.0, 1.0], [-1.0, 0.0]]])
    for gradient in (first, second):
        parameter.grad = gradient
        optimizer.step()
    torch.testing.assert_close(optimizer.state[parameter]["mean"], 0.09 * first + 0.1 * second)
