"""Declarative description of the small tasks on which the network is meta-trained."""

from __future__ import annotations

import math
import random
from dataclasses import asdict, dataclass
from typing import Any

from ..config import InputError


# Raised where a seed gives another group than before
POPULATION_VERSION = 7

# Held-out examples of every task: the first part is what a controller may look at, the second one judges runs.
NUM_CONTROLLER, NUM_EVAL = 128, 256
# The only real data set of the population; it bounds how many training examples are left beside the held-out ones.
NUM_DIGITS = 1797

KINDS = {"mlp": 0.34, "conv": 0.20, "bag": 0.12, "rnn": 0.14, "attention": 0.20}
OPTIMIZERS = {"adam": 0.40, "adamw": 0.25, "sgdm": 0.25, "sgd": 0.10}
# Steps and batch sizes are capped where one step is expensive, widths and lengths carry the diversity there.
MIN_STEPS = 80
MAX_STEPS = {"mlp": 800, "conv": 450, "bag": 800, "rnn": 350, "attention": 350}
# Measured over estimated seconds.
COST_FACTORS = {"mlp": 0.42, "conv": 1.0, "bag": 0.6, "rnn": 0.5, "attention": 0.9}
PRETRAINED_SHARE = {"mlp": 0.2, "conv": 0.25, "bag": 0.2, "rnn": 0.25, "attention": 0.6}
# Seeds from here on draw long runs: what is learnt in 800 steps at most does not carry over to thousands, nor from
# models that were pretrained for a moment to those that were pretrained well.
LONG_SEED = 100_000
LONG_KINDS = {"mlp": 0.2, "conv": 0.08, "bag": 0.2, "rnn": 0.08, "attention": 0.44}
LONG_MIN_STEPS = 300
LONG_MAX_STEPS = {"mlp": 2500, "conv": 900, "bag": 2500, "rnn": 700, "attention": 1200}
LONG_PRETRAINED_SHARE = {"mlp": 0.5, "conv": 0.5, "bag": 0.5, "rnn": 0.5, "attention": 0.9}
# Seeds from here on draw what the bounds on steps and examples keep the others from: up to a hundred passes over little
# data. A network that never saw them extrapolates far from the right rate.
EXTENDED_SEED = 200_000
EXTENDED_KINDS = {"mlp": 0.54, "conv": 0.13, "bag": 0.18, "rnn": 0.15}
EXTENDED_MIN_STEPS = 400
EXTENDED_MAX_STEPS = {"mlp": 4000, "conv": 1500, "bag": 4000, "rnn": 1500}
EXTENDED_PRETRAINED_SHARE = {"mlp": 0.1, "conv": 0.0, "bag": 0.1, "rnn": 0.0}
# Seeds from here on draw runs of a few dozen steps, where there is no time to find the rate slowly. Plain SGD with
# batch-norm, which bears rates that others do not, has a larger share.
SHORT_SEED = 300_000
SHORT_KINDS = {"mlp": 0.24, "conv": 0.30, "bag": 0.12, "rnn": 0.08, "attention": 0.26}
SHORT_MIN_STEPS, SHORT_MAX_STEPS = 20, 160
SHORT_PRETRAINED_SHARE = {"mlp": 0.2, "conv": 0.1, "bag": 0.2, "rnn": 0.3, "attention": 0.75}
SHORT_CONV_OPTIMIZERS = {"adam": 0.25, "adamw": 0.15, "sgdm": 0.25, "sgd": 0.35}
# Seeds from here on draw wide and deep models. The size of an update relative to its matrix means another thing there, and
# how it goes with width and depth differs between kinds of models: from small ones alone, a network took the rates of
# ResNet-18 to be several times too high.
LARGE_SEED = 400_000
LARGE_KINDS = {"mlp": 0.36, "conv": 0.48, "attention": 0.16}
LARGE_MIN_STEPS, LARGE_MAX_STEPS = 60, 700
LARGE_PRETRAINED_SHARE = {"mlp": 0.1, "conv": 0.1, "attention": 0.7}
LARGE_OPTIMIZERS = {"adam": 0.2, "adamw": 0.15, "sgdm": 0.3, "sgd": 0.35}
# Weights of the hidden layers of an MLP: each of them is moved once a step
LARGE_MAX_WEIGHTS = 600_000
# Seeds from here on draw wide and deep models in a few dozen steps, wider still: what is right for them later in a long run ruins
# such a run. A network that knew the one and not the other drove ResNet-18 far too fast.
BRIEF_SEED = 500_000
BRIEF_KINDS = {"mlp": 0.2, "conv": 0.6, "attention": 0.2}
BRIEF_MIN_STEPS, BRIEF_MAX_STEPS = 20, 80
BRIEF_PRETRAINED_SHARE = {"mlp": 0.0, "conv": 0.0, "attention": 0.5}
_WIDE = ("large", "brief")
# Seeds from here on draw large batches, half of them accumulated from several, which the other parts leave out because a step
# costs too much; and weight decay without AdamW, or AdamW without it.
BATCH_SEED = 600_000
BATCH_KINDS = {"mlp": 0.34, "conv": 0.22, "bag": 0.16, "rnn": 0.10, "attention": 0.18}
BATCH_MIN_STEPS, BATCH_MAX_STEPS = 40, 400
BATCH_PRETRAINED_SHARE = {"mlp": 0.2, "conv": 0.2, "bag": 0.2, "rnn": 0.3, "attention": 0.7}
BATCH_SMALLEST = 128
# As many as each part has
END_OF_SEEDS = 700_000


