"""Whole runs through the command line, on files of our own: the contract and the guards."""

import inspect
import json
import math
import os
import random
import re
import shlex
import subprocess
import sys
import warnings
from dataclasses import fields, replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import later, slow

import data
import glue
import microbert
from microbert import Bert, BertConfig, DistillConfig, load_bert, main, save_bert

FIT_STEPS = 5  # of the experts
WORDS = "a the cat dog bird fish sat ran ate saw on in mat tree not big small red old".split()
QUICK = ["--epochs", "1", "--teacher-epochs", "1", "--batch-size", "8", "--device", "cpu",
         "--transfer-ratio", "0.5", "--max-length", "24", "--no-baseline", "--gan"]  # fmt: skip


@pytest.fixture(autouse=True)
def few_steps(monkeypatch):
    """Little time for experts and files; the built-in task's run, a process of its own, has it."""
    monkeypatch.setitem(microbert.fit_experts.__kwdefaults__, "steps", FIT_STEPS)
    monkeypatch.setattr(os, "fsync", lambda _: None)  # no power fails here


@pytest.fixture
def files(tmp_path):
    """A folder with an untrained BERT checkpoint and GLUE tasks of random sentences."""
    rng = random.Random(0)
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert/vocab.txt").write_text("\n".join(vocabulary) + "\n")
    torch.manual_seed(0)
    save_bert(Bert(shape()), tmp_path / "bert")

    def table(name, texts, label, cells, count):
        """A TSV of random texts with an index and, where there is a label column, these labels."""
        columns = ["sentence1", "sentence2"] if texts == 2 else ["sentence"]
        lines = [["index", *columns, *[label] * bool(label)]]
        for i in range(count):
            some = [" ".join(rng.choices(WORDS, k=rng.randint(3, 9))) for _ in columns]
            lines.append([str(i), *some, *([cells[i % len(cells)]] if label else [])])
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("".join("\t".join(line) + "\n" for line in lines))

    tasks = {"SST-2": (1, "label", "01"), "RTE": (2, "label", glue.TASKS["RTE"].labels)}
    tasks |= {"STS-B": (2, "score", [f"{i}.5" for i in range(5)])}
    for task, (texts, label, cells) in tasks.items():
        for split, count in (("train", 40), ("dev", 21), ("test", 13)):
            table(f"{task}/{split}.tsv", texts, label * (split != "test"), cells, count)
    for split, count in zip(glue.TASKS["MNLI"].splits, (40, 20, 11, 7, 5)):
        label = "gold_label" * (not split.startswith("test"))
        table(f"MNLI/{split}.tsv", 2, label, glue.TASKS["MNLI"].labels, count)
    table("AX/diagnostic.tsv", 2, "", [], 6)
    return tmp_path


def shape(**changes):
    """The config of the tests' BERT."""
    tiny = BertConfig(
        vocab_size=5 + len(WORDS), hidden_size=16, num_hidden_layers=4, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=32,
    )  # fmt: skip
    return replace(tiny, **changes)


def run(files, *arguments):
    """main() on the files, with quick settings."""
    return main([*map(str, arguments), "--data-dir", str(files), "--device", "cpu"])


def distil(files, task, *more, out="out"):
    """A quick run of everything."""
    made = ("--task", task, "--bert", files / "bert", "--out", files / out, *QUICK, "--force")
    return run(files, *made, *more)


def refused(capsys, code, *needles):
    """Exit code 2 and one line on stderr that holds every needle."""
    error = capsys.readouterr().err
    assert code == 2 and error.startswith("error: ") and error.count("\n") == 1, error
    for needle in needles:
        assert str(needle) in error, error


def results_of(out):
    """results.json."""
    return json.loads((out / "results.json").read_text())


def steps_of(out):
    """The training steps in log.jsonl."""
    events = map(json.loads, (out / "log.jsonl").read_text().splitlines())
    return [event for event in events if "loss" in event]


def weights_of(*folders):
    """The weights file of each, once where they are all the same."""
    return {(folder / "model.safetensors").read_bytes() for folder in folders}


def checkpoint(files, name, **changes):
    """A folder with a fresh BERT and the tests' tokenizer."""
    save_bert(Bert(shape(**changes)), files / name, tokenizer_from=files / "bert")
    return files / name


# --- the contract --------------------------------------------------------------------------------


