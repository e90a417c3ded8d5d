"""Files from outside: read without running code, refused by name when they are wrong, and never written past."""

from __future__ import annotations

import ast
import copy
import json
import os
import pickle
import shutil
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from conftest import scratch_network, tiny_classifier, tiny_dataset
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from test_report import make_record, store
from transformers import Trainer, TrainingArguments

from hf_alrs import ALRSCallback, ALRSConfig, ALRSTrainer, InputError
from hf_alrs.arguments import read_recipe
from hf_alrs.callback import HISTORY_NAME, _keep_history
from hf_alrs.experiment import DataArguments
from hf_alrs.matrix import Experiment, RunSpec, run_matrix
from hf_alrs.meta_training.bank import Group, load_group, save_group
from hf_alrs.meta_training.command import read_config
from hf_alrs.meta_training.spec import sample_spec
from hf_alrs.network import WEIGHTS_DIR, load_network
from hf_alrs.report import build_report, load_runs, read_result
from tasks import TASKS
from tasks.tabular import TabularProcessor


ROOT = Path(__file__).parents[1]


class Payload:
    """Leaves a mark when it is unpickled the way `pickle.load` does it."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.mark),)


@pytest.fixture
def mark(tmp_path: Path) -> Any:
    path = tmp_path / "code was run"
    yield path
    assert not path.exists()


def refused(load: Callable[[], Any], *told: str) -> InputError:
    """What `load` is refused with; the message names all of `told`."""
    with pytest.raises(InputError) as caught:
        load()
    for text in told:
        assert text in str(caught.value), f"{text!r} is not named in: {caught.value}"
    return caught.value


# Nothing is read with pickle

# What may stand in the place of each: `torch.load(weights_only=True)`, `yaml.safe_load`
FORBIDDEN = {"pickle", "cPickle", "dill", "joblib", "shelve", "marshal", "cloudpickle"}


def unsafe_calls(source: str) -> list[str]:
    """Reads that may run code: pickle and its kin, `torch.load` and `yaml.load` without care, `eval`."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name.split(".")[0] in FORBIDDEN]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in FORBIDDEN:
            found.append(node.module)
        elif isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            unsafe = name in ("eval", "exec", "yaml.load", "yaml.unsafe_load", "yaml.full_load", "pandas.read_pickle")
            unsafe |= name == "torch.load" and keywords.get("weights_only") != "True"
            unsafe |= "True" in (keywords.get("allow_pickle"), keywords.get("trust_remote_code"))
            found += [name] * unsafe
    return found


def test_no_module_reads_in_a_way_that_can_run_code() -> None:
    files = [path for folder in ("hf_alrs", "tasks") for path in (ROOT / folder).rglob("*.py")] + [*ROOT.glob("*.py")]
    assert len(files) > 30
    found = {path.relative_to(ROOT).as_posix(): unsafe_calls(path.read_text()) for path in files}
    # A matrix hands a cell to processes of its own through a folder that it has just made for itself alone.
    assert found.pop("hf_alrs/matrix.py") in ([], ["pickle"])
    assert {name: calls for name, calls in found.items() if calls} == {}


def test_the_search_finds_what_it_is_for() -> None:
    source = "import pickle\ntorch.load(p)\nyaml.load(x)\neval(x)\nnp.load(p, allow_pickle=True)\n"
    assert len(unsafe_calls(source)) == 5
    assert unsafe_calls("torch.load(p, weights_only=True)\nyaml.safe_load(x)") == []


# Results

BAD_RESULTS: dict[str, bytes] = {
    "empty": b"",
    "zeros": bytes(64),
    "no text": b"\xff\xfe\x00\x01",
    "a pickle": pickle.dumps({"schema_version": 1}),
    "deep": b"[" * 100_000,
    "a number": b"1",
    "a list": b"[1, 2]",
    "a history that is a number": b'{"history": 3}',
    "a history that is a list": b'{"history": [1]}',
    "a history that is text": b'{"history": "abc"}',
    "digits without end": b"9" * 5000,
}


@pytest.mark.parametrize("name", list(BAD_RESULTS))
def test_a_bad_result_is_named(name: str, tmp_path: Path) -> None:
    (tmp_path / "bad.json").write_bytes(BAD_RESULTS[name])
    refused(lambda: load_runs([tmp_path]), "bad.json")


