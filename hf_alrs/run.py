"""One run of a task from its command line: train, evaluate, predict, save, push; and a run for each fold."""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import re
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
import yaml
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel, Trainer, TrainingArguments, set_seed
from transformers.integrations import TensorBoardCallback, get_reporting_integration_callbacks
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.training_args import OptimizerNames

from . import cards, hub
from .arguments import ALRSArguments, RunArguments, parse, read_recipe, task_recipe
from .callback import CONTROLLER, HISTORY_NAME
from .config import ALRSConfig, InputError
from .experiment import (
    DataArguments,
    PreparedTask,
    Task,
    build_trainer,
    find_baseline,
    keeps_best,
    num_steps_of,
    train_from,
)
from .matrix import environment, split_sizes
from .network import load_network
from .unfinished import alone_in


logger = logging.getLogger(__name__)

_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
_PATHS_FILE = "run_paths.json"
# What an earlier run has left in the folder of one that starts afresh
_LEFT_BEHIND = (
    HISTORY_NAME,
    cards.TRACE_FILE,
    TRAINER_STATE_NAME,
    "predict_results.txt",
    *(f"{name}_results.json" for name in ("all", "benchmark", "eval", "train")),
)
# How the last texts were encoded, and what an image processor does with images that are not of the data
_NOT_OF_DATA = ("truncation", "padding", "do_resize", "do_convert_rgb")
# Options that say how a run is watched, kept and scored, not how it trains
_WATCHING = re.compile(
    r"(eval_.*|save_.*|logging_.*|dataloader_(num|pin|pers|pre).*|per_device_eval_.*|max_eval_samples)"
)


def train(arguments: Sequence[str], tasks: Mapping[str, Task], default_task: str) -> dict[str, float]:
    """
    One run of a task: train, evaluate, predict, save.

    Returns:
        `dict[str, float]`: The metrics of the last evaluation, with `eval_` keys and `epoch`.
    """
    types = (DataArguments, ALRSArguments, RunArguments, TrainingArguments)
    task, (data, alrs, _, args), changed = parse(arguments, types, tasks, default_task)
    token = take_token(args, changed)
    # What the task's recipe says and someone set back to the default is no difference from the default, and one from it.
    settings = vars(args) | vars(alrs) | vars(data)
    options = {key: settings[key] for key in task_recipe(task, data.dataset_name, data.model_type)} | changed
    config = alrs.to_config(args.seed)
    check_network([alrs.scheduler], config)
    args.dataloader_pin_memory = args.dataloader_pin_memory and args.device.type != "cpu"
    set_up_logging(args)
    # TrainingArguments turns do_eval on by itself where eval_strategy is set: ask what was given.
    if not any(changed.get(name) for name in ("do_train", "do_eval", "do_predict")):
        args.do_train = args.do_eval = True
    takes_folder = args.do_train and args.process_index == 0
    with alone_in(Path(args.output_dir)) if takes_folder else nullcontext():
        return _run_task(task, data, alrs.scheduler, args, config, options, changed, token)


def _run_task(
    task: Task,
    data: DataArguments,
    scheduler: str,
    args: TrainingArguments,
    config: ALRSConfig,
    options: dict[str, Any],
    changed: Mapping[str, Any],
    token: str | None,
) -> dict[str, float]:
    if args.do_train:
        _keep_recipe(Path(args.output_dir), cards.recipe_of(task.name, options), _local_paths(options), args)
    with args.main_process_first(desc="dataset"):
        prepared = task.prepare(data)
    if prepared.reference is not None and data.fold is None:
        if args.push_to_hub:
            raise InputError(
                "push_to_hub", True, "every fold has a model of its own.", "Give --fold to train and push one of them."
            )
        if args.resume_from_checkpoint is not None:
            rule = "every fold has checkpoints of its own, and goes on from its last one."
            raise InputError(
                "resume_from_checkpoint", args.resume_from_checkpoint, rule, "Give --fold, or leave it out."
            )
        return _cross_validate(task, data, scheduler, args, config)
    repo_id = _prepare_push(args, changed, token)
    if data.model_name_or_path is not None and not args.do_train:
        _check_head(data.model_name_or_path, prepared.label_names)

    def on_end(trainer: Trainer) -> None:
        _describe_model(task, prepared, scheduler, trainer, options, repo_id)
        if repo_id is not None:
            _push_model(repo_id, Path(args.output_dir), token)

    return _train_prepared(task, prepared, scheduler, args, config, data.model_name_or_path is not None, on_end)