@pytest.mark.parametrize("task", ["SST-2", "STS-B", "MNLI"])
def test_a_run_leaves_what_the_contract_says(files, task, capsys):
    """Catches a missing file or key, scores not times 100, terms that do not add up to the loss."""
    assert distil(files, task, "--layers", "2", "--log-every", "1", "--seed", "3") == 0
    out, results, printed = files / "out", results_of(files / "out"), capsys.readouterr().out
    labels = glue.TASKS[task].labels or ("score",)
    assert (results["task"], results["seed"]) == (task, 3)
    for name, layers in (("teacher", 4), ("pruned", 2), ("student", 2)):
        scores = results[name]
        assert scores["layers"] == layers and math.isfinite(scores["score"])
        metrics = [scores[metric] for metric in glue.TASKS[task].metrics]
        assert scores["score"] == pytest.approx(sum(metrics) / len(metrics))
        parameters = Bert(shape(num_hidden_layers=layers, labels=labels)).parameters()
        assert scores["parameters"] == sum(p.numel() for p in parameters)
    student, config = results["student"], results["config"]
    assert ("dev_mismatched" in student) == (task == "MNLI")
    assert (results["teacher"]["updates"], student["updates"]) == (5, 8)
    assert results["retention"] == pytest.approx(student["score"] / results["teacher"]["score"])
    assert {"teacher", "cache", "experts", "pruned", "student"} == set(results["seconds"])
    assert (config["layers"], config["lr"], config["logit_adjustment"]) == (2, 1e-4, 0)
    assert {"torch", "tokenizers", "numpy", "python", "microbert"} == set(results["versions"])
    assert {"teacher", "student"} == set(results["examples_per_second"])
    size = (out / "student/model.safetensors").stat().st_size
    assert student["megabytes"] == round(size / 1e6, 1)
    steps = steps_of(out)
    for event in steps:
        terms = [event[name] for name in ("hard", "soft", "align", "adv") if name in event]
        assert event["loss"] == pytest.approx(sum(terms))
    # teacher: 40 / 8 steps; student: 40 and 20 transfer texts, the last batch partial
    assert [e["phase"] for e in steps] == ["teacher"] * 5 + ["student"] * 8
    for part in ("teacher", "student"):
        assert load_bert(out / part).config.labels == tuple(labels)
        assert (out / part / "vocab.txt").is_file()
    left = sorted(p.name for p in out.iterdir())
    assert left == ["log.jsonl", "results.json", "student", "teacher"]
    assert not list(out.rglob("*.part"))
    assert "the teacher's layers 1, 4, as they are" in printed
    assert printed.count("[CLS]") == 2 and "of teacher" in printed


@pytest.mark.parametrize("task", ["SST-2", "STS-B"])
def test_the_closing_table_compares_with_plain_fine_tuning(files, capsys, monkeypatch, task):
    """Catches a baseline that sees the teacher, transfer text or other passes, a table whose rows
    are mixed up, class ids for scores, values out of 0..5, and predict without --out."""
    seen, train = [], microbert.train

    def watched(model, encoded, objective, config, log, **rest):
        train(model, encoded, objective, config, log, **rest)
        terms = {"hard", "soft", "align", "adv"} & steps_of(files / "out")[-1].keys()
        seen.append((log.phase, len(encoded), rest["epochs"], rest["lr"], terms))

    monkeypatch.setattr(microbert, "train", watched)
    made = ("--teacher-epochs", "2", "--lr", "1e-3")
    assert distil(files, task, "--baseline", *made) == 0
    assert seen == [
        ("teacher", 40, 2, {"STS-B": 2e-4}.get(task, 5e-5), {"hard"}),
        ("student", 60, 1, 1e-3, {"hard", "soft", "align", "adv"}),
        ("baseline", 40, 2, 1e-3, {"hard"}),
    ]
    results, shown = results_of(files / "out"), capsys.readouterr().out
    rows = re.findall(
        r"^([\w -]+?) +(\d) +([\d,]+) +([\d.]+) +([\d,]+) +([\d.-]+) ",
        shown.rpartition("of teacher\n")[2], flags=re.M,
    )  # fmt: skip
    called = {"teacher": "teacher", "pruned": "pruned", "baseline": "fine-tuned only"}
    for (name, title), row in zip((called | {"student": "MicroBERT"}).items(), rows, strict=True):
        found, speeds = results[name], results["examples_per_second"]
        rate = f"{speeds['teacher' if name == 'teacher' else 'student']:,.0f}"
        size = (str(found["layers"]), f"{found['parameters']:,}", f"{found.get('updates', 0):,}")
        assert row[:5] == (title, *size, rate)
        assert float(row[5]) == pytest.approx(found["score"], abs=0.006)
        updates = {"teacher": 10, "baseline": 10, "student": 8}
        assert found.get("updates") == updates.get(name)
    cut = ("--max-length", "24")
    assert run(files, "evaluate", files / "out/baseline", "--task", task, *cut) == 0
    assert f"score {results['baseline']['score']:.2f}" in capsys.readouterr().out
    assert run(files, "predict", files / "out", "--task", task, "--split", "test", *cut) == 0
    lines = capsys.readouterr().out.split("\n")
    form = r"\d+\t[0-5]\.\d{3}" if task == "STS-B" else r"\d+\t[01]"  # as the server wants
    assert len(lines) == 15 and all(re.fullmatch(form, line) for line in lines[1:-1])
    command = shlex.split(re.findall(r"^next: python microbert.py (.*)$", shown, flags=re.M)[-1])
    assert command[:2] == ["predict", str(files / "out")] and main([*command, *cut]) == 0


def test_predictions_and_evaluation(files, capsys):
    """Catches shuffled or missing rows, a wrong spelling, a score the checkpoint has not, and
    metrics against placeholder labels (PKD's issues 9 and 11)."""
    assert distil(files, "MNLI") == 0
    score, labels = results_of(files / "out")["student"]["score"], glue.TASKS["MNLI"].labels
    for task, split, count in (("MNLI", "dev", 20), ("MNLI", "test", 7), ("AX", "test", 6),
                               ("MNLI", "test_mismatched", 5)):  # fmt: skip
        where = files / "predictions.tsv"
        arguments = ("predict", files / "out", "--task", task, "--split", split, "--out", where)
        assert run(files, *arguments) == 0
        rows = [line.split("\t") for line in where.read_text().split("\n")[:-1]]
        assert rows[0] == ["index", "prediction"]
        assert [row[0] for row in rows[1:]] == [str(i) for i in range(count)]
        assert {row[1] for row in rows[1:]} <= set(labels)
        if split == "dev":
            gold = glue.read("MNLI", files, "dev").labels
            right = [labels[g] == row[1] for g, row in zip(gold, rows[1:])]
            assert 100 * np.mean(right) == pytest.approx(score)
    capsys.readouterr()
    evaluate = ("evaluate", files / "out/student", "--max-length", "24", "--task")
    assert run(files, *evaluate, "MNLI") == 0
    printed = capsys.readouterr().out
    assert f"{score:.2f}" in printed and "dev_mismatched" in printed
    assert run(files, *evaluate, "MNLI", "--split", "dev_mismatched") == 0
    assert "dev_matched" not in capsys.readouterr().out
    refused(capsys, run(files, *evaluate, "AX"), "AX", "predict")


