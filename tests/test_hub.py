"""Publishing and loading by name, over HTTP against a stand-in for the Hub, with the real clients."""

from __future__ import annotations

import json
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
import yaml
from conftest import scratch_network
from datasets import load_dataset
from hub_server import TOKEN, HubServer
from huggingface_hub import ModelCard, parse_eval_result_entries
from test_report import NUM_STEPS, make_record, store
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    BertModel,
)

from hf_alrs import ALRSConfig, MetaLRNetwork, cards, cli
from hf_alrs.comparison import compare
from hf_alrs.config import InputError
from hf_alrs.controller import ALRSController
from hf_alrs.features import FEATURE_VERSION
from hf_alrs.hub import Upload, _is_replaced
from hf_alrs.network import load_network
from hf_alrs.report import build_report
from hf_alrs.run import train as train_task
from tasks import TASKS
from tasks.text import train_word_tokenizer


ROOT = Path(__file__).parents[1]
SENTENCES = ["a fine film", "a dull film", "fine and warm", "dull and cold"]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> Callable[..., tuple[int, str, str]]:
    """Runs `hf-alrs ...` in this process; exit code, stdout, stderr."""

    def call(*arguments: Any) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["hf-alrs", *map(str, arguments)])
        code = 0
        try:
            cli.main()
        except SystemExit as error:
            code = error.code
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