@dataclass(frozen=True)
class TaskSpec:
    """
    Everything that defines a group of tasks which share their shapes; the tasks of a group differ in the data they
    draw, in their initial weights, and a little in difficulty. All fields are plain, so that
    `TaskSpec(**json.loads(json.dumps(dataclasses.asdict(spec))))` gives the same spec.

    Args:
        seed (`int`): Seed of data, initial weights, data order and dropout.
        kind (`str`): The model: `"mlp"`, `"conv"`, `"bag"`, `"rnn"` or `"attention"`.
        data (`str`): The data: `"digits"`, `"teacher"`, `"images"`, `"topics"` or `"sequence"`.
        num_training_steps (`int`): Length T of a run.
        batch_size (`int`): Examples a step.
        gradient_accumulation_steps (`int`):
            Parts of a batch that go through the model one after the other: batch-norm takes each by itself.
        num_examples (`int`): Training examples; with the two fields above it sets the number of epochs.
        optimizer (`str`): `"adam"`, `"adamw"`, `"sgdm"` (momentum 0.9) or `"sgd"`.
        weight_decay (`float`):
            Decoupled for AdamW and added to the gradient otherwise; on matrices only, as `Trainer` does.
        clip_norm (`float`, *optional*): Gradient norm above which gradients are scaled down.
        hidden (`int`): Width; the number of channels of the first layers in conv nets.
        depth (`int`): Hidden layers, convolutions or transformer blocks; not used by recurrent nets.
        activation (`str`): `"relu"`, `"tanh"` or `"gelu"`.
        batch_norm (`bool`), layer_norm (`bool`): Normalisation; transformers always have LayerNorm.
        dropout (`float`): Dropout probability.
        residual (`bool`): Skip connections in MLPs and conv nets.
        pool (`str`): How positions become one vector: `"mean"`, `"last"`, `"first"` or `"flatten"`.
        heads (`int`), feedforward (`int`), pre_norm (`bool`): Transformer blocks.
        separate_projections (`bool`): Whether queries, keys and values have a matrix each, as in most transformers, or
            one together. Features count matrices and average over them: the same training reads otherwise.
        pooler (`bool`): A dense layer with tanh between a transformer and its head, as BERT has.
        cell (`str`), bidirectional (`bool`): Recurrent nets, `"gated"` or `"lstm"`.
        num_classes (`int`): Classes of the task.
        label_noise (`float`): Each task draws its share of random labels, in all splits, from 0 to 1.5 times this, at most 0.25.
        imbalance (`float`): Log ratio between the priors of the most and the least frequent class.
        modes (`int`): Latent classes (image templates, token topics) behind each label.
        input_dim (`int`), input_power (`float`), temperature (`float`): Teacher data.
        input_scale (`float`): Factor on real-valued inputs.
        noise (`float`): Noise on images, or how blurred topics are.
        image_size (`int`), channels (`int`): Image data.
        vocabulary (`int`), length (`int`), embedding_dim (`int`), rule (`str`): Token data.
        unused_tokens (`int`):
            Rows of the embedding beyond the vocabulary, which no example has: pretrained models have many.
        init (`str`): `"torch"` (the defaults of `torch.nn`), `"variance"` (He, Xavier) or `"small"` (what N(0, 0.02)
            is at a width of 400).
        init_scale (`float`): Factor on the initial matrices.
        embedding_std (`float`): Standard deviation of initial embeddings.
        pretrained (`bool`): Whether the initial weights come from an upstream task.
        upstream_steps (`int`): Length of the upstream training.
        num_upstream (`int`): Examples of the upstream training.
        upstream_same (`bool`):
            Whether the upstream labels are a refinement of the task's, so that small moves are enough.
        head_std (`float`): Standard deviation of the fresh head of a pretrained model; 0 for that of `init`.
        damaged (`bool`): Whether the initial weights are bad.
        damage_scale (`float`): Factor on the initial matrices of a damaged model; 0 for steps at a far too high rate.
    """

    seed: int
    kind: str
    data: str
    num_training_steps: int
    batch_size: int
    num_examples: int
    optimizer: str
    weight_decay: float = 0.0
    clip_norm: float | None = None
    gradient_accumulation_steps: int = 1
    hidden: int = 32
    depth: int = 2
    activation: str = "relu"
    batch_norm: bool = False
    layer_norm: bool = False
    dropout: float = 0.0
    residual: bool = False
    pool: str = "mean"
    heads: int = 2
    feedforward: int = 2
    pre_norm: bool = True
    separate_projections: bool = False
    pooler: bool = False
    cell: str = "gated"
    bidirectional: bool = False
    num_classes: int = 2
    label_noise: float = 0.0
    imbalance: float = 0.0
    modes: int = 1
    input_dim: int = 16
    input_power: float = 0.0
    temperature: float = 2.0
    input_scale: float = 1.0
    noise: float = 0.7
    image_size: int = 8
    channels: int = 1
    vocabulary: int = 200
    length: int = 12
    embedding_dim: int = 16
    unused_tokens: int = 0
    rule: str = "negation"
    init: str = "torch"
    init_scale: float = 1.0
    embedding_std: float = 1.0
    pretrained: bool = False
    upstream_steps: int = 0
    num_upstream: int = 4000
    upstream_same: bool = False
    head_std: float = 0.0
    damaged: bool = False
    damage_scale: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """The fields as a dictionary that `json` can write."""
        return asdict(self)


