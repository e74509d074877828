"""How a model's queries turn with their position, found by asking the model.

RoPE turns pairs of a query's numbers by an angle for each token, so a query can be carried on to a later position without
the model: angles add. Which numbers are a pair, and how fast it turns, differs by architecture, scaling and layer. Instead
of a table of that, one forward reads a few tokens at a few positions each, every token in a row of its own. Attention to
one token gives that token's value wherever it stands, so nothing but RoPE moves the queries of any layer.

Axes: `p` probed positions, `s` samples (a token in a query head), `d`, `i`, `j` head dim.
"""

import contextlib
import dataclasses
import inspect
import logging
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from less_cache.integration import hook
from less_cache.integration.families import full_attention_layers
from less_cache.integration.weights import device_of_layer, unwrapped

logger = logging.getLogger(__name__)

POSITIONS = (0, 1, 8, 64, 512, 4096)  # each tells the angle eight times as well as the one before, up to whole turns
LONGEST_TEXT = 512  # where the model has to read all positions up to the last
NUM_TOKENS = 4
FREE_LAYERS = {"DynamicLayer", "DynamicSlidingWindowLayer", "LinearAttentionLayer"}  # of a cache; sparse layers are not
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
    """Remembers queries and values, and gives every token its own value: attention to one token, whatever sinks take of it."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: tuple[torch.Tensor, ...] = ()

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return hook.tag(key_states, self), value_states

    def attend(self, original: Callable, module: torch.nn.Module, query_states, key_states, value_states, *args, **kwargs):
        self.seen = query_states, value_states
        group = query_states.shape[1] // value_states.shape[1]
        return value_states.repeat_interleave(group, dim=1).transpose(1, 2), None  # [b, n, h, d]

    def refuse(self, reason: str) -> None:
        """Of an attention function that somebody has registered: it is not called."""


Seen = dict[int, list[torch.Tensor]]  # of each layer that was seen to attend, queries and values


@torch.inference_mode(False)
@torch.no_grad()
def _probed(model: PreTrainedModel, length: int) -> Rotations:
    layers = full_attention_layers(model.config)
    positions = [position for position in POSITIONS if position < _trained_length(model.config.get_text_config(decoder=True))]
    repeats = not _takes_any_position(model)
    try:
        if repeats:
            positions = [position for position in positions if position <= LONGEST_TEXT]
            seen = _repeated_tokens(model, positions, length)
        else:
            seen = _single_tokens(model, positions, length)
    except Exception as error:  # whatever somebody's own code raises
        reason = (str(error).strip().splitlines() or [""])[0]
        logger.info("%s: how its queries turn is not known (%s: %s)", type(model).__name__, type(error).__name__, reason)
        return dict.fromkeys(layers)

    found: Rotations = dict.fromkeys(layers)
    first = min(seen, default=0)
    for index in seen.keys() & found.keys():
        queries, _ = seen[index]
        found[index] = _rotation(queries, positions, TOLERANCE.get(queries.dtype, COARSE))
    if seen and (first == 0 or not repeats):  # else a recurrence may have moved the values
        _, values = seen[first]
        if _movement(values) > TOLERANCE.get(values.dtype, COARSE):  # the hidden states hold the position
            found = {index: Rotation.none(seen[index][0].shape[-1]) if index in seen else None for index in layers}
    if unknown := [index for index in layers if found[index] is None]:
        logger.info("%s: how the queries of layers %s turn is not known", type(model).__name__, unknown)
    return found


def _takes_any_position(model: PreTrainedModel) -> bool:
    """Whether a token may stand anywhere: the model is told where, and no layer looks for keys at positions."""
    kinds = {type(layer).__name__ for layer in DynamicCache(config=model.config).layers}
    return kinds <= FREE_LAYERS and "position_ids" in inspect.signature(model.forward).parameters


def _single_tokens(model: PreTrainedModel, positions: list[int], length: int) -> Seen:
    """Queries and values `[p, s, d]` of single tokens, each in a row of its own."""
    tokens = _tokens(model)
    shape = len(tokens), len(positions)
    input_ids = tokens.repeat_interleave(len(positions))  # [b]
    position_ids = torch.tensor(positions).repeat(len(tokens))  # [b]
    if length > 0:  # one more row, the last token of such a text: the model chooses its angles by the largest position
        input_ids = torch.cat([input_ids, input_ids[-1:]])
        position_ids = torch.cat([position_ids, torch.tensor([length - 1])])
    seen = _attended(model, input_ids=input_ids[:, None], position_ids=position_ids[:, None])
    return {
        index: [each[: shape[0] * shape[1], :, 0].unflatten(0, shape).transpose(0, 1).flatten(1, 2) for each in states]
        for index, states in seen.items()
    }


def _repeated_tokens(model: PreTrainedModel, positions: list[int], length: int) -> Seen:
    """The same of texts that repeat one token, for models that take no positions or, with layers of their own kind, none
    beyond the text (on a GPU, that would end the process). Says nothing behind a layer with a recurrence.
    """
    if length > 0:
        raise NotImplementedError("its angles depend on the length of the text, and it takes no positions")
    seen = _attended(model, input_ids=_tokens(model)[:, None].expand(-1, positions[-1] + 1))
    return {
        index: [each[:, :, positions].permute(2, 0, 1, 3).flatten(1, 2) for each in states] for index, states in seen.items()
    }


def _tokens(model: PreTrainedModel) -> torch.Tensor:
    """A few, from all over the vocabulary."""
    return torch.arange(1, NUM_TOKENS + 1) * model.config.get_text_config(decoder=True).vocab_size // (NUM_TOKENS + 1)


def _attended(model: PreTrainedModel, **inputs: torch.Tensor) -> Seen:
    """What a forward asks attention: queries `[b, h, n, d]` and values `[b, g, n, d]`."""
    hook.install()
    cache = DynamicCache(config=model.config)
    recorders = {
        index: _Recorder()
        for index, layer in enumerate(cache.layers)
        if type(layer) in (DynamicLayer, DynamicSlidingWindowLayer)
    }
    for index, recorder in recorders.items():
        cache.layers[index] = recorder
    device = device_of_layer(model, min(recorders))
    with _left_as_it_was(model):
        model(**{name: tensor.to(device) for name, tensor in inputs.items()}, past_key_values=cache, use_cache=True)
    return {index: [each.cpu() for each in recorder.seen] for index, recorder in recorders.items() if recorder.seen}


@contextlib.contextmanager
def _left_as_it_was(model: torch.nn.Module) -> Iterator[None]:
    """Evaluation, after which every module has the attributes it had, and angles that were made anew are put back."""
    attributes = [(module, dict(vars(module))) for module in model.modules()]
    buffers = [
        (module, name, buffer, buffer.clone())
        for module in model.modules()
        if next(module.parameters(recurse=False), None) is None
        for name, buffer in module.named_buffers(recurse=False)
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
            setattr(module, name, buffer)
            if not buffer.is_meta and not torch.equal(buffer, values):
                buffer.copy_(values)


# What it means


def _rotation(queries: torch.Tensor, positions: list[int], tolerance: float) -> Rotation | None:
    """The rotation that explains the queries `[p, s, d]`; None: there is none."""
    if _movement(queries) <= tolerance:
        return Rotation.none(queries.shape[-1])
    eps = torch.finfo(queries.dtype).eps
    queries = queries.double()
    for ratios in (queries.new_ones(queries.shape[-1], queries.shape[-1]), _ratios(queries, eps)):
        rotation = _best(queries, positions, ratios)
        turned = rotation.turn(queries[:1].expand_as(queries), by=torch.tensor(positions)[:, None])
        if _distance(queries, turned) <= tolerance:
            return rotation
    return None


def _movement(states: torch.Tensor) -> float:
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
