"""How a model's queries turn with their position, found by asking the model.

Instead of a table of architectures, one forward reads a few tokens at a few positions each, every token in a row of its own.
Attention to one token gives that token's value wherever it stands, so nothing but RoPE moves the queries of any layer.

Axes: `b` rows, `h` query heads, `g` KV heads, `n` tokens of a row, `p` probed positions, `s` samples (a token in a query head),
`d` head dim.
"""

import contextlib
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
from less_cache.integration.rotation import Rotation, movement, rotation_of
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


def trained_length(config: PreTrainedConfig) -> int:
    """Tokens up to which positions exist and angles are those of short texts."""
    lengths = [getattr(config, name, None) for name in ("max_position_embeddings", "original_max_position_embeddings")]
    lengths += [parameters.get("original_max_position_embeddings") for parameters in _rope_parameters(config)]
    return min((int(length) for length in lengths if length), default=SAFE_POSITIONS)


def _length(config: PreTrainedConfig, num_tokens: int) -> int:
    """The length whose angles are those of `num_tokens`; 0: any short text's."""
    config = config.get_text_config(decoder=True)
    kinds = {str(parameters.get("rope_type")) for parameters in _rope_parameters(config)}
    longest = trained_length(config)
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
    positions = [position for position in POSITIONS if position < trained_length(model.config.get_text_config(decoder=True))]
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
        found[index] = rotation_of(queries, positions, TOLERANCE.get(queries.dtype, COARSE))
    if seen and (first == 0 or not repeats):  # else a recurrence may have moved the values
        _, values = seen[first]
        if movement(values) > TOLERANCE.get(values.dtype, COARSE):  # the hidden states hold the position
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