def family_of(seed: int) -> str:
    """Which part of the population a seed draws from: `""`, `"long"`, `"extended"`, `"short"`, `"large"`, `"brief"` or `"batch"`."""
    starts = {
        "batch": BATCH_SEED,
        "brief": BRIEF_SEED,
        "large": LARGE_SEED,
        "short": SHORT_SEED,
        "extended": EXTENDED_SEED,
        "long": LONG_SEED,
    }
    return next((family for family, start in starts.items() if seed >= start), "")


def sample_spec(seed: int, max_cost: float | None = None) -> TaskSpec:
    """
    Draws a task group.

    Args:
        seed (`int`): The same seed and `max_cost` always give the same spec. Seeds from 100,000 on give long runs,
            most of them from pretrained weights; those from 200,000 on give many epochs, those from 300,000 on a few
            dozen steps, those from 400,000 on wide and deep models, those from 500,000 on the same in a few dozen steps, and those
            from 600,000 on large batches.
        max_cost (`float`, *optional*):
            Bound on [`estimate_cost`]. A spec above it gets fewer steps, then smaller batches, then a transformer
            gets narrower, unless it is to be wide; if that is not enough, another spec of the same kind is drawn, so that the bound leaves
            the share of each kind as it is.
    """
    r = random.Random(f"population-1-{seed}")  # what later versions added did not change the specs of version 1
    details = random.Random(f"population-3-{seed}")
    family = family_of(seed)
    kinds = {
        "": KINDS,
        "long": LONG_KINDS,
        "extended": EXTENDED_KINDS,
        "short": SHORT_KINDS,
        "large": LARGE_KINDS,
        "brief": BRIEF_KINDS,
        "batch": BATCH_KINDS,
    }[family]
    fewest_steps = {
        "extended": EXTENDED_MIN_STEPS,
        "short": SHORT_MIN_STEPS,
        "large": LARGE_MIN_STEPS,
        "brief": BRIEF_MIN_STEPS,
        "batch": BATCH_MIN_STEPS,
    }.get(family, MIN_STEPS)
    kind = r.choices(list(kinds), list(kinds.values()))[0]
    for _ in range(1000):
        fields = _draw(r, seed, kind)
        _draw_details(details, fields)
        if max_cost is None:
            return _with_examples(fields)
        smaller = BATCH_SMALLEST if family == "batch" else 8
        for change in ({}, {"batch_size": smaller}, {"hidden": 16, "embedding_dim": 16, "feedforward": 2, "heads": 2}):
            if "hidden" in change and (kind != "attention" or family in _WIDE):
                continue
            fields.update(change)
            cost = estimate_cost(_with_examples(fields))
            if cost <= max_cost:
                return _with_examples(fields)
            steps = int(fields["num_training_steps"] * max_cost / cost)
            if steps >= fewest_steps:
                return _with_examples({**fields, "num_training_steps": steps})
    raise InputError("max_cost", max_cost, f"leaves no task of the kind {kind!r} in group {seed}.", "Raise it.")


