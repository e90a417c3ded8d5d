"""Plans, the command that runs them, their reports, and what README says of these."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator
from test_report import make_record, store

from hf_alrs import cli, matrix
from hf_alrs.arguments import installed_tasks
from hf_alrs.comparison import read_comparison
from hf_alrs.config import InputError
from hf_alrs.evidence import Plan, build_evidence, find_plan, read_plan, update_readme
from hf_alrs.evidence.command import evidence_command
from hf_alrs.evidence.readme import PLOT_FILE
from tasks import RECIPES


ROOT = Path(__file__).parents[1]
PLANS = sorted((RECIPES.parent / "plans").glob("*.yaml"))
NAMES = {
    "report-1",
    "report-1-full",
    "report-2",
    "report-2-full",
    "arena",
    "arena-small",
    "arena-beta1",
    "arena-shorter",
    "ablation",
}
BASELINES = ("constant", "linear", "cosine")
TUNING_FREE = ("greedy", "prodigy", "schedule_free")

TINY: dict[str, Any] = {
    "title": "A tiny report",
    "idea": "The idea.\n\nIts second\nparagraph.",
    "reference": "alrs",
    "studies": {
        "tiny": {
            "title": "Tiny table",
            "recipe": "sample-tabular",
            "updated": "titanic-updated",
            "caption": "1 of 20 epochs.",
            "options": {"num_train_epochs": 1, "num_evaluations": 1},
            "grids": [
                {"schedulers": ["constant", "linear"], "learning_rates": [1e-3], "seeds": [0, 1]},
                {"schedulers": ["alrs"], "learning_rates": [1e-3, 1e-2], "seeds": [0, 1]},
            ],
        },
        "single": {
            "title": "One run",
            "recipe": "sample-tabular",
            "caption": "All rows.",
            "grids": [{"schedulers": ["alrs"], "learning_rates": [1e-3], "seeds": [0]}],
        },
    },
}


def write_plan(folder: Path, content: dict[str, Any] = TINY) -> Path:
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


def changed(**values: Any) -> dict[str, Any]:
    """The plan with other values in its first study."""
    content = json.loads(json.dumps(TINY))
    content["studies"]["tiny"] |= values
    return content


def store_all(plan: Plan, folder: Path) -> None:
    """Made-up rows for every cell of a plan."""
    for study in plan.studies.values():
        (folder / study.name).mkdir(parents=True)
        for spec in study.specs("tabular-sample"):
            # The others vary on their own: two equal differences would tell no interval
            level = 0.4 if spec.scheduler == "alrs" else 0.499 + 0.002 * spec.seed
            record = make_record(spec.scheduler, spec.learning_rate, spec.seed, spec.task, level)
            (folder / study.name / spec.file_name).write_text(json.dumps(record))
    plan.store(folder)


@pytest.fixture
def stored(tmp_path: Path) -> tuple[Plan, Path]:
    """The tiny plan with all its rows."""
    plan = read_plan(write_plan(tmp_path), [RECIPES])
    store_all(plan, tmp_path / "out")
    return plan, tmp_path / "out"


def run(plan: Plan, folder: Path, *options: str) -> None:
    evidence_command(["--plan", str(plan.path), "--output_dir", str(folder), *options])


@pytest.fixture
def no_runs(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a run was started")

    monkeypatch.setattr(matrix, "run_cell", refuse)
    yield


# --- plans ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", PLANS, ids=lambda path: path.stem)
def test_captions_say_what_is_held_out_and_how_schedule_free_runs(path: Path) -> None:
    for study in read_plan(path, [RECIPES]).studies.values():
        assert "for the controller" in study.caption
        batch_norm = study.recipe.stem in ("titanic", "cifar10-resnet18")
        runs = any(spec.scheduler == "schedule_free" for spec in study.specs("task"))
        assert ("batch-norm" in study.caption) == (batch_norm and runs)


@pytest.mark.parametrize("path", PLANS, ids=lambda path: path.stem)
def test_a_plan_parses_and_names_what_exists(path: Path) -> None:
    plan = read_plan(path, [RECIPES])
    for study in plan.studies.values():
        specs = study.specs("task")
        assert len(specs) == len({spec.file_name for spec in specs})
        judged = [spec.scheduler.startswith("alrs") for spec in specs]
        assert judged == sorted(judged), "baselines come first"
        # The options are such as a comparison takes.
        tasks = installed_tasks()
        values = yaml.safe_load(study.recipe.read_text())
        experiment, *_ = read_comparison(study.arguments(Path("out"), "sample"), tasks, values["task_name"])
        assert experiment.num_evaluations == study.options["num_evaluations"]
        compared = {spec.scheduler for spec in specs} - {"alrs", "alrs_64_64"}
        assert not compared or values["learning_rate"] in {spec.learning_rate for spec in specs}
        if compared and "1 of 3 seeds" not in study.caption:
            assert len({spec.seed for spec in specs}) >= (5 if values["task_name"] == "titanic" else 3)


def test_there_is_a_plan_for_both_reports_and_the_arena() -> None:
    assert {path.stem for path in PLANS} == NAMES
    assert find_plan("report-1", [RECIPES.parent / "plans"]) in PLANS
    with pytest.raises(InputError, match="report-2-full"):
        find_plan("report-3", [RECIPES.parent / "plans"])


def test_the_full_plans_leave_nothing_out() -> None:
    for path in PLANS:
        if path.stem.endswith("-full"):
            for study in read_plan(path, [RECIPES]).studies.values():
                assert not study.options.keys() & {"max_train_samples", "max_eval_samples", "num_train_epochs"}


def test_the_arena_has_every_task_scheduler_and_rate() -> None:
    plan = read_plan(find_plan("arena", [RECIPES.parent / "plans"]), [RECIPES])
    assert len(plan.studies) == 5
    for study in plan.studies.values():
        specs = study.specs("task")
        for name in ("alrs", *BASELINES, "warmup_stable_decay"):
            rates = sorted({spec.learning_rate for spec in specs if spec.scheduler == name})
            assert len(rates) == 5 and rates[-1] >= 1e3 * rates[0]
        recipe_rate = yaml.safe_load(study.recipe.read_text())["learning_rate"]
        assert all(
            recipe_rate in {s.learning_rate for s in specs if s.scheduler == name} for name in ("alrs", "linear")
        )
        assert {spec.scheduler for spec in specs} >= {"step", "exponential", "reduce_lr_on_plateau", *TUNING_FREE}


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ([], "mapping"),
        (TINY | {"sutdies": {}}, "sutdies"),
        (TINY | {"idea": ""}, "idea"),
        (TINY | {"idea": ["one", "two"]}, "idea: must be text"),
        (TINY | {"studies": [1]}, "mapping"),
        (TINY | {"reference": "arls"}, "arls"),
        (changed(recipe="cifar11"), "no recipe"),
        (changed(updated="cifar11"), "no recipe"),
        (changed(caption=None), "caption"),
        (changed(options=[1]), "mapping"),
        (changed(grids={}), "grids"),
        (changed(pretrained=True), "name of the recipe's model"),
        (changed(grids=[{"schedulers": ["lienar"], "learning_rates": [1e-3], "seeds": [0]}]), "lienar"),
        (changed(grids=[{"schedulers": ["linear"], "learning_rates": ["1e-3"], "seeds": [0]}]), "1.0e-3"),
        (changed(grids=[{"schedulers": ["linear"], "learning_rates": [1e-3], "seeds": [0.5]}]), "whole"),
        (changed(grids=[{"schedulers": ["linear"], "learning_rates": [1e-3], "seeds": [-1]}]), "from 0 to"),
        (changed(grids=[{"schedulers": ["linear"], "learning_rates": [1e-3], "seeds": [True]}]), "whole"),
        (changed(grids=[{"schedulers": ["linear"], "learning_rates": [1e-3], "seeds": 3}]), "lists"),
    ],
)
def test_a_bad_plan_is_refused(tmp_path: Path, content: Any, told: str) -> None:
    with pytest.raises(InputError, match=told):
        read_plan(write_plan(tmp_path, content), [RECIPES])


@pytest.mark.parametrize("missing", ["task_name", "learning_rate"])
def test_a_plans_own_recipe_says_what_its_page_tells(tmp_path: Path, missing: str) -> None:
    recipe = {"task_name": "titanic", "learning_rate": 1e-3, "num_train_epochs": 1}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump({key: recipe[key] for key in recipe if key != missing}))
    with pytest.raises(InputError, match=f"mine.yaml has no {missing}"):
        read_plan(write_plan(tmp_path, changed(recipe="mine")), [RECIPES])


def test_a_plans_options_may_be_lists(tmp_path: Path) -> None:
    plan = read_plan(write_plan(tmp_path, changed(options={"hidden_sizes": [64, 64]})), [RECIPES])
    arguments = plan.studies["tiny"].arguments(tmp_path)
    assert arguments[arguments.index("--hidden_sizes") :][:3] == ["--hidden_sizes", "64", "64"]


def test_filters(stored: tuple[Plan, Path]) -> None:
    plan, _ = stored
    study = plan.studies["tiny"]
    assert len(study.specs("task")) == 8
    assert {spec.scheduler for spec in study.specs("task", ["linear"])} == {"linear"}
    assert [study.name for study in plan.select(["single"])] == ["single"]
    assert [study.name for study in plan.select(None, ["single", "of another plan"])] == ["tiny"]
    with pytest.raises(InputError, match="studies"):
        plan.select(["tinny"])
    with pytest.raises(InputError, match="schedulers"):
        plan.check_schedulers(["cosine"])


# --- the command ------------------------------------------------------------------------------------------------------


def test_a_finished_plan_runs_nothing(stored: tuple[Plan, Path], no_runs: None) -> None:
    plan, folder = stored
    run(plan, folder)
    assert (folder / "report.html").exists()


def test_rows_of_other_options_are_not_mixed(stored: tuple[Plan, Path], no_runs: None, tmp_path: Path) -> None:
    _, folder = stored
    options = {"num_train_epochs": 2, "num_evaluations": 1}
    other = read_plan(write_plan(tmp_path, changed(options=options)), [RECIPES])
    with pytest.raises(InputError, match="other options"):
        run(other, folder)
    # More runs and other words are no other settings.
    run(read_plan(write_plan(tmp_path, changed(caption="Other words.")), [RECIPES]), folder)
    assert "Other words." in (folder / "plan.yaml").read_text()


def test_rows_of_other_data_are_not_mixed(stored: tuple[Plan, Path], no_runs: None) -> None:
    plan, folder = stored
    rows = sorted((folder / "tiny").glob("*.json"))
    for path in rows:
        record = json.loads(path.read_text())
        record["config"]["data"] = {"dataset_name": "/elsewhere/table.csv", "model_name_or_path": None}
        path.write_text(json.dumps(record))
    run(plan, folder)  # nothing is run, so nothing is mixed
    rows[-1].unlink()
    with pytest.raises(InputError, match="tiny have dataset_name '/elsewhere/table"):
        run(plan, folder)
    run(plan, folder, "--skip_studies", "tiny")
    run(plan, folder, "--report_only")
    for option in ("--studies", "--skip_studies"):
        with pytest.raises(InputError, match="report_only"):
            run(plan, folder, "--report_only", option, "tiny")


def test_data_by_another_spelling_of_its_path_are_the_same(stored: tuple[Plan, Path], tmp_path: Path) -> None:
    plan, folder = stored
    record = json.loads((path := sorted((folder / "tiny").glob("*.json"))[0]).read_text())
    record["config"]["data"] = {"dataset_name": str(tmp_path / "data" / ".." / "data" / "sst2")}
    path.write_text(json.dumps(record))
    plan.check_rows(folder, {"tiny": {"dataset_name": str(tmp_path / "data" / "sst2"), "model_name_or_path": None}})
    with pytest.raises(InputError, match="sst2"):
        plan.check_rows(folder, {"tiny": {"dataset_name": str(tmp_path / "sst2"), "model_name_or_path": None}})


def test_options_that_would_start_what_was_not_meant(stored: tuple[Plan, Path], no_runs: None) -> None:
    plan, folder = stored
    with pytest.raises(InputError, match="update_readme"):
        run(plan, folder, "--check")
    for launcher in ("no-such-program launch", "'", " "):
        with pytest.raises(InputError, match="launcher"):
            run(plan, folder, "--launcher", launcher)


def test_what_cannot_be_had_is_said_before_any_work(tmp_path: Path, no_runs: None) -> None:
    plan = read_plan(find_plan("report-1", [RECIPES.parent / "plans"]), [RECIPES])
    folder = tmp_path / "out"
    with pytest.raises(InputError, match="data_dir") as error:
        run(plan, folder, "--data_dir", str(tmp_path / "nothing"))
    assert "titanic" in str(error.value)
    with pytest.raises(InputError, match="study titanic"):  # the Hub has none
        run(plan, folder, "--studies", "titanic")
    with pytest.raises(InputError, match="model_name_or_path"):
        table = tmp_path / "data" / "sst2"
        table.mkdir(parents=True)
        (table / "train.csv").write_text("sentence,label\ngood,1\nbad,0\n")
        second = read_plan(find_plan("report-2", [RECIPES.parent / "plans"]), [RECIPES])
        options = ("--data_dir", str(tmp_path / "data"), "--model_name_or_path", str(tmp_path / "none"))
        run(second, folder, "--studies", "sst2", *options)
    assert not folder.exists()


def test_end_to_end_on_the_built_in_sample(tmp_path: Path) -> None:
    options = {"num_train_epochs": 1, "num_evaluations": 1, "subset_eval_samples": 50}
    content = changed(options=options, grids=TINY["studies"]["tiny"]["grids"][:1])
    content["studies"].pop("single")
    plan, folder = read_plan(write_plan(tmp_path, content), [RECIPES]), tmp_path / "out"
    run(plan, folder, "--schedulers", "linear")
    rows = sorted((folder / "tiny").glob("*.json"))
    assert len(rows) == 2 and "2 of 4" in (folder / "report.md").read_text()
    before = rows[0].read_bytes()
    rows[1].unlink()
    run(plan, folder)
    assert len(list((folder / "tiny").glob("*.json"))) == 4
    assert rows[0].read_bytes() == before
    record = json.loads(before)
    for scores in (record["results"], record["benchmark_results"]):
        assert {"eval_loss", "eval_accuracy", "eval_subset_loss", "eval_subset_accuracy"} <= scores.keys()
    assert record["results"]["eval_subset_loss"] != record["results"]["eval_loss"]


# --- the report -------------------------------------------------------------------------------------------------------


def test_the_report_has_the_sections_of_the_reports(stored: tuple[Plan, Path]) -> None:
    plan, folder = stored
    content = build_evidence(plan, folder)
    assert set(content["tasks"]) == {"tiny", "single"} and content["tasks"]["tiny"]["reference"] == "alrs"
    assert content["shown_runs"]["tiny"]["learning_rate"] == 1e-3  # that of the recipe, not the best
    assert content == json.loads((folder / "results.json").read_text())
    schema = json.loads((ROOT / "results" / "schema.json").read_text())
    Draft202012Validator(schema).validate(content)
    text, page = (folder / "report.md").read_text(), (folder / "report.html").read_text()
    titles = ("Idea", "Plan", "Results", "Benchmark Results", "Analysis", "Conclusion", "What changed in the code")
    places = [text.index(f"\n## {title}\n") for title in titles]
    assert places == sorted(places) and text.startswith("# A tiny report\n")
    assert all(f"<h2>{title}</h2>" in page for title in titles)
    assert "Its second paragraph." in text and "8 of 8" in text
    # Every table of the study says its size.
    assert text.count("1 of 20 epochs.") >= 5
    assert "| learning\\_rate | 0.001 | 0.0005 |" in text
    assert "hf-alrs compare --config tasks/recipes/sample-tabular.yaml --num_train_epochs 1" in text
    assert str(ROOT) not in text + page


def test_a_report_without_a_plan_has_no_such_sections(tmp_path: Path) -> None:
    store(tmp_path / "runs", make_record())
    cli._command_report([str(tmp_path / "runs")])
    text = (tmp_path / "runs" / "report.md").read_text()
    assert "## Idea" not in text and text.index("## Results") < text.index("## Plan")


def test_a_folder_without_rows(tmp_path: Path) -> None:
    plan = read_plan(write_plan(tmp_path), [RECIPES])
    with pytest.raises(InputError, match="no run"):
        build_evidence(plan, tmp_path / "out")


def test_the_report_names_the_model_that_was_given(tmp_path: Path) -> None:
    plan = read_plan(write_plan(tmp_path, changed(pretrained="BERT base")), [RECIPES])
    store_all(plan, tmp_path / "out")
    content = build_evidence(plan, tmp_path / "out")["evidence"]["studies"]
    assert content["tiny"]["caption"] == "1 of 20 epochs. The model is tiny-bert, given in place of BERT base."
    assert content["single"]["caption"] == "All rows."
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"num_hidden_layers": 6, "hidden_size": 384}')
    for path in (tmp_path / "out" / "tiny").glob("*.json"):
        record = json.loads(path.read_text())
        record["config"] |= {"data": {"model_name_or_path": str(tmp_path / "model")}, "model": "BertForSomething"}
        path.write_text(json.dumps(record))
    caption = build_evidence(plan, tmp_path / "out")["evidence"]["studies"]["tiny"]["caption"]
    assert "model (BertForSomething, 6 layers of width 384), given in place of BERT base." in caption


# --- README -----------------------------------------------------------------------------------------------------------


def test_readme_follows_the_results() -> None:
    drifted = update_readme(ROOT, check=True)
    assert not drifted, f"{drifted} differ from the results: run `hf-alrs evidence --update_readme`"


@pytest.mark.slow
@pytest.mark.parametrize("path", sorted(ROOT.glob("results/*/plan.yaml")), ids=lambda path: path.parent.name)
def test_a_stored_report_follows_its_rows(path: Path, tmp_path: Path) -> None:
    folder = tmp_path / path.parent.name
    shutil.copytree(path.parent, folder, ignore=shutil.ignore_patterns("plots", "report.*"))
    stored = json.loads((folder / "results.json").read_text())
    built = build_evidence(read_plan(folder / "plan.yaml", [RECIPES]), folder)
    assert built["tasks"].keys() == stored["tasks"].keys()
    for name, task in built["tasks"].items():
        assert [(c["scheduler"], c["learning_rate"], c["final"]) for c in task["cells"]] == [
            (c["scheduler"], c["learning_rate"], c["final"]) for c in stored["tasks"][name]["cells"]
        ]


@pytest.fixture
def repository(stored: tuple[Plan, Path], tmp_path: Path) -> Path:
    """A folder with a report, and pages that it is told in."""
    plan, folder = stored
    root = tmp_path / "repository"
    shutil.copytree(folder, root / "results" / "report")
    build_evidence(plan, root / "results" / "report")
    for path in (root / "README.md", root / "results" / "README.md"):
        shutil.copy(ROOT / path.relative_to(root), path)
    return root


def test_readme_is_written_and_drift_is_found(repository: Path) -> None:
    readme, verdicts, plot = (repository / name for name in ("README.md", "results/README.md", f"results/{PLOT_FILE}"))
    assert set(update_readme(repository, check=True)) == {readme, verdicts, plot}
    update_readme(repository)
    assert update_readme(repository, check=True) == []
    text = readme.read_text()
    assert "| alrs | 0.595 ± 0.007 |" in text and f"(results/{PLOT_FILE})" in text
    assert "- One run, alrs from 1e-3: accuracy 0.600 and loss 0.400" in text
    told = verdicts.read_text()
    assert "in final loss it beats 2 of 2 baselines, equals 0 and loses to 0." in told
    assert "the best of 2 rates, against others from the best of theirs (of the baselines 2 had 1 rate): in" in told
    assert "| linear | 1e-3, best of 1 rate | 2 |" in told
    assert plot.stat().st_size < 100_000
    readme.write_text(text.replace("0.595 ± 0.007", "0.695 ± 0.007"))
    assert update_readme(repository, check=True) == [readme]
    with pytest.raises(SystemExit) as ended:
        evidence_command(["--update_readme", "--check", "--root", str(repository)])
    assert ended.value.code == 1
    update_readme(repository)
    assert readme.read_text() == text
    plot.write_text(plot.read_text().replace("<!-- data: ", "<!-- data: 0"))
    assert update_readme(repository, check=True) == [plot]


def test_an_ablation_has_tables_of_its_own_and_the_arena_is_told_in_short(repository: Path, tmp_path: Path) -> None:
    shutil.copytree(repository / "results" / "report", repository / "results" / "arena")
    parts = {"schedulers": ["alrs", "alrs_no_average"], "learning_rates": [1e-3, 1e-2], "seeds": [0, 1]}
    content = changed(grids=[parts])
    del content["studies"]["single"], content["studies"]["tiny"]["updated"]
    content["studies"]["tiny"]["title"] = "Parts"
    plan = read_plan(write_plan(tmp_path, content), [RECIPES])
    store_all(plan, repository / "results" / "ablation")
    build_evidence(plan, repository / "results" / "ablation")
    update_readme(repository)
    lines = (repository / "README.md").read_text().splitlines()
    assert "| scheduler | Tiny table |" in lines, "and not the arena's beside it"
    # Half-way from 0.605 at step 60 to 0.405 at step 80
    assert "| Tiny table | 0.405 | 0.505 (constant from 1e-3) | from 0 of 2 | 1.14 | 1.14 |" in lines
    assert "| scheduler | Parts |" in lines
    assert sum(line.startswith("| alrs_no_average |") for line in lines) == 1
    told = (repository / "results" / "README.md").read_text()
    assert told.count("#### Tiny table") == 2
    assert "alrs against itself, changed, from the same rates. 1 of 20 epochs." in told
    for rate in ("1e-3", "1e-2"):
        assert re.search(rf"\| alrs_no_average \| {rate} \| 2 \| 0\.100 \[.*\] \| (beats|equals) \|", told)


def test_one_seed_allows_no_verdict(repository: Path, tmp_path: Path) -> None:
    content = changed(grids=[{"schedulers": ["alrs", "constant"], "learning_rates": [1e-3], "seeds": [0]}])
    del content["studies"]["single"], content["studies"]["tiny"]["updated"]
    plan = read_plan(write_plan(tmp_path, content), [RECIPES])
    folder = repository / "results" / "report"
    shutil.rmtree(folder)
    store_all(plan, folder)
    build_evidence(plan, folder)
    update_readme(repository)
    told = (repository / "results" / "README.md").read_text()
    assert "from the same: in final loss one seed allows no verdict." in told
    assert "equals" not in told.split("#### Tiny table")[1].split("<!-- generated")[0]


def test_several_seeds_of_one_scheduler_are_told_by_their_mean(repository: Path, tmp_path: Path) -> None:
    content = changed(grids=[{"schedulers": ["alrs"], "learning_rates": [1e-3], "seeds": [0, 1]}])
    del content["studies"]["single"], content["studies"]["tiny"]["updated"]
    plan = read_plan(write_plan(tmp_path, content), [RECIPES])
    folder = repository / "results" / "report"
    shutil.rmtree(folder)
    store_all(plan, folder)
    build_evidence(plan, folder)
    update_readme(repository)
    for path in (repository / "README.md", repository / "results" / "README.md"):
        assert (
            "Tiny table, alrs from 1e-3, 2 seeds: accuracy 0.595 ± 0.007 and loss 0.405 ± 0.007. 1 of 20 epochs."
        ) in path.read_text()


def test_a_readme_without_marks_is_refused(repository: Path) -> None:
    (repository / "README.md").write_text("# Nothing\n")
    with pytest.raises(InputError, match="no place"):
        update_readme(repository)
