"""Data of the population's tasks, synthetic but for scikit-learn's digits: latent classes, of which labels are coarser views."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor

from .spec import NUM_CONTROLLER, NUM_DIGITS, NUM_EVAL, TaskSpec


@dataclass
class TaskData:
    """
    The splits of all tasks of a group, stacked along the first dimension.

    Args:
        inputs (`dict[str, Tensor]`): Per split (`train`, `controller`, `eval`, `upstream`) inputs `[tasks, n, ...]`.
        labels (`dict[str, Tensor]`): The labels `[tasks, n]`.
        num_upstream_classes (`int`): Classes of the upstream split.
    """

    inputs: dict[str, Tensor]
    labels: dict[str, Tensor]
    num_upstream_classes: int


@lru_cache(maxsize=1)
def _digits() -> tuple[Tensor, Tensor]:
    images, labels = load_digits(return_X_y=True)
    return torch.tensor(images / 8 - 1, dtype=torch.float32), torch.tensor(labels)


def num_latent(spec: TaskSpec) -> int:
    """Number of latent classes behind the labels of a task."""
    if spec.data == "digits":
        return 10
    if spec.data in ("images", "topics"):
        return spec.num_classes * (max(spec.modes, 2) if spec.pretrained else spec.modes)
    if spec.data == "sequence":
        return 2 * spec.num_classes if spec.pretrained else spec.num_classes
    return max(8, 2 * spec.num_classes) if spec.pretrained else spec.num_classes


def make_data(spec: TaskSpec, num_tasks: int) -> TaskData:
    """Draws the data of `num_tasks` tasks; the difficulty varies a little between them."""
    generator = torch.Generator().manual_seed(spec.seed * 2 + 1)
    num_classes, latent = spec.num_classes, num_latent(spec)
    upstream_classes = latent if spec.upstream_same else max(2, min(latent, round(latent * 0.6)))
    num_held_out = NUM_CONTROLLER + NUM_EVAL
    digits = spec.data == "digits"
    total = spec.num_examples + num_held_out
    num_drawn = total * 2 if spec.imbalance else total
    # There are too few digits for a separate upstream set: the upstream task labels all that are not held out.
    if spec.pretrained:
        num_drawn = NUM_DIGITS if digits else num_drawn + spec.num_upstream
    splits: dict[str, list[tuple[Tensor, Tensor]]] = {"train": [], "controller": [], "eval": [], "upstream": []}
    for _ in range(num_tasks):
        inputs, classes, other = GENERATORS[spec.data](spec, num_drawn, latent, generator)
        labels = classes * num_classes // latent
        if spec.upstream_same:
            upstream_labels = classes
        else:
            # A related task: another view of the same inputs, for which other distinctions matter.
            if spec.data == "sequence" and spec.rule == "negation":
                regrouped = (other + 1).clamp(max=latent - 1)  # these classes are ordered
            else:
                regrouped = torch.randperm(latent, generator=generator)[other]
            upstream_labels = regrouped * upstream_classes // latent
        upstream = None
        if spec.pretrained and not digits:
            k = spec.num_upstream
            upstream = (inputs[:k], upstream_labels[:k])
            inputs, labels = inputs[k:], labels[k:]
        if spec.imbalance:
            prior = torch.linspace(0, -spec.imbalance, num_classes).exp()
            prior = prior[torch.randperm(num_classes, generator=generator)]
            chosen = torch.multinomial(prior[labels], min(total, len(labels)), generator=generator)
            # They are drawn without putting back, frequent classes first, and all splits are to have the same shares.
            chosen = chosen[torch.randperm(len(chosen), generator=generator)]
        else:
            chosen = torch.randperm(len(labels), generator=generator)[:total]
        share = min(0.25, spec.label_noise * 1.5 * _uniform(generator))
        flipped = torch.rand(len(labels), generator=generator) < share
        labels = torch.where(flipped, torch.randint(num_classes, labels.shape, generator=generator), labels)
        n = spec.num_examples
        rest = torch.ones(len(labels), dtype=torch.bool)
        rest[chosen[n:]] = False
        all_inputs, inputs, labels = inputs, inputs[chosen], labels[chosen]
        splits["train"].append((inputs[:n], labels[:n]))
        splits["controller"].append((inputs[n : n + NUM_CONTROLLER], labels[n : n + NUM_CONTROLLER]))
        splits["eval"].append((inputs[n + NUM_CONTROLLER : total], labels[n + NUM_CONTROLLER : total]))
        if spec.pretrained and digits:
            upstream = (all_inputs[rest], upstream_labels[rest])
        if upstream is not None:
            splits["upstream"].append(upstream)
    filled = {name: parts for name, parts in splits.items() if parts}
    return TaskData(
        inputs={name: torch.stack([x for x, _ in parts]) for name, parts in filled.items()},
        labels={name: torch.stack([y for _, y in parts]) for name, parts in filled.items()},
        num_upstream_classes=upstream_classes,
    )


def _uniform(generator: torch.Generator) -> float:
    return float(torch.rand((), generator=generator))


def _jitter(generator: torch.Generator, scale: float) -> float:
    return math.exp(scale * float(torch.randn((), generator=generator)))


def _from_digits(spec: TaskSpec, n: int, latent: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    images, labels = _digits()
    chosen = torch.randperm(len(labels), generator=generator)[:n]
    inputs = images[chosen] + spec.noise * _jitter(generator, 0.3) * torch.randn(len(chosen), 64, generator=generator)
    classes = torch.randperm(10, generator=generator)[labels[chosen]]
    inputs = inputs * spec.input_scale * _jitter(generator, 0.2)
    return (inputs.view(-1, 1, 8, 8) if spec.kind != "mlp" else inputs), classes, classes


def _from_teacher(spec: TaskSpec, n: int, latent: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs with a power-law spectrum; classes drawn from the softmax of a random network of width 24."""
    d, width = spec.input_dim, 24
    spectrum = torch.arange(1, d + 1, dtype=torch.float32) ** -spec.input_power
    spectrum = spectrum / spectrum.square().mean().sqrt()
    inputs = torch.randn(n, d, generator=generator) * spectrum
    hidden = torch.tanh(inputs @ torch.randn(d, width, generator=generator) * (2 / math.sqrt(d)))
    temperature = spec.temperature * _jitter(generator, 0.4)

    def draw() -> Tensor:
        logits = hidden @ torch.randn(width, latent, generator=generator) * (temperature / math.sqrt(width))
        return torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]

    classes = draw()
    other = draw() if spec.pretrained else classes
    return inputs * spec.input_scale * _jitter(generator, 0.2), classes, other