def _with_examples(fields: dict[str, Any]) -> TaskSpec:
    """Turns the wanted number of epochs into a number of examples within what the data can give."""
    fields = dict(fields)
    num_examples = round(fields["num_training_steps"] * fields["batch_size"] / fields.pop("epochs"))
    if fields["data"] == "digits":
        upper = 800 if fields["imbalance"] else NUM_DIGITS - NUM_CONTROLLER - NUM_EVAL
    else:
        upper = 20_000 if fields["seed"] >= LONG_SEED else 6000
    # Fewer examples than this and the task cannot be learnt from scratch, which teaches nothing about rates.
    lower = 300
    if not fields["pretrained"]:
        lower = {"sequence": 2000, "images": 800}.get(fields["data"], 600)
        if family_of(fields["seed"]) == "extended":
            lower = lower // 3
    return TaskSpec(num_examples=max(lower, min(num_examples, upper)), **fields)


def _log_uniform(generator: random.Random, low: float, high: float) -> float:
    return math.exp(generator.uniform(math.log(low), math.log(high)))


def _draw(r: random.Random, seed: int, kind: str) -> dict[str, Any]:
    family = family_of(seed)
    optimizers = LARGE_OPTIMIZERS if family in _WIDE else OPTIMIZERS
    if family == "short" and kind == "conv":
        optimizers = SHORT_CONV_OPTIMIZERS
    optimizer = r.choices(list(optimizers), list(optimizers.values()))[0]
    shares = {
        "": PRETRAINED_SHARE,
        "long": LONG_PRETRAINED_SHARE,
        "extended": EXTENDED_PRETRAINED_SHARE,
        "short": SHORT_PRETRAINED_SHARE,
        "large": LARGE_PRETRAINED_SHARE,
        "brief": BRIEF_PRETRAINED_SHARE,
        "batch": BATCH_PRETRAINED_SHARE,
    }[family]
    pretrained = r.random() < shares[kind]
    if kind == "attention" and pretrained and r.random() < 0.5:
        optimizer = "adamw"  # what transformers are fine-tuned with
    data = {
        "mlp": r.choices(["teacher", "digits", "images", "topics"], [0.5, 0.25, 0.2, 0.05])[0],
        "conv": r.choices(["images", "digits"], [0.75, 0.25])[0],
        "bag": "topics",
        "rnn": r.choices(["sequence", "topics", "images", "digits"], [0.45, 0.25, 0.15, 0.15])[0],
        "attention": r.choices(["sequence", "topics", "images", "digits"], [0.5, 0.2, 0.15, 0.15])[0],
    }[kind]
    if kind == "mlp" and data == "topics":
        data = "teacher"  # an MLP on tokens is an embedding bag
    if family in ("short", "brief", "batch") and data == "sequence" and not pretrained:
        data = "topics"  # no order of tokens is learnt from scratch in so few steps
    tokens = data in ("topics", "sequence")
    fields: dict[str, Any] = {
        "seed": seed,
        "kind": kind,
        "data": data,
        "num_training_steps": int(_log_uniform(r, MIN_STEPS, MAX_STEPS[kind])),
        "optimizer": optimizer,
        "weight_decay": 0.0,
        "clip_norm": 1.0 if r.random() < (0.5 if kind in ("rnn", "attention") else 0.16) else None,
        "activation": r.choice(["relu", "relu", "gelu", "tanh"]),
        "epochs": _log_uniform(r, 1, 12 if pretrained else 60),
        "num_classes": r.choices([2, 3, 4, 5, 10], [0.35, 0.2, 0.15, 0.15, 0.15])[0],
        "label_noise": r.choice([0.0, 0.0, 0.05, 0.1, 0.2]),
        "imbalance": r.uniform(0.5, 2.5) if r.random() < 0.2 else 0.0,
        "modes": r.choice([1, 2, 4]),
        "input_scale": math.exp(r.gauss(0, 0.4)),
        "noise": _log_uniform(r, 0.25, 1.0),
        "temperature": _log_uniform(r, 2.5, 20),
        "dropout": r.choice([0.0, 0.0, 0.1, 0.2, 0.4]),
        "init": r.choice(["torch", "variance"]),
        "init_scale": math.exp(r.gauss(0, 0.3)),
        "pretrained": pretrained,
    }
    if optimizer == "adamw":
        fields["weight_decay"] = r.choice([0.01, 0.01, 0.1])
    elif optimizer == "sgdm":
        fields["weight_decay"] = r.choice([0.0, 0.0, 5e-4])
    fields["batch_size"] = r.choice(
        [8, 16, 16, 32, 32, 32, 64, 64, 128] if kind in ("mlp", "bag") else [8, 16, 16, 32]
    )
    if kind in ("rnn", "attention"):
        fields["num_classes"] = r.choice([2, 2, 3, 5, 8])
    if data == "sequence":
        fields["num_classes"] = r.choice([2, 2, 3, 4])
        if not pretrained:
            fields["num_training_steps"] = int(_log_uniform(r, 160, MAX_STEPS[kind]))
    if data == "teacher":
        if pretrained:
            fields["temperature"] = _log_uniform(r, 5, 20)
        fields["input_dim"] = r.choice([8, 16, 32, 64])
        fields["input_power"] = r.choice([0.0, 0.5, 1.0, 1.5])
    if data in ("images", "digits"):
        fields["noise"] *= 0.75
    if data == "images":
        if kind != "conv":
            fields["modes"] = r.choice([1, 1, 2])
        fields["image_size"] = 12 if kind == "conv" and r.random() < 0.25 else 8
        fields["channels"] = 3 if kind == "conv" and r.random() < 0.5 else 1
    if tokens:
        large = r.random() < 0.5
        fields["vocabulary"] = int(_log_uniform(r, 300, 2000) if large and data == "topics" else r.randint(60, 250))
        fields["length"] = r.randint(8, 16)
        fields["embedding_dim"] = r.choice([8, 16, 16, 32])
        fields["embedding_std"] = 1.0 if r.random() < 0.5 else _log_uniform(r, 0.02, 0.1)
        fields["rule"] = r.choice(["negation", "bigram", "bigram", "marker", "marker"])
        if data == "sequence" and fields["rule"] != "bigram":
            fields["vocabulary"] = r.randint(24, 64)  # every token has a meaning of its own to be learnt
    _draw_model(r, fields)
    if family in ("long", "extended"):
        fields["num_training_steps"] = int(_log_uniform(r, LONG_MIN_STEPS, LONG_MAX_STEPS[kind]))
        if kind == "attention":
            fields["depth"] = r.choice([2, 4, 4, 6, 6])
            fields["length"] = min(fields["length"], 8) if tokens else fields["length"]
    if family == "extended":
        fields["num_training_steps"] = int(_log_uniform(r, EXTENDED_MIN_STEPS, EXTENDED_MAX_STEPS[kind]))
        fields["epochs"] = _log_uniform(r, 10, 100)
    if family == "short":
        fields["num_training_steps"] = int(_log_uniform(r, SHORT_MIN_STEPS, SHORT_MAX_STEPS))
        fields["epochs"] = _log_uniform(r, 1, 8)
        if kind == "conv":
            fields["depth"] = r.choice([2, 3, 4, 6])
            fields["hidden"] = r.choice([6, 8, 12])
            fields["batch_norm"] = r.random() < 0.75
            fields["residual"] = fields["depth"] >= 3 and r.random() < 0.6
            fields["batch_size"] = r.choice([16, 32, 64])
        elif kind == "attention":
            fields["depth"] = r.choice([2, 4, 4, 6])
    if family in _WIDE:
        _draw_large(r, fields)
    if family == "brief":
        _draw_brief(r, fields)
    if family == "batch":
        _draw_batch(r, fields)
    if family != "" and pretrained:
        fields["epochs"] = _log_uniform(r, 1, 4)
        fields["num_upstream"] = 8000
        upstream_steps = (300, 700) if family in ("short", "batch", *_WIDE) else (500, 2400)
        fields["upstream_steps"] = int(_log_uniform(r, *upstream_steps))
        fields["upstream_same"] = r.random() < 0.6
        fields["head_std"] = r.choice([0.0, 0.02])
    elif pretrained:
        fields["upstream_steps"] = r.randint(300 if kind == "attention" else 200, 400)
        fields["upstream_same"] = r.random() < 0.6
        fields["head_std"] = r.choice([0.0, 0.02])
    elif r.random() < 0.07:
        fields["damaged"] = True
        fields["damage_scale"] = r.choice([0.0, 0.0, 3.0])
    return fields


