"""GLUE: every file as officially laid out, every way it can be broken, every metric."""

import hashlib
import os
import random
import time
from pathlib import Path

import numpy as np
import pytest

import glue

REAL = os.environ.get("GLUE_DIR")
real = pytest.mark.skipif(not REAL, reason="set GLUE_DIR to a folder with the real GLUE files")
_NLI = "index|sentence1|sentence2"
_MNLI = (
    "index|promptID|pairID|genre|sentence1_binary_parse|sentence2_binary_parse"
    "|sentence1_parse|sentence2_parse|sentence1|sentence2"
)
_MRPC = "#1 ID|#2 ID|#1 String|#2 String"
_STSB = "index|genre|filename|year|old_index|source1|source2|sentence1|sentence2"
LAYOUTS = {  # columns, which of them hold text, which the label; counted on the official files
    ("CoLA", "train dev"): ("source|label|mark|sentence", (3,), 1),
    ("CoLA", "test"): ("index|sentence", (1,), None),
    ("SST-2", "train dev"): ("sentence|label", (0,), 1),
    ("SST-2", "test"): ("index|sentence", (1,), None),
    ("MRPC", "train dev"): (f"Quality|{_MRPC}", (3, 4), 0),
    ("MRPC", "test"): (f"index|{_MRPC}", (3, 4), None),
    ("QQP", "train dev"): ("id|qid1|qid2|question1|question2|is_duplicate", (3, 4), 5),
    ("QQP", "test"): ("id|question1|question2", (1, 2), None),
    ("STS-B", "train dev"): (f"{_STSB}|score", (7, 8), 9),
    ("STS-B", "test"): (_STSB, (7, 8), None),
    ("MNLI", "train"): (f"{_MNLI}|label1|gold_label", (8, 9), 11),
    ("MNLI", "dev_matched dev_mismatched"): (
        f"{_MNLI}|label1|label2|label3|label4|label5|gold_label", (8, 9), 15),
    ("MNLI", "test_matched test_mismatched"): (_MNLI, (8, 9), None),
    ("QNLI", "train dev"): ("index|question|sentence|label", (1, 2), 3),
    ("QNLI", "test"): ("index|question|sentence", (1, 2), None),
    ("RTE", "train dev"): (f"{_NLI}|label", (1, 2), 3),
    ("RTE", "test"): (_NLI, (1, 2), None),
    ("WNLI", "train dev"): (f"{_NLI}|label", (1, 2), 3),
    ("WNLI", "test"): (_NLI, (1, 2), None),
    ("AX", "test"): (_NLI, (1, 2), None),
}  # fmt: skip
LAYOUTS = {(task, s): value for (task, splits), value in LAYOUTS.items() for s in splits.split()}
CLASSES = {"MNLI": "entailment neutral contradiction", "STS-B": "0.000 2.75 5.0"}  # id = position
CLASSES |= dict.fromkeys(["QNLI", "RTE"], "entailment not_entailment")
SENTENCES = [
    'She said "never and left the shop .',
    "one line\u2028goes on\u0085and on",
    'three """ quotes \'and" one more',
    "plain words , no trap 🙂",
]


def lay_out(folder, task, split, texts, labels=(), bom="", newline="\n", end="", pad=""):
    """Writes a split in the official layout; cells that are not text or label hold decoys."""
    columns, text_at, label_at = LAYOUTS[task, split]
    names = columns.split("|")
    lines = [] if names[0] == "source" else ["\t".join(names)]  # CoLA's train and dev: no header
    for i, text in enumerate(texts):
        row = ["neutral" if name.startswith("label") else f"decoy {i}" for name in names]
        for at, cell in zip(text_at, text if isinstance(text, tuple) else [text]):
            row[at] = pad + cell + pad
        if label_at is not None:
            row[label_at] = pad + labels[i] + pad
        lines.append("\t".join(row))
    path = folder / task / ("diagnostic.tsv" if task == "AX" else f"{split}.tsv")
    return put(path, bom + newline.join(lines) + newline + end)


