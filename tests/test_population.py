"""The batched population: the same numbers as plain PyTorch, one member at a time."""

import json
import math
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import BertConfig, BertForSequenceClassification

from hf_alrs.meta_training.data import make_data
from hf_alrs.meta_training.population import Population, TaskSpec, estimate_cost, sample_spec


BASE = {"seed": 3, "num_training_steps": 30, "batch_size": 16, "num_examples": 300}
MLP = {**BASE, "kind": "mlp", "data": "teacher", "hidden": 12, "depth": 2, "num_classes": 3}
ATTENTION = {
    **BASE,
    "kind": "attention",
    "data": "sequence",
    "hidden": 16,
    "embedding_dim": 16,
    "depth": 2,
    "heads": 2,
    "vocabulary": 60,
    "length": 8,
    "activation": "gelu",
    "layer_norm": True,
    "num_classes": 2,
}
CONV = {**BASE, "kind": "conv", "data": "images", "hidden": 4, "depth": 3, "residual": True, "batch_norm": True}
RNN = {**BASE, "kind": "rnn", "data": "topics", "hidden": 8, "depth": 1, "bidirectional": True, "cell": "lstm"}
BAG = {**BASE, "kind": "bag", "data": "topics", "hidden": 8, "depth": 1, "dropout": 0.2}


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def run(population, rates, steps):
    population.reset()
    return torch.stack([step_once(population, rates, step) for step in range(steps)])


def step_once(population, rates, step):
    loss = population.loss_and_gradient(step)
    population.optimizer_step(rates)
    return loss


def member(population, flat, index):
    return torch.cat([x[index] for x in population.split(flat)])


def test_specs_are_deterministic_diverse_and_plain():
    specs = [sample_spec(seed) for seed in range(300)]
    assert specs == [sample_spec(seed) for seed in range(300)]
    for spec in specs:
        assert TaskSpec(**json.loads(json.dumps(spec.to_dict()))) == spec
        assert spec.num_examples >= spec.batch_size
    assert {spec.kind for spec in specs} == {"mlp", "conv", "bag", "rnn", "attention"}
    assert {spec.optimizer for spec in specs} == {"adam", "adamw", "sgdm", "sgd"}
    assert 0.2 < sum(spec.pretrained for spec in specs) / len(specs) < 0.4
    assert 0.02 < sum(spec.damaged for spec in specs) / len(specs) < 0.1
    assert 0.15 < sum(spec.clip_norm is not None for spec in specs) / len(specs) < 0.4


def test_max_cost_bounds_the_cost():
    for seed in range(50):
        assert estimate_cost(sample_spec(seed, max_cost=2.0)) <= 2.0


@pytest.mark.parametrize("fields", [MLP, CONV, RNN, BAG, ATTENTION], ids=lambda fields: fields["kind"])
def test_populations_are_deterministic(fields):
    spec = TaskSpec(**fields, optimizer="adam")
    rates = torch.tensor([1e-3, 1e-2]).repeat(2)
    populations = [Population(spec, 2, 2) for _ in range(2)]
    losses = [run(population, rates, 5) for population in populations]
    assert torch.equal(losses[0], losses[1])
    assert torch.equal(run(populations[0], rates, 5), losses[1])  # reset() rewinds everything
    assert torch.equal(populations[0].weights, populations[1].weights)
    by_task = torch.stack([member(populations[0], populations[0].initial_weights, i) for i in range(4)])
    assert torch.equal(by_task[0], by_task[1])
    assert not torch.equal(by_task[0], by_task[2])


@pytest.mark.parametrize("fields", [MLP, CONV, RNN, BAG, ATTENTION], ids=lambda fields: fields["kind"])
@pytest.mark.parametrize("rate", [0.1, float("inf")], ids=["other", "non-finite"])
def test_members_are_independent(fields, rate):
    population = Population(TaskSpec(**fields, optimizer="sgdm"), 2, 3)
    rates = torch.full((6,), 1e-2)
    run(population, rates, 6)
    reference = [member(population, population.weights, index) for index in range(6)]
    loss, error = population.evaluate()
    rates[1] = rate
    run(population, rates, 6)
    other_loss, other_error = population.evaluate()
    for index in (0, 2, 3, 4, 5):
        torch.testing.assert_close(member(population, population.weights, index), reference[index])
        torch.testing.assert_close(other_loss[index], loss[index])
        assert error[index] == other_error[index]
    assert torch.isfinite(other_loss).all()
    assert torch.isfinite(population.gradients).all()
    if math.isinf(rate):
        assert other_loss[1] == 50


