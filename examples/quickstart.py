"""SmolLM2 continues a chapter of a novel with 5 % of its cache; runs on a CPU."""

from pathlib import Path

import less_cache
from less_cache import H2O, LESSCache, LESSKernels, models

KERNELS = Path(__file__).parents[1] / "hub" / "smollm2-135m-instruct-h2o-2400"
CHAPTER = Path(less_cache.__file__).parent / "data" / "pride-and-prejudice-chapter-19.txt"

model, tokenizer = models.load("HuggingFaceTB/SmolLM2-135M-Instruct")
kernels = LESSKernels.from_pretrained(KERNELS)
prompts = kernels.config.training.get("prompts") or [1024]
longest = max(prompts)  # kernels are good for prompts as long as those that they were trained on
inputs = tokenizer(CHAPTER.read_text(encoding="utf-8"), return_tensors="pt", truncation=True, max_length=longest)
policy = H2O(heavy=0.025, recent=0.025)  # fractions of the prompt; whole numbers are tokens

for name, cache in {
    "H2O alone": LESSCache(model, policy=policy),
    "H2O with LESS": LESSCache(model, policy=policy, kernels=kernels),
}.items():
    output = model.generate(**inputs, past_key_values=cache, max_new_tokens=40, do_sample=False)
    footprint = cache.memory_footprint()
    print(f"\n{name}: {footprint.total / 1e6:.1f} MB instead of {footprint.full_cache / 1e6:.1f}, {footprint.saved:.0%} saved")
    print(tokenizer.decode(output[0, inputs.input_ids.shape[1] :]))
