import copy
import json
import math
import re
import shutil
import socket
import subprocess
import threading
from contextlib import contextmanager
from html import escape
from pathlib import Path

import jsonschema
import numpy as np
import pytest

from hf_alrs.config import InputError
from hf_alrs.report import build_report, load_runs, plots, summarize, validate_result
from hf_alrs.report.leaderboard import build_leaderboard
from hf_alrs.report.plots import scheduler_styles
from hf_alrs.report.runs import SCHEMA_FILE, group_by_task
from hf_alrs.report.summary import format_rate, json_ready


SCHEDULERS, RATES, SEEDS = ("alrs", "linear", "step"), (1e-4, 1e-3), (0, 1, 2)
NUM_STEPS = 80
FAILED = ("step", 1e-4, 1)
# Final losses without noise; linear at 1e-3 is the best tuned baseline of the made-up matrix.
LEVELS = {
    ("alrs", 1e-4): 0.42,
    ("alrs", 1e-3): 0.40,
    ("linear", 1e-4): 0.60,
    ("linear", 1e-3): 0.50,
    ("step", 1e-4): 0.70,
    ("step", 1e-3): 0.55,
}


def make_record(scheduler="alrs", learning_rate=1e-3, seed=0, task="sst2", level=None, status="completed", pace=1.0):
    """One stored run whose loss falls to `level` plus 0.01 for each seed; `pace` stretches its clock only."""
    generator = np.random.default_rng([seed, len(scheduler)])
    level = (LEVELS[scheduler, learning_rate] if level is None else level) + 0.01 * seed
    steps = np.arange(1, NUM_STEPS + 1)
    seconds = pace * 0.02 * steps
    evaluations = [
        {
            "step": step,
            "epoch": step / 40,
            "seconds": float(seconds[step - 1]),
            "eval_loss": level + (NUM_STEPS - step) / 100,
            "eval_accuracy": 1 - level - (NUM_STEPS - step) / 200,
            "eval_f1": 0.95 - level,
        }
        for step in range(20, NUM_STEPS + 1, 20)
    ]
    clock = {"eval_runtime": pace, "eval_samples_per_second": 872 / pace, "eval_steps_per_second": 28 / pace}
    final = {key: evaluations[-1][key] for key in ("eval_loss", "eval_accuracy", "eval_f1")}
    phases = ["gather"] * 4 + ["fit"] * 4 + ["drive"] * (NUM_STEPS - 8)
    completed = status == "completed"
    return {
        "schema_version": 1,
        "spec": {"task": task, "scheduler": scheduler, "learning_rate": learning_rate, "seed": seed},
        "status": status,
        "error": None if completed else "the loss was not finite at step 41",
        "config": {"data": {"model_name_or_path": "tiny-bert"}, "training": {"optim": "adamw_torch"}},
        "environment": {
            "versions": {"torch": "2.9.0", "transformers": "5.23.0"},
            "commit": "0123abc",
            "device": "cpu",
            "platform": "Linux",
            "num_threads": 1,
            "command": "hf-alrs compare --task_name sst2",
        },
        "source": "synthetic, made by a test",
        "num_training_steps": NUM_STEPS,
        "steps_per_epoch": 40,
        "splits": {"train": 1260, "controller": 140, "eval": 872},
        "higher_is_better_metric": "eval_accuracy",
        "history": {
            "step": steps.tolist(),
            "loss": (level + np.exp(-steps / 20) + generator.normal(0, 0.02, NUM_STEPS)).tolist(),
            "grad_norm": None,
            "learning_rate": (learning_rate * (1 - (steps - 1) / NUM_STEPS)).tolist(),
            "phase": phases if scheduler.startswith("alrs") else None,
            "seconds": seconds.tolist(),
        },
        "evaluations": evaluations if completed else evaluations[:2],
        "results": {**final, **clock, "epoch": 2.0} if completed else None,
        "benchmark_results": {"eval_loss": 0.6937, "eval_accuracy": 0.5011, "eval_f1": 0.4934, **clock},
        "timing": {
            "train_seconds": float(seconds[-1]),
            "eval_seconds": pace,
            "controller_seconds": 0.016 * pace if scheduler.startswith("alrs") else 0.0,
            "total_seconds": float(seconds[-1]) + pace,
        },
        "peak_memory_bytes": int(2**28 * pace),
        "initial_state_hash": f"weights of seed {seed}",
        "first_batch_hash": f"batch of seed {seed}",
    }


def store(folder, *records):
    folder.mkdir(parents=True, exist_ok=True)
    for record in records:
        number = len(list(folder.iterdir()))
        (folder / f"run-{number:03}.json").write_text(json.dumps(record, allow_nan=False), encoding="utf-8")
    return folder