def put(path, content):
    """Writes a file, | standing for tabs in a str."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.replace("|", "\t").encode())
    return path


def examples(task, split):
    """What a split of the layout is tested with: texts, cells of the labels, their ids."""
    pairs = len(LAYOUTS[task, split][1]) == 2
    spelled = CLASSES.get(task, "0 1").split()
    ids = [i % len(spelled) for i in range(len(SENTENCES))]
    texts = list(zip(SENTENCES, SENTENCES[::-1])) if pairs else SENTENCES
    return texts, [spelled[i] for i in ids], ids


@pytest.mark.parametrize("dressed", [False, True], ids=["plain", "dressed"])
@pytest.mark.parametrize("task, split", LAYOUTS)
def test_official_layout(tmp_path, task, split, dressed):
    """Catches a wrong column or label id, a quote or Unicode separator that merges or cuts rows,
    and (dressed) a BOM, CRLF, blank last line or outer blank that stays in a cell."""
    texts, labels, ids = examples(task, split)
    trim = dict(bom="\ufeff", newline="\r\n", end="\r\n", pad="  ") if dressed else {}
    lay_out(tmp_path, task, split, texts, labels, **trim)
    found = glue.read(task, str(tmp_path) if dressed else tmp_path, split)
    assert found.texts == texts
    if split.startswith("test"):
        assert found.labels is None
    elif task == "STS-B":
        assert found.labels.dtype == np.float64 and found.labels.tolist() == [0.0, 2.75, 5.0, 0.0]
    else:
        assert found.labels.dtype == np.int64 and found.labels.tolist() == ids


def test_what_is_read_has_not_changed(tmp_path):
    """Catches any change in what the reader returns; the hash is that of commit eac1a6d."""
    digest = hashlib.sha256()
    for task, split in LAYOUTS:
        lay_out(tmp_path, task, split, *examples(task, split)[:2])
        texts, labels = glue.read(task, tmp_path, split)
        labels = None if labels is None else labels.tolist()
        digest.update(repr([task, split, texts, labels]).encode())
    assert digest.hexdigest() == "4c8fdfddca6ec10eba65d32b3119d35acdf657e94d86b9dde81764c5d61e926f"


def test_rows_and_labels_of_a_test_file(tmp_path):
    """Catches a last row of empty cells left out, a blank last line read as a row, and placeholder
    labels in a GLUE test file scored, or in the way."""
    put(tmp_path / "RTE/test.tsv", _NLI + "\n0|a|b\n||\n\n \n")
    assert glue.read("RTE", tmp_path, "test").texts == [("a", "b"), ("", "")]
    put(tmp_path / "RTE/test.tsv", _NLI + "|label\n0|a|b|-1\n")
    assert glue.read("RTE", tmp_path, "test") == ([("a", "b")], None)


def test_files_with_other_names(tmp_path):
    """Catches `dev` or `test` of MNLI read from the mismatched files, or from a dev.tsv, and a
    place of one of the download scripts where the diagnostic set is not looked for."""
    for kind in ("dev", "test"):
        for form in ("matched", "mismatched"):
            lay_out(tmp_path, "MNLI", f"{kind}_{form}", [(form, "so it is")], ["neutral"])
        assert glue.read("MNLI", tmp_path, kind).texts == [("matched", "so it is")]
    splits = "train dev_matched dev_mismatched test_matched test_mismatched"
    assert glue.TASKS["MNLI"].splits == tuple(splits.split())  # the first dev is selected on
    for place in ("AX/diagnostic", "diagnostic/diagnostic", "MNLI/diagnostic", "AX/AX"):
        path = put(tmp_path / f"{place}.tsv", f"{_NLI}\n0|{place}|It is dry .\n")
        assert glue.read("AX", tmp_path, "test").texts == [(place, "It is dry .")]
        path.unlink()


def test_any_text_is_read_back(tmp_path):
    """Catches any other character that ends a row, ends a cell or is taken for a quote."""
    rng = random.Random(0)
    alphabet = 'ab"""\'`#,;\\ \r\v\f\x1c\x1e\u0085\u00a0\u2028\u2029\ufeff\u200d\u0301🙂👩'
    cell = lambda: "a" + "".join(rng.choices(alphabet, k=rng.randrange(30))) + "z"  # noqa: E731
    pairs = [(cell(), cell()) for _ in range(300)]
    for task, texts in (("CoLA", [first for first, _ in pairs]), ("RTE", pairs)):
        lay_out(tmp_path, task, "test", texts)
        assert glue.read(task, tmp_path, "test").texts == texts


