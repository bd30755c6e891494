"""A config, checked and resolved into what a run needs.

An `Experiment` is pure data; `launch.lab` trains and evaluates it.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from models.task import matrix_params, scaled
from models.transformer import TransformerConfig
from qat.policy import Policy
from qat.spelling import expected_one_of
from qat.training import flops
from qat.training.results import hash_of
from qat.training.scaling import Scaling
from qat.training.schedule import Schedule, branches, warmup_cosine
from qat.training.tokenizer import parse_tokenizer

ORIGINS = ("init", "teacher")  # keys that name checkpoints, see launch.origin
_OF_EXPERTS = ("experts", "experts_per_token", "capacity_factor", "balance")  # keys of the model
_SCHEDULES = ("cosine", "wsd")
# What is not data to the compiled programs, beside the structure of the policy.
_COMPILED = (
    "model",
    "batch_size",
    "accumulation",
    "data",
    "weight_decay",
    "not_decayed",
    "clip_norm",
    "scaling",
    "mesh",
    "teacher",
)


@dataclasses.dataclass(frozen=True)
class Experiment:
    """One run, resolved and checked.

    Attributes:
        config: plain nested dict; its hash identifies the run. What a run without a checkpoint to
            begin with, without a teacher, or without experts, says of these is left out.
        model: shape.
        policy: precision.
        scaling: size relative to the model whose learning rate was tuned.
        schedule: learning rate by step.
        branches: schedules of smaller budgets that branch off this run, shortest first.
    """

    config: Mapping[str, Any]
    model: TransformerConfig
    policy: Policy
    scaling: Scaling
    schedule: Schedule
    branches: tuple[Schedule, ...]

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "Experiment":
        """Resolves a config.

        Raises:
            ValueError: a value is out of range; the message names it.
        """
        config = {key: each for key, each in config.items() if each or key not in ORIGINS}
        _check(config)
        config["model"] = _without_experts(config["model"])
        model = TransformerConfig(**{**config["model"], "vocabulary": _vocabulary(config)})
        scaling = _scaling(model, **config["scaling"])
        *branches, schedule = _schedules(config)
        return cls(
            config,
            scaled(model, scaling),
            Policy.parse(config["policy"]),
            scaling,
            schedule,
            tuple(branches),
        )

    @property
    def tokens(self) -> int:
        """D: training tokens, whole batches."""
        return self.tokens_of(self.schedule)

    def tokens_of(self, schedule: Schedule) -> int:
        """Training tokens of the run's schedule or of a branch's."""
        return self.tokens_at(schedule.total_steps)

    def tokens_at(self, step: int) -> int:
        """Training tokens of a number of steps."""
        return step * _tokens_per_step(self.config)

    def train_flops(self, tokens: int) -> int:
        """Analytic FLOPs of training on this many tokens, which a teacher reads too."""
        model, length = self.model, self.config["data"]["sequence_length"]
        shape = (matrix_params(model), model.layers, model.width, length)
        taught = tokens * flops.forward_flops_per_token(*shape) if "teacher" in self.config else 0
        return flops.train_flops(tokens, *shape) + taught

    @property
    def alone(self) -> bool:
        """Whether it cannot train beside others: it has branches, or begins with a checkpoint."""
        return bool(self.branches) or any(name in self.config for name in ORIGINS)

    @property
    def loss_limit(self) -> float:
        """Nats per token above which a run has diverged: three times a uniform guess's loss.

        Norms and clipped gradients can keep a run finite at any learning rate. Then it wanders far
        above a fresh model's loss, which is about that of guessing.
        """
        return 3 * math.log(self.model.vocabulary)

    @property
    def shape(self) -> str:
        """Identifies the compiled programs: everything that is not data to them."""
        return hash_of({"size": self.size, "policy": self.policy.structure})

    @property
    def size(self) -> str:
        """Identifies the compiled programs but for the policy's structure."""
        return hash_of({key: self.config[key] for key in _COMPILED if key in self.config})

    @property
    def config_hash(self) -> str:
        """Identifies the config."""
        return hash_of(self.config)


def has_shape(config: Mapping[str, Any]) -> bool:
    """Whether a config says how large its model is; else a checkpoint does, see `launch.origin`."""
    return "width" in config.get("model", {})