def test_a_teacher_once_made_is_reused(files):
    """Catches a teacher trained again, changed, or not found in the folder of its run, a switch
    that is not heard, and a limit that samples, or that also cuts dev."""
    made = ("--task", "RTE", "--bert", files / "bert", "--out", files / "made")
    assert run(files, "finetune", *made, "--epochs", "1", "--lr", "1e-3", "--batch-size", "8") == 0
    first = results_of(files / "made")
    assert first["config"]["teacher_epochs"] == 1 and first["config"]["teacher_lr"] == 1e-3
    options = ("--bert", "", "--teacher", files / "made", "--keep-layers", "1,4", "--no-gan")
    limit = ("--limit", "10", "--transfer-ratio", "0", "--log-every", "1")
    assert distil(files, "RTE", *options, "--no-moe", *limit) == 0
    assert results_of(files / "out")["teacher"]["score"] == first["teacher"]["score"]
    assert len(weights_of(files / "made/teacher", files / "out/teacher")) == 1
    for event in steps_of(files / "out"):
        assert event["steps"] == 2 and "adv" not in event and "align" in event
    assert '"n": 21' in (files / "out/log.jsonl").read_text()


def test_the_teacher_is_no_part_of_the_student(files, monkeypatch):
    """Catches a teacher inside the student's module tree, or run again in an epoch."""
    trained, calls = [], []
    train, forward = microbert.train, Bert.forward

    def watched(model, *arguments, **options):
        calls.clear()
        train(model, *arguments, **options)
        trained.append((model, {*calls}))

    monkeypatch.setattr(microbert, "train", watched)
    monkeypatch.setattr(Bert, "forward", lambda self, *a, **k: (
        calls.append(self), forward(self, *a, **k))[1])  # fmt: skip
    assert distil(files, "SST-2", "--epochs", "3") == 0
    student, called = trained[-1]
    assert len(trained) == 2 and called == {student}
    assert sum(isinstance(module, Bert) for module in student.modules()) == 1


# --- data of your own ----------------------------------------------------------------------------


