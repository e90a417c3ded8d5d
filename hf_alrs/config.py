"""The configuration of adaptive learning-rate scheduling, and the error for values that cannot work."""

from __future__ import annotations

import math
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml


class InputError(ValueError):
    """
    A value given by the user that cannot work, found before any long work starts.

    Args:
        field (`str`): The argument, column or file that is wrong, as the user spells it.
        value (`Any`): What was given.
        rule (`str`): What the value must satisfy.
        remedy (`str`): What to do instead.
    """

    def __init__(self, field: str, value: object, rule: str, remedy: str):
        self.field, self.value, self.rule, self.remedy = field, value, rule, remedy
        super().__init__(f"{field}={value!r}: {rule} {remedy}")

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.field, self.value, self.rule, self.remedy)


# They say of themselves that they can be written, and hold no files.
_NO_FILES = (("/", "proc"), ("/", "sys"))


def home_expanded(path: str) -> Path:
    """A path of the command line; shells leave the `~` of `--name=~/folder` as it is."""
    return Path(path).expanduser()


def check_output_dir(output_dir: str | Path) -> None:
    """
    Raises:
        `InputError`: If no files can be written there.
    """
    if not str(output_dir):
        raise InputError("output_dir", output_dir, "is empty.", "Give a folder, `.` for this one.")
    folder = Path(output_dir).absolute()
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK) or existing.parts[:2] in _NO_FILES:
        what = "no folder" if not existing.is_dir() else "not writable"
        raise InputError("output_dir", str(output_dir), f"{existing} is {what}.", "Give another one.")