@pytest.fixture(scope="module")
def reported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four stored runs with their report."""
    records = [make_record(scheduler, 1e-3, seed) for scheduler in ("alrs", "linear") for seed in (0, 1)]
    folder = store(tmp_path_factory.mktemp("results"), *records)
    build_report(folder)
    return folder


@pytest.fixture
def results(reported: Path, tmp_path: Path) -> Path:
    """A copy of the four runs and their report."""
    return shutil.copytree(reported, tmp_path / "results")


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def message(code: int, out: str, err: str) -> str:
    """The one message of a command that ended in an input error."""
    assert code == 2, (out, err)
    errors = [line for line in err.splitlines() if line.startswith("error:")]
    assert len(errors) == 1 and "Traceback" not in err, err
    return errors[0]


def same_weights(first: MetaLRNetwork, second: MetaLRNetwork) -> bool:
    return all(torch.equal(x, y) for x, y in zip(first.parameters(), second.parameters(), strict=True))


# --- the network ------------------------------------------------------------------------------------------------------


def test_a_pushed_network_drives_a_run_by_its_name(hub: HubServer) -> None:
    network = scratch_network(hidden_sizes=(8, 4))
    network.push_to_hub("alice/controller")
    files = hub.repos["model", "alice/controller"].files
    assert set(files) == {"config.json", "model.safetensors", "README.md"}
    assert json.loads(files["config.json"])["feature_version"] == FEATURE_VERSION
    assert same_weights(network, MetaLRNetwork.from_pretrained("alice/controller"))
    controller = ALRSController(ALRSConfig(network="alice/controller"), 100, 1e-3)
    assert controller.network.hidden_sizes == (8, 4)
    assert ("PUT", f"/storage/{next(iter(hub.objects))}") in hub.requests, "weights go to large file storage"


def test_the_card_says_what_the_network_was_trained_on(hub: HubServer, tmp_path: Path) -> None:
    load_network("default", (64, 32), 0).push_to_hub("controller")  # its owner comes from the login
    card = ModelCard.load("alice/controller")
    assert (card.data.library_name, card.data.license) == ("hf-alrs", "apache-2.0")
    assert {"learning-rate", "meta-learning"} <= set(card.data.tags)
    assert 'ALRSConfig(network="alice/controller")' in card.text
    shipped = (ROOT / "hf_alrs/weights/64-32/README.md").read_text()
    for heading in ("Training", "Measured"):
        told = re.search(rf"## {heading}\n\n(.+)", shipped)[1]
        assert told in card.text, "a network that is saved again keeps what is known of it"
    assert "## Limits" in card.text and "64-32-1" in card.text
    for empty in ("More Information Needed", "Not described", "Not measured"):
        assert empty not in card.text
    # Once more by way of the Hub
    MetaLRNetwork.from_pretrained("alice/controller").save_pretrained(tmp_path)
    assert told in (tmp_path / "README.md").read_text()


def test_the_card_of_changed_weights_claims_no_measurements(hub: HubServer) -> None:
    network = load_network("default", (64, 32), 0)
    measured = network._described["measured"]
    with torch.no_grad():
        network.layers[0].bias.add_(0.1)
    network.push_to_hub("alice/changed")
    card = hub.repos["model", "alice/changed"].files["README.md"].decode()
    assert measured not in card and "Trained further" in card


def test_a_network_for_other_features_is_refused_by_name(hub: HubServer, tmp_path: Path) -> None:
    scratch_network().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"feature_version": FEATURE_VERSION + 1, "num_features": 99}
    (tmp_path / "config.json").write_text(json.dumps(config))
    hub.add("model", "bob/newer", tmp_path)
    with pytest.raises(InputError, match=r"version .*Use a network of the same version"):
        ALRSController(ALRSConfig(network="bob/newer"), 100, 1e-3)
    (tmp_path / "config.json").unlink()
    hub.add("model", "bob/bare", tmp_path)
    with pytest.raises(InputError, match=r"no network \(404\)"):
        load_network("bob/bare", (64, 32), 0)


@pytest.mark.parametrize(("status", "told"), [(401, "login"), (404, "no such network"), (None, "cannot be reached")])
def test_a_network_that_cannot_be_had(hub: HubServer, status: int | None, told: str) -> None:
    hub.add("model", "bob/net", {})
    with hub.failing("bob/net", status), pytest.raises(InputError, match=told) as error:
        load_network("bob/net", (64, 32), 0)
    assert error.value.field == "network" and "\n" not in str(error.value)
    with hub.failing("repos/create", status), pytest.raises(InputError) as error:
        scratch_network().push_to_hub("alice/net")
    assert "\n" not in str(error.value)


def test_a_mistyped_folder_is_not_asked_for(hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # where nobody's training has left that folder
    with pytest.raises(InputError, match="no folder here"):
        load_network("outputs/meta-training/64-32", (64, 32), 0)
    assert not hub.requests


# --- results ----------------------------------------------------------------------------------------------------------


def test_results_come_back_byte_for_byte(hub: HubServer, results: Path, tmp_path: Path, run: Callable) -> None:
    (results / "report.html").unlink()
    code, out, _ = run("publish", results, "--repo", "alice/digits", "--space")
    assert code == 0 and f"Dataset: {hub.endpoint}/datasets/alice/digits" in out
    published = contents(results)  # with the report, which was built for it
    assert {"report.html", "results.json", "report.md"} <= set(published)
    dataset = hub.repos["dataset", "alice/digits"].files
    assert {k.removeprefix("results/"): v for k, v in dataset.items() if k.startswith("results/")} == published
    space = hub.repos["space", "alice/digits"]
    assert space.sdk == "static" and space.files["index.html"] == published["report.html"]
    assert "sdk: static" in space.files["README.md"].decode()

    assert run("pull", "alice/digits", "--output_dir", tmp_path / "pulled")[0] == 0
    assert contents(tmp_path / "pulled") == published
    assert run("pull", "alice/digits", "--output_dir", tmp_path / "pulled")[0] == 0, "the same files may be there"
    assert run("report", tmp_path / "pulled")[0] == 0
    assert contents(tmp_path / "pulled") == published


def test_the_rows_are_a_dataset(hub: HubServer, results: Path, run: Callable) -> None:
    assert run("publish", results, "--repo", "alice/digits")[0] == 0
    assert not any(kind == "space" for kind, _ in hub.repos)
    rows = load_dataset("alice/digits", split="train")
    assert len(rows) == 4 and len(set(rows["file"])) == 4
    assert sorted(set(rows["spec.scheduler"])) == ["alrs", "linear"]
    record = json.loads((results / rows[0]["file"]).read_text())
    assert rows[0]["results.eval_loss"] == record["results"]["eval_loss"]
    assert rows[0]["history.learning_rate"] == record["history"]["learning_rate"]
    assert rows[0]["config.training.optim"] == "adamw_torch"
    card = hub.repos["dataset", "alice/digits"].files["README.md"].decode()
    assert "hf-alrs pull alice/digits" in card and "| alrs | 0.001 | 2 |" in card


def test_columns_of_several_types() -> None:
    records = {
        "a": {"x": 1, "y": None, "z": [1, 2.5], "w": True, "v": {"k": "s"}, "u": 1},
        "b": {"x": 2.5, "y": None, "z": None, "w": None, "v": {"k": 3}, "u": [1]},
    }
    rows = pd.read_parquet(BytesIO(cards.parquet_bytes(cards.result_rows(records)))).to_dict("records")
    assert [row["x"] for row in rows] == [1.0, 2.5] and [row["y"] for row in rows] == [None, None]
    assert list(rows[0]["z"]) == [1.0, 2.5] and rows[1]["z"] is None
    assert [row["w"] for row in rows] == [True, None]
    assert [row["v.k"] for row in rows] == ['"s"', "3"] and [row["u"] for row in rows] == ["1", "[1]"]


def test_publishing_again(hub: HubServer, results: Path, run: Callable) -> None:
    assert run("publish", results, "--repo", "alice/digits", "--space")[0] == 0
    before, repo = contents(results), hub.repos["dataset", "alice/digits"]
    head = repo.head
    told = message(*run("publish", results, "--repo", "alice/digits"))
    assert "already" in told and "--overwrite" in told
    assert (contents(results), repo.head) == (before, head)
    record = json.loads((results / "run-003.json").read_text())
    (results / "run-003.json").write_text(json.dumps(record | {"status": "failed", "error": "it was killed"}))
    assert "did not complete" in message(*run("publish", results, "--repo", "alice/digits", "--overwrite"))
    (results / "run-003.json").unlink()
    assert "hf-alrs report" in message(*run("publish", results, "--repo", "alice/digits", "--overwrite"))
    assert run("report", results)[0] == 0
    assert run("publish", results, "--repo", "alice/digits", "--space", "--overwrite")[0] == 0
    assert "results/run-002.json" in repo.files and "results/run-003.json" not in repo.files
    assert head in repo.commits and "results/run-003.json" in repo.commits[head], "the history keeps it"


def test_controller_model_and_evidence_in_one_command(
    hub: HubServer, results: Path, tmp_path: Path, run: Callable
) -> None:
    model = tmp_path / "model"
    model.mkdir()
    for name in ("config.json", "README.md", "model.safetensors", "training_args.bin", "notes.txt"):
        (model / name).write_text(name)
    code, out, err = run(
        "publish", results, "--repo", "alice/digits", "--space", "--network", "default", "--model", model
    )
    assert code == 0, err
    assert len(out.splitlines()) == 4
    assert set(hub.repos["model", "alice/digits-model"].files) == {"config.json", "README.md", "model.safetensors"}
    network = MetaLRNetwork.from_pretrained("alice/digits-network")
    assert same_weights(network, load_network("default", (64, 32), 0))
    assert 'network="alice/digits-network"' in hub.repos["model", "alice/digits-network"].files["README.md"].decode()


FAULTS = [
    ("repos/create", 401, "login"),
    ("repos/create", 403, "no right"),
    ("repos/create", None, "connection"),
    ("repos/create", 409, "already"),
    ("preupload", 401, "login"),
    ("commit/main", None, "connection"),
    ("PUT /storage", None, "connection"),
    ("commit/main", 500, "status 500"),
]


@pytest.mark.parametrize(("pattern", "status", "told"), FAULTS)
def test_a_failed_publication_loses_nothing(
    hub: HubServer, results: Path, run: Callable, pattern: str, status: int | None, told: str
) -> None:
    before = contents(results)
    with hub.failing(pattern, status):
        assert told in message(*run("publish", results, "--repo", "alice/digits"))
    assert contents(results) == before
    assert not any(repo.files for repo in hub.repos.values()), "nobody sees half a publication"
    assert run("publish", results, "--repo", "alice/digits", "--overwrite")[0] == 0
    assert hub.repos["dataset", "alice/digits"].files


@pytest.mark.parametrize(
    ("pattern", "status", "told"),
    [
        ("api/datasets/alice/digits", 401, "login"),
        ("api/datasets/alice/digits", None, "connection"),
        ("resolve/.*/results/run-002", None, "connection"),
        ("resolve/.*/results/run-002", 500, "status 500"),
    ],
)
def test_a_failed_pull_loses_nothing(
    hub: HubServer, results: Path, tmp_path: Path, run: Callable, pattern: str, status: int | None, told: str
) -> None:
    run("publish", results, "--repo", "alice/digits")
    target = store(tmp_path / "pulled", make_record())
    before = contents(target)
    with hub.failing(pattern, status):
        assert told in message(*run("pull", "alice/digits", "--output_dir", target))
    assert contents(target) == before


def test_pulling_does_not_replace_other_files(hub: HubServer, results: Path, tmp_path: Path, run: Callable) -> None:
    run("publish", results, "--repo", "alice/digits")
    target = store(tmp_path / "mine", make_record("step"))
    before = contents(target)
    told = message(*run("pull", "alice/digits", "--output_dir", target))
    assert "run-000.json" in told and "--overwrite" in told
    assert contents(target) == before
    (target / "digits--linear--lr0.001--seed0.json").write_text("{}")  # of a run that has been withdrawn
    other = tmp_path / "mine" / "of-another-comparison" / "digits--linear--lr0.001--seed0.json"
    other.parent.mkdir()
    other.write_text("{}")
    assert run("pull", "alice/digits", "--output_dir", target, "--overwrite")[0] == 0
    other.unlink()
    other.parent.rmdir()
    assert contents(target) == contents(results)


@pytest.mark.parametrize("name", ["alice", "a/b/c", "../x", "alice/", "alice/x y"])
def test_names_that_are_none(hub: HubServer, results: Path, run: Callable, name: str) -> None:
    message(*run("publish", results, "--repo", name))
    message(*run("pull", name))
    assert not hub.repos


def test_what_is_not_there(hub: HubServer, results: Path, tmp_path: Path, run: Callable) -> None:
    assert "404" in message(*run("pull", "alice/none", "--output_dir", tmp_path / "x"))
    hub.add("dataset", "bob/other", {"README.md": b"", "data.csv": b"a\n1\n"})
    assert "hf-alrs publish" in message(*run("pull", "bob/other", "--output_dir", tmp_path / "x"))
    assert not (tmp_path / "x").exists()
    (tmp_path / "file").touch()
    assert "no folder" in message(*run("pull", "bob/other", "--output_dir", tmp_path / "file"))
    message(*run("publish", tmp_path, "--repo", "alice/digits"))
    assert not any(name == "alice/digits" for _, name in hub.repos)


@pytest.mark.parametrize(
    "name",
    ["../x", "results/../../x.json", "/etc/x.json", "results//x.json", "results/..\\x.json", "results/C:x.json"],
)
def test_names_that_lead_out_of_the_folder(
    hub: HubServer, results: Path, tmp_path: Path, run: Callable, name: str
) -> None:
    run("publish", results, "--repo", "alice/digits")
    files = hub.repos["dataset", "alice/digits"].files
    hub.add("dataset", "mallory/digits", {**files, name: b"{}"})
    before = contents(tmp_path)
    told = message(*run("pull", "mallory/digits", "--output_dir", tmp_path / "deep" / "pulled"))
    assert "outside the folder" in told
    assert contents(tmp_path) == before


def test_what_is_no_result_is_not_pulled(hub: HubServer, results: Path, tmp_path: Path, run: Callable) -> None:
    run("publish", results, "--repo", "alice/digits")
    files = hub.repos["dataset", "alice/digits"].files
    hub.add("dataset", "mallory/more", {**files, "results/.bashrc": b"x", "results/sitecustomize.py": b"x"})
    assert run("pull", "mallory/more", "--output_dir", tmp_path / "pulled")[0] == 0
    assert contents(tmp_path / "pulled") == contents(results)
    hub.add("dataset", "mallory/broken", {**files, "results/run-001.json": b'{"schema_version": 1}'})
    assert "run-001.json" in message(*run("pull", "mallory/broken", "--output_dir", tmp_path / "other"))
    assert not (tmp_path / "other").exists()


def test_one_leaderboard_of_several_people(tmp_path: Path, run: Callable) -> None:
    folders = [tmp_path / name for name in ("alice", "bob")]
    store(folders[0], make_record("alrs", seed=0), make_record("linear", seed=0))
    bob = [make_record("alrs", seed=0, pace=2.0), make_record("step", seed=0), make_record("linear", task="imdb")]
    store(
        folders[1], *bob, make_record("alrs", task="imdb", level=0.9), make_record("linear", seed=1, status="diverged")
    )
    code, out, err = run("report", *folders, "--output_dir", tmp_path / "merged")
    assert code == 0, err
    text = (tmp_path / "merged" / "leaderboard.md").read_text()
    assert text in out and (tmp_path / "merged" / "report.html").is_file()
    assert f"| 1 | alrs | 1e-3 | 2 | 0 | 0.4000 | 0.6000 | {folders[0]}, {folders[1]} |" in text
    assert f"| 3 | linear | 1e-3 | 2 | 1 | ∞ | 0.2500 | {folders[0]}, {folders[1]} |" in text, text
    assert "| alrs | 1.50 | 2 |" in text, "first on sst2, second on imdb"
    assert f"{folders[1]}: 5 runs" in text


def test_runs_of_different_lengths_are_not_ranked_together(tmp_path: Path, run: Callable) -> None:
    folders = [tmp_path / name for name in ("alice", "bob")]
    store(folders[0], make_record("alrs"), make_record("linear", level=0.9))
    store(folders[1], make_record("alrs", level=0.1) | {"num_training_steps": 777})
    code, _, err = run("report", *folders, "--output_dir", tmp_path / "merged")
    assert code == 0, err
    text = (tmp_path / "merged" / "leaderboard.md").read_text()
    long, short = (text.split(f"{steps} steps\n")[1].split("\n\n")[0] for steps in (777, NUM_STEPS))
    assert "| 1 | alrs |" in long and "linear" not in long
    assert "| 1 | alrs |" in short and "| 2 | linear |" in short
    assert "| alrs | 1.00 | 2 |" in text and "| linear | " not in text.split("## ")[1]


# --- secrets ----------------------------------------------------------------------------------------------------------


def test_a_file_that_holds_a_token_is_not_published(hub: HubServer, results: Path, run: Callable) -> None:
    record = json.loads((results / "run-000.json").read_text())
    for secret in (TOKEN, "hf_" + "a1B2" * 9):
        record["environment"]["command"] = f"hf-alrs compare --hub_token {secret}"
        (results / "run-000.json").write_text(json.dumps(record))
        code, out, err = run("publish", results, "--repo", "alice/digits")
        assert "run-000.json" in message(code, out, err)
        assert secret not in out + err
    assert not hub.repos


# --- the run scripts --------------------------------------------------------------------------------------------------


def tiny_bert(folder: Path) -> Path:
    """A BERT and its tokenizer as a folder that `from_pretrained` reads."""
    tokenizer = train_word_tokenizer(SENTENCES, 128, for_encoder=True)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    BertForSequenceClassification(
        BertConfig(
            vocab_size=len(tokenizer),
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=16,
            max_position_embeddings=128,
            pad_token_id=tokenizer.pad_token_id,
        )
    ).save_pretrained(folder)
    return folder


def glue_files() -> dict[str, bytes]:
    """A dataset repository with the configuration `sst2`, laid out as that of GLUE is."""
    files = {}
    entries = []
    for split, size in (("train", 80), ("validation", 16), ("test", 4)):
        labels = [-1 if split == "test" else i % 2 for i in range(size)]
        table = pd.DataFrame(
            {"sentence": [SENTENCES[i % 4] for i in range(size)], "label": labels, "idx": range(size)}
        )
        buffer = BytesIO()
        table.to_parquet(buffer)
        files[f"sst2/{split}-00000-of-00001.parquet"] = buffer.getvalue()
        entries.append({"split": split, "path": f"sst2/{split}-*"})
    metadata = {"configs": [{"config_name": "sst2", "data_files": entries}]}
    return files | {"README.md": f"---\n{yaml.safe_dump(metadata)}---\n".encode()}


@pytest.fixture
def glue(hub: HubServer, tmp_path: Path) -> HubServer:
    """The stand-in with what `--task_name sst2` asks for."""
    hub.add("dataset", "nyu-mll/glue", glue_files())
    hub.add("model", "google-bert/bert-base-uncased", tiny_bert(tmp_path / "bert"))
    return hub


SHORT = ["--num_train_epochs", "2", "--per_device_train_batch_size", "8", "--learning_rate", "1e-3"]
SHORT += ["--use_cpu", "True", "--eval_strategy", "no"]


def train(*arguments: Any, task: str = "sst2", save: str = "no") -> dict[str, float]:
    return train_task([*map(str, arguments), *SHORT, "--save_strategy", save], TASKS, task)


def test_the_clients_load_glue_and_bert(glue: HubServer) -> None:
    data = load_dataset("nyu-mll/glue", "sst2")
    assert {name: len(rows) for name, rows in data.items()} == {"train": 80, "validation": 16, "test": 4}
    tokenizer = AutoTokenizer.from_pretrained("google-bert/bert-base-uncased")
    model = AutoModelForSequenceClassification.from_pretrained("google-bert/bert-base-uncased")
    assert model(**tokenizer("a fine film", return_tensors="pt")).logits.shape == (1, 2)
    assert TOKEN.encode() not in b"".join(glue.received)


def test_a_trained_model_is_pushed_with_its_card(
    glue: HubServer, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    output = tmp_path / "run"
    metrics = train(
        "--task_name",
        "sst2",
        "--push_to_hub",
        "--hub_model_id",
        "alice/sst2",
        "--hub_token",
        TOKEN,
        "--output_dir",
        output,
    )
    captured = capsys.readouterr()
    repo = glue.repos["model", "alice/sst2"]
    files = repo.files
    assert len(repo.commits) == 2, "one commit after the empty one"
    assert {"model.safetensors", "config.json", "tokenizer.json", "alrs_history.jsonl", "recipe.yaml"} <= set(files)
    assert not [name for name in files if name.endswith(".bin") or name.startswith("checkpoint")]
    assert files["learning_rate.png"].startswith(b"\x89PNG") and len(files["learning_rate.png"]) > 5_000

    card = ModelCard.load("alice/sst2")
    results = {result.metric_type: result for result in card.data.eval_results}
    assert results["accuracy"].metric_value == metrics["eval_accuracy"]
    assert (results["accuracy"].dataset_type, results["accuracy"].dataset_config) == ("nyu-mll/glue", "sst2")
    assert (card.data.model_name, card.data.pipeline_tag) == ("sst2", "text-classification")
    assert card.data.base_model == "google-bert/bert-base-uncased" and card.data.datasets == ["nyu-mll/glue"]
    assert "ALRSCallback" in card.text and "learning_rate.png" in card.text
    blocks = [json.loads(block) for block in re.findall(r"```json\n(.+?)```", card.text, re.DOTALL)]
    assert blocks[0] == json.loads((output / "eval_results.json").read_text())
    assert blocks[1] == json.loads((output / "benchmark_results.json").read_text())
    assert "More Information Needed" not in card.text

    (entry,) = parse_eval_result_entries(yaml.safe_load(files[".eval_results/sst2.yaml"]))
    assert (entry.dataset_id, entry.task_id, entry.value) == ("nyu-mll/glue", "sst2", metrics["eval_accuracy"])

    # What was published is a model that anyone loads, and a recipe that anyone runs
    AutoTokenizer.from_pretrained("alice/sst2")
    loaded = AutoModelForSequenceClassification.from_pretrained("alice/sst2")
    assert loaded.config.id2label == {0: "negative", 1: "positive"}
    again = tmp_path / "again"
    (tmp_path / "recipe.yaml").write_bytes(files["recipe.yaml"])
    rerun = train_task(["--config", str(tmp_path / "recipe.yaml"), "--output_dir", str(again)], TASKS, "imdb")
    assert rerun["eval_loss"] == pytest.approx(metrics["eval_loss"])

    stored = [*files.values(), *contents(output).values(), *contents(again).values(), *glue.received]
    assert not any(TOKEN.encode() in content for content in stored), "in a file or an upload"
    assert TOKEN not in captured.out + captured.err + " ".join(sys.argv)
    assert str(tmp_path) not in card.text, "folders of this machine are of no use to others"


def test_a_model_of_the_sample(hub: HubServer, tmp_path: Path) -> None:
    output = tmp_path / "digits"
    train("--dataset_name", "sample", "--push_to_hub", "--scheduler", "linear", "--output_dir", output, task="cifar10")
    files = hub.repos["model", "alice/digits"].files
    assert not any(name.startswith(".eval_results") for name in files), "the sample is no dataset of the Hub"
    card = ModelCard.load("alice/digits")
    assert "linear" in card.text and "for comparison" in card.text and card.data.datasets is None
    assert card.data.eval_results and card.data.pipeline_tag == "image-classification"
    assert {result.dataset_type for result in card.data.eval_results} == {"local"}
    assert "trained on the data below, read as the task cifar10" in card.text
    code = card.text.split("```python\n")[1].split("```")[0].replace('"USER/digits"', repr(str(output)))
    subprocess.run([sys.executable, "-c", code], check=True)  # where nothing has registered the architecture


def test_a_push_that_cannot_work_fails_before_the_run(glue: HubServer, tmp_path: Path) -> None:
    def refused(*arguments: Any) -> str:
        with pytest.raises(InputError) as error:
            train("--push_to_hub", "--output_dir", tmp_path / "run", *arguments)
        assert not (tmp_path / "run" / "model.safetensors").exists() and "\n" not in str(error.value)
        return str(error.value)

    glue_task = ["--task_name", "sst2"]
    with glue.failing("repos/create", 401):
        assert "login" in refused(*glue_task)
    with glue.failing("repos/create", None):
        assert "connection" in refused(*glue_task)
    assert "right" in refused(*glue_task, "--hub_model_id", "bob/sst2")
    assert "hub_strategy" in refused(*glue_task, "--hub_strategy", "checkpoint")
    assert "do_train" in refused(*glue_task, "--do_eval")
    with pytest.raises(InputError, match="--fold"):
        train_task(["--task", "titanic", "--dataset_name", "sample", "--push_to_hub"], TASKS, "titanic")
    with pytest.raises(InputError, match="hf-alrs publish"):
        compare(["--dataset_name", "sample", "--push_to_hub", "--seeds", "0"], TASKS, "cifar10")


def test_a_model_is_not_judged_by_a_head_of_random_weights(glue: HubServer, tmp_path: Path) -> None:
    config = BertConfig.from_pretrained(tmp_path / "bert")
    BertModel(config).save_pretrained(tmp_path / "encoder")
    config.num_labels = 3
    BertForSequenceClassification(config).save_pretrained(tmp_path / "three")
    for name, said in (("encoder", "is a BertModel"), ("three", "has 3 outputs, and the data needs 2")):
        AutoTokenizer.from_pretrained(tmp_path / "bert").save_pretrained(tmp_path / name)
        arguments = ["--model_name_or_path", tmp_path / name, "--output_dir", tmp_path / "run"]
        with pytest.raises(InputError, match=said):
            train("--task_name", "sst2", *arguments, "--do_eval")
        assert train("--task_name", "sst2", *arguments, "--max_steps", "1")["eval_loss"] > 0, (
            "training is what it needs"
        )
        shutil.rmtree(tmp_path / "run")


def test_a_push_that_fails_at_the_end_keeps_the_model(glue: HubServer, tmp_path: Path) -> None:
    arguments = ["--task_name", "sst2", "--push_to_hub", "--output_dir", tmp_path / "run"]
    with glue.failing("commit/main", None), pytest.raises(InputError, match="same command again") as error:
        train(*arguments, save="epoch")
    assert error.value.field == "hub_model_id"
    kept = contents(tmp_path / "run")
    assert {"model.safetensors", "README.md", "eval_results.json", "learning_rate.png"} <= set(kept)
    train(*arguments, save="epoch")
    files = glue.repos["model", "alice/run"].files
    assert files["model.safetensors"] == kept["model.safetensors"], "the same command pushes what was trained"
    assert files["benchmark_results.json"] == kept["benchmark_results.json"]


@pytest.mark.parametrize("pattern", ["datasets/nyu-mll/glue", "google-bert"])
@pytest.mark.parametrize("status", [401, 404, None])
def test_data_or_model_that_cannot_be_had(glue: HubServer, tmp_path: Path, pattern: str, status: int | None) -> None:
    with glue.failing(pattern, status), pytest.raises(InputError) as error:
        train("--task_name", "sst2", "--output_dir", tmp_path / "run")
    assert "\n" not in str(error.value)
    assert error.value.field == ("dataset_name" if "glue" in pattern else "model_name_or_path")


# --- no call without a flag -------------------------------------------------------------------------------------------


@pytest.fixture
def connections(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """Addresses that this process connects to or looks up, other than sockets of this machine's file system."""
    made: list[Any] = []

    def counted(name: str) -> None:
        original = getattr(socket.socket, name)

        def connect(self: socket.socket, address: Any) -> Any:
            if self.family != getattr(socket, "AF_UNIX", None):
                made.append(address)
            return original(self, address)

        monkeypatch.setattr(socket.socket, name, connect)

    for name in ("connect", "connect_ex"):
        counted(name)
    lookup = socket.getaddrinfo

    def getaddrinfo(*args: Any, **kwargs: Any) -> Any:
        made.append(args)
        return lookup(*args, **kwargs)

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    yield made