def own_data(folder, labels, texts=1, counts=(60, 24, 9)):
    """A folder whose rows take these labels in turn; the sentence names its label by its words."""
    rng = random.Random(0)
    for split, count in zip(("train", "dev", "test"), counts):
        lines = ["label\tother\t" + ("sentence" if texts == 1 else "sentence2\tsentence1")]
        for i in range(count):
            words = [WORDS[i % len(labels) % len(WORDS)]] * 3 + [rng.choice(WORDS)]
            lines.append("\t".join([labels[i % len(labels)], f"x{i}", *[" ".join(words)] * texts]))
        folder.mkdir(exist_ok=True)
        (folder / f"{split}.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


@pytest.mark.parametrize("classes, texts", [later(2, 1), (3, 2), later(200, 1)])
def test_classes_of_your_own(files, capsys, classes, texts):
    """Catches a part of the method that takes two or three classes for granted, and lost names."""
    labels = [f"class {i}" for i in range(classes - 2)]
    labels += ["non\u00a0lu", "\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645"]  # only look odd
    count = max(60, classes)
    folder = own_data(files / "mine", labels, texts, (count, count, 9))
    assert distil(files, folder) == 0
    results = results_of(files / "out")
    for part in ("teacher", "student"):
        scores = results[part]
        assert scores["score"] == pytest.approx((scores["accuracy"] + scores["macro_f1"]) / 2)
        assert load_bert(files / "out" / part).config.labels == tuple(sorted(labels))
    # the labels of dev come back through predict, by name, and make the score
    (folder / "train.tsv").unlink()  # which predict and evaluate do not need
    where = files / "predictions.tsv"
    assert run(files, "predict", files / "out", "--task", folder, "--out", where) == 0
    said = [line.split("\t")[1] for line in where.read_text("utf-8").split("\n")[1:-1]]
    right = [said[i] == labels[i % classes] for i in range(count)]
    assert 100 * np.mean(right) == pytest.approx(results["student"]["accuracy"])
    capsys.readouterr()
    assert run(files, "evaluate", files / "out", "--task", folder, "--split", "test") == 0
    assert "test n=9" in capsys.readouterr().out
    refused(capsys, distil(files, folder, out="new"), folder / "train.tsv", "no such file")


@pytest.mark.parametrize("center, spread", [(-5e4, 2000.0), pytest.param(0.5, 1e-3, marks=slow)])
def test_scores_of_your_own(files, capsys, center, spread):
    """Catches scores learnt on a scale that only GLUE's 0..5 has, answers on another scale, and a
    teacher whose scores are scaled each time it is distilled."""
    folder = own_data(files / "mine", [str(center + spread * (i - 2)) for i in range(5)])
    options = ("--regression", "--teacher-epochs", "12", "--epochs", "6", "--teacher-lr", "5e-3")
    assert distil(files, folder, *options) == 0
    assert f"predict {files / 'out'} '" in capsys.readouterr().out
    gold = glue.read(glue.own_task(folder, regression=True), "", "dev").labels
    for part in ("teacher", "student"):
        scores, where = results_of(files / "out")[part], files / "p.tsv"
        assert scores["score"] == pytest.approx((scores["pearson"] + scores["spearman"]) / 2)
        assert run(files, "predict", files / "out" / part, "--task", folder, "--out", where) == 0
        said = np.array([float(line.split("\t")[1]) for line in where.read_text().splitlines()[1:]])
        assert np.abs(said - gold).mean() < 0.5 * spread  # a constant would be 1.2 spreads off
    again = ("--regression", "--bert", "", "--teacher", files / "out/teacher")
    assert distil(files, folder, *again, out="two") == 0
    assert len(weights_of(files / "out/teacher", files / "two/teacher")) == 1


@pytest.mark.filterwarnings("error::RuntimeWarning")
@pytest.mark.parametrize("labels", ["3 3", "1.7e9 1700000100", "1e200 2e200", "1e-50 2e-50"])
def test_scores_that_float32_cannot_tell_apart(files, capsys, labels):
    """Catches a division by 0, a training that ends in NaN, and predictions that are all alike."""
    folder = own_data(files / "mine", labels.split())
    refused(capsys, distil(files, folder, "--regression"), "mean", "standard deviation", "float32")
    assert not (files / "out/log.jsonl").exists()


def test_what_predict_and_evaluate_ask_for(files, capsys):
    """Catches a text that is refused because an option came first, predict that insists on a label
    column, and metrics of a split without labels, of other labels, or with part of a name."""
    folder, cut = own_data(files / "mine", ["Yes !", "no"]), ("--max-length", "24")
    made, said = checkpoint(files, "t", labels=("YES_!", "NO")), set()
    for words in (
        ("the cat", "a dog", *cut),
        (*cut, "the cat", "a dog"),
        ("the cat", *cut, "a dog"),
    ):
        assert run(files, "predict", made, *words) == 0
        said.add(capsys.readouterr().out)
    assert len(said) == 1 and said != {""}
    refused(capsys, main(["predict", str(made), "--jsn", "a"]), "--jsn", "--json?")
    options = (made, "--task", folder, *cut, "--split")
    assert run(files, "evaluate", *options, "test") == 0
    checkpoint(files, "t", labels=("no", "Yes !"))
    for name in ("train", "dev"):
        (folder / f"{name}.tsv").unlink()
    for table, *needles in (("label\tsentence\n?\tthe cat\n", "test.tsv:2", "'?'", "Yes !"),
                            ("sentence\nthe cat\n", "test has no labels", "predict")):  # fmt: skip
        (folder / "test.tsv").write_text(table)
        capsys.readouterr()
        assert run(files, "predict", *options, "test") == 0
        assert len(capsys.readouterr().out.splitlines()) == 2
        refused(capsys, run(files, "evaluate", *options, "test"), *needles)
    refused(capsys, run(files, "evaluate", *options, "d"), "no split d")


@pytest.mark.parametrize("name", ["SST-2", "mine"])
def test_transfer_text_is_other_tasks_and_none_of_dev_or_test(files, capsys, name):
    """Catches dev or test sentences that come back from another task's file, own data that is left
    without transfer text, or that stumbles over a label of another task."""
    folder, path, kept = own_data(files / "mine", ["a", "b"]), files / "RTE/train.tsv", []
    task = glue.find_task(name if name == "SST-2" else str(folder))
    for split in ("dev", "test"):
        kept += glue.read(task, files, split).texts
    text = path.read_text().replace("not_entailment", "perhaps")
    path.write_text(f"{text}98\t{kept[0].upper()}!\ta cat\tentailment\n")
    config = DistillConfig(data_dir=str(files), transfer_ratio=20.0)
    texts = microbert.gather_transfer(config, task, glue.read(task, files, "train").texts, {})
    foreign = data.sentences_of(glue.read("RTE", files, "train", with_labels=False).texts)
    assert len(texts) > 60 and {*foreign} & {*texts}
    plain = [{re.sub(r"\W", "", text).lower() for text in some} for some in (kept, texts)]
    assert not plain[0] & plain[1]
    assert re.search(r"[1-9]\d* left out", capsys.readouterr().out)


def test_passes_chosen_by_the_number_of_texts():
    """Catches small data trained for a handful of steps or shown once, large data for too many."""
    chosen = {5749: 5, 67_349: 1, 2000: 10, 100_000: 1, 18_340: 2, 42_755: 1, 12: 200, 100: 50}
    assert {count: microbert.auto_epochs(count, 32, 1) for count in chosen} == chosen  # 1, 4 steps
    assert [microbert.auto_epochs(count, 32, 2) for count in (67_349, 42_755)] == [2, 2]
    for count, passes in ((8000, 3), (18_340, 2), (24_000, 1), (50_001, 1)):
        config, labels = DistillConfig(gan=False, device="cpu"), torch.zeros(count)
        made = {"config": config, "encoded": range(count)}
        cache = microbert.TeacherCache(torch.zeros(0), torch.zeros(1, 2), labels)
        lesson = microbert.student_lesson(SimpleNamespace(**made), cache, None)
        assert (len(lesson.texts), lesson.epochs) == (count, passes)


# --- guards --------------------------------------------------------------------------------------


def test_an_ignorant_teacher_stops_the_run(files, capsys):
    """Catches a run on a teacher at the majority rate, as in TinyBERT's issue 52."""
    teacher, made = Bert(shape(labels=glue.TASKS["SST-2"].labels)), files / "dull"
    torch.nn.init.zeros_(teacher.classifier.weight)
    save_bert(teacher, made, tokenizer_from=files / "bert")
    options = ("--task", "SST-2", "--teacher", made, "--out", files / "out", *QUICK)
    refused(capsys, run(files, *options), "52.38", "--force")  # 11 of 21 dev labels are 0
    assert not (files / "out/student").exists()
    assert run(files, *options, "--force") == 0


def test_a_rare_class_is_told_its_remedy(files, capsys):
    """Catches a run that ends at the most frequent label without saying what helps."""
    task = own_data(files / "mine", ["ham"] * 19 + ["spam"], counts=(60, 40, 9))
    options = ("--task", task, "--bert", files / "bert", "--out", files / "out", *QUICK)
    refused(
        capsys,
        run(files, *options),
        "nothing to distil",
        "--logit-adjustment 1 helps where a class is rare",
    )


def test_scores_of_each_class_are_shown(files, capsys):
    """Catches classes of dev that are not told apart, and words among the JSON."""
    task = own_data(files / "mine", ["no", "yes", "so"])
    assert distil(files, task) == 0
    capsys.readouterr()
    given = ("evaluate", files / "out", "--task", task, "--max-length", "24")
    assert run(files, *given) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:]] == ["no:", "so:", "yes:"]
    assert run(files, *given, "--json") == 0
    shown = capsys.readouterr()
    found = json.loads(shown.out)
    assert "n=24" in shown.err and found["score"] == results_of(files / "out")["student"]["score"]
    assert [row["n"] for row in found["classes"].values()] == [8, 8, 8]
    assert found["macro_f1"] == pytest.approx(np.mean([r["f1"] for r in found["classes"].values()]))
    for line, (name, row) in zip(lines[1:], found["classes"].items()):
        told = " ".join(f"{key} {row[key]:.2f}" for key in ("precision", "recall", "f1"))
        assert line == f"  {name}: {told} n 8"