def with_text(text: str) -> bytes:
    """A whole record in which `"TEXT"` is replaced as written."""
    record = make_record()
    record["source"] = "TEXT"
    return json.dumps(record).replace('"TEXT"', text).encode()


def changed(place: str, value: Any) -> bytes:
    record = make_record()
    *parents, last = place.split(".")
    inner = record
    for key in parents:
        inner = inner[key]
    inner[last] = value
    return json.dumps(record).encode()


BAD_VALUES: dict[str, bytes] = {
    "half a surrogate pair": with_text(r'"\ud800"'),
    "an infinite number": changed("spec.learning_rate", 1e-3).replace(b"0.001", b"1e999", 1),
    "a rate that no float holds": changed("spec.learning_rate", 10**400),
    "a seed that no integer holds": changed("spec.seed", 10**30),
    "a name over two lines": changed("spec.task", "sst2\n# heading"),
    "a name that turns text around": changed("spec.scheduler", "alrs\u202e"),
    "a name with a zero": changed("spec.scheduler", "alrs\x00"),
}


@pytest.mark.parametrize("name", list(BAD_VALUES))
def test_a_bad_value_of_a_result_is_named(name: str, tmp_path: Path) -> None:
    (tmp_path / "bad.json").write_bytes(BAD_VALUES[name])
    refused(lambda: load_runs([tmp_path]), "bad.json")


def test_a_result_cut_anywhere_is_named(tmp_path: Path) -> None:
    whole = json.dumps(make_record()).encode()
    for share in (0.01, 0.3, 0.7, 0.99):
        (tmp_path / "cut.json").write_bytes(whole[: int(share * len(whole))])
        refused(lambda: load_runs([tmp_path]), "cut.json")


def test_what_is_no_file_is_not_waited_for(tmp_path: Path) -> None:
    (tmp_path / "a folder.json").mkdir()
    refused(lambda: load_runs([tmp_path]), "a folder.json", "no file")
    (tmp_path / "a folder.json").rmdir()
    os.mkfifo(tmp_path / "pipe.json")
    refused(lambda: load_runs([tmp_path]), "pipe.json", "no file")


def test_an_oversized_result_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store(tmp_path, make_record())
    monkeypatch.setattr("hf_alrs.report.runs.MAX_RESULT_BYTES", 1000)
    refused(lambda: load_runs([tmp_path]), "run-000.json", "1000")


@pytest.mark.parametrize("content", [b"", b'{"status": "comple', b"[]", b"{}"])
def test_a_comparison_names_the_stored_run_that_is_broken(content: bytes, tmp_path: Path) -> None:
    spec = RunSpec("titanic", "linear", 1e-3, 0)
    (tmp_path / spec.file_name).write_bytes(content)
    experiment = Experiment(TASKS["titanic"], DataArguments(), {}, ALRSConfig())
    refused(lambda: run_matrix(experiment, [spec], tmp_path), spec.file_name)


# Paths

OUTSIDE = [
    "../../outside",
    "/tmp/outside",
    "..",
    "a/b",
    "a\\b",
    "x" * 5000,
    "CON",
    ".",
    "-rf",
    "~/x",
    "$HOME",
    "a%2fb",
]


@pytest.mark.parametrize("name", OUTSIDE)
def test_a_name_of_a_run_stays_in_the_folder_of_results(name: str) -> None:
    file_name = RunSpec(name, name, 1e-3, 0).file_name
    assert Path(file_name).name == file_name
    assert RunSpec("sst2", "alrs", 1e-3, 0).file_name == "sst2--alrs--lr0.001--seed0.json"
    assert RunSpec("a/b", "x", 1.0, 0).file_name != RunSpec("a%2Fb", "x", 1.0, 0).file_name