def matrix(pace=1.0, task="sst2"):
    return [
        make_record(
            scheduler,
            rate,
            seed,
            task,
            status="diverged" if (scheduler, rate, seed) == FAILED else "completed",
            pace=pace,
        )
        for scheduler in SCHEDULERS
        for rate in RATES
        for seed in SEEDS
    ]


def summary_of(folder, *records):
    return summarize(load_runs([store(folder, *records)]))


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """The report of the whole made-up matrix: its folder and the returned content."""
    results = store(tmp_path_factory.mktemp("runs"), *matrix())
    output = tmp_path_factory.mktemp("report")
    return output, build_report(results, output)


@pytest.fixture(scope="module")
def summary(tmp_path_factory):
    return summary_of(tmp_path_factory.mktemp("summary"), *matrix())


def cell_of(summary, scheduler, rate):
    cells = summary["tasks"]["sst2"]["cells"]
    return next(cell for cell in cells if (cell["scheduler"], cell["learning_rate"]) == (scheduler, rate))


def test_ablations_differ_in_colour_where_no_baseline_needs_the_colours(tmp_path):
    names = ("alrs", "alrs_no_average", "alrs_no_fit")

    def styles_of(*shown):
        folder = store(tmp_path / shown[-1], *(make_record(name, level=0.4) for name in shown))
        return scheduler_styles(group_by_task(load_runs([folder])))

    assert len({style.color for style in styles_of(*names).values()}) == 3
    styles = styles_of(*names, "linear")
    assert styles["alrs"].color == styles["alrs_no_fit"].color != styles["linear"].color
    assert len({str(styles[name].dashes) for name in names}) == 3


# --- numbers ----------------------------------------------------------------------------------------------------------


def test_cells_hold_mean_deviation_and_time_to_the_best_tuned_baseline(summary):
    task = summary["tasks"]["sst2"]
    assert task["best_baseline"] == {"scheduler": "linear", "learning_rate": 1e-3}
    assert task["targets"] == pytest.approx({"eval_loss": 0.51, "eval_accuracy": 0.49})
    alrs = cell_of(summary, "alrs", 1e-3)
    assert alrs["tuned"] and not cell_of(summary, "alrs", 1e-4)["tuned"]
    assert alrs["final"]["eval_loss"] == pytest.approx({"mean": 0.41, "sd": 0.01, "median": 0.41})
    # 0.40 + 0.2 at step 60 and 0.40 at step 80: only the last evaluation is at or under 0.51.
    assert alrs["to_target"]["eval_loss"] == {"reached": 3, "steps": 80.0, "epochs": 2.0}
    assert cell_of(summary, "linear", 1e-4)["to_target"]["eval_loss"] == {
        "reached": 0,
        "steps": math.inf,
        "epochs": math.inf,
    }


def test_speed_ups_are_steps_to_where_the_best_others_end(summary):
    task = summary["tasks"]["sst2"]
    assert {(row["over"], row["other"], row["other_learning_rate"]) for row in task["speed_ups"]} == {
        ("best_schedule", "linear", 1e-3),
        ("best_baseline", "linear", 1e-3),
    }
    rows = {row["learning_rate"]: row for row in task["speed_ups"] if row["over"] == "best_schedule"}
    # From 0.61 at step 60 to 0.41 at the end: 0.51 half-way
    assert rows[1e-3]["eval_loss"] == pytest.approx(0.51)
    assert rows[1e-3]["steps"] == pytest.approx(70) and rows[1e-3]["speed_up"] == pytest.approx(80 / 70)


def test_failed_run_stays_visible_as_the_worst_value(summary):
    cell = cell_of(summary, "step", 1e-4)
    assert (cell["num_runs"], cell["num_failed"]) == (3, 1)
    assert cell["final"]["eval_loss"]["mean"] == math.inf
    assert cell["final"]["eval_accuracy"]["mean"] == pytest.approx((0.30 + 0.28) / 3)
    assert cell["final_of_completed"]["eval_loss"]["mean"] == pytest.approx(0.71)
    assert summary["failures"] == [
        {
            "task": "sst2",
            "scheduler": "step",
            "learning_rate": 1e-4,
            "seed": 1,
            "status": "diverged",
            "error": "the loss was not finite at step 41",
        }
    ]


def test_better_is_said_where_the_interval_excludes_zero(summary):
    rows = summary["tasks"]["sst2"]["comparisons"]["tuned"]
    against_linear = next(row for row in rows if (row["other"], row["metric"]) == ("linear", "eval_loss"))
    assert against_linear["advantage"] == pytest.approx(0.1)
    assert against_linear["verdict"] == "better" and against_linear["interval"][0] > 0
    assert against_linear["p_value"] == pytest.approx(0.25)
    assert against_linear["p_holm"] == pytest.approx(0.5)
    text = summary["conclusion"][0]["text"]
    assert "alrs at 1e-3 is better than the best tuned baseline, linear at 1e-3" in text
    assert "smallest p-value that 3 seeds can give is 0.25" in text


