"""
Inner products of gradients, updates and weights, measured on a strided subsample of the optimizer's parameters.

Only the step before a decision and the step of the decision are looked at; on all other steps nothing is read. A tensor
gives an equal share of `max_size` coordinates, scaled so that inner products are unbiased.

Parameters that are sharded over processes (`DTensor`, as FSDP2 and tensor parallelism make them) are read at the same
coordinates as whole ones: each process gives those that it holds, and one exchange of at most `max_size` numbers puts
them together, so that every process has the signals of the whole model.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from .features import SIGNALS


if torch.distributed.is_available():
    from torch.distributed.tensor import DTensor, Replicate, Shard
else:
    DTensor = Replicate = Shard = None

# Fewer coordinates of a tensor make its norm too noisy.
_MIN_SHARE = 1024


def _real(tensor: torch.Tensor) -> torch.Tensor:
    """Real and imaginary parts of complex numbers side by side, as optimizers take them."""
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def _stride(parameter: torch.Tensor, share: int) -> int:
    """The step at which about `share` coordinates are visited, and with them every column of a matrix."""
    stride = max(1, parameter.numel() // share)
    while math.gcd(stride, parameter.shape[-1] if parameter.dim() else 1) > 1:
        stride += 1
    return stride


def is_sharded(tensor: torch.Tensor) -> bool:
    """Whether a tensor is spread over processes (`DTensor`)."""
    return DTensor is not None and isinstance(tensor, DTensor)


def sharded_like(local: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    """The `DTensor` of the shape and placement of another one whose part here is `local`."""
    return DTensor.from_local(
        local, tensor.device_mesh, tensor.placements, run_check=False, shape=tensor.shape, stride=tensor.stride()
    )


class _LocalPart:
    """
    Which of the coordinates 0, stride, 2 stride, ... of a sharded parameter this process holds.

    Where several processes hold the same coordinate, the first of them counts. Placements whose local coordinates are no
    block of the whole (FSDP2 and tensor parallelism on one dimension) are read from the assembled tensor instead.

    Args:
        parameter (`DTensor`): The parameter.
        stride (`int`): Distance of the coordinates in the flattened whole tensor.
    """

    def __init__(self, parameter: torch.Tensor, stride: int):
        mesh, self.placements, self.stride = parameter.device_mesh, parameter.placements, stride
        self.size = len(range(0, parameter.numel(), stride))
        self.assembled = any(type(placement) not in (Shard, Replicate) for placement in self.placements)
        if self.assembled:
            return
        first, length = [0] * parameter.dim(), list(parameter.shape)
        counts = True
        for placement, parts, rank in zip(self.placements, mesh.shape, mesh.get_coordinate(), strict=True):
            if isinstance(placement, Shard):  # as torch.chunk divides: the last parts may be smaller, or empty
                size = -(-length[placement.dim] // parts)
                start = min(rank * size, length[placement.dim])
                first[placement.dim] += start
                length[placement.dim] = min(size, length[placement.dim] - start)
            else:
                counts &= rank == 0
        coordinates = torch.arange(0, parameter.numel(), stride)
        held = torch.full_like(coordinates, counts, dtype=torch.bool)
        local = torch.zeros_like(coordinates)
        below = parameter.numel()
        for size, begin, n in zip(parameter.shape, first, length, strict=True):
            below //= size
            place = coordinates // below % size - begin
            held &= (place >= 0) & (place < n)
            local = local * n + place
        self.held = held.nonzero()[:, 0].to(parameter.device)
        self.local = local[held].to(parameter.device)

    def read(self, tensor: torch.Tensor) -> torch.Tensor:
        """This process's share of the coordinates, zero where another one has them."""
        if self.assembled:
            whole = tensor.full_tensor().reshape(-1)[:: self.stride]
            return whole if torch.distributed.get_rank() == 0 else torch.zeros_like(whole)
        if tensor.placements != self.placements:
            tensor = tensor.redistribute(placements=self.placements)
        part = tensor.to_local().reshape(-1)
        return part.new_zeros(self.size).index_copy_(0, self.held, part[self.local])