class Reference(nn.Module):
    """The MLP and the pre-LayerNorm transformer, written the usual way."""

    def __init__(self, spec, inputs):
        super().__init__()
        self.spec = spec
        h, d = spec.hidden, spec.depth
        if spec.kind == "mlp":
            sizes = [inputs, *[h] * d]
            self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(sizes))
        else:
            self.embedding = nn.Embedding(spec.vocabulary, h)
            self.position = nn.Embedding(spec.length, h)
            self.blocks = nn.ModuleList(
                nn.TransformerEncoderLayer(h, spec.heads, spec.feedforward * h, 0.0, F.gelu, 1e-5, True, spec.pre_norm)
                for _ in range(d)
            )
            self.norm = nn.LayerNorm(h)
        self.head = nn.Linear(h, spec.num_classes)

    def forward(self, x):
        if self.spec.kind == "mlp":
            for layer in self.layers:
                x = torch.relu(layer(x))
            return self.head(x)
        x = self.embedding(x) + self.position.weight
        x = x if self.spec.pre_norm else self.norm(x)
        for block in self.blocks:
            x = block(x)
        x = x.mean(1)
        return self.head(self.norm(x) if self.spec.pre_norm else x)

    def targets(self):
        """The parameter, and whether it is transposed, for each name in the population."""
        names = {"head": self.head}
        if self.spec.kind == "mlp":
            names.update({f"layer{i}": layer for i, layer in enumerate(self.layers)})
            return names
        names["norm"] = self.norm
        for i, block in enumerate(self.blocks):
            names.update(
                {
                    f"out{i}": block.self_attn.out_proj,
                    f"attention_norm{i}": block.norm1,
                    f"up{i}": block.linear1,
                    f"down{i}": block.linear2,
                    f"feedforward_norm{i}": block.norm2,
                }
            )
        return names

    def parameter(self, name):
        if name in ("embedding", "position"):
            return getattr(self, name).weight
        module, _, kind = name.partition(".")
        if module.startswith("qkv"):
            return getattr(self.blocks[int(module[3:])].self_attn, f"in_proj_{kind}")
        return getattr(self.targets()[module], kind)


def copy_in(model, population, flat, index):
    """Writes the weights of one member into the module."""
    for name, shape, x in zip(population.parameter_names, population.shapes, population.split(flat), strict=True):
        target = model.parameter(name)
        value = x[index].view(shape)
        linear = name.endswith(".weight") and "norm" not in name
        with torch.no_grad():
            target.copy_(value.T if linear else value.view_as(target))


