"""Whole runs through the command line, on files of our own: the contract and the guards."""

import inspect
import json
import math
import os
import random
import re
import shlex
import stat
import subprocess
import sys
import warnings
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import slow

import data
import glue
import microbert
from microbert import Bert, BertConfig, load_bert, main, save_bert

WORDS = "a the cat dog bird fish sat ran ate saw on in mat tree not big small red old".split()
QUICK = ["--epochs", "1", "--teacher-epochs", "1", "--batch-size", "8", "--device", "cpu",
         "--transfer-ratio", "0.5", "--max-length", "24", "--no-baseline"]  # fmt: skip


@pytest.fixture(autouse=True)
def few_steps(monkeypatch):
    """Experts fitted in less time; the built-in task's run, a process of its own, has them all."""
    monkeypatch.setitem(microbert.fit_experts.__kwdefaults__, "steps", 30)


@pytest.fixture
def files(tmp_path):
    """A folder with an untrained BERT checkpoint and GLUE tasks of random sentences."""
    rng = random.Random(0)
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert/vocab.txt").write_text("\n".join(vocabulary) + "\n")
    torch.manual_seed(0)
    save_bert(Bert(shape()), tmp_path / "bert")

    def text():
        return " ".join(rng.choice(WORDS) for _ in range(rng.randint(3, 9)))

    def table(path, texts, label, cells, count):
        """A TSV of random texts with an index and, where there is a label column, these labels."""
        header = ["index", *[f"sentence{i + 1}" if texts > 1 else "sentence" for i in range(texts)]]
        lines = ["\t".join(header + ([label] if label else []))]
        for i in range(count):
            row = [
                str(i),
                *[text() for _ in range(texts)],
                *([cells[i % len(cells)]] if label else []),
            ]
            lines.append("\t".join(row))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")

    for split, count in (("train", 40), ("dev", 21), ("test", 13)):
        gold = split != "test"
        table(tmp_path / f"SST-2/{split}.tsv", 1, gold and "label", "01", count)
        nli = ["entailment", "not_entailment"]
        table(tmp_path / f"RTE/{split}.tsv", 2, gold and "label", nli, count)
        scores = [f"{i}.5" for i in range(5)]
        table(tmp_path / f"STS-B/{split}.tsv", 2, gold and "score", scores, count)
    for split, count in (("train", 40), ("dev_matched", 20), ("dev_mismatched", 11),
                         ("test_matched", 7), ("test_mismatched", 5)):  # fmt: skip
        label = "" if split.startswith("test") else "gold_label"
        table(tmp_path / f"MNLI/{split}.tsv", 2, label, glue.TASKS["MNLI"].labels, count)
    table(tmp_path / "AX/diagnostic.tsv", 2, "", [], 6)
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
    return run(
        files,
        "--task",
        task,
        "--bert",
        files / "bert",
        "--out",
        files / out,
        *QUICK,
        "--force",
        *more,
    )


def refused(capsys, code, *needles):
    """Exit code 2 and one line on stderr that holds every needle."""
    error = capsys.readouterr().err
    assert code == 2 and error.startswith("error: ") and error.count("\n") == 1, error
    for needle in needles:
        assert str(needle) in error, error


# --- the contract --------------------------------------------------------------------------------


@pytest.mark.parametrize("task", ["SST-2", "STS-B", "MNLI"])
def test_a_run_leaves_what_the_contract_says(files, task, capsys):
    """Catches a missing file or key, scores not times 100, terms that do not add up to the loss."""
    assert distil(files, task, "--layers", "2", "--log-every", "1", "--seed", "3") == 0
    out, results = files / "out", json.loads((files / "out/results.json").read_text())
    assert (results["task"], results["seed"]) == (task, 3)
    for name, layers in (("teacher", 4), ("pruned", 2), ("student", 2)):
        scores = results[name]
        assert scores["layers"] == layers and math.isfinite(scores["score"])
        metrics = [scores[metric] for metric in glue.TASKS[task].metrics]
        assert scores["score"] == pytest.approx(sum(metrics) / len(metrics))
        assert (
            scores["parameters"]
            == Bert(
                shape(num_hidden_layers=layers, labels=tuple(results_labels(task)))
            ).parameter_count()
        )
    assert ("dev_mismatched" in results["student"]) == (task == "MNLI")
    ratio = results["student"]["score"] / results["teacher"]["score"]
    assert results["retention"] == pytest.approx(ratio)
    assert {"teacher", "cache", "experts", "pruned", "student"} == set(results["seconds"])
    assert results["config"]["layers"] == 2
    assert results["config"]["lr"] == (1e-4 if task == "CoLA" else 3e-4)
    assert results["config"]["logit_adjustment"] == (task == "CoLA")
    assert {"torch", "tokenizers", "numpy", "python", "microbert"} == set(results["versions"])
    events = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    steps = [event for event in events if "loss" in event]
    for event in steps:
        terms = [event[name] for name in ("hard", "soft", "align", "adv") if name in event]
        assert event["loss"] == pytest.approx(sum(terms))
    # teacher: 40 / 8 steps; student: 40 and 20 transfer texts, the last batch partial
    assert [e["phase"] for e in steps] == ["teacher"] * 5 + ["student"] * 8
    for part in ("teacher", "student"):
        assert load_bert(out / part).config.labels == tuple(results_labels(task))
        assert (out / part / "vocab.txt").is_file()
    assert not (out / "cache.f16").exists() and not list(out.rglob("*.part"))
    printed = capsys.readouterr().out
    kept = "1, 4" if task == "SST-2" else "2, 4"  # pairs: evenly spaced
    assert f"the teacher's layers {kept}, as they are" in printed
    assert printed.count("[CLS]") == 2 and "of teacher" in printed
    assert {"teacher", "student"} == set(results["examples_per_second"])
    size = (out / "student/model.safetensors").stat().st_size
    assert results["student"]["megabytes"] == round(size / 1e6, 1)


