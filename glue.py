"""GLUE: download, check, read, score and submit. numpy and the standard library alone.

[1] Wang et al. 2018, GLUE   https://arxiv.org/abs/1804.07461   https://gluebenchmark.com
The files are raw TSV: cells are split at tabs alone and rows at "\\n" alone. A quote character in
them is just a character (csv.reader would merge rows of MRPC, QNLI, RTE and STS-B), and so is any
Unicode line separator (str.splitlines would cut rows at it). Data of your own is read alike.
"""

import argparse
import difflib
import functools
import hashlib
import http.client
import os
import re
import shutil
import sys
import urllib.request
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

__all__ = [
    "METRICS", "TASKS", "Examples", "Task", "check", "class_scores", "download", "find_task",
    "official_name", "own_task", "read", "score", "submit", "text_beside", "values",
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

    regression = property(lambda task: not task.labels and bool(task.label))  # scores, no classes
    pairs = property(lambda task: len(task.text) == 2)  # of sentences, in place of single ones
    form = property(lambda task: "pairs" if task.pairs else "single texts")
    spelling = property(lambda task: task.cells or task.labels)  # the classes as in the files


class Examples(NamedTuple):
    """A split in file order; texts are what `tokenizers` takes as a batch."""

    texts: list[Any]  # n sentences, or n (first, second) pairs
    labels: Any  # (n,) int64 class ids or float64 scores; None where there are none


_ONE = ("sentence",)
_PAIR = ("sentence1", "sentence2")
_NLI = ("entailment", "not_entailment")
_NLI3 = ("entailment", "neutral", "contradiction")
_MNLI = ("train", "dev_matched", "dev_mismatched", "test_matched", "test_mismatched")
_BINARY = ("0", "1")
TASKS = {task.name: task for task in (
    Task("CoLA", _ONE, labels=("unacceptable", "acceptable"), cells=_BINARY,
         metrics=("matthews",), rows=(8551, 1043, 1063)),
    Task("SST-2", _ONE, labels=("negative", "positive"), cells=_BINARY, rows=(67349, 872, 1821)),
    Task("MRPC", ("#1 String", "#2 String"), "Quality", ("not_equivalent", "equivalent"),
         _BINARY, ("accuracy", "f1"), rows=(3668, 408, 1725)),
    Task("QQP", ("question1", "question2"), "is_duplicate", ("not_duplicate", "duplicate"),
         _BINARY, ("accuracy", "f1"), rows=(363849, 40430, 390965)),
    Task("STS-B", _PAIR, "score", metrics=("pearson", "spearman"), rows=(5749, 1500, 1379),
         bounds=(0.0, 5.0)),
    Task("MNLI", _PAIR, "gold_label", _NLI3, splits=_MNLI, rows=(392702, 9815, 9832, 9796, 9847)),
    Task("QNLI", ("question", "sentence"), labels=_NLI, rows=(104743, 5463, 5463)),
    Task("RTE", _PAIR, labels=_NLI, rows=(2490, 277, 3000)),
    Task("WNLI", _PAIR, labels=_NLI[::-1], cells=_BINARY, rows=(635, 71, 146)),
    Task("AX", _PAIR, "", _NLI3, metrics=("matthews",), splits=("test",), rows=(1104,)),
)}  # fmt: skip
_OWN_FILES = ("train.tsv", "dev.tsv", "test.tsv", "train.csv")  # the last one only to be refused
_MARKS = {"pairID": "MNLI", "source1": "STS-B", "question": "QNLI"}  # columns of one task alone


def find_task(name: str | Task, *, regression: bool = False, labels: Sequence[str] = ()) -> Task:
    """GLUE's task of a name in any case, or `own_task`; ValueError with the nearest if neither."""
    if isinstance(name, Task):
        return name
    if official := official_name(name):
        if regression:
            raise ValueError(f"{official}: --regression is for data of your own")
        return TASKS[official]
    if "/" in name or os.sep in name or Path(name).exists():
        return own_task(name, regression=regression, labels=labels)
    near = difflib.get_close_matches(name.upper(), TASKS, n=1, cutoff=0.0)[0]
    raise ValueError(f"no task '{name}', did you mean {near}? ({' '.join(TASKS)}, or a folder)")


def official_name(name: str) -> str:
    """GLUE's own spelling of a task's name, '' for what is none."""
    plain = {re.sub("[-_]", "", task).lower(): task for task in TASKS}
    return plain.get(re.sub("[-_]", "", name).lower(), "")


def own_task(folder: str | Path, *, regression: bool = False, labels: Sequence[str] = ()) -> Task:
    """A task of your own: a folder with train.tsv and dev.tsv, and test.tsv if you like.

    Their headers name `sentence`, or `sentence1` and `sentence2`, and `label`, in any order and
    among others. The classes are the labels of train.tsv, sorted, numbers by their value; with
    regression they are scores. Without a train.tsv they are `labels`, a single one being a score.
    Raises FileNotFoundError or ValueError where something is missing, or nothing can be learnt.
    """
    folder, regression = Path(folder), regression or len(labels) == 1
    splits = Task.splits if regression or labels else ("train",)
    paths = [folder / f"{split}.tsv" for split in splits]
    path = next(filter(Path.is_file, paths), paths[0])
    csv = folder if folder.is_file() else folder / "train.csv"
    if not path.is_file():
        found = f"{folder}: a file" if folder.is_file() else f"{path}: no such file"
        told = f"{found}; data of your own is a folder with train.tsv and dev.tsv"
        raise FileNotFoundError(told + _if_csv(csv))
    name = folder.as_posix() if "/" in folder.as_posix() else f"./{folder}"
    lines, table = _table(path, name, path.stem)
    text = tuple(column for column in (*_ONE, *_PAIR) if column in table)
    if text not in (_ONE, _PAIR) or (path.stem == "train" and "label" not in table):
        expected = "expected label and sentence, or label, sentence1 and sentence2"
        raise ValueError(f"{path}:1: columns {', '.join(table)}; {expected}{_if_csv(path)}")
    if regression:
        return Task(name, text, metrics=("pearson", "spearman"), folder=folder)
    if path.stem == "train":
        labels = _classes(path, dict(zip(lines, table["label"])))
    return Task(name, text, labels=tuple(labels), metrics=("accuracy", "macro_f1"), folder=folder)


def _classes(path: Path, cells: dict[int, str]) -> list[str]:
    """The classes that train.tsv names, sorted; cells: the label of each line."""
    for line, cell in cells.items():
        if len(cell.splitlines()) != 1:  # predictions are written one a line
            raise ValueError(f"{path}:{line}: label {cell!r}, expected a class or number, one line")
    classes = sorted(set(cells.values()), key=lambda cell: (_number(cell), cell))
    if not 2 <= len(classes) <= 1024:
        raise ValueError(f"{path}: {len(classes)} labels, expected 2 to 1024; scores: --regression")
    lower = [name.lower() for name in classes]
    odd = [name for name in classes if name.lower() in _EMPTY or lower.count(name.lower()) > 1]
    if odd:
        lines = dict(zip(reversed(cells.values()), reversed(cells)))  # where each occurs first
        shown = ", ".join(f"{name!r} at line {lines[name]}" for name in odd[:8])
        _note(f"{path}: classes that look like empty cells or like each other: {shown}")
    return classes


_EMPTY = "nan none null nil n/a na #n/a ? - --".split()


@functools.cache
def _note(text: str) -> None:
    """Says something on stderr, once."""
    print(f"note: {text}", file=sys.stderr)


def _if_csv(path: Path) -> str:
    """How to make TSV of a file whose first line seems to be CSV; '' for another or none."""
    raw = path.read_bytes() if path.is_file() else b""
    line = raw.partition(b"\n")[0].decode("utf-8-sig", "replace")
    mark = max("\t;,", key=line.count)
    if mark not in line or (mark == "\t" and line[0] != '"'):
        return ""
    target, cells = path.with_suffix(".tsv"), '"\\t".join(" ".join(cell.split()) for cell in row)'
    target = target if target == path else path.with_name("train.tsv")
    return f"""; is this a CSV? Three lines of Python make TSV of it:
import csv
rows = list(csv.reader(open({str(path)!r}, encoding="utf-8-sig", newline=""), delimiter={mark!r}))
open({str(target)!r}, "w", encoding="utf-8").writelines({cells} + "\\n" for row in rows)"""


# --- reading -------------------------------------------------------------------------------------


def read(
    task: str | Task, data_dir: str | Path, split: str, *, with_labels: bool = True
) -> Examples:
    """One split of a task, from the official layout DATA_DIR/TASK/SPLIT.tsv or the task's folder.

    split: train, dev or test, MNLI's being the matched ones, or dev_mismatched, test_mismatched.
    Labels are None in GLUE's test splits, in your own without a column of them, and unasked.
    Without a dev.tsv of yours a tenth of train.tsv, chosen by a hash of the text, is dev.
    QQP's few short rows are skipped in train and dev, and counted on stderr; no other row is.
    Raises FileNotFoundError and ValueError (`path:line: found, expected`).
    """
    task, test = find_task(task), split.startswith("test")
    path = _path(task, Path(data_dir), split)
    if not path.exists():
        hint = "" if task.folder else f"; python glue.py download {task.name} --data-dir {data_dir}"
        raise FileNotFoundError(f"{path}: no such file{hint}")
    lines, table = _table(path, task.name, split)
    labelled = with_labels and (not test or bool(task.folder and task.label in table))
    for name in (*task.text, task.label) if labelled else task.text:
        if name not in table:
            told = f"expected one column {name!r} beside {', '.join(table)}"
            raise ValueError(f"{path}:1: {told}{_if_csv(path)}")
    for mark, owner in _MARKS.items():
        if mark in table and owner != task.name and not task.folder:
            raise ValueError(f"{path}:1: column {mark!r} is {owner}'s, expected {task.name}'s file")
    columns = [table[name] for name in task.text]
    texts = list(zip(*columns)) if task.pairs else list(columns[0])
    labels = _labels(task, path, dict(zip(lines, table[task.label]))) if labelled else None
    whole = Examples(texts, labels)
    return _own_part(path, split, lines, whole) if task.folder else whole


def _own_part(path: Path, split: str, lines: list[int], whole: Examples) -> Examples:
    """The rows of data of your own, where dev may share train.tsv; notes the first quoted text."""
    texts, labels = whole
    cells = (text if isinstance(text, str) else "\t".join(text) for text in texts)
    if quoted := [n for n, cell in zip(lines, cells) if re.search('(^|\t)".*"(\t|$)', cell)][:1]:
        _note(f"{path}:{quoted[0]}: a text in quotes, which are read as part of it")
    if path.stem != "train" or path.with_name("dev.tsv").exists():
        return whole
    held_out = lowest_hashes(texts, 1 + (len(texts) - 1) // 10)
    (rows,) = np.nonzero(held_out == (split == "dev"))
    _note(f"{path.parent} has no dev.tsv: a tenth of train.tsv, by a hash of the text, stands in")
    return Examples([texts[row] for row in rows], labels if labels is None else labels[rows])


def lowest_hashes(texts: Sequence[Any], count: int) -> np.ndarray:
    """Which texts, so many, have the lowest hashes; equal ones stay together: (n,) bool."""
    marks = [zlib.crc32(repr(text).encode(errors="backslashreplace")) for text in texts]
    return np.array(marks) <= sorted(marks)[count - 1]


def text_beside(task: str | Task, data_dir: str | Path) -> tuple[list[list[Any]], list[str]]:
    """Training texts of every other GLUE task in data_dir; sentences of the task's other splits."""
    task, data_dir = find_task(task), Path(data_dir)
    there = [name for name in TASKS if (data_dir / name / "train.tsv").is_file()]
    beside = [name for name in there if name != task.name]
    others = [read(name, data_dir, "train", with_labels=False).texts for name in beside]
    held_out: list[str] = []
    for split in task.splits:
        if split != "train" and _path(task, data_dir, split).exists():
            for text in read(task, data_dir, split, with_labels=False).texts:
                held_out += [text] if isinstance(text, str) else text
    return others, held_out


def _path(task: Task, data_dir: Path, split: str) -> Path:
    """Where a split is, or belongs."""
    name = f"{split}_matched" if task.name == "MNLI" and split in ("dev", "test") else split
    if name not in task.splits:
        raise ValueError(f"{task.name} has no split '{split}'; it has {', '.join(task.splits)}")
    if task.name == "AX":  # as the several download scripts put it
        places = ("AX/diagnostic", "diagnostic/diagnostic", "MNLI/diagnostic", "AX/AX")
        paths = [data_dir / f"{place}.tsv" for place in places]
        return next(filter(Path.is_file, paths), paths[0])
    path = (task.folder or data_dir / task.name) / f"{name}.tsv"
    train = path.with_name("train.tsv")  # which dev may have to share
    return train if task.folder and name == "dev" and not path.exists() and train.exists() else path


def _table(path: Path, task: str, split: str) -> tuple[list[int], dict[str, tuple[str, ...]]]:
    """Each row's line number; each column's stripped cells by its name, or by 'NAME twice'."""
    lines, test = _lines(path), split.startswith("test")
    rows = {n: [cell.strip() for cell in line.split("\t")] for n, line in enumerate(lines, 1)}
    bare = task == "CoLA" and not test  # the one file without a header
    header = ["source", "label", "mark", "sentence"] if bare else rows.pop(1)
    names = {name.lower() for name in header}
    cut = {}  # QQP's rows with too few cells, those filled up
    for n, cells in rows.items():
        if task == "QQP" and len(cells) < len(header):
            cut[n] = cells + [""] * (len(header) - len(cells))
        elif len(cells) != len(header):
            found = f"{len(cells)} tab-separated cells, the first {cells[0][:40]!r}"
            raise ValueError(f"{path}:{n}: {found}, expected {len(header)} ({', '.join(header)})")
        elif cells[0].lower() in names and len(names) > 1 and {*map(str.lower, cells)} == names:
            raise ValueError(f"{path}:{n}: the header again")
    if cut:
        done = "read with empty cells" if test else "skipped"  # each test row is owed an answer
        print(f"{path}: {len(cut)} short rows {done}, first at line {min(cut)}", file=sys.stderr)
        rows = {n: cut.get(n, cells) for n, cells in rows.items() if test or n not in cut}
    if not rows:
        raise ValueError(f"{path}: no rows below the header {', '.join(header)[:200]!r}")
    columns = [f"{name} twice" if header.count(name) > 1 else name for name in header]
    return list(rows), dict(zip(columns, zip(*rows.values())))


def _lines(path: Path) -> list[str]:
    """The lines of a UTF-8 file, blank ones at its end left out (one with a tab is a row)."""
    raw = path.read_bytes()
    if raw[:2] in (b"\xff\xfe", b"\xfe\xff") or raw[1:4:2] == bytes(2) or raw[:3:2] == bytes(2):
        how = "iconv -f UTF-16 -t UTF-8 converts it, Excel saves 'CSV UTF-8'"
        raise ValueError(f"{path}: UTF-16 text, expected UTF-8; {how}")
    try:
        text, bad = raw.decode().removeprefix("\ufeff"), raw.find(0)
    except UnicodeDecodeError as error:
        text, bad = "", error.start
    if bad >= 0:
        line = 1 + raw.count(b"\n", 0, bad)
        raise ValueError(f"{path}:{line}: byte 0x{raw[bad]:02x} at offset {bad} is no UTF-8 text")
    if re.match(r"\s*(<!doctype|<html|<\?xml|version https://git-lfs|$)", text, re.I):
        raise ValueError(f"{path}: an HTML page, a Git LFS pointer or empty: {text.strip()[:40]!r}")
    text = text.rstrip(" \r\n").replace("\r\n", "\n")
    return text.split("\n" if "\n" in text else "\r")  # an old Mac's lines end so


def _labels(task: Task, path: Path, cells: dict[int, str]) -> np.ndarray:
    """Class ids (n,) int64 or scores (n,) float64; cells: the label of each line."""
    ids = {cell: index for index, cell in enumerate(task.spelling)}
    found = [_number(cell) if task.regression else ids.get(cell, np.inf) for cell in cells.values()]
    low, high = task.bounds
    expected = f"one of {', '.join(task.spelling[:8])}{', ...' if len(ids) > 8 else ''}"
    expected = f"a finite number, {low:g} to {high:g}" if task.regression else expected
    for (line, cell), value in zip(cells.items(), found):
        if not low <= value <= high or np.isinf(value):
            raise ValueError(f"{path}:{line}: {task.label} {cell[:40]!r}, expected {expected}")
    return np.array(found, np.float64 if task.regression else np.int64)


def _number(cell: str) -> float:
    """A finite decimal number, or infinity; float() alone would take '1_5', 'nan' and '\u0661'."""
    plain = re.fullmatch(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?", cell)
    return float(cell) if plain else np.inf


# --- scoring -------------------------------------------------------------------------------------


def accuracy(labels: np.ndarray, predictions: np.ndarray) -> float:
    """Share of equal entries, 0..1."""
    return float(np.mean(labels == predictions))


def f1(labels: np.ndarray, predictions: np.ndarray, of: Any = 1) -> float:
    """2 TP / (2 TP + FP + FN) of a class, 0..1; 0 where it occurs on neither side."""
    true, said = labels == of, predictions == of
    return float(2 * np.sum(true & said) / max(1, np.sum(true) + np.sum(said)))


def macro_f1(labels: np.ndarray, predictions: np.ndarray) -> float:
    """Mean of the F1 of every class that occurs on either side, 0..1."""
    return float(np.mean([f1(labels, predictions, c) for c in np.union1d(labels, predictions)]))


def matthews(labels: np.ndarray, predictions: np.ndarray) -> float:
    """Gorodkin's R_K (2004), for any number of classes, -1..1; 0 where one side is constant."""
    classes = np.union1d(labels, predictions)[:, None]
    t, p = np.sum(labels == classes, axis=1), np.sum(predictions == classes, axis=1)  # (C,)
    n, hits = len(labels), np.sum(labels == predictions)
    spread = float(n * n - t @ t) * float(n * n - p @ p)  # in floats: n**4 overflows 64 bits
    return float(n * hits - t @ p) / spread**0.5 if spread else 0.0


def pearson(labels: np.ndarray, predictions: np.ndarray) -> float:
    """Linear correlation, -1..1; 0 where one side is constant or a value is not finite."""
    x = np.array([labels, predictions], np.float64)  # (2, n)
    if not np.isfinite(x).all() or (x == x[:, :1]).all(axis=1).any():
        return 0.0
    # by a power of two, which is exact: squares neither under- nor overflow, and no digit is lost
    x = np.ldexp(x, -np.frexp(np.abs(x).max(axis=1, keepdims=True))[1])
    x -= x.mean(axis=1, keepdims=True)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    return float(np.clip(x[0] @ x[1], -1.0, 1.0))


def spearman(labels: np.ndarray, predictions: np.ndarray) -> float:
    """Pearson of the ranks, ties sharing their mean rank, -1..1."""
    ranks = []
    for side in (labels, predictions):
        if not np.isfinite(side).all():
            return 0.0
        _, place, counts = np.unique(side, return_inverse=True, return_counts=True)
        ranks.append((np.cumsum(counts) - (counts - 1) / 2)[place])
    return pearson(*ranks)


def class_scores(
    task: str | Task, labels: ArrayLike, predictions: ArrayLike
) -> dict[str, dict[str, float]]:
    """Of each class precision, recall, F1, times 100, and its number of labels n; both (n,)."""
    found, labels, predictions = {}, np.asarray(labels), np.asarray(predictions)
    for c, name in enumerate(find_task(task).labels):
        hits, n = np.sum((labels == c) & (predictions == c)), int(np.sum(labels == c))
        precision = 100 * hits / max(1, np.sum(predictions == c))
        found[name] = {"precision": float(precision), "recall": float(100 * hits / max(1, n))}
        found[name] |= {"f1": 100 * f1(labels, predictions, c), "n": n}
    return found


METRICS = {f.__name__: f for f in (accuracy, f1, macro_f1, matthews, pearson, spearman)}


def score(task: str | Task, labels: ArrayLike, predictions: ArrayLike) -> dict[str, float]:
    """The task's metrics and `score`, their mean, times 100; ValueError for n = 0 or not (n,)."""
    task, labels, predictions = find_task(task), np.asarray(labels), np.asarray(predictions)
    if labels.shape != predictions.shape or labels.ndim != 1 or not len(labels):
        found = f"predictions of shape {predictions.shape} for labels of shape {labels.shape}"
        raise ValueError(f"{task.name}: {found}, expected two equal rows of one number or more")
    result = {name: 100 * METRICS[name](labels, predictions) for name in task.metrics}
    return result | {"score": sum(result.values()) / len(result)}


def values(task: str | Task, predictions: ArrayLike) -> list[str]:
    """Predictions, (n,) ids or scores, as the server spells them; ValueError for other numbers."""
    task, found = find_task(task), np.asarray(predictions, np.float64)
    good = np.isfinite(found) if task.regression else np.isin(found, range(len(task.labels)))
    if not good.all():
        expected = "finite numbers" if task.regression else f"class ids below {len(task.labels)}"
        raise ValueError(f"{task.name}: predictions {found[~good][:3]}, expected {expected}")
    if not task.regression:
        return [task.spelling[int(p)] for p in found]
    form = "{:.9g}" if task.folder else "{:.3f}"  # nine digits tell any two float32 apart
    return [form.format(p + 0.0) for p in np.clip(found, *task.bounds)]  # + 0.0: no -0.000


# --- checking, downloading, submitting -----------------------------------------------------------

_row = "{:8} {:16} {:>8} {:>8} {:>7} {:>6} {:>8}  {}".format


def check(folder: str | Path, *, regression: bool = False) -> bool:
    """Prints what each file of GLUE's folder, of one task's in it or of your own data holds.

    True where `read` takes all of it, with the official numbers of rows; raises where nothing is.
    """
    folder, tasks = Path(folder), list(TASKS.values())
    if (name := folder.resolve().name) in TASKS:
        folder, tasks = folder.resolve().parent, [TASKS[name]]
    elif folder.is_file() or any((folder / name).is_file() for name in _OWN_FILES):
        tasks = [own_task(folder, regression=regression)]
    there = [task for task in tasks if _path(task, folder, task.splits[0]).parent.is_dir()]
    if not there:
        found = "no GLUE task in it" if folder.is_dir() else "no such folder"
        raise FileNotFoundError(f"{folder}: {found}, expected one for each of {' '.join(TASKS)}")
    print(_row("task", "split", "rows", "official", "columns", "words", "in train", "labels"))
    sound = all([_check_task(task, folder) for task in there])
    if absent := [task.name for task in tasks if task not in there]:
        print(f"not there: {' '.join(absent)}; python glue.py download {absent[0]} fetches one")
    return sound


def _check_task(task: Task, folder: Path) -> bool:
    """Prints the rows of a task's splits; True where they are sound."""
    sound, train = True, set[Any]()
    for split, official in zip(task.splits, task.rows or (0, 0, 0)):
        path = _path(task, folder, split)
        if task.folder and split == "test" and not path.is_file():
            continue
        try:
            texts, labels = read(task, folder, split)
        except (OSError, ValueError) as error:
            what = "missing" if isinstance(error, FileNotFoundError) else "broken"
            print(f"{_row(task.name, split, what, official or '-', *'----')}\n  {error}")
            sound = False
            continue
        train = set(texts) if split == "train" else train
        known = sum(text in train for text in texts) if split.startswith("dev") else "-"
        columns = len(_lines(path)[0].split("\t"))
        words = max(len(" ".join([t] if isinstance(t, str) else t).split()) for t in texts)
        shown = "-" if labels is None else f"{labels.min():g} to {labels.max():g}"
        if labels is not None and not task.regression:
            counts = np.bincount(labels, minlength=len(task.labels))
            cells = [f"{name}:{count}" for name, count in zip(task.spelling, counts)]
            shown = " ".join(cells[:6]) + (f" and {len(cells) - 6} more" if len(cells) > 6 else "")
        print(_row(task.name, split, len(texts), official or "-", columns, words, known, shown))
        slack = 3 if (task.name, split) == ("QQP", "train") else 0  # counts of short rows differ
        if official and abs(len(texts) - official) > slack:
            print(f"  {path}: {len(texts)} rows, expected the {official} of the official file")
            sound = False
    return sound


_TIMEOUT = 30.0  # seconds that a server may be silent
BASE_URL = "https://dl.fbaipublicfiles.com"
_MSR = "senteval/senteval_data/msr_paraphrase"  # where MRPC_train.txt and MRPC_test.txt are
_SOURCES = {  # official files, below glue/data: bytes and sha256
    "CoLA.zip": (376971, "f212fcd832b8f7b435fb991f101abf89f96b933ab400603bf198960dfc32cbff"),
    "SST-2.zip": (7439277, "d67e16fb55739c1b32cdce9877596db1c127dc322d93c082281f64057c16deaa"),
    "MRPC_train.txt": (1047044, "60a9b09084528f0673eedee2b69cb941920f0b8cd0eeccefc464a98768457f89"),
    "MRPC_test.txt": (441275, "a04e271090879aaba6423d65b94950c089298587d9c084bf9cd7439bd785f784"),
    "mrpc_dev_ids.tsv": (6222, "971d7767d81b997fd9060ade0ec23c4fc31cbb226a55d1bd4a1bac474eb81dc7"),
    "QQP-clean.zip": (41696084, "40e7c862c04eb26ee04b67fd900e76c45c6ba8e6d8fab4f8f1f8072a1a3fbae0"),
    "STS-B.zip": (802872, "e60a6393de5a8b5b9bac5020a1554b54e3691f9d600b775bd131e613ac179c85"),
    "MNLI.zip": (312783507, "e7c1d896d26ed6caf700110645df426cc2d8ebf02a5ab743d5a5c68ac1c83633"),
    "QNLIv2.zip": (10627589, "e634e78627a29adaecd4f955359b22bf5e70f2cbd93b493f2d624138a0c0e5f5"),
    "RTE.zip": (697150, "6bf86de103ecd335f3441bd43574d23fef87ecc695977a63b82d5efb206556ee"),
    "WNLI.zip": (28999, "ae0e8e4d16f4d46d4a0a566ec7ecceccfd3fbfaa4a7a4b4e02848c0f2561ac46"),
    "AX.tsv": (222257, "0e13510b1bb14436ff7e2ee82338f0efb0133ecf2e73507a697dc210db3f05fd"),
}


def download(
    task: str | Task, data_dir: str | Path, *, base_url: str = BASE_URL, overwrite: bool = False
) -> list[Path]:
    """Fetches a task's official files into DATA_DIR/TASK and returns the paths it wrote.

    Files that are there stay, unless overwrite.
    Raises OSError where the server does not send a file, ValueError for one that is not official.
    """
    task, data_dir = find_task(task), Path(data_dir)
    if task.folder:
        raise ValueError(f"'{task.name}' is a folder, expected one of {' '.join(TASKS)}")
    paths = {split: _path(task, data_dir, split) for split in task.splits}
    wanted = {split: path for split, path in paths.items() if overwrite or not path.exists()}
    names = [name for name in _SOURCES if name.upper().startswith(task.name.upper()) and wanted]
    work = data_dir / f".{task.name}.part"  # gone at the end, whatever happens
    try:
        for name in names:
            url = f"{base_url.rstrip('/')}/glue/data/{name}".replace("glue/data/MRPC", _MSR)
            _fetch(url, work / name, *_SOURCES[name])
        for split in wanted:
            _make_split(task.name, split, [work / name for name in names], work / split)
        for split, path in wanted.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            os.replace(work / split, path)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return list(wanted.values())


def _fetch(url: str, path: Path, size: int, sha256: str) -> None:
    """One file of known size and sha256, its progress on stderr if that is a terminal."""
    request = urllib.request.Request(url, headers={"User-Agent": "glue.py"})
    path.parent.mkdir(parents=True, exist_ok=True)
    digest, done = hashlib.sha256(), 0
    try:
        with urllib.request.urlopen(request, timeout=_TIMEOUT) as response, path.open("wb") as file:
            while done <= size and (block := response.read(1 << 16)):
                file.write(block)
                digest.update(block)
                done += len(block)
                if sys.stderr.isatty():
                    print(f"{path.name} {done >> 20}/{size >> 20} MiB", end="\r", file=sys.stderr)
    except (OSError, http.client.HTTPException) as error:
        reason = f"{' '.join(str(error).split())} after {done} bytes"
        raise OSError(f"{url}: {reason}; try again later, or a mirror: --base-url") from None
    if digest.hexdigest() != sha256:
        found = f"{done} bytes of sha256 {digest.hexdigest()}, expected {size} of {sha256}"
        raise ValueError(f"{url}: {found}: cut short, or not the official file")


def _make_split(task: str, split: str, sources: list[Path], path: Path) -> None:
    """One split out of what was fetched: MRPC's dev as dev_ids says, its test without gold."""
    if task == "AX":
        shutil.copyfile(sources[0], path)
    elif task != "MRPC":  # to a path of our choice: the archive has no say in where a member goes
        with zipfile.ZipFile(sources[0]) as zipped, path.open("wb") as target:
            shutil.copyfileobj(zipped.open(f"{task}/{split}.tsv"), target)
    else:
        header, *rows = _lines(sources[1 if split == "test" else 0])
        if split == "test":
            rows = [f"{index}\t" + row.partition("\t")[2] for index, row in enumerate(rows)]
            header = header.replace("Quality", "index")
        else:
            ids, dev = set(_lines(sources[2])), split == "dev"
            rows = [row for row in rows if ("\t".join(row.split("\t")[1:3]) in ids) == dev]
        path.write_bytes("".join(f"{row}\n" for row in (header, *rows)).encode())


SUBMISSION = {name: (name, "test") for name in TASKS if name != "MNLI"}  # file: task and split
SUBMISSION |= {"MNLI-m": ("MNLI", "test_matched"), "MNLI-mm": ("MNLI", "test_mismatched")}


def submit(predictions: str | Path, out: str | Path) -> list[str]:
    """Packs the server's 11 TSVs into a zip and returns the names that a constant had to fill.

    predictions: a folder with any of SUBMISSION's TSVs: `index<TAB>prediction`, index from 0.
    Raises ValueError for what the server would not take, and an `out` that is there and no zip.
    """
    folder, out = Path(predictions), Path(out).resolve()  # a link stays one
    given = sorted(path.name for path in folder.glob("*.[tT][sS][vV]"))
    unknown = [name for name in given if name.removesuffix(".tsv") not in SUBMISSION]
    if unknown or not given:
        what = "no predictions in it" if folder.is_dir() else "no such folder"
        found = ", ".join(unknown) or what
        raise ValueError(f"{folder}: {found}, expected any of {', '.join(SUBMISSION)}.tsv")
    if out.exists() and not (out.is_file() and (zipfile.is_zipfile(out) or not out.stat().st_size)):
        raise ValueError(f"{out}: is there and no zip; name another file")
    out.parent.mkdir(parents=True, exist_ok=True)
    part = out.with_name(f".{out.name}.part")
    try:
        with zipfile.ZipFile(part, "w") as zipped:
            for name in SUBMISSION:
                rows = enumerate(_predictions(folder, name))
                content = "".join(f"{index}\t{cell}\n" for index, cell in rows)
                member = zipfile.ZipInfo(f"{name}.tsv")  # of 1980: the same bytes at any time
                zipped.writestr(member, f"index\tprediction\n{content}", zipfile.ZIP_DEFLATED)
        os.replace(part, out)
    finally:
        part.unlink(missing_ok=True)
    return [name for name in SUBMISSION if f"{name}.tsv" not in given]


def _predictions(folder: Path, name: str) -> list[str]:
    """The values of a prediction file, which is read as data of one's own, or else a constant."""
    task, path = TASKS[SUBMISSION[name][0]], folder / f"{name}.tsv"
    rows = task.rows[task.splits.index(SUBMISSION[name][1])]
    if not path.exists():
        return values(task, [0] * rows)
    own = Task("own", ("index",), "prediction", task.spelling, splits=(name,), folder=folder)
    indexes, found = read(own, folder, name)
    if len(indexes) != rows:
        raise ValueError(f"{path}: {len(indexes)} predictions, expected {rows}, one for each row")
    for row, index in enumerate(indexes):
        if index != str(row):
            raise ValueError(f"{path}:{row + 2}: index {index[:40]!r}, expected {row}")
    return values(task, np.asarray(found))


def parser() -> argparse.ArgumentParser:
    """The three commands."""
    top = argparse.ArgumentParser(prog="glue.py", description="GLUE's files and submissions.")
    add = top.add_subparsers(dest="command", required=True).add_parser
    usage = "example: python glue.py"
    sub = add("check", help="is every file there and sound?", epilog=f"{usage} check glue")
    sub.add_argument("folder", metavar="DIR", help="GLUE's folder, or one of your own data")
    sub.add_argument("--regression", action="store_true", help="the labels of your own are scores")
    sub = add("download", help="fetch official files", epilog=f"{usage} download MRPC RTE")
    sub.add_argument("tasks", metavar="TASK", nargs="+", help=f"all, or of {' '.join(TASKS)}")
    sub.add_argument("--data-dir", default="glue", help="folder to write to [glue]")
    sub.add_argument("--base-url", default=BASE_URL, help=f"of a mirror [{BASE_URL}]")
    sub.add_argument("--overwrite", action="store_true", help="replace files that are there")
    sub = add("submit", help="pack predictions", epilog=f"{usage} submit --predictions predictions")
    sub.add_argument("--predictions", metavar="DIR", required=True, help="folder of TASK.tsv files")
    sub.add_argument("--out", default="submission.zip", help="zip to write [submission.zip]")
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; exit code 2 for a mistake, 1 for data that `check` finds unsound."""
    options = vars(parser().parse_args(argv))
    command = options.pop("command")
    try:
        if command == "check":
            return 0 if check(**options) else 1
        if command == "submit":
            filled = " ".join(submit(**options))
            print(f"{options['out']}: {len(SUBMISSION)} files for https://gluebenchmark.com")
            print(f"not attempted, filled with a constant: {filled or 'none'}")
            return 0
        names = options.pop("tasks")
        tasks = [find_task(name) for name in names if name != "all"]
        for task in TASKS.values() if "all" in names else tasks:
            written = ", ".join(map(str, download(task, **options)))
            print(f"{task.name}: wrote {written}" if written else f"{task.name}: already there")
        return 0
    except BrokenPipeError:  # `| head` has seen enough
        sys.stdout = open(os.devnull, "w")
        return 1
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1 if command == "check" and isinstance(error, ValueError) else 2
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
