"""The ablation: what its rows switch off, its table, and continuing it."""

import json
import statistics

import pytest
import torch
from conftest import slow
from test_robust import stop_at
from test_run import QUICK, few_steps, files, refused, run  # noqa: F401

import data
import glue
import microbert
from microbert import DistillConfig, row_options

SST2 = glue.TASKS["SST-2"]
STEADY = ("--save-every", "2", "--log-every", "1")


def ablate(files, *more, rows="full no-gan labels-only", seeds="0,1", out="out"):  # noqa: F811
    """A quick ablation on single sentences."""
    quick = [word for word in QUICK if word != "--no-baseline"]
    made = ["--task", "SST-2", "--bert", files / "bert", "--out", files / out, "--force", *quick]
    return run(files, "ablate", *made, "--rows", rows, "--seeds", seeds, *STEADY, *more)


def report(files, out="out"):  # noqa: F811
    return json.loads((files / out / "ablation.json").read_text())


def numbers(found):
    """Of every run what does not depend on the clock."""
    return [{k: v for k, v in r.items() if k not in ("seconds", "speed_up")} for r in found["runs"]]


@pytest.mark.parametrize(
    "row, changes",
    [
        ("full", {}),
        ("no-moe", {"moe": False}),
        ("soft-only+no-transfer", {"moe": False, "fal": False, "gan": False, "transfer_ratio": 0}),
        ("keep_layers=2,4,6", {"keep_layers": "2,4,6"}),
        ("layers=2+lr=1e-4+soft=0", {"layers": 2, "lr": 1e-4, "soft": False}),
        ("no-gan+alignment-weight=3", {"gan": False, "alignment_weight": 3.0}),
        (
            "epochs=3+labels-only+moe=1",
            {"moe": True, "fal": False, "gan": False, "soft": False, "epochs": 3},
        ),
    ],
)
def test_row_options(row, changes):
    """Catches a name that switches off something else, and values of the wrong type."""
    options = row_options(row)
    assert options == changes
    kinds = {name: type(getattr(DistillConfig(), name)) for name in options}
    assert all(type(value) is kinds[name] for name, value in options.items() if value)


def test_every_row_of_the_default_is_known():
    """Catches a default row that the parser refuses, and a part of the method without its row."""
    rows = DistillConfig().rows.split(",")
    assert [row_options(row) for row in rows][0] == {}
    for part in ("moe", "fal", "gan", "soft"):
        assert row_options(f"no-{part}") == {part: False} and f"no-{part}" in rows


def test_the_table_and_the_file(files, capsys):  # noqa: F811
    """Catches rows or seeds left out, one teacher for all seeds, one for each row, wrong means."""
    assert (
        ablate(files, rows="full,layers=1+no-moe labels-only,label_epochs=2+keep_layers=1,3") == 0
    )
    found, shown = report(files), capsys.readouterr().out
    names = ["full", "layers=1+no-moe", "labels-only", "label_epochs=2+keep_layers=1,3"]
    expected = [(row, seed) for seed in (0, 1) for row in ["teacher", *names]]
    assert [(r["row"], r["seed"]) for r in found["runs"]] == expected
    assert shown.count("teacher     1/5") == 2 and shown.count("cache: runs the teacher once") == 2
    teacher = {r["seed"]: r["score"] for r in found["runs"] if r["row"] == "teacher"}
    for line in found["table"]:
        own = [r for r in found["runs"] if r["row"] == line["row"]]
        scores = [r["score"] for r in own]
        assert line["n"] == 2 and line["score"] == pytest.approx(statistics.mean(scores))
        assert line["score_sd"] == pytest.approx(statistics.stdev(scores))
        table = shown.split("mean +- sd over n seeds")[1]
        assert f"{line['score']:.2f} +- {line['score_sd']:.2f}" in table and line["row"] in table
        if line["row"] != "teacher":
            kept = [r["score"] / teacher[r["seed"]] for r in own]
            assert [r["retention"] for r in own] == pytest.approx(kept)
            assert line["retention"] == pytest.approx(statistics.mean(kept))
    layers = {line["row"]: line["layers"] for line in found["runs"]}
    assert layers == {"teacher": 4, "full": 2, names[1]: 1, "labels-only": 2, names[3]: 2}
    assert all(0 < r["distance"] < 9 for r in found["runs"] if r["row"] != "teacher")
    updates = {line["row"]: line["updates"] for line in found["runs"] if line["row"] != "teacher"}
    assert updates == {"full": 8, names[1]: 8, "labels-only": 5, names[3]: 18}  # of 40 and 60 texts
    assert not [*files.glob("out/seed-*/*.f16"), *files.glob("out/seed-*/resume*")]


