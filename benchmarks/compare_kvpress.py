"""LESS beside kvpress on the same weights, text and tokens kept: bytes, perplexity, and speed beside the own full cache.

    python benchmarks/compare_kvpress.py MODEL KERNELS TEXT [--budget 39] [--environment DIR] [--output FILE]

kvpress needs an older transformers, so it gets an environment of its own, made once in DIR (default: a temporary one) and
given the same tokens. It compresses the prompt and then grows with every token; its decoding presses stay at their size.
Prints one JSON line. Speeds of different versions of transformers are not compared, only ratios.
"""

import argparse
import dataclasses
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from kvpress_side import decode_seconds, ratios
from safetensors.torch import save_file
from transformers import DynamicCache

from less_cache import H2O, LESSCache, LESSKernels, models
from less_cache.evaluation.perplexity import measure, stretches
from less_cache.reports import machine, outputs

KVPRESS, TRANSFORMERS = "kvpress==0.5.5", "transformers>=5.2,<5.3"


def environment(folder: Path) -> Path:
    """The interpreter of an environment with kvpress, made where it is missing."""
    python = folder / "bin" / "python"
    if not python.exists() or subprocess.run([python, "-c", "import kvpress"], capture_output=True).returncode:
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        torch_first = f"torch=={torch.__version__.split('+')[0]}"
        for wanted in ([torch_first], [torch_first, KVPRESS, TRANSFORMERS]):
            subprocess.run([python, "-m", "pip", "install", "--quiet", *wanted], check=True)
    return python


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of a transformers model, float32 or bfloat16")
    parser.add_argument("kernels", help="folder or Hub id")
    parser.add_argument("text", type=Path, help="UTF-8 text")
    parser.add_argument("--budget", type=int, default=39, help="tokens kept per KV head")
    parser.add_argument("--sequences", type=int, default=16)
    parser.add_argument("--prompt-length", type=int, default=512)
    parser.add_argument("--decoded", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5, help="timed runs of each")
    parser.add_argument("--environment", type=Path)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()

    model, tokenizer = models.load(args.model)
    kernels, policy = LESSKernels.from_pretrained(args.kernels), H2O.from_budget(args.budget)
    tokens = stretches([args.text], tokenizer, args.sequences, args.prompt_length + args.decoded)
    with tempfile.TemporaryDirectory() as folder:
        python = environment((args.environment or Path(folder) / "environment").absolute())
        save_file({"tokens": tokens}, Path(folder) / "tokens.safetensors")
        arguments = [args.model, f"{folder}/tokens.safetensors", args.prompt_length, args.budget, args.rounds]
        side = Path(__file__).with_name("kvpress_side.py")
        done = subprocess.run([python, side, *map(str, arguments)], check=True, stdout=subprocess.PIPE, text=True)
    theirs = json.loads(done.stdout.splitlines()[-1])

    ours = [dataclasses.asdict(row) for row in measure(model, tokens, policy, kernels, args.prompt_length)]
    caches = {
        "full": lambda: DynamicCache(config=model.config),
        "policy": lambda: LESSCache(model, policy),
        "less": lambda: LESSCache(model, policy, kernels),
    }
    runs = {
        name: lambda make=make: decode_seconds(model, tokens[:1], make(), args.prompt_length) for name, make in caches.items()
    }
    report = {
        "model": Path(args.model).name,
        "kernels_sha256": kernels.config.sha256,
        "data": args.text.name,
        "budget": args.budget,
        "sequences": args.sequences,
        "prompt_length": args.prompt_length,
        "decoded": args.decoded,
        **machine.describe(torch.device("cpu")),
        "less_cache": {"rows": ours, "speed": ratios(runs, args.rounds)},
        "kvpress": theirs,
    }
    outputs.finish(report, args.output)


if __name__ == "__main__":
    main()
