"""SmolLM2 drafts with 5 % of its cache and verifies with all of it: the same text in fewer forwards; runs on a CPU."""

import copy
from pathlib import Path

import torch
from transformers.generation.streamers import BaseStreamer

import less_cache
from less_cache import H2O, LESSCache, LESSKernels, models

KERNELS = Path(__file__).parents[1] / "hub" / "smollm2-135m-instruct-h2o-2400"
CHAPTER = Path(less_cache.__file__).parent / "data" / "pride-and-prejudice-chapter-19.txt"

model, tokenizer = models.load("HuggingFaceTB/SmolLM2-135M-Instruct")
inputs = tokenizer(CHAPTER.read_text(encoding="utf-8"), return_tensors="pt", truncation=True, max_length=512)
cache = LESSCache(model, policy=H2O(heavy=0.025, recent=0.025), kernels=LESSKernels.from_pretrained(KERNELS))
cache.activate_past_recording()  # rejected drafts are given back

draft = copy.copy(model)  # the same weights
draft.generation_config = copy.deepcopy(model.generation_config)
draft.generation_config.num_assistant_tokens = 5
draft.generation_config.num_assistant_tokens_schedule = "constant"
draft.generation_config.assistant_confidence_threshold = drafted = 0


def generate_draft(past_key_values=cache, **options):
    global drafted
    output = model.generate(past_key_values=past_key_values, **options)
    drafted += len(output.scores)
    return output


class Rounds(BaseStreamer):
    def __init__(self):
        self.lengths = []

    def put(self, value):
        self.lengths.append(value.shape[-1])

    def end(self):
        _, *self.lengths = self.lengths  # the first is the prompt


draft.generate, rounds = generate_draft, Rounds()
output = model.generate(**inputs, assistant_model=draft, streamer=rounds, max_new_tokens=128, do_sample=False)
assert torch.equal(output, model.generate(**inputs, max_new_tokens=128, do_sample=False)), "not what the full cache gives"
accepted = sum(rounds.lengths) - len(rounds.lengths)  # the last token of each round is the full cache's own
print(tokenizer.decode(output[0, inputs.input_ids.shape[1] :]))
print(f"{accepted} of {drafted} drafted tokens accepted ({accepted / drafted:.0%}): {len(rounds.lengths)} forwards, not 128")
