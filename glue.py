"""GLUE: download, check, read, score and submit. numpy and the standard library alone.

[1] Wang et al. 2018, GLUE   https://arxiv.org/abs/1804.07461   https://gluebenchmark.com
The files are raw TSV: cells are split at tabs alone and rows at "\\n" alone. A quote character in
them is just a character (csv.reader would merge rows of MRPC, QNLI, RTE and STS-B), and so is any
Unicode line separator (str.splitlines would cut rows at it). Data of your own is read alike.

    TASKS["RTE"].labels                     # ('entailment', 'not_entailment')
    read("RTE", "glue", "dev").texts[0]     # ('first sentence', 'second sentence')
    score("CoLA", [1, 0, 1], [1, 0, 0])     # {'matthews': 50.0, 'score': 50.0}

    python glue.py download MRPC RTE --data-dir glue
    python glue.py check glue
    python glue.py submit --predictions predictions --out submission.zip
"""

import argparse
import difflib
import hashlib
import http.client
import os
import re
import shutil
import sys
import urllib.error
import urllib.request
import zipfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

__all__ = [
    "METRICS", "TASKS", "Examples", "Task", "check", "download", "find_task", "own_task", "read",
    "score", "submit", "values",
]  # fmt: skip


@dataclass(frozen=True)
class Task:
    """A task: where its text and labels stand, and how it is scored (GLUE's: [1, table 1])."""

    name: str
    text: tuple[str, ...]  # header names of the one or two text columns
    label: str = "label"  # header name of the label column; '' where no file has labels
    labels: tuple[str, ...] = ()  # class names in the order of their ids; () is regression
    cells: tuple[str, ...] = ()  # the classes as the files and the server spell them, if otherwise
    metrics: tuple[str, ...] = ("accuracy",)  # keys of METRICS; their mean is the GLUE score
    splits: tuple[str, ...] = ("train", "dev", "test")  # file stems, the first dev is selected on
    rows: tuple[int, ...] = ()  # of the official file of each split
    bounds: tuple[float, float] = (-np.inf, np.inf)  # smallest and largest score
    folder: Path | None = None  # where the files are, if they are not GLUE's

    @property
    def regression(self) -> bool:
        """Scores in place of classes."""
        return not self.labels and bool(self.label)

    @property
    def pairs(self) -> bool:
        """Pairs of sentences in place of single ones."""
        return len(self.text) == 2

    @property
    def spelling(self) -> tuple[str, ...]:
        """The classes as the files spell them."""
        return self.cells or self.labels


class Examples(NamedTuple):
    """A split in file order; texts are what `tokenizers` takes as a batch."""

    texts: list[Any]  # n sentences, or n (first, second) pairs
    labels: np.ndarray | None  # (n,) int64 class ids or float64 scores; None where there are none

    @property
    def gold(self) -> np.ndarray:
        """The labels, (n,). Raises ValueError where there are none."""
        if self.labels is None:
            raise ValueError("these examples have no labels")
        return self.labels


_PAIR = ("sentence1", "sentence2")
_BINARY = ("0", "1")
_MNLI = ("train", "dev_matched", "dev_mismatched", "test_matched", "test_mismatched")
_NLI = ("entailment", "not_entailment")
TASKS = {
    task.name: task
    for task in (
        Task("CoLA", ("sentence",), labels=("unacceptable", "acceptable"), cells=_BINARY,
             metrics=("matthews",), rows=(8551, 1043, 1063)),
        Task("SST-2", ("sentence",), labels=("negative", "positive"), cells=_BINARY,
             rows=(67349, 872, 1821)),
        Task("MRPC", ("#1 String", "#2 String"), "Quality", ("not_equivalent", "equivalent"),
             _BINARY, ("accuracy", "f1"), rows=(3668, 408, 1725)),
        Task("QQP", ("question1", "question2"), "is_duplicate", ("not_duplicate", "duplicate"),
             _BINARY, ("accuracy", "f1"), rows=(363849, 40430, 390965)),
        Task("STS-B", _PAIR, "score", metrics=("pearson", "spearman"), rows=(5749, 1500, 1379),
             bounds=(0.0, 5.0)),
        Task("MNLI", _PAIR, "gold_label", ("entailment", "neutral", "contradiction"),
             splits=_MNLI, rows=(392702, 9815, 9832, 9796, 9847)),
        Task("QNLI", ("question", "sentence"), labels=_NLI, rows=(104743, 5463, 5463)),
        Task("RTE", _PAIR, labels=_NLI, rows=(2490, 277, 3000)),
        Task("WNLI", _PAIR, labels=("not_entailment", "entailment"), cells=_BINARY,
             rows=(635, 71, 146)),
        Task("AX", _PAIR, "", ("entailment", "neutral", "contradiction"), metrics=("matthews",),
             splits=("test",), rows=(1104,)),
    )
}  # fmt: skip
_MARKS = {  # columns that only one task has: they tell a file that lies in another's folder
    "pairID": "MNLI", "source1": "STS-B", "question": "QNLI", "question1": "QQP", "#1 ID": "MRPC"
}  # fmt: skip
_AX_PATHS = ("AX/diagnostic.tsv", "diagnostic/diagnostic.tsv", "MNLI/diagnostic.tsv", "AX/AX.tsv")


