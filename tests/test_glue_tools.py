"""glue.py's data of your own, text beside a task, and commands: check, download, submit."""

import contextlib
import hashlib
import http.client
import io
import os
import stat
import subprocess
import sys
import threading
import time
import zipfile
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from test_glue import REAL, put, real

import glue


def run(*arguments):
    """The exit code of a command."""
    return glue.main([str(argument) for argument in arguments])


def refused(capsys, code, *needles):
    """Exit code 2 and one line on stderr that holds every needle."""
    error = capsys.readouterr().err
    assert code == 2 and error.startswith("error: ") and error.count("\n") == 1, error
    assert all(str(needle) in error for needle in needles), error


# --- data of your own ----------------------------------------------------------------------------


def own(folder, train, dev=None, test=None, header="sentence|label"):
    """A folder of data; each split its rows."""
    for split, rows in (("train", train), ("dev", dev), ("test", test)):
        if rows is not None:
            put(folder / f"{split}.tsv", "\n".join([header, *rows]) + "\n")
    return folder


def test_columns_are_found_by_name(tmp_path):
    """Catches columns by position, an order taken over from train, quotes that are parsed, pairs in
    the order of the columns, and labels of a test split thrown away."""
    put(tmp_path / "train.tsv", 'label|note|sentence\nham|x|say "hi\nspam|y|buy now\n')
    put(tmp_path / "dev.tsv", "sentence|label\ngood day|ham\n")
    put(tmp_path / "test.tsv", "id|sentence\n7|so long\n")
    task = glue.find_task(str(tmp_path))
    assert (task.text, task.labels) == (("sentence",), ("ham", "spam"))
    assert task.metrics == ("accuracy", "macro_f1")
    train, dev, test = (glue.read(task, "nowhere", split) for split in task.splits)
    assert train.texts == ['say "hi', "buy now"] and train.labels.tolist() == [0, 1]
    assert (dev.texts, dev.labels.tolist()) == (["good day"], [0])
    assert (test.texts, test.labels) == (["so long"], None)
    header = "sentence2|label|sentence1"
    own(tmp_path, ["B|no|A", "D|yes|C"], ["F|yes|E"], ["H|no|G"], header)
    task = glue.own_task(tmp_path)
    assert glue.read(task, "", "train").texts == [("A", "B"), ("C", "D")]
    test = glue.read(task, "", "test")
    assert (test.texts, test.labels.tolist()) == ([("G", "H")], [0])
    assert glue.read(task, "", "test", with_labels=False).labels is None


def test_classes_are_sorted_numbers_by_value(tmp_path):
    """Catches ids that depend on the order of the rows, and '10' before '2'."""
    rows = [f"t|{label}" for label in ("10", "2", "b", "-1", "a", "2.5", "nan", "2")]
    task = glue.own_task(own(tmp_path, rows))
    assert task.labels == ("-1", "2", "2.5", "10", "a", "b", "nan")
    assert glue.values(task, [3, 0]) == ["10", "-1"]
    many = own(tmp_path / "many", [f"t|class {i}" for i in range(200)])
    assert len(glue.own_task(many).labels) == 200
    assert len(glue.own_task(own(many, [f"t|{i}" for i in range(1024)])).labels) == 1024


def test_scores_of_your_own(tmp_path):
    """Catches scores held to GLUE's 0..5, rounded to its three digits, or class metrics."""
    task = glue.own_task(own(tmp_path, ["a|-40", "b|1e3", "c|.25"], []), regression=True)
    assert task.regression and task.metrics == ("pearson", "spearman")
    assert glue.read(task, "", "train").labels.tolist() == [-40.0, 1000.0, 0.25]
    assert glue.values(task, [-40.25, 1234.5]) == ["-40.25", "1234.5"]
    assert glue.values(task, [1965.125, 1965.25]) == ["1965.125", "1965.25"]


def test_a_checkpoint_names_the_classes_where_there_is_no_train(tmp_path):
    """Catches predict that needs the training file."""
    own(tmp_path, None, ["x|b"])
    task = glue.own_task(tmp_path, labels=("b", "a"))
    assert task.labels == ("b", "a") and glue.read(task, "", "dev").labels.tolist() == [0]
    assert glue.own_task(own(tmp_path / "s", None, ["x|3"]), labels=("score",)).regression
    assert glue.own_task(tmp_path / "s", regression=True).regression
    own(tmp_path, ["x|c", "y|b"])  # where it is, it decides
    assert glue.own_task(tmp_path, labels=("b", "a")).labels == ("b", "c")