def test_labels_that_teach_more_than_the_teacher_are_admitted(files, capsys, monkeypatch):
    """Catches a closing table that leaves it to its reader to see it."""
    note, scores = "note: here the labels alone teach the student more", {}
    score_model = microbert.score_model

    def scored(model, tokenizer, task, config, log):
        found, logits = score_model(model, tokenizer, task, config, log)
        return found | {"score": scores.get(log.phase, 50.0)}, logits

    monkeypatch.setattr(microbert, "score_model", scored)
    for scores["student"], admitted in ((60.0, False), (40.0, True)):
        assert distil(files, "SST-2", "--baseline", "--overwrite") == 0
        assert (note in capsys.readouterr().out) == admitted


def test_a_file_is_told_within_seconds(monkeypatch, capsys):
    """Catches fifty slow steps without a line."""
    log, now = microbert.Log(None, 50), [0.0]
    monkeypatch.setattr(microbert.time, "perf_counter", lambda: now[0])
    log.shown = log.started = 0.0
    for step in range(1, 8):
        now[0] += 6.0
        log.step(step, 200, {"hard": torch.tensor(1.0)}, 1e-3, 1.0, 1)
    assert [line.split()[1] for line in capsys.readouterr().out.splitlines()] == ["3/200", "6/200"]


@pytest.mark.parametrize("count", [0, 1, 2])
def test_a_gpu_is_named_by_its_number(monkeypatch, count):
    """Catches a GPU that is not there met deep in torch, and one named that is not used."""
    used = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "set_device", used.append)
    for name in ("cuda:1", "cuda:2", "cuda:x", "tpu", "cuda:"):
        if (name, count) == ("cuda:1", 2):
            microbert.settle(DistillConfig(device=name, precision="fp32"))
        else:
            with pytest.raises(ValueError, match=f"device '{name}' is not there"):
                microbert.resolve_device(name)
    assert used == [torch.device("cuda:1")] * (count == 2)


def test_no_autocast_where_none_is_wanted(monkeypatch):
    """Catches an autocast that is off, which some devices refuse all the same."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: pytest.fail("autocast"))
    with microbert.autocast(DistillConfig(device="cpu", precision="fp32")):
        pass


def test_only_a_gpu_is_copied_to_without_waiting(monkeypatch):
    """Catches a copy to a Mac's GPU that is read while it is written."""
    seen = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: seen.append("pinned") or tensor)
    monkeypatch.setattr(
        torch.Tensor, "to", lambda *_, **more: seen.append(more) or torch.ones(3, 1)
    )
    encoded = data.Encoded(np.ones(1, np.int32), np.ones(1, np.uint8), np.array([0, 1]))
    for kind in ("mps", "cuda"):
        microbert.ship(torch.ones(1), torch.device(kind))
        data.collate(encoded, [0], torch.device(kind))
    assert seen == [{}, {}] + ["pinned", {"non_blocking": True}] * 2 + [{}]


def test_labels_in_another_order_are_remapped(files):
    """Catches classes taken by position (TinyBERT's issue 229), or LABEL_10 for LABEL_2."""
    torch.manual_seed(1)
    turned, written = tuple(f"LABEL_{i}" for i in range(11)), set()
    folder = own_data(files / "mine", wanted := tuple(sorted(turned)))
    teacher, other = (
        Bert(shape(labels=names, initializer_range=1.0)) for names in (wanted, turned)
    )
    state = dict(teacher.state_dict())
    for name in ("classifier.weight", "classifier.bias"):
        state[name] = state[name][[wanted.index(label) for label in turned]]
    other.load_state_dict(state)
    for model in (teacher, other):
        save_bert(model, files / "t", tokenizer_from=files / "bert")
        assert run(files, "predict", files / "t", "--task", folder, "--out", files / "p.tsv") == 0
        written.add((files / "p.tsv").read_text())
    assert len(written) == 1 and len(set(written.pop().split()[3::2])) > 1
    assert distil(files, folder, "--bert", "", "--teacher", files / "t") == 0
    assert load_bert(files / "out/student").config.labels == wanted


