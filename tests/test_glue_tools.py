"""glue.py's commands, check, download and submit, and data of your own."""

import contextlib
import hashlib
import io
import os
import random
import stat
import subprocess
import sys
import threading
import time
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

import glue

REAL = os.environ.get("GLUE_DIR")
real = pytest.mark.skipif(not REAL, reason="set GLUE_DIR to a folder with the real GLUE files")


def put(path, content):
    """Writes a file, | standing for tabs."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.replace("|", "\t").encode())
    return path


def refused(capsys, code, *needles):
    """Exit code 2 and one line on stderr that holds every needle."""
    error = capsys.readouterr().err
    assert code == 2 and error.startswith("error: ") and error.count("\n") == 1, error
    for needle in needles:
        assert str(needle) in error, error


# --- data of your own ----------------------------------------------------------------------------


def own(folder, train, dev=None, test=None, header="sentence|label"):
    """A folder of data; each split its rows."""
    for split, rows in (("train", train), ("dev", dev), ("test", test)):
        if rows is not None:
            put(folder / f"{split}.tsv", "\n".join([header, *rows]) + "\n")
    return folder


def test_columns_are_found_by_name(tmp_path):
    """Catches columns by position, an order taken over from train, and quotes that are parsed."""
    put(tmp_path / "train.tsv", 'label|note|sentence\nham|x|say "hi\nspam|y|buy now\n')
    put(tmp_path / "dev.tsv", "sentence|label\ngood day|ham\n")
    put(tmp_path / "test.tsv", "id|sentence\n7|so long\n")
    task = glue.find_task(str(tmp_path))
    assert (task.text, task.labels, task.metrics) == (
        ("sentence",), ("ham", "spam"), ("accuracy", "macro_f1"))  # fmt: skip
    train = glue.read(task, "nowhere", "train")
    assert train.texts == ['say "hi', "buy now"] and train.labels.tolist() == [0, 1]
    dev, test = (glue.read(task, "nowhere", split) for split in ("dev", "test"))
    assert (dev.texts, dev.labels.tolist()) == (["good day"], [0])
    assert (test.texts, test.labels) == (["so long"], None)


def test_pairs_and_a_labelled_test_split(tmp_path):
    """Catches pairs in the order of the columns, and labels of a test split thrown away."""
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
    task = glue.own_task(own(tmp_path, ["a|-40", "b|1e3", "c|.25"]), regression=True)
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
    own(tmp_path, ["x|c", "y|b"])
    assert glue.own_task(tmp_path, labels=("b", "a")).labels == (
        "b",
        "c",
    )  # where it is, it decides


OWN_BROKEN = [  # header, rows of train, rows of dev, regression, the message after the folder
    ("text|label", ["a|0", "b|1"], None, False, "train.tsv:1: columns text, label"),
    ("sentence|sentence1|sentence2|label", ["a|b|c|0"], None, False, "train.tsv:1: columns"),
    ("sentence|class", ["a|0", "b|1"], None, False, "train.tsv:1: no column 'label'"),
    ("sentence|label|label", ["a|0|0", "b|1|1"], None, False, "train.tsv:1: two columns"),
    ("sentence|label", ["a|0", "b|"], None, False, "train.tsv:3: no label"),
    ("sentence|label", ["a|0", "b|0"], None, False, "train.tsv: every label is '0'"),
    ("sentence|label", [f"a|{i}" for i in range(1025)], None, False,
     "train.tsv: 1025 different labels, expected at most 1024; --regression"),
    ("sentence|label", ["a|0", "b|1"], ["c|2"], False, "dev.tsv:2: label '2', expected one"),
    ("sentence|label", ["a|1", "b|two"], None, True, "train.tsv:3: score 'two', expected a finite"),
    *[("sentence|label", ["a|1", f"b|{bad}"], None, True, f"train.tsv:3: score '{bad}'")
      for bad in ("", "nan", "inf", "1_5", "1e999", "\u0661")],
    ("sentence|label", ["a|0", "b"], None, False, "train.tsv:3: 1 tab-separated cells, expected 2"),
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


def test_files_of_your_own_that_lack_something(tmp_path):
    """Catches training data without train.tsv, unlabelled dev data, and 200 labels in one line."""
    with pytest.raises(FileNotFoundError, match=r"train\.tsv: no such file; data of your own"):
        glue.own_task(own(tmp_path / "a", None, ["x|0"]))
    task = glue.own_task(own(tmp_path / "b", [f"x|c{i:03}" for i in range(200)], ["x|c200"]))
    with pytest.raises(ValueError, match="expected one of c000, .*, c007, ...$"):
        glue.read(task, "", "dev")
    put(tmp_path / "b/dev.tsv", "sentence\nx\n")
    with pytest.raises(ValueError, match=r"dev\.tsv:1: no column 'label'"):
        glue.read(task, "", "dev")
    assert glue.read(task, "", "dev", with_labels=False).texts == ["x"]


def test_a_folder_and_a_task_of_the_same_name(tmp_path, monkeypatch):
    """Catches GLUE's names hidden by a folder, and a folder that cannot be named."""
    own(tmp_path / "RTE", ["x|0", "y|1"])
    own(tmp_path / "mine", ["x|0", "y|1"])
    monkeypatch.chdir(tmp_path)
    assert glue.find_task("RTE") is glue.TASKS["RTE"]
    assert glue.find_task("./RTE").labels == ("0", "1") and glue.find_task("./RTE").name == "./RTE"
    assert glue.find_task("mine").name == "./mine"
    with pytest.raises(ValueError, match="no task 'mien', did you mean .* or a folder"):
        glue.find_task("mien")
    with pytest.raises(FileNotFoundError, match=r"nowhere/train\.tsv: no such file; data of your"):
        glue.find_task("./nowhere")
    with pytest.raises(ValueError, match="STS-B: --regression is for data of your own"):
        glue.find_task("STS-B", regression=True)