def _draw_large(r: random.Random, fields: dict[str, Any]) -> None:
    """Makes a model wide and deep; one without normalisation has skip connections, or it would not train at all."""
    fields["num_training_steps"] = int(_log_uniform(r, LARGE_MIN_STEPS, LARGE_MAX_STEPS))
    fields["epochs"] = _log_uniform(r, 1, 20)
    fields["batch_size"] = r.choice([16, 32, 64])
    if fields["data"] == "images":  # hard enough to keep so large a model busy
        fields["noise"], fields["modes"] = _log_uniform(r, 0.5, 2.0), r.choice([1, 2, 4])
    if fields["kind"] == "mlp":
        fields["depth"] = r.choice([2, 3, 4, 6, 8, 12])
        fields["hidden"] = int(_log_uniform(r, 64, 512))
        fields["hidden"] = min(fields["hidden"], int(math.sqrt(LARGE_MAX_WEIGHTS / (fields["depth"] - 1))))
        fields["batch_norm"] = r.random() < 0.5
        fields["layer_norm"] = not fields["batch_norm"] and r.random() < 0.4
        # With batch-norm as well, nearly a third of the regret curves have two minima with a hill between them, and no rate is
        # the one to go to.
        skips = fields["depth"] >= 3 and (r.random() < 0.7 or not fields["layer_norm"])
        fields["residual"] = skips and not fields["batch_norm"]
        fields["batch_size"] = r.choice([16, 32, 64, 128])
    elif fields["kind"] == "conv":
        fields["depth"] = r.choice([5, 6, 7, 8, 10, 12])
        fields["hidden"] = int(_log_uniform(r, 8, 32))
        fields["image_size"] = 12 if fields["data"] == "images" else fields.get("image_size", 8)
        fields["num_classes"] = r.choice([4, 5, 10])
        fields["batch_norm"] = r.random() < 0.8
        fields["residual"] = r.random() < 0.75 or not fields["batch_norm"]
        fields["pool"], fields["activation"] = "mean", r.choice(["relu", "relu", "gelu"])
    else:
        fields["hidden"] = r.choice([64, 96, 128])
        fields["embedding_dim"], fields["heads"], fields["depth"] = fields["hidden"], 4, r.choice([4, 6, 8, 12])
        fields["batch_size"] = r.choice([8, 16, 32])


