"""The command line: recipes, precedence, the built-in sample, input errors with exit code 2."""

import errno
import json
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainingArguments

from hf_alrs import cli
from hf_alrs.arguments import (
    ALRSArguments,
    CompareArguments,
    RunArguments,
    find_task,
    installed_tasks,
    parse,
    read_recipe,
    task_recipe,
)
from hf_alrs.callback import ALRSCallback
from hf_alrs.cli import train_or_compare
from hf_alrs.comparison import read_comparison
from hf_alrs.config import ALRSConfig, InputError
from hf_alrs.experiment import DataArguments
from hf_alrs.run import _check_inputs, _cross_validate, train
from tasks import TASKS


ROOT = Path(__file__).parents[1]
TYPES = (DataArguments, ALRSArguments, RunArguments, TrainingArguments)


def run(script: str, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, script, *arguments], cwd=ROOT, capture_output=True, text=True)


def test_command_line_beats_file_beats_task_recipe(tmp_path: Path) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("learning_rate: 3.0e-4\nper_device_train_batch_size: 7\n")
    task, (data, alrs, _, args), changed = parse(
        ["--task_name", "sst2", "--config", str(recipe), "--learning_rate", "5e-4"], TYPES, TASKS, "sst2"
    )
    assert task.name == "sst2" and data.task_name == "sst2"
    assert args.learning_rate == 5e-4
    assert args.per_device_train_batch_size == 7
    assert args.num_train_epochs == 3  # sst2.yaml
    assert alrs.scheduler == "alrs"
    assert changed["learning_rate"] == 5e-4


def test_no_arguments_mean_the_built_in_sample(capsys: pytest.CaptureFixture) -> None:
    _, (data, _, _, args), _ = parse([], TYPES, TASKS, "sst2")
    assert data.dataset_name == "sample"
    assert "built-in" in capsys.readouterr().out
    assert args.learning_rate == read_recipe(TASKS["sst2"].recipe.parent / "sample-text.yaml")["learning_rate"]


def test_recipe_of_a_named_model() -> None:
    recipe = task_recipe(TASKS["cifar10"], None, "resnet18")
    assert recipe["optim"] == "sgd" and "model_type" not in recipe


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("decision_interval", "50", 50),
        ("decision_interval", "0.025", 0.025),
        ("decision_interval", "epoch", "epoch"),
        ("phase1_steps", "1", 1),
        ("phase1_steps", "1.0", 1.0),
    ],
)
def test_spans(name: str, text: str, expected: object) -> None:
    value = getattr(ALRSArguments(**{name: text}).to_config(0), name)
    assert value == expected and type(value) is type(expected)


@pytest.mark.parametrize(
    ("options", "average_weights", "final_lr_ratio", "final_ratio"),
    [
        ([], True, None, 0.3),
        (["--average_weights", "False"], False, None, 0.0),
        (["--no_average_weights"], False, None, 0.0),
        (["--final_lr_ratio", "0.1"], True, 0.1, 0.1),
        (["--no_average_weights", "--final_lr_ratio", "0"], False, 0.0, 0.0),
    ],
)
def test_averaging_is_set_on_the_command_line(
    options: list[str], average_weights: bool, final_lr_ratio: float | None, final_ratio: float
) -> None:
    _, (_, alrs, _, _), _ = parse(options, TYPES, TASKS, "titanic")
    config = alrs.to_config(0)
    assert (config.average_weights, config.final_lr_ratio) == (average_weights, final_lr_ratio)
    assert config.final_ratio(1000) == final_ratio


@pytest.mark.parametrize(
    ("make", "field"),
    [
        (lambda: ALRSArguments(phase1_steps="soon").to_config(0), "phase1_steps"),
        (lambda: ALRSArguments(final_lr_ratio=1.5).to_config(0), "final_lr_ratio"),
        (lambda: CompareArguments(schedulers=["linear", "lienar"]), "scheduler"),
        (lambda: CompareArguments(learning_rates=[-1.0]), "learning_rates"),
        (lambda: CompareArguments(jobs=0), "jobs"),
        (lambda: CompareArguments(executor="slurm"), "executor"),
        (lambda: find_task("sst3", TASKS), "task_name"),
        (lambda: find_task("no.such.module:TASK", TASKS), "task"),
        (lambda: read_recipe(Path("no-such-file.yaml")), "config"),
    ],
)
def test_bad_values_name_their_field(make: object, field: str) -> None:
    with pytest.raises(InputError) as error:
        make()
    assert error.value.field == field