@pytest.mark.parametrize("fields", [MLP, ATTENTION, {**ATTENTION, "pre_norm": False}], ids=["mlp", "pre", "post"])
@pytest.mark.parametrize(
    ("optimizer", "clip", "decay"),
    [("adam", None, 0.0), ("adamw", 1.0, 0.1), ("sgdm", None, 5e-4), ("sgdm", 0.5, 0.0), ("sgd", None, 0.0)],
)
def test_one_member_equals_plain_pytorch(fields, optimizer, clip, decay):
    spec = TaskSpec(**fields, optimizer=optimizer, clip_norm=clip, weight_decay=decay)
    population = Population(spec, 2, 2)
    index, lr = 3, {"adam": 3e-3, "adamw": 3e-3, "sgdm": 0.02, "sgd": 0.1}[optimizer]
    population.reset()
    model = Reference(spec, population._inputs["train"].shape[-1])
    copy_in(model, population, population.weights, index)
    matrices = [
        p
        for n, p in zip(population.parameter_names, map(model.parameter, population.parameter_names), strict=True)
        if population.is_matrix[population.parameter_names.index(n)]
    ]
    kept = {id(p) for p in matrices}
    groups = [
        {"params": matrices, "weight_decay": decay},
        {"params": [p for p in model.parameters() if id(p) not in kept], "weight_decay": 0.0},
    ]
    if optimizer in ("adam", "adamw"):
        reference = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[optimizer](groups, lr=lr)
    else:
        reference = torch.optim.SGD(groups, lr=lr, momentum=0.9 if optimizer == "sgdm" else 0.0)
    rates = torch.tensor([1e-4, lr, 1e-3, lr])
    for step in range(20):
        inputs, labels = population._batch(step)
        loss = F.cross_entropy(model(inputs[1]), labels[1])
        reference.zero_grad()
        loss.backward()
        before = member(population, population.weights, index)
        batched = population.loss_and_gradient(step)
        torch.testing.assert_close(batched[index], loss.detach(), rtol=1e-3, atol=1e-4)
        norm = nn.utils.clip_grad_norm_(model.parameters(), clip if clip is not None else math.inf)
        torch.testing.assert_close(population.gradient_norm()[index], norm, rtol=1e-2, atol=1e-4)
        reference.step()
        population.optimizer_step(rates)
        after = member(population, population.weights, index)
        torch.testing.assert_close(member(population, population.updates, index), after - before, rtol=1e-3, atol=1e-6)
    expected = population.weights.clone()
    for name, shape, x in zip(population.parameter_names, population.shapes, population.split(expected), strict=True):
        value = model.parameter(name).detach()
        x[index] = (value.T if name.endswith(".weight") and "norm" not in name else value.view(shape)).reshape(-1)
    # Adam divides rounding noise by tiny second moments (key biases have no gradient at all), hence the tolerance.
    torch.testing.assert_close(
        population.evaluate(weights=expected)[0], population.evaluate()[0], rtol=2e-3, atol=1e-3
    )
    difference = (member(population, expected, index) - member(population, population.weights, index)).abs()
    assert difference.quantile(0.9) < 2e-4


def test_a_post_norm_transformer_with_separate_projections_and_a_pooler_is_bert():
    spec = TaskSpec(
        **{**ATTENTION, "pre_norm": False, "pool": "first", "separate_projections": True, "pooler": True},
        unused_tokens=7,
        optimizer="adamw",
    )
    population = Population(spec, 1, 1)
    config = BertConfig(
        vocab_size=67, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=8, type_vocab_size=1, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        layer_norm_eps=1e-5, num_labels=2,
    )  # fmt: skip
    model = BertForSequenceClassification(config).eval()
    names = {
        "embedding": "bert.embeddings.word_embeddings.weight",
        "position": "bert.embeddings.position_embeddings.weight",
        "norm": "bert.embeddings.LayerNorm",
        "pooler": "bert.pooler.dense",
        "head": "classifier",
    }
    for layer in range(2):
        block = f"bert.encoder.layer.{layer}"
        for ours in ("query", "key", "value"):
            names[f"{ours}{layer}"] = f"{block}.attention.self.{ours}"
        names[f"out{layer}"] = f"{block}.attention.output.dense"
        names[f"attention_norm{layer}"] = f"{block}.attention.output.LayerNorm"
        names[f"up{layer}"] = f"{block}.intermediate.dense"
        names[f"down{layer}"] = f"{block}.output.dense"
        names[f"feedforward_norm{layer}"] = f"{block}.output.LayerNorm"
    state = {"bert.embeddings.token_type_embeddings.weight": torch.zeros(1, 16)}
    flat = population.split(population.initial_weights)
    for name, shape, weights in zip(population.parameter_names, population.shapes, flat, strict=True):
        base, _, kind = name.partition(".")
        dense = kind == "weight" and "norm" not in base
        value = weights[0].view(shape)
        value = value.T if dense else value if not kind else value[0]
        state[names[base] + (f".{kind}" if kind else "")] = value.contiguous()
    assert not model.load_state_dict(state, strict=False).unexpected_keys and len(state) == len(model.state_dict())
    inputs, _ = population._batch(0)
    named = dict(zip(population.parameter_names, population._shaped(population.initial_weights), strict=True))
    logits = population.network.forward(named, inputs, lambda x: x)
    with torch.no_grad():
        torch.testing.assert_close(logits[0], model(inputs[0]).logits, rtol=1e-4, atol=1e-5)
    trained = [p for p in model.parameters() if p.dim() > 1]
    # The features count and average over matrices: BERT's own, but for its token types
    assert sum(population.is_matrix) == len(trained) - 1