@pytest.mark.parametrize("task", ["SST-2", "STS-B"])
def test_the_closing_table_compares_with_plain_fine_tuning(files, capsys, monkeypatch, task):
    """Catches a baseline that sees the teacher, transfer text or other passes, and a table
    whose rows are mixed up."""
    assert distil(files, task, out="without") == 0
    seen, train = [], microbert.train

    def watched(model, encoded, objective, config, log, **rest):
        seen.append((log.phase, len(encoded), rest["epochs"], rest["lr"], rest.get("last")))
        terms = set()

        def named(*arguments):
            found = objective(*arguments)
            terms.update(found)
            return found

        named.stateful = getattr(objective, "stateful", {})
        train(model, encoded, named, config, log, **rest)
        seen[-1] += (terms,)

    monkeypatch.setattr(microbert, "train", watched)
    made = ("--teacher-epochs", "2", "--lr", "1e-3", "--label-epochs", "3")
    assert distil(files, task, "--baseline", *made) == 0
    assert seen[0] == ("teacher", 40, 2, {"STS-B": 2e-4}.get(task, 5e-5), None, {"hard"})
    assert seen[1] == ("student", 60, 1, 1e-3, (40, 3), {"hard", "soft", "align", "adv"})
    assert seen[2] == ("baseline", 40, 2, 1e-3, (40, 0), {"hard"})
    results = json.loads((files / "out/results.json").read_text())
    shown = capsys.readouterr().out
    rows = re.findall(
        r"^([\w -]+?) +(\d) +([\d,]+) +([\d.]+) +([\d,]+) +([\d.-]+) ",
        shown.rpartition("of teacher\n")[2], flags=re.M,
    )  # fmt: skip
    names = ["teacher", "pruned", "baseline", "student"]
    assert [row[0] for row in rows] == ["teacher", "pruned", "fine-tuned only", "MicroBERT"]
    for name, row in zip(names, rows):
        found = results[name]
        assert row[1:4] == (
            str(found["layers"]),
            f"{found['parameters']:,}",
            str(found["megabytes"]),
        )
        assert float(row[5]) == pytest.approx(found["score"], abs=0.006)
        rate = results["examples_per_second"]["teacher" if name == "teacher" else "student"]
        assert row[4] == f"{rate:,.0f}"
    command = shlex.split(re.findall(r"^next: python microbert.py (.*)$", shown, flags=re.M)[-1])
    assert command[:2] == ["predict", str(files / "out")]
    assert main([*command, "--device", "cpu", "--max-length", "24"]) == 0


def results_labels(task):
    """Label names that a checkpoint of the task has."""
    return glue.TASKS[task].labels or ("score",)


def test_predictions_and_evaluation(files, capsys):
    """Catches shuffled or missing rows, a wrong spelling, and a score the checkpoint has not."""
    assert distil(files, "MNLI") == 0
    results = json.loads((files / "out/results.json").read_text())
    for task, split, count in (("MNLI", "dev", 20), ("MNLI", "test", 7), ("AX", "test", 6),
                               ("MNLI", "test_mismatched", 5)):  # fmt: skip
        where = files / "predictions.tsv"
        arguments = ("predict", files / "out", "--task", task, "--split", split, "--out", where)
        assert run(files, *arguments) == 0
        rows = [line.split("\t") for line in where.read_text().split("\n")[:-1]]
        assert rows[0] == ["index", "prediction"]
        assert [row[0] for row in rows[1:]] == [str(i) for i in range(count)]
        assert {row[1] for row in rows[1:]} <= set(glue.TASKS["MNLI"].labels)
        if split == "dev":
            gold = glue.read("MNLI", files, "dev").labels
            right = [glue.TASKS["MNLI"].labels[g] == row[1] for g, row in zip(gold, rows[1:])]
            assert 100 * np.mean(right) == pytest.approx(results["student"]["score"])
    capsys.readouterr()
    assert run(files, "evaluate", files / "out/student", "--task", "MNLI") == 0
    printed = capsys.readouterr().out
    assert f"{results['student']['score']:.2f}" in printed and "dev_mismatched" in printed
    options = ("--task", "MNLI", "--split", "dev_mismatched")
    assert run(files, "evaluate", files / "out/student", *options) == 0
    assert "dev_matched" not in capsys.readouterr().out


def test_scores_are_predicted_as_the_server_wants(files, capsys):
    """Catches class ids for scores, values out of 0..5, and predict without --out."""
    assert distil(files, "STS-B") == 0
    capsys.readouterr()
    assert run(files, "predict", files / "out", "--task", "STS-B", "--split", "test") == 0
    lines = capsys.readouterr().out.split("\n")
    assert len(lines) == 15 and lines[0] == "index\tprediction"
    assert all(re.fullmatch(r"\d+\t[0-5]\.\d{3}", line) for line in lines[1:-1])