QQP = "id|qid1|qid2|question1|question2|is_duplicate\n"


def test_short_rows_of_qqp(tmp_path, capsys):
    """Catches training on QQP's broken rows, dropping them unsaid, or dropping one in test."""
    good = "7|1|2|Why so ?|Why not ?|{}\n"
    rows = QQP + good.format(1) + '"|Why ?|1\n' + "9|x\n" + good.format(0)
    path = put(tmp_path / "QQP/train.tsv", rows)
    found = glue.read("QQP", tmp_path, "train")
    assert found.texts == [("Why so ?", "Why not ?")] * 2 and found.labels.tolist() == [1, 0]
    assert capsys.readouterr().err == f"{path}: 2 short rows skipped, first at line 3\n"

    rows = "id|question1|question2\n0|Who ?|Me ?\n1|Who ?\n\n3|Who ?|You ?\n"
    path = put(tmp_path / "QQP/test.tsv", rows)
    found = glue.read("QQP", tmp_path, "test")
    assert found.texts == [("Who ?", "Me ?"), ("Who ?", ""), ("", ""), ("Who ?", "You ?")]
    error = capsys.readouterr().err
    assert error == f"{path}: 2 short rows read with empty cells, first at line 3\n"


RTE, STSB = f"{_NLI}|label\n", f"{_STSB}|score\n0|g|f|y|0|s|s|One .|Two .|3.1\n"
NO_DATA = ": an HTML page, a Git LFS pointer or empty:"
BROKEN = [  # task, split, content with | for tabs, the message after the file's path
    ("RTE", "dev", RTE + "0|A .|B .|entailment\n1|A .|entailment\n",
     ":3: 3 tab-separated cells, the first '1', expected 4 (index, sentence1, sentence2, label)"),
    ("RTE", "dev", RTE + "0|A .|B .|C .|entailment\n",
     ":2: 5 tab-separated cells, the first '0', expected 4"),
    ("RTE", "dev", RTE + "0|A .|B .|entailment\n\n1|A .|B .|entailment\n",
     ":3: 1 tab-separated cells, the first '', expected 4"),
    ("RTE", "test", _NLI + "\n0|A .\n", ":2: 2 tab-separated cells, the first '0', expected 3"),
    ("CoLA", "train", "x|1||A .\nx|1|A .\n",
     ":2: 3 tab-separated cells, the first 'x', expected 4 (source, label, mark, sentence)"),
    ("QQP", "train", QQP + "1|Why ?|1\n2|1|2|Why ?|Who ?|0|1\n",
     ":3: 7 tab-separated cells, the first '2', expected 6"),
    ("QQP", "train", QQP + "1|Why ?|1\n2|Why ?|1\n", ": no rows"),
    ("RTE", "dev", RTE + "0|A .|B .|entailment\n1|A .|B .|1\n",
     ":3: label '1', expected one of entailment, not_entailment"),
    ("WNLI", "dev", RTE + "0|A .|B .|entailment\n", ":2: label 'entailment', expected one of 0, 1"),
    ("CoLA", "dev", "x|1||A .\nx|2||A .\n", ":2: label '2', expected one of 0, 1"),
    ("MNLI", "train", f"{_MNLI}|label1|gold_label\n" + "x|" * 10 + "neutral|-\n",
     ":2: gold_label '-', expected one of entailment, neutral, contradiction"),
    ("QQP", "train", QQP + "1|x|1\n2|1|2|Why ?|Who ?|no\n",
     ":3: is_duplicate 'no', expected one of 0, 1"),
    *[("STS-B", "dev", STSB + f"1|g|f|y|1|s|s|One .|Two .|{bad}\n",
       f":3: score '{bad}', expected a finite number, 0 to 5")
      for bad in ("high", "nan", "-inf", "", "5.01", "-0.1", "1_5")],
    ("RTE", "dev", "index|question|sentence|label\n0|A ?|B .|entailment\n",
     ":1: expected one column 'sentence1' beside index, question, sentence, label"),
    ("RTE", "dev", _NLI + "\n0|A .|B .\n",
     ":1: expected one column 'label' beside index, sentence1, sentence2"),
    ("RTE", "test", _STSB + "\n0|g|f|y|0|s|s|One .|Two .\n",
     ":1: column 'source1' is STS-B's, expected RTE's file"),
    ("AX", "test", _MNLI + "\n" + "x|" * 9 + "x\n", ":1: column 'pairID' is MNLI's, expected AX's"),
    ("SST-2", "test", "index|question|sentence\n0|A ?|B .\n", ":1: column 'question' is QNLI's"),
    ("RTE", "dev", RTE + "0|A .|B .|entailment\n|||\n", ":3: label ''"),
    ("CoLA", "train", "sentence|label\nA .|1\n", ":1: 2 tab-separated cells, the first 'sentence'"),
    ("CoLA", "test", "0|A .\n1|B .\n", ":1: expected one column 'sentence' beside 0, A ."),
    ("RTE", "dev", RTE, ": no rows"),
    *[(task, "dev", text, f"{NO_DATA} ''") for task in ("RTE", "CoLA")
      for text in ("", " \n\r\n", "\ufeff", "\ufeff\r\n")],
    ("RTE", "dev", "version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
     f"{NO_DATA} 'version https://git-lfs.github.com/spec"),
    ("RTE", "dev", "\n <!DOCTYPE html>\n<p>Not found\n", f"{NO_DATA} '<!DOCTYPE html>"),
    ("RTE", "dev", "\ufeff<html><body>Not found", f"{NO_DATA} '<html><body>Not found'"),
    ("CoLA", "dev", "x|1||A .\nx|1||B\0 .\n", ":2: byte 0x00 at offset 15 is no UTF-8 text"),
    # row 1 is 9 bytes with its newline, then come x, tab, 1, tab, tab: offset 14 (BOM: + 3)
    ("CoLA", "dev", b"x|1||A .\nx|1||\xff .\n", ":2: byte 0xff at offset 14 is no UTF-8 text"),
    ("CoLA", "dev", b"\xef\xbb\xbfx|1||A .\nx|1||\xe9\n",
     ":2: byte 0xe9 at offset 17 is no UTF-8 text"),
]  # fmt: skip