def test_predictions_do_not_take_the_place_of_data(files, capsys):
    """Catches --out that overwrites the text it predicts, or a link."""
    made = checkpoint(files, "t", labels=glue.TASKS["RTE"].labels)
    options = ("predict", made, "--task", "RTE", "--max-length", "24", "--out")
    path = files / "RTE/dev.tsv"
    before = path.read_bytes()
    refused(capsys, run(files, *options, path), path, "holds no predictions")
    assert path.read_bytes() == before
    (files / "link").symlink_to(files / "there.tsv")
    for _ in range(2):  # predictions may be written again
        assert run(files, *options, files / "link") == 0
    assert (files / "link").is_symlink() and (files / "there.tsv").read_text().startswith("index")


def test_a_random_head_is_not_scored(files, capsys):
    """Catches google-research/bert issue 1037: metrics of a classifier nobody trained."""
    path = files / "bert/model.safetensors"
    tensors = microbert.read_safetensors(path)
    kept = {name: t for name, t in tensors.items() if not name.startswith("classifier")}
    microbert.write_safetensors(path, kept)
    with warnings.catch_warnings(record=True) as lines:  # which would stand before the error's one
        for words in (("evaluate", "--task", "RTE"), ("predict", "a")):
            code = run(files, words[0], files / "bert", *words[1:], "--max-length", "24")
            refused(capsys, code, "classifier", "--bert")
    assert not lines


def interrupted(*_, **__):
    """In place of a function: Ctrl-C."""
    raise KeyboardInterrupt


def held(folder):
    """Every file below and its content."""
    return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_finished_run_is_kept(files, monkeypatch, capsys):
    """Catches --out overwritten by accident, --overwrite that gives up a finished run before the
    new one can start or takes more than the run's own files, and a student that still answers."""
    out = files / "out"
    theirs = ["notes.txt", "teacher-1.state", "cache-of-mine.f16", "run.json.bak", ".mine.part"]
    theirs += ["student/README.md", "baseline/mine/config.json", "seed-0/results.json"]
    for path in (out / name for name in theirs):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("mine")
    before = held(out)
    assert distil(files, "SST-2", "--baseline") == 0
    first = held(out)
    assert before.items() <= first.items()
    for mistake in ([], ["--overwrite", "--layers", "9"], ["--overwrite", "--bert", "nowhere"]):
        capsys.readouterr()
        told = [] if mistake else [out, "--overwrite"]
        refused(capsys, distil(files, "SST-2", *mistake), *told)
        assert held(out) == first
    assert distil(files, "SST-2", "--overwrite", "--seed", "1", "--baseline") == 0
    after = held(out)
    assert before.items() <= after.items() and after.keys() == first.keys()
    for part in ("teacher", "student", "baseline"):
        assert after[out / part / "model.safetensors"] != first[out / part / "model.safetensors"]
    monkeypatch.setattr(microbert, "train", interrupted)
    assert distil(files, "SST-2", "--overwrite") == 130
    capsys.readouterr()
    refused(capsys, main(["predict", str(out), "a"]), "no student")
    assert before.items() <= held(out).items()


BAD = """
--task RTEE | RTEE | RTE?
--task MPRC | MPRC | MRPC?
--task AX --bert b | AX | train
--task QQP --bert b | QQP/train.tsv | no such file
--task RTE | --bert
--task RTE --bert a --teacher b | --bert and --teacher exclude
--task RTE --bert nowhere | nowhere: no such folder | HF_HUB_OFFLINE
--layers 5 | 5 student layers | 4
--keep-layers 3,1 | --keep-layers | 1 to 4
--keep-layers 0,2 | --keep-layers | 1 to 4
--keep-layers a | --keep-layers | 2,4,6
--layers 1 --keep-layers 1,2 | --layers and --keep-layers exclude
--precision fp8 | --precision | fp8 | bf16
--device tpu | tpu | cpu
--device cpu:x | cpu:x | auto
--tusk toy | --tusk | --task?
--tempreature=3 | --tempreature=3 | --temperature?
--lr fast | --lr | 'fast' | --help
--clip | --clip | --help
evalute out | no command 'evalute' | evaluate?
help | no command 'help' (distill,
evaluate a b | evaluate has no 'b'
evaluate | checkpoint | --help
finetune --zzz | finetune has no '--zzz' | --help
"""
RANGES = f"""batch-size 0 1 to, soft-weight 1.5 0 to 1, max-length 2 3 to, save-every 0 1 to,
seed {2**64} 0 to {2**63 - 1}, expert-size 65537 1 to 65536, lr inf 0 to, transfer-ratio inf -1 to,
clip nan 1e-09 to, clip -1.0 1e-09 to, weight-decay -1.0 0 to, alignment-weight -1.0 0 to, epochs -1
0 to, adversarial-weight -1.0 0 to, temperature 1e+200 0.001 to 1000, warmup 1.0 0 to 0.99,
transfer-ratio 1e+300 -1 to 1000, logit-adjustment nan -1 to"""
for name, value, *told in map(str.split, RANGES.split(",")):
    BAD += f"--{name}={value} | --{name} is {value}, expected {' '.join(told)}\n"