def test_local_runs_make_no_connection(
    hub: HubServer,
    tmp_path: Path,
    run: Callable,
    results: Path,
    connections: list[Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    data = tmp_path / "data"
    data.mkdir()
    for name, content in glue_files().items():
        (data / name.replace("sst2/", "")).write_bytes(content)
    (data / "README.md").unlink()
    network = tmp_path / "network"
    scratch_network().save_pretrained(network)
    model = tiny_bert(tmp_path / "bert")
    train(
        "--dataset_name", data, "--model_name_or_path", model, "--network", network, "--output_dir", tmp_path / "run"
    )
    sample = ["--dataset_name", "sample", "--max_train_samples", "200"]
    train(*sample, "--output_dir", tmp_path / "sample", task="cifar10")
    matrix = [
        *sample,
        *SHORT,
        "--num_evaluations",
        "1",
        "--save_strategy",
        "no",
        "--schedulers",
        "alrs",
        "--seeds",
        "0",
    ]
    monkeypatch.setattr(sys, "argv", ["run_vision_alrs.py", "--hub_token", TOKEN])
    compare([*matrix, "--hub_token", TOKEN, "--output_dir", str(tmp_path / "matrix")], TASKS, "cifar10")
    assert not any(TOKEN.encode() in content for content in contents(tmp_path / "matrix").values())
    assert run("report", results)[0] == 0
    assert connections == [] and hub.requests == []
    # The counter counts: a network by its name is asked for over a connection
    with pytest.raises(InputError):
        load_network("alice/none", (64, 32), 0)
    assert connections and hub.requests


# --- all of it --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_publish_delete_and_train_again(tmp_path: Path) -> None:
    script = ROOT / "tests" / "scripts" / "publish_and_train_again.py"
    done = subprocess.run([sys.executable, str(script), str(tmp_path)], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "trained again from alice/digits-network" in done.stdout
    assert TOKEN not in done.stdout + done.stderr


def test_another_model_leaves_no_file_of_the_one_before() -> None:
    there = ["alrs_history.jsonl", "vocab.txt", "onnx/config.json", "notes.txt", ".eval_results/sst2.yaml"]
    upload = Upload("model", "alice/model", {"config.json": b""}, replaces=cards.MODEL_FILES)
    gone = [name for name in there if _is_replaced(name, upload)]
    assert gone == ["alrs_history.jsonl", "vocab.txt", ".eval_results/sst2.yaml"], "what is not of a run stays"
    assert _is_replaced("results/plots/a.svg", Upload("dataset", "alice/runs", {}, replaces=("results/*",)))


def test_a_folder_with_spaces_is_named_by_its_last_part() -> None:
    told = cards._shown_source("local folder /home/me/my own data; 3 classes")
    assert told == "local folder my own data; 3 classes"
    assert cards._shown_source("local file /home/my secret/rows.csv") == "local file rows.csv"