@pytest.mark.parametrize(
    "task, split, content, message", BROKEN, ids=[f"{b[0]} {b[1]}{b[3]}"[:50] for b in BROKEN]
)
def test_broken_file_is_refused(tmp_path, task, split, content, message):
    """Catches a broken file that is read as something, or an error that does not say where."""
    content = content.replace(b"|", b"\t") if isinstance(content, bytes) else content
    path = put(tmp_path / task / f"{'diagnostic' if task == 'AX' else split}.tsv", content)
    with pytest.raises(ValueError) as error:
        glue.read(task, tmp_path, split)
    assert str(error.value).startswith(f"{path}{message}")


def test_files_and_splits_that_are_not_there(tmp_path):
    """Catches an error without the path, a folder reported as missing, and a split's name used as
    a path before it is looked up."""
    hint = rf"SST-2.train\.tsv: no such file; .* glue\.py download SST-2 --data-dir {tmp_path}"
    with pytest.raises(FileNotFoundError, match=hint):
        glue.read("SST-2", tmp_path, "train")
    (tmp_path / "SST-2/train.tsv").mkdir(parents=True)
    with pytest.raises(IsADirectoryError, match=r"SST-2.train\.tsv"):
        glue.read("SST-2", tmp_path, "train")
    for task, split in (("RTE", "dev_matched"), ("AX", "dev"), ("MNLI", "../RTE/dev")):
        with pytest.raises(ValueError, match=rf"{task} has no split '{split}'; it has .*test"):
            glue.read(task, tmp_path, split)