def _draw_brief(r: random.Random, fields: dict[str, Any]) -> None:
    """Makes a wide and deep model's run short, and its convolutions wider still."""
    fields["num_training_steps"] = int(_log_uniform(r, BRIEF_MIN_STEPS, BRIEF_MAX_STEPS))
    fields["epochs"] = _log_uniform(r, 1, 4)
    if fields["kind"] == "conv":
        fields["hidden"] = int(_log_uniform(r, 16, 64))
        if fields["seed"] % 2:  # as deep as ResNet-18: the deeper, the more the best update shrinks in so few steps
            fields["depth"], fields["residual"] = r.choice([14, 16, 18, 20]), True


def _draw_batch(r: random.Random, fields: dict[str, Any]) -> None:
    """Makes batches large, accumulates half of them, and gives weight decay to any optimizer or to none."""
    fields["num_training_steps"] = int(_log_uniform(r, BATCH_MIN_STEPS, BATCH_MAX_STEPS))
    fields["epochs"] = _log_uniform(r, 1, 60)
    # The digits are too few for larger ones, and fewer still where classes are imbalanced
    fields["batch_size"] = BATCH_SMALLEST if fields["data"] == "digits" else r.choice([BATCH_SMALLEST, 256, 256, 512])
    fields["gradient_accumulation_steps"] = r.choice([1, 1, 1, 2, 4, 8])
    fields["weight_decay"] = r.choice([0.0, 0.01, 0.1] if fields["optimizer"] == "adamw" else [0.0, 1e-4, 5e-4])