def test_a_teacher_once_made_is_reused(files, capsys):
    """Catches a teacher trained again, changed, or not found in the folder of its run."""
    options = ("--task", "RTE", "--bert", files / "bert", "--out", files / "made")
    assert (
        run(files, "finetune", *options, "--epochs", "1", "--lr", "1e-3", "--batch-size", "8") == 0
    )
    made = json.loads((files / "made/results.json").read_text())
    assert made["config"]["teacher_epochs"] == 1 and made["config"]["teacher_lr"] == 1e-3
    code = run(files, "--task", "RTE", "--teacher", files / "made", "--out", files / "out", *QUICK,
               "--force", "--keep-layers", "1,4", "--no-gan", "--no-moe")  # fmt: skip
    assert code == 0
    results = json.loads((files / "out/results.json").read_text())
    assert results["teacher"]["score"] == made["teacher"]["score"]
    first, second = load_bert(files / "made/teacher"), load_bert(files / "out/teacher")
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[name])
    events = (files / "out/log.jsonl").read_text()
    assert '"adv"' not in events and '"align"' in events and '"loss"' in events


def test_the_teacher_is_no_part_of_the_student(files, monkeypatch):
    """Catches a teacher inside the student's module tree, or run again in an epoch."""
    trained, calls = [], []
    train, forward = microbert.train, Bert.forward

    def watched(model, *arguments, **options):
        trained.append(model)
        calls.clear()
        train(model, *arguments, **options)

    def counted(self, *arguments, **options):
        calls.append(self)
        return forward(self, *arguments, **options)

    monkeypatch.setattr(microbert, "finish", lambda *_: None)  # which times both
    monkeypatch.setattr(microbert, "train", watched)
    monkeypatch.setattr(Bert, "forward", counted)
    distil(files, "SST-2", "--epochs", "3")
    student = trained[-1]
    assert sum(isinstance(module, Bert) for module in student.modules()) == 1
    assert {id(model) for model in calls} == {id(student)}


def test_same_seed_same_run(files):
    """Catches randomness that the seed does not reach."""
    scores = []
    for out in ("one", "two"):
        assert distil(files, "SST-2", "--seed", "5", out=out) == 0
        scores.append(load_bert(files / out / "student").state_dict())
    assert all(torch.equal(scores[0][name], scores[1][name]) for name in scores[0])


def test_limit_takes_the_first_examples(files, capsys):
    """Catches a limit that samples, or one that also cuts dev."""
    assert distil(files, "SST-2", "--limit", "10", "--transfer-ratio", "0", "--log-every", "1") == 0
    events = [json.loads(line) for line in (files / "out/log.jsonl").read_text().splitlines()]
    assert max(e["steps"] for e in events if "loss" in e) == 2
    assert {e["n"] for e in events if "n" in e} == {21}


def test_transfer_text_leaves_out_dev_and_test(files, capsys):
    """Catches dev or test sentences of the task that come back from another task's file."""
    dev = glue.read("SST-2", files, "dev").texts
    path = files / "RTE/train.tsv"
    path.write_text(path.read_text() + f"98\t{dev[0].upper()} !\ta cat\tentailment\n")
    config = microbert.DistillConfig(data_dir=str(files), transfer_ratio=50.0)
    train_texts = glue.read("SST-2", files, "train").texts
    texts = microbert.gather_transfer(config, glue.TASKS["SST-2"], train_texts)
    held = {
        re.sub(r"\W", "", t).lower()
        for s in ("dev", "test")
        for t in glue.read("SST-2", files, s).texts
    }
    assert texts and not held & {re.sub(r"\W", "", text).lower() for text in texts}
    assert re.search(r"[1-9]\d* left out", capsys.readouterr().out)


# --- data of your own ----------------------------------------------------------------------------


def own_data(folder, labels, texts=1, counts=(60, 24, 9), columns=("label",)):
    """A folder whose rows take these labels in turn; the sentence names its label by its words."""
    rng = random.Random(0)
    for split, count in zip(("train", "dev", "test"), counts):
        names = ["sentence"] if texts == 1 else ["sentence2", "sentence1"]
        lines = ["\t".join([*columns, "other", *names])]
        for i in range(count):
            label = labels[i % len(labels)]
            words = [WORDS[i % len(labels) % len(WORDS)]] * 3 + [rng.choice(WORDS)]
            cells = [" ".join(words) for _ in names]
            lines.append("\t".join([label, f"x{i}", *cells]))
        path = folder / f"{split}.tsv"
        path.parent.mkdir(exist_ok=True)
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


@pytest.mark.parametrize("classes, texts", [(2, 1), (3, 2), (200, 1)])
def test_classes_of_your_own(files, capsys, classes, texts):
    """Catches a part of the method that takes two or three classes for granted, and lost names."""
    labels = [f"class {i}" for i in range(classes)]
    count = max(60, classes)
    folder = own_data(files / "mine", labels, texts, (count, count, 9))
    assert distil(files, folder) == 0
    results = json.loads((files / "out/results.json").read_text())
    for part in ("teacher", "student"):
        scores = results[part]
        assert scores["score"] == pytest.approx((scores["accuracy"] + scores["macro_f1"]) / 2)
        assert load_bert(files / "out" / part).config.labels == tuple(sorted(labels))
    # the labels of dev come back through predict, by name, and make the score
    (folder / "train.tsv").unlink()  # which predict and evaluate do not need
    where = files / "predictions.tsv"
    assert run(files, "predict", files / "out", "--task", folder, "--out", where) == 0
    said = [line.split("\t")[1] for line in where.read_text().splitlines()[1:]]
    right = [said[i] == labels[i % classes] for i in range(count)]
    assert 100 * np.mean(right) == pytest.approx(results["student"]["accuracy"])
    capsys.readouterr()
    assert run(files, "evaluate", files / "out", "--task", folder, "--split", "test") == 0
    assert "test n=9" in capsys.readouterr().out
    refused(capsys, distil(files, folder, out="new"), folder / "train.tsv", "no such file")


