"""What this package relies on in transformers. When a new version breaks it, this file says which name is gone."""

import ast
import importlib
import inspect

import pytest
import zoo
from test_imports import SOURCES, imported, tree
from transformers import AttentionInterface, AutoModelForCausalLM, Cache, LlamaConfig, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin, DynamicLayer
from transformers.models.falcon import modeling_falcon

from less_cache.cache.holding import HoldingLayer
from less_cache.cache.layer import LESSLayer

PUBLIC = {
    "transformers.AttentionInterface",
    "transformers.AttentionMaskInterface",
    "transformers.AutoConfig",
    "transformers.AutoModelForCausalLM",
    "transformers.AutoTokenizer",
    "transformers.Cache",
    "transformers.DynamicCache",
    "transformers.GenerationMixin",
    "transformers.PreTrainedConfig",
    "transformers.PreTrainedModel",
    "transformers.PreTrainedTokenizerFast",
    "transformers.StaticCache",
    "transformers.TextStreamer",
    "transformers.cache_utils.CacheLayerMixin",
    "transformers.cache_utils.DynamicLayer",
    "transformers.cache_utils.DynamicSlidingWindowLayer",
    "transformers.cache_utils.StaticSlidingWindowLayer",
    "transformers.models.falcon.modeling_falcon",  # Falcon's attention has no public form
}
PRIVATE = {  # hook.py alone uses these
    "_attn_implementation": lambda: LlamaConfig(),
    "_can_set_attn_implementation": lambda: PreTrainedModel,
    "_model_mapping": lambda: AutoModelForCausalLM,
    "_split_heads": lambda: modeling_falcon.FalconAttention,
}
OF_TORCH = {  # where a model's weights are, and whether a tensor was changed, by module
    "ops.masks": {"_version"},
    "memory.base": {"_parameters"},
    "integration.weights": {"_modules", "_non_persistent_buffers_set", "_parameters", "_weight_bias"},
}
FALCON = ["query_key_value", "layer_idx", "inv_norm_factor", "is_causal", "dense"]  # of its attention
SIGNATURES = {  # the arguments that are passed to us, or that we pass
    "AttentionInterface.get_interface": (AttentionInterface.get_interface, ["attn_implementation", "default"]),
    "Cache.update": (Cache.update, ["key_states", "value_states", "layer_idx"]),
    "Cache.__init__": (Cache.__init__, ["layers"]),
    "FalconAttention.forward": (
        modeling_falcon.FalconAttention.forward,
        ["hidden_states", "alibi", "attention_mask", "position_ids", "layer_past"],
    ),
    "apply_rotary_pos_emb": (modeling_falcon.apply_rotary_pos_emb, ["q", "k", "cos", "sin"]),
    "sdpa": (AttentionInterface()["sdpa"], ["module", "query", "key", "value", "attention_mask", "dropout", "scaling"]),
}
LAYER_METHODS = {  # what transformers calls on a layer of a cache
    "activate_past_recording",
    "update",
    "lazy_initialization",
    "get_mask_sizes",
    "get_seq_length",
    "get_max_length",
    "offload",
    "prefetch",
    "reset",
    "reorder_cache",
    "crop",
    "batch_repeat_interleave",
    "batch_select_indices",
}


def test_the_list_of_public_names_is_complete():
    names = {name for module in SOURCES for late in (False, True) for name in imported(module, late)}
    used = {name for name in names if name.split(".")[0] == "transformers"}
    assert used == PUBLIC


@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_public_name_exists(name):
    module, _, attribute = name.rpartition(".")
    assert hasattr(importlib.import_module(module), attribute), f"transformers no longer has {name}"


@pytest.mark.parametrize("name", PRIVATE)
def test_private_name_exists(name):
    assert hasattr(PRIVATE[name](), name), f"transformers no longer has {name}: see less_cache/hook.py"


def own_names() -> set[str]:
    """Functions and methods of this package, and the attributes that it sets."""
    nodes = [node for module in SOURCES for node in ast.walk(tree(module))]
    functions = {node.name for node in nodes if isinstance(node, ast.FunctionDef)}
    return functions | {node.attr for node in nodes if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)}


@pytest.mark.parametrize("module", SOURCES)
def test_private_names_stand_in_the_hook_alone(module):
    attributes = {node.attr for node in ast.walk(tree(module)) if isinstance(node, ast.Attribute)}
    private = {name for name in attributes if name.startswith("_") and not name.startswith("__")}
    assert private - own_names() == (set(PRIVATE) if module == "integration.hook" else OF_TORCH.get(module, set()))


@pytest.mark.parametrize("name", FALCON)
def test_falcon_attention_has(name):
    attention = zoo.build("falcon").transformer.h[0].self_attention
    assert hasattr(attention, name), f"FalconAttention no longer has {name}: see less_cache/hook.py"


@pytest.mark.parametrize("function, arguments", SIGNATURES.values(), ids=SIGNATURES)
def test_signature(function, arguments):
    assert [name for name in inspect.signature(function).parameters if name != "self"][: len(arguments)] == arguments


def test_a_layer_has_every_method():
    abstract = CacheLayerMixin.__abstractmethods__
    public = {name for name, _ in inspect.getmembers(DynamicLayer, inspect.isfunction) if not name.startswith("_")}
    unused = {"get_max_cache_shape"}  # of 5.17: get_max_length by another name
    assert (abstract | public) - unused <= LAYER_METHODS, "transformers may call more methods of a layer now"
    assert vars(LESSLayer).keys() | vars(HoldingLayer).keys() >= LAYER_METHODS
