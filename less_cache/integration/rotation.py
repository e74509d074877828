"""How a layer's queries turn with their position.

RoPE turns pairs of a query's numbers by an angle for each token, so a query can be carried on to a later position without
the model: angles add. Which numbers are a pair, and how fast it turns, differs by architecture, scaling and layer, and can be
seen in queries of the same tokens at several positions (`probing.py` asks a model for them).

Axes: `p` positions, `s` samples (a token in a query head), `n` queries, `d`, `i`, `j` head dim.
"""

import dataclasses
import functools

import torch


@dataclasses.dataclass(frozen=True)
class Rotation:
    """How the queries of one layer turn from token to token.

        turned_i = q_i cos(n θ_i) + γ_i q_{partner(i)} sin(n θ_i)

    n: tokens to go on by; θ: `angles`; γ: `gains`, ∓1, times a ratio of weights where a norm follows the rotation.
    Source: Su et al., "RoFormer" (arXiv 2104.09864), whose rotations compose.

    >>> rotation = Rotation(torch.tensor([1, 0]), torch.tensor([-1.0, 1.0]), torch.full([2], torch.pi / 2))
    >>> rotation.turn(torch.tensor([[1.0, 0.0], [1.0, 0.0]]), by=torch.tensor([1, 2])).round()
    tensor([[-0.,  1.],
            [-1., -0.]])
    """

    partner: torch.Tensor  # [d], int64; of what does not turn, itself
    gains: torch.Tensor  # [d], float32
    angles: torch.Tensor  # [d], float32, radians a token
    turns: bool = True  # False: the layer has no rotation, a query is the same everywhere

    @classmethod
    def none(cls, head_dim: int) -> "Rotation":
        """Of a layer without RoPE."""
        return cls(torch.arange(head_dim), torch.zeros(head_dim), torch.zeros(head_dim), turns=False)

    @property
    def turns_keys(self) -> bool:
        """Whether keys turn as queries do: not where norms with weights of their own follow the rotation."""
        return self.turns and bool((self.gains.abs() == 1).logical_or(self.gains == 0).all())

    @functools.cached_property
    def pairs(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:
        """The numbers that turn with each other, int32 `[2, p]`, their angles, and the gains of the first of each, `[p]`; None
        where two of them do not turn as one.
        """
        numbers = torch.arange(len(self.partner), device=self.partner.device)
        first = (self.partner > numbers).nonzero().squeeze(-1)
        second, alone = self.partner[first], self.partner == numbers
        turn_as_one = (self.angles[first] == self.angles[second]) & (self.gains[first] == -self.gains[second])
        is_pair = (self.partner[self.partner] == numbers).all() & turn_as_one.all() & (self.angles[alone] == 0).all()
        if not bool(is_pair):
            return None
        return torch.stack([first, second]).int(), self.angles[first].float(), self.gains[first].float()

    def to(self, device: torch.device | str) -> "Rotation":
        return Rotation(self.partner.to(device), self.gains.to(device), self.angles.to(device), self.turns)

    def turn(self, query_states: torch.Tensor, by: torch.Tensor) -> torch.Tensor:
        """The queries as the model would have computed them `by` tokens later.

        Args:
            query_states: `[..., n, d]`, after RoPE, as attention reads them.
            by: Tokens, `[n]` or anything that broadcasts to `[..., n]`; negative: earlier.

        Returns:
            `[..., n, d]` in the type of `query_states`, computed in float32.
        """
        if not self.turns:
            return query_states
        angles = by.unsqueeze(-1).float() * self.angles  # [..., n, d]
        queries = query_states.float()
        turned = queries * angles.cos() + self.gains * queries[..., self.partner] * angles.sin()
        return turned.to(query_states.dtype)


# From queries to the rotation


def rotation_of(queries: torch.Tensor, positions: list[int], tolerance: float) -> Rotation | None:
    """The rotation that explains the queries `[p, s, d]`; None: there is none."""
    if movement(queries) <= tolerance:
        return Rotation.none(queries.shape[-1])
    eps = torch.finfo(queries.dtype).eps
    queries = queries.double()
    for ratios in (queries.new_ones(queries.shape[-1], queries.shape[-1]), _ratios(queries, eps)):
        rotation = _best(queries, positions, ratios)
        turned = rotation.turn(queries[:1].expand_as(queries), by=torch.tensor(positions)[:, None])
        if _distance(queries, turned) <= tolerance:
            return rotation
    return None


def movement(states: torch.Tensor) -> float:
    """How far states `[p, s, d]` differ from the first position's; NaN where they are zeros, or no numbers."""
    states = states.double()
    return _distance(states, states[:1].expand_as(states))


def _distance(states: torch.Tensor, predicted: torch.Tensor) -> float:
    """How far states are from what was predicted, as a share of their length, up to a factor for each position."""
    factors = (states * predicted).sum((1, 2), keepdim=True) / predicted.square().sum((1, 2), keepdim=True)
    errors = (states - factors * predicted).square().sum((1, 2)) / states.square().sum((1, 2))  # [p]
    return errors.max().sqrt().item()


def _best(queries: torch.Tensor, positions: list[int], ratios: torch.Tensor) -> Rotation:
    """The rotation of the layout that explains the queries best. `ratios`: of a pair's amplitudes, `[d, d]`.

    With z = q_i/√ρ + √ρ q_j i, a pair is one complex number, and Σ z_p conj(z_0) over the samples has the angle at p.
    """
    head_dim = queries.shape[-1]
    products = queries.transpose(1, 2) @ queries[0]  # [p, i, j]: q_i at p with q_j at the first position
    squares = queries.square().sum(1)  # [p, d]
    same = products.diagonal(dim1=1, dim2=2)  # [p, d]
    real = same.unsqueeze(2) / ratios + ratios * same.unsqueeze(1)  # [p, i, j]
    imaginary = products.transpose(1, 2) - products
    lengths = squares.unsqueeze(2) / ratios + ratios * squares.unsqueeze(1)
    unexplained = (lengths + lengths[:1] - 2 * torch.hypot(real, imaginary)).sum(0) / 2  # [i, j], half to each of a pair
    unexplained.diagonal().copy_((squares + squares[:1] - 2 * same).sum(0))  # of what does not turn

    dims = torch.arange(head_dim)
    layouts = _layouts(head_dim)  # [layouts, d]
    partner = layouts[unexplained[dims, layouts].sum(-1).argmin()]
    phases = torch.atan2(imaginary, real)[:, dims.minimum(partner), dims.maximum(partner)]  # [p, d]
    gains = torch.where(dims < partner, -ratios[dims, partner], ratios[dims, partner])
    angles = torch.where(dims == partner, 0.0, _unwrapped_angles(phases, positions))
    return Rotation(partner, gains.float(), angles.float())


def _unwrapped_angles(phases: torch.Tensor, positions: list[int]) -> torch.Tensor:
    """Radians a token `[d]` of phases `[p, d]`: each position says it better than the one before, up to whole turns."""
    angles = torch.zeros_like(phases[0])
    for phase, position in zip(phases[1:], positions[1:], strict=True):
        turns = ((position * angles - phase) / (2 * torch.pi)).round()
        angles = (phase + 2 * torch.pi * turns) / position
    return angles


def _layouts(head_dim: int) -> torch.Tensor:
    """Partners `[layouts, d]`: the first or the last numbers turn, halves with each other or neighbours."""
    layouts = []
    for rotary_dim in range(2, head_dim + 1, 2):
        half = rotary_dim // 2
        for start in {0, head_dim - rotary_dim}:
            dims = torch.arange(rotary_dim)
            for partner in ((dims + half) % rotary_dim, dims ^ 1):
                layout = torch.arange(head_dim)
                layout[start : start + rotary_dim] = start + partner
                layouts.append(layout)
    return torch.stack(layouts)


def _ratios(queries: torch.Tensor, eps: float) -> torch.Tensor:
    """Ratio of the amplitudes of every pair, `[i, j]`, where a norm with weights w follows the rotation: w_i / w_j.

    (q_i / w_i)² + (q_j / w_j)² is the same at all positions, so the two squares move in opposite ways, w_i² to w_j².
    """
    squares = queries.square()
    movement = (squares - squares.mean(0)).square().mean((0, 1)).sqrt()  # [d]
    moves = movement > 2 * eps * squares.mean((0, 1))  # by more than rounding
    ratios = (movement.unsqueeze(1) / movement).sqrt()
    return torch.where(moves.unsqueeze(1) & moves, ratios, 1.0)