def test_a_row_is_what_distil_makes_of_the_same_options(files):  # noqa: F811
    """Catches options that a row loses, and rows that leak into one another."""
    assert ablate(files, rows="no-gan labels-only no-moe+layers=3", seeds="4") == 0
    quick = ["--task", "SST-2", "--bert", files / "bert", *QUICK, "--force", "--seed", "4"]
    for row, flags in (
        ("no-moe+layers=3", ["--no-moe", "--layers", "3"]),
        ("no-gan", ["--no-gan"]),
    ):
        assert run(files, *quick, *flags, "--out", files / row) == 0
        results = json.loads((files / row / "results.json").read_text())
        mine = next(r for r in report(files)["runs"] if r["row"] == row)
        assert mine["score"] == results["student"]["score"]
        assert mine["retention"] == results["retention"]
        texts = microbert.load_split(DistillConfig(data_dir=str(files)), SST2, "dev").texts
        tokenizer, config = data.load_tokenizer(files / "bert"), DistillConfig(precision="fp32")
        own, teacher = (
            microbert.predict_logits(
                microbert.load_bert(files / row / part), data.encode(tokenizer, texts), config
            ).log_softmax(-1)
            for part in ("student", "teacher")
        )
        away = (teacher.exp() * (teacher - own)).sum(-1).mean().item()
        assert mine["distance"] == pytest.approx(away, rel=1e-3, abs=1e-8)


@pytest.mark.parametrize("task, kept", [("SST-2", "1, 4"), ("STS-B", "2, 4")])
def test_what_a_row_starts_as(files, capsys, task, kept):  # noqa: F811
    """Catches pairs that are pruned as single sentences are, in ablations only."""
    assert ablate(files, "--task", task, rows="full", seeds="0") == 0
    assert f"a student of layers {kept}\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    "phase, step",
    [
        pytest.param("teacher", 4, marks=slow),
        ("full", 5),
        pytest.param("no-gan", 3, marks=slow),
    ],
)
def test_interrupted_and_continued(files, monkeypatch, capsys, phase, step):  # noqa: F811
    """Catches a student trained twice, lost, or other than it would have been."""
    assert ablate(files, out="whole", seeds="3,0") == 0
    with monkeypatch.context() as patch:
        stop_at(patch, phase, step)
        assert ablate(files, seeds="3,0") == 130
    assert "the same command continues from" in capsys.readouterr().err
    assert ablate(files, seeds="3,0") == 0
    shown = capsys.readouterr().out
    assert "continues after step" in shown and "teacher     1/5" in shown  # the other seed's
    assert shown.count("teacher     1/5") == 1
    assert shown.count("full     1/8") == (2 if phase == "teacher" else 1)
    assert numbers(report(files)) == numbers(report(files, "whole"))


def test_rows_and_seeds_added_later(files, capsys):  # noqa: F811
    """Catches a teacher trained again for a new row, and rows that depend on which came before."""
    assert ablate(files, out="whole", rows="full no-fal no-gan layers=1") == 0
    assert ablate(files, rows="layers=1", seeds="0") == 0
    assert ablate(files, rows="no-gan full", seeds="0") == 0
    capsys.readouterr()
    assert ablate(files, rows="full no-fal no-gan layers=1") == 0
    shown = capsys.readouterr().out
    assert shown.count("teacher     1/5") == 1  # of seed 1
    assert shown.count("no-fal     1/8") == 2 and shown.count("no-gan     1/8") == 1
    runs = [sorted(numbers(report(files, o)), key=str) for o in ("out", "whole")]
    assert runs[0] == runs[1]
    assert ablate(files, rows="full no-fal no-gan layers=1") == 0
    shown = capsys.readouterr().out
    assert "1/8" not in shown and "of teacher" in shown  # the table alone