def test_a_mapping_in_a_recipe_is_an_option_of_json(tmp_path: Path) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("lr_scheduler_kwargs: {min_lr: 1.0e-6}\n")
    _, (*_, args), _ = parse(["--task_name", "sst2", "--config", str(recipe)], TYPES, TASKS, "sst2")
    assert args.lr_scheduler_kwargs == {"min_lr": 1e-6}


def test_a_recipe_may_spell_options_as_the_command_line_does(tmp_path: Path) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("task-name: cifar10\ndataset-name: sample\nmax-steps: 3\n")
    task, (data, *_, args), _ = parse(["--config", str(recipe)], TYPES, TASKS, "sst2")
    assert (task.name, data.dataset_name, args.max_steps) == ("cifar10", "sample", 3)


def test_folds_without_an_evaluation_leave_the_scores_that_are_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hf_alrs.run._train_prepared", lambda *arguments: {})
    (tmp_path / "eval_results.json").write_text("kept")
    args = TrainingArguments(str(tmp_path), do_train=True, report_to="none")
    data = DataArguments(task_name="titanic", dataset_name="sample")
    assert _cross_validate(TASKS["titanic"], data, "alrs", args, ALRSConfig()) == {}
    assert (tmp_path / "eval_results.json").read_text() == "kept"


def test_evaluating_alone_asks_for_the_classes_that_the_model_has(tmp_path: Path) -> None:
    prepared = TASKS["titanic"].prepare(DataArguments(task_name="titanic", dataset_name="sample"))
    config = prepared.model_init().config
    _check_inputs(prepared, tmp_path, config)
    _check_inputs(replace(prepared, processing_class=None), tmp_path, config)
    with pytest.raises(InputError, match=r"the classes .*, and the data no, yes"):
        _check_inputs(replace(prepared, label_names=["no", "yes"]), tmp_path, config)