OWN_BROKEN = [  # header, rows of train, rows of dev, regression, the message after the folder
    ("text|label", ["a|0", "b|1"], None, False, "train.tsv:1: columns text, label"),
    ("sentence|sentence1|sentence2|label", ["a|b|c|0"], None, False, "train.tsv:1: columns"),
    ("sentence|class", ["a|0", "b|1"], None, False, "train.tsv:1: columns sentence, class; exp"),
    ("sentence|label|label", ["a|0|0", "b|1|1"], None, False, "train.tsv:1: columns sentence, lab"),
    ("sentence|label", ["a|0", "b|"], None, False, "train.tsv:3: label ''"),
    ("sentence|label", ["a|0", "b|c\u2028d"], None, False, "train.tsv:3: label 'c\\u2028d'"),
    ("sentence|label", ["a|0", "b|0"], None, False, "train.tsv: 1 labels, expected 2 to 1024"),
    ("sentence|label", [f"a|{i}" for i in range(1025)], None, False,
     "train.tsv: 1025 labels, expected 2 to 1024; scores: --regression"),
    ("sentence|label", ["a|0", "b|1"], ["c|2"], False, "dev.tsv:2: label '2', expected one"),
    ("sentence|label", ["a|1", "b|two"], None, True, "train.tsv:3: label 'two', expected a finite"),
    *[("sentence|label", ["a|1", f"b|{bad}"], None, True, f"train.tsv:3: label '{bad}'")
      for bad in ("", "nan", "inf", "1_5", "1e999", "\u0661")],
    ("sentence|label", ["a|0", "b"], None, False, "train.tsv:3: 1 tab-separated cells"),
]  # fmt: skip


@pytest.mark.parametrize(
    "header, train, dev, regression, message", OWN_BROKEN, ids=[row[-1][:40] for row in OWN_BROKEN]
)
def test_broken_data_of_your_own(tmp_path, header, train, dev, regression, message):
    """Catches data that is read as something, or an error that does not say where."""
    own(tmp_path, train, dev, header=header)
    with pytest.raises(ValueError) as error:
        task = glue.own_task(tmp_path, regression=regression)
        for split in ("train", "dev") if dev else ("train",):
            glue.read(task, "", split)
    assert str(error.value).startswith(str(tmp_path / message))


CSV = 'sentence;label\r\n"one, ""two""\nthree";a\r\nfour;b\r\n'


@pytest.mark.parametrize("name", ["train.tsv", "train.csv", "mine.csv", "dev.tsv"])
@pytest.mark.parametrize("command", [glue.find_task, glue.check])
def test_a_csv_is_asked_for_and_converted_as_told(tmp_path, name, command, capsys):
    """Catches a CSV taken for one odd column, and advice that does not work."""
    own(tmp_path, ["x|a", "y|b"] if name == "dev.tsv" else None)
    (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + CSV.encode())
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        task = command(str(tmp_path / name if name == "mine.csv" else tmp_path))
        raise ValueError(capsys.readouterr().out if task is False else glue.read(task, "", "dev"))
    told = str(error.value).partition("is this a CSV? Three lines of Python make TSV of it:\n")[2]
    exec("\n".join(told.strip().split("\n")[:3]))
    task = glue.own_task(tmp_path)
    texts, labels = glue.read(task, "", "dev" if name == "dev.tsv" else "train")
    both = texts if name == "dev.tsv" else texts + glue.read(task, "", "dev").texts
    assert sorted(both) == ["four", 'one, "two" three'] and task.labels == ("a", "b")


@pytest.mark.parametrize("raw, message", [
    ("sentence\tlabel\nx\ta\n".encode("utf-16"), "train.tsv: UTF-16 text, expected UTF-8"),
    ("sentence\tlabel\nx\ta\n".encode("utf-16-be"), "train.tsv: UTF-16 text, expected UTF-8"),
    (b"sentence\tlabel\nx\ta\nSentence\tLabel\ny\tb\n", "train.tsv:3: the header again"),
    (b"sentence\tlabel\nx\ta\nlabel\tsentence\ny\tb\n", "train.tsv:3: the header again"),
])  # fmt: skip
def test_files_that_are_not_what_they_seem(tmp_path, raw, message):
    """Catches a file of Excel's called broken bytes, and a class that is named 'label'."""
    put(tmp_path / "train.tsv", raw)
    with pytest.raises(ValueError, match=message):
        glue.read(glue.own_task(tmp_path), "", "train")


def test_lines_may_end_as_on_an_old_mac(tmp_path):
    """Catches a file of carriage returns read as one header, and a text of one cut in two."""
    put(tmp_path / "train.tsv", b"sentence\tlabel\rx\ta\ry\tb\r")
    put(tmp_path / "dev.tsv", b"sentence\tlabel\nx\ry\ta\n")
    task = glue.own_task(tmp_path)
    assert glue.read(task, "", "train").texts == ["x", "y"]
    assert glue.read(task, "", "dev").texts == ["x\ry"]


