"""Resuming is exact: N steps, a checkpoint, new objects and M steps are N + M steps, to the last bit."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from conftest import network_saying, scratch_network, tiny_classifier, tiny_dataset
from safetensors.torch import load_file
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainingArguments, set_seed

from hf_alrs import ALRSCallback, ALRSConfig, ALRSScheduler, ALRSTrainer, InputError, get_scheduler
from hf_alrs.callback import HISTORY_NAME
from hf_alrs.experiment import NamedSchedulerTrainer, find_baseline, train_from


SCRIPTS = Path(__file__).parent / "scripts"
NUM_STEPS = 60
# Decisions come after steps 4, 7, 10, ...: the second ends phase 1, or starts three probes of 6 steps each.
SAVE_STEPS = {
    0: {"gather": 2, "before the fit": 6, "at the fit": 7, "in between": 8, "drive": 16, "feedback": 22, "last": 59},
    3: {
        "snapshot": 7,
        "in a probe": 9,
        "at a decision in a probe": 10,
        "restore": 13,
        "end of probes": 25,
        "drive": 30,
    },
}
CASES = [(probes, step) for probes, steps in SAVE_STEPS.items() for step in steps.values()]
IDS = [f"{probes} probes, {name}" for probes, steps in SAVE_STEPS.items() for name in steps]


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("network")
    scratch_network(scale=2.0).save_pretrained(str(folder))
    return str(folder)


def config_for(network: str, num_probes: int = 0, **changed: Any) -> ALRSConfig:
    """Rates that move, a network that is trained, restarts that happen."""
    defaults: dict[str, Any] = {
        "network": network,
        "num_probes": num_probes,
        "probe_steps": 6,
        "phase1_steps": 6,
        "decision_interval": 3,
        "meta_num_epochs": 3,
        "feedback_interval": 2,
        "max_restarts": 2,
        "restart_window": 0.9,
    }
    return ALRSConfig(**(defaults | changed))


def arguments(output_dir: Path, **changed: Any) -> TrainingArguments:
    defaults: dict[str, Any] = {
        "output_dir": str(output_dir),
        "max_steps": NUM_STEPS,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "learning_rate": 0.01,
        "warmup_steps": 4,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 3,
    }
    return TrainingArguments(**(defaults | changed))


def make_trainer(
    route: str, args: TrainingArguments, config: ALRSConfig, callbacks: list[TrainerCallback] | None = None
) -> Trainer:
    set_seed(args.seed)
    kwargs: dict[str, Any] = {
        "model": tiny_classifier(dropout=0.3, batch_norm=True),
        "args": args,
        "train_dataset": tiny_dataset(),
        "callbacks": list(callbacks or []),
    }
    if args.eval_strategy.value != "no":
        kwargs["eval_dataset"] = {"controller": tiny_dataset(16, seed=9)}
    if route == "callback":
        kwargs["callbacks"].insert(0, ALRSCallback(config))
        return Trainer(**kwargs)
    return ALRSTrainer(alrs_config=config, **kwargs)


def scheduler_of(trainer: Trainer) -> ALRSScheduler:
    return next(c for c in trainer.callback_handler.callbacks if isinstance(c, ALRSCallback)).scheduler


def history_of(output_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output_dir / HISTORY_NAME).read_text().splitlines()]


def outcome(trainer: Trainer) -> dict[str, Any]:
    """All that a resumed run must share with the uninterrupted one."""
    tensors = {f"model.{name}": value.clone() for name, value in trainer.model.state_dict().items()}
    network = scheduler_of(trainer).controller.network
    tensors |= {f"network.{name}": value.clone() for name, value in network.state_dict().items()}
    logs = [(e["step"], e["loss"], e["learning_rate"]) for e in trainer.state.log_history if "learning_rate" in e]
    return {"tensors": tensors, "history": history_of(Path(trainer.args.output_dir)), "logs": logs}


def assert_same(got: dict[str, Any], expected: dict[str, Any]) -> None:
    assert [entry["step"] for entry in got["history"]] == [entry["step"] for entry in expected["history"]]
    for x, y in zip(got["history"], expected["history"], strict=True):
        assert x == y, f"history of step {y['step']}: expected {y}, got {x}"
    assert got["logs"] == expected["logs"]
    assert got["tensors"].keys() == expected["tensors"].keys()
    for name, value in expected["tensors"].items():
        assert torch.equal(got["tensors"][name], value), name


# Trainer


@pytest.fixture(scope="module", params=["callback", "trainer"])
def whole_runs(
    request: pytest.FixtureRequest, network: str, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Callable[[int], tuple[Path, dict[str, Any]]]]:
    """Uninterrupted runs of a route with a checkpoint at every step, made once for each number of probes."""
    runs: dict[int, tuple[Path, dict[str, Any]]] = {}

    def get(num_probes: int) -> tuple[Path, dict[str, Any]]:
        if num_probes not in runs:
            folder = tmp_path_factory.mktemp("whole")
            args = arguments(
                folder, save_strategy="steps", save_steps=1, eval_strategy="steps", eval_steps=5, logging_steps=1
            )
            trainer = make_trainer(request.param, args, config_for(network, num_probes))
            trainer.train()
            runs[num_probes] = folder, outcome(trainer)
        return runs[num_probes]

    return request.param, get


@pytest.mark.reliability(
    "resume in every phase (callback, ALRSTrainer): weights, rates, features, network bit-identical"
)
@pytest.mark.parametrize(("num_probes", "step"), CASES, ids=IDS)
def test_a_resumed_trainer_goes_on_to_the_last_bit(
    whole_runs: tuple[str, Callable[[int], tuple[Path, dict[str, Any]]]],
    num_probes: int,
    step: int,
    network: str,
    tmp_path: Path,
) -> None:
    route, get = whole_runs
    folder, expected = get(num_probes)
    assert {entry["phase"] for entry in expected["history"]} == {"gather", "fit", "drive"}
    # The history of a killed run may be longer than its last checkpoint.
    shutil.copy(folder / HISTORY_NAME, tmp_path / HISTORY_NAME)
    args = arguments(tmp_path, save_strategy="no", eval_strategy="steps", eval_steps=5)
    trainer = make_trainer(route, args, config_for(network, num_probes))
    trainer.train(resume_from_checkpoint=str(folder / f"checkpoint-{step}"))
    assert_same(outcome(trainer), expected)


@pytest.mark.reliability("saving checkpoints changes no bit")
def test_saving_changes_nothing(
    whole_runs: tuple[str, Callable[[int], tuple[Path, dict[str, Any]]]], network: str, tmp_path: Path
) -> None:
    route, get = whole_runs
    args = arguments(tmp_path, save_strategy="no", eval_strategy="steps", eval_steps=5)
    trainer = make_trainer(route, args, config_for(network, 3))
    trainer.train()
    assert_same(outcome(trainer), get(3)[1])


def test_the_whole_run_restarts_and_probes(
    whole_runs: tuple[str, Callable[[int], tuple[Path, dict[str, Any]]]],
) -> None:
    """What the cases above are about must happen in them."""
    _, get = whole_runs
    actions = [entry["action"] for entry in get(3)[1]["history"] if entry.get("action")]
    assert actions[:4] == ["snapshot", "restore", "restore", "restore"] or "restart" in actions
    assert actions.count("restore") >= 2
    changes = [entry for entry in get(0)[1]["history"] if entry.get("network_change")]
    assert len(changes) >= 3
    assert any(entry["features"]["evaluated"] for entry in get(0)[1]["history"] if "features" in entry)


class SaveAt(TrainerCallback):
    """Asks for a checkpoint after the callbacks before it had their turn, as a user's own callback may."""

    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_save = control.should_save or state.global_step == self.step