@pytest.mark.parametrize(
    ("options", "recipe", "several"),
    [
        ([], "seed: 1", False),
        ([], "schedulers:", False),
        ([], "schedulers: [alrs, linear]", True),
        (["--seeds", "0", "1"], "seed: 1", True),
    ],
)
def test_several_runs_may_be_named_by_the_file_of_options(
    options: list[str], recipe: str, several: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    called: list[str] = []
    for name in ("train", "compare"):
        monkeypatch.setattr(cli, name, lambda *_, name=name: called.append(name))
    (tmp_path / "options.yaml").write_text(recipe)
    train_or_compare(["--config", str(tmp_path / "options.yaml"), *options], TASKS, "cifar10")
    assert called == ["compare" if several else "train"]


@pytest.mark.parametrize("option", ["--load_best_model_at_end True --eval_strategy epoch", "--save_strategy best"])
def test_a_comparison_chooses_no_best_model(option: str, tmp_path: Path) -> None:
    arguments = ["--task", "titanic", "--dataset_name", "sample", "--output_dir", str(tmp_path), *option.split()]
    with pytest.raises(InputError, match=r"(load_best_model_at_end|save_strategy)=.*comparison"):
        read_comparison([*arguments, "--metric_for_best_model", "f1", "--seeds", "0", "1"], TASKS, "titanic")


def test_recipe_that_is_no_mapping(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("- a\n- b\n")
    with pytest.raises(InputError, match="mapping"):
        read_recipe(path)
    path.write_text("a: [")
    with pytest.raises(InputError, match="YAML"):
        read_recipe(path)


def test_input_error_is_one_message_and_exit_code_2() -> None:
    result = run("run_vision_alrs.py", "--dataset_name", "no/such/folder")
    assert result.returncode == 2
    assert result.stderr.count("error:") == 1 and "Traceback" not in result.stderr
    assert "no/such/folder" in result.stderr
    shown = run("run_vision_alrs.py", "--dataset_name", "no/such/folder", "--debug")
    assert "Traceback" in shown.stderr


def test_task_given_by_module() -> None:
    assert find_task("tasks:TASKS", {})["sst2"].name == "sst2"


def test_a_task_of_another_script_is_named() -> None:
    text = {"sst2": TASKS["sst2"]}
    with pytest.raises(InputError, match=r"cifar10.*must be one of sst2.*hf-alrs train"):
        find_task("cifar10", text)
    with pytest.raises(InputError, match="spelling"):
        find_task("cifar", text)


def test_help_announces_no_run(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        parse(["--help"], TYPES, TASKS, "sst2")
    assert "running" not in capsys.readouterr().out.split("usage:")[0]


def test_an_option_that_cannot_be_read_is_told_in_one_sentence(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("num_train_epochs: three\n")
    with pytest.raises(InputError, match=r"num_train_epochs.*three.*recipe\.yaml.*--help") as caught:
        parse(["--task_name", "sst2", "--dataset_name", "sample", "--config", str(recipe)], TYPES, TASKS, "sst2")
    assert "usage" not in str(caught.value)
    recipe.write_text("task_name: [titanic]\n")
    with pytest.raises(InputError, match=r"task_name=\['titanic'\]: must be text in .*recipe\.yaml"):
        parse(["--config", str(recipe)], TYPES, TASKS, "sst2")
    with pytest.raises(InputError, match=r"options='modle': unrecognized arguments: --modle x\. Correct"):
        parse(["--task_name", "sst2", "--dataset_name", "sample", "--modle", "x"], TYPES, TASKS, "sst2")


def test_help_names_the_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(sys, "argv", ["/somewhere/bin/hf-alrs", "train", "--help"])
    with pytest.raises(SystemExit):
        cli.main()
    assert capsys.readouterr().out.startswith("usage: hf-alrs train ")


def test_output_where_no_files_can_be(tmp_path: Path) -> None:
    command = ["--task_name", "sst2", "--dataset_name", "sample", "--output_dir", "/proc/runs"]
    with pytest.raises(InputError, match=r"output_dir.*/proc is not writable"):
        parse(command, TYPES, TASKS, "sst2")


def test_installed_tasks_come_from_entry_points() -> None:
    assert set(TASKS) <= set(installed_tasks())


def test_vision_script_end_to_end(tmp_path: Path) -> None:
    """The script on the built-in digits: files, history, metrics; a second call resumes and has nothing left to do."""
    arguments = ["--dataset_name", "sample", "--num_train_epochs", "3", "--network", "scratch", "--output_dir"]
    result = run("run_vision_alrs.py", *arguments, str(tmp_path))
    assert result.returncode == 0, result.stderr[-2000:]
    metrics = json.loads((tmp_path / "eval_results.json").read_text())
    assert {
        "eval_loss",
        "eval_accuracy",
        "eval_f1",
        "eval_runtime",
        "eval_samples_per_second",
        "eval_steps_per_second",
        "epoch",
    } <= set(metrics)
    before = json.loads((tmp_path / "benchmark_results.json").read_text())
    assert before["eval_loss"] > metrics["eval_loss"]
    assert "Benchmark Results (before training):" in result.stdout
    history = [json.loads(line) for line in (tmp_path / "alrs_history.jsonl").read_text().splitlines()]
    assert [line["step"] for line in history] == list(range(1, len(history) + 1))
    assert {line["phase"] for line in history} == {"gather", "fit", "drive"}
    assert any(line.get("features") for line in history)
    assert (tmp_path / "all_results.json").exists() and (tmp_path / "model.safetensors").exists()
    trained = (tmp_path / "train_results.json").read_text()
    again = run("run_vision_alrs.py", *arguments, str(tmp_path))
    assert again.returncode == 0 and "Resuming" in again.stderr and "nothing was trained" in again.stderr
    assert (tmp_path / "train_results.json").read_text() == trained
    other = run("run_vision_alrs.py", *arguments, str(tmp_path), "--learning_rate", "0.01")
    assert other.returncode == 2
    assert re.match(r"error: learning_rate=0.01: .* holds the checkpoints of a run with .*--output_dir", other.stderr)
    report = run("-m", "hf_alrs.cli", "report", str(tmp_path))
    assert report.returncode == 2 and "folder of a single run" in report.stderr
    assert json.loads((tmp_path / "eval_results.json").read_text())["eval_loss"] == metrics["eval_loss"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--learning_rate=-0.001"], "learning_rate=-0.001"),
        (["--learning_rate", "nan"], "learning_rate=nan"),
        (["--warmup_steps", "nan"], "warmup_steps=nan"),
        (["--batch_eval_metrics", "True"], "batch_eval_metrics=True"),
        (["--per_device_train_batch_size", "0"], "per_device_train_batch_size=0"),
        (["--per_device_eval_batch_size", "0"], "per_device_eval_batch_size=0"),
        (["--gradient_accumulation_steps", "0"], "gradient_accumulation_steps=0"),
        (["--adam_beta1", "2"], "adam_beta1=2.0"),
        (["--num_train_epochs", "-1"], "num_train_epochs=-1.0"),
        (["--resume_from_checkpoint", "/nope"], "resume_from_checkpoint='/nope'"),
        (["--output_dir", __file__], "output_dir='"),
        (["--load_best_model_at_end", "True", "--eval_strategy", "no"], "load_best_model_at_end=True: is refused"),
        (["--warmup_steps=-5"], "warmup_steps=-5.0: is refused"),
        (["--output_dir="], "output_dir='': is empty"),
        (["--output_dir=/proc/x"], "output_dir='/proc/x'"),
        (["--label_smoothing_factor", "1"], "label_smoothing_factor=1.0"),
        (["--adam_epsilon=-1"], "adam_epsilon=-1.0"),
        (["--weight_decay=-1"], "weight_decay=-1.0"),
        (["--dataloader_num_workers=-1"], "dataloader_num_workers=-1"),
        (["--eval_strategy=steps", "--eval_steps=-5"], "eval_steps=-5"),
        (["extra"], "options='extra': unrecognized arguments: extra."),
        (["--learning-rate", "abc"], "options='learning_rate'"),
    ],
)
@pytest.mark.parametrize("several", [False, True])
def test_training_arguments_that_cannot_work_are_refused(
    options: list[str], message: str, several: bool, tmp_path: Path
) -> None:
    arguments = ["--dataset_name", "sample", "--output_dir", str(tmp_path), *options]
    arguments += ["--schedulers", "linear", "--seeds", "0"] if several else []
    with pytest.raises(InputError) as refused:
        train_or_compare(arguments, {"cifar10": TASKS["cifar10"]}, "cifar10")
    assert message in str(refused.value)


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize(
    ("options", "message"),
    [(["--network", "/nonexistent"], "network='/nonexistent'"), (["--hidden_sizes", "7"], "hidden_sizes=(7,)")],
)
def test_a_network_that_cannot_be_had_is_refused_before_anything_is_run(
    options: list[str], message: str, several: bool, tmp_path: Path
) -> None:
    arguments = ["--dataset_name", "sample", "--output_dir", str(tmp_path), *options]
    arguments += ["--schedulers", "linear", "alrs", "--seeds", "0"] if several else []
    with pytest.raises(InputError) as refused:
        train_or_compare(arguments, {"cifar10": TASKS["cifar10"]}, "cifar10")
    assert message in str(refused.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (["--seeds=-1"], "seeds=-1"),
        (["--subset_eval_samples", "0"], "subset_eval_samples=0"),
        (["--target", "nan"], "target=nan"),
        (["--learning_rates", "1e-3", "0.0010000001"], "learning_rates=.*six digits"),
        (["--schedulers", "greedy", "--controller_split", "0"], "controller_split=0.*greedy"),
        (["--schedulers", "linear", "--scheduler", "cosine"], "scheduler='cosine': is given beside schedulers"),
        (["--schedulers", "linear", "--do_predict"], "do_predict=True: is of a single run"),
    ],
)
def test_a_comparison_that_cannot_be_is_refused(options: list[str], match: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=match):
        cli.compare(["--dataset_name", "sample", "--output_dir", str(tmp_path), *options], TASKS, "titanic")
    assert not list(tmp_path.iterdir())


def test_one_scheduler_with_several_seeds_is_compared_with_itself(tmp_path: Path) -> None:
    arguments = ["--dataset_name", "sample", "--output_dir", str(tmp_path), "--scheduler", "cosine"]
    _, matrix, _, _ = read_comparison([*arguments, "--seeds", "0", "1"], TASKS, "titanic")
    assert matrix.schedulers == ["cosine"]


@pytest.mark.parametrize(
    ("line", "match"), [("config: other.yaml", "config='other.yaml'"), ("tsk: imdb", "--tsk imdb")]
)
def test_a_recipe_with_a_key_that_means_nothing_is_refused(line: str, match: str, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(f"{line}\nmax_steps: 1\n")
    with pytest.raises(InputError, match=match):
        train(["--config", str(path), "--dataset_name", "sample"], TASKS, "titanic")


def test_a_recipe_may_spell_the_task_as_the_command_line_does(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("task: imdb\ndataset_name: sample\n")
    types = (DataArguments, ALRSArguments, RunArguments, TrainingArguments)
    assert parse(["--config", str(path)], types, TASKS, "titanic")[0].name == "imdb"


def test_a_run_of_no_step_is_refused(tmp_path: Path) -> None:
    arguments = ["--dataset_name", "sample", "--output_dir", str(tmp_path), "--max_steps", "3"]
    arguments += ["--per_device_train_batch_size", "5000", "--dataloader_drop_last", "True"]
    with pytest.raises(InputError, match=r"per_device_train_batch_size=5000.*no whole batch"):
        train(arguments, {"cifar10": TASKS["cifar10"]}, "cifar10")


TABLE = ["--task", "titanic", "--dataset_name", "sample", "--fold", "0", "--num_train_epochs", "1"]


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (["--do_train", "--do_predict"], "do_predict=True.*no unlabelled split"),
        (["--label_smoothing_factor", "0.1"], "label_smoothing_factor=0.1.*one logit"),
        (
            ["--load_best_model_at_end", "--metric_for_best_model", "f2"],
            "metric_for_best_model='f2'.*loss, accuracy, f1",
        ),
        (
            ["--load_best_model_at_end", "--metric_for_best_model", "held_out_loss"],
            "split that is reported.*Give loss",
        ),
        (
            ["--load_best_model_at_end", "--metric_for_best_model", "f1", "--scheduler", "greedy"],
            "metric_for_best_model='f1'.*steps the 'greedy' scheduler",
        ),
        (["--load_best_model_at_end", "--controller_split", "0"], "load_best_model_at_end.*--controller_split"),
        (["--save_strategy", "best", "--controller_split", "0"], "save_strategy='best'.*--controller_split"),
        (
            ["--save_strategy", "best", "--metric_for_best_model", "f2"],
            "metric_for_best_model='f2'.*loss, accuracy, f1",
        ),
    ],
)
def test_what_the_data_rule_out_is_refused_before_training(options: list[str], match: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=match):
        train([*TABLE, "--output_dir", str(tmp_path), *options], TASKS, "titanic")
    assert not list(tmp_path.glob("checkpoint-*")) and not (tmp_path / "alrs_history.jsonl").exists()


def write_tables(folder: Path) -> tuple[Path, Path]:
    """Two tables of one name."""
    paths = []
    for number in range(2):
        generator = np.random.default_rng(number)
        x = generator.normal(size=80)
        path = folder / str(number) / "train.csv"
        path.parent.mkdir()
        pd.DataFrame({"x": x, "label": (x + 0.3 * generator.normal(size=80) > 0).astype(int)}).to_csv(
            path, index=False
        )
        paths.append(path)
    return paths[0], paths[1]


def own_table(path: Path, output_dir: Path, *options: str) -> dict[str, float]:
    arguments = ["--task", "titanic", "--dataset_name", str(path), "--num_train_epochs", "12", "--fold", "0"]
    return train([*arguments, "--output_dir", str(output_dir), *options], TASKS, "titanic")


def test_evaluating_alone_takes_the_trained_model(tmp_path: Path) -> None:
    table, _ = write_tables(tmp_path)
    with pytest.raises(InputError, match=r"output_dir=.*no trained model"):
        own_table(table, tmp_path / "run", "--do_eval")
    trained = own_table(table, tmp_path / "run")
    again = own_table(table, tmp_path / "run", "--do_eval")
    assert again["eval_loss"] == pytest.approx(trained["eval_loss"], rel=1e-5)
    before = (tmp_path / "run" / "eval_results.json").read_text()
    with pytest.raises(InputError, match=r"another preprocessor_config.json.*max_train_samples"):
        own_table(table, tmp_path / "run", "--do_eval", "--max_train_samples", "40")
    assert (tmp_path / "run" / "eval_results.json").read_text() == before


@pytest.mark.parametrize("options", [["--eval_strategy", "no", "--save_strategy", "no"], []])
def test_schedule_free_saves_what_it_evaluates(tmp_path: Path, options: list[str]) -> None:
    table, _ = write_tables(tmp_path)
    options = ["--scheduler", "schedule_free", "--learning_rate", "0.03", *options]
    trained = own_table(table, tmp_path / "run", *options)
    again = own_table(table, tmp_path / "run", *options, "--do_eval")
    assert again["eval_loss"] == pytest.approx(trained["eval_loss"], rel=1e-5)


def test_evaluations_in_half_precision_leave_the_training_as_it_is(tmp_path: Path) -> None:
    """Trainer turns a model that is evaluated outside a training into half precision for good."""
    table, _ = write_tables(tmp_path)
    own_table(table, tmp_path / "run", "--bf16_full_eval", "True", "--use_cpu", "True")
    own_table(table, tmp_path / "plain")
    half, plain = (load_file(tmp_path / name / "model.safetensors") for name in ("run", "plain"))
    assert all(torch.equal(half[name], plain[name]) for name in plain)


def test_a_folder_is_of_one_run_or_comparison(tmp_path: Path) -> None:
    table, other = write_tables(tmp_path)
    own_table(table, tmp_path / "run")
    with pytest.raises(InputError, match=r"dataset_name='train.csv'.*another one of this name"):
        own_table(other, tmp_path / "run")
    compared = ["--dataset_name", str(table), "--schedulers", "linear", "--num_train_epochs", "1", "--output_dir"]
    with pytest.raises(InputError, match="is the folder of a single run"):
        cli.compare([*compared, str(tmp_path / "run")], TASKS, "titanic")
    cli.compare([*compared, str(tmp_path / "comparison")], TASKS, "titanic")
    with pytest.raises(InputError, match="is the folder of a comparison"):
        own_table(table, tmp_path / "comparison")
    (checkpoint,) = (tmp_path / "run").glob("checkpoint-*")
    arguments = ["--task", "titanic", "--dataset_name", str(table), "--resume_from_checkpoint", str(checkpoint)]
    with pytest.raises(InputError, match=r"resume_from_checkpoint=.*every fold"):
        train([*arguments, "--output_dir", str(tmp_path / "folds")], TASKS, "titanic")


def test_a_run_that_starts_afresh_leaves_nothing_of_the_one_before(tmp_path: Path) -> None:
    table, _ = write_tables(tmp_path)
    own_table(table, tmp_path / "run", "--save_strategy", "no")
    assert (tmp_path / "run" / "alrs_history.jsonl").is_file()
    (tmp_path / "run" / "predict_results.txt").write_text("of the run before")
    own_table(table, tmp_path / "run", "--save_strategy", "no", "--scheduler", "linear")
    assert not (tmp_path / "run" / "alrs_history.jsonl").exists()
    assert not (tmp_path / "run" / "predict_results.txt").exists()
    assert (tmp_path / "run" / "benchmark_results.json").is_file()


def test_a_token_is_not_told_with_what_else_is_wrong(tmp_path: Path) -> None:
    for given in (["--hub_token", "hf_secret"], ["--hub-token=hf_secret"]):
        with pytest.raises(InputError) as refused:
            train([*TABLE, *given, "--lr_scheduler_kwargs", "{bad}", "--output_dir", str(tmp_path)], TASKS, "titanic")
        assert "hf_secret" not in str(refused.value) and "***" in str(refused.value)


def test_the_best_model_is_chosen_on_the_controllers_split(tmp_path: Path) -> None:
    options = ["--load_best_model_at_end", "--metric_for_best_model", "accuracy", "--num_train_epochs", "3"]
    train([*TABLE, "--output_dir", str(tmp_path), *options], TASKS, "titanic")
    state = json.loads((tmp_path / "trainer_state.json").read_text())
    measured = [
        entry["eval_controller_accuracy"] for entry in state["log_history"] if "eval_controller_accuracy" in entry
    ]
    assert len(measured) >= 3 and state["best_metric"] == max(measured)


@pytest.mark.parametrize("options", [[], ["--metric_for_best_model", "accuracy", "--scheduler", "linear"]])
def test_only_the_best_is_saved(options: list[str], tmp_path: Path) -> None:
    train([*TABLE, "--output_dir", str(tmp_path), "--save_strategy", "best", *options], TASKS, "titanic")
    state = json.loads((tmp_path / "trainer_state.json").read_text())
    assert state["best_model_checkpoint"] and Path(state["best_model_checkpoint"]).is_dir()


def test_an_interrupted_run_that_keeps_one_checkpoint_ends_as_one_that_was_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = [*TABLE, "--save_strategy", "steps", "--save_steps", "4", "--save_total_limit", "1"]
    expected = train([*options, "--output_dir", str(tmp_path / "whole")], TASKS, "titanic")
    on_step_end = ALRSCallback.on_step_end

    def interrupt(self: Any, args: Any, state: Any, *rest: Any, **kwargs: Any) -> None:
        on_step_end(self, args, state, *rest, **kwargs)
        if state.global_step == 7:
            raise KeyboardInterrupt

    folder = tmp_path / "interrupted"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(ALRSCallback, "on_step_end", interrupt)
        train([*options, "--output_dir", str(folder)], TASKS, "titanic")
    # As a run that is killed while it saves: trainer_state.json comes last, and files may be cut off
    for number, name in ((6, "trainer_state.json"), (8, "optimizer.pt")):
        partial = shutil.copytree(folder / "checkpoint-4", folder / f"checkpoint-{number}")
        content = (partial / name).read_bytes()
        (partial / name).unlink() if number == 6 else (partial / name).write_bytes(content[: len(content) // 2])
    assert train([*options, "--output_dir", str(folder)], TASKS, "titanic")["eval_loss"] == expected["eval_loss"]
    names = ("train_results.json", "eval_results.json", "trainer_state.json", "README.md", "model.safetensors")
    assert all((folder / name).is_file() for name in names)
    histories = [(path / "alrs_history.jsonl").read_text() for path in (folder, tmp_path / "whole")]
    assert histories[0] == histories[1]


def test_an_interruption_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    def interrupted(arguments: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setitem(cli.COMMANDS, "train", (interrupted, ""))
    monkeypatch.setattr(sys, "argv", ["hf-alrs", "train"])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 130
    assert capsys.readouterr().err.strip().splitlines() == [
        "interrupted: the same command goes on from what is stored."
    ]


def test_the_home_folder_is_found_behind_an_equals_sign(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["hf-alrs", "report", "--output_dir=~/report", "~/runs"])
    seen = []
    monkeypatch.setattr(cli, "build_report", lambda folders, output_dir, target: seen.extend([*folders, output_dir]))
    cli.main()
    assert seen == [tmp_path / "runs", tmp_path / "report"]


def test_a_full_disk_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    def full(arguments: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "outputs/run.json")

    monkeypatch.setitem(cli.COMMANDS, "compare", (full, ""))
    monkeypatch.setattr(sys, "argv", ["hf-alrs", "compare"])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: outputs/run.json: No space left on device.")


def test_a_killed_worker_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    def killed(arguments: Any) -> None:
        with ProcessPoolExecutor(1) as pool:
            list(pool.map(os._exit, [9]))

    monkeypatch.setitem(cli.COMMANDS, "meta-train", (killed, ""))
    monkeypatch.setattr(sys, "argv", ["hf-alrs", "meta-train"])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: a worker process was killed") and "num_workers" in line


def test_a_table_without_an_eval_split_runs_over_all_folds(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    command = ["--task", "titanic", "--dataset_name", "sample", "--num_folds", "3", "--num_train_epochs", "2"]
    means = train([*command, "--network", "scratch", "--output_dir", str(tmp_path)], TASKS, "titanic")
    table = capsys.readouterr().out.split("beside scikit-learn's logistic regression")[1]
    assert [line.split()[0] for line in table.splitlines()[2:6]] == ["0", "1", "2", "mean"]
    folds = [json.loads((tmp_path / f"fold-{k}" / "eval_results.json").read_text()) for k in range(3)]
    assert means["eval_loss"] == pytest.approx(sum(fold["eval_loss"] for fold in folds) / 3)
    stored = {name: json.loads((tmp_path / f"{name}_results.json").read_text()) for name in ("eval", "reference")}
    assert stored["eval"] == means and stored["reference"].keys() == means.keys()
    one = train([*command, "--fold", "1", "--network", "scratch", "--output_dir", str(tmp_path / "one")], TASKS, "")
    assert one["eval_loss"] == pytest.approx(folds[1]["eval_loss"]), "a fold alone is the same run"