@pytest.mark.parametrize("center, spread", [(-5e4, 2000.0), pytest.param(0.5, 1e-3, marks=slow)])
def test_scores_of_your_own(files, center, spread):
    """Catches scores learnt on a scale that only GLUE's 0..5 has, and answers on another scale."""
    labels = [str(center + spread * (i - 2)) for i in range(5)]
    folder = own_data(files / "mine", labels)
    options = ("--regression", "--teacher-epochs", "30", "--epochs", "12", "--teacher-lr", "3e-3")
    assert distil(files, folder, *options) == 0
    results = json.loads((files / "out/results.json").read_text())
    gold = glue.read(glue.own_task(folder, regression=True), "", "dev").labels
    for part in ("teacher", "student"):
        assert results[part]["score"] == pytest.approx(
            (results[part]["pearson"] + results[part]["spearman"]) / 2
        )
        where = files / "p.tsv"
        code = run(files, "predict", files / "out" / part, "--task", folder, "--out", where)
        assert code == 0
        said = np.array([float(line.split("\t")[1]) for line in where.read_text().splitlines()[1:]])
        assert np.abs(said - gold).mean() < 0.5 * spread  # a constant would be 1.2 spreads off


@pytest.mark.filterwarnings("error::RuntimeWarning")
@pytest.mark.parametrize("labels", ["3 3", "1.7e9 1700000100", "1e200 2e200", "1e-50 2e-50"])
def test_scores_that_float32_cannot_tell_apart(files, capsys, labels):
    """Catches a division by 0, a training that ends in NaN, and predictions that are all alike."""
    folder = own_data(files / "mine", labels.split())
    refused(capsys, distil(files, folder, "--regression"), "mean", "standard deviation", "float32")
    assert not (files / "out/log.jsonl").exists()


def test_texts_to_predict_stand_anywhere(files, capsys):
    """Catches a text that is refused because an option came first."""
    assert distil(files, "RTE") == 0
    said = []
    one, two, cut = "the cat sat", "a dog ran", ("--max-length", "24")
    for words in ((one, two, *cut), (*cut, one, two), (one, *cut, two)):
        capsys.readouterr()
        assert main(["predict", str(files / "out"), *words]) == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[1] == said[2] != ""
    refused(capsys, main(["predict", str(files / "out"), "--jsn", one]), "--jsn", "--json?")


def test_text_is_enough_to_predict(files, capsys):
    """Catches predict that insists on a label column, or reads the labels of another scheme."""
    folder = own_data(files / "mine", ["a", "b"])
    assert distil(files, folder) == 0
    for name in ("train", "dev"):
        (folder / f"{name}.tsv").unlink()
    (folder / "test.tsv").write_text("label\tsentence\n?\tthe cat\n?\ta dog\n")
    capsys.readouterr()
    assert run(files, "predict", files / "out", "--task", folder, "--split", "test") == 0
    assert len(capsys.readouterr().out.splitlines()) == 3
    options = ("--task", folder, "--split", "test", "--max-length", "24")
    code = run(files, "evaluate", files / "out", *options)
    refused(capsys, code, "test.tsv:2", "'?'", "a, b")


def test_a_reused_teacher_of_scores_is_left_alone(files, capsys):
    """Catches a teacher whose scores are scaled each time it is distilled."""
    folder = own_data(files / "mine", [str(1000 + 10 * i) for i in range(5)])
    assert distil(files, folder, "--regression", "--teacher-epochs", "9") == 0
    assert f"predict {files / 'out'} '" in capsys.readouterr().out
    made = files / "out/teacher"
    options = ("--task", folder, "--teacher", made, "--out", files / "two", "--regression")
    assert run(files, *options, *QUICK, "--force") == 0
    weights = "teacher/model.safetensors"
    assert (files / "two" / weights).read_bytes() == (files / "out" / weights).read_bytes()


def test_what_cannot_be_scored(files, capsys):
    """Catches metrics of a split without labels, and a split's name taken for a prefix."""
    folder = own_data(files / "mine", ["Yes !", "no"])
    options = ("--task", folder, "--max-length", "24", "--split")
    save_bert(Bert(shape(labels=("YES_!", "NO"))), files / "t", tokenizer_from=files / "bert")
    assert run(files, "evaluate", files / "t", *options, "test") == 0
    (folder / "test.tsv").write_text("sentence\nthe cat\n")
    capsys.readouterr()
    code = run(files, "evaluate", files / "t", *options, "test")
    refused(capsys, code, "test has no labels", "predict")
    code = run(files, "evaluate", files / "t", *options, "d")
    refused(capsys, code, "no split d")


def test_a_regression_teacher_of_your_own(files, capsys):
    """Catches finetune without --regression, and an example shown in the unit it is learnt in."""
    folder = own_data(files / "mine", ["100", "250.5"])
    options = ("--task", folder, "--bert", files / "bert", "--out", files / "made", "--regression")
    assert run(files, "finetune", *options, "--epochs", "1", "--max-length", "24") == 0
    printed = capsys.readouterr().out
    assert "[SEP] -> 100\n" in printed and "[SEP] -> 250.5\n" in printed
    assert f"--task {folder} --regression --teacher {files / 'made'} --out " in printed


def test_passes_of_a_training():
    """Catches small data trained for a handful of steps, and large data for too many."""
    passes = microbert.auto_epochs
    assert passes(5749, 24_000, 32, 1) == 5 and passes(67_349, 24_000, 32, 2) == 2
    assert passes(2000, 24_000, 32, 2) == 10 and passes(100_000, 24_000, 32, 1) == 1
    assert passes(18_340, 24_000, 32, 2) == 2 and passes(42_755, 24_000, 32, 2) == 2
    assert passes(12, 24_000, 32, 2) == 200 and passes(100, 24_000, 32, 2) == 50  # 4 steps a pass