@pytest.mark.reliability("checkpoint at an epoch's end or asked for by another callback: exact")
@pytest.mark.parametrize(
    "how",
    ["epoch", "own callback"],
)
def test_a_checkpoint_that_was_not_foreseen_is_exact_too(how: str, network: str, tmp_path: Path) -> None:
    # 64 examples: an epoch is 8 steps, and step 8 lies between two decisions
    def make() -> Trainer:
        saves = {"save_strategy": "epoch"} if how == "epoch" else {"save_strategy": "no"}
        callbacks = [SaveAt(8)] if how == "own callback" else []
        return make_trainer("callback", arguments(tmp_path, **saves), config_for(network), callbacks)

    trainer = make()
    trainer.train()
    expected = outcome(trainer)
    trainer = make()
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))
    assert_same(outcome(trainer), expected)


@pytest.mark.reliability("checkpoint made without ALRS: refused with the remedy")
@pytest.mark.parametrize("route", ["callback", "trainer"])
def test_a_checkpoint_made_without_alrs_is_refused(route: str, network: str, tmp_path: Path) -> None:
    args = arguments(tmp_path, save_strategy="steps", save_steps=4, max_steps=4)
    Trainer(tiny_classifier(dropout=0.3, batch_norm=True), args, train_dataset=tiny_dataset()).train()
    trainer = make_trainer(route, arguments(tmp_path), config_for(network))
    with pytest.raises(InputError, match="checkpoint"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))