@pytest.mark.parametrize("name", ["../../outside/x", "x" * 3000])
def test_names_in_results_stay_in_the_folder_of_the_report(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "results"
    records = [make_record(f"alrs {name}", rate, 0, name, level=0.4) for rate in (1e-4, 1e-3)]
    records += [make_record("linear", 1e-3, 0, name)]
    for record in records:
        record["higher_is_better_metric"] = "eval_.._" + "a" * 300
        for scores in (*record["evaluations"], record["results"], record["benchmark_results"]):
            scores[record["higher_is_better_metric"]] = 0.5
    store(folder, *records)
    before = {path for path in tmp_path.rglob("*") if folder not in path.parents}
    build_report(folder)
    assert {path for path in tmp_path.rglob("*") if folder not in path.parents} == before
    written = {path.relative_to(folder) for path in folder.rglob("*") if path.is_file() and "run-" not in path.name}
    assert {path.parent for path in written} == {Path("."), Path("plots")}
    text = (folder / "report.md").read_text(encoding="utf-8")
    figures = [path.name for path in (folder / "plots").iterdir()]
    assert len(figures) > 10 and all(f"(plots/{figure})" in text for figure in figures), "no figure overwrote another"


def test_links_among_results_are_not_written_through(tmp_path: Path) -> None:
    """An archive of results may hold links: what they lead to is left alone."""
    other = tmp_path / "other"
    other.mkdir()
    (other / "precious.svg").write_text("mine")
    (other / "precious.txt").write_text("mine")
    folder = store(tmp_path / "results", make_record())
    (folder / "report.html").symlink_to(other / "precious.txt")
    (folder / "report.md.tmp").symlink_to(other / "precious.txt")
    build_report(folder)
    assert (other / "precious.txt").read_text() == "mine"
    assert not (folder / "report.html").is_symlink()
    shutil.rmtree(folder / "plots")
    (folder / "plots").symlink_to(other)
    refused(lambda: build_report(folder), "plots")
    assert [path.name for path in sorted(other.iterdir())] == ["precious.svg", "precious.txt"]


# The page

SCRIPT = "</title></svg>\"'><script>alert(1)</script><img src=x onerror=alert(1)>"


class Found(HTMLParser):
    """The tags of a page and the names of their attributes, as a browser would see them."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}


def hostile(value: Any, key: str = "") -> Any:
    """Every text of a record with a script in it, where the schema leaves the text free."""
    if isinstance(value, dict):
        fixed = ("status", "phase", "higher_is_better_metric", "schema_version")
        renamed = key in ("versions", "splits", "config", "training", "data")
        return {
            (f"{name}{SCRIPT}" if renamed and name not in ("train", "controller", "eval") else name): (
                item if name in fixed else hostile(item, name)
            )
            for name, item in value.items()
        }
    if isinstance(value, list):
        return [hostile(item) for item in value]
    return f"{value}{SCRIPT}" if isinstance(value, str) else value


@pytest.mark.reliability("HTML report escapes every name, error and note of hostile results")
def test_the_report_escapes_all_that_it_shows(tmp_path: Path) -> None:
    records = []
    for scheduler in ("alrs", "linear", "step"):
        for rate in (1e-4, 1e-3):
            for seed in (0, 1):
                status = "failed" if (scheduler, seed) == ("step", 1) else "completed"
                record = make_record(scheduler, rate, seed, status=status)
                record["config"]["model_name_or_path"] = "tiny"
                record["config"]["data"]["model_name_or_path"] = f"model{SCRIPT}"
                record["splits"]["extra"] = 1
                records.append(hostile(copy.deepcopy(record)))
    # Runs that cannot be compared make notes
    records[0]["source"] = f"other{SCRIPT}"
    records[0]["initial_state_hash"] = f"other{SCRIPT}"
    folder = store(tmp_path, *records)
    build_report(folder)
    for path in (folder / "report.html", folder / "report.md", *(folder / "plots").iterdir()):
        text = path.read_text(encoding="utf-8")
        assert "<script" not in text and "<img" not in text, path.name
        found = Found()
        found.feed(text)
        assert not found.tags & {"script", "img", "iframe", "object"}, path.name
        assert not [name for name in found.attributes if name.startswith("on")], path.name
        if path.suffix == ".svg":
            ElementTree.fromstring(text)  # whole, whatever the names are
    page = (folder / "report.html").read_text(encoding="utf-8")
    for shown in ("sst2", "alrs", "linear", "cpu", "Linux", "torch", "the loss was not finite", "other", "extra"):
        assert f"{shown}&lt;/title&gt;" in page or f"{shown}&lt;" in page or shown in page
    assert page.count("&lt;script&gt;") > 50
    assert page.count("</title>") == 1


# Recipes and configurations

BAD_YAML: dict[str, bytes] = {
    "empty": b"",
    "a list": b"- 1\n",
    "a tag that calls": b"!!python/object/apply:os.mkdir ['code was run']\n",
    "an unhashable key": b"{[1]: 2}\n",
    "no text": b"\xff\xfe\x90",
    "deep": b"[" * 20_000,
    "a date that does not exist": b"output_dir: 2001-99-99\n",
    "a pickle": pickle.dumps({"output_dir": "x"}),
    "aliases that multiply": b"a: &a [x, x]\nb: &b [*a, *a]\noutput_dir: *b\n",
    "oversized": b"# " + b"x" * 2**21 + b"\n",
}


@pytest.mark.parametrize("name", list(BAD_YAML))
def test_a_bad_configuration_of_the_meta_training_is_named(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse_yaml(read_config, name, tmp_path, monkeypatch)


@pytest.mark.parametrize(
    "name",
    BAD_YAML,
)
def test_a_bad_recipe_is_named(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse_yaml(read_recipe, name, tmp_path, monkeypatch)


def refuse_yaml(reader: Callable[[Path], Any], name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "bad.yaml"
    path.write_bytes(BAD_YAML[name])
    refused(lambda: reader(path), "bad.yaml")
    assert not (tmp_path / "code was run").exists()


@pytest.mark.parametrize(
    "line", ["num_tasks: abc", "learning_rate: x", "learning_rate: .nan", "hidden_sizes: 3", "hidden_sizes: [[a]]"]
)
def test_a_value_of_the_wrong_kind_is_named(line: str, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(f"output_dir: x\n{line}\n")
    refused(lambda: read_config(path), line.split(":")[0])


# Network weights


def network_with(folder: Path, change: Callable[[Path], None]) -> Path:
    shutil.copytree(WEIGHTS_DIR / "64-32", folder)
    change(folder)
    return folder


def in_config(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def in_weights(change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        path = folder / "model.safetensors"
        tensors = {name: value.clone() for name, value in load_file(path).items()}
        path.unlink()
        save_file(change(tensors), path)

    return apply


def cut(name: str, size: int) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / name
        path.write_bytes(path.read_bytes()[:size])

    return change


def only_pickled(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


BAD_NETWORKS: dict[str, Callable[[Path], None]] = {
    "cut weights": cut("model.safetensors", 500),
    "no weights": lambda folder: (folder / "model.safetensors").unlink(),
    "pickled weights alone": only_pickled,
    "a pickle under the name": lambda folder: (folder / "model.safetensors").write_bytes(pickle.dumps({})),
    "no config": lambda folder: (folder / "config.json").unlink(),
    "cut config": cut("config.json", 10),
    "a config that is a list": lambda folder: (folder / "config.json").write_text("[1]"),
    "a config that is deep": lambda folder: (folder / "config.json").write_text("[" * 100_000),
    "layers of negative size": in_config(hidden_sizes=[-1]),
    "layers that fill the memory": in_config(hidden_sizes=[10**12, 1]),
    "layers that are text": in_config(hidden_sizes="64"),
    "another version": in_config(feature_version=99),
    "other features": in_config(num_features=3),
    "other names of weights": in_weights(lambda t: {f"x.{name}": value for name, value in t.items()}),
    "a weight missing": in_weights(lambda t: dict(list(t.items())[1:])),
    "other shapes": in_weights(lambda t: {name: value[:1].clone() for name, value in t.items()}),
    "weights that are no numbers": in_weights(
        lambda t: {name: torch.full_like(value, float("nan")) for name, value in t.items()}
    ),
}


@pytest.mark.parametrize(
    "name",
    BAD_NETWORKS,
)
def test_a_bad_network_is_named(name: str, tmp_path: Path) -> None:
    folder = network_with(tmp_path / "network folder", BAD_NETWORKS[name])
    error = refused(lambda: load_network(str(folder), (64, 32), 0))
    assert "network folder" in str(error) or error.field == "feature_version"


# Checkpoints


def arguments(folder: Path, **changes: Any) -> TrainingArguments:
    defaults: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": 12,
        "per_device_train_batch_size": 8,
        "learning_rate": 0.01,
        "save_strategy": "steps",
        "save_steps": 8,
        "report_to": "none",
        "disable_tqdm": True,
        "logging_strategy": "no",
        "use_cpu": True,
    }
    return TrainingArguments(**(defaults | changes))


def make_trainer(route: str, folder: Path, config: ALRSConfig) -> Trainer:
    common = {"model": tiny_classifier(), "args": arguments(folder), "train_dataset": tiny_dataset()}
    if route == "callback":
        return Trainer(**common, callbacks=[ALRSCallback(config)])
    return ALRSTrainer(**common, alrs_config=config)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, ALRSConfig]]:
    """The output folder of a run of a route, made once, and its configuration."""
    folder = tmp_path_factory.mktemp("runs")
    scratch_network(scale=2.0).save_pretrained(str(folder / "network"))
    config = ALRSConfig(
        network=str(folder / "network"), phase1_steps=4, decision_interval=2, meta_num_epochs=1, max_restarts=0
    )

    def make(route: str) -> tuple[Path, ALRSConfig]:
        if not (folder / route).exists():
            make_trainer(route, folder / route, config).train()
        return folder / route, config

    return make


@pytest.fixture
def checkpoint(
    made: Callable[[str], tuple[Path, ALRSConfig]], tmp_path: Path
) -> Callable[[str], tuple[Trainer, Path]]:
    """A new trainer of a route, and the folder of a checkpoint that another one made."""

    def make(route: str) -> tuple[Trainer, Path]:
        folder, config = made(route)
        shutil.copytree(folder, tmp_path / "run")
        return make_trainer(route, tmp_path / "run", config), tmp_path / "run" / "checkpoint-8"

    return make


DAMAGE: dict[str, Callable[[Path, Path], None]] = {
    "cut": lambda path, mark: path.write_bytes(path.read_bytes()[:300]),
    "empty": lambda path, mark: path.write_bytes(b""),
    "code": lambda path, mark: torch.save(Payload(mark), path),
    "a list": lambda path, mark: torch.save([1, 2], path),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.reliability("damaged scheduler.pt: refused by name, no code is run")
def test_a_damaged_checkpoint_is_named(
    damage: str, checkpoint: Callable[[str], tuple[Trainer, Path]], mark: Path
) -> None:
    trainer, folder = checkpoint("trainer")
    DAMAGE[damage](folder / "scheduler.pt", mark)
    refused(lambda: trainer.train(resume_from_checkpoint=str(folder)), "scheduler.pt")


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.reliability("damaged scheduler.pt with the callback alone: Trainer refuses it, no code is run")
def test_a_damaged_checkpoint_ends_a_plain_trainer_too(
    damage: str, checkpoint: Callable[[str], tuple[Trainer, Path]], mark: Path
) -> None:
    """Trainer reads the file before any callback is called, so that the message is torch's."""
    trainer, folder = checkpoint("callback")
    DAMAGE[damage](folder / "scheduler.pt", mark)
    with pytest.raises((EOFError, RuntimeError, AttributeError, TypeError, pickle.UnpicklingError)):
        trainer.train(resume_from_checkpoint=str(folder))


def alrs_state(state: dict[str, Any]) -> dict[str, Any]:
    return state.get("alrs_state", state)


STATE_CHANGES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "no controller": lambda s: s.pop("controller"),
    "no recorder": lambda s: s.pop("recorder"),
    "a controller that is a list": lambda s: s.update(controller=[1]),
    "no statistics": lambda s: s["controller"].pop("state"),
    "other statistics": lambda s: s["controller"]["state"].update(more=1.0),
    "no network": lambda s: s["controller"].pop("network"),
    "a network of another shape": lambda s: s["controller"]["network"].popitem(),
    "rows of another width": lambda s: s["controller"].update(rows=torch.zeros(3, 2)),
    "rows that are text": lambda s: s["controller"].update(rows="rows"),
    "weights that do not fit": lambda s: s["controller"].update(trained=[torch.zeros(1)]),
    "a rate that is text": lambda s: s["controller"].update(log_multiplier="high"),
    "a rate that is infinite": lambda s: s["controller"].update(log_multiplier=float("inf")),
    "steps that are text": lambda s: s.update(steps="8"),
    "other parameters": lambda s: s["recorder"].update(initial=torch.zeros(3)),
    "groups that do not fit": lambda s: s.update(base_lrs=[0.1, 0.2, 0.3, 0.4]),
    "no average": lambda s: s.pop("average"),
    "an average that is a list": lambda s: s.update(average=[1]),
    "an average without its weights": lambda s: s["average"].update(average=None),
    "an average of another model": lambda s: s["average"].update(average=[torch.zeros(3)]),
    "averaged weights that are text": lambda s: s["average"].update(average="weights"),
    "raw weights of another model": lambda s: s["average"].update(raw=s["average"]["raw"][:-1]),
    "raw weights that are numbers": lambda s: s["average"].update(raw=[1.0, 2.0, 3.0, 4.0]),
    "no count of updates": lambda s: s["average"].pop("num_updates"),
    "updates that are text": lambda s: s["average"].update(num_updates="8"),
    "updates below zero": lambda s: s["average"].update(num_updates=-17),
    "no updates of an average": lambda s: s["average"].update(num_updates=0),
    "no version": lambda s: s.pop("alrs_state_version"),
    "another version": lambda s: s.update(alrs_state_version=99),
}