@pytest.mark.filterwarnings("ignore:A single label was found")
def test_macro_f1_equals_sklearn():
    """Catches classes that occur on one side alone left out, and weights by size."""
    assert glue.macro_f1(np.array([0, 0, 1]), np.array([0, 1, 1])) == pytest.approx(2 / 3)
    assert glue.macro_f1(np.array([0, 0]), np.array([0, 2])) == pytest.approx(1 / 3)  # (2/3 + 0)/2
    oracle = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(0)
    for size, classes in ((1, 1), (1, 9), (7, 2), (500, 2), (500, 200), (5000, 3)):
        for _ in range(5):
            x, y = rng.integers(0, classes, (2, size))
            for a, b in ((x, y), (x, x), (x, np.zeros_like(x)), (x, x[::-1])):
                expected = oracle.f1_score(a, b, average="macro")
                assert glue.macro_f1(a, b) == pytest.approx(expected, abs=1e-12)


def test_what_is_written_is_read_back(tmp_path):
    """Catches any character but a tab or newline that ends a row or cell, or is a quote."""
    rng = random.Random(1)
    alphabet = (
        "ab\"'`#,;\\ \r\v\f\x1c\x1e\u0085\u00a0\u2028\u2029\ufeff\u200d\u0301\u0662\U0001f642"
    )
    cell = lambda: "a" + "".join(rng.choices(alphabet, k=rng.randrange(30))) + "z"  # noqa: E731
    pairs = [(cell(), cell(), rng.choice(["p", '"q'])) for _ in range(500)]
    put(tmp_path / "train.tsv", b"")
    rows = ["\t".join(row) for row in pairs]
    text = "\n".join(["sentence1\tsentence2\tlabel", *rows]) + "\n"
    (tmp_path / "train.tsv").write_bytes(text.encode())
    task = glue.own_task(tmp_path)
    found = glue.read(task, "", "train")
    assert found.texts == [pair[:2] for pair in pairs]
    assert [task.labels[i] for i in found.labels] == [pair[2] for pair in pairs]


# --- check ---------------------------------------------------------------------------------------


@pytest.fixture
def small(monkeypatch):
    """RTE, QQP and MNLI as if their official files had few rows, and no other task."""
    rows = {"RTE": (3, 2, 1), "QQP": (5, 2, 1), "MNLI": (1, 1, 1, 1, 1)}
    tasks = {name: glue.replace(glue.TASKS[name], rows=counts) for name, counts in rows.items()}
    monkeypatch.setattr(glue, "TASKS", tasks)