def measuring_device(parameter: torch.Tensor) -> torch.device:
    """Where a parameter's signals are measured: Apple's MPS has neither double precision nor segmented sums."""
    return torch.device("cpu") if parameter.device.type == "mps" else parameter.device


class SignalRecorder:
    """
    Measures the signals of `hf_alrs.features.SIGNALS` on live parameters.

    Args:
        parameters (`Sequence[torch.nn.Parameter]`): Trained parameters.
        max_size (`int`): Coordinates of all tensors together. A tensor that is larger than its share is read at a
            stride without a factor in common with its last dimension, so that all columns are visited.
    """

    def __init__(self, parameters: Sequence[torch.nn.Parameter], max_size: int):
        self.parameters = [p for p in parameters if p.numel() > 0]  # a shard may hold nothing of a parameter
        self.device = measuring_device(self.parameters[0])
        share = max(_MIN_SHARE, max_size // len(self.parameters))
        self._any_complex = any(p.is_complex() for p in self.parameters)
        numbers = [_real(p.detach()) for p in self.parameters]
        self._strides = [_stride(p, share) for p in numbers]
        sizes = [len(range(0, p.numel(), stride)) for p, stride in zip(numbers, self._strides, strict=True)]
        # sqrt(n / subsample) on both factors of a product makes the sum over the subsample an unbiased estimate
        self._scale = torch.cat(
            [
                torch.full((k,), math.sqrt(p.numel() / k), dtype=torch.float32)
                for k, p in zip(sizes, numbers, strict=True)
            ]
        ).to(self.device)
        self._all_read = all(stride == 1 for stride in self._strides)  # the scale is 1 everywhere
        self._one_device = all(p.device == self.device for p in self.parameters)
        self._sizes = torch.tensor(sizes, device=self.device)
        # Weight of each tensor in a mean over the matrices
        is_matrix = torch.tensor(
            [float(p.dim() > 1) for p in self.parameters], dtype=torch.float32, device=self.device
        )
        num_matrices = sum(p.dim() > 1 for p in self.parameters)
        self._matrix_share = is_matrix / max(num_matrices, 1)
        # Of sharded parameters alone; the others are whole on every process
        self._parts = [
            _LocalPart(p, stride) if is_sharded(p) else None
            for p, stride in zip(self.parameters, self._strides, strict=True)
        ]
        matrices = [p for p in self.parameters if p.dim() > 1]
        widths = [0.5 * math.log(min(p.shape[0], p.numel() // p.shape[0])) for p in matrices]
        kernel_widths = [width for p, width in zip(matrices, widths, strict=True) if p.dim() > 2]
        constants = {
            "matrix_width": sum(widths) / max(num_matrices, 1),
            "kernel_width": sum(kernel_widths) / max(num_matrices, 1),
            "matrix_count": math.log(max(num_matrices, 1)),
            "size": 0.5 * math.log(sum(p.numel() for p in numbers)),
        }
        self._measured = SIGNALS[: -len(constants)]
        self._constants = torch.tensor(
            [constants[name] for name in SIGNALS[len(self._measured) :]], dtype=torch.float64, device=self.device
        )
        self.initial: torch.Tensor | None = None
        self._gradient: torch.Tensor | None = None  # one step before the decision
        self._weights: torch.Tensor | None = None
        self._last_weights: torch.Tensor | None = None  # at the last decision
        self._displacement: torch.Tensor | None = None  # between the last two decisions

    def _gather(self, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        if any(self._parts):
            return self._gather_sharded(tensors).mul_(self._scale)
        # A small model's step is hardly longer than a few dozen calls of torch, hence none that changes nothing.
        parts = [t.reshape(-1) for t in (map(_real, tensors) if self._any_complex else tensors)]
        if not self._all_read:
            parts = [part[::stride] for part, stride in zip(parts, self._strides, strict=True)]
        if not self._one_device:
            parts = [part.to(self.device) for part in parts]
        values = torch.cat(parts).to(torch.float32)
        return values if self._all_read else values.mul_(self._scale)

    def _gather_sharded(self, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        first = torch.distributed.get_rank() == 0
        shares = []
        for tensor, part, stride in zip(tensors, self._parts, self._strides, strict=True):
            if part is None:
                share = tensor.reshape(-1)[::stride]
                share = share if first else torch.zeros_like(share)
            else:
                share = part.read(tensor)
            shares.append(share.to(self.device, torch.float32))
        values = torch.cat(shares)
        torch.distributed.all_reduce(values)
        return values

    def _gradients(self, scale: torch.Tensor | None) -> torch.Tensor:
        gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in self.parameters]
        gathered = self._gather([g.to_dense() if g.is_sparse else g for g in gradients])
        return gathered if scale is None else gathered / scale.to(self.device)

    @torch.no_grad()
    def start(self) -> None:
        """Keeps the initial weights (the subsample of them)."""
        self.initial = self._gather(self.parameters)
        self._last_weights = self.initial

    @torch.no_grad()
    def record_previous(self, scale: torch.Tensor | None = None) -> None:
        """
        Keeps the gradient and the weights of the step before a decision, before the optimizer moves them.

        Args:
            scale (`torch.Tensor`, *optional*): Factor that mixed precision has left on the gradients.
        """
        self._gradient, self._weights = self._gradients(scale), self._gather(self.parameters)

    @torch.no_grad()
    def measure(self, scale: torch.Tensor | None = None) -> torch.Tensor | None:
        """
        Signals at the step of a decision, before the optimizer moves the weights.

        Args:
            scale (`torch.Tensor`, *optional*): Factor that mixed precision has left on the gradients.

        Returns:
            `torch.Tensor` of shape `[len(SIGNALS)]`, float64, on the parameters' device; `None` where the step before
            was not recorded (right after a restart).
        """
        if self._weights is None:
            return None
        g, w = self._gradients(scale), self._gather(self.parameters)
        h, u = self._gradient, w - self._weights
        x, d = w - self.initial, w - self._last_weights
        e = self._displacement if self._displacement is not None else torch.zeros_like(d)
        squares_u = torch.segment_reduce(u * u, "sum", lengths=self._sizes)
        squares_w = torch.segment_reduce(w * w, "sum", lengths=self._sizes)
        zeros = torch.segment_reduce((g == 0).float(), "mean", lengths=self._sizes)
        ratio = 0.5 * ((squares_u + 1e-20) / (squares_w + 1e-20)).log()
        values = {
            "gg": g.dot(g),
            "gh": g.dot(h),
            "hh": h.dot(h),
            "gu": g.dot(u),
            "hu": h.dot(u),
            "uu": squares_u.sum(),
            "ww": squares_w.sum(),
            "gx": g.dot(x),
            "xx": x.dot(x),
            "initial": self.initial.dot(self.initial),
            "dd": d.dot(d),
            "de": d.dot(e),
            "ee": e.dot(e),
            "matrix_update_ratio": ratio.dot(self._matrix_share),
            "zero_gradient": zeros.dot(self._matrix_share),
        }
        self._displacement, self._last_weights = d, w
        return torch.cat([torch.stack([values[name] for name in self._measured]).double(), self._constants])

    def reset(self) -> None:
        """Forgets all but the initial weights: the weights are back there."""
        self._gradient = self._weights = self._displacement = None
        self._last_weights = self.initial

    _TENSORS = ("initial", "_gradient", "_weights", "_last_weights", "_displacement")

    def state_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self._TENSORS}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name in self._TENSORS:
            value = state[name]
            setattr(self, name, None if value is None else value.to(self.device))