def test_passes_of_a_student():
    """Catches few texts shown once, and many shown twice."""

    def chosen(count):
        task = glue.find_task("MRPC")
        made = SimpleNamespace(config=microbert.DistillConfig(task="MRPC"), task=task)
        texts = data.Encoded(np.zeros(count, int), np.zeros(count, int), np.arange(count + 1))
        return microbert.texts_and_passes(made, SimpleNamespace(encoded=texts, labelled=10))[1]

    assert [chosen(n) for n in (8000, 18_340, 50_000, 50_001)] == [3, 2, 2, 1]


def test_own_data_takes_transfer_text_from_glue(files, capsys):
    """Catches own data that is left without the transfer text, whose dev text is in it, or that
    stumbles over a label of another task."""
    path = files / "RTE/train.tsv"
    path.write_text(path.read_text().replace("not_entailment", "perhaps"))
    folder = own_data(files / "mine", ["a", "b"])
    config = microbert.DistillConfig(task=str(folder), data_dir=str(files), transfer_ratio=2.0)
    task = microbert.find_task(config)
    texts = microbert.gather_transfer(config, task, glue.read(task, "", "train").texts)
    foreign = set(data.sentences_of(glue.read("RTE", files, "train", with_labels=False).texts))
    assert len(texts) > 60 and any(text in foreign for text in texts)
    assert not set(texts) & set(glue.read(task, "", "dev").texts)


# --- guards --------------------------------------------------------------------------------------


def test_an_ignorant_teacher_stops_the_run(files, capsys):
    """Catches a run on a teacher at the majority rate, as in TinyBERT's issue 52."""
    teacher = Bert(shape(labels=glue.TASKS["SST-2"].labels))
    torch.nn.init.zeros_(teacher.classifier.weight)
    save_bert(teacher, files / "dull", tokenizer_from=files / "bert")
    options = ("--task", "SST-2", "--teacher", files / "dull", "--out", files / "out", *QUICK)
    refused(capsys, run(files, *options), "52.38", "--force")  # 11 of 21 dev labels are 0
    assert not (files / "out/student").exists()
    assert run(files, *options, "--force") == 0


def test_labels_in_another_order_are_remapped(files, capsys):
    """Catches a teacher whose classes are taken by position (TinyBERT's issue 229)."""
    torch.manual_seed(1)
    wanted = glue.TASKS["MNLI"].labels
    other = ("CONTRADICTION", "Entailment", "neutral")
    teacher = Bert(shape(labels=wanted, initializer_range=0.5))
    save_bert(teacher, files / "same", tokenizer_from=files / "bert")
    order = [2, 0, 1]
    turned = Bert(shape(labels=other))
    state = dict(teacher.state_dict())
    for name in ("classifier.weight", "classifier.bias"):
        state[name] = state[name][order]
    turned.load_state_dict(state)
    save_bert(turned, files / "turned", tokenizer_from=files / "bert")
    written = []
    for name in ("same", "turned"):
        run(files, "predict", files / name, "--task", "MNLI", "--out", files / "p.tsv")
        written.append((files / "p.tsv").read_text())
    assert written[0] == written[1] and len(set(written[0].split()[3::2])) > 1
    distil_out = ("--task", "MNLI", "--teacher", files / "turned", "--out", files / "out", *QUICK)
    assert run(files, *distil_out, "--force") == 0
    assert load_bert(files / "out/student").config.labels == wanted


def test_classes_that_are_called_label_are_matched_by_name(files, capsys):
    """Catches LABEL_10 taken for LABEL_2, since sorted order is not the order of the numbers."""
    labels = [f"LABEL_{i}" for i in range(11)]
    folder = own_data(files / "mine", labels)
    model = Bert(shape(labels=tuple(labels)))
    torch.nn.init.zeros_(model.classifier.weight)
    with torch.no_grad():
        model.classifier.bias[10] = 9.0
    save_bert(model, files / "t", tokenizer_from=files / "bert")
    capsys.readouterr()
    assert run(files, "predict", files / "t", "--task", folder) == 0
    said = {line.split("\t")[1] for line in capsys.readouterr().out.splitlines()[1:]}
    assert said == {"LABEL_10"}


def test_predictions_do_not_take_the_place_of_data(files, capsys):
    """Catches --out that overwrites the text it predicts, a device, or a link."""
    labels = glue.TASKS["RTE"].labels
    save_bert(Bert(shape(labels=labels)), files / "t", tokenizer_from=files / "bert")
    options = ("predict", files / "t", "--task", "RTE", "--max-length", "24", "--out")
    path = files / "RTE/dev.tsv"
    before = path.read_bytes()
    refused(capsys, run(files, *options, path), path, "holds no predictions")
    assert path.read_bytes() == before
    (files / "link").symlink_to(files / "there.tsv")
    for _ in range(2):  # predictions may be written again
        assert run(files, *options, files / "link") == 0
    assert (files / "link").is_symlink() and (files / "there.tsv").read_text().startswith("index")
    os.mkfifo(files / "pipe")
    reader = os.open(files / "pipe", os.O_RDWR | os.O_NONBLOCK)
    assert run(files, *options, files / "pipe") == 0
    assert stat.S_ISFIFO((files / "pipe").stat().st_mode)
    assert os.read(reader, 99999) == (files / "there.tsv").read_bytes()
    os.close(reader)


def test_labels_of_another_task_are_refused(files, capsys):
    """Catches a sentiment teacher distilled on RTE."""
    save_bert(
        Bert(shape(labels=("negative", "positive"))), files / "t", tokenizer_from=files / "bert"
    )
    code = run(files, "--task", "RTE", "--teacher", files / "t", "--out", files / "out")
    refused(capsys, code, "negative, positive", "entailment, not_entailment")