NLI = "index|sentence1|sentence2|label\n"
TRAIN = NLI + "0|a|b c|entailment\n1|d|e|not_entailment\n2|f|g|entailment\n"
DEV = NLI + "0|a|b c|entailment\n1|h i j|k|entailment\n"
TEST = "index|sentence1|sentence2\n0|l|m\n"
TRAIN, DEV, TEST = (text.replace("|", "\t") for text in (TRAIN, DEV, TEST))


def test_check_tells_what_is_there(tmp_path, small, capsys):
    """Catches counts, widths and duplicates that are wrong, and sound data called unsound."""
    for split, content in (("train", TRAIN), ("dev", DEV), ("test", TEST)):
        put(tmp_path / f"RTE/{split}.tsv", content)
    assert glue.main(["check", str(tmp_path)]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[1:] == [
        ["RTE", "train", "3", "3", "4", "3", "-", "entailment:2", "not_entailment:1"],
        ["RTE", "dev", "2", "2", "4", "4", "1", "entailment:2", "not_entailment:0"],
        ["RTE", "test", "1", "1", "3", "2", "-", "-"],
        "not there: QQP MNLI; python glue.py download QQP fetches one".split(),
    ]


@pytest.mark.parametrize(
    "split, content, message",
    [
        ("dev", None, "missing"),
        ("test", None, "missing"),
        ("dev", DEV + "2|x|y|entailment\n", "dev.tsv: 3 rows, expected the 2 of the official file"),
        ("dev", DEV.replace("k\tentailment", "k\tmaybe"), "dev.tsv:3: label 'maybe'"),
        ("train", "<html>", "train.tsv: an HTML page"),
        ("test", TEST + "1\n", "test.tsv:3: 1 tab-separated cells"),
    ],
)
def test_check_fails_on_what_is_unsound(tmp_path, small, capsys, split, content, message):
    """Catches exit code 0 for broken data, and a check that stops at its first fault."""
    contents = {"train": TRAIN, "dev": DEV, "test": TEST} | {split: content}
    for name, text in contents.items():
        if text is not None:
            put(tmp_path / f"RTE/{name}.tsv", text)
    assert glue.main(["check", str(tmp_path)]) == 1
    printed = capsys.readouterr().out
    assert message in printed and all(name in printed for name in contents)


def test_check_of_one_task(tmp_path, small, capsys):
    """Catches a GLUE task's folder measured as own data, and an empty one called sound."""
    for split, content in (("train", TRAIN), ("dev", DEV), ("test", TEST)):
        put(tmp_path / f"RTE/{split}.tsv", content)
    assert glue.main(["check", str(tmp_path / "RTE")]) == 0
    put(tmp_path / "RTE/train.tsv", TRAIN[: TRAIN.index("2\tf")])  # would do as own data
    assert glue.main(["check", str(tmp_path / "RTE")]) == 1
    put(tmp_path / "RTE/train.tsv", TRAIN)
    (tmp_path / "QQP").mkdir()
    assert glue.main(["check", str(tmp_path)]) == 1


def test_check_of_several_tasks(tmp_path, small, capsys):
    """Catches a fault in the first task forgotten at the last, class names in place of cells, and
    a count of QQP's broken rows that sources disagree about called unsound."""
    header = "id|qid1|qid2|question1|question2|is_duplicate\n"
    rows = "".join(f"{i}|1|2|who {i} ?|why ?|1\n" for i in range(5))
    row = len(rows) // 5
    for split, content in (("train", header + rows), ("dev", header + rows[: 2 * row])):
        put(tmp_path / f"QQP/{split}.tsv", content)
    put(tmp_path / "QQP/test.tsv", "id|question1|question2\n0|a|b\n")
    label = "index|sentence1|sentence2|gold_label\n0|{}|b|neutral\n"
    for split, first in zip(glue.TASKS["MNLI"].splits, "axxaa"):
        put(tmp_path / f"MNLI/{split}.tsv", label.format(first))
    assert glue.main(["check", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "0:0 1:5" in shown and "not there: RTE;" in shown
    known = [line.split()[6] for line in shown.splitlines() if line.startswith("MNLI")]
    assert known == ["-", "0", "0", "-", "-"]  # of train, both dev and both test sets
    put(tmp_path / "MNLI/dev_mismatched.tsv", label.format("a"))
    assert glue.main(["check", str(tmp_path)]) == 0
    known = [line.split()[6] for line in capsys.readouterr().out.splitlines() if "MNLI " in line]
    assert known == ["-", "0", "1", "-", "-"]
    put(tmp_path / "QQP/train.tsv", header + rows[: 2 * row])
    assert glue.main(["check", str(tmp_path)]) == 0  # 3 rows fewer
    put(tmp_path / "QQP/train.tsv", header + rows[:row])
    assert glue.main(["check", str(tmp_path)]) == 1
    put(tmp_path / "QQP/train.tsv", header + rows)
    put(tmp_path / "QQP/dev.tsv", header + rows)
    assert glue.main(["check", str(tmp_path)]) == 1
    assert "MNLI     test_mismatched" in capsys.readouterr().out


def test_check_of_your_own_data(tmp_path, capsys):
    """Catches own data measured by official counts, and a folder without anything called sound."""
    own(tmp_path, ["x|a", "y|b"] + [f"z|c{i}" for i in range(9)], ["x|a"])
    assert glue.main(["check", str(tmp_path)]) == 0
    assert "a:1 b:1 c0:1 c1:1 c2:1 c3:1 and 5 more" in capsys.readouterr().out
    assert "not there" not in capsys.readouterr().out
    own(tmp_path, ["x|1", "y|2.5"], ["z|2"])
    assert glue.main(["check", str(tmp_path), "--regression"]) == 0
    assert "1 to 2.5" in capsys.readouterr().out
    (tmp_path / "dev.tsv").unlink()
    assert glue.main(["check", str(tmp_path)]) == 1
    own(tmp_path, ["x|1", "y|1"])
    capsys.readouterr()
    assert glue.main(["check", str(tmp_path)]) == 1
    assert "train.tsv: every label is '1'" in capsys.readouterr().out
    refused(capsys, glue.main(["check", str(tmp_path / "no")]), "no: no such folder")
    (tmp_path / "empty").mkdir()
    refused(capsys, glue.main(["check", str(tmp_path / "empty")]), "no GLUE task in it")


@real
def test_real_files_are_sound(capsys):
    """Catches official counts that are not those of the official files."""
    assert glue.main(["check", REAL]) == 0
    printed = capsys.readouterr().out
    for name in ("CoLA", "SST-2", "MRPC", "STS-B", "RTE", "WNLI", "AX"):
        assert f"\n{name} " in printed


# --- download ------------------------------------------------------------------------------------

MRPC = "Quality|#1 ID|#2 ID|#1 String|#2 String\n"
MSR_TRAIN = (
    "\ufeff" + MRPC + '1|11|12|One "a .|One b .\r\n0|13|14|Two a .|Two b .\r\n1|13|11|X .|Y .\n'
)
MSR_TEST = "\ufeff" + MRPC + "1|21|22|Six a .|Six b .\n0|23|24|Ten a .|Ten b .\n"


def zipped(members):
    """The bytes of a zip of these names and contents."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return buffer.getvalue()


MEMBERS = {"RTE/train.tsv": TRAIN, "RTE/dev.tsv": DEV, "RTE/test.tsv": TEST}
RTE_ZIP = zipped(MEMBERS | {"RTE/readme.txt": "x", "../evil.tsv": "x", "/tmp/evil.tsv": "x"})
SERVED = {
    "glue/data/RTE.zip": RTE_ZIP,
    "glue/data/AX.tsv": TEST.encode(),
    "glue/data/mrpc_dev_ids.tsv": b"13\t14\n",
    f"{glue._SENTEVAL}_train.txt": MSR_TRAIN.replace("|", "\t").encode(),
    f"{glue._SENTEVAL}_test.txt": MSR_TEST.replace("|", "\t").encode(),
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
    sums = {
        task: [(name, len(SERVED[name]), hashlib.sha256(SERVED[name]).hexdigest())
               for name, _, _ in sources if name in SERVED]
        for task, sources in glue._SOURCES.items()
    }  # fmt: skip
    monkeypatch.setattr(glue, "_SOURCES", sums)
    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    http.mode, http.asked, http.megabytes = None, [], 0
    http.url = f"http://127.0.0.1:{http.server_port}"
    thread = threading.Thread(target=http.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield http
    http.shutdown()
    http.server_close()


def fetch(server, folder, *arguments):
    return glue.main(
        ["download", *arguments, "--data-dir", str(folder), "--base-url", server.url + "/"]
    )


def tree(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))


def test_download(server, tmp_path, capsys):
    """Catches members that leave the folder, gold labels of MRPC's test, and parts left over."""
    data = tmp_path / "a/glue"
    assert fetch(server, data, "rte", "MRPC", "AX") == 0
    assert tree(data) == sorted(
        ["AX", "AX/diagnostic.tsv"]
        + [f"{task}{end}" for task in ("RTE", "MRPC")
           for end in ("", "/train.tsv", "/dev.tsv", "/test.tsv")]
    )  # fmt: skip
    assert tree(tmp_path) == sorted(["a", "a/glue", *(f"a/glue/{name}" for name in tree(data))])
    assert glue.read("RTE", data, "train").texts[0] == ("a", "b c")
    assert glue.read("AX", data, "test").texts == [("l", "m")]
    train, dev, test = ((data / f"MRPC/{s}.tsv").read_text() for s in ("train", "dev", "test"))
    expected = MRPC + '1|11|12|One "a .|One b .\n1|13|11|X .|Y .\n'
    assert train == expected.replace("|", "\t")
    assert dev == (MRPC + "0|13|14|Two a .|Two b .\n").replace("|", "\t")
    header = MRPC.replace("Quality", "index")
    assert test == (header + "0|21|22|Six a .|Six b .\n1|23|24|Ten a .|Ten b .\n").replace(
        "|", "\t"
    )
    assert "wrote" in capsys.readouterr().out


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
    code = glue.main(["submit", "--predictions", str(predictions), "--out", str(out)])
    refused(capsys, code, "disk full")
    assert out.read_bytes() == before and tree(tmp_path / "b") == ["s.zip"]


@pytest.mark.parametrize(
    "mode, needles",
    [
        (403, ["RTE.zip", "403", "--base-url"]),
        (404, ["RTE.zip", "404"]),
        (500, ["RTE.zip", "500"]),
        ("cut", ["RTE.zip", f"{len(RTE_ZIP) // 2} bytes came, expected {len(RTE_ZIP)}"]),
        ("long", ["RTE.zip", f"more than {len(RTE_ZIP)} bytes came"]),
        ("other", ["RTE.zip", "sha256", "not the official file"]),
        ("asleep", ["RTE.zip", "nothing came for 0.3 s"]),
        ("mute", ["RTE.zip", "the connection broke after 0 bytes"]),
        ("babble", ["RTE.zip", "the connection broke after 0 bytes"]),
    ],
)
def test_failed_downloads(server, tmp_path, capsys, mode, needles):
    """Catches a traceback, a half file, or anything unpacked from what is not the official file."""
    put(tmp_path / "RTE/dev.tsv", "mine")
    server.mode = mode
    code = fetch(server, tmp_path, "RTE", "--overwrite", "--timeout", "0.3")
    refused(capsys, code, server.url, *needles)
    assert server.megabytes < 50  # of the 400 that the one without an end would send
    assert tree(tmp_path) == ["RTE", "RTE/dev.tsv"]
    assert (tmp_path / "RTE/dev.tsv").read_text() == "mine"
    server.mode = "unsized"  # and the next attempt starts cleanly
    assert fetch(server, tmp_path, "RTE") == 0


def test_all(server, tmp_path, monkeypatch):
    """Catches `all` taken for a task's name."""
    monkeypatch.setattr(glue, "TASKS", {name: glue.TASKS[name] for name in ("RTE", "AX")})
    assert fetch(server, tmp_path, "all") == 0
    assert {path.name for path in tmp_path.iterdir()} == {"RTE", "AX"}


@pytest.mark.parametrize("seconds", ["0", "-1", "nan", "inf", "1e300"])
def test_a_timeout_that_is_none(tmp_path, capsys, seconds):
    """Catches a traceback, or a download that waits for ever."""
    code = glue.main(["download", "RTE", "--data-dir", str(tmp_path), f"--timeout={seconds}"])
    refused(capsys, code, "--timeout", "expected 0 to 3600 seconds")


def test_no_server_and_no_such_task(tmp_path, capsys):
    """Catches a traceback where there is no network, and a folder or typo taken for a task."""
    where = ["--data-dir", str(tmp_path), "--base-url", "http://127.0.0.1:9"]
    refused(capsys, glue.main(["download", "RTE", *where]), "127.0.0.1:9", "cannot be reached")
    refused(capsys, glue.main(["download", "RTEE", *where]), "did you mean RTE?")
    refused(capsys, glue.main(["download", "all", "RTEE", *where]), "did you mean RTE?")
    own(tmp_path / "mine", ["x|0", "y|1"])
    refused(capsys, glue.main(["download", str(tmp_path / "mine"), *where]), "expected one of CoLA")
    code = glue.main(["download", "RTE", "--data-dir", str(tmp_path), "--base-url", "nonsense"])
    refused(capsys, code, "nonsense")
    assert tree(tmp_path) == ["mine", "mine/train.tsv"]


def test_an_interrupted_download_leaves_nothing(server, tmp_path, monkeypatch, capsys):
    """Catches a half file after Ctrl-C, and leftovers of a killed run that stay for ever."""
    put(tmp_path / ".RTE.part/RTE.zip", "half")  # as SIGKILL leaves it
    read = glue.http.client.HTTPResponse.read
    answers = iter([True])

    def interrupted(self, *arguments):
        if next(answers, False):
            return read(self, 10)
        raise KeyboardInterrupt

    monkeypatch.setattr(glue.http.client.HTTPResponse, "read", interrupted)
    assert fetch(server, tmp_path, "RTE") == 130
    assert capsys.readouterr().err == "interrupted\n" and tree(tmp_path) == []


def bomb():
    """A zip whose member says that it unpacks to more than a GiB."""
    content = bytearray(zipped(MEMBERS))
    for signature, at in ((b"PK\3\4", 22), (b"PK\1\2", 24)):
        place = content.index(signature) + at
        content[place : place + 4] = (1 << 31).to_bytes(4, "little")
    return bytes(content)


def locked():
    """A zip whose members say that they are encrypted."""
    content = bytearray(zipped(MEMBERS))
    for signature, at in ((b"PK\3\4", 6), (b"PK\1\2", 8)):
        content[content.index(signature) + at] |= 1
    return bytes(content)


def link():
    """A zip whose train.tsv is a symbolic link out of the folder."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        member = zipfile.ZipInfo("RTE/train.tsv")
        member.external_attr = (stat.S_IFLNK | 0o777) << 16
        archive.writestr(member, "../../secret")
        archive.writestr("RTE/dev.tsv", DEV)
        archive.writestr("RTE/test.tsv", TEST)
    return buffer.getvalue()


@pytest.mark.parametrize(
    "content, needles",
    [
        (bomb(), ["RTE/train.tsv unpacks to 2147483648 bytes"]),
        (locked(), ["RTE/train.tsv cannot be unpacked", "password"]),
        (zipped({"RTE/train.tsv": TRAIN}), ["RTE.zip: no RTE/dev.tsv in it"]),
        (b"no zip at all", ["RTE.zip: RTE/train.tsv cannot be unpacked"]),
        (RTE_ZIP.replace(RTE_ZIP[50:60], b"0123456789"), ["cannot be unpacked"]),
    ],
    ids=["bomb", "locked", "member missing", "no zip", "broken zip"],
)
def test_hostile_archives(server, tmp_path, monkeypatch, capsys, content, needles):
    """Catches an archive that fills the disk, or a traceback, even if the checksum were right."""
    monkeypatch.setitem(SERVED, "glue/data/RTE.zip", content)
    digest = hashlib.sha256(content).hexdigest()
    monkeypatch.setitem(glue._SOURCES, "RTE", [("glue/data/RTE.zip", len(content), digest)])
    refused(capsys, fetch(server, tmp_path, "RTE"), *needles)
    assert tree(tmp_path) == []


@pytest.mark.parametrize("fault", [glue.zlib.error("bad"), EOFError("end")])
def test_streams_that_break_off(server, tmp_path, monkeypatch, capsys, fault):
    """Catches a traceback for a member whose compressed data is damaged."""

    def broken(*files):
        raise fault

    monkeypatch.setattr(glue.shutil, "copyfileobj", broken)
    refused(capsys, fetch(server, tmp_path, "RTE"), "RTE/train.tsv cannot be unpacked")


def test_a_link_in_an_archive_is_no_link(server, tmp_path, monkeypatch):
    """Catches a symbolic link made by an archive."""
    content = link()
    monkeypatch.setitem(SERVED, "glue/data/RTE.zip", content)
    digest = hashlib.sha256(content).hexdigest()
    monkeypatch.setitem(glue._SOURCES, "RTE", [("glue/data/RTE.zip", len(content), digest)])
    assert fetch(server, tmp_path, "RTE") == 0
    assert not any(path.is_symlink() for path in tmp_path.rglob("*"))


def test_progress_is_for_terminals(server, tmp_path, monkeypatch, capsys):
    """Catches carriage returns in a log file, and no progress on a terminal."""
    assert fetch(server, tmp_path / "a", "RTE") == 0
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert fetch(server, tmp_path / "b", "RTE") == 0
    assert capsys.readouterr().err == "\rRTE.zip 0.0 of 0.0 MB\n"


def test_official_sources():
    """Catches a checksum or address lost in editing: every task has one, of the right form."""
    assert list(glue._SOURCES) == list(glue.TASKS)
    for sources in glue._SOURCES.values():
        for name, size, digest in sources:
            assert size > 0 and len(digest) == 64 and int(digest, 16)
            assert name.startswith(("glue/data/", "senteval/senteval_data/"))
    assert [name for name, *_ in glue._SOURCES["QQP"]] == ["glue/data/QQP-clean.zip"]
    assert [name for name, *_ in glue._SOURCES["STS-B"]] == ["glue/data/STS-B.zip"]


@real
def test_mrpc_is_built_as_the_official_split_is(tmp_path):
    """Catches a row in the wrong split: built from Microsoft's file it equals the real split."""
    raw, ids = Path(REAL) / "MRPC/msr_paraphrase_train.txt", Path(REAL) / "MRPC/dev_ids.tsv"
    if not raw.is_file():
        pytest.skip(f"no {raw}")
    for split in ("train", "dev"):
        built = put(tmp_path / f"MRPC/{split}.tsv", "")
        built.write_text("\n".join(glue._mrpc(split, raw, raw, ids)) + "\n", encoding="utf-8")
        ours, theirs = glue.read("MRPC", tmp_path, split), glue.read("MRPC", REAL, split)
        assert ours.texts == theirs.texts and (ours.labels == theirs.labels).all()
    for path, task, index in ((ids, "MRPC", 2), (Path(REAL) / "AX/diagnostic.tsv", "AX", 0)):
        _, size, digest = glue._SOURCES[task][index]
        assert (path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest()) == (
            size,
            digest,
        )


# --- submit --------------------------------------------------------------------------------------


@pytest.fixture
def predictions(tmp_path):
    """A folder with predictions of the two smallest test splits and STS-B's."""
    folder = tmp_path / "predictions"
    for name, cells in (
        ("WNLI", ["0", "1"]),
        ("AX", ["neutral"]),
        ("STS-B", ["-1", "2.34567", "9"]),
    ):
        task = glue.TASKS[name]
        lines = [f"{i}|{cells[i % len(cells)]}\n" for i in range(task.rows[-1])]
        put(folder / f"{name}.tsv", "index|prediction\n" + "".join(lines))
    return folder


def test_submission(tmp_path, predictions, capsys):
    """Catches a name, count, index or value form that the server would not take."""
    out = tmp_path / "to/submission.zip"
    assert glue.main(["submit", "--predictions", str(predictions), "--out", str(out)]) == 0
    filled = "CoLA SST-2 MRPC QQP MNLI-m MNLI-mm QNLI RTE"
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
        ("WNLI", "index|prediction\n", "", ["WNLI.tsv:1: header"]),
        ("WNLI", "\n7|", "\n8|", ["WNLI.tsv:9: index '8', expected 7"]),
        ("WNLI", "\n0|0", "\n0|entailment", ["WNLI.tsv:2: prediction 'entailment'", "one of 0, 1"]),
        ("WNLI", "\n0|0", "\n0|0|0", ["WNLI.tsv:2: prediction '0\\t0'"]),
        ("AX", "\n0|neutral", "\n0|1", ["AX.tsv:2", "one of entailment, neutral, contradiction"]),
        ("STS-B", "\n0|-1", "\n0|1_5", ["STS-B.tsv:2: prediction '1_5', expected a number"]),
        ("STS-B", "\n0|-1", "\n0|nan", ["STS-B.tsv:2: prediction 'nan', expected a number"]),
    ],
)
def test_a_bad_prediction_file_is_refused(tmp_path, predictions, capsys, name, old, new, needles):
    """Catches a submission that the server would reject, or that scores shifted rows."""
    path = predictions / f"{name}.tsv"
    text = path.read_text().replace("\t", "|")
    assert old in text
    put(path, text.replace(old, new, 1))
    out = put(tmp_path / "submission.zip", before := zipped({"a": "the one before"}))
    code = glue.main(["submit", "--predictions", str(predictions), "--out", str(out)])
    refused(capsys, code, *needles)
    assert out.read_bytes() == before


def test_a_submission_does_not_take_the_place_of_something_else(tmp_path, predictions, capsys):
    """Catches --out that replaces predictions or a device, and a link that becomes a file."""
    os.mkfifo(tmp_path / "pipe")
    for out in (predictions / "AX.tsv", tmp_path / "pipe", predictions):
        code = glue.main(["submit", "--predictions", str(predictions), "--out", str(out)])
        refused(capsys, code, out, "is there and no zip")
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)
    (tmp_path / "link.zip").symlink_to(tmp_path / "there.zip")
    glue.submit(predictions, tmp_path / "link.zip")
    assert (tmp_path / "link.zip").is_symlink() and zipfile.is_zipfile(tmp_path / "there.zip")


