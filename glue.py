"""GLUE: the benchmark's files, its label names and its metrics. numpy and the standard library.

[1] Wang et al. 2018, GLUE   https://arxiv.org/abs/1804.07461   https://gluebenchmark.com
The files are raw TSV: cells are split at tabs alone and rows at "\\n" alone. A quote character in
them is just a character (csv.reader would merge rows of MRPC, QNLI, RTE and STS-B), and so is any
Unicode line separator (str.splitlines would cut rows at it).

    TASKS["RTE"].labels                     # ('entailment', 'not_entailment')
    read("RTE", "glue", "dev").texts[0]     # ('first sentence', 'second sentence')
    score("CoLA", [1, 0, 1], [1, 0, 0])     # {'matthews': 50.0, 'score': 50.0}
"""

import difflib
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

__all__ = ["METRICS", "TASKS", "Examples", "Task", "find_task", "read", "score", "values"]


@dataclass(frozen=True)
class Task:
    """One GLUE task: where its text and labels stand, and how it is scored [1, table 1]."""

    name: str
    text: tuple[str, ...]  # header names of the one or two text columns
    label: str = "label"  # header name of the label column; '' where no file has labels
    labels: tuple[str, ...] = ()  # class names in the order of their ids; () is regression
    cells: tuple[str, ...] = ()  # the classes as the files and the server spell them, if otherwise
    metrics: tuple[str, ...] = ("accuracy",)  # keys of METRICS; their mean is the GLUE score
    splits: tuple[str, ...] = ("train", "dev", "test")  # file stems, the first dev is selected on

    @property
    def regression(self) -> bool:
        """Scores in place of classes."""
        return not self.labels and bool(self.label)

    @property
    def spelling(self) -> tuple[str, ...]:
        """The classes as the files spell them."""
        return self.cells or self.labels


class Examples(NamedTuple):
    """A split in file order; texts are what `tokenizers` takes as a batch."""

    texts: list  # n sentences, or n (first, second) pairs
    labels: np.ndarray | None  # (n,) int64 class ids or float64 scores; None where there are none


_PAIR = ("sentence1", "sentence2")
_BINARY = ("0", "1")
_MNLI = ("train", "dev_matched", "dev_mismatched", "test_matched", "test_mismatched")
_NLI = ("entailment", "not_entailment")
TASKS = {
    task.name: task
    for task in (
        Task("CoLA", ("sentence",), labels=("unacceptable", "acceptable"), cells=_BINARY,
             metrics=("matthews",)),
        Task("SST-2", ("sentence",), labels=("negative", "positive"), cells=_BINARY),
        Task("MRPC", ("#1 String", "#2 String"), "Quality", ("not_equivalent", "equivalent"),
             _BINARY, ("accuracy", "f1")),
        Task("QQP", ("question1", "question2"), "is_duplicate", ("not_duplicate", "duplicate"),
             _BINARY, ("accuracy", "f1")),
        Task("STS-B", _PAIR, "score", metrics=("pearson", "spearman")),
        Task("MNLI", _PAIR, "gold_label", ("entailment", "neutral", "contradiction"),
             splits=_MNLI),
        Task("QNLI", ("question", "sentence"), labels=_NLI),
        Task("RTE", _PAIR, labels=_NLI),
        Task("WNLI", _PAIR, labels=("not_entailment", "entailment"), cells=_BINARY),
        Task("AX", _PAIR, "", ("entailment", "neutral", "contradiction"), metrics=("matthews",),
             splits=("test",)),
    )
}  # fmt: skip
_AX_PATHS = ("AX/diagnostic.tsv", "diagnostic/diagnostic.tsv", "MNLI/diagnostic.tsv", "AX/AX.tsv")


def find_task(name: str) -> Task:
    """The task of that name, in any case and with or without its hyphen.

    Raises ValueError naming the nearest task.
    """
    plain = {key.replace("-", "").lower(): key for key in TASKS}
    wanted = name.replace("-", "").replace("_", "").lower()
    if wanted in plain:
        return TASKS[plain[wanted]]
    near = difflib.get_close_matches(wanted, plain, n=1, cutoff=0.0)
    raise ValueError(f"no task '{name}', did you mean {plain[near[0]]}? ({' '.join(TASKS)})")


# --- reading -------------------------------------------------------------------------------------


def read(task: str | Task, data_dir: str | Path, split: str) -> Examples:
    """One split of a task from the official layout DATA_DIR/TASK/SPLIT.tsv.

    split: train, dev or test; for MNLI these mean the matched files, and dev_mismatched and
    test_mismatched are splits of their own. Labels are None in test splits.

    Raises FileNotFoundError for a missing file and ValueError (`path:line: found, expected`) for
    anything in it that the task's format does not allow. Rows are never dropped, except that QQP's
    few short rows in train and dev are skipped and counted in one line on stderr.
    """
    task = find_task(task) if isinstance(task, str) else task
    path = _path(task, Path(data_dir), split)
    rows, header, first = _rows(path, task, split)
    wanted = list(task.text) + ([] if split.startswith("test") else [task.label])
    lacking = [name for name in wanted if name not in header]
    if lacking:
        raise ValueError(
            f"{path}:1: no column {', '.join(map(repr, lacking))} among {', '.join(header)}; "
            f"is this {task.name}'s {split} file?"
        )
    columns = [header.index(name) for name in wanted]
    picked = [[cells[c] for c in columns] for cells in rows]
    width = len(task.text)
    texts = [tuple(row[:width]) if width == 2 else row[0] for row in picked]
    if split.startswith("test"):
        return Examples(texts, None)
    return Examples(texts, _labels(task, [row[width] for row in picked], path, first))