def test_a_random_head_is_not_scored(files, capsys):
    """Catches google-research/bert issue 1037: metrics of a classifier nobody trained."""
    path = files / "bert/model.safetensors"
    tensors = microbert.read_safetensors(path)
    kept = {name: t for name, t in tensors.items() if not name.startswith("classifier")}
    microbert.write_safetensors(path, kept)
    with warnings.catch_warnings(record=True) as lines:  # which would stand before the error's one
        code = run(files, "evaluate", files / "bert", "--task", "RTE")
    refused(capsys, code, "classifier", "--bert")
    assert not lines
    warnings.resetwarnings()
    with pytest.warns(UserWarning, match="classifier"):
        load_bert(files / "bert")


def test_a_tokenizer_that_does_not_fit_is_refused(files, capsys):
    """Catches an index error in the embedding (TinyBERT's issue 31)."""
    path = files / "bert/vocab.txt"
    path.write_text(path.read_text() + "more\nwords\n")
    refused(capsys, distil(files, "RTE"), "26 tokens", "24 embeddings")


def test_a_finished_run_is_kept(files, capsys):
    """Catches --out overwritten by accident."""
    assert distil(files, "SST-2") == 0
    before = {p: p.read_bytes() for p in (files / "out").rglob("*") if p.is_file()}
    capsys.readouterr()
    refused(capsys, distil(files, "SST-2"), files / "out", "--overwrite")
    assert before == {p: p.read_bytes() for p in (files / "out").rglob("*") if p.is_file()}
    assert distil(files, "SST-2", "--overwrite", "--seed", "1") == 0


@pytest.mark.parametrize(
    "arguments, needles",
    [
        (["--task", "RTEE"], ["RTEE", "RTE?"]),
        (["--task", "AX"], ["AX", "train"]),
        (["--task", "QQP", "--bert", "b"], ["QQP/train.tsv", "no such file"]),
        (["--task", "RTE"], ["--bert"]),
        (["--task", "RTE", "--bert", "a", "--teacher", "b"], ["--bert and --teacher exclude"]),
        (["--task", "RTE", "--bert", "nowhere"], ["nowhere: no such folder", "HF_HUB_OFFLINE"]),
        (["--layers", "5"], ["5 student layers", "4"]),
        (["--keep-layers", "3,1"], ["--keep-layers", "1 to 4"]),
        (["--keep-layers", "0,2"], ["--keep-layers", "1 to 4"]),
        (["--keep-layers", "a"], ["--keep-layers", "2,4,6"]),
        (["--precision", "fp8"], ["--precision", "fp8", "bf16"]),
        (["--routing", "token"], ["--routing", "sentence"]),
        (["--device", "tpu"], ["tpu", "cpu"]),
        (["--batch-size", "0"], ["--batch-size", "at least 1"]),
        (["--soft-weight", "1.5"], ["--soft-weight", "0 to 1"]),
        (["--max-length", "2"], ["--max-length", "at least 3"]),
        (["--seed", str(2**64)], ["--seed", "2 ** 63"]),
        (["--save-every", "0"], ["--save-every", "at least 1"]),
        (["--expert-size", str(10**12)], ["--expert-size", "1 to 65536"]),
        (["--lr", "inf"], ["--lr", "finite"]),
        (["--transfer-ratio", "inf"], ["--transfer-ratio", "finite"]),
        (["--clip", "nan"], ["--clip", "finite"]),
        (["--clip", "-1"], ["--clip", "more than 0"]),
        (["--weight-decay", "-1"], ["--weight-decay", "0 or more"]),
        (["--alignment-weight", "-1"], ["--alignment-weight", "0 or more"]),
        (["--adversarial-weight", "-1"], ["--adversarial-weight", "0 or more"]),
        (["--temperature", "1e200"], ["--temperature", "at most 1000"]),
        (["--transfer-ratio", "1e300"], ["--transfer-ratio", "at most 1000"]),
        (["--device", "cpu:x"], ["cpu:x", "auto"]),
        (["--layers", "1", "--keep-layers", "1,2"], ["--layers and --keep-layers exclude"]),
    ],
)
def test_bad_options_end_in_one_line(files, capsys, arguments, needles):
    """Catches a traceback, and hours of training before a mistake is noticed."""
    code = main([*arguments, "--data-dir", str(files), "--out", str(files / "out")])
    refused(capsys, code, *needles)
    assert not (files / "out/log.jsonl").exists()


def test_bad_data_is_noticed_before_training(files, capsys):
    """Catches a fault in dev that waits until the teacher is trained."""
    path = files / "RTE/dev.tsv"
    path.write_text(path.read_text() + "21\tone\ttwo\tmaybe\n")
    refused(capsys, distil(files, "RTE"), f"{path}:23", "'maybe'", "not_entailment")
    assert not (files / "out").exists()


def test_the_other_dev_set_is_read_before_training(files, capsys):
    """Catches MNLI's mismatched set found missing once the teacher is trained."""
    (files / "MNLI/dev_mismatched.tsv").unlink()
    refused(capsys, distil(files, "MNLI"), "MNLI/dev_mismatched.tsv", "no such file")
    assert not (files / "out").exists()


@pytest.mark.parametrize("part, given", [("teacher", "out/teacher"), ("student", "bert")])
def test_a_checkpoint_of_no_run_is_kept(files, capsys, part, given):
    """Catches a pre-trained BERT, or somebody's student, that --out replaces without a word."""
    before = files / "out" / part
    before.mkdir(parents=True)
    for file in (files / "bert").iterdir():
        (before / file.name).write_bytes(file.read_bytes())
    held = {p.name: p.read_bytes() for p in before.iterdir()}
    more = ["--bert", str(files / given)]
    refused(
        capsys, distil(files, "SST-2", *more), before, "--out" if part == "teacher" else "--over"
    )
    assert {p.name: p.read_bytes() for p in before.iterdir()} == held
    assert distil(files, "SST-2", "--overwrite") == 0


