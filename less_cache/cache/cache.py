"""The cache that users pass to `generate`."""

import copy
import os
import weakref
from collections.abc import Iterator

import torch
from transformers import Cache, PreTrainedConfig, PreTrainedModel

from less_cache.cache import footprint, guards, reading, snapshot
from less_cache.cache.building import built, forked
from less_cache.cache.footprint import MemoryFootprint
from less_cache.cache.forward import Forward
from less_cache.cache.layer import LESSLayer
from less_cache.cache.options import Heads, Options, with_budget
from less_cache.cache.own import holds_other_rows, own_layers
from less_cache.errors import LESSError
from less_cache.files.paths import expanded
from less_cache.integration import hook
from less_cache.integration.families import PREFIX_TUNING, check_supported, full_attention_layers, warn_untested
from less_cache.kernels.check import check_kernels
from less_cache.kernels.kernels import LESSKernels
from less_cache.policies import EvictionPolicy


class LESSCache(Cache):
    """A KV cache of constant size: a sparse policy keeps a few tokens, a learned state remembers all the others.

        out = ( φ(q) H + Σ_{i kept} e^{q·k_i/√d} v_i ) / ( φ(q) z + Σ_{i kept} e^{q·k_i/√d} )

    Pass it to `generate` and change nothing else. Full-attention layers are compressed; sliding-window and linear
    layers keep the model's own cache. `get_seq_length()` is the number of tokens seen, not kept. The prompt gets
    ordinary full attention, then one selection; `prefill_chunk_size` bounds its memory as well. One cache serves one
    batch of conversations; `reset()` makes it ready for others.

    Differs from a `DynamicCache`: no attention weights are returned under `output_attentions`, only the first block of a text
    carries gradients (asking for later ones is an error), and a model in training mode is refused.

    Args:
        model: The model, or its config. With the model, the kernels' base model is checked too.
        policy: What to keep, such as `H2O(heavy=64, recent=64)`. Default: the policy that the kernels were trained with;
            without kernels `AttentionMatching`, fitted, in int4 slots, with adaptive heads and the untrained state.
        kernels: φ and ψ; None: under a policy of your own, what is not kept is lost.
        static: Fixed shapes and addresses, so that `generate` compiles decoding, as it does with a `StaticCache` on a GPU.
            The policy must have a budget, no tokens can be given back (`crop`), and only blocks of several tokens are checked
            against what was seen.
        budget: Of the default policy: tokens a KV head (an int), or a share of the bytes that a 16-bit full cache has of the
            prompt, all that is held counted (a float). Default: 5 %.
        heads: How the budget is shared out: "equal", "adaptive" (one threshold on the scores over all heads of all layers, for
            each prompt; layers choose when the last one has read it), `HeadBudgets` or "profile", those beside the kernels
            (layers choose one by one), or shares of your own, `[g]` for each layer under LESS, 1 on average.
        slots: How kept keys and values are stored: "float" (as they are), "int8" or "int4".
        fit: Whether kept tokens get biases and values at a prompt's end with which they give reference queries what all tokens
            gave them. Default: as the policy wants, where it is known how the model's queries turn.

    Raises:
        LESSError: The model cannot work with a LESSCache, or the kernels belong to another model.

    Source: Dong et al., "Get More with LESS", ICML 2024 (arXiv 2402.09398).

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> from less_cache import H2O
    >>> heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    >>> config = LlamaConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, vocab_size=99, **heads)
    >>> model = LlamaForCausalLM(config).eval()
    >>> cache = LESSCache(model, policy=H2O(heavy=4, recent=4))
    >>> options = {"min_new_tokens": 10, "max_new_tokens": 10, "do_sample": False}
    >>> model.generate(torch.arange(40)[None], past_key_values=cache, **options).shape
    torch.Size([1, 50])
    >>> cache.get_seq_length(), cache.layers[0].keys.shape
    (49, torch.Size([1, 2, 9, 8]))
    """

    def __init__(
        self,
        model: PreTrainedModel | PreTrainedConfig,
        policy: EvictionPolicy | None = None,
        kernels: LESSKernels | None = None,
        static: bool = False,
        budget: int | float | None = None,
        heads: Heads | None = None,
        slots: str | None = None,
        fit: bool | None = None,
    ):
        config = model if isinstance(model, PreTrainedConfig) else getattr(model, "config", None)
        if not isinstance(config, PreTrainedConfig):
            raise LESSError(f"LESSCache: expected a transformers model or its config, got {type(model).__name__}.")
        options = Options.chosen(config, policy, kernels, static, budget, heads, slots, fit)
        loaded_model = None if isinstance(model, PreTrainedConfig) else model
        check_supported(config, loaded_model)
        warn_untested(config.model_type)
        if options.kernels is not None:
            check_kernels(options.kernels, config, full_attention_layers(config), loaded_model)
        super().__init__(layers=built(config, loaded_model, options, static))
        self._forward = Forward(self.layers)
        self._emptied: set[int] = set()  # of the model's own layers, those that `reset` left in the shapes of another text
        self.seen_mask: torch.Tensor | None = None  # which seen tokens the mask of the present forward shows, `[b, t]`
        self.policy = options.policy
        self.kernels = options.kernels
        self.options = options
        self.config = config
        self._may_warn = True  # once about positions that the model was not trained for
        self._model = None if loaded_model is None else weakref.ref(loaded_model)  # asked for its weights when saved
        hook.install()

    @property
    def model(self) -> PreTrainedModel | None:
        """The model that the cache was made for, while it is there; None for a config."""
        return None if self._model is None else self._model()

    def __getstate__(self) -> dict:
        return {**vars(self), "_model": None}  # a reference to a model is nothing to pickle

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        hook.install()  # in this process no cache may have been made yet

    @classmethod
    def from_pretrained(
        cls,
        folder_or_repo: str | os.PathLike,
        model: PreTrainedModel | PreTrainedConfig,
        policy: EvictionPolicy | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        budget: int | float | None = None,
        static: bool = False,
        heads: Heads | None = None,
    ) -> "LESSCache":
        """A cache with the kernels of a folder or Hub repository.

        Args:
            folder_or_repo: A folder, or a Hub id.
            model: The model, or its config.
            policy: What to keep. Default: the policy that the kernels were trained with.
            revision: Branch, tag or commit of a repository; default: main.
            token: For private and gated repositories; default: the one of `hf auth login`.
            budget: What the kernels' policy keeps: tokens (an int), or a share of the prompt (a float). Default: its own.
            static, heads: As in `LESSCache`.
        """
        kernels = LESSKernels.from_pretrained(folder_or_repo, revision=revision, token=token)
        return cls(model, policy=with_budget(budget, policy, kernels), kernels=kernels, static=static, heads=heads)

    @classmethod
    def for_model(
        cls,
        model: PreTrainedModel | PreTrainedConfig,
        budget: int | float | None = None,
        policy: EvictionPolicy | None = None,
        token: str | bool | None = None,
        static: bool = False,
        heads: Heads | None = None,
    ) -> "LESSCache":
        """A cache with the kernels that are known for this model.

        Looks into the catalogue that is installed with the package, then on the Hub, for kernels of the model's weights,
        wherever they were loaded from; of a config, for kernels of its name. The log of `less_cache` and
        `cache.kernels.source` say which were taken, one warning that there were none: then the untrained state is used.

        Args:
            model: The model, or its config.
            budget: What the kernels' policy keeps: tokens (an int), or a share of the prompt (a float). Default: its own.
            policy: What to keep, instead of the policy that the kernels were trained with.
            token: For private and gated repositories; default: the one of `hf auth login`.
            static, heads: As in `LESSCache`.
        """
        from less_cache.hub.resolution import kernels_for  # the network: when it is asked for

        kernels = kernels_for(model, token)
        return cls(model, policy=with_budget(budget, policy, kernels), kernels=kernels, static=static, heads=heads)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Called by the model's attention. Raises `LESSError` after a forward that was interrupted."""
        if layer_idx >= len(self.layers):
            raise LESSError(
                f"Layer {layer_idx}: this cache belongs to another model, of {len(self.layers)} layers. "
                "Make a LESSCache for each model."
            )
        layer = self.layers[layer_idx]
        if not isinstance(layer, LESSLayer):
            self._reach(layer_idx, "update", rows=key_states.shape[0])
        elif layer.checks(key_states.shape[-2]):
            self.check_whole()
            self._hide_seen()
            self._may_warn = self._may_warn and not guards.warns_of_length(self.config, self.get_seq_length(layer_idx))
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Called where a mask is made. That of a layer under LESS covers new tokens alone; what it hides of those before comes
        through the hook, as `seen_mask`.
        """
        self.seen_mask = None
        layer = self.layers[layer_idx]
        if isinstance(layer, LESSLayer) and not torch.compiler.is_compiling():
            hook.expect_mask(self)
        return super().get_mask_sizes(query_length, layer_idx)

    def _hide_seen(self) -> None:
        """Drop the seen tokens that the forward's mask hides, such as what was written after the end of a row."""
        visible, self.seen_mask = self.seen_mask, None
        less_layers = [layer for layer in self.layers if isinstance(layer, LESSLayer)]
        hidden = less_layers[0].hidden_by(visible)
        for layer in less_layers:
            layer.hidden = hidden  # dropped with the forward's tokens, once these are accepted

    def update_conv_state(self, conv_states: torch.Tensor, layer_idx: int, state_idx: int = 0, **kwargs) -> torch.Tensor:
        """Called by a model's linear attention."""
        self._reach(layer_idx, "convolution", state_idx, rows=conv_states.shape[0])
        return super().update_conv_state(conv_states, layer_idx, state_idx, **kwargs)

    def update_recurrent_state(
        self, recurrent_states: torch.Tensor, layer_idx: int, state_idx: int = 0, **kwargs
    ) -> torch.Tensor:
        """Called by a model's linear attention."""
        self._reach(layer_idx, "recurrence", state_idx, rows=recurrent_states.shape[0])
        return super().update_recurrent_state(recurrent_states, layer_idx, state_idx, **kwargs)

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> torch.Tensor | None:
        """Called by a model's linear attention, which changes in place what it gets."""
        self._reach(layer_idx, "convolution in place", state_idx)
        return super().get_conv_state(layer_idx, state_idx)

    def _reach(self, layer_idx: int, what: str, index: int = 0, rows: int | None = None) -> None:
        """A layer of the model's own takes tokens in, of so many `rows`."""
        if torch.compiler.is_compiling():
            return
        self._forward.reach(self.layers, layer_idx, what, index)
        if layer_idx in self._emptied and rows is not None:
            self._emptied = self._emptied - {layer_idx}
            if holds_other_rows(self.layers[layer_idx], rows):
                self.layers[layer_idx] = own_layers(self.config, static=True)[layer_idx]

    def check_whole(self) -> None:
        """Raise `LESSError` where a forward ended between two layers, or within one."""
        self._forward.check_whole(self.layers)

    def reset(self) -> None:
        """Forget everything: the next text is a new one."""
        super().reset()
        own = {index for index, layer in enumerate(self.layers) if not isinstance(layer, LESSLayer)}
        if self.is_compileable:
            self._emptied = own  # all stays where it is, until a text of other rows comes
        else:
            anew = own_layers(self.config, static=False)  # transformers' layers keep the shapes that they had, and record on
            self.layers = [anew[index] if index in own else layer for index, layer in enumerate(self.layers)]
        self._forward.reset()

    def __iter__(self) -> Iterator[tuple[torch.Tensor | None, ...]]:
        """Keys, values and window of each layer, as a `DynamicCache` gives them: under LESS those of the kept tokens, without
        the state of the others, `[b, g, c, d]`, and None for the window.
        """
        for layer in self.layers:
            yield getattr(layer, "keys", None), getattr(layer, "values", None), getattr(layer, "_sliding_window_tensor", None)

    @property
    def max_cache_len(self) -> int:
        """What PEFT asks for under prefix tuning, to put a cache of its own in this one's place. Raises `LESSError`."""
        raise LESSError(f"LESSCache cannot work with prefix tuning: {PREFIX_TUNING}. Call generate without past_key_values.")

    def crop(self, tokens_to_remove: int) -> None:
        """Give back the last `-tokens_to_remove` tokens, as assisted decoding does; all layers or, with `LESSError`, none.

        Possible for tokens that came since the last `crop`, after `activate_past_recording()`.
        """
        self.check_whole()
        for layer in self.layers:
            if isinstance(layer, LESSLayer):
                layer.check_crop(tokens_to_remove)
        super().crop(tokens_to_remove)
        self._forward.reset()

    def read(
        self, model: PreTrainedModel, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, chunk_size: int = 512
    ) -> None:
        """Read a prompt twice, so that what nothing in it points at is found when a later question asks for it.

        First as `generate` does; then the model repeats it, and what that attends to counts as well when tokens are chosen.
        Nothing of the second pass stays. Go on with `generate` and the whole conversation, which begins with this prompt.

        Args:
            model: The model.
            input_ids: The prompt, `[b, n]`, padded on the left.
            attention_mask: 0 at padding, `[b, n]`; None: there is none.
            chunk_size: Most tokens of a row that are repeated at once; the choice does not depend on it.

        Raises:
            LESSError: The policy does not choose by reference queries, or the cache has seen tokens already.
        """
        reading.read(self, model, input_ids, attention_mask, chunk_size)

    def fork(self) -> "LESSCache":
        """A cache that has seen the same and goes its own way: one prefix, many continuations.

        Tensors are copied, which is little; kernels and policy are shared. `copy.deepcopy` does the same.
        """
        other = copy.copy(self)
        other._model = self._model
        other._forward = copy.deepcopy(self._forward)
        other.layers = forked(self.layers)
        return other

    def __deepcopy__(self, memo: dict) -> "LESSCache":
        return self.fork()

    def save(self, path: str | os.PathLike) -> None:
        """Write what the cache has seen to a safetensors file, in one atomic step; `load` goes on from there, bit by bit.

        The kernels are not in the file, only their digest. What is recorded for `crop` is left out.
        """
        self.check_whole()
        snapshot.save(self, expanded(path))

    @classmethod
    def load(
        cls,
        path: str | os.PathLike,
        model: PreTrainedModel | PreTrainedConfig,
        kernels: LESSKernels | None = None,
        static: bool = False,
    ) -> "LESSCache":
        """The cache that `save` wrote, on the model's device, with the policy that it had.

        Args:
            path: The file.
            model: The same model, or its config, which cannot tell one set of weights from another.
            kernels: The same kernels; None if the cache had none.
            static: Fixed shapes, as in `LESSCache`, whether the saved cache had them or not.

        Raises:
            LESSError: The cache was saved for another model or other kernels, or the file is damaged.
        """
        return snapshot.load(cls, expanded(path), model, kernels, static)

    def memory_footprint(self) -> MemoryFootprint:
        """Bytes held now, and what a full cache would take for as many tokens."""
        return footprint.measure(self.layers)