def _without_experts(model: Mapping[str, Any]) -> dict[str, Any]:
    """The shape of a model, without the keys of experts if it has none."""
    left_out = () if model.get("experts") else _OF_EXPERTS
    return {key: each for key, each in model.items() if key not in left_out}


def _tokens_per_step(config: Mapping[str, Any]) -> int:
    tokens: int = config["batch_size"] * config["data"]["sequence_length"]
    return tokens


def _schedules(config: Mapping[str, Any]) -> list[Schedule]:
    """Those of the branches, shortest first, and that of the run.

    Raises:
        ValueError: no schedule has that name, a budget is less than a batch or more than the run.
    """
    options = dict(config["schedule"])
    name, shorter = options.pop("name"), sorted(options.pop("branches"))
    budgets = [*shorter, config["tokens"]]
    tokens_per_step = _tokens_per_step(config)
    for tokens in budgets:
        if not isinstance(tokens, int):
            raise ValueError(
                f"schedule.branches = {tuple(shorter)}: expected whole numbers of tokens, such as "
                f"({int(tokens)},)"
            )
        if tokens < tokens_per_step:
            raise ValueError(
                f"tokens = {tokens} is less than one batch of {tokens_per_step} tokens"
            )
    steps = [tokens // tokens_per_step for tokens in budgets]
    if name not in _SCHEDULES:
        raise ValueError(expected_one_of("schedule", name, _SCHEDULES))
    if name == "wsd":
        if len(set(steps)) < len(steps) or steps[-1] < max(steps):
            raise ValueError(
                f"schedule.branches = {tuple(shorter)}: expected different numbers of tokens, "
                f"whole batches apart and below tokens = {config['tokens']}"
            )
        return branches(config["learning_rate"], steps, **options)
    if shorter:
        raise ValueError(f"schedule {name!r} has no branches; expected schedule.name = 'wsd'")
    return [
        warmup_cosine(
            config["learning_rate"],
            steps[0],
            options["warmup_fraction"],
            options["final_fraction"],
        )
    ]


def _vocabulary(config: Mapping[str, Any]) -> int:
    """Rows of the embedding: as many as stated, else as the tokenizer has ids.

    Raises:
        ValueError: fewer are stated than there are ids.
    """
    stated: int = config["model"]["vocabulary"]
    ids = parse_tokenizer(config["data"]["tokenizer"]).vocabulary_size
    if stated and stated < ids:
        raise ValueError(
            f"model.vocabulary = {stated} is less than the {ids} ids of tokenizer "
            f"{config['data']['tokenizer']!r}; 0 means as many"
        )
    return stated or ids


def _scaling(
    model: TransformerConfig, rule: str, base_width: int, base_layers: int, base_heads: int
) -> Scaling:
    """The size of a model relative to its base; 0 stands for the model's own size."""
    width = model.width / (base_width or model.width)
    heads = model.heads / (base_heads or model.heads)
    return Scaling.of(rule, width, model.layers / (base_layers or model.layers), width / heads)


def _check(config: Mapping[str, Any]) -> None:
    """What no other room checks.

    Raises:
        ValueError: a number is out of range, or a part is missing.
    """
    if not has_shape(config):
        raise ValueError(
            "the config has no shape: one like configs/finetune.py wants --config.init=CHECKPOINT, "
            "one like configs/distill.py is for launch.distill; expected one like configs/tiny.py"
        )
    if "writing" in config and "teacher" not in config:
        raise ValueError("writing: expected a teacher that writes; launch.distill names one")
    numbers = {**config, **config["data"]}
    least = {
        "batch_size": 1,
        "accumulation": 1,
        "sequence_length": 1,
        "evaluation_batches": 1,
        "weight_decay": 0,
        "clip_norm": 0,
        "seed": 0,
    }
    for name, lowest in least.items():
        if not lowest <= numbers[name] < 2**32:
            raise ValueError(f"{name} = {numbers[name]}: expected at least {lowest}, below 2**32")
    if config["batch_size"] % config["accumulation"]:
        raise ValueError(
            f"batch_size = {config['batch_size']} is not a multiple of accumulation = "
            f"{config['accumulation']}"
        )