def _draw_model(r: random.Random, fields: dict[str, Any]) -> None:
    """Adds the fields of the model to those of the data."""
    kind, data = fields["kind"], fields["data"]
    if kind == "mlp":
        fields["hidden"] = int(_log_uniform(r, 16, 256) if r.random() < 0.3 else _log_uniform(r, 16, 64))
        fields["depth"] = r.choices([1, 2, 3, 4, 5, 6], [0.25, 0.3, 0.2, 0.1, 0.08, 0.07])[0]
        fields["residual"] = fields["depth"] >= 3 and r.random() < 0.5
        fields["batch_norm"] = r.random() < 0.25
        fields["layer_norm"] = not fields["batch_norm"] and r.random() < 0.15
    elif kind == "conv":
        fields["depth"] = r.choice([2, 2, 3, 4])
        fields["hidden"] = r.choice([4, 6, 8] if fields["depth"] < 4 else [4, 6])
        fields["batch_norm"] = r.random() < 0.5
        fields["residual"] = fields["depth"] >= 3 and r.random() < 0.5
        fields["pool"] = r.choice(["mean", "flatten"])
        fields["dropout"] = r.choice([0.0, 0.0, 0.2, 0.4])
    elif kind == "bag":
        fields["hidden"] = int(_log_uniform(r, 16, 64))
        fields["depth"] = r.choice([1, 1, 2])
        fields["layer_norm"] = r.random() < 0.2
    elif kind == "rnn":
        fields["cell"] = r.choice(["gated", "lstm"])
        fields["bidirectional"] = r.random() < 0.4
        fields["hidden"] = r.choice([8, 12, 16, 24] if fields["bidirectional"] else [12, 16, 24, 32])
        fields["depth"] = 1
        fields["pool"] = r.choice(["mean", "last"])
    else:
        fields["hidden"] = r.choices([16, 24, 32, 48, 64, 96], [0.3, 0.22, 0.25, 0.12, 0.08, 0.03])[0]
        fields["embedding_dim"] = fields["hidden"]
        fields["depth"] = r.choices([1, 2, 3, 4, 6], [0.2, 0.3, 0.2, 0.15, 0.15])[0]
        fields["heads"] = r.choice([2, 4])
        fields["feedforward"] = r.choice([2, 4])
        fields["pre_norm"] = r.random() < 0.5
        fields["activation"] = r.choice(["gelu", "relu"])
        fields["pool"] = r.choice(["mean", "first"])
        fields["dropout"] = r.choice([0.0, 0.1, 0.1])
        fields["init"] = r.choice(["torch", "variance", "small"])
        fields["layer_norm"] = True
        if data in ("digits", "images"):
            fields["length"] = 16
        else:
            fields["length"] = min(fields["length"], 12)