def find_task(name: str | Task, *, regression: bool = False, labels: Sequence[str] = ()) -> Task:
    """GLUE's task of that name, in any case and with or without its hyphen, or `own_task(name)`.

    A Task is returned as it is.
    Raises ValueError naming the nearest task for a name that is neither.
    """
    if isinstance(name, Task):
        return name
    official = official_name(name)
    if official and regression:
        raise ValueError(f"{official}: --regression is for data of your own")
    if official:
        return TASKS[official]
    if "/" in name or os.sep in name or Path(name).is_dir():
        return own_task(name, regression=regression, labels=labels)
    near = difflib.get_close_matches(_plain(name), map(_plain, TASKS), n=1, cutoff=0.0)
    raise ValueError(
        f"no task '{name}', did you mean {official_name(near[0])}? ({' '.join(TASKS)}, or a "
        "folder with train.tsv and dev.tsv)"
    )


def official_name(name: str) -> str:
    """GLUE's own spelling of a task's name, '' for what is none."""
    return {_plain(key): key for key in TASKS}.get(_plain(name), "")


def _plain(name: str) -> str:
    return name.replace("-", "").replace("_", "").lower()


def own_task(folder: str | Path, *, regression: bool = False, labels: Sequence[str] = ()) -> Task:
    """A task of your own: a folder with train.tsv and dev.tsv, and test.tsv if you like.

    Their headers name `sentence`, or `sentence1` and `sentence2`, and `label`, in any order and
    among others. The classes are the labels of train.tsv in sorted order, numbers by their value;
    regression takes every label for a score. Where there is no train.tsv, `labels` are the classes,
    a single one being a score.

    Raises FileNotFoundError where files are missing, ValueError for labels that cannot be learnt.
    """
    folder, regression = Path(folder), regression or len(labels) == 1
    name = folder.as_posix() if "/" in folder.as_posix() else f"./{folder}"
    found = [path for path in (folder / f"{s}.tsv" for s in Task.splits) if path.is_file()]
    if not found or (found[0].stem != "train" and not (labels or regression)):
        raise FileNotFoundError(
            f"{folder / 'train.tsv'}: no such file; data of your own is a folder with train.tsv "
            "and dev.tsv"
        )
    task = Task(name, (), labels=() if regression else tuple(labels), folder=folder)
    rows, header, lines = _rows(found[0], task, found[0].stem)
    forms = [form for form in (("sentence",), _PAIR) if set(form) <= set(header)]
    if len(forms) != 1:
        raise ValueError(
            f"{found[0]}:1: columns {', '.join(header)}; expected either 'sentence' or 'sentence1' "
            "and 'sentence2', and 'label'"
        )
    metrics = ("pearson", "spearman") if regression else ("accuracy", "macro_f1")
    task = replace(task, text=forms[0], metrics=metrics)
    if regression or found[0].stem != "train":
        return task
    (column,) = _columns(found[0], header, ["label"], "a train.tsv")
    return replace(task, labels=_classes([row[column] for row in rows], found[0], lines))


_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")  # would break a line


def _classes(cells: list[str], path: Path, lines: list[int]) -> tuple[str, ...]:
    """The classes that train.tsv names, sorted."""
    classes = sorted(set(cells), key=lambda cell: (_number(cell, np.inf), cell))
    if "" in classes:
        raise ValueError(f"{path}:{lines[cells.index('')]}: no label, expected a class or a number")
    if broken := [name for name in classes if _CONTROL.search(name)]:
        where = f"{path}:{lines[cells.index(broken[0])]}"
        raise ValueError(f"{where}: label {broken[0]!r}, expected no control characters")
    if len(classes) < 2:
        raise ValueError(f"{path}: every label is {classes[0]!r}, expected two classes or more")
    if len(classes) > 1024:
        raise ValueError(
            f"{path}: {len(classes)} different labels, expected at most 1024; --regression if "
            "they are scores"
        )
    return tuple(classes)


# --- reading -------------------------------------------------------------------------------------


