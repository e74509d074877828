"""How to train, and what each sequence is used for."""

import dataclasses
import math
import random

from less_cache.errors import LESSError
from less_cache.memory import MEMORIES
from less_cache.policies import EvictionPolicy, policy_class


@dataclasses.dataclass(frozen=True)
class TrainingOptions:
    """How to train.

    Args:
        policies: Names in `POLICIES`; one is drawn for each prompt, and one named twice, twice as often.
        least_budget, most_budget: Tokens kept, as a fraction of the tokens seen; drawn log-uniformly for each prompt.
        prompts: Prompt lengths; one named twice is drawn twice as often.
        prompts_per_sequence: How many of them are drawn for the sequences of a step, which are as long as the longest needs.
        decoded: Tokens decoded after each prompt.
        sequences: Sequences captured for the first stage; one in eight is left out there, and measures what each layer has
            reached, with the first stage or without. All stages draw stretches of the same texts, the second perhaps these too.
        layerwise_steps: Steps a layer of the first stage, a sequence each: each layer matches its own dense output.
        joint_steps: Steps of the second stage: all layers run under LESS, the model's output distribution is matched, what each
            layer hands on, and what its attention reads.
        batch_size: Sequences a step of the second stage.
        layerwise_learning_rate: Adam's, at the start; falls to 0 in a straight line.
        joint_learning_rate: Muon's and Adam's; rises over the first steps, then falls in the same way.
        memory, rank, hidden_size: Kind and sizes of the kernels, as in `LESSConfig`; one rank, or one for each layer that is
            trained.
        seed: Of the initial weights and of every draw.
        checkpoint_every: Steps between checkpoints of the second stage.
    """

    policies: tuple[str, ...] = ("h2o", "h2o", "sink_recent", "corm")
    least_budget: float = 0.02
    most_budget: float = 0.2
    prompts: tuple[int, ...] = (256, 512, 512, 1024, 1024, 2048) * 2 + (4096,)
    prompts_per_sequence: int = 1
    decoded: int = 128
    sequences: int = 24
    layerwise_steps: int = 0
    joint_steps: int = 800
    batch_size: int = 2
    layerwise_learning_rate: float = 2e-3
    joint_learning_rate: float = 8e-3
    memory: str = "soft_centroids"
    rank: int | tuple[int, ...] = 8
    hidden_size: int = 64
    seed: int = 0
    checkpoint_every: int = 10

    def __post_init__(self) -> None:
        for name in self.policies:
            policy_class(name)
        for name in ("policies", "prompts"):
            if not getattr(self, name):
                raise LESSError(f"TrainingOptions: expected at least one of {name}, got none.")
        one = ("prompts_per_sequence", "decoded", "sequences", "batch_size", "hidden_size", "checkpoint_every")
        least = dict.fromkeys(one, 1) | dict.fromkeys(("layerwise_steps", "joint_steps"), 0)
        for name, smallest in least.items():
            if getattr(self, name) < smallest:
                raise LESSError(f"TrainingOptions: expected {name} to be at least {smallest}, got {getattr(self, name)}.")
        if min(self.prompts) < 1:
            raise LESSError(f"TrainingOptions: expected prompts of at least 1 token, got {min(self.prompts)}.")
        for name in ("layerwise_learning_rate", "joint_learning_rate"):
            if not 0 < getattr(self, name) < math.inf:
                raise LESSError(f"TrainingOptions: expected {name} to be a number above 0, got {getattr(self, name)}.")
        if not 0 < self.least_budget <= self.most_budget < 1:
            raise LESSError(
                "TrainingOptions: expected 0 < least_budget <= most_budget < 1, "
                f"got {self.least_budget} and {self.most_budget}."
            )
        if not self.layerwise_steps and not self.joint_steps:
            raise LESSError("TrainingOptions: expected layerwise_steps or joint_steps, or both, got 0 and 0.")
        if self.memory not in MEMORIES:
            raise LESSError(f"TrainingOptions: expected memory to be one of {', '.join(MEMORIES)}, got {self.memory!r}.")
        if self.sequences < 2 and self.layerwise_steps:
            raise LESSError(f"TrainingOptions: expected 2 or more sequences, one to hold out, got {self.sequences}.")

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence."""
        return max(self.prompts) + self.decoded

    @property
    def held_out(self) -> range:
        """Captured sequences that measure each layer and are not trained on in the first stage: the last ones."""
        return range(self.sequences - max(1, self.sequences // 8), self.sequences)


@dataclasses.dataclass(frozen=True)
class Example:
    """One prompt to decode after: its length, and the policy with its token counts."""

    prompt_length: int
    policy: EvictionPolicy


def draw_examples(options: TrainingOptions, stage: str, index: int) -> list[Example]:
    """What sequence `index` of a stage is used for, shortest prompt first; a function of the seed and its arguments.

    The sequences of a step have prompts of the same lengths, so that its processes take equally long.
    """
    of_step = random.Random(f"{options.seed}/{stage}/lengths/{index // options.batch_size}")
    lengths = sorted(of_step.sample(options.prompts, min(len(options.prompts), options.prompts_per_sequence)))
    draw = random.Random(f"{options.seed}/{stage}/{index}")
    examples = []
    for length in lengths:
        fraction = math.exp(draw.uniform(math.log(options.least_budget), math.log(options.most_budget)))
        budget = max(5, round(fraction * (length + options.decoded)))
        examples.append(Example(length, policy_class(draw.choice(options.policies)).from_budget(budget)))
    return examples


def falling(peak: float, done: float) -> float:
    """A learning rate that falls from `peak` to 0 in a straight line as `done` goes from 0 to 1."""
    return peak * (1 - done)