def test_find_task():
    """Catches a spelling that is not accepted, or a typo answered without the nearest name."""
    for name in ("STS-B", "stsb", "STS_B", "sts-b"):
        assert glue.find_task(name).name == "STS-B"
    assert [glue.find_task(name).name for name in glue.TASKS] == list(glue.TASKS)
    for typo, meant in {"MPRC": "MRPC", "sst": "SST-2", "kola": "CoLA", "QQ": "QQP"}.items():
        with pytest.raises(ValueError, match=f"no task '{typo}', did you mean {meant}"):
            glue.find_task(typo)


# --- metrics -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "metric, labels, predictions, expected",
    [
        ("accuracy", [1, 0, 1, 1], [1, 1, 1, 1], 3 / 4),
        ("f1", [1, 1, 1, 0, 0], [1, 1, 0, 1, 0], 2 / 3),
        ("macro_f1", [0, 0, 1], [0, 1, 1], 2 / 3),
        ("macro_f1", [0, 0], [0, 2], 1 / 3),
        ("matthews", [1, 1, 1, 0, 0], [1, 1, 0, 1, 0], 1 / 6),
        ("matthews", [0, 1, 2, 2], [0, 2, 2, 1], 1 / 5),
        ("pearson", [1, 2, 3, 4], [0, 0, 0, 4], 0.6**0.5),
        ("spearman", [1, 2, 3, 4], [10, 20, 20, 90], 0.9**0.5),
    ],
)
def test_metric_by_hand(metric, labels, predictions, expected):
    """Catches a wrong formula, even where no other library is installed.

    accuracy: 3 of 4 equal. f1: TP 2, FP 1, FN 1: 2*2 / (2*2 + 1 + 1) = 2/3.
    macro_f1: 2*1 / (2 + 1) for either class; (2*1 / (2 + 1) + 0) / 2 = 1/3.
    matthews: TP 2, TN 1, FP 1, FN 1: (2*1 - 1*1) / sqrt(3 * 3 * 2 * 2) = 1/6; of three classes:
    2 hits of n = 4, counts (1, 1, 2) on both sides: (2*4 - 6) / sqrt((16 - 6) * (16 - 6)) = 1/5.
    pearson: from the means (-1.5 -.5 .5 1.5) and (-1 -1 -1 3): 6 / sqrt(5 * 12) = sqrt(.6).
    spearman: ranks 1, 2.5, 2.5, 4: (-1.5 -.5 .5 1.5) and (-1.5 0 0 1.5): 4.5 / sqrt(5 * 4.5).
    """
    found = glue.METRICS[metric](np.array(labels), np.array(predictions))
    assert type(found) is float and found == pytest.approx(expected, abs=1e-15)