def _from_images(spec: TaskSpec, n: int, latent: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Smooth random templates, shifted cyclically by a pixel or two, with pixel noise and random contrast."""
    size, channels = spec.image_size, spec.channels
    templates = torch.randn(latent, channels, size // 2, size // 2, generator=generator)
    templates = F.interpolate(templates, size=(size, size), mode="bilinear")
    classes = torch.randint(latent, (n,), generator=generator)
    reach = 2 if spec.kind == "conv" else 1  # an MLP would have to see every shift of every template
    shift = torch.randint(-reach, reach + 1, (2, n, 1), generator=generator)
    rows = (torch.arange(size) + shift[0]) % size
    columns = (torch.arange(size) + shift[1]) % size
    inputs = templates[
        classes[:, None, None, None],
        torch.arange(channels)[None, :, None, None],
        rows[:, None, :, None],
        columns[:, None, None, :],
    ]
    inputs = inputs * torch.exp(0.2 * torch.randn(n, 1, 1, 1, generator=generator))
    noise = spec.noise * _jitter(generator, 0.3)
    inputs = inputs + noise * torch.randn(inputs.shape, generator=generator)
    inputs = inputs * spec.input_scale * _jitter(generator, 0.2)
    return (inputs.flatten(1) if spec.kind == "mlp" else inputs), classes, classes


def _zipf(vocabulary: int) -> Tensor:
    return 1 / (torch.arange(vocabulary, dtype=torch.float32) + 5)


def _from_topics(spec: TaskSpec, n: int, latent: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Bags of Zipf-distributed tokens whose frequencies depend on the latent class."""
    vocabulary = spec.vocabulary
    tilted = torch.rand(vocabulary, 1, generator=generator) < 0.4
    strength = 2 / (0.5 + spec.noise) * _jitter(generator, 0.2)
    logits = torch.randn(vocabulary, latent, generator=generator) * tilted * strength
    frequencies = (_zipf(vocabulary)[:, None] * logits.exp()).T
    classes = torch.randint(latent, (n,), generator=generator)
    inputs = torch.multinomial(frequencies[classes], _num_words(spec), True, generator=generator)
    return _with_first_token(spec, inputs), classes, classes


def _from_sequence(spec: TaskSpec, n: int, latent: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """
    Token sequences whose classes depend on order. `negation`: the sum of the polarities of tokens, each flipped by a
    negator before it, in quantile bins. `bigram`: which of some ordered pairs occurs, reversed pairs of other classes
    being decoys where there is noise. `marker`: the kind of the token that follows a marker, at which
    some other tokens hint.
    """
    vocabulary, length = spec.vocabulary, _num_words(spec)
    permutation = torch.randperm(vocabulary - 1, generator=generator) + 1
    frequencies = torch.zeros(vocabulary)
    frequencies[permutation] = _zipf(vocabulary - 1)
    tokens = torch.multinomial(frequencies.expand(n, -1), length, True, generator=generator)
    rows = torch.arange(n)
    if spec.rule == "negation":
        polarity = torch.randn(vocabulary, generator=generator)
        polarity[torch.rand(vocabulary, generator=generator) < 0.3] = 0
        negators = permutation[-3:]
        polarity[negators] = 0
        tokens[torch.rand(n, length, generator=generator) < 0.1] = negators[0]
        negated = torch.zeros(n, length)
        negated[:, 1:] = (tokens[:, :-1, None] == negators).any(-1).float()
        score = (polarity[tokens] * (1 - 2 * negated)).sum(1) + 0.1 * torch.randn(n, generator=generator)
        classes = torch.argsort(torch.argsort(score)) * latent // n
    elif spec.rule == "bigram":
        first, second = permutation[:latent], permutation[latent : 2 * latent]
        classes = torch.randint(latent, (n,), generator=generator)
        for _ in range(0 if spec.noise < 0.4 else 1 if spec.noise < 0.7 else 2):
            decoy = (classes + torch.randint(1, max(2, latent), (n,), generator=generator)) % latent
            place = torch.randint(length // 2, (n,), generator=generator) * 2
            place = place.clamp(max=length - 2)
            tokens[rows, place], tokens[rows, place + 1] = second[decoy], first[decoy]
        for _ in range(2):
            place = torch.randint(length // 2, (n,), generator=generator) * 2
            place = place.clamp(max=length - 2)
            tokens[rows, place], tokens[rows, place + 1] = first[classes], second[classes]
    else:
        marker = permutation[0]
        tokens = torch.where(tokens == marker, permutation[1], tokens)
        kinds = torch.randint(latent, (vocabulary,), generator=generator)
        kinds[permutation[1 : latent + 1]] = torch.arange(latent)  # frequent tokens cover every class
        place = torch.randint(length - 1, (n,), generator=generator)
        tokens[rows, place] = marker
        classes = kinds[tokens[rows, place + 1]]
        # Some other tokens hint at the class as well; without them a short run learns nothing at all.
        position = torch.arange(length)
        free = (position != place[:, None]) & (position != place[:, None] + 1)
        hint = free & (torch.rand(n, length, generator=generator) < 0.25)
        tokens = torch.where(hint, permutation[classes + 1][:, None], tokens)
    return _with_first_token(spec, tokens), classes, classes


def _reads_first_token(spec: TaskSpec) -> bool:
    return spec.kind == "attention" and spec.pool == "first"


def _num_words(spec: TaskSpec) -> int:
    """Tokens of an example beside the first one that a transformer may read its answer off."""
    return spec.length - _reads_first_token(spec)


def _with_first_token(spec: TaskSpec, tokens: Tensor) -> Tensor:
    """Puts the same token first where a transformer reads its answer off the first position."""
    return torch.cat([torch.zeros_like(tokens[:, :1]), tokens], 1) if _reads_first_token(spec) else tokens


GENERATORS = {
    "digits": _from_digits,
    "teacher": _from_teacher,
    "images": _from_images,
    "topics": _from_topics,
    "sequence": _from_sequence,
}