@pytest.mark.parametrize(
    ("levels", "verdict"),
    [((0.6, 0.62, 0.61), "worse"), ((0.4, 0.6, 0.5), "not better"), ((0.4, 0.41, 0.42), "better")],
)
def test_conclusion_is_computed(tmp_path, levels, verdict):
    records = [make_record("alrs", 1e-3, seed, level=level - 0.01 * seed) for seed, level in enumerate(levels)]
    records += [make_record("linear", 1e-3, seed, level=0.5 - 0.01 * seed) for seed in SEEDS]
    summary = summary_of(tmp_path, *records)
    assert [sentence["verdict"] for sentence in summary["conclusion"][:2]] == [verdict, verdict]
    assert f"is {verdict} than the best tuned baseline" in summary["conclusion"][0]["text"]


def test_one_seed_has_no_interval_and_says_so(tmp_path):
    folder = store(tmp_path / "runs", make_record("alrs", 1e-3), make_record("linear", 1e-3))
    content = build_report(folder)
    row = content["tasks"]["sst2"]["comparisons"]["tuned"][0]
    assert row["interval"] == [None, None] and row["verdict"] == "no verdict"
    assert "one seed allows no interval and no verdict" in content["conclusion"][0]["text"]
    assert not any("is not better than" in sentence["text"] for sentence in content["conclusion"])
    assert "no interval" in (folder / "report.md").read_text(encoding="utf-8")
    assert content["overall"]["interquartile_means"][0]["tuned"]["interval"] == [None, None]


def test_a_task_of_one_seed_says_what_it_can_and_is_left_out_of_the_tables_over_tasks(tmp_path):
    records = [make_record(name, rate, seed) for name in ("alrs", "linear") for rate in RATES for seed in SEEDS]
    single = [make_record(name, rate, task="cifar10") for name in ("alrs", "linear") for rate in RATES]
    folder = store(tmp_path / "runs", *records, *single)
    content, alone = build_report(folder), summary_of(tmp_path / "alone", *records)
    for table in ("interquartile_means", "probability_of_improvement"):
        assert content["overall"][table] == json_ready(alone["overall"][table])
    text = (folder / "report.md").read_text(encoding="utf-8")
    assert "Of sst2, the first 3 seeds of each." in text
    (untuned,) = [
        sentence["text"]
        for sentence in content["conclusion"]
        if sentence["task"] == "cifar10" and "Without tuning" in sentence["text"] and "eval_loss" in sentence["text"]
    ]
    assert "not better" not in untuned and "one seed allows no interval and no verdict" in untuned
    assert any(text.startswith("Some cells hold one seed") for text in content["analysis"])
    assert any(text.startswith("Some cells hold only 3 seeds") for text in content["analysis"])


def test_other_software_of_the_judged_runs_is_said_and_times_are_not_compared(tmp_path):
    records = [make_record(name, 1e-3, seed) for name in ("alrs", "linear") for seed in SEEDS]
    content = build_report(store(tmp_path / "same", *records))
    assert not any("software" in text for text in content["analysis"])
    assert any("training takes" in text for text in content["timing"]["analysis"])
    for record in records[:3]:
        record["environment"] = copy.deepcopy(record["environment"])
        record["environment"]["versions"]["torch"] = "2.99"
    content = build_report(store(tmp_path / "other", *records))
    (caveat,) = [text for text in content["analysis"] if "software" in text]
    assert "torch 2.99 beside" in caveat and "device" not in caveat
    assert not any("training takes" in text for text in content["timing"]["analysis"])
    assert any("their times are not compared" in text for text in content["timing"]["analysis"])


def test_areas_are_of_the_same_stretch(tmp_path):
    records = [make_record(name, 1e-3, seed, level=0.5) for name in ("alrs", "linear") for seed in SEEDS]
    for record in records[3:]:  # evaluated earlier too, where the loss is high
        first = record["evaluations"][0]
        record["evaluations"] = [
            {**first, "step": 1, "eval_loss": 100.0, "eval_accuracy": 0.0},
            *record["evaluations"],
        ]
    areas = [cell["area_under_curve"] for cell in summary_of(tmp_path, *records)["tasks"]["sst2"]["cells"]]
    assert areas[0] == pytest.approx(areas[1])


def test_regret_compares_every_initial_rate_with_the_best_cell(summary):
    rows = [row for row in summary["tasks"]["sst2"]["comparisons"]["without_tuning"] if row["metric"] == "eval_loss"]
    assert [(row["learning_rate"], row["other"], row["other_learning_rate"]) for row in rows] == [
        (1e-4, "linear", 1e-3),
        (1e-3, "linear", 1e-3),
    ]
    assert [row["regret"] for row in rows] == pytest.approx([-0.08, -0.10])