def test_other_flags_are_refused_and_overwritten(files, capsys):  # noqa: F811
    """Catches a table that mixes two settings, and --overwrite that never ends."""
    assert ablate(files, rows="full", seeds="0") == 0
    before = report(files)
    capsys.readouterr()
    code = ablate(files, "--temperature", "3", rows="full", seeds="1")
    refused(capsys, code, files / "out", "temperature was 2.0, is 3.0", "--overwrite")
    assert report(files) == before
    assert ablate(files, "--temperature", "3", "--overwrite", rows="full", seeds="1") == 0
    assert [(r["row"], r["seed"]) for r in report(files)["runs"]] == [("teacher", 1), ("full", 1)]
    capsys.readouterr()
    assert ablate(files, "--temperature", "3", "--overwrite", rows="full", seeds="1") == 0
    assert "full     1/8" in capsys.readouterr().out and len(report(files)["runs"]) == 2


def test_a_row_s_layers_are_its_own(files, capsys):  # noqa: F811
    """Catches --keep-layers that beats a row's layers, and a seed given twice counted as two."""
    assert ablate(files, "--keep-layers", "1,2,3", rows="full layers=1", seeds="0,0") == 0
    assert "a student of layers 1, 2, 3\n" in capsys.readouterr().out
    assert [(r["row"], r["layers"]) for r in report(files)["runs"]] == [
        ("teacher", 4), ("full", 3), ("layers=1", 1),
    ]  # fmt: skip


def test_two_ablations_side_by_side(files, monkeypatch):  # noqa: F811
    """Catches a process that writes its own results over another's, and one counted twice."""
    other, file, train_rows = {"row": "full", "seed": 7}, files / "out/ablation.json", None

    def meanwhile(*given):
        for result in train_rows(*given):
            if file.exists():
                found = report(files)
                if other["row"] not in [r["row"] for r in found["runs"] if r["seed"] == 7]:
                    file.write_text(json.dumps(found | {"runs": [*found["runs"], other]}))
            yield result

    train_rows = microbert.train_rows
    monkeypatch.setattr(microbert, "train_rows", meanwhile)
    assert ablate(files, rows="full no-gan", seeds="0") == 0
    names = [(r["row"], r["seed"]) for r in report(files)["runs"]]
    assert sorted(names) == [("full", 0), ("full", 7), ("no-gan", 0), ("teacher", 0)]
    assert ablate(files, "--overwrite", rows="no-gan", seeds="0") == 0
    assert sorted((r["row"], r["seed"]) for r in report(files)["runs"]) == sorted(names)


def test_a_teacher_for_each_seed(files, capsys):  # noqa: F811
    """Catches {seed} in --teacher that stays as it is."""
    for seed, lr in (("0", "1e-3"), ("1", "1e-5")):
        made = ["--task", "SST-2", "--bert", files / "bert", "--batch-size", "8", "--epochs", "1"]
        made += ["--seed", seed, "--lr", lr, "--out", files / f"t{seed}"]
        assert run(files, "finetune", *made) == 0
    capsys.readouterr()
    assert ablate(files, "--bert", "", "--teacher", files / "t{seed}", rows="full") == 0
    assert "teacher     1/" not in capsys.readouterr().out
    for seed in "01":
        weights = [
            files / place / "teacher/model.safetensors"
            for place in (f"t{seed}", f"out/seed-{seed}")
        ]
        assert weights[0].read_bytes() == weights[1].read_bytes()


@pytest.mark.parametrize(
    "arguments, needles",
    [
        (["--rows", "fulll"], ["'fulll'", "full", "layers=2"]),
        (["--rows", ""], ["''"]),
        (["--rows", "layers=two"], ["layers=two", "int"]),
        (["--rows", "moe=maybe"], ["moe=maybe", "bool"]),
        (["--rows", "bert=x"], ["'bert=x'"]),
        (["--rows", "layers=9"], ["9 student layers", "4"]),
        (["--rows", "routing=token"], ["--routing", "sentence"]),
        (["--seeds", "0;1"], ["--seeds", "0,1,2"]),
        (["--seeds", "-1"], ["--seed", "0 or more"]),
        (["--seeds", "0,-1"], ["--seed", "0 or more"]),
        (["--rows", "layers=1+keep_layers=1,2"], ["--layers and --keep-layers exclude"]),
        (["--transfer", "nowhere.txt"], ["nowhere.txt: no such file"]),
        (["--transfer", "0"], ["--transfer-ratio 0"]),
    ],
)
def test_bad_rows_and_seeds(files, capsys, arguments, needles):  # noqa: F811
    """Catches a mistake in a row that is found hours after the first one."""
    refused(capsys, ablate(files, *arguments), *needles)
    assert not list(files.rglob("log.jsonl"))