def _draw_details(r: random.Random, fields: dict[str, Any]) -> None:
    """Adds what hardly changes the training of a model, but the features that it shows."""
    tokens, attention = fields["data"] in ("topics", "sequence"), fields["kind"] == "attention"
    if attention:
        fields["separate_projections"] = r.random() < 0.75
        fields["pooler"] = tokens and fields["pool"] == "first" and r.random() < 0.6
    if tokens and r.random() < (0.6 if attention and fields["pretrained"] else 0.2):
        fields["unused_tokens"] = min(600, round(fields["vocabulary"] * r.uniform(0.5, 3)))


def pool_period(depth: int) -> int:
    """Convolutions from one halving of an image to the next: every second one in shallow nets, three in all in deep ones."""
    return 2 if depth <= 6 else math.ceil(depth / 3)


def estimate_cost(spec: TaskSpec) -> float:
    """
    Rough seconds of one CPU core for one run of 64 members with averaging: multiply-adds, activations and weights
    that a step touches, with factors fitted to measurements.
    """
    h, d = spec.hidden, spec.depth
    weights = 0
    if spec.kind == "mlp":
        inputs = {"digits": 64, "images": 64, "teacher": spec.input_dim}[spec.data]
        products = inputs * h + (d - 1) * h * h + h * spec.num_classes
        activations = d * h * (2 + 4 * (spec.batch_norm or spec.layer_norm) + 2 * (spec.dropout > 0))
        weights = products
    elif spec.kind == "conv":
        products, activations, size, channels = 0, 0, 8 if spec.data == "digits" else spec.image_size, spec.channels
        for layer in range(d):
            outputs = h if layer < d / 2 else 2 * h
            products += 9 * channels * outputs * size**2
            activations += outputs * size**2 * (4 + 2 * spec.batch_norm)
            weights += 9 * channels * outputs
            channels, size = outputs, size // 2 if layer % pool_period(d) == 0 else size
    else:
        tokens = spec.data in ("topics", "sequence")
        length = spec.length if tokens else (16 if spec.kind == "attention" else 8)
        e = spec.embedding_dim if tokens else 8
        weights = spec.vocabulary * e if tokens else 0
        if spec.kind == "bag":
            products, activations = e * h + (d - 1) * h * h, length * e + d * h * 3
        elif spec.kind == "rnn":
            gates = (4 if spec.cell == "lstm" else 2) * (2 if spec.bidirectional else 1)
            products, activations = length * gates * h * (e + h), length * gates * h * 8
        else:
            products = length * d * h * (h * (4 + 2 * spec.feedforward) + 2 * length)
            activations = length * d * (h * (16 + 3 * spec.feedforward) + 3 * spec.heads * length)
            weights += d * h * h * (4 + 2 * spec.feedforward)
        if spec.kind != "attention":
            weights += products // (length if spec.kind == "rnn" else 1)
    step = 64 * (spec.batch_size * (products * 2.5e-10 + activations * 3e-9) + weights * 6e-9) + 6e-4
    return spec.num_training_steps * step * COST_FACTORS[spec.kind]
