"""Signals on live parameters: against direct computation, and unbiased where only a part is read."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from hf_alrs.features import SIGNALS
from hf_alrs.signals import SignalRecorder


def values(measured: torch.Tensor) -> dict[str, float]:
    assert measured.dtype == torch.float64
    return dict(zip(SIGNALS, measured.tolist(), strict=True))


class Trajectory:
    """A matrix of 2 x 3 and a vector of 2, moved by hand, with flat copies of everything that happened."""

    def __init__(self, max_size: int = 1000, seed: int = 0):
        self.generator = torch.Generator().manual_seed(seed)
        self.matrix = nn.Parameter(self.draw(2, 3))
        self.vector = nn.Parameter(self.draw(2))
        self.recorder = SignalRecorder([self.matrix, self.vector], max_size)
        self.recorder.start()

    def draw(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=self.generator)

    def weights(self) -> torch.Tensor:
        return torch.cat([self.matrix.detach().flatten(), self.vector.detach()]).double()

    def set_gradient(self) -> torch.Tensor:
        self.matrix.grad, self.vector.grad = self.draw(2, 3), self.draw(2)
        return torch.cat([self.matrix.grad.flatten(), self.vector.grad]).double()

    @torch.no_grad()
    def move(self) -> torch.Tensor:
        before = self.weights()
        self.matrix.add_(0.1 * self.draw(2, 3))
        self.vector.add_(0.1 * self.draw(2))
        return self.weights() - before


def test_signals_are_the_inner_products_that_they_name() -> None:
    t = Trajectory()
    initial = t.weights()
    last, e = initial, torch.zeros(8, dtype=torch.float64)
    for _ in range(3):  # decisions
        for _ in range(2):  # steps that nobody looks at
            t.set_gradient()
            t.move()
        h = t.set_gradient()
        t.recorder.record_previous()
        u = t.move()
        g = t.set_gradient()
        t.matrix.grad[0, 0] = 0.0
        g[0] = 0.0
        got = values(t.recorder.measure())
        w = t.weights()
        x, d = w - initial, w - last
        expected = {
            "gg": g @ g,
            "gh": g @ h,
            "hh": h @ h,
            "gu": g @ u,
            "hu": h @ u,
            "uu": u @ u,
            "ww": w @ w,
            "gx": g @ x,
            "xx": x @ x,
            "initial": initial @ initial,
            "dd": d @ d,
            "de": d @ e,
            "ee": e @ e,
            "matrix_update_ratio": (u[:6].norm() / w[:6].norm()).log(),
            "matrix_width": 0.5 * math.log(2),
            "kernel_width": 0.0,
            "matrix_count": 0.0,
            "zero_gradient": 1 / 6,
            "size": 0.5 * math.log(8),
        }
        assert set(expected) == set(SIGNALS)
        for name, value in expected.items():
            assert got[name] == pytest.approx(float(value), rel=1e-4, abs=1e-6), name
        last, e = w, d
        t.move()


def test_measuring_changes_nothing() -> None:
    t = Trajectory()
    t.set_gradient()
    before = t.weights(), t.matrix.grad.clone()
    t.recorder.record_previous()
    t.recorder.measure()
    assert torch.equal(t.weights(), before[0])
    assert torch.equal(t.matrix.grad, before[1])


def test_nothing_is_measured_before_the_step_before() -> None:
    t = Trajectory()
    t.set_gradient()
    assert t.recorder.measure() is None
    t.recorder.record_previous()
    assert t.recorder.measure() is not None
    t.recorder.reset()
    assert t.recorder.measure() is None


def test_after_a_reset_displacements_start_from_the_initial_weights() -> None:
    t = Trajectory()
    initial = t.weights()
    for _ in range(2):
        t.set_gradient()
        t.recorder.record_previous()
        t.move()
        t.recorder.measure()
    t.recorder.reset()
    t.recorder.record_previous()
    t.move()
    t.set_gradient()
    got = values(t.recorder.measure())
    x = t.weights() - initial
    assert got["dd"] == pytest.approx(float(x @ x), rel=1e-4)
    assert (got["ee"], got["de"]) == (0.0, 0.0)


def test_parameters_without_a_gradient_count_as_zero() -> None:
    t = Trajectory()
    t.set_gradient()
    t.vector.grad = None
    t.recorder.record_previous()
    t.move()
    g = t.matrix.grad.double()
    got = values(t.recorder.measure())
    assert got["gg"] == pytest.approx(float(g.square().sum()), rel=1e-5)
    assert all(math.isfinite(value) for value in got.values())


def test_a_model_without_any_gradient_or_matrix() -> None:
    vector = nn.Parameter(torch.ones(3))
    recorder = SignalRecorder([vector], 10)
    recorder.start()
    recorder.record_previous()
    got = values(recorder.measure())
    assert got["gg"] == got["uu"] == got["matrix_update_ratio"] == got["matrix_width"] == got["matrix_count"] == 0.0
    assert got["ww"] == pytest.approx(3.0)


@pytest.mark.parametrize(
    ("shapes", "width", "kernels", "count"),
    [
        # sqrt(min(fan_in, fan_out)): of 4 and 16
        ([(16, 4)], math.log(2), 0.0, 0.0),
        # a convolution sees 3 * 3 * 3 = 27 inputs and has 9 outputs; vectors do not count
        ([(9, 3, 3, 3), (9,)], math.log(3), math.log(3), 0.0),
        ([(16, 4), (9, 3, 3, 3)], 0.5 * (math.log(2) + math.log(3)), 0.5 * math.log(3), math.log(2)),
    ],
)
def test_widths_and_numbers_of_matrices(
    shapes: list[tuple[int, ...]], width: float, kernels: float, count: float
) -> None:
    recorder = SignalRecorder([nn.Parameter(torch.ones(shape)) for shape in shapes], 10)
    recorder.start()
    recorder.record_previous()
    got = values(recorder.measure())
    assert (got["matrix_width"], got["kernel_width"], got["matrix_count"]) == pytest.approx((width, kernels, count))


def test_a_subsample_is_unbiased() -> None:
    """The mean of ratios over 400 random vectors; one ratio has a standard deviation of about sqrt(2 / 1112)."""
    generator = torch.Generator().manual_seed(0)
    parameter = nn.Parameter(torch.zeros(200, 50))
    squares, products = [], []
    for _ in range(400):
        first, second = torch.randn(2, 200, 50, generator=generator)
        recorder = SignalRecorder([parameter], 1024)
        with torch.no_grad():
            parameter.copy_(first)
        recorder.start()
        parameter.grad = second
        recorder.record_previous()
        with torch.no_grad():
            parameter.add_(first + second)  # u = first + second, so that u.g has the mean |second|^2
        got = values(recorder.measure())
        squares.append(got["gg"] / float(second.square().sum()))
        products.append(got["gu"] / float((second * (first + second)).sum()))
    for ratios in (squares, products):
        mean, deviation = torch.tensor(ratios).mean().item(), torch.tensor(ratios).std().item()
        assert abs(mean - 1) < 4 * deviation / math.sqrt(400), f"expected a mean of 1, got {mean:.4f}"
    assert torch.tensor(squares).std() > 0.02  # it was a subsample indeed


@pytest.mark.parametrize("size", [1, 1000, 1024, 1025, 2047, 5000, 100_000])
def test_the_number_of_coordinates_is_bounded(size: int) -> None:
    # Eight tensors share 16384 coordinates: 2048 each, up to the rounding of strides
    recorder = SignalRecorder([nn.Parameter(torch.zeros(size)) for _ in range(8)], 16384)
    read = recorder._sizes.tolist()
    assert read == [size] * 8 if size <= 2048 else max(read) < 2 * 2048
    # No tensor is read at fewer than 1024, however many there are
    recorder = SignalRecorder([nn.Parameter(torch.zeros(size)) for _ in range(8)], 1)
    assert min(recorder._sizes.tolist()) >= min(size, 700)


def test_low_precision_and_strided_parameters() -> None:
    full = torch.linspace(-1, 1, 12).reshape(3, 4)
    expected = None
    for parameter in (nn.Parameter(full), nn.Parameter(full.bfloat16()), nn.Parameter(full.T.contiguous().T)):
        recorder = SignalRecorder([parameter], 100)
        recorder.start()
        parameter.grad = torch.ones_like(parameter)
        recorder.record_previous()
        got = values(recorder.measure())
        expected = expected or got
        assert got == pytest.approx(expected, rel=1e-2)


def test_state_comes_back() -> None:
    first, second = Trajectory(seed=1), Trajectory(seed=1)
    for t in (first, second):
        t.set_gradient()
        t.recorder.record_previous()
        t.move()
        t.set_gradient()
        t.recorder.measure()
        t.recorder.record_previous()
    fresh = SignalRecorder([second.matrix, second.vector], 1000)
    fresh.load_state_dict(second.recorder.state_dict())
    first.move()
    second.move()
    assert torch.equal(first.recorder.measure(), fresh.measure())


@pytest.mark.parametrize("max_size", [1000, 3])
def test_complex_numbers_are_two_real_ones(max_size: int) -> None:
    generator = torch.Generator().manual_seed(0)
    draws = [torch.randn(4, 3, 2, generator=generator) for _ in range(4)]
    measured = []
    for of in (torch.view_as_complex, lambda x: x):
        parameter = nn.Parameter(of(draws[0].clone()))
        recorder = SignalRecorder([parameter], max_size)
        recorder.start()
        parameter.grad = of(draws[1].clone())
        recorder.record_previous()
        with torch.no_grad():
            parameter.add_(of(draws[2].clone()))
        parameter.grad = of(draws[3].clone())
        measured.append(values(recorder.measure()))
    for name in ("gg", "gh", "hh", "gu", "uu", "ww", "gx", "xx", "size"):
        assert measured[0][name] == pytest.approx(measured[1][name], rel=1e-5), name