@pytest.mark.parametrize(
    "name",
    STATE_CHANGES,
)
@pytest.mark.reliability("changed scheduler state: refused as a checkpoint, whatever is wrong with it")
def test_a_changed_state_is_refused(name: str, checkpoint: Callable[[str], tuple[Trainer, Path]]) -> None:
    trainer, folder = checkpoint("trainer")
    path = folder / "scheduler.pt"
    state = torch.load(path, weights_only=True)
    STATE_CHANGES[name](alrs_state(state))
    torch.save(state, path)
    refused(lambda: trainer.train(resume_from_checkpoint=str(folder)), "checkpoint")


LINES = ["3", "[1]", '"text"', "null", '{"step": "x"}', '{"step": null}', "{", "[" * 100_000, "\udcff"]


@pytest.mark.parametrize(
    "line",
    LINES,
)
@pytest.mark.reliability("damaged alrs_history.jsonl: what can be read is kept, the run resumes")
def test_lines_of_the_history_that_cannot_be_read_are_left_out(line: str, tmp_path: Path) -> None:
    path = tmp_path / HISTORY_NAME
    content = f'{{"step": 1}}\n{line}\n{{"step": 2}}\n{{"step": 3}}\n'
    path.write_bytes(content.encode("utf-8", errors="surrogateescape"))
    _keep_history(path, 2)
    assert [json.loads(kept)["step"] for kept in path.read_text().splitlines()] == [1, 2]