@pytest.mark.filterwarnings("ignore:A single label was found")
def test_classification_metrics_equal_sklearn():
    """Catches a formula that fails on imbalance, absent classes, any ids, or inverted answers; a
    mean over classes that leaves out those on one side alone, or weighs them by size."""
    oracle = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 2, (2, 500))
    c, d = np.array([-3, 0, 7, 900])[rng.integers(0, 4, (2, 500))]
    many, others = rng.integers(0, 200, (2, 500))
    rare = (np.arange(2000) == 5).astype(int)
    none, one = np.zeros(9, int), np.ones(9, int)
    for x, y in [
        (a, b), (a, a), (a, 1 - a), (rare, rare), (rare, rare[::-1]), (c, d), (c, c), (a, c),
        (none, none), (one, one), (none, one), (a[:9], one), (a[:9], none), (one[:1], one[:1]),
        (one[:1], none[:1]), (a[:2], b[:2]), (many, others), (many, many[::-1]), (many, 0 * many),
    ]:  # fmt: skip
        assert glue.accuracy(x, y) == pytest.approx(oracle.accuracy_score(x, y), abs=1e-12)
        assert glue.matthews(x, y) == pytest.approx(oracle.matthews_corrcoef(x, y), abs=1e-12)
        expected = oracle.f1_score(x, y, average="macro")
        assert glue.macro_f1(x, y) == pytest.approx(expected, abs=1e-12)
        if {*x, *y} <= {0, 1}:
            expected = oracle.f1_score(x, y, zero_division=0)
            assert glue.f1(x, y) == pytest.approx(expected, abs=1e-12)


def test_correlations_equal_scipy():
    """Catches ranks that do not share ties, and a formula that loses digits."""
    stats = pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(2, 500))
    coarse, other = rng.integers(0, 4, (2, 500))
    for a, b in [
        (x, y), (x, x), (x, -x), (x, np.exp(5 * x)), (coarse, other), (coarse, x), (coarse, coarse),
        (coarse == 0, x), (x + 1e5, y - 1e5), (x.astype(np.float32), y), (x[:2], y[:2]),
    ]:  # fmt: skip
        a, b = np.asarray(a) * 1, np.asarray(b)
        assert glue.pearson(a, b) == pytest.approx(stats.pearsonr(a, b)[0], abs=1e-12)
        assert glue.spearman(a, b) == pytest.approx(stats.spearmanr(a, b)[0], abs=1e-12)


@pytest.mark.filterwarnings("error")
def test_no_metric_is_ever_nan():
    """Catches 0/0 for one class, constants, single rows, and scores that diverged."""
    for rows in ([0, 0, 0], [1, 1, 1], [0.1, 0.1, 0.1], [2.5]):
        constant, other = np.array(rows), np.arange(len(rows))
        for name in ("matthews", "pearson", "spearman"):
            assert glue.METRICS[name](constant, other) == 0.0
            assert glue.METRICS[name](other, constant) == 0.0
    assert glue.f1(np.array([0, 0]), np.array([0, 0])) == 0.0
    x = np.array([1.0, 2.0, 3.0])
    for bad in (np.nan, np.inf, -np.inf):
        for name in ("pearson", "spearman"):
            assert glue.METRICS[name](x, np.array([1.0, bad, 3.0])) == 0.0


@pytest.mark.filterwarnings("error")
def test_scores_of_any_size_and_number():
    """Catches digits lost before the mean is taken off, squares that underflow to 0/0 or overflow
    to 0, and products of counts that overflow 64 bits (1/6 by hand, as above, 200,000 times).

    By hand: of the deviations from the means 11/4 and 5/2 the products sum to 4.5, the squares to
    8.75 and 5.
    """
    x, y = np.array([1.0, 2.0, 3.0, 5.0]), np.array([1.0, 2.0, 4.0, 3.0])
    for offset in (0.0, 1e6, 1.7e9):
        assert glue.pearson(x + offset, y) == pytest.approx(4.5 / (8.75 * 5) ** 0.5, abs=1e-12)
    for scale in (1e-300, 1e-200, 1e200, 1e300):
        assert glue.pearson(x * scale, x) == pytest.approx(1.0, abs=1e-12)
    labels, predictions = np.tile([[1, 1, 1, 0, 0], [1, 1, 0, 1, 0]], 200_000)
    assert glue.matthews(labels, predictions) == pytest.approx(1 / 6, abs=1e-12)