_MAX_YAML_BYTES, _MAX_YAML_DEPTH = 2**20, 32
# A network that reads some forty numbers gains nothing beyond, and files from outside could ask for all memory.
MAX_HIDDEN_SIZE = 4096
# Where averaging does most of what a decay is for, a full one only slows the run down: in fixed-rate runs of synthetic
# tasks 0.3 was better than 0, 0.1 and 1 at rates that miss the best one by a factor of about e.
AVERAGED_FINAL_LR_RATIO = 0.3
# A run of a few dozen steps spends a good part of them on finding its rate, and averages over the last two or three: more steps
# at a high rate are worth more to it than less noise. On synthetic tasks of 20 to 60 steps 0.7 was better than 0.5, that better
# than 0.3, and that than less; from 100 steps on 0.5 was worse than 0.3, and 0.15 as good.
SHORT_FINAL_LR_RATIO, _SHORT_STEPS = 0.7, (35, 100)
# The average smooths what momentum is there to smooth, and does it without the lag, which is what a short run cannot afford. On
# synthetic tasks 0.7 was better than 0.9, 0.8 no better than 0.7, and 0.5 as good on the whole and much worse in a few groups. In runs of more
# than 300 steps the gain is small and not sure: the longer the run, the more of the optimizer's own stays.
SHORT_MAX_BETA1, _MOMENTUM_SHARE = 0.7, 0.01


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_finite(value: object) -> bool:
    """Whether `value` is an `int` or `float` that a float can hold."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


@dataclass
class ALRSConfig:
    """
    How the network drives the learning rate.

    The rate at step t of T is `learning_rate * exp(s) * warmup(t) * (r + (1 - r) (1 - t / T))` with the `final_lr_ratio` r,
    see [`final_ratio`].
    The network changes `s` at decisions; `s` is 0 until phase 1 is over.

    Steps are optimizer steps. A field that takes "steps or a fraction" takes an `int` as steps and a `float` as a
    fraction of the run.

    Raises:
        `InputError`: If a field breaks its rule; the message names the field, the value, the rule and the remedy.
    """

    # The network
    network: str = field(
        default="default",
        metadata={"help": "`default` (shipped weights), `scratch` (random weights), a folder or a Hub id."},
    )
    hidden_sizes: tuple[int, ...] = field(
        default=(64, 32), metadata={"help": "Hidden layers of the network: 64 32 or 64 64 have shipped weights."}
    )

    # Phase 1, gather
    phase1_steps: int | float = field(
        default=0.02, metadata={"help": "Length of phase 1 (static rate, metrics gathered): steps or a fraction."}
    )
    num_probes: int | None = field(
        default=None,
        metadata={
            "help": "Short annealed trials at spread rates at the end of phase 1, each started from the same snapshot; "
            "their steps count. Default: 0 with trained weights, 7 from scratch."
        },
    )
    probe_steps: int | float = field(default=0.02, metadata={"help": "Length of one probe: steps or a fraction."})

    # Phase 2, fit
    meta_learning_rate: float = field(default=1e-3, metadata={"help": "Adam's rate for the network's own training."})
    meta_batch_size: int = field(default=64, metadata={"help": "Batch size of the network's own training."})
    meta_num_epochs: int = field(
        default=10, metadata={"help": "Epochs of phase 2; 0 leaves the network to the feedback loop."}
    )
    anchor: float = field(
        default=1.0,
        metadata={
            "help": "Weight of the pull towards the trained weights (L2-SP) during phases 2 and 3; none from scratch."
        },
    )

    # Phase 3, drive
    decision_interval: int | float | str | None = field(
        default=None,
        metadata={
            "help": "Time between decisions: steps, a fraction, or `epoch`. Default: 0.02; with probes, which teach by "
            "decisions, 0.0125."
        },
    )
    feedback_interval: int = field(
        default=8, metadata={"help": "Decisions between updates of the network in phase 3; 0 turns feedback off."}
    )
    min_lr: float = field(default=0.0, metadata={"help": "Lower bound of the rate."})
    max_lr: float = field(default=10.0, metadata={"help": "Upper bound of the rate."})
    max_log_change: float = field(
        default=0.7,
        metadata={
            "help": "Largest change of ln(rate) at a decision after those of `full_decisions`, which have a bound of their own."
        },
    )
    max_first_rise: float = field(default=6.0, metadata={"help": "Largest rise of ln(rate) at the first decision."})
    max_first_fall: float = field(default=6.0, metadata={"help": "Largest fall of ln(rate) at the first decision."})
    full_decisions: int | None = field(
        default=None,
        metadata={
            "help": "Decisions after the first one that make the whole correction too, within 2 of ln(rate). Default: 2; with "
            "probes, after which the network knows less, 0."
        },
    )
    gain: float | None = field(
        default=None,
        metadata={
            "help": "Share of the network's correction made at a decision after those of `full_decisions`. Default: 0.5; with probes "
            "0.25."
        },
    )

    # Averaging: costs one copy of the trained weights
    average_weights: bool = field(
        default=True,
        metadata={
            "help": "Average the weights along the run; the averaged ones are evaluated, saved and left in the model."
        },
    )
    choose_average: bool = field(
        default=True,
        metadata={
            "help": "Keep a second average, of nearly all of the run, and choose by the loss on the controller's split between the "
            "two, their middle, half the way on from the second beyond the first, and the raw weights, where these are better by "
            "more than half a standard error; one more copy of the weights. Nothing of it without such a split."
        },
    )
    batch_norm_samples: int = field(
        default=512,
        metadata={
            "help": "Training examples from which batch-norm's statistics of averaged weights are taken, whenever those are "
            "evaluated or saved; 0: the averages of the running statistics."
        },
    )
    final_lr_ratio: float | None = field(
        default=None,
        metadata={
            "help": "Rate that the decay ends at over the peak rate, from 0 to 1. Default: with averaged weights 0.3, "
            "more in runs of less than 100 steps, up to 0.7; 0 without."
        },
    )

    # Momentum
    max_beta1: float | None = field(
        default=None,
        metadata={
            "help": "The beta1 of Adam, AdamW and others that are named after them and have `betas` is lowered to this where it is higher, from "
            "0 to 1; 1 leaves it as it is. Default: 0.7 in runs of up to 333 steps, then 1 - 100 / steps, so that from 1,000 steps on 0.9 "
            "stays; 1 without averaged weights."
        },
    )

    # Restarts: cost one copy of the initial weights, kept on their device until `restart_window` is over
    max_restarts: int = field(
        default=3,
        metadata={
            "help": "How often the run may go back to its initial weights when the rate was far too high, or the loss has "
            "not moved; steps count. 0 keeps no copy of the weights."
        },
    )
    restart_window: float = field(default=0.13, metadata={"help": "Share of the run in which restarts may happen."})

    # The divergence guard
    guard_patience: int = field(
        default=3,
        metadata={
            "help": "Troubles (losses or weights that are not finite, loss spikes) after which the network is no longer "
            "asked and the last good rate decays linearly."
        },
    )
    rollback: bool = field(
        default=False,
        metadata={
            "help": "Keep the last good weights and optimizer state on the CPU, copied at every decision, and go back "
            "to them when the run is in trouble."
        },
    )

    # Metrics
    controller_metric_prefix: str = field(
        default="eval_controller",
        metadata={
            "help": "Evaluations with this prefix (`<prefix>_loss`) drive the rate; never the split that is reported."
        },
    )
    controller_evaluations: int = field(
        default=10,
        metadata={
            "help": "Evaluations of the controller's split that `ALRSTrainer` spreads over a run, on as many of its "
            "examples as cost a few percent of the training; 0: only those that the script makes."
        },
    )
    max_signal_size: int = field(
        default=262_144,
        metadata={
            "help": "Coordinates of the whole model that inner products are measured on, spread over its tensors."
        },
    )
    seed: int = field(default=0, metadata={"help": "Seed of random weights and of the network's own training."})

    def __post_init__(self) -> None:
        for name in ("network", "controller_metric_prefix"):
            value = getattr(self, name)
            self._check(name, isinstance(value, str) and value != "", "must be text.", "Leave it out for the default.")
        for name in ("rollback", "average_weights", "choose_average"):
            self._check(name, isinstance(getattr(self, name), bool), "must be True or False.", "Use True or False.")
        ratio = self.final_lr_ratio
        self._check(
            "final_lr_ratio",
            ratio is None or (_is_finite(ratio) and 0 <= ratio <= 1),
            "must lie between 0 and 1.",
            "Leave it out for the default.",
        )
        self._check(
            "max_beta1",
            self.max_beta1 is None or (_is_finite(self.max_beta1) and 0 <= self.max_beta1 <= 1),
            "must lie between 0 and 1.",
            "Leave it out for the default, or use 1.0 for the optimizer's own.",
        )
        sizes = self.hidden_sizes
        self._check(
            "hidden_sizes",
            isinstance(sizes, (list, tuple))
            and len(sizes) > 0
            and all(_is_int(size) and 0 < size <= MAX_HIDDEN_SIZE for size in sizes),
            f"must be whole numbers from 1 to {MAX_HIDDEN_SIZE}, one for each hidden layer.",
            "Use 64 32 or 64 64.",
        )
        self.hidden_sizes = tuple(sizes)
        for name in ("phase1_steps", "probe_steps"):
            self._check_span(name, getattr(self, name))
        interval = self.decision_interval
        if interval is not None and not (isinstance(interval, str) and interval == "epoch"):
            self._check_span("decision_interval", self.decision_interval, least=2)
        self._check(
            "num_probes",
            self.num_probes is None or (_is_int(self.num_probes) and (self.num_probes == 0 or self.num_probes >= 3)),
            "must be 0 or a whole number of at least 3: a best rate needs a worse one on each side.",
            "Use 0 or 7.",
        )
        for name in (
            "meta_num_epochs",
            "feedback_interval",
            "max_restarts",
            "controller_evaluations",
            "batch_norm_samples",
        ):
            value = getattr(self, name)
            self._check(name, _is_int(value) and value >= 0, "must be a whole number of at least 0.", "Use 0 or more.")
        full = self.full_decisions
        self._check(
            "full_decisions",
            full is None or (_is_int(full) and full >= 0),
            "must be a whole number of at least 0.",
            "Leave it out for the default.",
        )
        self._check(
            "seed",
            _is_int(self.seed) and 0 <= self.seed < 2**32,
            "must be a whole number from 0 to 2^32 - 1.",
            "Use 0.",
        )
        for name in ("meta_batch_size", "max_signal_size", "guard_patience"):
            value = getattr(self, name)
            self._check(name, _is_int(value) and value >= 1, "must be a whole number of at least 1.", "Use 1 or more.")
        for name in ("meta_learning_rate", "max_log_change", "max_first_rise", "max_first_fall", "gain", "max_lr"):
            value = getattr(self, name)
            self._check(
                name,
                (_is_finite(value) and value > 0) or (name == "gain" and value is None),
                "must be a finite number above 0.",
                "Leave it out for the default.",
            )
        for name in ("min_lr", "anchor"):
            value = getattr(self, name)
            self._check(
                name,
                _is_finite(value) and value >= 0,
                "must be a finite number of at least 0.",
                "Leave it out for the default.",
            )
        self._check("min_lr", self.min_lr < self.max_lr, f"must lie below max_lr={self.max_lr}.", "Lower it.")
        window = self.restart_window
        self._check(
            "restart_window", _is_finite(window) and 0 <= window <= 1, "must lie between 0 and 1.", "Use 0.13."
        )

    @property
    def probes(self) -> int:
        """`num_probes`, with its default resolved."""
        if self.num_probes is not None:
            return self.num_probes
        return 7 if self.network == "scratch" else 0

    @property
    def time_between_decisions(self) -> int | float | str:
        """`decision_interval`, with its default resolved."""
        if self.decision_interval is not None:
            return self.decision_interval
        return 0.0125 if self.probes else 0.02

    @property
    def num_full_decisions(self) -> int:
        """`full_decisions`, with its default resolved."""
        if self.full_decisions is not None:
            return self.full_decisions
        return 0 if self.probes else 2

    @property
    def share_of_correction(self) -> float:
        """`gain`, with its default resolved."""
        if self.gain is not None:
            return self.gain
        return 0.25 if self.probes else 0.5

    def final_ratio(self, num_training_steps: int) -> float:
        """
        Rate at the end of the decay over that at its beginning, in a run of `num_training_steps` optimizer steps:
        `final_lr_ratio`, with its default resolved. Without averaging 0; with it 0.3 from 100 steps on, 0.7 up to 35, and a line in
        ln(steps) between.
        """
        if self.final_lr_ratio is not None:
            return self.final_lr_ratio
        if not self.average_weights:
            return 0.0
        few, many = _SHORT_STEPS
        share = math.log(many / min(max(num_training_steps, few), many)) / math.log(many / few)
        return AVERAGED_FINAL_LR_RATIO + share * (SHORT_FINAL_LR_RATIO - AVERAGED_FINAL_LR_RATIO)

    def highest_beta1(self, num_training_steps: int) -> float:
        """
        What Adam's beta1 is lowered to, where it is higher, in a run of `num_training_steps` optimizer steps: `max_beta1`, with
        its default resolved. Without averaging, which smooths in the place of momentum, 1; with it `1 - 100 / num_training_steps`,
        and at least 0.7.
        """
        if self.max_beta1 is not None:
            return self.max_beta1
        if not self.average_weights:
            return 1.0
        return max(SHORT_MAX_BETA1, 1.0 - 1.0 / (_MOMENTUM_SHARE * num_training_steps))

    def _check(self, name: str, holds: bool, rule: str, remedy: str) -> None:
        if not holds:
            raise InputError(name, getattr(self, name), rule, remedy)

    def _check_span(self, name: str, value: Any, least: int = 1) -> None:
        holds = _is_finite(value) and (value >= least if isinstance(value, int) else 0 < value <= 1)
        choices = " or 'epoch'" if name == "decision_interval" else ""
        self._check(
            name,
            holds,
            f"must be a whole number of steps ({least} or more), or a fraction of the run in (0, 1]{choices}.",
            f"For {least} step{'s' if least > 1 else ''} write {least}, for the whole run 1.0.",
        )

    def to_dict(self) -> dict[str, Any]:
        """The configuration as plain Python values, for JSON."""
        return asdict(self) | {"hidden_sizes": list(self.hidden_sizes)}


def steps_of(span: int | float, num_training_steps: int) -> int:
    """A span in "steps or a fraction" as a number of steps, at least 1."""
    return max(1, span if isinstance(span, int) else int(span * num_training_steps))


def read_yaml(path: Path) -> Any:
    """
    A YAML file of plain values: no tags that make objects, and no aliases, of which a few lines can name more values than
    fit into memory.

    Raises:
        `InputError`: If the file is missing, too large or not such YAML.
    """
    if not path.is_file():
        raise InputError("config", str(path), "is not a file.", "Give the path of a YAML file.")
    if path.stat().st_size > _MAX_YAML_BYTES:
        raise InputError(
            "config", str(path), f"is larger than {_MAX_YAML_BYTES} bytes.", "Give a YAML file of options."
        )
    try:
        text = path.read_text(encoding="utf-8")
        depth = 0
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if isinstance(event, yaml.AliasEvent) or depth > _MAX_YAML_DEPTH:
                raise ValueError("aliases and deeply nested values are not read")
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError, OSError) as error:
        raise InputError("config", str(path), f"is not valid YAML ({error}).", "Correct the file.") from error
