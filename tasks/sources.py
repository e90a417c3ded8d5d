"""
Where examples come from, and how they are divided: loading, columns, labels, and the disjoint seeded splits.

Every task goes through [`load_source`] and [`split_examples`], so a Hub id, a local folder, a single file and the
built-in sample behave alike from there on. Whatever cannot work raises `InputError` here, before any training.
"""

from __future__ import annotations

import csv
import difflib
import glob
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from datasets import ClassLabel, Dataset, DatasetDict, Value

from hf_alrs.experiment import DataArguments, InputError


SAMPLE = "sample"
FILE_FORMATS = {
    ".csv": "csv",
    ".tsv": "csv",
    ".json": "json",
    ".jsonl": "json",
    ".parquet": "parquet",
}
# Datasets mark the rows of an unlabelled split this way.
UNLABELLED = -1
# What `load_dataset` takes for the name of a split wherever it is a word of a path
SPLIT_WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
# Names that are splits by themselves: the same in any letter case and numbered, the parts of MNLI, and those of sets
_SPLIT_NAME = re.compile(
    r"(?:(?P<train>train(?:ing)?(?:[-_ ]?set)?)"
    r"|(?P<validation>validation|valid|val|dev)(?P<validation_part>_matched|_mismatched)?"
    r"|(?P<test>test(?:ing)?(?:[-_ ]?set)?|eval|evaluation)(?P<test_part>_matched|_mismatched)?)"
    r"(?:[-_. ]?\d+(?:-of-\d+)?(?:-[0-9a-f]{16})?)?",
    re.IGNORECASE,
)
_DATA_FILE = re.compile(
    r"(?P<stem>[^.].*?)(?P<suffix>\.(?:csv|tsv|json|jsonl|parquet))(?:\.(?:gz|bz2|xz|zst|lz4|zip))?", re.IGNORECASE
)
_IMAGES = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"}
_IMAGE_LISTS = {"metadata.csv", "metadata.jsonl", "metadata.parquet"}


@dataclass
class Source:
    """
    A dataset as loaded, before anything is selected from it.

    Args:
        splits (`dict[str, Dataset]`): Every split, by its own name.
        description (`str`): Where it came from, in words.
        label_names (`list[str]`, *optional*): Class names that the source knows although its features do not.
    """

    splits: dict[str, Dataset]
    description: str
    label_names: list[str] | None = None


@dataclass
class Part:
    """
    Some rows of one split of the source, with their labels.

    Args:
        rows (`Dataset`): The rows, with every column of the source.
        labels (`np.ndarray`, *optional*): Class indices (int64) or regression targets (float32); `None` if unlabelled.
        indices (`np.ndarray`): Each row's number in the split it came from, so that messages can name it.
        split (`str`): The name of that split.
    """

    rows: Dataset
    labels: np.ndarray | None
    indices: np.ndarray
    split: str

    def __len__(self) -> int:
        return len(self.indices)


@dataclass
class LabelledSplits:
    """The disjoint parts that a task trains and evaluates on, see [`split_examples`]."""

    train: Part
    controller: Part | None
    eval: Part
    predict: Part | None
    label_names: list[str] | None
    description: str
    notes: list[str] = field(default_factory=list)
    positive: int = 1  # class that the binary F1 is of

    def numbered_as(self, id2label: Mapping[int, str]) -> LabelledSplits:
        """
        Returns the splits with the classes numbered as a pretrained model numbers them, where it has the same classes by name
        (letter case aside): its head would take one for the other. Otherwise they stay as they are.

        Args:
            id2label (`Mapping[int, str]`): The entry of the model's config.
        """
        names = [str(name).lower() for name in self.label_names or ()]
        order = [str(id2label[number]).lower() for number in sorted(id2label)]
        if order == names or sorted(order) != sorted(names) or len(set(names)) < len(names):
            return self
        new = np.array([order.index(name) for name in names], dtype=np.int64)

        def numbered(part: Part | None) -> Part | None:
            return part if part is None or part.labels is None else replace(part, labels=new[part.labels])

        return replace(
            self,
            train=numbered(self.train),
            controller=numbered(self.controller),
            eval=numbered(self.eval),
            label_names=[self.label_names[old] for old in np.argsort(new)],
            positive=int(new[self.positive]),
        )


def nearest_match(name: str, candidates: Sequence[str]) -> str:
    """Returns ``", nearest is `x`"`` or an empty string, to end a sentence that lists the candidates."""
    found = difflib.get_close_matches(str(name), list(candidates), n=1, cutoff=0.5)
    return f"; the nearest is `{found[0]}`" if found else ""