def test_odd_classes_and_quotes_are_noted_once(tmp_path, capsys):
    """Catches empty cells that become a class without a word, and texts that Excel has quoted."""
    rows = ["x|billing", '"a ""b"" c"|Billing', "y|N/A", "z|nan", '"w"|0', "v|delivery"]
    for _ in range(2):
        assert len(glue.read(glue.own_task(own(tmp_path, rows, [])), "", "train").texts) == 6
    assert capsys.readouterr().err.splitlines() == [
        f"note: {tmp_path}/train.tsv: classes that look like empty cells or like each other: "
        "'Billing' at line 3, 'N/A' at line 4, 'billing' at line 2, 'nan' at line 5",
        f"note: {tmp_path}/train.tsv:3: a text in quotes, which are read as part of it",
    ]
    own(tmp_path / "b", rows, rows)
    assert run("check", tmp_path / "b") == 0 and "'N/A' at line 4" in capsys.readouterr().err
    glue.own_task(own(tmp_path / "c", ["x|a", 'say "y" now|b']))
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("pairs", [False, True])
def test_a_tenth_of_train_stands_in_for_dev(tmp_path, pairs, capsys):
    """Catches texts in both parts, a split that differs from run to run, and a dev.tsv ignored."""
    header = "sentence1|sentence2|label" if pairs else "sentence|label"
    rows = [f"a{i % 40}|" + f"b{i % 40}|" * pairs + "xy"[i % 2] for i in range(80)]
    task = glue.own_task(own(tmp_path, rows, header=header))
    parts = [glue.read(task, "", split) for split in ("train", "dev", "dev")]
    assert len(parts[1].texts) == 8 and sum(len(part.texts) for part in parts[:2]) == 80
    assert not {*parts[0].texts} & {*parts[1].texts} and parts[1].texts == parts[2].texts
    for texts, labels in parts:
        numbers = [int((text[0] if pairs else text)[1:]) for text in texts]
        assert [number % 2 for number in numbers] == labels.tolist()
    assert [*glue.text_beside(task, tmp_path)[1]] == sum(
        map(list, parts[1].texts), []
    ) * pairs or not pairs
    assert capsys.readouterr().err.count("a tenth of train.tsv, by a hash of the text") == 1
    assert run("check", tmp_path) == 0
    own(tmp_path, None, rows[:1], header=header)
    assert len(glue.read(task, "", "train").texts) == 80


def test_scores_of_each_class():
    """Catches precision and recall changed about, and a class that nobody says or has."""
    task = glue.Task("t", ("s",), labels=("a", "b", "c", "d"))
    found = glue.class_scores(task, [0, 0, 0, 1, 1, 2], [0, 0, 1, 1, 0, 0])
    assert found["a"] == {"precision": 50.0, "recall": pytest.approx(200 / 3), "n": 3,
                          "f1": pytest.approx(400 / 7)}  # fmt: skip
    assert found["b"] == {"precision": 50.0, "recall": 50.0, "f1": 50.0, "n": 2}
    assert found["c"] == {"precision": 0.0, "recall": 0.0, "f1": 0.0, "n": 1}
    assert found["d"] == {"precision": 0.0, "recall": 0.0, "f1": 0.0, "n": 0}
    sklearn = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(0)
    labels, said = rng.integers(0, 4, 500), rng.integers(0, 4, 500)
    report = sklearn.classification_report(labels, said, output_dict=True)
    for i, row in enumerate(glue.class_scores(task, labels, said).values()):
        theirs = report[str(i)]
        assert row["n"] == theirs["support"] and row["f1"] == pytest.approx(
            100 * theirs["f1-score"]
        )
        assert row["precision"] == pytest.approx(100 * theirs["precision"])
        assert row["recall"] == pytest.approx(100 * theirs["recall"])


def test_files_of_your_own_that_lack_something(tmp_path):
    """Catches training data without train.tsv, unlabelled dev data, and 200 labels in one line."""
    with pytest.raises(FileNotFoundError, match=r"train\.tsv: no such file; data of your own"):
        glue.own_task(own(tmp_path / "a", None, ["x|0"]))
    task = glue.own_task(own(tmp_path / "b", [f"x|c{i:03}" for i in range(200)], ["x|c200"]))
    with pytest.raises(ValueError, match="expected one of c000, .*, c007, ...$"):
        glue.read(task, "", "dev")
    put(tmp_path / "b/dev.tsv", "sentence\nx\n")
    with pytest.raises(ValueError, match=r"dev\.tsv:1: expected one column 'label'"):
        glue.read(task, "", "dev")
    assert glue.read(task, "", "dev", with_labels=False).texts == ["x"]


def test_a_folder_and_a_task_of_the_same_name(tmp_path, monkeypatch):
    """Catches GLUE's names hidden by a folder, and a folder that cannot be named."""
    monkeypatch.chdir(tmp_path)
    for name in ("RTE", "mine"):
        assert own(tmp_path / name, ["x|0", "y|1"])
    assert glue.find_task("RTE") is glue.TASKS["RTE"]
    assert glue.find_task("./RTE").labels == ("0", "1") and glue.find_task("./RTE").name == "./RTE"
    assert glue.find_task("mine").name == "./mine"
    with pytest.raises(ValueError, match="no task 'mien', did you mean .* or a folder"):
        glue.find_task("mien")
    with pytest.raises(FileNotFoundError, match=r"nowhere/train\.tsv: no such file; data of your"):
        glue.find_task("./nowhere")
    with pytest.raises(ValueError, match="STS-B: --regression is for data of your own"):
        glue.find_task("STS-B", regression=True)