# The bank of the meta-training


def bank_files(mark: Path) -> dict[str, Callable[[Path], Any]]:
    stored = {"spec": {}, "log_rates": torch.zeros(2), "loss": torch.zeros(1, 2), "error": torch.zeros(1, 2)}
    return {
        "missing": lambda path: None,
        "empty": lambda path: path.write_bytes(b""),
        "noise": lambda path: path.write_bytes(bytes(range(256))),
        "a pickle": lambda path: path.write_bytes(pickle.dumps(Payload(mark))),
        "code": lambda path: torch.save({"spec": Payload(mark)}, path),
        "a list": lambda path: torch.save([1], path),
        "entries missing": lambda path: torch.save(stored, path),
        "an unknown task": lambda path: torch.save(stored | {"initial": [], "spec": {"colour": 1}}, path),
        "a task that is a number": lambda path: torch.save(stored | {"initial": [], "spec": 3}, path),
        "tensors that are text": lambda path: torch.save(stored | {"initial": "x", "loss": "x"}, path),
    }


@pytest.mark.parametrize("name", list(bank_files(Path())))
def test_a_bad_file_of_the_bank_is_named(name: str, tmp_path: Path, mark: Path) -> None:
    path = tmp_path / "group-000001.pt"
    bank_files(mark)[name](path)
    refused(lambda: load_group(path), "group-000001.pt")