def test_ablations_are_no_baselines(tmp_path):
    records = [make_record("alrs", 1e-3, seed) for seed in SEEDS]
    records += [make_record("alrs_no_feedback", 1e-3, seed, level=0.1) for seed in SEEDS]
    records += [make_record("linear", 1e-3, seed) for seed in SEEDS]
    task = summary_of(tmp_path, *records)["tasks"]["sst2"]
    assert task["best_baseline"]["scheduler"] == "linear" and task["reference"] == "alrs"
    assert {row["other"] for row in task["comparisons"]["tuned"]} == {"alrs_no_feedback", "linear"}


def test_cells_that_cannot_be_compared_are_named(tmp_path):
    other_start = make_record("linear", 1e-3, 0)
    other_start["initial_state_hash"] = "other weights"
    checks = summary_of(tmp_path, make_record("alrs", 1e-3, 0), make_record("alrs", 1e-3, 1), other_start)["plan"][
        "checks"
    ]
    assert checks == [
        "sst2: the runs of seed 0 have 2 different initial weights.",
        "sst2: linear at 1e-3 was not run with seed 1.",
    ]


@pytest.mark.parametrize("schedulers", [("alrs",), ("linear", "step")])
def test_report_of_one_side_only_concludes_nothing(tmp_path, schedulers):
    folder = store(tmp_path, *(make_record(name, 1e-3, seed) for name in schedulers for seed in SEEDS))
    (sentence,) = build_report(folder)["conclusion"]
    assert sentence["verdict"] is None and "there is nothing to" in sentence["text"]


def test_report_when_every_run_failed(tmp_path):
    records = [make_record(name, 1e-3, seed, status="failed") for name in ("alrs", "linear") for seed in SEEDS]
    for record in records[:3]:
        record["history"] = {key: [] for key in record["history"]}
        record["evaluations"] = []
        record["benchmark_results"] = None
    content = build_report(store(tmp_path, *records))
    assert content["results"] == {"sst2": None}
    assert content["tasks"]["sst2"]["targets"] == {}
    assert "there is no target" in content["conclusion"][0]["text"]


@pytest.mark.parametrize(
    ("rate", "text"), [(2e-5, "2e-5"), (1e-4, "1e-4"), (0.0035, "3.5e-3"), (0.1, "0.1"), (1.0, "1"), (0.01, "1e-2")]
)
def test_rates_are_written_short(rate, text):
    assert format_rate(rate) == text


def test_numbers_that_json_has_no_word_for():
    assert json_ready({"a": [math.inf, -math.inf, math.nan, 1.5, (2, "x")]}) == {
        "a": ["inf", "-inf", None, 1.5, [2, "x"]]
    }


def test_tuned_comparisons_say_how_many_rates_each_had(tmp_path):
    records = [make_record("alrs", rate, seed) for rate in RATES for seed in SEEDS]
    records += [make_record("linear", 1e-3, seed) for seed in SEEDS]
    folder = store(tmp_path, *records)
    content = build_report(folder)
    assert any("(2 rates: alrs, 1 rate: linear)" in sentence["text"] for sentence in content["conclusion"])
    assert any("most that were run from the most rates (sst2: 2 rates: alrs" in text for text in content["analysis"])
    text = (folder / "report.md").read_text(encoding="utf-8")
    assert "alrs from 1e-3, the best of 2, against" in text and "| linear | eval\\_loss | 1e-3 | 1 | 3 |" in text


@pytest.mark.parametrize(
    ("number", "told"), [(5, "only 5: it could hardly act"), (20, "have 20 of them and others 4")]
)
def test_evaluations_of_schedulers_that_are_stepped_with_them_are_told(tmp_path, number, told):
    records = [make_record("linear", 1e-3, seed) for seed in SEEDS]
    for seed in SEEDS:
        record = make_record("reduce_lr_on_plateau", 1e-3, seed, level=0.5)
        record["evaluations"] = [record["evaluations"][-1] | {"step": step} for step in range(1, number + 1)]
        records.append(record)
    assert any(told in text for text in summary_of(tmp_path, *records)["analysis"])


# --- files ------------------------------------------------------------------------------------------------------------


def test_equal_runs_differ_in_their_timing_only(tmp_path):
    first = json_ready(summary_of(tmp_path / "first", *matrix()))
    # Other clock, other memory, files written in another order.
    second = json_ready(summary_of(tmp_path / "second", *reversed(matrix(pace=1.7))))
    assert first["timing"] != second["timing"]
    del first["timing"], second["timing"]
    assert json.dumps(first) == json.dumps(second)