def read(
    task: str | Task, data_dir: str | Path, split: str, *, with_labels: bool = True
) -> Examples:
    """One split of a task, from the official layout DATA_DIR/TASK/SPLIT.tsv or the task's folder.

    split: train, dev or test; for MNLI these mean the matched files, and dev_mismatched and
    test_mismatched are splits of their own. Labels are None in GLUE's test splits, in a test split
    of your own without a label column, and where with_labels is False, which does not look at them.

    Raises FileNotFoundError for a missing file and ValueError (`path:line: found, expected`) for
    anything in it that the task's format does not allow. Rows are never dropped, except that QQP's
    few short rows in train and dev are skipped and counted in one line on stderr.
    """
    task = find_task(task)
    path = _path(task, Path(data_dir), split)
    if not (task.folder or path.exists()):
        raise FileNotFoundError(
            f"{path}: no such file; GLUE's layout is DATA_DIR/TASK/SPLIT.tsv: "
            f"python glue.py download {task.name} --data-dir {data_dir}"
        )
    rows, header, lines = _rows(path, task, split)
    test = split.startswith("test")
    labelled = with_labels and (task.label in header if test and task.folder else not test)
    wanted = [*task.text, *([task.label] if labelled else [])]
    columns = _columns(path, header, wanted, f"{task.name}'s {split} file")
    for mark, owner in _MARKS.items() if not task.folder else ():
        if mark in header and owner != task.name:
            raise ValueError(f"{path}:1: column {mark!r} is {owner}'s, expected {task.name}'s file")
    picked = [[cells[c] for c in columns] for cells in rows]
    width = len(task.text)
    texts = [tuple(row[:width]) if width == 2 else row[0] for row in picked]
    if not labelled:
        return Examples(texts, None)
    return Examples(texts, _labels(task, [row[width] for row in picked], path, lines))


def _columns(path: Path, header: list[str], wanted: list[str], what: str) -> list[int]:
    """Where the wanted columns stand."""
    lacking = [name for name in wanted if name not in header]
    if lacking:
        raise ValueError(
            f"{path}:1: no column {', '.join(map(repr, lacking))} among {', '.join(header)}; "
            f"is this {what}?"
        )
    twice = [name for name in wanted if header.count(name) > 1]
    if twice:
        raise ValueError(f"{path}:1: two columns are called {twice[0]!r}, expected one")
    return [header.index(name) for name in wanted]


def _path(task: Task, data_dir: Path, split: str) -> Path:
    name = f"{split}_matched" if task.name == "MNLI" and split in ("dev", "test") else split
    if name not in task.splits:
        raise ValueError(f"{task.name} has no split '{split}'; it has {', '.join(task.splits)}")
    if task.folder:
        return task.folder / f"{name}.tsv"
    if task.name == "AX":
        found = [p for p in (data_dir / place for place in _AX_PATHS) if p.is_file()]
        return (found or [data_dir / _AX_PATHS[0]])[0]
    return data_dir / task.name / f"{name}.tsv"


def _rows(path: Path, task: Task, split: str) -> tuple[list[list[str]], list[str], list[int]]:
    """Rows as stripped cells, the column names, and the line number of each row."""
    lines = _lines(path)
    cells = [[cell.strip() for cell in line.split("\t")] for line in lines]
    if task.name == "CoLA" and not split.startswith("test"):  # the one file without a header
        header, first = ["source", "label", "mark", "sentence"], 1
    else:
        header, first = cells.pop(0), 2
    if not cells:
        raise ValueError(f"{path}: no rows in it, only a header; fetch the file again")
    numbers = range(first, first + len(cells))
    odd = [n for n, row in zip(numbers, cells) if len(row) != len(header)]
    if not odd:
        return cells, header, list(numbers)
    bad = [n for n in odd if task.name != "QQP" or len(cells[n - first]) > len(header)]
    if bad:
        row = cells[bad[0] - first]
        raise ValueError(
            f"{path}:{bad[0]}: {len(row)} tab-separated cells, expected {len(header)} "
            f"({', '.join(header)}); first cell is {row[0][:40]!r}"
        )
    if split.startswith("test"):  # a prediction is owed for every row: what is missing is empty
        print(f"{path}: {len(odd)} short rows read with empty cells", file=sys.stderr)
        return [row + [""] * (len(header) - len(row)) for row in cells], header, list(numbers)
    print(f"{path}: {len(odd)} short rows skipped, first at line {odd[0]}", file=sys.stderr)
    kept = [n for n in numbers if len(cells[n - first]) == len(header)]
    if not kept:
        raise ValueError(f"{path}: no rows of {len(header)} tab-separated cells in it")
    return [cells[n - first] for n in kept], header, kept


def _lines(path: Path) -> list[str]:
    """The lines of a UTF-8 file, blank ones at its end left out (one with a tab is a row)."""
    lines = _text(path).split("\n")
    while lines and not lines[-1].strip(" "):
        lines.pop()
    return lines


def _text(path: Path) -> str:
    if path.is_dir():
        raise ValueError(f"{path}: a folder, expected a TSV file")
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    raw = path.read_bytes()
    bare = raw[:1024].removeprefix(b"\xef\xbb\xbf").lstrip()
    if not bare and not raw[1024:].strip():
        raise ValueError(f"{path}: empty file; fetch it again")
    if bare.startswith(b"version https://git-lfs"):
        raise ValueError(f"{path}: a Git LFS pointer, not the data; run `git lfs pull`")
    if bare.lower().startswith((b"<!doctype", b"<html")):
        raise ValueError(f"{path}: an HTML page, not the data; the download went wrong")
    if b"\0" in raw:
        line = raw.count(b"\n", 0, raw.index(b"\0")) + 1
        raise ValueError(f"{path}:{line}: a NUL byte at offset {raw.index(0)}, expected UTF-8 text")
    try:
        return raw.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        offset = error.start + (3 if raw.startswith(b"\xef\xbb\xbf") else 0)
        line = raw.count(b"\n", 0, offset) + 1
        raise ValueError(
            f"{path}:{line}: byte 0x{raw[offset]:02x} at offset {offset} is not UTF-8"
        ) from None


