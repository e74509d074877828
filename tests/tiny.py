"""Tiny random models and kernels for the tests: real architectures, sizes that a CPU runs in a millisecond."""

from collections.abc import Sequence

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from less_cache import H2O, LESSCache, LESSConfig, LESSKernels
from less_cache.cache.layer import LESSLayer
from less_cache.integration.families import fingerprint, geometry
from less_cache.integration.rotation import Rotation
from less_cache.memory import MEMORIES
from less_cache.memory.base import TrainedMemory

VOCAB = 97


def tiny_llama(attn_implementation: str = "sdpa", seed: int = 0, **overrides) -> LlamaForCausalLM:
    """A random Llama with grouped queries (4 query, 2 KV heads), ready to generate; `overrides` go to its config.

    The weights are larger than at the start of a training, so that attention is far from uniform.
    """
    sizes = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
        "initializer_range": 0.3,
        "bos_token_id": 1,
        "eos_token_id": None,  # generation runs to its full length
        "pad_token_id": 0,
        "attn_implementation": attn_implementation,
    }
    config = LlamaConfig(**{**sizes, **overrides})
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LlamaForCausalLM(config).eval()


def tiny_kernels(
    model: PreTrainedModel,
    rank: int | list[int] = 8,
    hidden_size: int | list[int] = 16,
    seed: int = 0,
    memory: str = "low_rank",
) -> LESSKernels:
    """Random kernels for `model`, heavy enough that the state weighs as much as the kept tokens."""
    sizes = geometry(model.config)
    layers = [index for index, layer in enumerate(LESSCache(model, H2O(1, 1)).layers) if isinstance(layer, LESSLayer)]
    config = LESSConfig(
        num_hidden_layers=sizes.num_hidden_layers,
        num_attention_heads=sizes.num_attention_heads,
        num_key_value_heads=sizes.num_key_value_heads,
        head_dim=sizes.head_dim,
        rank=rank,
        hidden_size=hidden_size,
        layers=layers,
        model_type=model.config.get_text_config(decoder=True).model_type,
        base_model="tiny",
        base_model_fingerprint=fingerprint(model),
        memory=memory,
    )
    kernels = LESSKernels(config)
    generator = torch.Generator().manual_seed(seed)
    for layer in kernels.layers.values():
        fill(layer, generator)
    return kernels


def fill(kernels: TrainedMemory, generator: torch.Generator) -> TrainedMemory:
    """Fill `kernels` with weights that matter: as training starts, the state would be next to nothing."""
    kernels.reset_parameters(generator)
    for name, parameter in kernels.named_parameters():
        if name.endswith("scale"):
            torch.nn.init.uniform_(parameter, 0.5, 1.5, generator=generator)
        if name.endswith(("bias", "skip")):
            torch.nn.init.uniform_(parameter, -0.3, 0.3, generator=generator)
        if name.endswith("fading"):
            torch.nn.init.uniform_(parameter, 0, 0.5, generator=generator)
    return kernels.requires_grad_(False)


# One raw layer, without a model around it.


def layer_kernels(
    h: int, g: int, d: int, rank: int = 4, hidden_size: int = 8, seed: int = 0, memory: str = "low_rank"
) -> TrainedMemory:
    """Random kernels of one layer, as heavy as `tiny_kernels`."""
    return fill(MEMORIES[memory](h, g, d, hidden_size, rank), torch.Generator().manual_seed(seed))


def random_states(b: int, h: int, g: int, length: int, d: int, seed: int = 0) -> tuple[torch.Tensor, ...]:
    """Queries `[b, h, length, d]`, keys and values `[b, g, length, d]`; some keys get much attention, most get little."""
    generator = torch.Generator().manual_seed(seed)
    query_states = 2 * torch.randn(b, h, length, d, generator=generator)
    key_states = torch.randn(b, g, length, d, generator=generator) * torch.randn(b, g, length, 1, generator=generator).exp()
    value_states = torch.randn(b, g, length, d, generator=generator)
    return query_states, key_states, value_states


def rotation(d: int) -> Rotation:
    """RoPE over all `d` numbers of a head, the first half with the second."""
    half = torch.arange(d // 2)
    angles = 0.5 ** half.float()
    return Rotation(torch.cat([half + d // 2, half]), torch.tensor([-1.0, 1.0]).repeat_interleave(d // 2), angles.repeat(2))


def plain_attention(module, query, key, value, mask, dropout=0.0, scaling=None, softcap=None, s_aux=None):
    """A model's own attention function, masked softmax; as in real ones, rows that see nothing are NaN."""
    n, group = query.shape[2], query.shape[1] // key.shape[1]
    key, value = (states.double().repeat_interleave(group, dim=1) for states in (key, value))  # [b, h, n, d]
    logits = query.double() @ key.transpose(-1, -2) * scaling
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    if mask is None:
        columns = key.shape[2]
        mask = torch.ones(n, columns, dtype=torch.bool).tril(columns - n)
    mask = mask if mask.dtype == torch.bool else mask == 0
    logits = logits.masked_fill(~mask, -torch.inf)
    if s_aux is not None:
        logits = torch.cat([logits, s_aux.double().view(1, -1, 1, 1).expand(*logits.shape[:3], 1)], dim=-1)
    output = logits.softmax(dim=-1)[..., : key.shape[2]] @ value
    return output.transpose(1, 2).to(query.dtype), None


def feed(
    layer: LESSLayer,
    query_states: torch.Tensor,
    key_states: torch.Tensor,
    value_states: torch.Tensor,
    blocks: Sequence[int],
    real: torch.Tensor | None = None,
    additive_mask: bool = False,
    **attention,
) -> torch.Tensor:
    """Feed states to a layer as a model would, block by block; returns the outputs `[b, h, T, d]`.

    At padding (`real` `[b, T]` is False) the states become NaN wherever a model's own attention would survive that.
    """
    module = torch.nn.Identity().eval()
    attention.setdefault("scaling", query_states.shape[-1] ** -0.5)
    outputs = []
    start = layer.cumulative_length
    queries, keys, values = (states.split(list(blocks), dim=2) for states in (query_states, key_states, value_states))
    for query, key, value in zip(queries, keys, values, strict=True):
        n = query.shape[2]
        mask = None
        if real is not None:
            padding = ~real[:, None, start : start + n]  # [b, 1, n]
            query = query.masked_fill(padding.unsqueeze(-1), torch.nan)
            if start > 0:
                key, value = (states.masked_fill(padding.unsqueeze(-1), torch.nan) for states in (key, value))
            mask = torch.ones(n, n, dtype=torch.bool).tril() & ~padding.unsqueeze(2)  # [b, 1, n, n]
            if additive_mask:
                mask = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
        key, value = layer.update(key, value)
        output, _ = layer.attend(plain_attention, module, query, key, value, mask, **attention)
        outputs.append(output.transpose(1, 2))
        start += n
    return torch.cat(outputs, dim=2)


def held_positions(layer: LESSLayer) -> list[list[list[int]]]:
    """Positions that each row's KV heads hold, in order."""
    return [[sorted(p for p in head if p >= 0) for head in row] for row in layer.positions.tolist()]


def held_tokens(layer: LESSLayer, real: torch.Tensor) -> torch.Tensor:
    """Which of the tokens seen each KV head holds, bool `[b, g, T]`. `real`: `[b, T]`."""
    row_positions = (real.cumsum(-1) - 1).masked_fill(~real, -2)  # [b, T]; -2 is in no slot
    return (layer.positions.unsqueeze(-1) == row_positions[:, None, None]).any(dim=2)