def test_text_beside_a_task(tmp_path):
    """Catches text of the task itself or of no training split, labels looked at, another order of
    tasks or sentences (draws depend on it), and missing files that are in the way."""
    texts = {}
    for name, label in (("STS-B", "score"), ("RTE", "label"), ("WNLI", "label")):
        for split in ("train", "dev"):
            texts[name, split] = [(f"{name} {split} {n}", f"{n}") for n in range(2)]
            lines = [f"{first}|{second}|?\n" for first, second in texts[name, split]]
            put(tmp_path / f"{name}/{split}.tsv", f"sentence1|sentence2|{label}\n{''.join(lines)}")
    put(tmp_path / "SST-2/train.tsv", "sentence|label\nx|?\ny|?\n")
    put(tmp_path / "SST-2/dev.tsv", "sentence|label\nz|?\n")
    others, held_out = glue.text_beside("rte", tmp_path)
    assert others == [["x", "y"], texts["STS-B", "train"], texts["WNLI", "train"]]
    assert held_out == ["RTE dev 0", "0", "RTE dev 1", "1"]
    others, held_out = glue.text_beside(glue.TASKS["SST-2"], str(tmp_path))
    assert others == [texts[name, "train"] for name in ("STS-B", "RTE", "WNLI")]
    assert held_out == ["z"]
    task = glue.own_task(own(tmp_path / "mine", ["x|0", "y|1"], ["u|0"], ["v|1", "w|0"]))
    assert [len(texts) for texts in glue.text_beside(task, tmp_path)[0]] == [2, 2, 2, 2]
    assert glue.text_beside(task, "nowhere") == ([], ["u", "v", "w"])


# --- check ---------------------------------------------------------------------------------------


@pytest.fixture
def small(monkeypatch):
    """RTE, QQP and MNLI as if their official files had few rows, and no other task."""
    rows = {"RTE": (3, 2, 1), "QQP": (5, 2, 1), "MNLI": (1, 1, 1, 1, 1)}
    tasks = {name: replace(glue.TASKS[name], rows=counts) for name, counts in rows.items()}
    monkeypatch.setattr(glue, "TASKS", tasks)


NLI = "index|sentence1|sentence2|label\n"
TRAIN = NLI + "0|a|b c|entailment\n1|d|e|not_entailment\n2|f|g|entailment\n"
DEV = NLI + "0|a|b c|entailment\n1|h i j|k|entailment\n"
TEST = "index|sentence1|sentence2\n0|l|m\n"
TRAIN, DEV, TEST = (text.replace("|", "\t") for text in (TRAIN, DEV, TEST))


def rte(folder, **changes):
    """RTE's files, with other contents for the splits named, None for a file that is not there."""
    for split, text in ({"train": TRAIN, "dev": DEV, "test": TEST} | changes).items():
        (folder / f"RTE/{split}.tsv").unlink(missing_ok=True)
        if text is not None:
            put(folder / f"RTE/{split}.tsv", text)
    return folder


def test_check_tells_what_is_there(tmp_path, small, capsys):
    """Catches counts, widths and duplicates that are wrong, sound data called unsound, a GLUE
    task's folder measured as own data, and an empty one called sound."""
    assert run("check", rte(tmp_path)) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[1:] == [
        ["RTE", "train", "3", "3", "4", "3", "-", "entailment:2", "not_entailment:1"],
        ["RTE", "dev", "2", "2", "4", "4", "1", "entailment:2", "not_entailment:0"],
        ["RTE", "test", "1", "1", "3", "2", "-", "-"],
        "not there: QQP MNLI; python glue.py download QQP fetches one".split(),
    ]
    assert run("check", tmp_path / "RTE") == 0
    rte(tmp_path, train=TRAIN[: TRAIN.index("2\tf")])  # would do as own data
    assert run("check", tmp_path / "RTE") == 1
    rte(tmp_path)
    (tmp_path / "QQP").mkdir()
    assert run("check", tmp_path) == 1


@pytest.mark.parametrize(
    "split, content, message",
    [
        ("dev", None, "missing"),
        ("test", None, "missing"),
        ("dev", DEV + "2|x|y|entailment\n", "dev.tsv: 3 rows, expected the 2 of the official file"),
        ("dev", DEV.replace("k\tentailment", "k\tmaybe"), "dev.tsv:3: label 'maybe'"),
        ("train", "<html>", "train.tsv: an HTML page, a Git LFS pointer or empty: '<html>'"),
        ("test", TEST + "1\n", "test.tsv:3: 1 tab-separated cells, the first '1'"),
    ],
)
def test_check_fails_on_what_is_unsound(tmp_path, small, capsys, split, content, message):
    """Catches exit code 0 for broken data, and a check that stops at its first fault."""
    assert run("check", rte(tmp_path, **{split: content})) == 1
    printed = capsys.readouterr().out
    assert message in printed and all(name in printed for name in ("train", "dev", "test"))