@pytest.mark.parametrize("content", ["", "[]", '{"runs": 3}', '{"runs": [{}], "flags": {}}'])
def test_a_damaged_report(files, capsys, content):  # noqa: F811
    """Catches a traceback, and results thrown away without a word."""
    (files / "out").mkdir()
    (files / "out/ablation.json").write_text(content)
    refused(capsys, ablate(files), "ablation.json", "remove it")
    assert (files / "out/ablation.json").read_text() == content


# --- a file of transfer text ---------------------------------------------------------------------


def gathered(files, task, lines, ratio=2.0, name="mine.txt"):  # noqa: F811
    (files / name).write_text("".join(f"{line}\n" for line in lines))
    flags = {"transfer": str(files / name), "transfer_ratio": ratio, "data_dir": str(files)}
    config = DistillConfig(task=task, **flags)
    task = microbert.find_task(config)
    train_set = microbert.load_split(config, task, "train")
    return microbert.gather_transfer(config, task, train_set.texts)


def test_a_file_of_sentences(files, capsys):  # noqa: F811
    """Catches a file that is not read, is cut to its share or to lengths, or brings dev text in."""
    dev = microbert.load_split(DistillConfig(data_dir=str(files)), microbert.find_task(
        DistillConfig(task="SST-2")), "dev").texts[3]  # fmt: skip
    mine = ["mine", f"my own {'very ' * 40}long one", f" {dev.upper()}!", "left\tand right", "d"]
    mine += ["", " ", "\t"]
    texts = gathered(files, "SST-2", mine)
    assert not {"", " "} & {*texts}
    assert len(texts) == 80 and mine[0] in texts and mine[1] in texts
    assert "left" in texts and "and right" in texts and not any(dev in t.lower() for t in texts)
    assert f"(5 texts of {files / 'mine.txt'} before" in capsys.readouterr().out
    many = gathered(files, "SST-2", [f"number {i}" for i in range(500)])
    assert len(many) == 80 and all(text.startswith("number") for text in many)
    assert gathered(files, "SST-2", mine, ratio=0) == []


def test_a_file_of_pairs(files):  # noqa: F811
    """Catches pairs torn apart, and sentences that do not become pairs."""
    pairs = gathered(files, "RTE", ["one\ttwo", "alone", "three\tfour"])
    assert ("one", "two") in pairs and ("three", "four") in pairs
    assert all(isinstance(text, tuple) and len(text) == 2 for text in pairs)
    assert any(first == "alone" for first, _ in pairs)


@pytest.mark.parametrize("raw, needle", [(b"fine\na\tb\tc\n", "3 tab"), (b"fine\n\xff\n", "utf-8")])
def test_a_broken_file_is_located(files, capsys, raw, needle):  # noqa: F811
    """Catches a traceback, and a run that drops lines in silence."""
    (files / "mine.txt").write_bytes(raw)
    code = ablate(files, "--transfer", files / "mine.txt")
    refused(capsys, code, f"{files / 'mine.txt'}:2", needle)


def test_the_users_text_comes_first():
    """Catches given text that is lost among others', and texts that change where none is given."""
    own, others = [f"own {i} word" for i in range(50)], [[f"foreign {i} x" for i in range(50)]]
    before = data.transfer_texts(own, others, [], 40, 0)
    assert data.transfer_texts(own, others, [], 40, 0, given=[]) == before
    texts, left_out = data.transfer_texts(own, others, ["given 3"], 40, 0, given=["given 3", "g 4"])
    assert "g 4" in texts and "given 3" not in texts and left_out == 1 and len(texts) == 40
    assert sum("foreign" in text for text in texts) == 19  # half of all, less what is given


def test_student_dropout(files, monkeypatch):  # noqa: F811
    """Catches dropout that does not reach the student, or that its checkpoint keeps."""
    seen = []
    train = microbert.train
    monkeypatch.setattr(microbert, "train", lambda model, *a, **k: (
        seen.append({layer.hidden_dropout for layer in model.layers} | {model.head_dropout}),
        train(model, *a, **k)))  # fmt: skip
    assert ablate(files, rows="full dropout=0.3", seeds="0") == 0
    assert seen == [{0.1}, {0.0}, {0.3}]
    made = ["--task", "SST-2", "--bert", files / "bert", *QUICK, "--force", "--out", files / "d"]
    assert run(files, *made) == 0
    config = json.loads((files / "d/student/config.json").read_text())
    assert (
        config["hidden_dropout_prob"] == 0.1
        and torch.isfinite(microbert.load_bert(files / "d/student").classifier.weight).all()
    )