def test_accumulated_parts_are_the_batch_but_for_batch_norm():
    for fields, equal in ((MLP, True), (ATTENTION, True), ({**MLP, "batch_norm": True}, False), (CONV, False)):
        fields = {**fields, "batch_size": 16, "dropout": 0.0}
        whole, parts = (
            Population(TaskSpec(**fields, optimizer="sgd", gradient_accumulation_steps=k), 1, 2) for k in (1, 4)
        )
        losses = [population.loss_and_gradient(0) for population in (whole, parts)]
        assert (losses[0] - losses[1]).abs().max() < (1e-5 if equal else 1.0)
        difference = (whole.gradients - parts.gradients).abs().max() / whole.gradients.abs().max()
        assert difference < 1e-4 if equal else difference > 1e-2, (fields["kind"], difference)
    # Each part has the statistics of its own four examples
    inputs, labels = parts._batch(0)
    first = parts.network.forward(parts._leaves, inputs[:, :4].repeat_interleave(2, 0), lambda x: x)
    rest = [parts.network.forward(parts._leaves, x.repeat_interleave(2, 0), lambda x: x) for x in inputs.chunk(4, 1)]
    assert torch.equal(first, rest[0])
    expected = [F.cross_entropy(x[0], y[0]) for x, y in zip(rest, labels.chunk(4, 1), strict=True)]
    torch.testing.assert_close(losses[1][0], torch.stack(expected).mean().detach())


def test_restart_touches_only_the_mask():
    population = Population(TaskSpec(**MLP, optimizer="adam"), 2, 2)
    rates = torch.full((4,), 1e-2)
    run(population, rates, 4)
    mask = torch.tensor([False, True, False, False])
    before = population.weights.clone()
    population.restart(mask)
    assert torch.equal(member(population, population.weights, 1), member(population, population.initial_weights, 1))
    assert torch.equal(member(population, population.weights, 0), member(population, before, 0))
    assert population.step_counts.tolist() == [4, 0, 4, 4]
    assert member(population, population.momentum, 1).abs().sum() == 0
    assert member(population, population.second_moment, 1).abs().sum() == 0
    step_once(population, rates, 4)
    # The first step of Adam moves every weight with a gradient by the rate, whatever the gradient's size.
    moved = member(population, population.updates, 1)
    gradient = member(population, population.gradients, 1)
    clear = gradient.abs() > 1e-4
    torch.testing.assert_close(moved[clear], -1e-2 * gradient[clear].sign(), rtol=1e-2, atol=0)
    # The others go on as if nothing had happened.
    undisturbed = Population(population.spec, 2, 2)
    run(undisturbed, rates, 5)
    for index in (0, 2, 3):
        torch.testing.assert_close(
            member(population, population.weights, index), member(undisturbed, undisturbed.weights, index)
        )


def test_average_formula():
    population = Population(TaskSpec(**MLP, optimizer="sgd"), 1, 1)
    average = torch.full_like(population.weights, -7.0)
    expected = 0.0
    for num_updates, value in enumerate([1.0, 2.0, 4.0]):
        population.weights.fill_(value)
        population.update_average(average, np.array([num_updates]))
        expected += 17 / (17 + num_updates) * (value - expected)
    # 1, then 1 + 17/18 = 1.9444, then 1.9444 + 17/19 * 2.0556 = 3.7836
    assert expected == pytest.approx(3.7836, abs=1e-4)
    torch.testing.assert_close(average, torch.full_like(average, expected))


