"""
The same training by every route, in one process or in several: each rank writes what it did to `OUT/rank<i>.json`.

Usage: `accelerate launch ... distributed.py NETWORK OUT`
"""

import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from torch import nn
from torch.utils.data import DataLoader, SequentialSampler
from transformers import Trainer, TrainingArguments, set_seed


sys.path.insert(0, str(Path(__file__).parents[1]))

from conftest import AnyKeyword, LanguageModelLoss, tiny_classifier, tiny_dataset

from hf_alrs import ALRSCallback, ALRSConfig, ALRSTrainer, get_scheduler


NUM_STEPS, GLOBAL_BATCH_SIZE, RATE = 60, 16, 0.05


def config(network: str) -> ALRSConfig:
    return ALRSConfig(
        network=network,
        num_probes=3,
        probe_steps=6,
        phase1_steps=6,
        decision_interval=3,
        meta_num_epochs=3,
        feedback_interval=2,
        max_restarts=2,
        restart_window=0.9,
    )


def spy_on(optimizer: Any, rates: list[float]) -> None:
    inner = getattr(optimizer, "optimizer", optimizer)
    inner.register_step_pre_hook(lambda o, *_: rates.append(o.param_groups[0]["lr"]))


def summary(rates: list[float], model: nn.Module, network: nn.Module, losses: list[float]) -> dict[str, Any]:
    def flat(module: nn.Module) -> list[float]:
        return torch.cat([p.detach().flatten() for p in module.parameters()]).tolist()

    return {"rates": rates, "weights": flat(model), "network": flat(network), "losses": losses}


class InOrder:
    """Batches of several processes are slices of the batch of one where nothing is shuffled."""

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        optimizer = super().create_optimizer(*args, **kwargs)
        spy_on(optimizer, self.rates)
        return optimizer


def fail_on_the_last_process(prediction: Any) -> dict[str, float]:
    if PartialState().is_last_process:
        raise OSError("no space left")
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def train_with(
    kind: str,
    network: str,
    folder: Path,
    resume: str | None = None,
    evaluated_first: bool = False,
    whole_step: bool = False,
    batch_norm: bool = False,
    choose: bool = False,
    any_keyword: bool = False,
    failing_metrics: bool = False,
    **changed: Any,
) -> dict[str, Any]:
    """
    A run of `Trainer` with the callback, or of `ALRSTrainer`; with `batch_norm` and a split for the controller too, or with one
    that chooses the average, or with metrics that fail on the last process alone.
    """
    accumulation = changed.get("gradient_accumulation_steps", 1)
    defaults: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": NUM_STEPS,
        "per_device_train_batch_size": GLOBAL_BATCH_SIZE // PartialState().num_processes // accumulation,
        "learning_rate": RATE,
        "optim": "sgd",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "logging_strategy": "no",
        "use_cpu": True,
        "seed": 3,
    }
    args = TrainingArguments(**(defaults | changed))
    base = ALRSTrainer if kind == "trainer" else Trainer
    cls: Any = type("InOrderTrainer", (InOrder, base), {"rates": []})
    callback = ALRSCallback(config(network))
    own = replace(config(network), choose_average=choose)
    kwargs = {"alrs_config": own} if kind == "trainer" else {"callbacks": [callback]}
    set_seed(2)
    model = LanguageModelLoss() if whole_step else tiny_classifier(seed=2, batch_norm=batch_norm)
    model = AnyKeyword() if any_keyword else model
    set_seed(3)
    if failing_metrics:
        kwargs["compute_metrics"] = fail_on_the_last_process
    if batch_norm or choose or failing_metrics:
        kwargs["eval_dataset"] = {"controller": tiny_dataset(seed=5), "held_out": tiny_dataset(seed=6)}
    trainer = cls(model=model, args=args, train_dataset=tiny_dataset(), **kwargs)
    if evaluated_first:
        trainer.evaluate(tiny_dataset())
    trainer.train(resume_from_checkpoint=resume)
    seen = next(c for c in trainer.callback_handler.callbacks if isinstance(c, ALRSCallback))
    PartialState().wait_for_everyone()
    lines = (folder / "alrs_history.jsonl").read_text().splitlines()
    losses = [json.loads(line)["loss"] for line in lines]
    return summary(trainer.rates, trainer.model, seen.scheduler.controller.network, losses)


