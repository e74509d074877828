"""The ceiling of a low-rank state: what is recovered where each head's attention to evicted tokens is replaced by its best
approximation of rank R, found with the queries, keys and kept sets of the text itself.

    python benchmarks/oracle.py MODEL TEXT --rank 8 --sequences 4 --decoded 512 --policy h2o --budget 52

For a KV head, E holds the attention weights of all decoded queries of its group (rows) to the tokens evicted when they
attend (columns), as shares of the whole softmax. φ(q) ψ(k)ᵀ with any φ and ψ has rank R; the best one in the least-squares
sense is E's truncated singular value decomposition. Negative entries are cut off, the rows normalised again. Queries and
keys are those of the model under this attention; the kept sets are the dense model's under the policy. One JSON line.
"""

import math
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch.nn.functional import cross_entropy
from transformers import Cache

from less_cache import LESSKernels, models
from less_cache.evaluation.perplexity import stretches
from less_cache.integration import hook
from less_cache.ops.attention import attention_logits
from less_cache.policies import policy_class
from less_cache.reports import machine, outputs
from less_cache.training.layers import TeacherLayer, TrainingLayer, roll_layers, teacher_cache
from less_cache.training.options import Example
from less_cache.training.simulate import Decode, columns

OVERSAMPLED, ITERATIONS = 8, 3  # of the randomised decomposition


class OracleLayer(TrainingLayer):
    """Attention of a block of decoded tokens to the kept tokens and, through `rank` singular vectors, to the evicted."""

    def __init__(self, teacher: TeacherLayer, decode: Decode, rank: int):
        super().__init__()
        self.teacher, self.decode, self.rank = teacher, decode, rank
        self.prompt_length = decode.keep.shape[-1]

    def attend(self, original, module, query_states, key_states, value_states, attention_mask, **kwargs):
        teacher, decode, p = self.teacher, self.decode, self.prompt_length
        keys = torch.cat([teacher.keys[:, :, :p], key_states], dim=2)
        values = torch.cat([teacher.values[:, :, :p], value_states], dim=2).float()
        n, c = decode.visible.shape[-2:]
        ordered_keys, ordered_values = columns(keys, decode.order, p), columns(values, decode.order, p)

        def logits(of: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
            return attention_logits(query_states, of, visible, teacher.scaling, teacher.softcap)

        folded = (~decode.keep).unsqueeze(2).expand(-1, -1, n, -1)
        everything = [
            logits(ordered_keys, decode.visible),
            logits(ordered_keys, decode.evicted),
            logits(keys[:, :, :p], folded),
        ]
        weights = torch.cat(everything, dim=-1).softmax(dim=-1)  # [b, g, s, n, c + c + p]
        evicted = weights[..., c:].flatten(2, 3)  # [b, g, s·n, c + p]
        left, singular, right = torch.svd_lowrank(evicted, q=self.rank + OVERSAMPLED, niter=ITERATIONS)
        best = (left[..., : self.rank] * singular[..., None, : self.rank]) @ right[..., : self.rank].transpose(-1, -2)
        weights = torch.cat([weights[..., :c], best.clamp_min(0).view_as(weights[..., c:])], dim=-1)
        weights = weights / weights.sum(dim=-1, keepdim=True)
        all_values = torch.cat([ordered_values, ordered_values, values[:, :, :p]], dim=2)
        output = (weights.flatten(2, 3) @ all_values).view(*weights.shape[:4], -1).flatten(1, 2)
        return output.transpose(1, 2).to(query_states.dtype), None


@torch.no_grad()
def main(
    model_name: Annotated[str, typer.Argument(metavar="MODEL", help="Folder, .gguf file or Hub id.")],
    text: Annotated[Path, typer.Argument(metavar="TEXT", help="UTF-8 text.")],
    rank: Annotated[list[int], typer.Option(metavar="R", help="Repeatable.")],
    sequences: int = 4,
    prompt_length: int = 512,
    decoded: int = 128,
    policy: str = "h2o",
    budget: Annotated[int, typer.Option(metavar="TOKENS", help="Kept per KV head.")] = 32,
    output: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the JSON line here too.")] = None,
) -> None:
    """Perplexity of the full cache, of the policy alone and with the best state of each rank."""
    torch.manual_seed(0)  # the decomposition is randomised
    model, tokenizer = models.load(model_name)
    hook.install()
    layers = LESSKernels.untrained(model).config.layers or []
    if len(layers) != model.config.get_text_config(decoder=True).num_hidden_layers:
        raise typer.BadParameter(f"{model_name}: expected a model of full-attention layers alone.")
    p = prompt_length
    example = Example(p, policy_class(policy).from_budget(budget))
    losses: dict[str, float] = {"full": 0.0, "policy": 0.0} | {f"rank {each}": 0.0 for each in rank}
    for tokens in stretches([text], tokenizer, sequences, p + decoded).split(1):
        dense = teacher_cache(model.config, layers)
        logits = {"full": model(tokens, past_key_values=dense, use_cache=True).logits[:, p - 1 :]}
        teachers = [layer for layer in dense.layers if isinstance(layer, TeacherLayer)]
        scores = [next(teacher.scores_after([example])) for teacher in teachers]
        decodes = roll_layers(teachers, example, scores, decoded)
        for each in (0, *rank):
            made = zip(teachers, decodes, strict=True)
            cache = Cache(layers=[OracleLayer(teacher, decode, each) for teacher, decode in made])
            after_prompt = model(tokens[:, p:], past_key_values=cache, use_cache=True).logits
            logits[f"rank {each}" if each else "policy"] = torch.cat([logits["full"][:, :1], after_prompt], dim=1)
        for name, by_token in logits.items():
            losses[name] += cross_entropy(by_token[0, :-1], tokens[0, p:], reduction="sum").item()
    perplexities = {name: math.exp(loss / (decoded * sequences)) for name, loss in losses.items()}
    lost = perplexities["policy"] - perplexities["full"]
    report = {
        "text": text.name,
        "sequences": sequences,
        "prompt_length": p,
        "decoded": decoded,
        "policy": example.policy.to_dict(),
        "perplexity": {name: round(value, 2) for name, value in perplexities.items()},
        "gap_recovered": {name: round((perplexities["policy"] - value) / lost, 3) for name, value in perplexities.items()},
        **machine.describe(model.device),
    }
    outputs.finish(report, output)


if __name__ == "__main__":
    typer.run(main)