def check_network(schedulers: Iterable[str], config: ALRSConfig) -> None:
    """
    Raises:
        `InputError`: If a scheduler is unknown, or the network that drives it cannot be loaded.
    """
    changes = [find_baseline(name).alrs_config for name in schedulers]
    for own in (replace(config, **change) for change in changes if change is not None):
        load_network(own.network, own.hidden_sizes, own.seed)


def _keep_recipe(folder: Path, recipe: dict[str, Any], local: dict[str, str], args: TrainingArguments) -> None:
    """
    Writes down which run the folder is of.

    Raises:
        `InputError`: If its checkpoints are of another one, whose results would be reported as this one's, or it is the
            folder of a comparison.
    """
    if any(folder.glob("*--*--lr*--seed*.json")):
        raise InputError("output_dir", str(folder), "is the folder of a comparison.", "Give the run one of its own.")
    path, paths = folder / cards.RECIPE_FILE, folder / _PATHS_FILE
    recipe = yaml.safe_load(yaml.safe_dump(recipe))
    begun = any(_last_checkpoint(f) for f in (folder, *folder.glob("fold-*")))
    if path.is_file() and begun and args.resume_from_checkpoint is None:
        remedy = "Give another --output_dir, or the same options to go on with that run."
        earlier = read_recipe(path)
        for name in (name for name in {**recipe, **earlier} if not _WATCHING.fullmatch(name)):
            old, new = (options.get(name, "its default") for options in (earlier, recipe))
            if old != new:
                raise InputError(name, new, f"{folder} holds the checkpoints of a run with {old!r}.", remedy)
        earlier_paths = json.loads(paths.read_text()) if paths.is_file() else {}
        for name in local.keys() & earlier_paths.keys():
            if local[name] != earlier_paths[name]:
                rule = f"{folder} holds the checkpoints of a run with another one of this name."
                raise InputError(name, recipe.get(name), rule, remedy)
    if args.process_index == 0:
        folder.mkdir(parents=True, exist_ok=True)
        text = yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True)
        for file, content in ((path, text), (paths, json.dumps(local, indent=4))):
            temporary = file.with_suffix(".tmp")
            temporary.write_text(content, encoding="utf-8")
            temporary.replace(file)


def _local_paths(options: Mapping[str, Any]) -> dict[str, str]:
    """
    A hash of each option that is a file or folder of this machine: a recipe, which is published, names it by the last part
    of its path, and two of one name are not the same.
    """
    return {
        name: hashlib.sha256(str(Path(value).expanduser().resolve()).encode()).hexdigest()
        for name, value in options.items()
        if name in ("dataset_name", "model_name_or_path", "network")
        and isinstance(value, str)
        and Path(value).expanduser().exists()
    }


def take_token(args: TrainingArguments, changed: dict[str, Any]) -> str | None:
    """
    Takes the access token out of everything that is stored, logged or handed to other code: the arguments, which the
    Trainer pickles beside the model, and the command line, which result files record.
    """
    token, args.hub_token = args.hub_token, None
    changed.pop("hub_token", None)
    if token:
        sys.argv[:] = [argument.replace(token, "***") for argument in sys.argv]
    return token


def _prepare_push(args: TrainingArguments, changed: Mapping[str, Any], token: str | None) -> str | None:
    """
    The repository that the model goes to once it is trained, `None` where none was asked for. It is looked for before
    the run, which may take hours.

    The Trainer is not told: it would push every checkpoint, with a card of its own.
    """
    if not args.push_to_hub:
        return None
    args.push_to_hub = False
    if not args.do_train:
        raise InputError("push_to_hub", True, "without training there is no model to push.", "Add --do_train.")
    if changed.get("hub_strategy", "end") != "end" or args.hub_revision is not None or args.hub_always_push:
        name = next(n for n in ("hub_strategy", "hub_revision", "hub_always_push") if n in changed)
        raise InputError(
            name, changed[name], "a run script pushes once, to `main`, when the run is over.", "Leave it out."
        )
    if args.process_index != 0:
        return None
    name = args.hub_model_id or Path(args.output_dir).resolve().name
    return hub.prepare_repo("hub_model_id", name, args.hub_private_repo, token)


def _describe_model(
    task: Task,
    prepared: PreparedTask,
    scheduler: str,
    trainer: Trainer,
    options: Mapping[str, Any],
    repo_id: str | None,
) -> None:
    """Writes the card, the plot and the recipe beside the trained model."""
    folder = Path(trainer.args.output_dir)
    cards.write_model_card(
        cards.TrainedModel(
            folder=folder,
            name=(repo_id or folder.resolve().name).split("/")[-1],
            kind=task.kind,
            task=task.name,
            scheduler=scheduler,
            architecture=type(trainer.model).__name__,
            source=prepared.source,
            splits=split_sizes(prepared),
            metric=prepared.metric_for_best,
            options=options,
            versions=environment()["versions"],
            base_model=getattr(trainer.model.config, "_name_or_path", None) or None,
        )
    )