def test_a_cut_file_of_the_bank_is_named(tmp_path: Path) -> None:
    path = tmp_path / "group-000003.pt"
    grid = torch.linspace(-9.0, 0.0, 4)
    outcomes = [torch.rand(1, 4) for _ in range(4)]
    save_group(Group(sample_spec(3), grid, *outcomes, [torch.rand(1, 200, 50)]), path)
    assert load_group(path).num_tasks == 1
    whole = path.read_bytes()
    for share in (0.2, 0.5, 0.9):
        path.write_bytes(whole[: int(share * len(whole))])
        refused(lambda: load_group(path), "group-000003.pt")


@pytest.mark.parametrize("name", ["loss", "error", "averaged_loss", "averaged_error"])
def test_a_group_whose_tensors_do_not_fit_is_named(name: str, tmp_path: Path) -> None:
    path = tmp_path / "group-000003.pt"
    shapes = dict.fromkeys(("loss", "error", "averaged_loss", "averaged_error"), (1, 4)) | {name: (1, 3)}
    outcomes = {key: torch.rand(shape) for key, shape in shapes.items()}
    save_group(Group(sample_spec(3), torch.linspace(-9.0, 0.0, 4), initial=[torch.rand(1, 5)], **outcomes), path)
    refused(lambda: load_group(path), "group-000003.pt")