def _path(task: Task, data_dir: Path, split: str) -> Path:
    name = f"{split}_matched" if task.name == "MNLI" and split in ("dev", "test") else split
    if name not in task.splits:
        raise ValueError(f"{task.name} has no split '{split}'; it has {', '.join(task.splits)}")
    if task.name == "AX":
        found = [p for p in (data_dir / place for place in _AX_PATHS) if p.is_file()]
        return (found or [data_dir / _AX_PATHS[0]])[0]
    return data_dir / task.name / f"{name}.tsv"


def _rows(path: Path, task: Task, split: str) -> tuple[list[list[str]], list[str], list[int]]:
    """Rows as stripped cells, the column names, and the line number of each row."""
    lines = _text(path).split("\n")
    while lines and not lines[-1].strip():
        lines.pop()
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


def _text(path: Path) -> str:
    if path.is_dir():
        raise ValueError(f"{path}: a folder, expected a TSV file")
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; GLUE's layout is DATA_DIR/TASK/SPLIT.tsv")
    raw = path.read_bytes()
    if not raw.removeprefix(b"\xef\xbb\xbf").strip():
        raise ValueError(f"{path}: empty file; fetch it again")
    if raw.startswith(b"version https://git-lfs"):
        raise ValueError(f"{path}: a Git LFS pointer, not the data; run `git lfs pull`")
    if raw[:256].lstrip().lower().startswith((b"<!doctype", b"<html")):
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
        if not np.isfinite(scores).all():
            bad = int(np.flatnonzero(~np.isfinite(scores))[0])
            raise ValueError(f"{path}:{lines[bad]}: score {cells[bad]!r}, expected a finite number")
        return scores
    ids = {cell: index for index, cell in enumerate(task.spelling)}
    for line, cell in zip(lines, cells):
        if cell not in ids:
            raise ValueError(
                f"{path}:{line}: label {cell[:40]!r}, expected one of {', '.join(task.spelling)}"
            )
    return np.array([ids[cell] for cell in cells], dtype=np.int64)


def _number(cell: str) -> float:
    try:
        return float(cell)
    except ValueError:
        return float("nan")


# --- scoring -------------------------------------------------------------------------------------


def accuracy(labels: np.ndarray, predictions: np.ndarray) -> float:
    """Share of equal entries, 0..1."""
    return float(np.mean(labels == predictions))


def f1(labels: np.ndarray, predictions: np.ndarray) -> float:
    """2 TP / (2 TP + FP + FN) of class 1, 0..1; 0 where that class occurs in neither."""
    hits = np.sum((labels == 1) & (predictions == 1))
    named = np.sum(labels == 1) + np.sum(predictions == 1)
    return float(2 * hits / named) if named else 0.0


def matthews(labels: np.ndarray, predictions: np.ndarray) -> float:
    """Correlation of two classifications (any number of classes), -1..1; 0 where one is constant.

    Gorodkin 2004, R_K from the confusion matrix's counts, in exact integers up to the root.
    """
    classes, flat = np.unique(np.concatenate([labels, predictions]), return_inverse=True)
    true, said = flat[: len(labels)], flat[len(labels) :]
    t = np.bincount(true, minlength=len(classes)).astype(object)  # Python ints never overflow
    p = np.bincount(said, minlength=len(classes)).astype(object)
    n, hits = len(labels), int(np.sum(true == said))
    spread = (n * n - (t * t).sum()) * (n * n - (p * p).sum())
    return float((hits * n - (t * p).sum()) / float(spread) ** 0.5) if spread else 0.0


def pearson(labels: np.ndarray, predictions: np.ndarray) -> float:
    """Linear correlation, -1..1; 0 where one side is constant or a value is not finite."""
    x, y = np.asarray(labels, np.float64), np.asarray(predictions, np.float64)
    if len(x) < 2 or not (np.isfinite(x).all() and np.isfinite(y).all()):
        return 0.0
    if (x == x[0]).all() or (y == y[0]).all():
        return 0.0
    x, y = x / np.abs(x).max(), y / np.abs(y).max()  # squares neither under- nor overflow
    x, y = x - x.mean(), y - y.mean()
    x, y = x / np.linalg.norm(x), y / np.linalg.norm(y)
    return float(np.clip(x @ y, -1.0, 1.0))


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
    "matthews": matthews,
    "pearson": pearson,
    "spearman": spearman,
}


def score(task: str | Task, labels: ArrayLike, predictions: ArrayLike) -> dict[str, float]:
    """Every metric of the task and `score`, their mean: GLUE's headline. All times 100.

    labels, predictions: (n,) class ids or scores. Raises ValueError where the lengths differ or
    are 0, for a metric of nothing is no number to print.
    """
    task = find_task(task) if isinstance(task, str) else task
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
    """Predictions (class ids or scores) as the GLUE server spells them; scores clipped to 0..5."""
    task = find_task(task) if isinstance(task, str) else task
    if task.regression:
        return [f"{min(max(0.0, float(p)), 5.0):.3f}" for p in predictions]
    return [task.spelling[int(p)] for p in predictions]