@pytest.mark.parametrize("old", [-7.0, math.inf, math.nan])
def test_the_first_update_of_a_member_replaces_what_was_there(old):
    """A member that is restarted after it diverged begins its average anew, the others go on."""
    population = Population(TaskSpec(**MLP, optimizer="sgd"), 1, 3)
    average = torch.ones_like(population.weights)
    population.weights.fill_(2.0)
    for block in population.split(average):
        block[1] = old
    population.update_average(average, np.array([1, 0, 2]))
    for index, expected in enumerate([1 + 17 / 18, 2.0, 1 + 17 / 19]):
        got = member(population, average, index)
        torch.testing.assert_close(got, torch.full_like(got, expected))


def test_run_fixed_prefers_a_sensible_rate_and_averages():
    population = Population(TaskSpec(**{**MLP, "num_training_steps": 60}, optimizer="adam"), 1, 3)
    rates = torch.tensor([1e-6, 1e-2, 30.0]).log()
    loss, error = population.run_fixed(rates)
    averaged_loss, averaged_error = population.run_fixed(rates, 0.3, average=True)
    population.beta1 = 0.1  # of a run under control before
    assert torch.equal(population.run_fixed(rates)[0], loss)
    assert loss.argmin() == 1
    assert averaged_loss.argmin() == 1
    assert loss.shape == error.shape == averaged_loss.shape == averaged_error.shape == (3,)


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("final_ratio", [0.0, 0.3, 1.0])
def test_fixed_runs_decay_to_the_final_ratio_and_average_what_they_pass(final_ratio, optimizer):
    """60 steps, 3 of them of warmup: the rate of step s is peak (r + (1 - r) (60 - s) / 57), and 60 updates."""
    population = Population(TaskSpec(**{**MLP, "num_training_steps": 60}, optimizer=optimizer), 1, 2)
    rates = torch.tensor([0.03, 0.3])
    raw, averaged = (population.run_fixed(rates.log(), final_ratio, average)[0].clone() for average in (False, True))
    for average, beta1 in ((False, 0.9), (True, 0.7)):
        population.reset()
        population.beta1 = beta1
        short = long = None
        for step in range(60):
            decay = final_ratio + (1 - final_ratio) * min(1.0, (60 - step) / 57)
            step_once(population, rates * (min(1.0, (step + 1) / 3) * decay), step)
            weights = population.weights.clone()
            short, long = (
                weights if mean is None else mean + (gamma + 1) / (gamma + 1 + step) * (weights - mean)
                for mean, gamma in ((short, 16), (long, 1))
            )
        if average:
            torch.testing.assert_close(population.evaluate_chosen([short, long])[0], averaged, rtol=1e-4, atol=1e-5)
        else:
            torch.testing.assert_close(population.evaluate()[0], raw)
    assert not torch.equal(raw, averaged)


def test_long_fixed_runs_average_at_intervals():
    """600 steps are 5 an update: the averages hold the weights after steps 5, 10, ..., 600 alone."""
    population = Population(TaskSpec(**{**MLP, "num_training_steps": 600}, optimizer="sgd"), 1, 1)
    rates = torch.tensor([0.1])
    expected = population.run_fixed(rates.log(), 1.0, average=True)[0].clone()
    population.reset()
    means, count = None, 0
    for step in range(600):
        step_once(population, rates * min(1.0, (step + 1) / 30), step)
        if step % 5 == 4:
            weights = population.weights.clone()
            means = means or [weights, weights]
            means = [m + (g + 1) / (g + 1 + count) * (weights - m) for m, g in zip(means, (16, 1), strict=True)]
            count += 1
    assert count == 120
    torch.testing.assert_close(population.evaluate_chosen(means)[0], expected, rtol=1e-4, atol=1e-5)


