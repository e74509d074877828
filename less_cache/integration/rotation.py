"""How a model's queries turn with their position, found by asking the model.

RoPE turns pairs of a query's numbers by an angle for each token, so a query can be carried on to a later position without
the model: angles add. Which numbers are a pair, and how fast it turns, differs by architecture, scaling and layer. Instead
of a table of that, one forward reads a few tokens at a few positions each, every token in a row of its own. Attention to
one token gives that token's value wherever it stands, so nothing but RoPE moves the queries of any layer.

Axes: `p` probed positions, `s` samples (a token in a query head), `d`, `i`, `j` head dim.
"""

import contextlib
import dataclasses
import logging
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from less_cache.integration import hook
from less_cache.integration.families import full_attention_layers
from less_cache.integration.weights import device_of_layer, unwrapped

logger = logging.getLogger(__name__)

POSITIONS = (0, 1, 8, 64, 512, 4096)  # each tells the angle eight times as well as the one before, up to whole turns
LONGEST_TEXT = 512  # where the model has to read all positions up to the last
NUM_TOKENS = 4
SAFE_POSITIONS = 128  # where the config names no maximum
TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3}  # of a query's length, between what was predicted and what came
COARSE = 3e-2  # in 16 bit
MOST_LENGTHS = 8  # tables that are kept of one model


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


Rotations = dict[int, Rotation | None]
_found: "weakref.WeakKeyDictionary[Any, dict[int, Rotations]]" = weakref.WeakKeyDictionary()


def rotations(model: PreTrainedModel, num_tokens: int = 0) -> Rotations:
    """The rotation of every full-attention layer, by the layer's index; None: it is not known.

    Runs the model once, on a few single tokens, and remembers what it found. A layer whose hidden states hold the position
    themselves (learned or sinusoidal embeddings) or that has none has nothing to turn; RoPE on top of learned positions
    would not be noticed. A temperature that grows with the position is left out. Not to be called within a forward.

    Args:
        model: The model, as it is or wrapped by PEFT or torch.compile. It is left as it was.
        num_tokens: Length of the text. It matters to models that choose their angles by it: longrope has one table for short
            texts and one for long ones, dynamic NTK one for each length beyond the trained one, which costs a forward each.
    """
    model = unwrapped(model)
    length = _length(model.config, num_tokens)
    found = _found.setdefault(model, {})
    if length not in found:
        if len(found) == MOST_LENGTHS:
            del found[next(iter(found))]
        found[length] = _probed(model, length)
    return found[length]


def _rope_parameters(config: PreTrainedConfig) -> list[dict]:
    """Those of every kind of layer."""
    parameters = getattr(config, "rope_parameters", None) or {}
    return [each for each in parameters.values() if isinstance(each, dict)] or [parameters]


def _trained_length(config: PreTrainedConfig) -> int:
    """Tokens up to which positions exist and angles are those of short texts."""
    lengths = [getattr(config, name, None) for name in ("max_position_embeddings", "original_max_position_embeddings")]
    lengths += [parameters.get("original_max_position_embeddings") for parameters in _rope_parameters(config)]
    return min((int(length) for length in lengths if length), default=SAFE_POSITIONS)


def _length(config: PreTrainedConfig, num_tokens: int) -> int:
    """The length whose angles are those of `num_tokens`; 0: any short text's."""
    config = config.get_text_config(decoder=True)
    kinds = {str(parameters.get("rope_type")) for parameters in _rope_parameters(config)}
    longest = _trained_length(config)
    if num_tokens > longest and any("dynamic" in kind for kind in kinds):
        return num_tokens
    return longest + 1 if num_tokens > longest and "longrope" in kinds else 0


# What the model says