def train_bare(network: str, evaluated: bool = False) -> dict[str, Any]:
    """
    A loop of accelerate whose scheduler is prepared, and so stepped once for each process. With `evaluated` the first process
    alone tells what an evaluation has shown.
    """
    accelerator = Accelerator(cpu=True)
    model = tiny_classifier(seed=2)
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    loader = DataLoader(tiny_dataset(), batch_size=GLOBAL_BATCH_SIZE // accelerator.num_processes)
    alrs = get_scheduler("alrs", optimizer, 0, NUM_STEPS, {"config": config(network), "model": model})
    rates: list[float] = []
    spy_on(optimizer, rates)
    model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, alrs)
    for _ in range(NUM_STEPS // (64 // GLOBAL_BATCH_SIZE)):
        for batch in loader:
            loss = model(**batch)["loss"]
            alrs.observe(loss=loss)
            accelerator.backward(loss)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            if evaluated and accelerator.is_main_process and alrs.last_epoch % 7 == 0:
                alrs.observe_evaluation(2 / (1 + 0.05 * alrs.last_epoch), 0.5)
    alrs.flush()
    return summary(rates, model, alrs.controller.network, [entry["loss"] for entry in alrs.history])


def train_and_resume(network: str, folder: Path, step: int, kind: str = "callback", **changed: Any) -> dict[str, Any]:
    """The end of a run that is resumed at `step` with new objects."""
    train_with(kind, network, folder, **changed)
    PartialState().wait_for_everyone()
    result = train_with(kind, network, folder, resume=str(folder / f"checkpoint-{step}"), **changed)
    PartialState().wait_for_everyone()
    if PartialState().is_main_process:
        shutil.rmtree(folder)
    return result


def main() -> None:
    torch.set_num_threads(1)
    network, out = sys.argv[1], Path(sys.argv[2])
    state = PartialState(cpu=True)
    runs: dict[str, Callable[[], dict[str, Any]]] = {
        "bare": lambda: train_bare(network),
        "evaluated by one": lambda: train_bare(network, evaluated=True),
        "callback": lambda: train_with("callback", network, out / "callback"),
        "trainer": lambda: train_with("trainer", network, out / "trainer"),
        "evaluated first": lambda: train_with("trainer", network, out / "evaluated", evaluated_first=True),
        "loss of the whole step": lambda: train_with("callback", network, out / "whole", whole_step=True),
        "accumulation": lambda: train_with("trainer", network, out / "accumulation", gradient_accumulation_steps=2),
        "any keyword": lambda: train_with("trainer", network, out / "keyword", any_keyword=True),
        "any keyword, accumulation": lambda: train_with(
            "trainer", network, out / "keywords", any_keyword=True, gradient_accumulation_steps=2
        ),
        "failing metrics": lambda: train_with("trainer", network, out / "failing", failing_metrics=True),
        # checkpoints between two decisions, one that is foreseen at the step's end and one that is not
        "resumed": lambda: train_and_resume(network, out / "resumed", 8, save_strategy="steps", save_steps=8),
        "resumed after an epoch": lambda: train_and_resume(network, out / "epoch", 8, save_strategy="epoch"),
        "chosen": lambda: train_with("trainer", network, out / "chosen", choose=True),
        "chosen, resumed": lambda: train_and_resume(
            network, out / "chosen again", 8, "trainer", choose=True, save_strategy="steps", save_steps=8
        ),
        "normalised": lambda: train_with("trainer", network, out / "normalised", batch_norm=True),
        "normalised, resumed": lambda: train_and_resume(
            network, out / "again", 32, "trainer", batch_norm=True, save_strategy="steps", save_steps=32
        ),
    }
    results = {"num_processes": state.num_processes} | {name: run() for name, run in runs.items()}
    (out / f"rank{state.process_index}.json").write_text(json.dumps(results))
    state.destroy_process_group()


if __name__ == "__main__":
    main()