@pytest.mark.parametrize("name", ["cola", "Co-LA", "mrpc", "sts_b", "STSB", "sst2"])
def test_a_task_spelled_otherwise_has_its_defaults(name):
    """Catches settings of a task that are those of no task where its name is spelled otherwise."""
    official = {"cola": "CoLA", "mrpc": "MRPC", "stsb": "STS-B", "sst2": "SST-2"}
    plain = name.lower().replace("-", "").replace("_", "")
    own, other = (
        microbert.settle(microbert.DistillConfig(task=n)) for n in (official[plain], name)
    )
    assert own == other and own.teacher_lr == microbert._TEACHERS[own.task][0]


def test_class_names_that_only_look_odd(files, capsys):
    """Catches a run lost at its end over a class name, and names that would break a line."""
    labels = ["non\u00a0lu", "\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645"]
    folder = own_data(files / "mine", labels)
    assert distil(files, folder) == 0
    assert load_bert(files / "out/student").config.labels == tuple(sorted(labels))
    capsys.readouterr()
    path = own_data(files / "other", ["a", "b\x1b[2J"]) / "train.tsv"
    refused(capsys, distil(files, path.parent, out="o"), f"{path}:3", "\\x1b", "control")


def test_what_was_there_survives_a_mistake(files, capsys):
    """Catches --overwrite that gives up a finished run before the new one can start."""
    assert distil(files, "SST-2") == 0
    before = {p: p.read_bytes() for p in (files / "out").rglob("*") if p.is_file()}
    for mistake in (["--layers", "9"], ["--bert", "nowhere"]):
        capsys.readouterr()
        refused(capsys, distil(files, "SST-2", "--overwrite", *mistake))
        assert before == {p: p.read_bytes() for p in (files / "out").rglob("*") if p.is_file()}


def test_a_loss_that_is_no_number_ends_the_run(files, capsys):
    """Catches a run that trains on NaN to its end and saves that."""
    code = distil(files, "SST-2", "--lr", "1e30", "--clip", "1e30", "--log-every", "1")
    refused(capsys, code, "step", "the loss is")
    assert not (files / "out/student").exists()


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
    asked = microbert.parse(["finetune", "--task", "SST-2", "--logit-adjustment", "2"])
    assert asked["logit_adjustment"] == 2
    assert microbert.settle(microbert.DistillConfig(task="CoLA")).logit_adjustment == 1
    assert microbert.settle(microbert.DistillConfig(task="CoLA")).label_epochs == 3
    assert microbert.settle(microbert.DistillConfig(task="CoLA", label_epochs=0)).label_epochs == 0
    assert microbert.settle(microbert.DistillConfig(task="MRPC")).label_epochs == 0
    with pytest.raises(ValueError, match="--logit-adjustment is nan"):
        microbert.settle(microbert.DistillConfig(logit_adjustment=math.nan))


def test_a_task_without_labels_is_not_scored(files, capsys):
    """Catches metrics against placeholder labels (PKD's issues 9 and 11), or silence."""
    labels = glue.TASKS["AX"].labels
    save_bert(Bert(shape(labels=labels)), files / "t", tokenizer_from=files / "bert")
    code = run(files, "evaluate", files / "t", "--task", "AX", "--max-length", "24")
    refused(capsys, code, "AX", "predict")


def test_help_speaks_of_every_option(capsys):
    """Catches a field without words, and a flag that --help or the parser lacks."""
    for command in ("distill", "finetune", "ablate", "evaluate", "predict"):
        with pytest.raises(SystemExit) as stop:
            main([command, "--help"])
        shown = capsys.readouterr().out
        assert stop.value.code == 0 and "--task" in shown
        if command == "distill":
            for field in microbert.DistillConfig.__dataclass_fields__.values():
                assert field.metadata["help"]
                flag = "--" + field.name.replace("_", "-")
                assert flag in shown or field.name in microbert._OF_OTHERS, flag
        elif command == "ablate":
            assert "--seeds" in shown and "--rows" in shown and "--soft-weight" in shown
        else:
            assert "--soft-weight" not in shown
        assert f"python microbert.py {command.replace('distill', '--task')}" in shown  # an example
        assert "[dev]" in shown or command in ("distill", "finetune", "ablate")  # defaults
        assert max(map(len, shown.splitlines())) <= 100
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    shown = capsys.readouterr().out
    assert stop.value.code == 0 and len(shown.splitlines()) < 25 and "evaluate" in shown


def test_the_version(capsys):
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out == f"microbert {microbert.__version__}\n"


@pytest.mark.parametrize(
    "arguments, needles",
    [
        (["evalute", "out"], ["no command 'evalute'", "evaluate?"]),
        (["--tusk", "toy"], ["--tusk", "--task?"]),
        (["--tempreature=3"], ["--tempreature=3", "--temperature?"]),
        (["help"], ["no command 'help' (distill, "]),
        (["finetune", "--zzz"], ["finetune has no '--zzz'", "--help"]),
        (["evaluate", "a", "b"], ["evaluate has no 'b'"]),
        (["--task", "MPRC"], ["MPRC", "MRPC?"]),
    ],
)
def test_what_is_mistyped_names_the_nearest(capsys, arguments, needles):
    """Catches a page of usage in place of one line."""
    refused(capsys, main(arguments), *needles)