def test_the_controllers_split_chooses_for_each_member():
    """By the losses on the first 128 of its examples, in eight parts."""
    population = Population(TaskSpec(**{**MLP, "num_training_steps": 60}, optimizer="adam"), 1, 6)
    torch.manual_seed(0)
    population.weights += 0.3 * torch.randn(population.weights.shape)
    short, long = (population.weights + 0.3 * torch.randn(population.weights.shape) for _ in range(2))
    loss, error = population.evaluate_chosen([short, long])
    shown = [short + share * (long - short) for share in (0.0, 0.5, 1.0, -0.5)] + [population.weights]
    parts = torch.stack([population._outcomes("controller", x, 128)[0].view(6, 8, 16).mean(2) for x in shown])
    difference = parts - parts[:1]
    score = difference.mean(2) + 0.5 * difference.std(2) / math.sqrt(8)
    outcomes = [population.evaluate(weights=x) for x in shown]
    for member, best in enumerate(score.argmin(0).tolist()):
        assert loss[member] == pytest.approx(outcomes[best][0][member].item(), rel=1e-5)
        assert error[member] == pytest.approx(outcomes[best][1][member].item())
    assert len(set(score.argmin(0).tolist())) > 1, "they must differ, or this says little"


def test_buffers_and_parameter_descriptions():
    population = Population(TaskSpec(**BAG, optimizer="adam"), 2, 3)
    assert population.size == 6
    assert population.weights.shape == (6 * population.num_parameters,)
    assert population.parameter_names[0] == "embedding"
    assert population.is_embedding == [True, False, False, False, False]
    assert population.is_matrix == [True, True, False, True, False]
    assert population.fan_in[:2] == [population.spec.vocabulary, 16]
    assert population.fan_out[:2] == [16, 8]
    blocks = [torch.ones_like(x) for x in population.split(population.weights)]
    assert sum(x.shape[1] for x in blocks) == population.num_parameters
    ones = torch.ones_like(population.weights)
    assert population.dot(ones, ones).tolist() == [population.num_parameters] * 6
    assert population.learning_rate_grid.shape == (16,)
    assert population.steps_per_epoch == 300 // 16
    assert population.num_epochs == pytest.approx(30 / 18)


def test_splits_differ_and_pretraining_helps():
    fields = {**MLP, "hidden": 24, "temperature": 15.0, "num_classes": 2}
    tuned = TaskSpec(**fields, optimizer="adam", pretrained=True, upstream_steps=150, upstream_same=True)
    population = Population(tuned, 2, 1)
    assert (population.upstream_loss < math.log(8) - 0.3).all()
    assert not torch.equal(population._inputs["controller"], population._inputs["eval"][:, :128])
    names = population.parameter_names
    scratch = Population(TaskSpec(**fields, optimizer="adam"), 2, 1)
    weights = dict(zip(names, population.split(population.initial_weights), strict=True))
    fresh = dict(zip(names, scratch.split(scratch.initial_weights), strict=True))
    assert not torch.equal(weights["layer0.weight"], fresh["layer0.weight"])
    assert torch.equal(weights["head.weight"], fresh["head.weight"])


def test_unequal_classes_have_the_same_shares_in_all_splits():
    spec = TaskSpec(**{**MLP, "num_examples": 4000, "num_classes": 2}, optimizer="adam", imbalance=2.5)
    data = make_data(spec, 4)
    shares = {name: labels.float().mean(1) for name, labels in data.labels.items()}
    rare = torch.minimum(shares["train"], 1 - shares["train"])
    assert (rare < 0.25).all()
    # 256 and 128 examples: a standard deviation is 0.03 and 0.04 at most
    torch.testing.assert_close(shares["eval"], shares["train"], rtol=0, atol=0.12)
    torch.testing.assert_close(shares["controller"], shares["train"], rtol=0, atol=0.16)


def test_the_first_token_takes_no_words_place():
    """The word that tells the class follows a marker: every text has both, beside the token that is read from."""
    fields = {**ATTENTION, "rule": "marker", "num_examples": 2000}
    data = make_data(TaskSpec(**fields, pool="first", optimizer="adam"), 1)
    tokens = data.inputs["train"][0]
    assert tokens.shape == (2000, 8)
    assert (tokens[:, 0] == 0).all() and (tokens[:, 1:] > 0).all()
    counts = [int((tokens == word).any(1).sum()) for word in range(1, 60)]
    assert max(counts) == 2000, "the marker is in every text"
    marker = counts.index(2000) + 1
    assert not (tokens[:, -1] == marker).any(), "a word follows it"
    assert make_data(TaskSpec(**fields, optimizer="adam"), 1).inputs["train"].shape == (1, 2000, 8)