class _Recorder(DynamicLayer):
    """Dense attention that remembers the queries and values it saw."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: tuple[torch.Tensor, ...] = ()

    def update(self, *args, **kwargs) -> tuple[torch.Tensor, torch.Tensor]:
        key_states, value_states = super().update(*args, **kwargs)
        return hook.tag(key_states, self), value_states

    def attend(self, original: Callable, module: torch.nn.Module, query_states, key_states, value_states, *args, **kwargs):
        self.seen = query_states, value_states
        return original(module, query_states, key_states, value_states, *args, **kwargs)

    def refuse(self, reason: str) -> None:
        """An attention function that nobody knows: it may compute what it likes with one token."""


@torch.inference_mode(False)
@torch.no_grad()
def _probed(model: PreTrainedModel, length: int) -> Rotations:
    layers = full_attention_layers(model.config)
    own = [type(layer).__module__ != DynamicLayer.__module__ for layer in DynamicCache(config=model.config).layers]
    probes = [_repeated_tokens] if any(own) else [_single_tokens, _repeated_tokens]
    for probe in probes:
        try:
            found = _found_by(probe, model, layers, length)
            break
        except Exception as error:  # whatever somebody's own code raises, such as where it takes no positions
            reason = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
    else:
        logger.info("%s: how its queries turn is not known (%s)", type(model).__name__, reason)
        return dict.fromkeys(layers)
    if unknown := [index for index in layers if found[index] is None]:
        logger.info("%s: how the queries of layers %s turn is not known", type(model).__name__, unknown)
    return found


def _found_by(probe: Callable, model: PreTrainedModel, layers: list[int], length: int) -> Rotations:
    config = model.config.get_text_config(decoder=True)
    tokens = torch.arange(1, NUM_TOKENS + 1) * config.vocab_size // (NUM_TOKENS + 1)
    positions = [position for position in POSITIONS if position < _trained_length(config)]
    seen = probe(model, layers, tokens, positions, length)
    return {index: _rotation(*seen[index], positions) if index in seen else None for index in layers}


def _single_tokens(
    model: PreTrainedModel, layers: list[int], tokens: torch.Tensor, positions: list[int], length: int
) -> dict[int, list[torch.Tensor]]:
    """Queries and values of each layer, `[p, s, d]`, of single tokens, each in a row of its own."""
    input_ids = tokens.repeat_interleave(len(positions))  # [b]
    position_ids = torch.tensor(positions).repeat(len(tokens))  # [b]
    if length > 0:  # one more row, the last token of such a text: the model chooses its angles by the largest position
        input_ids = torch.cat([input_ids, input_ids[-1:]])
        position_ids = torch.cat([position_ids, torch.tensor([length - 1])])
    seen = _attended(model, layers, input_ids[:, None], position_ids=position_ids[:, None])
    shape = len(tokens), len(positions)
    return {
        index: [each[: shape[0] * shape[1], :, 0].unflatten(0, shape).transpose(0, 1).flatten(1, 2) for each in states]
        for index, states in seen.items()
    }


def _repeated_tokens(
    model: PreTrainedModel, layers: list[int], tokens: torch.Tensor, positions: list[int], length: int
) -> dict[int, list[torch.Tensor]]:
    """The same of texts that repeat one token: attention to equal values gives that value, too. Not so with sinks, or beside
    layers with a recurrence. For models that take no positions, or, with sparse layers of their own, none beyond the text:
    on a GPU that would end the process.
    """
    if length > 0:
        raise NotImplementedError("no text is made as long as that")
    positions = [position for position in positions if position <= LONGEST_TEXT]
    seen = _attended(model, layers, tokens[:, None].expand(-1, positions[-1] + 1))
    return {
        index: [each[:, :, positions].permute(2, 0, 1, 3).flatten(1, 2) for each in states] for index, states in seen.items()
    }


def _attended(
    model: PreTrainedModel, layers: list[int], input_ids: torch.Tensor, **options: torch.Tensor
) -> dict[int, list[torch.Tensor]]:
    """What attention saw of those layers that it was seen to attend in: queries `[b, h, n, d]` and values `[b, g, n, d]`."""
    hook.install()
    cache = DynamicCache(config=model.config)
    recorders = {index: _Recorder() for index in layers}
    for index, recorder in recorders.items():
        cache.layers[index] = recorder
    device = device_of_layer(model, layers[0])
    inputs = {name: tensor.to(device) for name, tensor in {"input_ids": input_ids, **options}.items()}
    with _left_as_it_was(model):
        model(**inputs, past_key_values=cache, use_cache=True)
    return {index: [each.cpu() for each in recorder.seen] for index, recorder in recorders.items() if recorder.seen}


@contextlib.contextmanager
def _left_as_it_was(model: torch.nn.Module) -> Iterator[None]:
    """Evaluation, after which every module has the attributes it had, and angles that were made anew are put back."""
    attributes = [(module, dict(vars(module))) for module in model.modules()]
    buffers = [
        (module, name, buffer, buffer.clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None and name in module._non_persistent_buffers_set and not module._parameters
    ]
    for module, _ in attributes:
        module.training = False
    try:
        yield
    finally:
        for module, before in attributes:
            for name in vars(module).keys() - before.keys():
                del vars(module)[name]
            vars(module).update(before)
        for module, name, buffer, values in buffers:
            module._buffers[name] = buffer
            if not buffer.is_meta and not torch.equal(buffer, values):
                buffer.copy_(values)


# What it means


def _rotation(query_states: torch.Tensor, value_states: torch.Tensor, positions: list[int]) -> Rotation | None:
    """The rotation that explains the queries `[p, s, d]`; None: there is none."""
    eps, tolerance = torch.finfo(query_states.dtype).eps, TOLERANCE.get(query_states.dtype, COARSE)
    queries, values = query_states.double(), value_states.double()
    positions = positions[: len(queries)]
    head_dim = queries.shape[-1]
    nothing = Rotation.none(head_dim)
    if _error(nothing, queries, positions) <= tolerance:
        return nothing
    for ratios in (torch.ones(head_dim, head_dim, dtype=queries.dtype), _ratios(queries, eps)):
        rotation = _best(queries, positions, ratios)
        if _error(rotation, queries, positions) <= tolerance:
            return rotation
    if _error(Rotation.none(values.shape[-1]), values, positions) > tolerance:
        return nothing  # the hidden states hold the position
    return None


def _error(rotation: Rotation, queries: torch.Tensor, positions: list[int]) -> float:
    """How far the first position's queries, turned to the others, are from those there, up to a factor for each position."""
    by = torch.tensor(positions)[:, None]  # [p, 1]
    turned = rotation.turn(queries[:1].expand_as(queries), by)
    factors = (queries * turned).sum((1, 2), keepdim=True) / turned.square().sum((1, 2), keepdim=True)
    errors = (queries - factors * turned).square().sum((1, 2)) / queries.square().sum((1, 2))  # [p]
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