def test_check_of_several_tasks(tmp_path, small, capsys):
    """Catches a fault in the first task forgotten at the last, class names in place of cells, and
    a count of QQP's broken rows that sources disagree about called unsound."""
    header = "id|qid1|qid2|question1|question2|is_duplicate\n"
    rows = [f"{i}|1|2|who {i} ?|why ?|1\n" for i in range(5)]

    def qqp(**counts):
        for split, count in counts.items():
            put(tmp_path / f"QQP/{split}.tsv", header + "".join(rows[:count]))
        return run("check", tmp_path), capsys.readouterr().out

    put(tmp_path / "QQP/test.tsv", "id|question1|question2\n0|a|b\n")
    label = "index|sentence1|sentence2|gold_label\n0|{}|b|neutral\n"
    for firsts, expected in (("axxaa", [*"-00--"]), ("axaaa", [*"-01--"])):
        for split, first in zip(glue.TASKS["MNLI"].splits, firsts):
            put(tmp_path / f"MNLI/{split}.tsv", label.format(first))
        code, shown = qqp(train=5, dev=2)
        assert code == 0 and "0:0 1:5" in shown and "not there: RTE;" in shown
        known = [line.split()[6] for line in shown.splitlines() if line.startswith("MNLI")]
        assert known == expected  # of train, both dev and both test sets
    assert qqp(train=2)[0] == 0  # 3 rows fewer
    assert qqp(train=1)[0] == 1
    code, shown = qqp(train=5, dev=5)
    assert code == 1 and "MNLI     test_mismatched" in shown


def test_check_of_your_own_data(tmp_path, capsys):
    """Catches own data measured by official counts, and a folder without anything called sound."""
    own(tmp_path, ["x|a", "y|b"] + [f"z|c{i}" for i in range(9)], ["x|a"])
    assert run("check", tmp_path) == 0
    shown = capsys.readouterr().out
    assert "a:1 b:1 c0:1 c1:1 c2:1 c3:1 and 5 more" in shown and "not there" not in shown
    own(tmp_path, ["x|1", "y|2.5"], ["z|2"])
    assert run("check", tmp_path, "--regression") == 0
    assert "1 to 2.5" in capsys.readouterr().out
    own(tmp_path, ["x|1", "y|1"])
    assert run("check", tmp_path) == 1
    assert "train.tsv: 1 labels, expected 2 to 1024" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    refused(capsys, run("check", tmp_path / "no"), "no: no such folder")
    refused(capsys, run("check", tmp_path / "empty"), "no GLUE task in it")


# --- download ------------------------------------------------------------------------------------

MRPC = "Quality|#1 ID|#2 ID|#1 String|#2 String\n".replace("|", "\t")
MSR_TRAIN = '1|11|12|One "a .|One b .\r\n0|13|14|Two a .|Two b .\r\n1|13|11|X .|Y .\n'
MSR_TEST = "1|21|22|Six a .|Six b .\n0|23|24|Ten a .|Ten b .\n"
MSR_TRAIN, MSR_TEST = (f"\ufeff{MRPC}{rows}".replace("|", "\t") for rows in (MSR_TRAIN, MSR_TEST))