# What tasks load

FITTED = {"numeric": [{"column": "a", "fill": 0.0, "mean": 1.0, "scale": 2.0}], "categorical": [], "titanic": False}
CATEGORY = {"column": "b", "fill": "x", "categories": ["x", "y"]}
BAD_TRANSFORMS: dict[str, str] = {
    "empty": "",
    "cut": '{"numeric": [{"colu',
    "a list": "[1]",
    "a number": "3",
    "deep": "[" * 100_000,
    "no columns": json.dumps(FITTED | {"numeric": []}),
    "no scale": json.dumps(FITTED | {"numeric": [{"column": "a", "fill": 0.0, "mean": 1.0}]}),
    "a scale of zero": json.dumps(FITTED | {"numeric": [FITTED["numeric"][0] | {"scale": 0}]}),
    "a mean that is no number": json.dumps(FITTED | {"numeric": [FITTED["numeric"][0] | {"mean": float("nan")}]}),
    "a mean that is text": json.dumps(FITTED | {"numeric": [FITTED["numeric"][0] | {"mean": "1"}]}),
    "columns that are text": json.dumps(FITTED | {"numeric": "ab"}),
    "columns that are numbers": json.dumps(FITTED | {"numeric": [1]}),
    "categories that are numbers": json.dumps(FITTED | {"categorical": [CATEGORY | {"categories": [1]}]}),
    "no categories": json.dumps(FITTED | {"categorical": [{"column": "b", "fill": "x"}]}),
    "titanic as text": json.dumps(FITTED | {"titanic": "yes"}),
}


@pytest.mark.parametrize("name", list(BAD_TRANSFORMS))
def test_a_bad_column_transform_is_named(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "saved model"
    folder.mkdir()
    (folder / "preprocessor_config.json").write_text(BAD_TRANSFORMS[name])
    refused(lambda: TabularProcessor.from_pretrained(folder), "saved model")


def test_a_good_column_transform_is_read(tmp_path: Path) -> None:
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(FITTED | {"categorical": [CATEGORY]}))
    features = TabularProcessor.from_pretrained(tmp_path)({"a": [5.0], "b": ["y"]})["features"]
    assert features.tolist() == [[2.0, 0.0, 1.0]]
    refused(lambda: TabularProcessor.from_pretrained(tmp_path / "missing"), "missing")


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny encoder with its vocabulary, as `save_pretrained` leaves it."""
    from test_task_inputs import save_encoder

    return Path(save_encoder(tmp_path_factory.mktemp("encoder") / "model"))


def with_code(folder: Path, mark: Path) -> None:
    """A repository that asks for code of its own."""
    (folder / "own.py").write_text(
        f"import os\nos.mkdir({str(mark)!r})\nfrom transformers import BertConfig as OwnConfig\n"
    )
    path = folder / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"model_type": "own", "auto_map": {"AutoConfig": "own.OwnConfig"}}))


def with_pickle(folder: Path, mark: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({"x": Payload(mark)}, folder / "pytorch_model.bin")


BAD_ENCODERS: dict[str, Callable[[Path, Path], None]] = {
    "cut vocabulary": lambda folder, mark: cut("tokenizer.json", 200)(folder),
    "a vocabulary that is a list": lambda folder, mark: (folder / "tokenizer.json").write_text("[]"),
    "a vocabulary of another kind": lambda folder, mark: (folder / "tokenizer.json").write_bytes(b"\xff\x00"),
    "cut config": lambda folder, mark: cut("config.json", 20)(folder),
    "cut weights": lambda folder, mark: cut("model.safetensors", 100)(folder),
    "pickled weights with code": with_pickle,
    "a config with code": with_code,
}


@pytest.mark.parametrize("name", list(BAD_ENCODERS))
def test_a_bad_encoder_is_named(name: str, encoder: Path, tmp_path: Path, mark: Path) -> None:
    folder = Path(shutil.copytree(encoder, tmp_path / "an encoder"))
    BAD_ENCODERS[name](folder, mark)
    data = DataArguments(task_name="imdb", dataset_name="sample", model_name_or_path=str(folder), max_train_samples=40)
    refused(lambda: TASKS["imdb"].prepare(data).model_init(), "an encoder")


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.binary(max_size=400))
def test_bytes_for_a_result_are_refused(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "bytes.json"
    path.write_bytes(data)
    refused(lambda: read_result(path), "bytes.json")