@pytest.mark.parametrize("arguments", [["--lr", "fast"], ["evaluate"], ["--seed"]])
def test_arguments_of_the_wrong_kind(capsys, arguments):
    """Catches a page of usage in place of one line, from argparse itself."""
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    refused(capsys, stop.value.code, "--help")


def test_a_terminal_has_a_live_line(files, monkeypatch, capsys):
    """Catches a line for every step on a terminal, an open line before an error, and a line that
    is longer than the terminal, which would not be replaced."""
    monkeypatch.setattr(microbert.Log, "due", lambda *_: True)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "40")
    assert distil(files, "SST-2", "--log-every", "1000") == 0
    shown = capsys.readouterr().out
    lines = shown.split("\n")
    (teacher,) = [line for line in lines if "\rteacher     1/5 |" in line]
    assert [piece[:15] for piece in teacher.split("\r")[1:]] == [
        f"teacher     {i}/5" for i in range(1, 6)]  # fmt: skip
    assert {len(piece) for piece in teacher.split("\r")[1:-1]} == {39}
    assert "loss" in teacher.split("\r")[-1] and "eta" in teacher.split("\r")[1]
    assert [line for line in lines if line.startswith("\rcache") and line.rstrip().endswith("0:00")]
    events = [json.loads(line) for line in (files / "out/log.jsonl").read_text().splitlines()]
    assert [e["step"] for e in events if "loss" in e] == [5, 8]
    seen, hard_loss = [], microbert.hard_loss

    def broken(logits, *more):
        seen.append(1)
        return hard_loss(logits, *more) * (math.nan if len(seen) > 2 else 1)

    monkeypatch.setattr(microbert, "hard_loss", broken)
    assert distil(files, "SST-2", out="other") == 2
    shown = capsys.readouterr().out
    assert "\rteacher     2/5" in shown and shown.endswith("\n")


def test_speeds_are_texts_per_second(monkeypatch):
    """Catches a rate that is upside down, of the slowest round, or of the other model."""
    ticks = iter([0, 2, 10, 14, 20, 21, 30, 34, 40, 42, 50, 54])  # 2, 4, 1, 4, 2 and 4 seconds
    monkeypatch.setattr(microbert.time, "perf_counter", lambda: next(ticks))
    monkeypatch.setattr(microbert, "predict_logits", lambda *_: None)
    encoded = data.Encoded(np.zeros(8), np.zeros(8), np.arange(9))
    config = microbert.DistillConfig()
    assert microbert.examples_per_second([None, None], encoded, config) == [8.0, 2.0]
    assert microbert.eta(left=90, rate=2.0) == "0:45" and microbert.eta(150, 0.5) == "5:00"


# --- the built-in task ---------------------------------------------------------------------------


@slow
def test_the_built_in_task_shows_the_method(root, tmp_path, capsys):
    """Catches a built-in task that pruning does not hurt, or distillation does not repair."""
    few = [
        "--teacher-epochs",
        "7",
        "--transfer-ratio",
        "0",
        "--epochs",
        "4",
        "--no-baseline",
    ]  # for time
    command = [sys.executable, str(root / "microbert.py"), "--out", "run", *few]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "run/results.json").read_text())
    teacher, pruned, student = (results[k]["score"] for k in ("teacher", "pruned", "student"))
    assert teacher > 90 and pruned < teacher - 10
    assert student > pruned + 0.7 * (teacher - pruned)
    assert done.stderr == "" and "of teacher" in done.stdout
    texts, _ = data.toy_examples("dev")
    assert main(["predict", str(tmp_path / "run"), "--task", "toy"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(texts) + 1 and set(line.split("\t")[1] for line in lines[1:]) <= {
        "negative", "positive"}  # fmt: skip


def test_the_built_in_task_runs(tmp_path, monkeypatch, capsys):
    """Catches a first command that does not get to its end; the slow test looks at its scores."""
    monkeypatch.chdir(tmp_path)
    quick = ["--teacher-epochs", "1", "--epochs", "1", "--limit", "640", "--force"]
    assert main([*quick, "--device", "cpu"]) == 0
    shown = capsys.readouterr().out
    assert "example 1: [CLS] the " in shown and "fine-tuned only       2      121,794" in shown
    assert main(["predict", "out", "the soup was good"]) == 0
    assert capsys.readouterr().out.split("\t")[0] in ("negative", "positive")


def test_a_folder_without_a_student_says_what_it_has(files, capsys):
    """Catches advice that leads nowhere where a run is not finished or was the teacher's alone."""
    command = ("finetune", "--task", "SST-2", "--bert", files / "bert", "--epochs", "1",
               "--max-length", "24", "--out", files / "out")  # fmt: skip
    assert run(files, *command) == 0
    shown = capsys.readouterr().out
    refused(capsys, main(["predict", str(files / "out"), "a"]), "out/teacher is one")
    (files / "empty").mkdir()
    refused(capsys, main(["predict", str(files / "empty"), "a"]), "no checkpoint in it")
    (line,) = re.findall(r"^next: python microbert.py (.*)$", shown, flags=re.M)
    assert main([*shlex.split(line), *QUICK, "--force"]) == 0  # as it is printed
    assert (files / "out-student/student/config.json").exists()


def test_a_student_of_before_does_not_answer_for_an_unfinished_run(files, capsys, monkeypatch):
    """Catches predictions of a run that was given up for another."""
    assert distil(files, "SST-2") == 0

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(microbert, "train", interrupted)
    assert distil(files, "SST-2", "--overwrite") == 130
    capsys.readouterr()
    refused(capsys, main(["predict", str(files / "out"), "a"]), "no student")