def test_report_from_its_own_folder_is_the_same_again(tmp_path):
    folder = store(tmp_path, *matrix()[:6])
    first = build_report(folder)
    files = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert build_report(folder) == first
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == files


def test_written_file_is_what_was_returned(report):
    output, content = report
    assert json.loads((output / "results.json").read_text(encoding="utf-8")) == content
    assert not list(output.rglob("*.tmp"))


def test_both_dictionaries_come_first_in_the_form_of_evaluate(report):
    output, _ = report
    text = (output / "report.md").read_text(encoding="utf-8")
    heads = re.findall(r"^## (.+)$", text, flags=re.MULTILINE)
    assert heads[:3] == ["Results", "Benchmark Results", "Plan"] and heads[-2:] == ["Analysis", "Conclusion"]
    results, benchmark = (eval(block) for block in re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL))
    metrics = ["eval_loss", "eval_accuracy", "eval_f1"]
    clock = ["eval_runtime", "eval_samples_per_second", "eval_steps_per_second"]
    assert list(results) == [*metrics, *clock, "epoch"] and list(benchmark) == metrics + clock
    assert results["eval_loss"] == 0.4 and results["epoch"] == 2.0
    assert benchmark["eval_loss"] == 0.6937


def test_markdown_tables_are_whole_and_figures_exist(report):
    output, _ = report
    text = (output / "report.md").read_text(encoding="utf-8")
    tables = re.findall(r"(?:^\|.*\n)+", text, flags=re.MULTILINE)
    assert len(tables) >= 8
    for table in tables:
        widths = {len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}
        assert len(widths) == 1, table
    figures = re.findall(r"^!\[.+\]\((.+)\)$", text, flags=re.MULTILINE)
    assert sorted(figures) == sorted(f"plots/{path.name}" for path in (output / "plots").iterdir())


@pytest.mark.parametrize(
    "name",
    [
        "1-sst2-final-eval_loss-against-rate",
        "1-sst2-curve-eval_accuracy-steps",
        "1-sst2-curve-eval_loss-seconds",
        "1-sst2-rates",
        "1-sst2-rates-alrs",
        "1-sst2-time-to-target-steps",
        "1-sst2-differences-eval_loss",
        "performance-profile",
        "probability-eval_loss",
        "overhead",
    ],
)
def test_every_kind_of_figure_is_drawn(report, name):
    svg = (report[0] / "plots" / f"{name}.svg").read_text(encoding="utf-8")
    assert "alrs" in svg and "</svg>" in svg


def test_names_are_escaped_wherever_they_are_shown(tmp_path):
    name, task = "<script>alert('x')</script>", "a|b & <b>$task_1$</b>"
    records = [make_record(name, 1e-3, seed, task, level=0.5) for seed in SEEDS]
    records += [make_record("alrs", 1e-3, seed, task) for seed in SEEDS]
    records[0].update(status="failed", results=None, error="<img src=x onerror=alert(1)> | broken\nline")
    records[1]["environment"]["command"] = '"><script>alert(2)</script>'
    folder = store(tmp_path, *records)
    build_report(folder)
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert "<script" not in page and "<img" not in page and "<b>" not in page
    assert "&lt;script&gt;alert(" in page
    text = (folder / "report.md").read_text(encoding="utf-8")
    assert "<script" not in text and "<img" not in text and "<b>" not in text
    assert "&lt;img src=x onerror=alert(1)&gt; \\| broken line" in text
    assert all(re.fullmatch(r"[A-Za-z0-9_-]+\.svg", path.name) for path in (folder / "plots").iterdir())


def test_several_folders_and_tasks_are_merged(tmp_path):
    first = store(tmp_path / "first", *matrix()[:6])
    # The same file published twice counts once; another person's run of the same seed is another run.
    store(tmp_path / "second", matrix()[0], *(make_record("alrs", 1e-4, seed, level=0.43) for seed in SEEDS))
    third = store(tmp_path / "third", make_record(task="cifar10"))
    runs = load_runs([first, tmp_path / "second", third])
    assert len(runs) == 6 + 3 + 1
    assert [run.origin for run in runs if (run.task, run.learning_rate) == ("sst2", 1e-4)] == [0, 0, 0, 1, 1, 1]
    content = build_report([first, tmp_path / "second", third], tmp_path / "merged")
    assert list(content["tasks"]) == ["cifar10", "sst2"]
    assert (tmp_path / "merged" / "plots" / "2-sst2-rates.svg").exists()