def _labels(task: Task, cells: list[str], path: Path, lines: list[int]) -> np.ndarray:
    if task.regression:
        scores = np.array([_number(cell) for cell in cells])
        low, high = task.bounds
        bad = np.flatnonzero(~((scores >= low) & (scores <= high)))  # NaN is neither
        if len(bad):
            span = "" if high == np.inf else f", {low:g} to {high:g}"
            raise ValueError(
                f"{path}:{lines[bad[0]]}: score {cells[bad[0]][:40]!r}, expected a finite "
                f"number{span}"
            )
        return scores
    ids = {cell: index for index, cell in enumerate(task.spelling)}
    for line, cell in zip(lines, cells):
        if cell not in ids:
            shown = ", ".join(task.spelling[:8]) + (", ..." if len(ids) > 8 else "")
            raise ValueError(f"{path}:{line}: label {cell[:40]!r}, expected one of {shown}")
    return np.array([ids[cell] for cell in cells], dtype=np.int64)


def _number(cell: str, otherwise: float = np.nan) -> float:
    """A cell as a finite decimal number; float() alone would take '1_5', 'nan' and '\u0661'."""
    plain = re.fullmatch(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?", cell)
    number = float(cell) if plain else otherwise
    return number if np.isfinite(number) else otherwise


# --- scoring -------------------------------------------------------------------------------------


def accuracy(labels: np.ndarray, predictions: np.ndarray) -> float:
    """Share of equal entries, 0..1."""
    return float(np.mean(labels == predictions))


def f1(labels: np.ndarray, predictions: np.ndarray) -> float:
    """2 TP / (2 TP + FP + FN) of class 1, 0..1; 0 where that class occurs in neither."""
    hits = np.sum((labels == 1) & (predictions == 1))
    named = np.sum(labels == 1) + np.sum(predictions == 1)
    return float(2 * hits / named) if named else 0.0


def macro_f1(labels: np.ndarray, predictions: np.ndarray) -> float:
    """Mean of the F1 of every class that occurs on either side, 0..1."""
    t, p, hits = _class_counts(labels, predictions)
    return float(np.mean(2 * hits / (t + p)))


def _class_counts(
    labels: np.ndarray, predictions: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """How often each class is the label, the prediction, and both: (C,) each."""
    classes, flat = np.unique(np.concatenate([labels, predictions]), return_inverse=True)
    true, said = flat[: len(labels)], flat[len(labels) :]
    t, p, hits = (np.bincount(x, minlength=len(classes)) for x in (true, said, true[true == said]))
    return t, p, hits


def matthews(labels: np.ndarray, predictions: np.ndarray) -> float:
    """Correlation of two classifications (any number of classes), -1..1; 0 where one is constant.

    Gorodkin 2004, R_K from the confusion matrix's counts, in exact integers up to the root.
    """
    # as Python ints, which never overflow
    t, p, right = (x.astype(object) for x in _class_counts(labels, predictions))
    n, hits = len(labels), right.sum()
    spread = (n * n - (t * t).sum()) * (n * n - (p * p).sum())
    return float((hits * n - (t * p).sum()) / float(spread) ** 0.5) if spread else 0.0


def pearson(labels: np.ndarray, predictions: np.ndarray) -> float:
    """Linear correlation, -1..1; 0 where one side is constant or a value is not finite."""
    x, y = np.asarray(labels, np.float64), np.asarray(predictions, np.float64)
    if len(x) < 2 or not (np.isfinite(x).all() and np.isfinite(y).all()):
        return 0.0
    if (x == x[0]).all() or (y == y[0]).all():
        return 0.0
    x, y = _direction(x), _direction(y)
    return float(np.clip(x @ y, -1.0, 1.0))


def _direction(x: np.ndarray) -> np.ndarray:
    """x centred and of length 1; squares neither under- nor overflow, and no digit is lost."""
    x = np.ldexp(x, -np.frexp(np.abs(x).max())[1])  # a power of two: exact
    x = x - x.mean()
    x = x / np.abs(x).max()
    unit: np.ndarray = x / np.linalg.norm(x)
    return unit


def spearman(labels: np.ndarray, predictions: np.ndarray) -> float:
    """Pearson of the ranks, ties sharing their mean rank, -1..1."""
    if not (np.isfinite(labels).all() and np.isfinite(predictions).all()):
        return 0.0
    return pearson(_ranks(labels), _ranks(predictions))


def _ranks(values: np.ndarray) -> np.ndarray:
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)  # rank of the last of each run of equal values
    return (last - (counts - 1) / 2)[place]


METRICS: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {
    "accuracy": accuracy,
    "f1": f1,
    "macro_f1": macro_f1,
    "matthews": matthews,
    "pearson": pearson,
    "spearman": spearman,
}


def score(task: str | Task, labels: ArrayLike, predictions: ArrayLike) -> dict[str, float]:
    """Every metric of the task and `score`, their mean: GLUE's headline. All times 100.

    labels, predictions: (n,) class ids or scores. Raises ValueError where the lengths differ or
    are 0, for a metric of nothing is no number to print.
    """
    task = find_task(task)
    labels, predictions = np.asarray(labels), np.asarray(predictions)
    if labels.shape != predictions.shape or labels.ndim != 1 or not len(labels):
        raise ValueError(
            f"{task.name}: predictions of shape {predictions.shape} for labels of shape "
            f"{labels.shape}, expected two equal rows of at least one number"
        )
    result = {name: 100 * METRICS[name](labels, predictions) for name in task.metrics}
    return result | {"score": sum(result.values()) / len(result)}


def values(
    task: str | Task, predictions: Sequence[int] | Sequence[float] | np.ndarray
) -> list[str]:
    """Predictions (class ids or scores) as the GLUE server spells them; STS-B's clipped to 0..5.

    Raises ValueError for what is no class id, or a score that is no finite number.
    """
    task = find_task(task)
    if not task.regression:
        ids = np.asarray(predictions)
        if not np.isin(ids, np.arange(len(task.labels))).all():
            raise ValueError(
                f"{task.name}: predictions are not class ids 0 to {len(task.labels) - 1}"
            )
        return [task.spelling[int(p)] for p in ids]
    scores = np.asarray(predictions, np.float64)
    if not np.isfinite(scores).all():
        row = int(np.flatnonzero(~np.isfinite(scores))[0])
        raise ValueError(f"{task.name}: prediction {row} is {scores[row]}, expected a number")
    form = "{:.9g}" if task.folder else "{:.3f}"  # nine digits tell any two float32 apart
    return [form.format(p + 0.0) for p in np.clip(scores, *task.bounds)]  # + 0.0: no -0.000


# --- checking ------------------------------------------------------------------------------------


def check(folder: str | Path, *, regression: bool = False) -> bool:
    """Prints what each file of a GLUE folder holds; True where all of it is sound.

    folder: DATA_DIR, one task's folder in it, or a folder of your own data. Not sound are a file
    that `read` refuses, one with another number of rows than the official file, and a task's folder
    without one of its files. Tasks whose folder is missing are only listed. Raises ValueError where
    there is nothing.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder")
    absent = []
    if (name := folder.resolve().name) in TASKS:
        found, folder = [TASKS[name]], folder.resolve().parent
    elif any((folder / f"{split}.tsv").is_file() for split in Task.splits):
        try:
            found = [own_task(folder, regression=regression)]
        except (OSError, ValueError) as error:
            print(error)
            return False
    else:
        found = [task for task in TASKS.values() if _is_there(task, folder)]
        absent = [name for name, task in TASKS.items() if task not in found]
    if not found:
        raise ValueError(f"{folder}: no GLUE task in it, {' '.join(TASKS)}; a folder each")
    print(_row("task", "split", "rows", "official", "columns", "words", "in train", "labels"))
    sound = all([_check_task(task, folder) for task in found])
    if absent:
        print(f"not there: {' '.join(absent)}; python glue.py download {absent[0]} fetches one")
    return sound


def _is_there(task: Task, folder: Path) -> bool:
    paths = [_path(task, folder, split) for split in task.splits]
    return (folder / task.name).is_dir() or any(path.is_file() for path in paths)


def _row(*cells: object) -> str:
    widths = "{:8} {:16} {:>8} {:>8} {:>7} {:>6} {:>8}  {}"
    return widths.format(*map(str, cells)).rstrip()


def _check_task(task: Task, folder: Path) -> bool:
    """Prints the rows of a task's splits; True where they are sound."""
    sound, train = True, set()
    for split, official in zip(task.splits, task.rows or ("-",) * len(task.splits)):
        path = _path(task, folder, split)
        if task.folder and split == "test" and not path.is_file():
            continue
        try:
            texts, labels = read(task, folder, split)
        except (OSError, ValueError) as error:
            missing = isinstance(error, FileNotFoundError)
            print(_row(task.name, split, "missing" if missing else "broken", official, *"----"))
            if not missing:
                print(f"  {error}")
            sound = False
            continue
        known = sum(text in train for text in texts) if split.startswith("dev") else "-"
        if split == "train":
            train = set(texts)
        with path.open("rb") as file:
            columns = file.readline().count(b"\t") + 1
        words = max(len(" ".join([t] if isinstance(t, str) else t).split()) for t in texts)
        shown = _label_counts(task, labels)
        print(_row(task.name, split, len(texts), official, columns, words, known, shown))
        # how many of QQP's broken training rows are counted differs by 3 between sources
        slack = 3 if (task.name, split) == ("QQP", "train") else 0
        if isinstance(official, int) and abs(len(texts) - official) > slack:
            print(f"  {path}: {len(texts)} rows, expected the {official} of the official file")
            sound = False
    return sound


def _label_counts(task: Task, labels: np.ndarray | None) -> str:
    if labels is None:
        return "-"
    if task.regression:
        return f"{labels.min():g} to {labels.max():g}"
    counts = np.bincount(labels, minlength=len(task.labels))
    shown = " ".join(f"{name}:{n}" for name, n in zip(task.spelling[:6], counts))
    return shown + (f" and {len(counts) - 6} more" if len(counts) > 6 else "")


# --- downloading ---------------------------------------------------------------------------------

BASE_URL = "https://dl.fbaipublicfiles.com"
_SENTEVAL = "senteval/senteval_data/msr_paraphrase"
_SOURCES = {  # task: path below the base address, bytes, sha256 of the official file
    "CoLA": [("glue/data/CoLA.zip", 376971,
              "f212fcd832b8f7b435fb991f101abf89f96b933ab400603bf198960dfc32cbff")],
    "SST-2": [("glue/data/SST-2.zip", 7439277,
               "d67e16fb55739c1b32cdce9877596db1c127dc322d93c082281f64057c16deaa")],
    "MRPC": [(f"{_SENTEVAL}_train.txt", 1047044,
              "60a9b09084528f0673eedee2b69cb941920f0b8cd0eeccefc464a98768457f89"),
             (f"{_SENTEVAL}_test.txt", 441275,
              "a04e271090879aaba6423d65b94950c089298587d9c084bf9cd7439bd785f784"),
             ("glue/data/mrpc_dev_ids.tsv", 6222,
              "971d7767d81b997fd9060ade0ec23c4fc31cbb226a55d1bd4a1bac474eb81dc7")],
    "QQP": [("glue/data/QQP-clean.zip", 41696084,
             "40e7c862c04eb26ee04b67fd900e76c45c6ba8e6d8fab4f8f1f8072a1a3fbae0")],
    "STS-B": [("glue/data/STS-B.zip", 802872,
               "e60a6393de5a8b5b9bac5020a1554b54e3691f9d600b775bd131e613ac179c85")],
    "MNLI": [("glue/data/MNLI.zip", 312783507,
              "e7c1d896d26ed6caf700110645df426cc2d8ebf02a5ab743d5a5c68ac1c83633")],
    "QNLI": [("glue/data/QNLIv2.zip", 10627589,
              "e634e78627a29adaecd4f955359b22bf5e70f2cbd93b493f2d624138a0c0e5f5")],
    "RTE": [("glue/data/RTE.zip", 697150,
             "6bf86de103ecd335f3441bd43574d23fef87ecc695977a63b82d5efb206556ee")],
    "WNLI": [("glue/data/WNLI.zip", 28999,
              "ae0e8e4d16f4d46d4a0a566ec7ecceccfd3fbfaa4a7a4b4e02848c0f2561ac46")],
    "AX": [("glue/data/AX.tsv", 222257,
            "0e13510b1bb14436ff7e2ee82338f0efb0133ecf2e73507a697dc210db3f05fd")],
}  # fmt: skip


def download(
    task: str | Task,
    data_dir: str | Path,
    *,
    base_url: str = BASE_URL,
    overwrite: bool = False,
    timeout: float = 30.0,
) -> list[Path]:
    """Fetches a task's official files into DATA_DIR/TASK and returns the paths it wrote.

    Files that are there already stay as they are, unless overwrite. Nothing is unpacked whose size
    or sha256 is not the official one, and nothing but the split files is taken out of an archive.
    timeout: seconds without a byte after which a server is given up.

    Raises ValueError for what the server answered, OSError where it cannot be reached.
    """
    task = find_task(task)
    data_dir = Path(data_dir)
    wanted = {split: _path(task, data_dir, split) for split in task.splits}
    wanted = {split: path for split, path in wanted.items() if overwrite or not path.exists()}
    if not wanted:
        return []
    work = data_dir / f".{task.name}.part"  # gone at the end, whatever happens
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    try:
        sources = [work / Path(name).name for name, _, _ in _SOURCES[task.name]]
        for path, (name, size, sha256) in zip(sources, _SOURCES[task.name]):
            _fetch(f"{base_url.rstrip('/')}/{name}", path, size, sha256, timeout)
        for split in wanted:
            _make_split(task, split, sources, work / split)
        for split, path in wanted.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            os.replace(work / split, path)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return list(wanted.values())


def _fetch(url: str, path: Path, size: int, sha256: str, timeout: float) -> None:
    """One file of known size and sha256, its progress on stderr."""
    request = urllib.request.Request(url, headers={"User-Agent": "glue.py"})
    digest, done, live = hashlib.sha256(), 0, sys.stderr.isatty()
    try:
        with urllib.request.urlopen(request, timeout=timeout) as response, path.open("wb") as file:
            while done <= size and (block := response.read(1 << 16)):
                file.write(block)
                digest.update(block)
                done += len(block)
                if live:
                    shown = f"{path.name} {done / 1e6:.1f} of {size / 1e6:.1f} MB"
                    print(f"\r{shown}", end="", file=sys.stderr, flush=True)
    except TimeoutError:
        raise TimeoutError(f"{url}: nothing came for {timeout:g} s; try again later") from None
    except urllib.error.URLError as error:
        reason = " ".join(str(error.reason).split())
        if not isinstance(error, urllib.error.HTTPError):
            raise OSError(f"{url}: cannot be reached: {reason}") from None
        error.close()
        raise ValueError(
            f"{url}: the server answered {error.code} {reason}; --base-url names a mirror"
        ) from None
    except (http.client.HTTPException, ConnectionError) as error:
        raise OSError(f"{url}: the connection broke after {done} bytes: {error!r}") from None
    finally:
        if live:
            print(file=sys.stderr)
    if done != size:
        many = f"more than {size}" if done > size else str(done)
        raise ValueError(f"{url}: {many} bytes came, expected {size}: cut short, or another file")
    if digest.hexdigest() != sha256:
        raise ValueError(
            f"{url}: sha256 {digest.hexdigest()}, expected {sha256}: not the official file"
        )


def _make_split(task: Task, split: str, sources: list[Path], path: Path) -> None:
    """Writes one split file to path from what was fetched."""
    if task.name == "AX":
        shutil.copyfile(sources[0], path)
    elif task.name == "MRPC":
        path.write_bytes("".join(f"{line}\n" for line in _mrpc(split, *sources)).encode())
    else:
        _extract(sources[0], f"{task.name}/{split}.tsv", path)


def _mrpc(split: str, train: Path, test: Path, dev_ids: Path) -> list[str]:
    """GLUE's MRPC from Microsoft's files: dev is what dev_ids names; test loses its gold labels."""
    header, *rows = _lines(test if split == "test" else train)
    if split == "test":
        ungraded = [row.partition("\t")[2] for row in (header, *rows)]
        return ["\t".join(row) for row in zip(["index", *map(str, range(len(rows)))], ungraded)]
    ids = {tuple(line.split("\t")) for line in _lines(dev_ids)}
    in_dev = [tuple(row.split("\t")[1:3]) in ids for row in rows]
    return [header] + [row for row, inside in zip(rows, in_dev) if inside == (split == "dev")]


def _extract(archive: Path, name: str, path: Path) -> None:
    """One member of a zip to a path of our choice: the archive has no say in where it goes."""
    try:
        with zipfile.ZipFile(archive) as zipped:
            member = zipped.getinfo(name)
            if member.file_size > 1 << 30:  # the largest, MNLI's train.tsv, has half of that
                raise ValueError(f"{archive.name}: {name} unpacks to {member.file_size} bytes")
            with zipped.open(member) as source, path.open("wb") as target:
                shutil.copyfileobj(source, target)
    except KeyError:
        raise ValueError(f"{archive.name}: no {name} in it") from None
    except (zipfile.BadZipFile, zlib.error, RuntimeError, EOFError) as error:
        raise ValueError(f"{archive.name}: {name} cannot be unpacked: {error}") from None


# --- submitting ----------------------------------------------------------------------------------

SUBMISSION = {  # the server's file names: task and split
    "CoLA": ("CoLA", "test"), "SST-2": ("SST-2", "test"), "MRPC": ("MRPC", "test"),
    "STS-B": ("STS-B", "test"), "QQP": ("QQP", "test"), "MNLI-m": ("MNLI", "test_matched"),
    "MNLI-mm": ("MNLI", "test_mismatched"), "QNLI": ("QNLI", "test"), "RTE": ("RTE", "test"),
    "WNLI": ("WNLI", "test"), "AX": ("AX", "test"),
}  # fmt: skip


def submit(predictions: str | Path, out: str | Path) -> list[str]:
    """Packs the server's 11 TSVs into a zip and returns the names that a constant had to fill.

    predictions: folder with any of CoLA.tsv, SST-2.tsv, MRPC.tsv, STS-B.tsv, QQP.tsv, MNLI-m.tsv,
    MNLI-mm.tsv, QNLI.tsv, RTE.tsv, WNLI.tsv, AX.tsv: `index<TAB>prediction`, index from 0.

    Raises ValueError (`path:line: found, expected`) for another number of rows than the test split
    has, an index or value that the server would not take, a .tsv of another name, and an `out` that
    is there and no zip.
    """
    folder, out = Path(predictions), Path(out)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder")
    files = sorted(path for path in folder.iterdir() if path.suffix.lower() == ".tsv")
    lower = {name.lower(): name for name in SUBMISSION}
    for path in files:
        if path.name.removesuffix(".tsv") not in SUBMISSION:
            near = difflib.get_close_matches(path.stem.lower(), lower, n=1, cutoff=0.0)
            raise ValueError(f"{path}: no file of the server's; did you mean {lower[near[0]]}.tsv?")
    if not files:
        raise ValueError(f"{folder}: no predictions in it, expected {', '.join(SUBMISSION)}.tsv")
    if out.exists() and not (out.is_file() and (zipfile.is_zipfile(out) or not out.stat().st_size)):
        raise ValueError(f"{out}: is there and no zip; name another file")
    contents: dict[str, str] = {}
    filled: list[str] = []
    for name, (task_name, split) in SUBMISSION.items():
        task, path = TASKS[task_name], folder / f"{name}.tsv"
        rows = task.rows[task.splits.index(split)]
        if path in files:
            cells = _predictions(path, task, rows)
        else:
            cells, filled = values(task, [0]) * rows, [*filled, name]
        lines = [f"{index}\t{cell}\n" for index, cell in enumerate(cells)]
        contents[f"{name}.tsv"] = "index\tprediction\n" + "".join(lines)
    out = out.resolve()  # a link stays one
    out.parent.mkdir(parents=True, exist_ok=True)
    part = out.with_name(f".{out.name}.part")
    try:
        with zipfile.ZipFile(part, "w", zipfile.ZIP_DEFLATED) as zipped:
            for name, content in contents.items():
                zipped.writestr(zipfile.ZipInfo(name), content, zipfile.ZIP_DEFLATED)
        os.replace(part, out)
    finally:
        part.unlink(missing_ok=True)
    return filled


def _predictions(path: Path, task: Task, rows: int) -> list[str]:
    """The values of a prediction file as the server wants them."""
    header, *lines = _lines(path)
    if header.split("\t") != ["index", "prediction"]:
        raise ValueError(f"{path}:1: header {header[:40]!r}, expected 'index<TAB>prediction'")
    if len(lines) != rows:
        raise ValueError(f"{path}: {len(lines)} predictions, expected {rows}, one for each row")
    cells = []
    for index, line in enumerate(lines):
        number, _, cell = line.partition("\t")
        if number != str(index):
            raise ValueError(f"{path}:{index + 2}: index {number[:40]!r}, expected {index}")
        good = np.isfinite(_number(cell)) if task.regression else cell in task.spelling
        if not good:
            wanted = "a number" if task.regression else f"one of {', '.join(task.spelling)}"
            raise ValueError(f"{path}:{index + 2}: prediction {cell[:40]!r}, expected {wanted}")
        cells.append(cell)
    return values(task, [_number(cell) for cell in cells]) if task.regression else cells


# --- command line --------------------------------------------------------------------------------


def parser() -> argparse.ArgumentParser:
    """The three commands."""
    top = argparse.ArgumentParser(prog="glue.py", description="GLUE's files and submissions.")
    commands = top.add_subparsers(dest="command", required=True)

    def add(name: str, help: str, example: str) -> argparse.ArgumentParser:
        text = f"example: python glue.py {name} {example}"
        return commands.add_parser(name, help=help, description=help, epilog=text)

    sub = add("check", "what each file holds, and whether it is sound", "glue")
    sub.add_argument("folder", metavar="DIR", help="GLUE's folder, or one of your own data")
    sub.add_argument("--regression", action="store_true", help="the labels of your own are scores")
    sub = add("download", "fetch official files, checked by their sha256", "MRPC RTE")
    sub.add_argument("tasks", metavar="TASK", nargs="+", help=f"all, or of {' '.join(TASKS)}")
    sub.add_argument("--data-dir", default="glue", help="folder to write to [glue]")
    sub.add_argument("--base-url", default=BASE_URL, help=f"of a mirror [{BASE_URL}]")
    sub.add_argument("--overwrite", action="store_true", help="replace files that are there")
    sub.add_argument("--timeout", type=float, default=30.0, help="seconds without a byte [30]")
    sub = add("submit", "pack predictions for gluebenchmark.com", "--predictions predictions")
    sub.add_argument("--predictions", metavar="DIR", required=True, help="folder of TASK.tsv files")
    sub.add_argument("--out", default="submission.zip", help="zip to write [submission.zip]")
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; exit code 2 for a mistake, 1 for data that `check` finds unsound."""
    arguments = parser().parse_args(argv)
    run = {"check": _run_check, "download": _run_download, "submit": _run_submit}
    try:
        return run[arguments.command](arguments)
    except BrokenPipeError:  # `| head` has seen enough
        sys.stdout = open(os.devnull, "w")
        return 1
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def _run_check(arguments: argparse.Namespace) -> int:
    return 0 if check(arguments.folder, regression=arguments.regression) else 1


def _run_download(arguments: argparse.Namespace) -> int:
    if not 0 < arguments.timeout <= 3600:
        raise ValueError(f"--timeout is {arguments.timeout:g}, expected 0 to 3600 seconds")
    tasks = [find_task(name) for name in arguments.tasks if name != "all"]
    for task in tasks if "all" not in arguments.tasks else TASKS.values():
        if task.folder:
            raise ValueError(f"'{task.name}' is a folder, expected one of {' '.join(TASKS)}")
        written = download(
            task, arguments.data_dir, base_url=arguments.base_url,
            overwrite=arguments.overwrite, timeout=arguments.timeout,
        )  # fmt: skip
        named = ", ".join(map(str, written))
        print(f"{task.name}: wrote {named}" if written else f"{task.name}: already there")
    return 0


def _run_submit(arguments: argparse.Namespace) -> int:
    filled = submit(arguments.predictions, arguments.out)
    print(f"{arguments.out}: {len(SUBMISSION)} files for https://gluebenchmark.com")
    if filled:
        print(f"not attempted, filled with a constant: {' '.join(filled)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
