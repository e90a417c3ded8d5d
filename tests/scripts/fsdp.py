"""
The same training whole and sharded by FSDP2 (gloo on the CPU): each rank writes what it saw to `OUT/rank<i>.json`.

Every rank has the whole batch, so that the mean of the gradients over ranks is the gradient of one process.

Usage: `python -m torch.distributed.run --nproc_per_node 2 fsdp.py NETWORK OUT`
"""

import io
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard


sys.path.insert(0, str(Path(__file__).parents[1]))

from hf_alrs import ALRSConfig, ALRSScheduler
from hf_alrs.signals import SignalRecorder


NUM_STEPS = 48
# Below the sizes of the two large matrices, so that they are read at a stride
MAX_SIGNAL_SIZE = 4096


class Model(nn.Module):
    """Sizes that no number of processes divides, a parameter of one row, and matrices that are read at a stride."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(13, 67)
        self.second = nn.Linear(67, 67)
        self.last = nn.Linear(67, 1)
        self.unused = nn.Parameter(torch.ones(5, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(torch.relu(self.second(torch.relu(self.first(x))))).squeeze(-1).clone()


def make_model() -> Model:
    torch.manual_seed(0)
    return Model()


def by_rows(model: Model) -> None:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    fully_shard(model.second, mesh=mesh)
    fully_shard(model, mesh=mesh)


def by_columns(model: Model) -> None:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))

    def placement(parameter: nn.Parameter) -> Shard | None:
        return Shard(parameter.dim() - 1) if parameter.shape[-1] % dist.get_world_size() == 0 else None

    fully_shard(model, mesh=mesh, shard_placement_fn=placement)


def replicated(model: Model) -> None:
    """Hybrid sharding: two copies of the model, each on one process here."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(), 1), mesh_dim_names=("replicate", "shard"))
    fully_shard(model, mesh=mesh)


def in_part(model: Model) -> None:
    """Only a block is sharded; the rest is whole on every process."""
    fully_shard(model.second, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))


LAYOUTS: dict[str, Callable[[Model], None]] = {
    "rows": by_rows,
    "columns": by_columns,
    "replicated": replicated,
    "in part": in_part,
}


def batches() -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    teacher = torch.randn(13, generator=generator)
    inputs = [torch.randn(16, 13, generator=generator) for _ in range(NUM_STEPS)]
    return [(x, torch.tanh(x @ teacher)) for x in inputs]


def signals_of(shard: Callable[[Model], None] | None) -> list[list[float]]:
    """The signals of every second step under Adam."""
    model = make_model()
    if shard is not None:
        shard(model)
        assert any(isinstance(p, DTensor) for p in model.parameters())
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    recorder = SignalRecorder(list(model.parameters()), MAX_SIGNAL_SIZE)
    recorder.start()
    measured = []
    for i, (x, y) in enumerate(batches()[:12]):
        optimizer.zero_grad()
        (model(x) - y).square().mean().backward()
        if i % 2:
            measured.append(recorder.measure().tolist())
        else:
            recorder.record_previous()
        optimizer.step()
    return measured


def config(network: str, num_probes: int) -> ALRSConfig:
    return ALRSConfig(
        network=network,
        num_probes=num_probes,
        probe_steps=6,
        phase1_steps=6,
        decision_interval=3,
        meta_num_epochs=3,
        feedback_interval=2,
        max_restarts=2,
        restart_window=0.9,
        max_signal_size=MAX_SIGNAL_SIZE,
    )


def whole_weights(model: nn.Module) -> list[float]:
    parts = [p.full_tensor() if isinstance(p, DTensor) else p for p in model.parameters()]
    return torch.cat([p.detach().reshape(-1) for p in parts]).tolist()


def run_of(
    network: str,
    shard: Callable[[Model], None] | None,
    resume_at: int | None = None,
    num_probes: int = 3,
    rate: float = 0.3,
    evaluate: bool = False,
) -> dict[str, Any]:
    """
    A run with probes, or with restarts; `resume_at` goes through a checkpoint of every process there, and with `evaluate`
    the averaged weights are evaluated after every fifth step, and after every tenth they are chosen by the next batch.
    """
    model = make_model()
    if shard is not None:
        shard(model)

    def scheduled() -> tuple[torch.optim.Optimizer, ALRSScheduler]:
        optimizer = torch.optim.SGD(model.parameters(), lr=rate)
        own = config(network, num_probes)
        return optimizer, ALRSScheduler(optimizer, NUM_STEPS, config=own, model=model, can_choose=evaluate)

    @torch.no_grad()
    def loss_on(batch: int) -> float:
        x, y = batches()[batch]
        return float((model(x) - y).square().mean())

    optimizer, scheduler = scheduled()
    history: list[dict[str, Any]] = []
    evaluated: list[float] = []
    for i, (x, y) in enumerate(batches()):
        if i == resume_at:
            scheduler.flush()
            history += scheduler.drain_history()
            file = io.BytesIO()
            torch.save(scheduler.state_dict(), file)
            scheduler.close()
            optimizer, scheduler = scheduled()
            scheduler.load_state_dict(torch.load(io.BytesIO(file.getvalue()), weights_only=True))
        optimizer.zero_grad()
        loss = (model(x) - y).square().mean()
        scheduler.observe(loss=loss)
        loss.backward()
        optimizer.step()
        scheduler.step()
        if evaluate and i % 10 == 9:
            chosen = scheduler.choose_average(lambda at=i: loss_on(at - 9))
            evaluated.append(math.nan if chosen is None else chosen)
        if evaluate and i % 5 == 4:
            optimizer.eval()
            evaluated.append(loss_on(i))
            optimizer.train()
    scheduler.flush()
    history += scheduler.history
    return {
        "rates": [entry["learning_rate"] for entry in history],
        "losses": [entry["loss"] for entry in history],
        "features": [list(entry["features"].values()) for entry in history if "features" in entry],
        "actions": [entry["action"] for entry in history if entry.get("action")],
        "weights": whole_weights(model),
        "evaluated": evaluated,
    }


def main() -> None:
    torch.set_num_threads(1)
    network, out = sys.argv[1], Path(sys.argv[2])
    dist.init_process_group("gloo")
    results: dict[str, Any] = {"signals": {"whole": signals_of(None)}, "runs": {"whole": run_of(network, None)}}
    for name, shard in LAYOUTS.items():
        results["signals"][name] = signals_of(shard)
    far_too_high: dict[str, Any] = {"num_probes": 0, "rate": 30.0}
    results["runs"]["whole, restarted"] = run_of(network, None, **far_too_high)
    results["runs"]["restarted"] = run_of(network, by_rows, **far_too_high)
    results["runs"]["rows"] = run_of(network, by_rows)
    results["runs"]["whole, evaluated"] = run_of(network, None, evaluate=True)
    results["runs"]["evaluated"] = run_of(network, by_rows, evaluate=True)
    results["runs"]["resumed"] = run_of(network, by_rows, resume_at=20)
    (out / f"rank{dist.get_rank()}.json").write_text(json.dumps(results))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