def test_folders_that_share_runs_are_one_comparison(tmp_path):
    shared = [make_record("linear", 1e-3, seed) for seed in SEEDS]
    ours = [make_record("alrs", 1e-3, seed) for seed in SEEDS]
    again = copy.deepcopy(ours[0])  # made by both
    again["timing"]["total_seconds"] += 1.0
    first = store(tmp_path / "first", *shared, *ours)
    second = store(tmp_path / "second", *shared, again, *(make_record("step", 1e-3, seed) for seed in SEEDS))
    summary = summarize(runs := load_runs([first, second]))
    rows = {row["other"]: row for row in summary["tasks"]["sst2"]["comparisons"]["tuned"]}
    assert {name: row["num_pairs"] for name, row in rows.items()} == {"linear": len(SEEDS), "step": len(SEEDS)}
    assert sum(run.comparison for run in runs) == 1  # the one made anew stays apart
    assert {run.origin for run in runs if run.scheduler == "step"} == {1}


def test_a_run_that_failed_before_its_training_has_the_budget_of_its_comparison(tmp_path):
    lost = make_record("linear", 1e-3, 0, status="failed")
    lost.update(num_training_steps=1, steps_per_epoch=1, evaluations=[], benchmark_results=None)
    lost["history"] = {name: None if name == "phase" else [] for name in lost["history"]}
    short = [make_record("linear", 1e-4, seed) for seed in SEEDS]
    for record in short:
        record["num_training_steps"] = 20
    one = [lost, make_record("linear", 1e-3, 1), *(make_record("alrs", 1e-3, seed) for seed in SEEDS)]
    folders = [store(tmp_path / "one", *one), store(tmp_path / "two", *short)]
    summary = summarize(load_runs(folders[:1]))
    assert not [check for check in summary["plan"]["checks"] if "training steps" in check]
    assert summary["plan"]["tasks"][0]["budgets"] == [(NUM_STEPS, 40)]
    tables = build_leaderboard(load_runs(folders), ["one", "two"])["tasks"]
    assert list(tables) == ["sst2, 20 steps", f"sst2, {NUM_STEPS} steps"]
    assert [(row["scheduler"], row["num_failed"]) for row in tables["sst2, 20 steps"]] == [("linear", 0)]
    found = {row["scheduler"]: row["num_failed"] for row in tables[f"sst2, {NUM_STEPS} steps"]}
    assert found == {"alrs": 0, "linear": 1}
    alone = build_leaderboard(load_runs([store(tmp_path / "alone", lost)]), ["alone"])["tasks"]
    assert [row["num_failed"] for row in alone["sst2"]] == [1]


def test_a_seed_that_fails_everywhere_leaves_the_middle_half(tmp_path):
    records = [
        make_record(scheduler, 1e-3, seed, task, level=level)
        for task in ("one", "two")
        for scheduler, level in {"alrs": 0.2, "linear": 0.3}.items()
        for seed in range(5)
    ]
    for record in records:
        if record["spec"]["task"] == "two" and record["spec"]["seed"] == 4:
            record.update(status="diverged", results=None)
    rows = summary_of(tmp_path, *records)["overall"]["interquartile_means"]
    found = {row["scheduler"]: row["tuned"]["iqm"] for row in rows if row["metric"] == "eval_loss"}
    assert 0 <= found["alrs"] < found["linear"] < 0.5


def test_all_schedulers_are_compared_on_the_same_seeds(tmp_path):
    """As in a comparison that was interrupted, whose tables name one number of seeds."""
    records = [
        make_record(scheduler, 1e-3, seed, level=0.2 + 0.1 * seed)
        for scheduler, seeds in {"alrs": range(4), "linear": range(3), "step": range(2)}.items()
        for seed in seeds
    ]
    overall = summary_of(tmp_path, *records)["overall"]
    assert overall["num_seeds"] == 2
    rows = [row for row in overall["interquartile_means"] if row["metric"] == "eval_loss"]
    assert [row["tuned"]["iqm"] for row in rows] == pytest.approx([0.255] * 3)


def test_means_over_tasks_are_of_the_way_left_to_the_best_cell(tmp_path):
    records = [
        make_record(scheduler, 1e-3, task=task, level=level)
        for task, levels in {"one": (0.2, 0.3), "two": (0.35, 0.3), "three": (0.2, 0.3)}.items()
        for scheduler, level in zip(("alrs", "linear"), levels, strict=True)
    ]
    for record in records[4:]:  # a task of other units: each final loss and score is as far from the untrained model
        record["benchmark_results"] = {"eval_loss": 0.2 + 0.4937 * 2, "eval_accuracy": 0.8 - 0.2989 * 2}
    rows = summary_of(tmp_path, *records)["overall"]["interquartile_means"]
    found = {(row["scheduler"], row["metric"]): row["tuned"]["iqm"] for row in rows}
    # The middle half of three numbers are all of them; the loss starts at 0.6937, the accuracy at 0.5011
    assert found["alrs", "eval_loss"] == pytest.approx((0 + 0.05 / 0.3937 + 0) / 3)
    assert found["linear", "eval_loss"] == pytest.approx((0.1 / 0.4937 + 0 + 0.1 / 0.4937 / 2) / 3)
    assert found["linear", "score"] == pytest.approx((0.1 / 0.2989 + 0 + 0.1 / 0.2989 / 2) / 3)