@pytest.mark.reliability("checkpoint of an ALRS run with save_only_model: refused by both routes")
@pytest.mark.parametrize("route", ["callback", "trainer"])
def test_a_checkpoint_of_the_model_alone_is_refused(route: str, network: str, tmp_path: Path) -> None:
    args = arguments(tmp_path, save_strategy="steps", save_steps=4, max_steps=4, save_only_model=True)
    make_trainer(route, args, config_for(network)).train()
    history = (tmp_path / "alrs_history.jsonl").read_text()
    trainer = make_trainer(route, arguments(tmp_path), config_for(network))
    with pytest.raises(InputError, match="holds no state of ALRS"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert (tmp_path / "alrs_history.jsonl").read_text() == history


@pytest.mark.reliability("checkpoint of a run that went on without ALRS: refused, not taken for the state of before")
@pytest.mark.parametrize("route", ["callback", "trainer"])
def test_a_state_that_a_run_without_alrs_has_carried_along_is_refused(
    route: str, network: str, tmp_path: Path
) -> None:
    args = arguments(tmp_path, save_strategy="steps", save_steps=4, max_steps=4)
    make_trainer("callback", args, config_for(network)).train()
    args = arguments(tmp_path, save_strategy="steps", save_steps=4, max_steps=8)
    plain = Trainer(tiny_classifier(dropout=0.3, batch_norm=True), args, train_dataset=tiny_dataset())
    plain.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    trainer = make_trainer(route, arguments(tmp_path), config_for(network))
    with pytest.raises(InputError, match="checkpoint"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))