def check_choice(field_name: str, value: str, choices: Sequence[str]) -> str:
    """Returns `value`, or raises `InputError` when it is not one of `choices`."""
    if value not in choices:
        raise InputError(
            field_name,
            value,
            f"must be one of {', '.join(choices)}{nearest_match(value, choices)}.",
            f"Give --{field_name} one of them.",
        )
    return value


def check_arguments(arguments: DataArguments) -> None:
    """Checks the numbers in `arguments` that every task reads."""
    for name in ("max_train_samples", "max_eval_samples", "max_seq_length"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise InputError(name, value, "must be at least 1.", f"Leave --{name} out to use everything.")
    if not 0 <= arguments.controller_split < 1:
        raise InputError(
            "controller_split",
            arguments.controller_split,
            "must be a share of train in [0, 1).",
            "The default is 0.1; 0 carves no controller split.",
        )
    if not 0 <= arguments.split_seed < 2**32:
        raise InputError(
            "split_seed", arguments.split_seed, "must be 0 to 2**32 - 1.", "Give for example --split_seed 0."
        )
    if arguments.num_folds < 2:
        raise InputError("num_folds", arguments.num_folds, "must be at least 2.", "The default is 5.")
    if arguments.fold is not None and not 0 <= arguments.fold < arguments.num_folds:
        raise InputError(
            "fold",
            arguments.fold,
            f"must lie between 0 and {arguments.num_folds - 1} when --num_folds is {arguments.num_folds}.",
            "Folds are counted from 0.",
        )


# --- loading -----------------------------------------------------------------------------------------------------


def load_source(
    arguments: DataArguments,
    hub_id: str,
    config_name: str | None = None,
    sample: Callable[[], Source] | None = None,
) -> Source:
    """
    Loads the dataset that `arguments` names.

    Args:
        arguments (`DataArguments`): `dataset_name` is a Hub id, a local folder or file, or `sample`.
        hub_id (`str`): What to load when `dataset_name` is not given.
        config_name (`str`, *optional*): Configuration of `hub_id`; not used for other sources unless they need one.
        sample (`Callable`, *optional*): Makes the built-in sample; a task without one refuses `sample`.

    Raises:
        InputError: If the source does not exist, cannot be reached, cannot be read, or holds nothing.
    """
    name = arguments.dataset_name or hub_id
    if name == SAMPLE:
        if sample is None:
            raise InputError(
                "dataset_name",
                name,
                f"there is no built-in sample for the task {arguments.task_name}.",
                "The tasks sst2, imdb, cifar10 and titanic have one; otherwise give a Hub id, a folder or a file.",
            )
        return sample()
    path = Path(name).expanduser()
    if path.exists():
        splits = _load_local(path, name, arguments.dataset_config_name, config_name)
        description = f"local {'folder' if path.is_dir() else 'file'} {name}"
    elif _looks_like_path(name):
        raise InputError(
            "dataset_name",
            name,
            "no such file or folder.",
            f"Check the path (it was looked up from {Path.cwd()}), or give a Hub id or `sample`.",
        )
    else:
        config = arguments.dataset_config_name or (config_name if name == hub_id else None)
        splits = _load_from_hub(name, config)
        description = f"Hub dataset {name}" + (f", configuration {config}" if config else "")
    if not splits or all(len(rows) == 0 for rows in splits.values()):
        raise InputError(
            "dataset_name", name, "holds no examples.", "Give a source that has rows, or --dataset_name sample."
        )
    return Source(splits=splits, description=description)


def _looks_like_path(name: str) -> bool:
    # A Hub id has at most one slash and no file extension that a loader knows.
    return name.startswith((".", "/", "~")) or name.count("/") > 1 or Path(name).suffix.lower() in FILE_FORMATS


def _load_local(path: Path, name: str, given_config: str | None, task_config: str | None) -> dict[str, Dataset]:
    from datasets import load_dataset, load_from_disk

    remedy = "Give a parquet, csv or json file, a folder of such files, or an image folder (one sub-folder a class)."
    if path.is_file():
        suffix = path.suffix.lower()
        if suffix not in FILE_FORMATS:
            raise InputError(
                "dataset_name", name, f"a file must end in one of {', '.join(FILE_FORMATS)}.", "Convert it first."
            )
        options = {"sep": "\t"} if suffix == ".tsv" else {}
        if options and _has_bare_quotes(path):
            options["quoting"] = csv.QUOTE_NONE
        attempts = [lambda: load_dataset(FILE_FORMATS[suffix], data_files={"train": str(path)}, **options)]
        data_files = None
    elif (path / "dataset_dict.json").exists() or (path / "state.json").exists():
        attempts = [lambda: load_from_disk(str(path))]
        data_files = None
    else:
        if not any(entry.is_file() for entry in path.rglob("*")):
            raise InputError("dataset_name", name, "the folder holds no data files.", remedy)
        data_files = _split_files(path)
        options = {}
        tables = [file for file in path.rglob("*") if _DATA_FILE.fullmatch(file.name) and file.is_file()]
        if {file.suffix.lower() for file in tables} == {".tsv"} and any(_has_bare_quotes(file) for file in tables):
            options["quoting"] = csv.QUOTE_NONE
        if given_config is not None or _says_its_files(path):
            attempts = [lambda: load_dataset(str(path), given_config, **options)]
        else:
            _refuse_classes_named_as_splits(path, name)
            attempts = [lambda: load_dataset(str(path), data_files=data_files, **options)]
        if given_config is None and task_config is not None:
            # A downloaded copy of the whole of GLUE has several configurations; a folder with one task has none.
            attempts.append(lambda: load_dataset(str(path), task_config, **options))
    error: Exception | None = None
    for attempt in attempts:
        try:
            loaded = attempt()
        except Exception as caught:
            error = error or caught
            continue
        return {"train": loaded} if isinstance(loaded, Dataset) else _labelled_images(data_files, dict(loaded))
    empty = _empty_file(path)
    if empty is not None:
        raise InputError(
            "dataset_name", name, f"its file {empty.name} is empty.", "Give it rows, or leave it out."
        ) from error
    raise InputError("dataset_name", name, f"cannot be read ({_first_line(error)}).", remedy) from error


def _split_files(path: Path) -> dict[str, list[str]] | None:
    """
    The files of each split of a folder, where its sub-folders or else its files are named as splits.

    `load_dataset` looks for the words of such names anywhere in a path, and only in lower case: it would take a class called
    test-tube for a part of the test split, and all of Train.csv and Test.csv for train. `None` leaves the folder to it.
    """
    if any((path / name).exists() for name in _IMAGE_LISTS):
        return None
    path = path.absolute()  # `load_dataset` looks for others in the folder
    folders = _filled_folders(path)
    if any(_split_name(folder.name) is None for folder in folders) and all(
        _holds_images(folder) and not _split_words(folder.name) for folder in folders
    ):
        return None  # classes, one of which is called Train
    files = sorted(entry for entry in path.iterdir() if entry.is_file() and _DATA_FILE.fullmatch(entry.name))
    inner = folders[0] if len(folders) == 1 and not files else None
    if inner is not None and not (
        _split_name(inner.name) or _split_words(inner.name) or any(path.glob("data/*-of-*"))
    ):
        return _split_files(inner)  # as archives unpack, into a folder of their name
    for entries, stem in (
        (folders, lambda entry: entry.name),
        (files, lambda entry: _DATA_FILE.match(entry.name)["stem"]),
    ):
        splits: dict[str, list[Path]] = {}
        for entry in entries:
            split = _split_name(stem(entry))
            if split is not None:
                splits.setdefault(split, []).append(entry)
            elif _split_words(stem(entry)):
                return None  # such as train_more.csv, which `load_dataset` adds to train
        if "train" in splits:
            return _data_files(splits)
        if any(
            _split_words(inner.name) for entry in entries for inner in (entry, *entry.rglob("*")) if inner.is_dir()
        ):
            return None  # `load_dataset` too looks at folders before files
    return None


def _refuse_classes_named_as_splits(path: Path, name: str) -> None:
    if any((path / name).exists() for name in _IMAGE_LISTS):
        return
    folders = _filled_folders(path)
    taken = [folder.name for folder in folders if _split_words(folder.name)]
    others = [folder.name for folder in folders if not _split_words(folder.name)]
    if taken and others and all(_holds_images(folder) for folder in folders):
        raise InputError(
            "dataset_name",
            name,
            f"a class is taken for a split by its name: images lie in the folder {taken[0]} as they do beside it in "
            f"{', '.join(others[:5])}.",
            "If it is a class, rename it, or put the folders of all classes into one called train; "
            "if it is a split, put folders of its classes into it.",
        )


def _filled_folders(path: Path) -> list[Path]:
    """The sub-folders that hold a file, without hidden ones and those that archives of a Mac have beside the data."""
    return sorted(
        entry
        for entry in path.iterdir()
        if entry.is_dir()
        and not entry.name.startswith((".", "__"))
        and any(file.is_file() for file in entry.rglob("*"))
    )


def _data_files(splits: Mapping[str, Sequence[Path]]) -> dict[str, list[str]]:
    """What `load_dataset` takes as `data_files`: of tables the files of their most frequent kind, else all that there is."""

    def kind(file: Path) -> str:
        found = _DATA_FILE.fullmatch(file.name)
        return FILE_FORMATS[found["suffix"].lower()] if found else file.suffix.lower()

    files = {
        split: [
            file
            for entry in entries
            for file in (sorted(entry.rglob("*")) if entry.is_dir() else [entry])
            if file.is_file() and not file.name.startswith(".")
        ]
        for split, entries in splits.items()
    }
    kinds = Counter(kind(file) for some in files.values() for file in some if file.name not in _IMAGE_LISTS)
    common = max(kinds, key=lambda key: (kinds[key], key), default="")
    tables = {
        split: [glob.escape(str(file)) for file in some if kind(file) == common] for split, some in files.items()
    }
    if common in FILE_FORMATS.values() and all(tables.values()):
        return tables
    return {
        split: [glob.escape(str(entry)) + ("/**" if entry.is_dir() else "") for entry in entries]
        for split, entries in splits.items()
    }


def _split_name(name: str) -> str | None:
    """The split that something is called by its whole name, as `load_dataset` calls splits."""
    found = _SPLIT_NAME.fullmatch(name)
    if found is None:
        return None
    split = next(split for split in SPLIT_WORDS if found[split])
    return split + (found.groupdict().get(f"{split}_part") or "").lower()


def _split_words(name: str) -> set[str]:
    """The words in a name that `load_dataset` takes for splits."""
    return set(re.split(r"[-._ 0-9]+", name)) & {word for words in SPLIT_WORDS.values() for word in words}


def _holds_images(folder: Path) -> bool:
    """Whether images lie in a folder as they do in that of a class: not in folders of its own, and without a list."""
    files = [entry.name.lower() for entry in folder.iterdir() if entry.is_file()]
    return any(Path(file).suffix in _IMAGES for file in files) and not _IMAGE_LISTS.intersection(files)


def _says_its_files(path: Path) -> bool:
    """Whether the head of a folder's README.md, or another file, tells `load_dataset` about the folder's files."""
    for name in ("README.md", ".huggingface.yaml"):
        file = path / name
        if file.is_file() and re.search(r"^(configs|dataset_info):", file.read_text("utf-8", errors="replace"), re.M):
            return True
    return (path / "dataset_infos.json").is_file()


def _labelled_images(data_files: dict[str, list[str]] | None, loaded: dict[str, Dataset]) -> dict[str, Dataset]:
    """
    The splits of a folder, read one by one where they are images without labels: `datasets` reads none from the names of folders
    if the images of any split, such as a test split to predict, are in no folder of a class.
    """
    from datasets import load_dataset

    if data_files is None or len(loaded) < 2 or any(rows.column_names != ["image"] for rows in loaded.values()):
        return loaded
    try:
        return {
            split: load_dataset("imagefolder", data_files={"train": files}, split="train")
            for split, files in data_files.items()
        }
    except Exception:  # of the many types that folders without images raise
        return loaded


def _has_bare_quotes(path: Path) -> bool:
    """Whether quotation marks are a part of the texts, as in most tables with tabs: some line has an odd number of them."""
    with path.open(encoding="utf-8", errors="replace") as lines:
        return any(line.count('"') % 2 for line in lines)


def _empty_file(path: Path) -> Path | None:
    """Finds a data file without rows, which `datasets` reports in as many words as there are formats."""
    import pyarrow
    from pyarrow.parquet import read_metadata

    for file in [path] if path.is_file() else sorted(path.rglob("*")):
        suffix = file.suffix.lower()
        if suffix not in FILE_FORMATS:
            continue
        if suffix == ".parquet":
            try:
                if read_metadata(file).num_rows == 0:
                    return file
            except (OSError, pyarrow.ArrowInvalid):
                continue
        else:
            with file.open(encoding="utf-8", errors="replace") as lines:
                filled = [line.strip() for _, line in zip(range(1000), lines, strict=False) if line.strip()]
            # The first line of a table names its columns.
            if len(filled) <= (1 if suffix in (".csv", ".tsv") else 0) or filled == ["[]"]:
                return file
    return None


def _load_from_hub(name: str, config: str | None) -> dict[str, Dataset]:
    from datasets import load_dataset
    from datasets.exceptions import DatasetNotFoundError

    try:
        loaded = load_dataset(name, config)
    except DatasetNotFoundError as error:
        raise InputError(
            "dataset_name",
            name,
            "is neither a file or folder here nor a dataset on the Hub that you can access.",
            "Check the spelling, log in if it is private, or give a local folder or `sample`.",
        ) from error
    except (OSError, RuntimeError) as error:
        # ConnectionError, OfflineModeIsEnabled and huggingface_hub's HTTP errors are all OSErrors; httpx's closed
        # client is a RuntimeError.
        raise InputError(
            "dataset_name",
            name,
            f"the Hugging Face Hub cannot be reached, and there is no cached copy ({_first_line(error)}).",
            "Give --dataset_name a local folder or file, or `sample` for the built-in offline sample.",
        ) from error
    except Exception as error:
        raise InputError(
            "dataset_name",
            name,
            f"cannot be loaded ({_first_line(error)}).",
            "Check --dataset_config_name, or give a local folder, a file or `sample`.",
        ) from error
    if not isinstance(loaded, DatasetDict):
        return {"train": loaded}
    return dict(loaded)


def _first_line(error: Exception | None) -> str:
    # `DatasetGenerationError` only says that something went wrong; what it was is its cause.
    if error is not None and type(error).__name__ == "DatasetGenerationError" and error.__cause__ is not None:
        error = error.__cause__
    lines = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    text = lines[0]
    if type(error).__name__ == "DatasetGenerationCastError" and len(lines) > 1:  # of files whose columns differ
        text = lines[1]
    elif (
        type(error).__name__ == "CastError"
    ):  # the same; between its first and last line are the columns and their types
        text = " ".join(lines)
    return f"{type(error).__name__}: {text[:200]}"


# --- columns and labels ------------------------------------------------------------------------------------------


def find_column(
    columns: Sequence[str], given: str | None, candidates: Sequence[str], field_name: str, required: bool = True
) -> str | None:
    """
    Finds the column to read.

    Args:
        columns (`Sequence[str]`): The columns there are.
        given (`str`, *optional*): What the user asked for; must exist.
        candidates (`Sequence[str]`): Usual names, the most likely first; letter case does not matter.
        field_name (`str`): The argument that gives the column, for the message.
        required (`bool`): Whether to raise rather than return `None` when no candidate is there.
    """
    if given is not None:
        if given in columns:
            return given
        raise InputError(
            field_name,
            given,
            f"there is no such column; there are {', '.join(columns)}{nearest_match(given, columns)}.",
            f"Give --{field_name} one of them.",
        )
    lowered = {column.lower(): column for column in reversed(list(columns))}
    for candidate in candidates:
        if candidate.lower() in lowered:
            return lowered[candidate.lower()]
    if not required:
        return None
    raise InputError(
        field_name,
        None,
        f"no column is called {' or '.join(candidates)}; there are {', '.join(columns)}.",
        f"Name the column with --{field_name}.",
    )


def class_names(rows: Dataset, column: str, known: Sequence[str] | None = None) -> list[str]:
    """
    Names the classes of a label column: the ClassLabel's own names where there is one, and a fallback where not.

    Plain parquet and CSV files carry bare integers, booleans or strings. Integers must be 0 to n-1, and take the names in
    `known` where the task has some (a part of its data may lack classes), else their own digits; strings are sorted.

    Args:
        rows (`Dataset`): The train split.
        column (`str`): The label column.
        known (`Sequence[str]`, *optional*): The task's own class names.

    Raises:
        InputError: If labels are lists or the like, neither text nor numbers, or whole numbers that do not begin at 0.
    """
    feature = rows.features[column]
    if not isinstance(feature, (Value, ClassLabel)):
        raise InputError(
            "label_column", column, "a label is one value, and this column holds several.", "Give another column."
        )
    if isinstance(feature, ClassLabel) and feature.names:
        return list(feature.names)
    values = [value for value in rows.unique(column) if not _is_missing(value)]
    if strange := [value for value in values if not isinstance(value, (str, int, float))]:
        raise InputError(
            "label_column",
            column,
            f"a label is a text or a whole number, and {strange[0]!r} is neither.",
            "Correct or drop such rows, or give another column.",
        )
    if values and all(isinstance(value, str) for value in values):
        if known is not None and {value.lower() for value in values} <= {name.lower() for name in known}:
            return list(known)
        return sorted(values)
    if known is not None:
        return list(known)
    fractions = [
        value for value in values if isinstance(value, float) and np.isfinite(value) and _whole(value) is None
    ]
    if len(fractions) > 1:  # a single one may be a mistake, and its row is told
        raise InputError(
            "label_column",
            column,
            f"its labels have fractions, such as {fractions[0]:g} and {fractions[1]:g}; a class is a text or a whole number.",
            "Give the column of the classes. Only the task stsb learns numbers, those from 0 to 5.",
        )
    whole = [number for value in values if (number := _whole(value)) is not None]
    numbers = [number for number in whole if number != UNLABELLED]
    # One class for every number up to the highest: numbers that are none of classes would make millions
    if numbers and (min(numbers) > 0 or max(numbers) > max(1000, 10 * len(numbers))):
        raise InputError(
            "label_column",
            column,
            f"its labels are {len(whole)} numbers from {min(whole)} to {max(whole)}; whole numbers must be 0 to n - 1"
            f"{f', and {UNLABELLED} marks a row without a label' if UNLABELLED in whole else ''}.",
            "Number the classes from 0, or write their names.",
        )
    return [str(number) for number in range(max(numbers, default=-1) + 1)]


def encode_labels(rows: Dataset, column: str, names: Sequence[str], split: str) -> np.ndarray:
    """
    Returns the labels of `rows` as class indices.

    Raises:
        InputError: If a label is missing or is not one of the classes; the message names the row.
    """
    values = rows.with_format(None)[column][:]
    own = getattr(rows.features[column], "names", None) or []
    known = {name.lower() for name in names}
    if own and list(own) != list(names) and any(name.lower() in known for name in own):
        # Encoded by itself: a split without one of the classes, or with one more, numbers the others differently
        values = [own[value] if value is not None and 0 <= value < len(own) else value for value in values]
    if any(isinstance(value, str) for value in values):
        index = {name: number for number, name in enumerate(names)}
        index.update({name.lower(): number for number, name in enumerate(names) if name.lower() not in index})
        encoded = [
            index.get(value, index.get(value.lower(), UNLABELLED)) if isinstance(value, str) else UNLABELLED
            for value in values
        ]
    else:
        encoded = [UNLABELLED if (number := _whole(value)) is None else number for value in values]
    labels = np.asarray(encoded, dtype=np.int64).reshape(-1)
    wrong = np.flatnonzero((labels < 0) | (labels >= len(names)))
    if len(wrong):
        row = int(wrong[0])
        if _is_missing(values[row]):
            raise InputError(
                column,
                None,
                f"row {row} of the {split} split has no label{_missing_rows(values)}.",
                "Fill or drop such rows, or name another column with --label_column.",
            )
        raise InputError(
            column,
            values[row],
            f"row {row} of the {split} split has a label outside the {len(names)} classes "
            f"0..{len(names) - 1} ({', '.join(list(names)[:10])}{', ...' if len(names) > 10 else ''}).",
            "Correct or drop such rows, or name another column with --label_column.",
        )
    return labels


def encode_targets(rows: Dataset, column: str, low: float, high: float, split: str) -> np.ndarray:
    """Returns the regression targets of `rows`; each must be a number in [`low`, `high`]."""
    values = rows.with_format(None)[column][:]
    try:
        targets = np.asarray([np.nan if value is None else float(value) for value in values], dtype=np.float32)
    except (TypeError, ValueError):
        targets = np.full(len(values), np.nan, dtype=np.float32)
    wrong = np.flatnonzero(~((targets >= low) & (targets <= high)))
    if len(wrong):
        row = int(wrong[0])
        raise InputError(
            column,
            values[row],
            f"row {row} of the {split} split has a target outside {low:g} to {high:g}.",
            "Correct or drop such rows, or name another column with --label_column.",
        )
    return targets


def _is_missing(value: Any) -> bool:
    return value is None or (isinstance(value, float) and np.isnan(value))


def _missing_rows(values: Sequence[Any]) -> str:
    """Ends a sentence on labels with how many are missing, if any are."""
    missing = sum(_is_missing(value) for value in values)
    if not missing:
        return ""
    return f"; {missing} of {len(values)} rows have none (of a CSV file, NA, None and the like are read as no value)"


def _whole(value: Any) -> int | None:
    """A label as a whole number, where it is one."""
    return int(value) if isinstance(value, (int, float)) and np.isfinite(value) and value == int(value) else None


# --- seeded, stratified choices ----------------------------------------------------------------------------------


def stratified_indices(labels: np.ndarray, size: int, seed: int) -> np.ndarray:
    """
    Chooses `size` of the examples so that each class keeps its share, with at least one of each.

    Args:
        labels (`np.ndarray`): Class of each example.
        size (`int`): How many to choose; at least the number of classes present.
        seed (`int`): Seed of the choice.

    Returns:
        `np.ndarray`: Their positions, sorted.
    """
    generator = np.random.default_rng(seed)
    classes, inverse, counts = np.unique(labels, return_inverse=True, return_counts=True)
    if size < len(classes):
        raise ValueError(f"{size} examples cannot hold {len(classes)} classes.")
    # Largest remainders, after one of each class is safe: the shares are right to within one example.
    exact = counts * (size / len(labels))
    taken = np.clip(np.floor(exact).astype(np.int64), 1, counts)
    order = np.argsort(-(exact - np.floor(exact)), kind="stable")
    while taken.sum() < size:
        for position in order:
            if taken[position] < counts[position] and taken.sum() < size:
                taken[position] += 1
    while taken.sum() > size:
        position = int(np.argmax(np.where(taken > 1, taken - exact, -np.inf)))
        taken[position] -= 1
    chosen = [
        generator.permutation(np.flatnonzero(inverse == number))[:count] for number, count in enumerate(taken.tolist())
    ]
    return np.sort(np.concatenate(chosen))


def strata(labels: np.ndarray, max_bins: int = 5) -> np.ndarray:
    """
    Returns what to stratify by: class labels as they are, real-valued targets cut into up to `max_bins` quantiles (of
    at least twenty examples, so that a small table is not refused for bins that nobody asked for).
    """
    if not np.issubdtype(labels.dtype, np.floating):
        return labels
    num_bins = max(1, min(max_bins, len(labels) // 20))
    edges = np.quantile(labels, np.linspace(0, 1, num_bins + 1)[1:-1])
    return np.searchsorted(np.unique(edges), labels, side="right")


def subset(part: Part, size: int | None, seed: int, field_name: str) -> Part:
    """Returns a stratified, seeded subset of `part`, or `part` itself when it is no larger than `size`."""
    if size is None or size >= len(part):
        return part
    groups = strata(part.labels)
    num_classes = len(np.unique(groups))
    if size < num_classes:
        raise InputError(
            field_name,
            size,
            f"is less than the {num_classes} classes, and a stratified subset holds at least one example of each.",
            f"Give --{field_name} {num_classes} or more.",
        )
    return take(part, stratified_indices(groups, size, seed))


def take(part: Part, positions: np.ndarray) -> Part:
    """Returns the rows of `part` at `positions`, in that order."""
    return Part(
        rows=part.rows.select(positions),
        labels=None if part.labels is None else part.labels[positions],
        indices=part.indices[positions],
        split=part.split,
    )


def carve_controller(part: Part, share: float, seed: int) -> tuple[Part, Part | None]:
    """
    Divides train into what is trained on and the controller's share, stratified and disjoint.

    Both come back in a seeded random order: sources sorted by class, as IMDB is, would otherwise show whoever reads
    only the first batches a single class.
    """
    generator = np.random.default_rng([seed, 1])
    if share == 0:
        return take(part, generator.permutation(len(part))), None
    groups = strata(part.labels)
    classes, counts = np.unique(groups, return_counts=True)
    size = round(share * len(part))
    if counts.min() < 2 or size < len(classes) or len(part) - size < len(classes):
        raise InputError(
            "controller_split",
            share,
            f"{len(part)} training examples ({counts.min()} in the rarest of {len(classes)} classes) are too few for "
            "a stratified split with every class in both parts.",
            "Use more training examples, another --controller_split, or 0 for none.",
        )
    chosen = stratified_indices(groups, size, seed)
    rest = np.setdiff1d(np.arange(len(part)), chosen)
    # One more class member may sit in the controller's share than train can spare when a class has only a few.
    if len(np.unique(groups[rest])) < len(classes):
        raise InputError(
            "controller_split", share, "would take every example of a class from train.", "Give a smaller share."
        )
    return take(part, generator.permutation(rest)), take(part, generator.permutation(chosen))


def hold_out_fold(part: Part, num_folds: int, fold: int, seed: int) -> tuple[Part, Part]:
    """Divides `part` into (the rest, fold number `fold`) by a shuffled, seeded, stratified k-fold."""
    from sklearn.model_selection import StratifiedKFold

    groups = strata(part.labels)
    _, counts = np.unique(groups, return_counts=True)
    if len(counts) < 2 and not np.issubdtype(part.labels.dtype, np.floating):
        raise InputError("label_column", int(groups[0]), "every example has the same label.", "Use data with two.")
    if counts.min() < num_folds:
        raise InputError(
            "num_folds",
            num_folds,
            f"the rarest class has {counts.min()} examples, too few for {num_folds} stratified folds.",
            "Give a smaller --num_folds, more examples, or a source with its own validation split.",
        )
    folds = StratifiedKFold(n_splits=num_folds, shuffle=True, random_state=seed)
    rest, held_out = list(folds.split(np.zeros(len(part)), groups))[fold]
    return take(part, rest), take(part, held_out)


# --- the splits of a task ----------------------------------------------------------------------------------------


def split_examples(
    arguments: DataArguments,
    source: Source,
    label_candidates: Sequence[str] = ("label", "labels", "target", "class", "y"),
    eval_names: Sequence[str] = ("validation", "valid", "val", "dev", "test"),
    predict_names: Sequence[str] = ("test",),
    label_names: Sequence[str] | None = None,
    target_range: tuple[float, float] | None = None,
) -> LabelledSplits:
    """
    Divides a source into train, controller, eval and predict: disjoint, stratified and seeded by `split_seed`.

    The eval part is the first labelled split among `eval_names`; a source without one gives up a fold of train. The
    controller's part is carved from train. `max_train_samples` applies before it is carved.

    Args:
        arguments (`DataArguments`): Subset sizes, shares, folds and the seed.
        source (`Source`): What [`load_source`] returned.
        label_candidates (`Sequence[str]`): Names the label column may have.
        eval_names (`Sequence[str]`): Splits to evaluate on, the preferred first.
        predict_names (`Sequence[str]`): Splits without labels to predict.
        label_names (`Sequence[str]`, *optional*): The task's own class names, for labels that come as bare integers.
        target_range (`tuple[float, float]`, *optional*): For regression: the range of the target.
    """
    splits = source.splits
    if "train" not in splits:
        if len(splits) > 1:
            raise InputError(
                "dataset_name",
                arguments.dataset_name,
                f"has no split called train; there are {', '.join(splits)}.",
                "Rename the split that is to be trained on.",
            )
        splits = {"train": next(iter(splits.values()))}
    train_rows = splits["train"]
    _require_rows(arguments, "train", train_rows)
    column = find_column(train_rows.column_names, arguments.label_column, label_candidates, "label_column")

    names = None
    if target_range is None:
        names = class_names(train_rows, column, source.label_names or label_names)
        if len(names) < 2:
            missing = _missing_rows(train_rows.with_format(None)[column][:])
            raise InputError(
                "label_column",
                column,
                f"holds {len(names)} class{'' if len(names) else 'es'}, and two are needed{missing}.",
                "Name another column.",
            )

    def labelled(split: str, rows: Dataset) -> Part:
        if target_range is None:
            labels = encode_labels(rows, column, names, split)
        else:
            labels = encode_targets(rows, column, *target_range, split)
        return Part(rows=rows, labels=labels, indices=np.arange(len(rows)), split=split)

    train = labelled("train", train_rows)
    notes = []
    evaluation = None
    for name in eval_names:
        if name in splits:
            _require_rows(arguments, name, splits[name])
            if not _is_unlabelled(splits[name], column):
                evaluation = labelled(name, splits[name])
                break
    if evaluation is None:
        fold = arguments.fold or 0
        train, evaluation = hold_out_fold(train, arguments.num_folds, fold, arguments.split_seed)
        notes.append(f"eval is fold {fold} of {arguments.num_folds} held out of train")
    if names is not None and len(np.unique(train.labels)) < 2:
        raise InputError(
            "label_column", column, "every training example has the same label.", "Use data with two classes or more."
        )
    predict = None
    for name in predict_names:
        if name in splits and name != evaluation.split and _is_unlabelled(splits[name], column):
            rows = splits[name]
            predict = Part(rows=rows, labels=None, indices=np.arange(len(rows)), split=name)
            break

    train = subset(train, arguments.max_train_samples, arguments.split_seed, "max_train_samples")
    evaluation = subset(evaluation, arguments.max_eval_samples, arguments.split_seed, "max_eval_samples")
    train, controller = carve_controller(train, arguments.controller_split, arguments.split_seed)
    description = "; ".join([source.description, *notes])
    return LabelledSplits(train, controller, evaluation, predict, names, description, notes)


def _require_rows(arguments: DataArguments, split: str, rows: Dataset) -> None:
    if len(rows) == 0:
        raise InputError(
            "dataset_name",
            arguments.dataset_name,
            f"its {split} split is empty.",
            "Give a source with rows in that split, or leave the split out.",
        )


def _is_unlabelled(rows: Dataset, column: str) -> bool:
    if column not in rows.column_names:
        return True
    return all(_is_missing(value) or value == UNLABELLED for value in rows.unique(column))
