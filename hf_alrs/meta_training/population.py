"""
Many copies of a small model trained as one tensor program, each member with a learning rate of its own.

All weights of all members lie in one flat buffer, parameter-major: the block of a parameter tensor holds that tensor
of every member. The forward pass works on views `[members, ...]` of the blocks with batched matrix products and grouped
convolutions, and the optimizer works on whole buffers.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..averaging import (
    CHOICE_PARTS,
    GAMMA,
    LONG_GAMMA,
    LONG_SHARES,
    RAW_WEIGHTS,
    choice_size,
    choose,
    update_interval,
    update_share,
)
from ..config import ALRSConfig
from .data import TaskData, make_data
from .spec import POPULATION_VERSION, TaskSpec, estimate_cost, pool_period, sample_spec


__all__ = ["POPULATION_VERSION", "Population", "TaskSpec", "estimate_cost", "sample_spec"]

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu": F.relu, "tanh": torch.tanh, "gelu": F.gelu}
# Ranges of log10 learning rates of the grid: wide enough for the best rate of nearly every task to lie inside.
GRID = {"adam": (-5.0, -0.5), "adamw": (-5.0, -0.5), "sgdm": (-4.0, 0.5), "sgd": (-3.0, 1.5)}
GRID_SIZE = 16
MAX_LOSS = 50.0
MOMENTUM, BETA2, EPSILON = 0.9, 0.999, 1e-8
WARMUP_SHARE = 0.05
UPSTREAM_RATES = (2e-3, 6e-3)
UPSTREAM_HELD_OUT = 256
DAMAGE_STEPS = 30
EVALUATION_PIECE = 32


@dataclass
class _Parameter:
    """One parameter tensor: its shape in a member, and how it starts ("uniform", "normal" or "constant")."""

    name: str
    shape: tuple[int, ...]
    distribution: str
    scale: float
    is_matrix: bool
    fan_in: int
    fan_out: int
    is_embedding: bool = False


class _Network:
    """
    Parameters and forward pass of the model of a spec, for any number of members at once.

    Args:
        spec (`TaskSpec`): The model's shape.
        inputs (`Tensor`): Training inputs `[tasks, n, ...]`, for their shape.
        num_classes (`int`): Outputs.
    """

    def __init__(self, spec: TaskSpec, inputs: Tensor, num_classes: int):
        self.spec = spec
        self.tokens = not inputs.is_floating_point()
        self.shape = tuple(inputs.shape[2:])
        self.activation = ACTIVATIONS[spec.activation]
        self.parameters: list[_Parameter] = []
        getattr(self, f"_build_{spec.kind}")()
        self._linear("head", self.num_features, num_classes, gain=1.0)

    # -- parameters

    def _add(self, name: str, shape: tuple[int, ...], distribution: str, scale: float, fan: tuple[int, int] = (0, 0)):
        is_matrix = fan != (0, 0)
        # Vectors count as a 1-wide input, so that ratios which involve fans stay finite.
        fan_in, fan_out = fan if is_matrix else (1, shape[-1])
        self.parameters.append(_Parameter(name, shape, distribution, scale, is_matrix, fan_in, fan_out))

    def _matrix_init(self, fan_in: int, fan_out: int, gain: float | None = None) -> tuple[str, float]:
        spec = self.spec
        if spec.init == "torch":
            return "uniform", spec.init_scale / math.sqrt(fan_in)
        if spec.init == "small":
            return "normal", 0.4 * spec.init_scale / math.sqrt(fan_in)
        if gain is not None or spec.activation == "tanh":
            return "normal", spec.init_scale * math.sqrt(2 / (fan_in + fan_out))
        return "normal", spec.init_scale * math.sqrt(2 / fan_in)

    def _linear(self, name: str, fan_in: int, fan_out: int, gain: float | None = None) -> None:
        self._add(f"{name}.weight", (fan_in, fan_out), *self._matrix_init(fan_in, fan_out, gain), (fan_in, fan_out))
        self._bias(f"{name}.bias", (1, fan_out), fan_in)

    def _bias(self, name: str, shape: tuple[int, ...], fan_in: int) -> None:
        if self.spec.init == "torch":
            self._add(name, shape, "uniform", 1 / math.sqrt(fan_in))
        else:
            self._add(name, shape, "constant", 0.0)

    def _norm(self, name: str, size: int) -> None:
        self._add(f"{name}.weight", (1, size), "constant", 1.0)
        self._add(f"{name}.bias", (1, size), "constant", 0.0)

    def _embedding(self) -> int:
        vocabulary, size = self.spec.vocabulary + self.spec.unused_tokens, self.spec.embedding_dim
        self._add("embedding", (vocabulary, size), "normal", self.spec.embedding_std, (vocabulary, size))
        self.parameters[-1].is_embedding = True
        return size

    def _build_dense(self, size: int) -> None:
        for layer in range(self.spec.depth):
            self._linear(f"layer{layer}", size, self.spec.hidden)
            size = self.spec.hidden
            if self.spec.batch_norm or self.spec.layer_norm:
                self._norm(f"norm{layer}", size)
        self.num_features = size

    def _build_mlp(self) -> None:
        self._build_dense(self.shape[0])

    def _build_bag(self) -> None:
        self._build_dense(self._embedding())

    def _build_conv(self) -> None:
        spec = self.spec
        channels, size, _ = self.shape
        for layer in range(spec.depth):
            outputs = spec.hidden if layer < spec.depth / 2 else 2 * spec.hidden
            fan = (9 * channels, 9 * outputs)
            self._add(f"conv{layer}.weight", (outputs, channels, 3, 3), *self._matrix_init(*fan), (fan[0], outputs))
            self._bias(f"conv{layer}.bias", (1, outputs), fan[0])
            if spec.batch_norm:
                self._norm(f"norm{layer}", outputs)
            channels, size = outputs, size // 2 if layer % pool_period(spec.depth) == 0 else size
        if spec.pool == "flatten":
            self._linear("dense", channels * size * size, 32)
            channels = 32
        self.num_features = channels

    def _build_rnn(self) -> None:
        spec = self.spec
        size = self._embedding() if self.tokens else self.shape[-1]
        gates = (4 if spec.cell == "lstm" else 2) * spec.hidden
        for direction in range(1 + spec.bidirectional):
            self._linear(f"input{direction}", size, gates)
            fan = (spec.hidden, gates)
            scale = 1 / math.sqrt(spec.hidden)
            self._add(f"recurrent{direction}.weight", fan, "uniform", scale, fan)
        self.num_features = spec.hidden * (1 + spec.bidirectional)

    def _build_attention(self) -> None:
        spec, d = self.spec, self.spec.hidden
        if self.tokens:
            self._embedding()
            length = self.shape[0]
        else:
            self._linear("patch", self.shape[0] * 4, d)
            length = (self.shape[1] // 2) * (self.shape[2] // 2)
        self._add("position", (length, d), "normal", spec.embedding_std if self.tokens else 0.02, (length, d))
        self.parameters[-1].is_embedding = True
        if not spec.pre_norm:
            self._norm("norm", d)
        for block in range(spec.depth):
            for name in self._projections:
                self._linear(f"{name}{block}", d, 3 * d // len(self._projections), gain=1.0)
            self._linear(f"out{block}", d, d, gain=1.0)
            self._norm(f"attention_norm{block}", d)
            self._linear(f"up{block}", d, spec.feedforward * d)
            self._linear(f"down{block}", spec.feedforward * d, d, gain=1.0)
            self._norm(f"feedforward_norm{block}", d)
        if spec.pre_norm:
            self._norm("norm", d)
        if spec.pooler:
            self._linear("pooler", d, d, gain=1.0)
        self.num_features = d

    @property
    def _projections(self) -> tuple[str, ...]:
        return ("query", "key", "value") if self.spec.separate_projections else ("qkv",)

    # -- forward pass: `w` maps names to `[members, ...]`, inputs are `[members, batch, ...]`

    def forward(self, w: dict[str, Tensor], inputs: Tensor, dropout: Callable[[Tensor], Tensor]) -> Tensor:
        """Logits `[members, batch, classes]`."""
        features = getattr(self, f"_forward_{self.spec.kind}")(w, inputs, dropout)
        return torch.baddbmm(w["head.bias"], features, w["head.weight"])

    def _look_up(self, w: dict[str, Tensor], tokens: Tensor) -> Tensor:
        table = w["embedding"]
        members, vocabulary, size = table.shape
        offsets = torch.arange(members, device=tokens.device).view(-1, *[1] * (tokens.dim() - 1)) * vocabulary
        return F.embedding(tokens + offsets, table.reshape(-1, size))

    def _batch_norm(self, w: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
        # Statistics of the batch at hand, also in evaluation, where the batch is the whole split and there is no dropout: as
        # in the product (`hf_alrs.batch_norm`) they suit whichever weights are evaluated, averaged ones too.
        mean = x.mean(1, keepdim=True)
        centred = x - mean
        x = centred * (centred.square().mean(1, keepdim=True) + 1e-5).rsqrt()
        return torch.addcmul(w[f"{name}.bias"], x, w[f"{name}.weight"])

    def _layer_norm(self, w: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
        return torch.addcmul(w[f"{name}.bias"], F.layer_norm(x, x.shape[-1:]), w[f"{name}.weight"])

    def _forward_dense(self, w: dict[str, Tensor], x: Tensor, dropout: Callable[[Tensor], Tensor]) -> Tensor:
        spec = self.spec
        for layer in range(spec.depth):
            y = torch.baddbmm(w[f"layer{layer}.bias"], x, w[f"layer{layer}.weight"])
            if spec.batch_norm:
                y = self._batch_norm(w, f"norm{layer}", y)
            elif spec.layer_norm:
                y = self._layer_norm(w, f"norm{layer}", y)
            y = dropout(self.activation(y))
            x = x + y if spec.residual and layer else y
        return x

    def _forward_mlp(self, w: dict[str, Tensor], x: Tensor, dropout: Callable[[Tensor], Tensor]) -> Tensor:
        return self._forward_dense(w, x, dropout)

    def _forward_bag(self, w: dict[str, Tensor], x: Tensor, dropout: Callable[[Tensor], Tensor]) -> Tensor:
        return self._forward_dense(w, self._look_up(w, x).mean(2), dropout)

    def _forward_conv(self, w: dict[str, Tensor], x: Tensor, dropout: Callable[[Tensor], Tensor]) -> Tensor:
        spec = self.spec
        members, batch = x.shape[:2]
        # Members side by side as channels: grouped convolution is several times faster than unfolding.
        x = x.transpose(0, 1).flatten(1, 2)
        for layer in range(spec.depth):
            weight = w[f"conv{layer}.weight"]
            y = F.conv2d(x, weight.flatten(0, 1), w[f"conv{layer}.bias"].flatten(), padding=1, groups=members)
            if spec.batch_norm:
                scale, shift = w[f"norm{layer}.weight"].flatten(), w[f"norm{layer}.bias"].flatten()
                y = F.batch_norm(y, None, None, scale, shift, training=True)
            y = self.activation(y)
            x = x + y if spec.residual and x.shape == y.shape else y
            if layer % pool_period(spec.depth) == 0:
                x = F.max_pool2d(x, 2)
        x = x.view(batch, members, -1, *x.shape[2:])
        if spec.pool == "mean":
            return dropout(x.mean((3, 4)).transpose(0, 1))
        x = x.flatten(2).transpose(0, 1)
        return dropout(self.activation(torch.baddbmm(w["dense.bias"], x, w["dense.weight"])))

    def _forward_rnn(self, w: dict[str, Tensor], x: Tensor, dropout: Callable[[Tensor], Tensor]) -> Tensor:
        x = self._look_up(w, x) if self.tokens else x[:, :, 0]  # rows of an image are the steps
        outputs = []
        for direction in range(1 + self.spec.bidirectional):
            sequence = x.flip(2) if direction else x
            # Time first, so that the gates of a step are one contiguous block.
            sequence = sequence.permute(0, 2, 1, 3)
            members, length, batch, _ = sequence.shape
            gates = torch.baddbmm(
                w[f"input{direction}.bias"],
                sequence.reshape(members, length * batch, -1),
                w[f"input{direction}.weight"],
            ).view(members, length, batch, -1)
            outputs.append(self._recur(gates, w[f"recurrent{direction}.weight"]))
        return dropout(torch.cat(outputs, -1))

    def _recur(self, gates: Tensor, recurrent: Tensor) -> Tensor:
        members, length, batch, _ = gates.shape
        hidden = self.spec.hidden
        h = c = gates.new_zeros(members, batch, hidden)
        total: Tensor | float = 0.0
        for step in gates.unbind(1):
            step = torch.baddbmm(step, h, recurrent)
            if self.spec.cell == "lstm":
                keep, write, read = torch.sigmoid(step[..., : 3 * hidden]).chunk(3, -1)
                c = keep * c + write * torch.tanh(step[..., 3 * hidden :])
                h = read * torch.tanh(c)
            else:
                h = torch.lerp(h, torch.tanh(step[..., hidden:]), torch.sigmoid(step[..., :hidden]))
            if self.spec.pool == "mean":
                total = total + h
        return total / length if self.spec.pool == "mean" else h

    def _forward_attention(self, w: dict[str, Tensor], x: Tensor, dropout: Callable[[Tensor], Tensor]) -> Tensor:
        spec, heads = self.spec, self.spec.heads
        if self.tokens:
            x = self._look_up(w, x)
            members, batch, length, d = x.shape
        else:
            members, batch, channels, height, width = x.shape
            x = x.view(members, batch, channels, height // 2, 2, width // 2, 2).permute(0, 1, 3, 5, 2, 4, 6)
            length, d = height * width // 4, spec.hidden
            x = x.reshape(members, batch * length, channels * 4)
            x = torch.baddbmm(w["patch.bias"], x, w["patch.weight"]).view(members, batch, length, d)
        x = (x + w["position"].unsqueeze(1)).view(members, batch * length, d)
        if not spec.pre_norm:
            x = self._layer_norm(w, "norm", x)
        x = dropout(x)
        for block in range(spec.depth):
            y = self._layer_norm(w, f"attention_norm{block}", x) if spec.pre_norm else x
            names = [f"{name}{block}" for name in self._projections]
            qkv = torch.cat([torch.baddbmm(w[f"{name}.bias"], y, w[f"{name}.weight"]) for name in names], -1)
            qkv = qkv.view(members * batch, length, 3, heads, d // heads).permute(2, 0, 3, 1, 4)
            y = F.scaled_dot_product_attention(qkv[0], qkv[1], qkv[2])
            y = y.transpose(1, 2).reshape(members, batch * length, d)
            y = dropout(torch.baddbmm(w[f"out{block}.bias"], y, w[f"out{block}.weight"]))
            x = x + y if spec.pre_norm else self._layer_norm(w, f"attention_norm{block}", x + y)
            y = self._layer_norm(w, f"feedforward_norm{block}", x) if spec.pre_norm else x
            y = self.activation(torch.baddbmm(w[f"up{block}.bias"], y, w[f"up{block}.weight"]))
            y = dropout(torch.baddbmm(w[f"down{block}.bias"], y, w[f"down{block}.weight"]))
            x = x + y if spec.pre_norm else self._layer_norm(w, f"feedforward_norm{block}", x + y)
        x = x.view(members, batch, length, d)
        x = x.mean(2) if spec.pool == "mean" else x[:, :, 0]
        x = self._layer_norm(w, "norm", x) if spec.pre_norm else x
        if spec.pooler:
            x = dropout(torch.tanh(torch.baddbmm(w["pooler.bias"], x, w["pooler.weight"])))
        return x


class Population:
    """
    `num_tasks * num_members` independent training runs of one spec, advanced together. The member index varies
    fastest; the members of a task share data, data order, dropout masks and initial weights, so that their results
    differ by their learning rates only.

    Args:
        spec (`TaskSpec`): What is trained.
        num_tasks (`int`): Tasks, which differ in the data they draw and in their initial weights.
        num_members (`int`): Runs of each task.
        device (`str`, *optional*, defaults to `"cpu"`): Where everything lives.
        data (`TaskData`, *optional*): Data to use instead of drawing it from the spec.
    """

    def __init__(
        self,
        spec: TaskSpec,
        num_tasks: int,
        num_members: int,
        device: str | torch.device = "cpu",
        data: TaskData | None = None,
    ):
        self.spec, self.num_tasks, self.num_members = spec, num_tasks, num_members
        self.size = num_tasks * num_members
        self.device = torch.device(device)
        data = data if data is not None else make_data(spec, num_tasks)
        self._inputs = {name: x.to(self.device) for name, x in data.inputs.items() if name != "upstream"}
        self._labels = {name: y.to(self.device) for name, y in data.labels.items() if name != "upstream"}
        self._task_index = torch.arange(num_tasks, device=self.device)[:, None]

        self.network = _Network(spec, data.inputs["train"], spec.num_classes)
        parameters = self.network.parameters
        self.parameter_names = [parameter.name for parameter in parameters]
        self.shapes = [parameter.shape for parameter in parameters]
        self.sizes = [math.prod(shape) for shape in self.shapes]
        self.num_parameters = sum(self.sizes)
        self.is_matrix = [parameter.is_matrix for parameter in parameters]
        self.is_embedding = [parameter.is_embedding for parameter in parameters]
        self.fan_in = [parameter.fan_in for parameter in parameters]
        self.fan_out = [parameter.fan_out for parameter in parameters]

        def buffer() -> Tensor:
            return torch.zeros(self.size * self.num_parameters, device=self.device)

        self.weights, self.gradients, self.updates = buffer(), buffer(), buffer()
        self.initial_weights, self.momentum, self.second_moment = buffer(), buffer(), buffer()
        self.beta1 = MOMENTUM  # of Adam; a run under control lowers it
        self.step_counts = torch.zeros(self.size, device=self.device)
        self._even_counts: int | None = 0  # the count if all members share it
        # Leaves that share memory with the buffers: backward() accumulates straight into `gradients`.
        self._leaves = {}
        for name, weight, gradient in zip(
            self.parameter_names, self._shaped(self.weights), self._shaped(self.gradients), strict=True
        ):
            leaf = weight.detach().requires_grad_()
            leaf.grad = gradient
            self._leaves[name] = leaf
        self._mask_generator = torch.Generator(device=self.device)
        self._epoch, self._order = -1, torch.empty(0)

        low, high = GRID[spec.optimizer]
        self.learning_rate_grid = torch.linspace(low, high, GRID_SIZE, device=self.device) * math.log(10)
        self.steps_per_epoch = max(1, data.inputs["train"].shape[1] // spec.batch_size)
        self.num_epochs = spec.num_training_steps / self.steps_per_epoch

        self._set_initial(self._draw_initial())
        if spec.pretrained:
            self._set_initial(self._pretrain(data))
        elif spec.damaged:
            self._set_initial(self._damage(data))
        self.reset()

    # -- buffers

    def split(self, flat: Tensor) -> list[Tensor]:
        """Views `[members, n_i]` of a flat buffer, one per parameter tensor."""
        return [block.view(self.size, -1) for block in flat.split([self.size * size for size in self.sizes])]

    def _shaped(self, flat: Tensor) -> list[Tensor]:
        return [x.view(self.size, *shape) for x, shape in zip(self.split(flat), self.shapes, strict=True)]

    def dot(self, a: Tensor, b: Tensor) -> Tensor:
        """Inner product of two flat buffers, per member."""
        total = torch.zeros(self.size, device=self.device)
        for x, y in zip(self.split(a), self.split(b), strict=True):
            total += torch.linalg.vecdot(x, y)
        return total

    # -- initial weights: lists of `[tasks, *shape]`

    def _draw_initial(self) -> list[Tensor]:
        generator = torch.Generator().manual_seed(self.spec.seed * 2)
        initial = []
        for parameter in self.network.parameters:
            shape = (self.num_tasks, *parameter.shape)
            if parameter.distribution == "uniform":
                x = (torch.rand(shape, generator=generator) * 2 - 1) * parameter.scale
            elif parameter.distribution == "normal":
                x = torch.randn(shape, generator=generator) * parameter.scale
            else:
                x = torch.full(shape, parameter.scale)
            initial.append(x.to(self.device))
        return initial

    def _set_initial(self, initial: list[Tensor]) -> None:
        for target, x in zip(self._shaped(self.initial_weights), initial, strict=True):
            target.copy_(x.repeat_interleave(self.num_members, 0))

    def _get_initial(self) -> list[Tensor]:
        return [x[:: self.num_members].clone() for x in self._shaped(self.initial_weights)]

    def _pretrain(self, data: TaskData) -> list[Tensor]:
        """Trains on the upstream labels at a few rates, keeps the best run of each task, and draws a fresh head."""
        spec = self.spec
        upstream_spec = replace(
            spec,
            num_classes=data.num_upstream_classes,
            num_training_steps=spec.upstream_steps,
            batch_size=32,
            gradient_accumulation_steps=1,
            optimizer="adam",
            weight_decay=0.0,
            clip_norm=1.0,
            pretrained=False,
            seed=spec.seed + 1,
        )
        inputs, labels = data.inputs["upstream"], data.labels["upstream"]
        held_out = min(UPSTREAM_HELD_OUT, inputs.shape[1] // 4)
        upstream_data = TaskData(
            inputs={"train": inputs[:, held_out:], "eval": inputs[:, :held_out]},
            labels={"train": labels[:, held_out:], "eval": labels[:, :held_out]},
            num_upstream_classes=0,
        )
        upstream = Population(upstream_spec, self.num_tasks, len(UPSTREAM_RATES), self.device, upstream_data)
        rates = torch.tensor(UPSTREAM_RATES, device=self.device).log().repeat(self.num_tasks)
        loss, _ = upstream.run_fixed(rates)
        self.upstream_loss, best = loss.view(self.num_tasks, -1).min(1)
        best = best + torch.arange(self.num_tasks, device=self.device) * len(UPSTREAM_RATES)
        initial = [x[best].clone() for x in upstream._shaped(upstream.weights)]
        fresh = self._get_initial()
        for index, name in enumerate(self.parameter_names):
            if name.startswith("head"):
                initial[index] = fresh[index]
                if spec.head_std:
                    # What `transformers` does to a new classification head.
                    std = spec.head_std if name == "head.weight" else 0.0
                    initial[index] = initial[index] / initial[index].std().clamp(min=1e-8) * std
        # A diverged upstream run would leave a task without anything to learn from.
        finite = all(bool(torch.isfinite(x).all()) for x in initial)
        return initial if finite else fresh

    def _damage(self, data: TaskData) -> list[Tensor]:
        spec = self.spec
        initial = self._get_initial()
        if spec.damage_scale == 0:
            healthy = Population(replace(spec, damaged=False), self.num_tasks, 1, self.device, data)
            rate = healthy.learning_rate_grid[12 + spec.seed % 2].expand(self.num_tasks).exp()
            for step in range(DAMAGE_STEPS):
                healthy.loss_and_gradient(step)
                healthy.optimizer_step(rate)
            damaged = healthy._shaped(healthy.weights)
            if all(bool(torch.isfinite(x).all()) for x in damaged):
                return [x.clone() for x in damaged]
        scale = spec.damage_scale or 3.0
        return [x * scale if matrix else x for x, matrix in zip(initial, self.is_matrix, strict=True)]

    # -- training

    @torch.no_grad()
    def reset(self) -> None:
        """Every member back to the start: initial weights, no optimizer state, first batch next."""
        self.weights.copy_(self.initial_weights)
        for buffer in (self.momentum, self.second_moment, self.gradients, self.updates):
            buffer.zero_()
        self.step_counts.zero_()
        self._even_counts = 0
        self._epoch = -1

    @torch.no_grad()
    def restart(self, mask: Tensor) -> None:
        """
        Some members back to their initial weights, without optimizer state; the data order goes on.

        Args:
            mask (`Tensor`): Which members, boolean `[members]`.
        """
        if not bool(mask.any()):
            return
        for weight, initial in zip(self.split(self.weights), self.split(self.initial_weights), strict=True):
            weight[mask] = initial[mask]
        for buffer in (self.momentum, self.second_moment, self.updates):
            for x in self.split(buffer):
                x[mask] = 0
        self.step_counts[mask] = 0
        self._even_counts = 0 if bool(mask.all()) else None

    def _batch(self, step: int) -> tuple[Tensor, Tensor]:
        """The batch of a step; a function of the step alone, so that no run can disturb another one's order."""
        epoch, position = divmod(step, self.steps_per_epoch)
        n, batch_size = self._inputs["train"].shape[1], self.spec.batch_size
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(self.spec.seed * 1_000_003 + 7 + epoch)
            order = torch.stack([torch.randperm(n, generator=generator) for _ in range(self.num_tasks)])
            self._epoch, self._order = epoch, order.to(self.device)
        index = self._order[:, position * batch_size : (position + 1) * batch_size]
        return self._inputs["train"][self._task_index, index], self._labels["train"][self._task_index, index]

    def _dropout(self, x: Tensor) -> Tensor:
        if self.spec.dropout == 0:
            return x
        # One mask for all members of a task: runs that differ in their rate only see the same noise.
        keep = 1 - self.spec.dropout
        mask = torch.empty(self.num_tasks, *x.shape[1:], device=self.device)
        mask.bernoulli_(keep, generator=self._mask_generator).div_(keep)
        by_task = x.unflatten(0, (self.num_tasks, self.num_members))
        return (by_task * mask.unsqueeze(1)).flatten(0, 1)

    def loss_and_gradient(self, step: int) -> Tensor:
        """
        Fills `gradients` with those of the training loss on the batch of a step, before clipping.

        Args:
            step (`int`): Which batch of the data order, and which dropout masks.

        Returns:
            `Tensor`: The training loss of each member, as it is; where a gradient is not finite it is 0 instead.
        """
        num_parts = self.spec.gradient_accumulation_steps
        if self.spec.dropout:
            self._mask_generator.manual_seed(self.spec.seed * 1_000_003 + step)
        self.gradients.zero_()
        total = torch.zeros(self.size, device=self.device)
        for inputs, labels in zip(*(x.chunk(num_parts, 1) for x in self._batch(step)), strict=True):
            logits = self.network.forward(self._leaves, inputs.repeat_interleave(self.num_members, 0), self._dropout)
            labels = labels.repeat_interleave(self.num_members, 0)
            loss = (
                F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view(self.size, -1).mean(1)
            )
            (loss.sum() / num_parts).backward()
            total += loss.detach() / num_parts
        if not bool(torch.isfinite(self.gradients.sum())):
            self.gradients.nan_to_num_(0.0, 0.0, 0.0)
        return total

    @torch.no_grad()
    def gradient_norm(self) -> Tensor:
        """Norm of what `gradients` holds, per member."""
        return self.dot(self.gradients, self.gradients).sqrt()

    @torch.no_grad()
    def optimizer_step(self, lr: Tensor) -> None:
        """
        One step of the optimizer of the spec; clips `gradients` in place and leaves what was added in `updates`.

        Args:
            lr (`Tensor`): The learning rate of each member.
        """
        spec = self.spec
        gradients, updates = self.gradients, self.updates
        if spec.clip_norm is not None:
            factor = (spec.clip_norm / (self.gradient_norm() + 1e-6)).clamp(max=1.0)
            for x in self.split(gradients):
                x.mul_(factor[:, None])
        decoupled = spec.optimizer == "adamw"
        if spec.weight_decay and not decoupled:
            # On a copy, so that `gradients` stays what a training loop would see.
            gradients = updates.copy_(gradients)
            for x, weight, matrix in zip(self.split(gradients), self.split(self.weights), self.is_matrix, strict=True):
                if matrix:
                    x.add_(weight, alpha=spec.weight_decay)
        self.step_counts += 1
        if self._even_counts is not None:
            self._even_counts += 1
        scale = -lr
        if spec.optimizer in ("adam", "adamw"):
            self.momentum.lerp_(gradients, 1 - self.beta1)
            self.second_moment.mul_(BETA2).addcmul_(gradients, gradients, value=1 - BETA2)
            torch.sqrt(self.second_moment, out=updates)
            # m / b1 / (sqrt(v) / b2 + eps) = m / (sqrt(v) + eps b2) * b2 / b1, with fewer passes over the buffers.
            correction1 = 1 - self.beta1**self.step_counts
            correction2 = (1 - BETA2**self.step_counts).sqrt()
            if self._even_counts is not None:
                updates.add_(EPSILON * math.sqrt(1 - BETA2**self._even_counts))
            else:
                for x in self.split(updates):
                    x.add_(EPSILON * correction2[:, None])
            torch.div(self.momentum, updates, out=updates)
            scale = scale * correction2 / correction1
        elif spec.optimizer == "sgdm":
            self.momentum.mul_(MOMENTUM).add_(gradients)
            updates.copy_(self.momentum)
        elif gradients is not updates:
            updates.copy_(gradients)
        for x, weight, matrix in zip(self.split(updates), self.split(self.weights), self.is_matrix, strict=True):
            x.mul_(scale[:, None])
            if decoupled and matrix and spec.weight_decay:
                x.addcmul_(weight, (-spec.weight_decay * lr)[:, None])
        self.weights.add_(updates)

    @torch.no_grad()
    def evaluate(
        self, split: str = "eval", weights: Tensor | None = None, num_examples: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """
        Loss (at most 50, also where it is not finite) and error rate of each member, without dropout.

        Args:
            split (`str`, *optional*, defaults to `"eval"`): `"controller"` or `"eval"`, which are disjoint.
            weights (`Tensor`, *optional*): A flat buffer to evaluate instead of `weights`.
            num_examples (`int`, *optional*): At most so many of the split's.
        """
        losses, wrong = self._outcomes(split, weights, num_examples)
        loss = torch.nan_to_num(losses.mean(1), nan=MAX_LOSS, posinf=MAX_LOSS).clamp(max=MAX_LOSS)
        return loss, wrong.mean(1)

    def _outcomes(self, split: str, weights: Tensor | None, num_examples: int | None) -> tuple[Tensor, Tensor]:
        """Loss of each example and whether it is wrong, `[members, n]` each."""
        flat = self.weights if weights is None else weights
        named = dict(zip(self.parameter_names, self._shaped(flat), strict=True))
        inputs, labels = self._inputs[split][:, :num_examples], self._labels[split][:, :num_examples]
        n = labels.shape[1]
        # Small pieces stay in cache, but batch-norm needs the statistics of the whole split.
        piece = n if self.spec.batch_norm else EVALUATION_PIECE
        losses, wrong = [], []
        for start in range(0, n, piece):
            x = inputs[:, start : start + piece].repeat_interleave(self.num_members, 0)
            y = labels[:, start : start + piece].repeat_interleave(self.num_members, 0)
            logits = self.network.forward(named, x, lambda x: x)
            losses.append(F.cross_entropy(logits.flatten(0, 1), y.flatten(), reduction="none").view(self.size, -1))
            wrong.append((logits.argmax(-1) != y).float())
        return torch.cat(losses, 1), torch.cat(wrong, 1)

    @torch.no_grad()
    def evaluate_chosen(self, averages: list[Tensor]) -> tuple[Tensor, Tensor]:
        """
        Loss and error of each member at the end of a run; where there are two averages, of the weights that the controller's
        split chooses.

        Args:
            averages (`list[Tensor]`): Flat buffers: none, the short average, or that and the long one.
        """
        if len(averages) < 2:
            return self.evaluate(weights=averages[0] if averages else None)
        mixes = [None if share == RAW_WEIGHTS else torch.lerp(*averages, share) for share in LONG_SHARES]
        size = choice_size(self.spec.num_training_steps * self.spec.batch_size)
        losses = [self._outcomes("controller", mix, size)[0] for mix in mixes]
        parts = torch.stack([torch.stack([x.mean(1) for x in loss.chunk(CHOICE_PARTS, 1)]) for loss in losses])
        chosen = torch.from_numpy(choose(parts.double().cpu().numpy()))[None].to(self.device)
        outcomes = [self.evaluate(weights=mix) for mix in mixes]
        loss, error = (torch.stack(values).gather(0, chosen)[0] for values in zip(*outcomes, strict=True))
        return loss, error

    @torch.no_grad()
    def update_average(self, average: Tensor, num_updates: np.ndarray, gamma: int = GAMMA) -> None:
        """
        Averages the weights (see [`hf_alrs.averaging`]), in place; a member's first update replaces what was there.

        Args:
            average (`Tensor`): The flat buffer of the average.
            num_updates (`np.ndarray` of shape `[num_members]`): Updates of each member before this one.
            gamma (`int`, *optional*): How much later weights count for more.
        """
        share = torch.from_numpy(update_share(num_updates, gamma)).float().to(self.device)
        first = torch.from_numpy(num_updates == 0).to(self.device) if (num_updates == 0).any() else None
        for mean, weight in zip(self.split(average), self.split(self.weights), strict=True):
            if first is not None:  # copied, because what is not finite stays so under any share
                mean[first] = weight[first]
            mean.lerp_(weight, share[:, None])

    def run_fixed(self, log_lr: Tensor, final_ratio: float = 0.0, average: bool = False) -> tuple[Tensor, Tensor]:
        """
        A whole run from the initial weights at given peak rates, with 5 % linear warmup and a linear decay.

        Args:
            log_lr (`Tensor`): Natural logarithm of the peak rate of each member.
            final_ratio (`float`, *optional*, defaults to 0): Rate at the end of the decay over the peak rate.
            average (`bool`, *optional*, defaults to `False`): Whether to evaluate averaged weights, with their choice and with
                beta1 as the product has them.

        Returns:
            `tuple[Tensor, Tensor]`: Loss and error on the eval split.
        """
        total = self.spec.num_training_steps
        warmup = max(1, int(WARMUP_SHARE * total))
        peak = log_lr.to(self.device).exp()
        averages = [(self.initial_weights.clone(), gamma) for gamma in ((GAMMA, LONG_GAMMA) if average else ())]
        num_updates = np.zeros(self.size)
        self.reset()
        self.beta1 = min(MOMENTUM, ALRSConfig().highest_beta1(total)) if average else MOMENTUM
        for step in range(total):
            decay = min(1.0, (total - step) / (total - warmup))
            factor = min(1.0, (step + 1) / warmup) * (final_ratio + (1.0 - final_ratio) * decay)
            self.loss_and_gradient(step)
            self.optimizer_step(peak * factor)
            if averages and (step + 1) % update_interval(total) == 0:
                for mean, gamma in averages:
                    self.update_average(mean, num_updates, gamma)
                num_updates += 1
        return self.evaluate_chosen([mean for mean, _ in averages])