def _push_model(repo_id: str, folder: Path, token: str | None) -> None:
    upload = hub.Upload("model", repo_id, cards.model_files(folder), replaces=cards.MODEL_FILES)
    try:
        address = hub.publish([upload], "hub_model_id", True, token=token, message="Trained with hf-alrs")[0]
    except InputError as error:
        remedy = (
            f"The trained model and its card are in {folder}. When the cause is removed, run the same command again, "
            "which resumes from the last checkpoint and pushes."
        )
        raise InputError(error.field, error.value, error.rule, f"{error.remedy} {remedy}") from error
    print(f"Model: {address}")


def _cross_validate(
    task: Task, data: DataArguments, scheduler: str, args: TrainingArguments, config: ALRSConfig
) -> dict[str, float]:
    """
    A run for each fold, and beside it the reference model on the same fold; returns the means, and stores them and
    those of the reference.
    """
    runs: list[dict[str, float]] = []
    references: list[dict[str, float]] = []
    for fold in range(data.num_folds):
        prepared = task.prepare(replace(data, fold=fold))
        fold_args = copy.copy(args)
        fold_args.output_dir = str(Path(args.output_dir) / f"fold-{fold}")
        runs.append(_train_prepared(task, prepared, scheduler, fold_args, config, data.model_name_or_path is not None))
        if args.do_eval:
            references.append({f"eval_{key}": value for key, value in prepared.reference().items()})
    if not args.do_eval:
        return {}
    shared = [key for key in references[0] if key in runs[0]]
    means, reference_means = (
        {key: float(np.mean([scores[key] for scores in folds])) for key in shared} for folds in (runs, references)
    )
    for name, scores in (("eval", means), ("reference", reference_means)) if args.process_index == 0 else ():
        (Path(args.output_dir) / f"{name}_results.json").write_text(json.dumps(scores, indent=4, sort_keys=True))
    print(f"\n{data.num_folds} folds, {task.name} with {scheduler} beside scikit-learn's logistic regression")
    print(f"{'fold':6}" + "".join(f"{key:>16}{'reference':>12}" for key in shared))
    rows = [(str(fold), run, reference) for fold, (run, reference) in enumerate(zip(runs, references, strict=True))]
    rows.append(("mean", means, reference_means))
    for name, run, reference in rows:
        print(f"{name:6}" + "".join(f"{run[key]:>16.4f}{reference[key]:>12.4f}" for key in shared))
    return means


def _train_prepared(
    task: Task,
    prepared: PreparedTask,
    scheduler: str,
    args: TrainingArguments,
    config: ALRSConfig,
    is_pretrained: bool,
    on_end: Callable[[Trainer], None] | None = None,
) -> dict[str, float]:
    _print_plan(task, prepared, args, scheduler)
    _check_with_data(prepared, args)
    set_seed(args.seed)
    model = prepared.model_init()
    if not args.do_train and not is_pretrained:
        model = _trained_model(type(model), Path(args.output_dir))
        _check_inputs(prepared, Path(args.output_dir), model.config)
    trainer = build_trainer(prepared, model, args, scheduler, config)
    for callback in trainer.callback_handler.callbacks:
        # Its own default is known only when training begins, and the evaluation before it would go to ./runs
        if isinstance(callback, TensorBoardCallback) and callback.logging_dir is None:
            callback.logging_dir = str(Path(args.output_dir) / "runs" / time.strftime("%Y-%m-%d_%H-%M-%S"))
    checkpoint = args.resume_from_checkpoint or _last_checkpoint(Path(args.output_dir))
    metrics: dict[str, float] = {}
    if args.do_train and checkpoint is None and args.process_index == 0:
        for name in _LEFT_BEHIND:
            (Path(args.output_dir) / name).unlink(missing_ok=True)
    if args.do_eval and args.do_train and checkpoint is None:
        with _in_full_precision(args):
            before = _evaluate(trainer, prepared)
        before.pop("epoch", None)  # none has passed
        best = (args.metric_for_best_model or "").replace(f"eval_{CONTROLLER}_", "eval_", 1)
        if keeps_best(args) and best not in before:
            scores = [key.removeprefix("eval_") for key in before if not key.endswith(("runtime", "_per_second"))]
            known = ", ".join(scores)
            rule = f"is no metric of this task, which has {known}."
            raise InputError("metric_for_best_model", best.removeprefix("eval_"), rule, "Take one of them.")
        trainer.save_metrics("benchmark", before, combined=False)
        print_dictionary("Benchmark Results (before training)", before)
    if args.do_train:
        if checkpoint is not None:
            logger.warning("Resuming from %s; give another --output_dir to start afresh.", checkpoint)
        # Now, as its folder may be gone after the training
        steps_before = num_steps_of(checkpoint) if checkpoint is not None else 0
        result = train_from(trainer, checkpoint)
        trainer.save_model()
        if trainer.state.global_step == steps_before:
            logger.warning("The run in %s was at its end already: nothing was trained.", args.output_dir)
        else:
            trainer.log_metrics("train", result.metrics)
            trainer.save_metrics("train", result.metrics)
            trainer.save_state()
    if args.do_eval:
        metrics = _evaluate(trainer, prepared)
        metrics.setdefault("epoch", trainer.state.epoch or 0.0)
        trainer.log_metrics("eval", metrics)
        trainer.save_metrics("eval", metrics)
        print_dictionary("Results", metrics)
    if args.do_predict:
        _predict(trainer, prepared)
    if trainer.is_world_process_zero() and (Path(args.output_dir) / HISTORY_NAME).exists():
        print(f"Learning rate, loss and decisions of every step: {Path(args.output_dir) / HISTORY_NAME}")
    if args.do_train and on_end is not None and trainer.is_world_process_zero():
        on_end(trainer)
    return metrics