@pytest.mark.parametrize("route", ["callback", "trainer"])
def test_a_run_may_go_on_in_its_process_after_its_model_made_a_buffer(route: str, tmp_path: Path) -> None:
    class MakesABuffer(type(tiny_classifier())):
        def forward(self, x: torch.Tensor, labels: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
            if not hasattr(self, "cache"):
                self.register_buffer("cache", torch.zeros(3), persistent=False)
            return super().forward(x, labels)

    class Interrupt(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 6 and not self.done:
                self.done = True
                raise KeyboardInterrupt

        done = False

    network_saying(-3.0).save_pretrained(str(tmp_path / "network"))  # restarts after the jump
    config = config_for(str(tmp_path / "network"), phase1_steps=9, meta_num_epochs=0)
    args = arguments(tmp_path, save_strategy="steps", save_steps=4)
    trainer = make_trainer(route, args, config, [Interrupt()])
    trainer.model.__class__ = MakesABuffer
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    trainer.train(resume_from_checkpoint=True)
    scheduler = scheduler_of(trainer)
    assert "restart" in [entry.get("action") for entry in history_of(tmp_path)]
    assert "cache" not in scheduler._buffer_names


@pytest.mark.reliability("checkpoint of an ALRS run under another scheduler: refused with the remedy")
def test_another_scheduler_does_not_go_on_with_a_checkpoint_of_alrs(network: str, tmp_path: Path) -> None:
    args = arguments(tmp_path, save_strategy="steps", save_steps=4, max_steps=4)
    make_trainer("trainer", args, config_for(network)).train()
    trainer = NamedSchedulerTrainer(
        tiny_classifier(dropout=0.3, batch_norm=True),
        arguments(tmp_path),
        train_dataset=tiny_dataset(),
        baseline=find_baseline("linear"),
    )
    with pytest.raises(InputError, match=r"written by a run of alrs.*another output_dir"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))


@pytest.mark.reliability("max_steps raised on resume after the end: rates above zero again")
@pytest.mark.parametrize("route", ["callback", "trainer"])
def test_a_longer_run_goes_on_learning(route: str, network: str, tmp_path: Path) -> None:
    trainer = make_trainer(
        route, arguments(tmp_path, save_strategy="steps", save_steps=12, max_steps=12), config_for(network)
    )
    trainer.train()
    trainer = make_trainer(route, arguments(tmp_path, max_steps=24), config_for(network))
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-12"))
    rates = [entry["learning_rate"] for entry in history_of(tmp_path)]
    assert len(rates) == 24
    assert min(rates[12:]) > 0


# Bare loops


def bare_run(
    config: ALRSConfig, num_steps: int, checkpoint: dict[str, Any] | None = None, save_at: int | None = None
) -> tuple[list[dict[str, Any]], list[torch.Tensor], dict[str, Any] | None]:
    """A plain PyTorch loop; returns its history, what it ended with, and the checkpoint of step `save_at`."""
    set_seed(3)
    model = tiny_classifier(dropout=0.3, batch_norm=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    scheduler = get_scheduler("alrs", optimizer, 4, NUM_STEPS, {"config": config, "model": model})
    batches = [batch for _ in range(8) for batch in DataLoader(tiny_dataset(), batch_size=8)]
    first, saved = 0, None
    if checkpoint is not None:
        state = torch.load(io.BytesIO(checkpoint["file"]), weights_only=True)
        first = state["step"]
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        scheduler.load_state_dict(state["scheduler"])
        torch.set_rng_state(state["rng"])
    for step in range(first, num_steps):
        for micro in (slice(0, 4), slice(4, 8)):
            loss = model(batches[step]["x"][micro], batches[step]["labels"][micro])["loss"]
            scheduler.observe(loss=loss, grad_norm=0.5)
            (loss / 2).backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        if step + 1 == save_at:
            buffer = io.BytesIO()
            states = {"model": model, "optimizer": optimizer, "scheduler": scheduler}
            torch.save(
                {"step": step + 1, "rng": torch.get_rng_state()}
                | {name: part.state_dict() for name, part in states.items()},
                buffer,
            )
            saved = {"file": buffer.getvalue(), "history": len(scheduler.history)}
    if first or num_steps == NUM_STEPS:
        scheduler.flush()
    ended = [*model.state_dict().values(), *scheduler.controller.network.parameters()]
    ended += [value for state in optimizer.state.values() for value in state.values()]
    return scheduler.history, [value.detach().clone() for value in ended], saved


@pytest.mark.reliability("resume of a bare loop in every phase: bit-identical")
@pytest.mark.parametrize(("num_probes", "step"), CASES, ids=IDS)
def test_a_resumed_bare_loop_goes_on_to_the_last_bit(num_probes: int, step: int, network: str) -> None:
    config = config_for(network, num_probes)
    history, expected, saved = bare_run(config, NUM_STEPS, save_at=step)
    resumed, got, _ = bare_run(config, NUM_STEPS, checkpoint=saved)
    # The scheduler hands each entry over once: what stood in the history before belongs to whoever took it.
    assert history[: saved["history"]] + resumed == history
    for x, y in zip(got, expected, strict=True):
        assert torch.equal(x, y)


@pytest.mark.reliability("accelerate save_state and load_state: bit-identical")
@pytest.mark.parametrize("step", [8, 9])
def test_save_state_of_accelerate(step: int, network: str, tmp_path: Path) -> None:
    def run(first: int, folder: Path | None) -> tuple[list[float], list[torch.Tensor]]:
        set_seed(3)
        accelerator = Accelerator(cpu=True)
        model = tiny_classifier(dropout=0.3)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        alrs = get_scheduler("alrs", optimizer, 4, NUM_STEPS, {"config": config_for(network, 3), "model": model})
        model, optimizer, scheduler = accelerator.prepare(model, optimizer, alrs)
        batches = [batch for _ in range(8) for batch in DataLoader(tiny_dataset(), batch_size=8)]
        if first:
            accelerator.load_state(str(tmp_path / "state"))
        rates = []
        for i in range(first, NUM_STEPS):
            if folder is not None and i == step:
                accelerator.save_state(str(folder))
            loss = model(**batches[i])["loss"]
            alrs.observe(loss=loss)
            accelerator.backward(loss)
            rates.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        for state in (AcceleratorState, GradientState, PartialState):
            state._reset_state()
        return rates, [p.detach().clone() for p in (*model.parameters(), *alrs.controller.network.parameters())]

    rates, expected = run(0, tmp_path / "state")
    resumed, got = run(step, None)
    assert resumed == rates[step:]
    for x, y in zip(got, expected, strict=True):
        assert torch.equal(x, y)


# Whole processes


def launch(
    script: Path, output_dir: Path, options: dict[str, Any], kill_at: int | None = None
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable]
    command += [str(SCRIPTS / "killed_at.py"), str(kill_at), str(script)] if kill_at is not None else [str(script)]
    environment = os.environ | {
        "PYTHONPATH": str(SCRIPTS.parents[1]),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "ACCELERATE_USE_CPU": "true",
    }
    command += [f"--{name}={value}" for name, value in {"output_dir": output_dir, **options}.items()]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


@pytest.mark.slow
@pytest.mark.reliability("kill -9 in a probe, resume from the last checkpoint: bit-identical to the unkilled run")
def test_an_official_script_that_is_killed_ends_as_if_it_had_not_been(tmp_path: Path) -> None:
    # From scratch five probes run from step 4 to 23: the checkpoint at 10 and the kill at 17 both fall into them.
    options = {
        "alrs_network": "scratch",
        "max_steps": 44,
        "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_steps": 10,
        "seed": 5,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "do_train": True,
        "do_eval": True,
    }
    script = SCRIPTS / "official_style.py"

    whole = launch(script, tmp_path / "whole", options)
    assert whole.returncode == 0, whole.stderr[-3000:]
    killed = launch(script, tmp_path / "killed", options, kill_at=17)
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-3000:]
    assert sorted(path.name for path in (tmp_path / "killed").glob("checkpoint-*")) == ["checkpoint-10"]
    assert not (tmp_path / "killed" / "train_results.json").exists()
    with open(tmp_path / "killed" / HISTORY_NAME, "a") as file:
        file.write('{"step": 18, "lo')  # the kill may fall into the middle of a line
    resumed = launch(script, tmp_path / "killed", options)
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    assert "resuming training" in resumed.stdout

    histories = [history_of(tmp_path / name) for name in ("whole", "killed")]
    assert [entry["step"] for entry in histories[0]] == list(range(1, 45))
    assert histories[0] == histories[1]
    assert {entry["phase"] for entry in histories[0]} == {"gather", "fit", "drive"}

    models = [load_file(tmp_path / name / "model.safetensors") for name in ("whole", "killed")]
    for name, value in models[0].items():
        assert torch.equal(models[1][name], value), name
    states = [
        torch.load(tmp_path / n / "checkpoint-40" / "scheduler.pt", weights_only=True) for n in ("whole", "killed")
    ]
    networks = [state["alrs_state"]["controller"]["network"] for state in states]
    for name, value in networks[0].items():
        assert torch.equal(networks[1][name], value), name
    evaluations = [json.loads((tmp_path / name / "eval_results.json").read_text()) for name in ("whole", "killed")]
    assert evaluations[0]["eval_loss"] == evaluations[1]["eval_loss"]

    # What Trainer logged is what stands in the history: rates, which were the optimizer's, and losses (rounded).
    state = json.loads((tmp_path / "whole" / "trainer_state.json").read_text())
    logged = [entry for entry in state["log_history"] if "learning_rate" in entry]
    assert [entry["learning_rate"] for entry in logged] == [entry["learning_rate"] for entry in histories[0]]
    losses = [entry["loss"] for entry in histories[0]]
    assert [entry["loss"] for entry in logged] == pytest.approx(losses, rel=1e-3, abs=1e-3)


@pytest.mark.reliability("network folder changed meanwhile: the checkpoint's network wins")
def test_the_network_of_a_checkpoint_wins_over_the_configured_one(network: str, tmp_path: Path) -> None:
    """A network folder may have been trained further meanwhile: the run goes on with what it began with."""
    config = config_for(network)
    args = arguments(tmp_path, save_strategy="steps", save_steps=8)
    trainer = make_trainer("trainer", args, config)
    trainer.train()
    expected = outcome(trainer)
    scratch_network(seed=8).save_pretrained(str(tmp_path / "other"))
    trainer = make_trainer("trainer", args, config_for(str(tmp_path / "other")))
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))
    assert_same(outcome(trainer), expected)


@pytest.mark.parametrize("name", ["alrs", "constant"])
def test_a_run_that_is_at_its_end_makes_no_further_step(name: str, tmp_path: Path) -> None:
    def trainer() -> Trainer:
        set_seed(0)
        args = TrainingArguments(
            str(tmp_path),
            max_steps=5,  # in the middle of an epoch
            per_device_train_batch_size=8,
            save_strategy="steps",
            save_steps=5,
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
        )
        common = {"model": tiny_classifier(), "args": args, "train_dataset": tiny_dataset()}
        if name == "alrs":
            return ALRSTrainer(alrs_config=ALRSConfig(network="scratch"), **common)
        return NamedSchedulerTrainer(baseline=find_baseline(name), **common)

    first = trainer()
    train_from(first, None)
    weights = load_file(tmp_path / "checkpoint-5" / "model.safetensors")
    for _ in range(2):
        again = trainer()
        train_from(again, str(tmp_path / "checkpoint-5"))
        assert again.state.global_step == 5
        assert all(torch.equal(weights[key], value) for key, value in again.model.state_dict().items())