@pytest.mark.parametrize("case", BAD.strip().split("\n"))
def test_bad_options_end_in_one_line(files, capsys, case):
    """Catches a traceback or a page of usage, and hours of training before a mistake is noticed."""
    words, *needles = case.split(" | ")
    given = ["--task", "RTE", "--bert", str(files / "bert"), "--data-dir", str(files)]
    given = given[4 * words.startswith("--task") :] if words.startswith("--") else []
    refused(capsys, main([*given, *words.split()]), *needles)


def test_bad_data_is_noticed_before_training(files, capsys):
    """Catches a fault in dev, or MNLI's mismatched set, that waits until the teacher is trained."""
    path = files / "RTE/dev.tsv"
    path.write_text(path.read_text() + "21\tone\ttwo\tmaybe\n")
    refused(capsys, distil(files, "RTE"), f"{path}:23", "'maybe'", "not_entailment")
    (files / "MNLI/dev_mismatched.tsv").unlink()
    refused(capsys, distil(files, "MNLI"), "MNLI/dev_mismatched.tsv", "no such file")
    refused(capsys, distil(files, "SST-2", "--layers", "9"), "9 student layers")
    assert not (files / "out").exists()


@pytest.mark.parametrize("part, given", [("teacher", "out/teacher"), ("student", "bert")])
def test_a_checkpoint_of_no_run_is_kept(files, capsys, part, given):
    """Catches a pre-trained BERT, or somebody's student, that --out replaces without a word."""
    place = checkpoint(files, f"out/{part}")
    before, told = held(files / "out"), "--out" if part == "teacher" else "--overwrite"
    refused(capsys, distil(files, "SST-2", "--bert", files / given), place, told)
    assert held(files / "out") == before
    assert distil(files, "SST-2", "--overwrite") == 0


@pytest.mark.parametrize(
    "name, official",
    [("cola", "CoLA"), ("Co-LA", "CoLA"), ("mrpc", "MRPC"), ("sts_b", "STS-B"), ("sst2", "SST-2")],
)
def test_a_task_spelled_otherwise_has_its_defaults(name, official):
    """Catches settings of a task that are those of no task where its name is spelled otherwise."""
    own, other = (microbert.settle(DistillConfig(task=n)) for n in (official, name))
    assert own == other and microbert.RECIPES[official].items() <= vars(own).items()
    assert own.logit_adjustment == (official == "CoLA")
    assert microbert.settle(DistillConfig(task=name, logit_adjustment=0)).logit_adjustment == 0
    assert (own.device, microbert.settle(DistillConfig()).device) == ("auto", "cpu")  # a toy's


@pytest.mark.parametrize("tau", [1.0, -1.0])
def test_every_loss_of_labels_is_adjusted(files, monkeypatch, tau):
    """Catches a teacher, experts or a student whose labels count by their frequency after all."""
    plain, offsets = microbert.hard_loss, {}

    def recorded(logits, labels, offset=0.0):
        caller = inspect.currentframe().f_back.f_code.co_name
        offsets.setdefault(caller, []).append(torch.as_tensor(offset))
        return plain(logits, labels, offset)

    monkeypatch.setattr(microbert, "hard_loss", recorded)
    assert distil(files, "SST-2", "--logit-adjustment", str(tau)) == 0
    assert len(offsets) >= 3  # teacher, experts, student
    for found in offsets.values():
        assert all(bool(offset.any()) == (tau > 0) for offset in found)
    asked = microbert.parse(["finetune", "--task", "SST-2", "--logit-adjustment", "2"])[1]
    assert asked.logit_adjustment == 2


def test_a_terminal_has_a_live_line(files, monkeypatch, capsys):
    """Catches a line for every step on a terminal, an open line before an error, a line that is
    longer than the terminal, which would not be replaced, and terms that 80 columns cut off."""
    monkeypatch.setattr(microbert.Log, "due", lambda *_: True)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "80")
    assert distil(files, "SST-2", "--log-every", "1000") == 0
    lines = capsys.readouterr().out.split("\n")
    pieces = next(line for line in lines if "\rstudent" in line).split("\r")[1:]
    assert [piece.split()[:2] for piece in pieces] == [["student", f"{i}/8"] for i in range(1, 9)]
    assert {len(piece) for piece in pieces[:-1]} == {79}
    for piece in pieces:
        assert re.search(r" -0:\d\d \| hard \d.*soft \d.*align \d.*adv \d\.\d\d\d", piece)
    assert [line for line in lines if re.match(r"\rcache .*/s -0:00 \| texts *$", line)]
    assert [event["step"] for event in steps_of(files / "out")] == [5, 8]
    seen, hard_loss = [], microbert.hard_loss

    def broken(logits, *more):
        seen.append(1)
        return hard_loss(logits, *more) * (math.nan if len(seen) > 2 else 1)

    monkeypatch.setattr(microbert, "hard_loss", broken)
    monkeypatch.setenv("COLUMNS", "40")
    assert distil(files, "SST-2", out="other") == 2
    shown = capsys.readouterr().out
    assert [len(piece) for piece in shown.split("\r")[1:]] == [39, 40]  # with the line's end
    assert "\rteacher     2/5" in shown and shown.endswith("\n")


def test_speeds_are_texts_per_second(monkeypatch):
    """Catches a rate that is upside down, of the slowest round, or of the other model."""
    ticks = iter([0, 2, 10, 14, 20, 21, 30, 34, 40, 42, 50, 54])  # 2, 4, 1, 4, 2 and 4 seconds
    monkeypatch.setattr(microbert.time, "perf_counter", lambda: next(ticks))
    monkeypatch.setattr(microbert, "predict_logits", lambda *_: None)
    monkeypatch.setattr(data, "encode", lambda *_: range(8))
    made = SimpleNamespace(config=DistillConfig(), tokenizer=None, dev=glue.Examples([], None))
    assert microbert.examples_per_second([None, None], made) == [8.0, 2.0]