def test_scores_of_every_task():
    """Catches a metric missing, not times 100, or a headline that is not GLUE's mean."""
    labels, predictions = [1, 1, 1, 0, 0], [1, 1, 0, 1, 0]  # the f1 and matthews done by hand above
    names = {task: ["accuracy"] for task in ("SST-2", "MNLI", "QNLI", "RTE", "WNLI")}
    names |= dict.fromkeys(["MRPC", "QQP"], ["accuracy", "f1"])
    names |= {"CoLA": ["matthews"], "AX": ["matthews"], "STS-B": ["pearson", "spearman"]}
    assert names.keys() == glue.TASKS.keys()
    for task, metrics in names.items():
        assert list(glue.score(task, labels, predictions)) == [*metrics, "score"]
    found = glue.score("MRPC", labels, predictions)  # accuracy 3/5, (60 + 66.67) / 2
    assert found == pytest.approx({"accuracy": 60.0, "f1": 200 / 3, "score": 190 / 3})
    assert glue.score("CoLA", labels, predictions)["score"] == pytest.approx(100 / 6)


@pytest.mark.parametrize(
    "labels, predictions",
    [([1, 0], [1]), ([1], [1, 0]), ([], []), ([1, 0], [[1], [0]]), ([[1, 0]], [[1, 0]]), (1, 1)],
)
def test_shapes_that_do_not_fit_are_refused(labels, predictions):
    """Catches broadcasting (n,) against (n, 1) or (1,), and a score of nothing."""
    with pytest.raises(ValueError, match="RTE: predictions of shape .* for labels of shape"):
        glue.score("RTE", labels, predictions)


def test_values_as_the_server_spells_them():
    """Catches ids for names, names for 0/1, and scores outside 0..5 or in long digits."""
    scores = np.array([-0.3, 0, 2.34567, 7, -0.0])
    assert glue.values("STS-B", scores) == ["0.000", "0.000", "2.346", "5.000", "0.000"]
    assert glue.values("RTE", np.array([0, 1])) == ["entailment", "not_entailment"]
    assert glue.values("QNLI", [1]) == ["not_entailment"]
    for task in ("MNLI", "AX"):
        assert glue.values(task, [2, 1, 0]) == ["contradiction", "neutral", "entailment"]
    for task in ("CoLA", "SST-2", "MRPC", "QQP", "WNLI"):
        assert glue.values(task, [1, 0]) == ["1", "0"]
    for wrong in ([-1], [2], [0.5]):
        with pytest.raises(
            ValueError, match=r"RTE: predictions \[.*\], expected class ids below 2"
        ):
            glue.values("RTE", wrong)
    with pytest.raises(ValueError, match=r"STS-B: predictions \[nan\], expected finite"):
        glue.values("STS-B", [1.0, float("nan")])


def test_size_of_qqp_dev_takes_no_time(tmp_path):
    """Catches a reader or a metric that takes more than linear time (seconds, not 0.2 s)."""
    n, rng = 40430, np.random.default_rng(0)
    texts = [(f"Where is house {i} ?", f"Is {i} a house ?") for i in range(n)]
    lay_out(tmp_path, "QQP", "dev", texts, rng.choice(["0", "1"], n))
    start = time.perf_counter()
    labels = glue.read("QQP", tmp_path, "dev").labels
    for task in ("QQP", "CoLA", "STS-B"):
        glue.score(task, labels, rng.integers(0, 2, n))
    glue.score("STS-B", labels + rng.normal(size=n), rng.normal(size=n))
    assert time.perf_counter() - start < 3


# --- the real files ------------------------------------------------------------------------------


@real
def test_real_files_are_read_whole(capsys):
    """Catches rows merged, cut or dropped, a cell without text, and official counts that are not
    those of the official files."""
    there = [task for name, task in glue.TASKS.items() if (Path(REAL) / name).is_dir()]
    for task in there:
        for split, count in zip(task.splits, task.rows):
            texts, labels = glue.read(task, REAL, split)
            assert len(texts) == count and all(map(all, texts) if task.pairs else texts)
            assert labels is None if split.startswith("test") else len(labels) == count
    assert glue.main(["check", REAL]) == 0
    printed = capsys.readouterr().out
    assert there and all(f"\n{task.name} " in printed for task in there)
