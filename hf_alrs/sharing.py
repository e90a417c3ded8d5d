"""`hf-alrs publish` and `hf-alrs pull`: results, networks and models to and from the Hub."""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path

from . import cards, hub
from .config import ALRSConfig, InputError, check_output_dir, home_expanded
from .network import load_network
from .report import build_report, load_runs
from .report.runs import REPORT_FILE


# What a folder of results is made of: runs, and the report of them
_RESULT_NAMES = r"[^/]+\.json|report\.(md|html)|plots/[^/]+\.svg"


def publish_command(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="hf-alrs publish",
        description="Publish the results of a comparison as a dataset on the Hub. The result files are published as they "
        "are: they hold the command line, the names of folders and the versions of the machine they were made on.",
    )
    parser.add_argument("results_dir", type=home_expanded, metavar="DIR", help="Folder of result files.")
    parser.add_argument("--repo", required=True, help="user/name of the dataset.")
    parser.add_argument("--space", action="store_true", help="Publish report.html as a static Space of the same name.")
    parser.add_argument(
        "--network", help="Publish this network too, as the model NAME-network: `default`, a folder or a Hub id."
    )
    parser.add_argument(
        "--model",
        type=home_expanded,
        help="Publish a trained model too, as the model NAME-model: the --output_dir of its run.",
    )
    parser.add_argument("--private", action="store_true", help="Make new repositories private.")
    parser.add_argument("--overwrite", action="store_true", help="Publish into repositories that are there already.")
    options = parser.parse_args(arguments)
    hub.check_repo_id("repo", options.repo)
    check_output_dir(options.results_dir)  # a missing report is built there
    with tempfile.TemporaryDirectory(prefix="hf-alrs-") as scratch:
        uploads = _result_uploads(options.results_dir, options.repo, options.space)
        if options.network is not None:
            name, folder = f"{options.repo}-network", Path(scratch)
            network = load_network(options.network, ALRSConfig().hidden_sizes, seed=0)
            network.save_pretrained(folder, model_card_kwargs={"network": name})
            uploads.append(hub.Upload("model", name, {path.name: path for path in folder.iterdir()}))
        if options.model is not None:
            files = cards.model_files(options.model)
            if "config.json" not in files or cards.CARD_FILE not in files:
                raise InputError(
                    "model", str(options.model), "holds no trained model with its card.", "Give the folder of a run."
                )
            uploads.append(hub.Upload("model", f"{options.repo}-model", files, replaces=cards.MODEL_FILES))
        addresses = hub.publish(uploads, "repo", options.overwrite, options.private or None)
    for upload, address in zip(uploads, addresses, strict=True):
        print(f"{upload.repo_type.capitalize()}: {address}")


def _result_uploads(folder: Path, repo_id: str, space: bool) -> list[hub.Upload]:
    """The dataset of a folder of results, and the Space of its report; a missing report is built first."""
    runs = load_runs([folder])
    report = folder / "report.html"
    if not report.is_file() or not (folder / REPORT_FILE).is_file():
        build_report(folder)
    again = f"Build it anew with `hf-alrs report {folder}`."
    try:
        summary = json.loads((folder / REPORT_FILE).read_text(encoding="utf-8"))
        card = cards.results_card(repo_id, summary, space).encode()
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError("results_dir", str(folder), f"its {REPORT_FILE} is no report ({error!r}).", again) from error
    if summary["plan"]["num_runs"] != len(runs):
        raise InputError(
            "results_dir",
            str(folder),
            f"holds {len(runs)} runs and a report of {summary['plan']['num_runs']}.",
            again,
        )
    failed, told = sum(not run.completed for run in runs), len(summary["failures"])
    if failed != told:
        rule = f"{failed} of its runs did not complete, and {told} of those of its report."
        raise InputError("results_dir", str(folder), rule, again)
    kept = [run.path for run in runs] + [folder / name for name in (REPORT_FILE, "report.md", "report.html")]
    kept += sorted((folder / "plots").glob("*.svg"))
    files: dict[str, Path | bytes] = {
        f"results/{path.relative_to(folder).as_posix()}": path for path in kept if path.is_file()
    }
    rows = cards.result_rows({run.path.name: run.record for run in runs})
    files[cards.RUNS_FILE] = cards.parquet_bytes(rows)
    files[cards.CARD_FILE] = card
    uploads = [hub.Upload("dataset", repo_id, files, replaces=("results/*", "data/*"))]
    if space:
        title = f"Learning-rate schedulers on {', '.join(summary['tasks'])}"
        page = {"index.html": report, cards.CARD_FILE: cards.space_card(repo_id, title).encode()}
        uploads.append(hub.Upload("space", repo_id, page))
    return uploads


def pull_command(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="hf-alrs pull", description="Fetch results that `hf-alrs publish` made, and the report of them."
    )
    parser.add_argument("repo", help="user/name of the dataset.")
    parser.add_argument("--output_dir", type=home_expanded, default=None, help="Default: outputs/hub/user/name.")
    parser.add_argument("--revision", default=None, help="Branch, tag or commit; the newest by default.")
    parser.add_argument(
        "--overwrite", action="store_true", help="Replace files here that differ, and remove other runs."
    )
    options = parser.parse_args(arguments)
    hub.check_repo_id("repo", options.repo)
    output_dir = options.output_dir or Path("outputs", "hub", *options.repo.split("/"))
    check_output_dir(output_dir)
    with tempfile.TemporaryDirectory(prefix="hf-alrs-") as scratch:
        names = hub.download(options.repo, "dataset", "results", Path(scratch), _RESULT_NAMES, options.revision)
        runs = load_runs([Path(scratch)])  # what is no result stays outside
        contents = {name: (Path(scratch) / name).read_bytes() for name in names}
    differing = [
        name
        for name, content in contents.items()
        if (output_dir / name).exists() and (output_dir / name).read_bytes() != content
    ]
    if differing and not options.overwrite:
        raise InputError(
            "output_dir",
            str(output_dir),
            f"holds {len(differing)} file(s) that differ from those on the Hub, such as {differing[0]}.",
            "Give another folder, or --overwrite to replace them.",
        )
    # Runs that have been withdrawn, and plots of them; in folders of these results alone
    for folder in {(output_dir / name).parent for name in contents} if options.overwrite else ():
        for path in (*folder.glob("*--*.json"), *(folder.glob("*.svg") if folder.name == "plots" else ())):
            if path.relative_to(output_dir).as_posix() not in contents:
                path.unlink()
    for name, content in contents.items():
        path = output_dir / name
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{path.name}.tmp")
        partial.write_bytes(content)
        partial.replace(path)
    print(f"{len(runs)} runs: {output_dir}")