def test_what_is_left_is_told_in_minutes(capsys):
    """Catches a rate that is multiplied, and seconds beyond 59."""
    for left, rate in ((90, 2.0), (150, 0.5)):
        microbert.Log(None).show(1, 9, left, rate, "texts")
    assert [line.split()[3] for line in capsys.readouterr().out.splitlines()] == ["-0:45", "-5:00"]
    terms = {name: torch.tensor(9.8765) for name in ("hard", "soft", "align", "adv")}
    (log := microbert.Log(None, 1)).phase = "student"
    log.step(12345, 67890, terms, 1e-3, 2077.0, 1)
    assert len(line := capsys.readouterr().out.rstrip()) <= 79 and line.endswith("adv 9.877")
    log.step(1, 2, {"hard": torch.tensor(1234567.0), "soft": torch.tensor(123.456)}, 0, 1.0, 1)
    assert capsys.readouterr().out.endswith("hard 1e+06 soft 123.4\n")


def test_a_folder_without_a_student_says_what_it_has(files, capsys):
    """Catches advice that leads nowhere where a run is not finished or was the teacher's alone,
    finetune without --regression, and an example shown in the unit it is learnt in."""
    made = ("--task", own_data(files / "mine", ["100", "250.5"]), "--bert", files / "bert")
    options = ("--regression", "--epochs", "1", "--max-length", "24", "--out", files / "out")
    assert run(files, "finetune", *made, *options) == 0
    shown = capsys.readouterr().out
    assert "[SEP] -> 100\n" in shown and "[SEP] -> 250.5\n" in shown
    assert main(["predict", str(files / "out"), "a"]) == 0  # its teacher
    assert run(files, "evaluate", files / "out", "--task", files / "mine", "--device", "cpu") == 0
    (files / "out/results.json").rename(files / "out/results")
    capsys.readouterr()
    refused(capsys, main(["predict", str(files / "out"), "a"]), "out/teacher is one")
    (files / "out/results").rename(files / "out/results.json")
    refused(capsys, main(["predict", str(files / "mine"), "a"]), "no checkpoint in it")
    (line,) = re.findall(r"^next: python microbert.py (.*)$", shown, flags=re.M)
    assert main([*shlex.split(line), *QUICK, "--force"]) == 0  # as it is printed
    assert load_bert(files / "out-student/student").config.labels == ("score",)


def test_help_speaks_of_every_option(capsys):
    """Catches a field without words, and a flag that --help or the parser lacks."""
    shown = {}
    for command in ("distill", "finetune", "ablate", "evaluate", "predict"):
        with pytest.raises(SystemExit) as stop:
            main([command, "--help"])
        page = shown[command] = capsys.readouterr().out
        assert stop.value.code == 0 and "--task" in page
        assert ("--soft-weight" in page) == (command in ("distill", "ablate"))
        assert f"python microbert.py {command} " in page  # an example
        assert ("[dev]" in page) == (command in ("evaluate", "predict"))  # defaults
        assert max(map(len, page.splitlines())) <= 100
    others = dict(zip("seeds rows checkpoint split".split(), ("ablate evaluate").split() * 2))
    others |= {"rows": "ablate", "checkpoint": "evaluate"}
    others |= dict.fromkeys(("text", "file", "json"), "predict")
    for field in fields(DistillConfig):
        told = shown[others.get(field.name, "distill")]
        assert field.metadata["help"]
        assert re.search(rf"[ -]{field.name.replace('_', '-')}\b", told), field.name
    assert main(["--help"]) == 0
    page = capsys.readouterr().out
    assert len(page.splitlines()) < 25 and "evaluate" in page
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out == f"microbert {microbert.__version__}\n"


# --- the built-in task ---------------------------------------------------------------------------


@slow
def test_the_built_in_task_shows_the_method(root, tmp_path):
    """Catches a built-in task that pruning does not hurt, or distillation does not repair."""
    command = [sys.executable, root / "microbert.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == "" and "of teacher" in done.stdout
    found = results_of(tmp_path / "out")
    names = ("teacher", "pruned", "student", "baseline")
    teacher, pruned, student, baseline = (found[name]["score"] for name in names)
    assert teacher > 85 and pruned <= teacher - 15
    assert student >= 0.97 * teacher and student >= baseline + 2


def test_the_built_in_task_runs(tmp_path, monkeypatch, capsys):
    """Catches a first command that does not get to its end; the slow test looks at its scores."""
    monkeypatch.chdir(tmp_path)
    examples = data.toy_examples
    monkeypatch.setattr(data, "toy_examples", lambda split: [p[:64] for p in examples(split)])
    quick = ["--teacher-epochs", "1", "--epochs", "1", "--limit", "32", "--transfer-ratio", "1"]
    assert main([*quick, "--force", "--device", "cpu"]) == 0
    shown = capsys.readouterr().out
    assert "example 1: [CLS] " in shown and re.search("fine-tuned only +2 +[1-9]", shown)
    made = "train.tsv dev.tsv test.tsv unlabelled.txt vocab.txt config.json model.safetensors"
    assert {path.name for path in (tmp_path / "out/toy").iterdir()} >= {*made.split()}
    assert main(["evaluate", "out"]) == 0
    score = results_of(tmp_path / "out")["student"]["score"]
    assert f"score {score:.2f}" in capsys.readouterr().out
    assert main(["predict", "out", "the soup was good"]) == 0
    assert capsys.readouterr().out.split("\t")[0] in ("negative", "positive")
