"""What ALRS is compared with: name -> scheduler, optimizer and controller settings."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


# What a scheduler that is stepped with evaluations gets at least. With a patience of two the first cut of the rate comes
# after the fourth evaluation and each further one three later: with fewer than this it is a constant rate.
MIN_EVALUATIONS = 20


@dataclass(frozen=True)
class Baseline:
    """
    How a name on the command line becomes a run.

    Args:
        scheduler (`str`): Name for `hf_alrs.get_scheduler`.
        scheduler_kwargs (`dict`): Its arguments.
        optimizer (`str`, *optional*): In place of the task's: `"schedule_free"` (AdamW, or SGD where the task uses it),
            or `"prodigy"`, whose rate is 1 whatever the task's.
        alrs_config (`dict`, *optional*): Fields of `ALRSConfig`, for ALRS and its ablations.
        needs_evaluation (`bool`): Whether the scheduler is stepped with the loss on the controller's split.
        description (`str`): One line for tables.
    """

    scheduler: str
    scheduler_kwargs: dict[str, Any] = field(default_factory=dict)
    optimizer: str | None = None
    alrs_config: dict[str, Any] | None = None
    needs_evaluation: bool = False
    description: str = ""


BASELINES: dict[str, Baseline] = {
    "alrs": Baseline("alrs", alrs_config={}, description="the shipped network, fine-tuned on the run"),
    "alrs_64_64": Baseline(
        "alrs", alrs_config={"hidden_sizes": (64, 64)}, description="the 2x64 network of the first report"
    ),
    "alrs_frozen_random": Baseline(
        "alrs",
        alrs_config={"network": "scratch", "num_probes": 0, "meta_num_epochs": 0, "feedback_interval": 0},
        description="ablation: random network, never trained",
    ),
    "alrs_phase1_only": Baseline(
        "alrs",
        alrs_config={"phase1_steps": 1.0},
        description="ablation: the static rate of phase 1, decayed to 0.3 of it, with averaging of weights",
    ),
    "alrs_no_fit": Baseline(
        "alrs",
        alrs_config={"meta_num_epochs": 0, "feedback_interval": 0},
        description="ablation: the shipped network as it is, without phase 2 and feedback",
    ),
    "alrs_no_feedback": Baseline(
        "alrs", alrs_config={"feedback_interval": 0}, description="ablation: phase 2, but no feedback loop"
    ),
    "alrs_no_average": Baseline(
        "alrs", alrs_config={"average_weights": False}, description="ablation: a full decay, no averaging of weights"
    ),
    "alrs_fixed_average": Baseline(
        "alrs",
        alrs_config={"choose_average": False},
        description="ablation: always the average of the last steps, whatever the controller's split says",
    ),
    "alrs_own_beta1": Baseline(
        "alrs",
        alrs_config={"max_beta1": 1.0},
        description="ablation: Adam's beta1 as it is, 0.9, not lowered in short runs",
    ),
    "alrs_no_full": Baseline(
        "alrs",
        alrs_config={"full_decisions": 0},
        description="ablation: the first decision alone makes the whole correction, not the two after it",
    ),
    "alrs_running_statistics": Baseline(
        "alrs",
        alrs_config={"batch_norm_samples": 0},
        description="ablation: batch-norm with averages of its running statistics, not with those of the averaged weights",
    ),
    "alrs_scratch": Baseline(
        "alrs", alrs_config={"network": "scratch"}, description="ablation: a network trained on this run alone"
    ),
    "constant": Baseline("constant", description="the initial rate throughout"),
    "linear": Baseline("linear", description="linear decay to 0"),
    "cosine": Baseline("cosine", description="half a cosine to 0"),
    "cosine_with_restarts": Baseline(
        "cosine_with_restarts", {"num_cycles": 3}, description="three cosines with hard restarts"
    ),
    "polynomial": Baseline("polynomial", {"power": 2.0, "lr_end": 0.0}, description="quadratic decay to 0"),
    "inverse_sqrt": Baseline("inverse_sqrt", description="1 / sqrt(step) after 5 % warmup"),
    "warmup_stable_decay": Baseline(
        "warmup_stable_decay", description="5 % warmup, constant, linear decay over the last 20 %"
    ),
    "one_cycle": Baseline("one_cycle", description="torch's OneCycleLR with the given rate as its maximum"),
    "step": Baseline("step", description="torch's StepLR: a tenth after each third of the run"),
    "exponential": Baseline("exponential", description="torch's ExponentialLR: down to 1 % over the run"),
    "reduce_lr_on_plateau": Baseline(
        "reduce_lr_on_plateau",
        {"factor": 0.5, "patience": 2},
        needs_evaluation=True,
        description="torch's ReduceLROnPlateau on the controller's split: half after three evaluations without progress",
    ),
    "greedy": Baseline(
        "greedy",
        {"min_lr": 0.0, "patience": 2},
        needs_evaluation=True,
        description="transformers' GreedyLR on the controller's split, with a min_lr of 0",
    ),
    "range_test": Baseline(
        "range_test", description="learning-rate range test over a tenth of the run, then linear decay"
    ),
    "schedule_free": Baseline(
        "constant",
        optimizer="schedule_free",
        description="Schedule-Free AdamW (SGD where the task uses it) without warmup",
    ),
    "prodigy": Baseline("constant", optimizer="prodigy", description="Prodigy at its defaults, constant"),
}

# Schedulers whose shape says when warmup and decay happen
_SHAPES = {"inverse_sqrt", "warmup_stable_decay"}


def scheduler_kwargs(baseline: Baseline, num_training_steps: int) -> tuple[int, dict[str, Any]]:
    """
    Warmup steps and arguments of the scheduler for a run of `num_training_steps`.

    Returns:
        `tuple[int, dict]`: `num_warmup_steps` and `scheduler_specific_kwargs` of `hf_alrs.get_scheduler`.
    """
    warmup = max(1, num_training_steps // 20) if baseline.scheduler in _SHAPES else 0
    kwargs = dict(baseline.scheduler_kwargs)
    if baseline.scheduler == "warmup_stable_decay":
        kwargs |= {"num_decay_steps": max(1, num_training_steps // 5), "decay_type": "linear"}
    return warmup, kwargs