def test_unfinished_files_are_passed_over(tmp_path):
    store(tmp_path, make_record())
    (tmp_path / "other.json.tmp").write_text('{"schema_version": 1, "sp', encoding="utf-8")
    assert len(load_runs([tmp_path])) == 1


def _without_results(record):
    record["results"] = None


def _with_nan(record):
    record["evaluations"][0]["eval_loss"] = math.nan


BROKEN = {
    "another version": (lambda record: record.update(schema_version=2), "schema_version"),
    "no spec": (lambda record: record.pop("spec"), "'spec' is a required property"),
    "a rate of zero": (lambda record: record["spec"].update(learning_rate=0), "spec.learning_rate"),
    "completed without results": (_without_results, "results"),
    "epoch before training": (lambda record: record["benchmark_results"].update(epoch=0.0), "benchmark_results"),
    "lists of unequal length": (lambda record: record["history"]["loss"].pop(), "equally long"),
    "text deep in a history": (lambda record: record["history"]["loss"].__setitem__(50, "x"), "history.loss"),
    "no list": (lambda record: record["history"].update(loss={}), "history.loss"),
    "unknown phase": (lambda record: record["history"]["phase"].__setitem__(0, "rest"), "history.phase"),
    "a token that is no JSON": (_with_nan, "NaN is no strict JSON"),
}


@pytest.mark.parametrize("broken", BROKEN)
def test_broken_file_is_named(tmp_path, broken):
    change, told = BROKEN[broken]
    record = make_record()
    change(record)
    (tmp_path / "broken.json").write_text(json.dumps(record), encoding="utf-8")
    with pytest.raises(InputError) as error:
        build_report(tmp_path)
    assert "broken.json" in error.value.field and told in str(error.value)
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize("content", [b"", b'{"schema_version": 1, "spec": {"ta', b"[1, 2]", b"\xff\xfe\x00", b"null"])
def test_truncated_file_is_named(tmp_path, content):
    store(tmp_path, make_record())
    (tmp_path / "truncated.json").write_bytes(content)
    with pytest.raises(InputError, match=r"truncated\.json"):
        load_runs([tmp_path])


def test_two_outcomes_of_one_run_are_refused(tmp_path):
    store(tmp_path, make_record(), make_record(level=0.3))
    with pytest.raises(InputError, match=r"run-001\.json.*same run as run-000\.json"):
        load_runs([tmp_path])


def test_folders_without_runs_are_refused(tmp_path):
    with pytest.raises(InputError, match="at least one stored run"):
        build_report(tmp_path)
    with pytest.raises(InputError, match="is no folder"):
        build_report(tmp_path / "missing")


def test_published_schema_is_valid_and_as_strict_as_the_reader():
    schema = json.loads(SCHEMA_FILE.read_text(encoding="utf-8"))
    jsonschema.Draft202012Validator.check_schema(schema)
    validator = jsonschema.Draft202012Validator(schema)
    records = matrix()
    for record in records:
        validator.validate(record)
        validate_result(record, "run.json")
    spoiled = copy.deepcopy(records[0])
    spoiled["history"]["loss"][-1] = "x"
    assert not validator.is_valid(spoiled)
    with pytest.raises(InputError):
        validate_result(spoiled, "run.json")


# --- the page in a browser --------------------------------------------------------------------------------------------


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on PATH to open the page in")


@contextmanager
def listening_proxy():
    """A proxy that answers nothing and notes what it was asked for."""
    requests: list[str] = []
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve():
            while True:
                try:
                    connection, _ = server.accept()
                except OSError:
                    return
                with connection:
                    connection.settimeout(2)
                    requests.append(connection.recv(4096).decode("latin-1").partition("\r\n")[0])

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield f"127.0.0.1:{server.getsockname()[1]}", requests
        server.shutdown(socket.SHUT_RDWR)
    thread.join(timeout=5)


def open_page(page: Path, profile: Path) -> tuple[str, list[str], list[str]]:
    """Loads a page in a headless browser: the DOM after loading, console lines, and requests to other hosts."""
    with listening_proxy() as (address, requests):
        command = [
            CHROMIUM,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--disable-background-networking",
            "--disable-component-update",
            "--disable-sync",
            "--no-first-run",
            f"--proxy-server=http://{address}",
            "--proxy-bypass-list=<-loopback>",
            f"--user-data-dir={profile}",
            "--enable-logging=stderr",
            "--window-size=1200,900",
            "--dump-dom",
            page.as_uri(),
        ]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    return (
        done.stdout,
        console,
        [request for request in requests if "//page.test" in request or "page.test:" in request],
    )