def _trained_model(model_class: type[PreTrainedModel], folder: Path) -> PreTrainedModel:
    """
    Raises:
        `InputError`: If no run has left its model in the folder.
    """
    if not (folder / "config.json").is_file():
        rule = "there is no trained model in it, and none is given by model_name_or_path."
        raise InputError("output_dir", str(folder), rule, "Add --do_train, or give the folder of a run.")
    try:
        return model_class.from_pretrained(folder)
    except Exception as error:  # of the many types that files which are none raise
        rule = f"its model cannot be loaded ({type(error).__name__}: {str(error)[:200]})."
        raise InputError("output_dir", str(folder), rule, "Add --do_train, or give the folder of a run.") from error


def _check_head(name: str, label_names: Sequence[str] | None) -> None:
    """
    That a model which is not trained first has a head for these classes of its own, not a new one of random weights.

    Raises:
        `InputError`: If it has none, or one of another size.
    """
    config = AutoConfig.from_pretrained(name, trust_remote_code=False)
    num_labels, architectures = 1 if label_names is None else len(label_names), config.architectures or ()
    classifies = ("SequenceClassification", "ImageClassification")
    if architectures and not any(part in kind for kind in architectures for part in classifies):
        rule = f"is a {architectures[0]}, whose classifier would be made of random weights."
    elif config.num_labels != num_labels:
        rule = f"has {config.num_labels} outputs, and the data needs {num_labels}: its classifier would be made of random weights."
    else:
        return
    raise InputError(
        "model_name_or_path", name, rule, "Add --do_train, or give a model that was trained for this task."
    )


def _check_inputs(prepared: PreparedTask, folder: Path, config: PreTrainedConfig) -> None:
    """
    That the model in the folder gets inputs as in its training, and has the same classes: the words, means and categories are
    those of the train split.

    Raises:
        `InputError`: If the classes are others, or another train split has made other inputs.
    """
    remedy = "Give the run's own data options: dataset_name, max_train_samples, split_seed, fold and the columns."
    classes = None if config.num_labels == 1 else [config.id2label[number] for number in sorted(config.id2label)]
    if classes != prepared.label_names:
        of_model, of_data = (", ".join(names or ["none"]) for names in (classes, prepared.label_names))
        rule = f"its model has the classes {of_model}, and the data {of_data}."
        raise InputError("output_dir", str(folder), rule, remedy)
    if prepared.processing_class is None:
        return

    def content(path: Path) -> Any:
        values = json.loads(path.read_text())
        return {key: value for key, value in values.items() if key not in _NOT_OF_DATA}

    with tempfile.TemporaryDirectory() as temporary:
        prepared.processing_class.save_pretrained(temporary)
        for name in ("tokenizer.json", "preprocessor_config.json"):
            now, saved = Path(temporary) / name, folder / name
            if now.is_file() and saved.is_file() and content(now) != content(saved):
                rule = f"its model was trained with another {name}, made of another train split."
                raise InputError("output_dir", str(folder), rule, remedy)