def test_files_the_server_does_not_know(tmp_path, predictions, capsys):
    """Catches predictions left out of the archive, since their file has another name."""
    arguments = ["submit", "--out", str(tmp_path / "s.zip"), "--predictions"]
    for name, meant in (("mnli-mm.tsv", "MNLI-mm"), ("rte.tsv", "RTE"), ("AX.TSV", "AX")):
        put(predictions / name, "index|prediction\n")
        refused(
            capsys, glue.main([*arguments, str(predictions)]), name, f"did you mean {meant}.tsv?"
        )
        (predictions / name).unlink()
    refused(capsys, glue.main([*arguments, str(tmp_path / "no")]), "no: no such folder")
    (tmp_path / "empty").mkdir()
    refused(capsys, glue.main([*arguments, str(tmp_path / "empty")]), "no predictions in it")
    assert not (tmp_path / "s.zip").exists()


def test_as_a_script(root, tmp_path):
    """Catches a script that needs more than numpy, a traceback, or an exit code that says sound."""
    (tmp_path / "glue.py").write_bytes((root / "glue.py").read_bytes())
    for arguments, code in ((["check", "nowhere"], 2), ([], 2), (["--help"], 0)):
        done = subprocess.run(
            [sys.executable, "-W", "error", "glue.py", *arguments],
            cwd=tmp_path, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == code and "Traceback" not in done.stderr


def test_a_closed_pipe_is_no_error(root, tmp_path):
    """Catches "Broken pipe" where `head` has seen enough."""
    (tmp_path / "MRPC").mkdir()
    script = f"{sys.executable} -u {root / 'glue.py'} check {tmp_path} | true"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True)
    assert done.stderr == ""


@pytest.mark.parametrize("command", ["check", "download", "submit"])
def test_help_has_an_example(command, capsys):
    """Catches a command without one, or whose example the parser does not take."""
    with pytest.raises(SystemExit):
        glue.main([command, "--help"])
    example = " ".join(capsys.readouterr().out.rpartition("example: ")[2].split())
    assert example.startswith(f"python glue.py {command} ")
    assert glue.parser().parse_args(example.split()[2:]).command == command