def zipped(members):
    """The bytes of a zip of these names and contents, which says that its first is a link."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for number, (name, content) in enumerate(members.items()):
            member = zipfile.ZipInfo(name)
            member.external_attr = (0o777 | (stat.S_IFREG if number else stat.S_IFLNK)) << 16
            archive.writestr(member, content, zipfile.ZIP_DEFLATED)
    return buffer.getvalue()


MEMBERS = {"RTE/train.tsv": TRAIN, "RTE/dev.tsv": DEV, "RTE/test.tsv": TEST}
RTE_ZIP = zipped(MEMBERS | {"RTE/readme.txt": "x", "../evil.tsv": "x", "/tmp/evil.tsv": "x"})
SERVED = {
    "glue/data/RTE.zip": RTE_ZIP,
    "glue/data/AX.tsv": TEST.encode(),
    "glue/data/mrpc_dev_ids.tsv": b"13\t14\n",
    f"{glue._MSR}_train.txt": MSR_TRAIN.encode(),
    f"{glue._MSR}_test.txt": MSR_TEST.encode(),
}


class Handler(BaseHTTPRequestHandler):
    """Serves SERVED in the way the server's `mode` says."""

    def do_GET(self):
        mode, content = self.server.mode, SERVED.get(self.path.lstrip("/"))
        self.server.asked.append(self.path)
        if content is None or mode in (403, 404, 500):
            return self.send_error(mode or 404)
        if mode == "asleep":
            return time.sleep(1.5)
        if mode == "mute":
            return None
        if mode == "babble":
            return self.wfile.write(b"good day\r\n\r\n")
        content = {"other": b"x" * len(content)}.get(mode, content)
        self.send_response(200)
        if mode not in ("unsized", "long"):
            self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content[: len(content) // 2] if mode == "cut" else content)
        with contextlib.suppress(OSError):  # until the client has had enough
            for _ in range(400 if mode == "long" else 0):
                self.wfile.write(b"x" * (1 << 20))
                self.server.megabytes += 1

    def log_message(self, *arguments):
        pass


@pytest.fixture
def server(monkeypatch):
    """A local server of small files, whose checksums stand in for the official ones."""
    for name in glue._SOURCES:
        content = SERVED.get(f"glue/data/{name}".replace("glue/data/MRPC", glue._MSR), b"")
        sums = len(content), hashlib.sha256(content).hexdigest()
        monkeypatch.setitem(glue._SOURCES, name, sums)
    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    http.mode, http.asked, http.megabytes = None, [], 0
    http.url = f"http://127.0.0.1:{http.server_port}"
    thread = threading.Thread(target=http.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield http
    http.shutdown()
    http.server_close()


def fetch(server, folder, *arguments):
    return run("download", *arguments, "--data-dir", folder, "--base-url", server.url + "/")


def tree(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))


def test_download(server, tmp_path, monkeypatch, capsys):
    """Catches members that leave the folder or are links, gold labels of MRPC's test, parts left
    over, and `all` taken for a task's name."""
    data, splits = tmp_path / "a/glue", ("train", "dev", "test")
    assert fetch(server, data, "rte", "MRPC", "AX") == 0
    assert "wrote" in capsys.readouterr().out
    files = [f"{task}/{split}.tsv" for task in ("MRPC", "RTE") for split in splits]
    assert tree(data) == sorted(["AX", "MRPC", "RTE", "AX/diagnostic.tsv", *files])
    assert tree(tmp_path) == ["a", "a/glue", *(f"a/glue/{name}" for name in tree(data))]
    path = data / "RTE/train.tsv"
    assert path.read_text() == TRAIN and path.is_file() and not path.is_symlink()
    assert glue.read("AX", data, "test").texts == [("l", "m")]
    train, dev, test = ((data / f"MRPC/{split}.tsv").read_text() for split in splits)
    assert train == MRPC + '1|11|12|One "a .|One b .\n1|13|11|X .|Y .\n'.replace("|", "\t")
    assert dev == MRPC + "0|13|14|Two a .|Two b .\n".replace("|", "\t")
    rows = "0|21|22|Six a .|Six b .\n1|23|24|Ten a .|Ten b .\n".replace("|", "\t")
    assert test == MRPC.replace("Quality", "index") + rows
    monkeypatch.setattr(glue, "TASKS", {name: glue.TASKS[name] for name in ("RTE", "MRPC", "AX")})
    assert fetch(server, tmp_path / "b", "all") == 0 and tree(tmp_path / "b") == tree(data)


def test_what_is_there_is_not_overwritten(server, tmp_path, capsys):
    """Catches a file replaced unasked, one not replaced when asked, and a needless download."""
    path = put(tmp_path / "RTE/dev.tsv", "mine")
    assert fetch(server, tmp_path, "RTE") == 0
    assert path.read_text() == "mine" and (tmp_path / "RTE/train.tsv").is_file()
    printed = capsys.readouterr().out
    assert "RTE/train.tsv, " in printed and "dev.tsv" not in printed
    server.asked.clear()
    assert fetch(server, tmp_path, "RTE") == 0
    assert server.asked == [] and "already there" in capsys.readouterr().out
    assert fetch(server, tmp_path, "RTE", "--overwrite") == 0
    assert path.read_text() == DEV


def test_a_full_disk_leaves_what_was_there(server, tmp_path, predictions, monkeypatch, capsys):
    """Catches a file that is written in place, and parts left over."""
    mine = put(tmp_path / "a/RTE/train.tsv", "mine")
    out = put(tmp_path / "b/s.zip", before := zipped({"a": "the one before"}))

    def full(*paths):
        raise OSError("disk full")

    monkeypatch.setattr(glue.os, "replace", full)
    refused(capsys, fetch(server, tmp_path / "a", "RTE", "--overwrite"), "disk full")
    assert mine.read_text() == "mine" and tree(tmp_path / "a") == ["RTE", "RTE/train.tsv"]
    refused(capsys, run("submit", "--predictions", predictions, "--out", out), "disk full")
    assert out.read_bytes() == before and tree(tmp_path / "b") == ["s.zip"]


@pytest.mark.parametrize(
    "mode, needles",
    [
        (403, ["RTE.zip", "403", "--base-url"]),
        (404, ["RTE.zip", "404"]),
        (500, ["RTE.zip", "500"]),
        ("cut", [f"RTE.zip: {len(RTE_ZIP) // 2} bytes", f"expected {len(RTE_ZIP)} of"]),
        ("long", ["RTE.zip", f"expected {len(RTE_ZIP)} of"]),
        ("other", ["RTE.zip", "sha256", "not the official file"]),
        ("asleep", ["RTE.zip", "timed out after 0 bytes"]),
        ("mute", ["RTE.zip", "closed connection", "after 0 bytes"]),
        ("babble", ["RTE.zip", "good day after 0 bytes"]),
    ],
)
def test_failed_downloads(server, tmp_path, capsys, monkeypatch, mode, needles):
    """Catches a traceback, a half file, or anything unpacked from what is not the official file."""
    put(tmp_path / "RTE/dev.tsv", "mine")
    server.mode = mode
    monkeypatch.setattr(glue, "_TIMEOUT", 0.3)
    code = fetch(server, tmp_path, "RTE", "--overwrite")
    refused(capsys, code, server.url, *needles)
    assert server.megabytes < 50  # of the 400 that the one without an end would send
    assert tree(tmp_path) == ["RTE", "RTE/dev.tsv"]
    assert (tmp_path / "RTE/dev.tsv").read_text() == "mine"
    server.mode = "unsized"  # and the next attempt starts cleanly
    assert fetch(server, tmp_path, "RTE") == 0


@pytest.mark.parametrize(
    "arguments, needles",
    [
        ("RTE --base-url http://127.0.0.1:9", ["127.0.0.1:9", "Connection refused"]),
        ("RTE --base-url nonsense", ["nonsense"]),
        ("RTEE", ["did you mean RTE?"]),
        ("all RTEE", ["did you mean RTE?"]),
        ("./mine", ["expected one of CoLA"]),
    ],
)  # fmt: skip
def test_downloads_that_are_mistakes(tmp_path, monkeypatch, capsys, arguments, needles):
    """Catches a traceback, waiting for ever, and a folder or typo taken for a task."""
    own(tmp_path / "mine", ["x|0", "y|1"])
    monkeypatch.chdir(tmp_path)
    refused(capsys, run("download", *arguments.split()), *needles)
    assert not list(tmp_path.rglob("*RTE*"))


def test_an_interrupted_download_leaves_nothing(server, tmp_path, monkeypatch, capsys):
    """Catches a half file after Ctrl-C, and leftovers of a killed run that stay for ever."""
    put(tmp_path / ".RTE.part/RTE.zip", "half")  # as SIGKILL leaves it

    def interrupted(self, *arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(http.client.HTTPResponse, "read", interrupted)
    assert fetch(server, tmp_path, "RTE") == 130
    assert capsys.readouterr().err == "\ninterrupted\n" and tree(tmp_path) == []


def test_progress_is_for_terminals(server, tmp_path, monkeypatch, capsys):
    """Catches carriage returns in a log file, and no progress on a terminal."""
    assert fetch(server, tmp_path / "a", "RTE") == 0
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert fetch(server, tmp_path / "b", "RTE") == 0
    assert capsys.readouterr().err == "RTE.zip 0/0 MiB\r"


def test_official_sources():
    """Catches a checksum or address lost in editing: every task has one, of the right form."""
    for task in glue.TASKS:
        names = [name for name in glue._SOURCES if name.upper().startswith(task.upper())]
        assert len(names) == (3 if task == "MRPC" else 1)
    for size, digest in glue._SOURCES.values():
        assert size > 0 and len(digest) == 64 and int(digest, 16)
    assert len(glue._SOURCES) == 12


@real
def test_mrpc_is_built_as_the_official_split_is(tmp_path):
    """Catches a row in the wrong split: built from Microsoft's file it equals the real split."""
    raw, ids = Path(REAL) / "MRPC/msr_paraphrase_train.txt", Path(REAL) / "MRPC/dev_ids.tsv"
    if not raw.is_file():
        pytest.skip(f"no {raw}")
    for split in ("train", "dev"):
        built = put(tmp_path / f"MRPC/{split}.tsv", "")
        glue._make_split("MRPC", split, [raw, raw, ids], built)
        ours, theirs = glue.read("MRPC", tmp_path, split), glue.read("MRPC", REAL, split)
        assert ours.texts == theirs.texts and (ours.labels == theirs.labels).all()
    for path, name in ((ids, "mrpc_dev_ids.tsv"), (Path(REAL) / "AX/diagnostic.tsv", "AX.tsv")):
        content = path.read_bytes()
        assert (len(content), hashlib.sha256(content).hexdigest()) == glue._SOURCES[name]


# --- submit --------------------------------------------------------------------------------------


@pytest.fixture
def predictions(tmp_path):
    """A folder with predictions of the two smallest test splits and STS-B's."""
    folder = tmp_path / "predictions"
    given = {"WNLI": ["0", "1"], "AX": ["neutral"], "STS-B": ["-1", "2.34567", "9"]}
    for name, cells in given.items():
        task = glue.TASKS[name]
        lines = [f"{i}|{cells[i % len(cells)]}\n" for i in range(task.rows[-1])]
        put(folder / f"{name}.tsv", "index|prediction\n" + "".join(lines))
    return folder


def test_submission(tmp_path, predictions, capsys):
    """Catches a name, count, index or value form that the server would not take."""
    out = tmp_path / "to/submission.zip"
    assert run("submit", "--predictions", predictions, "--out", out) == 0
    filled = "CoLA SST-2 MRPC QQP QNLI RTE MNLI-m MNLI-mm"
    assert f"filled with a constant: {filled}\n" in capsys.readouterr().out
    counts = {"CoLA": 1063, "SST-2": 1821, "MRPC": 1725, "STS-B": 1379, "QQP": 390965,
              "MNLI-m": 9796, "MNLI-mm": 9847, "QNLI": 5463, "RTE": 3000, "WNLI": 146,
              "AX": 1104}  # fmt: skip
    with zipfile.ZipFile(out) as archive:
        for member in archive.infolist():  # the same bytes at any time
            assert member.date_time == (1980, 1, 1, 0, 0, 0)
            assert member.compress_type == zipfile.ZIP_DEFLATED
        assert sorted(archive.namelist()) == sorted(f"{name}.tsv" for name in counts)
        for name, count in counts.items():
            rows = archive.read(f"{name}.tsv").decode().split("\n")
            assert rows[0] == "index\tprediction" and rows[-1] == "" and len(rows) == count + 2
            cells = [row.split("\t") for row in rows[1:-1]]
            assert [cell[0] for cell in cells] == [str(i) for i in range(count)]
            found = {cell[1] for cell in cells}
            assert found <= {
                "STS-B": {"0.000", "2.346", "5.000"}, "MNLI-m": {"entailment"},
                "MNLI-mm": {"entailment"}, "AX": {"neutral"}, "RTE": {"entailment"},
                "QNLI": {"entailment"}, "WNLI": {"0", "1"},
            }.get(name, {"0"})  # fmt: skip
    first = out.read_bytes()
    assert glue.submit(predictions, out) == filled.split()
    assert out.read_bytes() == first and os.listdir(out.parent) == ["submission.zip"]


@pytest.mark.parametrize(
    "name, old, new, needles",
    [
        ("WNLI", "145|1\n", "", ["WNLI.tsv: 145 predictions, expected 146"]),
        ("WNLI", "145|1\n", "145|1\n146|0\n", ["WNLI.tsv: 147 predictions, expected 146"]),
        ("WNLI", "index|prediction\n", "", ["WNLI.tsv:1: expected one column 'index'", "0 twice"]),
        ("WNLI", "\n7|", "\n8|", ["WNLI.tsv:9: index '8', expected 7"]),
        ("WNLI", "\n0|0", "\n0|entailment", ["WNLI.tsv:2: prediction 'entailment'", "one of 0, 1"]),
        ("WNLI", "\n0|0", "\n0|0|0", ["WNLI.tsv:2: 3 tab-separated cells", "expected 2"]),
        ("AX", "\n0|neutral", "\n0|1", ["AX.tsv:2", "one of entailment, neutral, contradiction"]),
        ("STS-B", "\n0|-1", "\n0|1_5", ["STS-B.tsv:2: prediction '1_5', expected a finite number"]),
        ("STS-B", "\n0|-1", "\n0|nan", ["STS-B.tsv:2: prediction 'nan', expected a finite number"]),
    ],
)
def test_a_bad_prediction_file_is_refused(tmp_path, predictions, capsys, name, old, new, needles):
    """Catches a submission that the server would reject, or that scores shifted rows."""
    path = predictions / f"{name}.tsv"
    text = path.read_text().replace("\t", "|")
    assert old in text
    put(path, text.replace(old, new, 1))
    out = put(tmp_path / "submission.zip", before := zipped({"a": "the one before"}))
    refused(capsys, run("submit", "--predictions", predictions, "--out", out), *needles)
    assert out.read_bytes() == before


def test_a_submission_does_not_take_the_place_of_something_else(tmp_path, predictions, capsys):
    """Catches --out that replaces predictions or a device, and a link that becomes a file."""
    os.mkfifo(tmp_path / "pipe")
    for out in (predictions / "AX.tsv", tmp_path / "pipe", predictions):
        code = run("submit", "--predictions", predictions, "--out", out)
        refused(capsys, code, out, "is there and no zip")
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)
    (tmp_path / "link.zip").symlink_to(tmp_path / "there.zip")
    glue.submit(predictions, tmp_path / "link.zip")
    assert (tmp_path / "link.zip").is_symlink() and zipfile.is_zipfile(tmp_path / "there.zip")


def test_files_the_server_does_not_know(tmp_path, predictions, capsys):
    """Catches predictions left out of the archive, since their file has another name."""
    arguments = ["submit", "--out", tmp_path / "s.zip", "--predictions"]
    for name in ("mnli-mm.tsv", "rte.tsv", "AX.TSV"):
        put(predictions / name, "index|prediction\n")
        code = run(*arguments, predictions)
        refused(capsys, code, f"{name}, expected any of CoLA, SST-2", "MNLI-m, MNLI-mm.tsv")
        (predictions / name).unlink()
    refused(capsys, run(*arguments, tmp_path / "no"), "no: no such folder")
    (tmp_path / "empty").mkdir()
    refused(capsys, run(*arguments, tmp_path / "empty"), "no predictions in it")
    assert not (tmp_path / "s.zip").exists()


def test_as_a_script(root, tmp_path):
    """Catches a script that needs more than numpy, a traceback, an exit code that says sound, and
    "Broken pipe" where `head` has seen enough."""
    (tmp_path / "glue.py").write_bytes((root / "glue.py").read_bytes())
    (tmp_path / "MRPC").mkdir()
    lines = {"-W error glue.py check nowhere": 2, "-W error glue.py": 2, "glue.py --help": 0}
    for line, code in (lines | {"-u glue.py check . | true": 0}).items():
        script = f"cd {tmp_path}; {sys.executable} {line}"
        done = subprocess.run(["bash", "-c", script], capture_output=True, text=True)
        assert done.returncode == code and "Traceback" not in done.stderr
    assert done.stderr == ""


@pytest.mark.parametrize("command", ["check", "download", "submit"])
def test_help_has_an_example(command, capsys):
    """Catches a command without one, or whose example the parser does not take."""
    with pytest.raises(SystemExit):
        glue.main([command, "--help"])
    example = " ".join(capsys.readouterr().out.rpartition("example: ")[2].split())
    assert example.startswith(f"python glue.py {command} ")
    assert glue.parser().parse_args(example.split()[2:]).command == command