def _check_with_data(prepared: PreparedTask, args: TrainingArguments) -> None:
    """What would otherwise be found after the training, or by it in words of its own."""
    number, size = split_sizes(prepared)["train"], args.train_batch_size * args.world_size
    if args.do_train and args.dataloader_drop_last and number < size:
        rule = f"no whole batch comes out of the {number:,} training examples for {args.world_size} process(es)."
        remedy = "Lower it, or leave out dataloader_drop_last."
        raise InputError("per_device_train_batch_size", args.per_device_train_batch_size, rule, remedy)
    if args.do_predict and prepared.predict_dataset is None:
        raise InputError("do_predict", True, "this dataset has no unlabelled split.", "Leave --do_predict out.")


@contextmanager
def _in_full_precision(args: TrainingArguments) -> Iterator[None]:
    """Trainer turns the model itself into half precision for `bf16_full_eval`, and would train it like that."""
    kept = args.bf16_full_eval, args.fp16_full_eval
    args.bf16_full_eval = args.fp16_full_eval = False
    try:
        yield
    finally:
        args.bf16_full_eval, args.fp16_full_eval = kept


def _evaluate(trainer: Trainer, prepared: PreparedTask) -> dict[str, float]:
    metrics = trainer.evaluate(prepared.eval_dataset)
    metrics.pop("eval_model_preparation_time", None)
    return metrics


def set_up_logging(args: TrainingArguments) -> None:
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", level=logging.WARNING)
    level = args.get_process_log_level()
    transformers.utils.logging.set_verbosity(max(level, logging.WARNING))
    logging.getLogger("hf_alrs").setLevel(max(level, logging.INFO))
    try:
        for tracker in get_reporting_integration_callbacks(args.report_to):
            tracker()
    except (ImportError, RuntimeError, ValueError) as error:
        raise InputError(
            "report_to", args.report_to, f"cannot be used: {error}", "Install it, or give none."
        ) from error


def _print_plan(task: Task, prepared: PreparedTask, args: TrainingArguments, scheduler: str) -> None:
    if args.process_index != 0:
        return
    print(f"Task {task.name}: {prepared.source}")
    print("Splits: " + ", ".join(f"{name} {size:,}" for name, size in split_sizes(prepared).items()))
    print(
        f"Scheduler {scheduler} from learning rate {args.learning_rate:g}, batch "
        f"{args.per_device_train_batch_size} on each of {args.world_size} process(es), "
        f"optimizer {OptimizerNames(args.optim).value}, seed {args.seed}",
        flush=True,
    )


def print_dictionary(title: str, metrics: Mapping[str, float]) -> None:
    if torch.distributed.is_initialized() and torch.distributed.get_rank() != 0:
        return
    print(f"\n{title}:\n" + json.dumps(dict(metrics), indent=4), flush=True)


def _last_checkpoint(folder: Path) -> str | None:
    """The newest checkpoint that is whole: a run that was killed while it saved leaves a part of one."""
    found = [
        (int(match[1]), path) for path in folder.glob("checkpoint-*") if (match := _CHECKPOINT.fullmatch(path.name))
    ]
    for _, path in sorted(found, reverse=True):
        if damage := _damage(path):
            logger.warning("%s is left out: %s.", path, damage)
        else:
            return str(path)
    return None


def _damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint as it lies there, if something is."""
    try:
        num_steps_of(str(checkpoint))
    except (OSError, ValueError, TypeError) as error:
        return f"it has no whole {TRAINER_STATE_NAME}, which is saved last ({type(error).__name__})"
    for name in (OPTIMIZER_NAME, SCHEDULER_NAME):  # archives, whose directory is at their end
        if (checkpoint / name).is_file() and not zipfile.is_zipfile(checkpoint / name):
            return f"its {name} is cut off"
    return None


def _predict(trainer: Trainer, prepared: PreparedTask) -> None:
    logits = trainer.predict(prepared.predict_dataset, metric_key_prefix="predict").predictions
    if not trainer.is_world_process_zero():
        return
    logits = np.asarray(logits[0] if isinstance(logits, tuple) else logits)
    if prepared.label_names is None:
        predictions = [f"{value:.4f}" for value in logits.reshape(len(logits))]
    else:
        single = logits.ndim == 1 or logits.shape[-1] == 1
        classes = (logits.reshape(-1) > 0).astype(int) if single else logits.argmax(-1)
        predictions = [prepared.label_names[i] for i in classes]
    path = Path(trainer.args.output_dir) / "predict_results.txt"
    path.write_text("index\tprediction\n" + "".join(f"{i}\t{p}\n" for i, p in enumerate(predictions)))
    print(f"Predictions: {path}")