@needs_browser
def test_page_shows_its_figures_without_console_errors_or_requests(report, tmp_path):
    page = report[0] / "report.html"
    dom, console, requests = open_page(page, tmp_path / "profile")
    assert len(re.findall("<figure", dom)) == len(list((report[0] / "plots").iterdir())) >= 14
    assert dom.count("<figcaption>") == dom.count('role="img"') == dom.count("<figure")
    assert console == [] and requests == []
    text = page.read_text(encoding="utf-8")
    addresses = re.findall(r'\b(?:src|href|srcset|data|action)="([^"]*)"', text)
    assert addresses and all(address.startswith(("#", "data:")) for address in addresses)
    assert "@import" not in text and not re.search(r"url\((?!#)", text)


@needs_browser
def test_browser_check_would_notice_errors_and_requests(tmp_path):
    page = tmp_path / "bad.html"
    page.write_text('<img src="http://page.test/x.png"><script>console.error("broken")</script>', encoding="utf-8")
    _, console, requests = open_page(page, tmp_path / "profile")
    assert any("broken" in line for line in console)
    assert any("page.test/x.png" in request for request in requests)


@needs_browser
@pytest.mark.parametrize("width", [360, 1200])
def test_page_fits_its_window(report, tmp_path, width):
    # A headless window is never as narrow as a phone; a frame is.
    probe = """
    onload = () => {
      const page = document.querySelector("iframe").contentDocument.documentElement;
      const figures = [...page.querySelectorAll("figure svg")].map(svg => svg.getBoundingClientRect());
      const captions = [...page.querySelectorAll("caption div")].map(div => div.getBoundingClientRect());
      document.title = JSON.stringify({
        width: page.scrollWidth,
        narrowest: Math.min(...figures.map(box => box.width)), rightmost: Math.max(...figures.map(box => box.right)),
        captions: Math.max(...captions.map(box => box.right)),
      });
    }"""
    page = tmp_path / "frame.html"
    content = escape((report[0] / "report.html").read_text(encoding="utf-8"))
    page.write_text(
        f'<iframe width="{width}" height="800" style="border:0" srcdoc="{content}"></iframe><script>{probe}</script>',
        encoding="utf-8",
    )
    dom, _, _ = open_page(page, tmp_path / "profile")
    found = json.loads(re.search(r"<title>(.*?)</title>", dom).group(1))
    assert found["width"] <= width
    assert found["narrowest"] >= 0.35 * width and found["rightmost"] <= width
    assert found["captions"] <= width


def test_cells_without_a_common_seed_are_told_as_such(tmp_path):
    mine = store(tmp_path / "mine", *[make_record("alrs", 1e-3, seed) for seed in SEEDS])
    theirs = store(tmp_path / "theirs", *[make_record("linear", 1e-3, seed) for seed in SEEDS])
    summary = summarize(load_runs([mine, theirs]))
    texts = " ".join(sentence["text"] for sentence in summary["conclusion"])
    assert "have no seed in common" in texts and "one seed" not in texts
    assert all(
        "in the comparisons that have it" in text for text in summary["plan"]["checks"] if "was not run" in text
    )


def test_no_choice_of_a_rate_is_told_of_where_none_was_made(tmp_path):
    records = [make_record("alrs", 1e-3, seed) for seed in SEEDS] + [
        make_record("linear", 1e-4, seed) for seed in SEEDS
    ]
    texts = summary_of(tmp_path / "one", *records)["analysis"]
    assert not any("moves least" in text or "best rate was chosen" in text for text in texts)
    records += [make_record("linear", 1e-3, seed) for seed in SEEDS]
    texts = summary_of(tmp_path / "two", *records)["analysis"]
    assert sum("moves least" in text or "best rate was chosen" in text for text in texts) == 2


def test_the_profile_is_drawn_from_the_tasks_of_its_table(tmp_path, monkeypatch):
    records = [make_record(name, 1e-3, seed) for name in ("alrs", "linear") for seed in SEEDS]
    single = [make_record(name, 1e-3, task="cifar10") for name in ("alrs", "linear", "step")]
    runs = load_runs([store(tmp_path / "runs", *records, *single)])
    summary, drawn = summarize(runs), []
    monkeypatch.setattr(plots, "_profile", lambda tasks, styles: drawn.append([task.name for task in tasks]))
    plots.draw_plots(group_by_task(runs), summary)
    assert drawn == [summary["overall"]["tasks"]] == [["sst2"]]
