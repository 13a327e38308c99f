"""The ablation: its rows, its table, continuing it, and what it leaves alone."""

import json
import statistics
import subprocess
import sys

import pytest
from conftest import later, slow
from test_run import FIT_STEPS, QUICK, few_steps, files, refused, run, shape  # noqa: F401

import data
import glue
import microbert
from microbert import DistillConfig, row_config

STEADY = ("--save-every", "2", "--log-every", "1")


def command(files, *more, rows="full no-moe labels-only", seeds="0,1", out="out"):  # noqa: F811
    """A quick ablation on single sentences."""
    quick = [word for word in QUICK if word != "--no-baseline"]
    made = ["ablate", "--task", "SST-2", "--bert", files / "bert", "--out", files / out, "--force"]
    return [*made, *quick, "--rows", rows, "--seeds", seeds, *STEADY, *more]


def ablate(files, *more, **given):  # noqa: F811
    return run(files, *command(files, *more, **given))


def numbers(out):
    """Of every run what does not depend on the clock or on which came first."""
    runs = microbert.ablation_report(out)["runs"]
    kept = [{k: v for k, v in r.items() if k not in ("seconds", "speed_up")} for r in runs]
    return sorted(kept, key=lambda r: (r["seed"], r["row"]))


def stop_at(monkeypatch, *where, row=""):
    """Interrupts at the log's (phase, step), or before OUT/seed-S/ROW's results.json is there."""
    log_step, write_file = microbert.Log.step, microbert.write_file

    def step(self, now, *rest):
        if (self.phase, now) == where:
            raise KeyboardInterrupt
        log_step(self, now, *rest)

    def write(path, *blocks):
        if row and str(path).endswith(f"{row}/results.json"):
            raise KeyboardInterrupt
        write_file(path, *blocks)

    monkeypatch.setattr(microbert.Log, "step", step)
    monkeypatch.setattr(microbert, "write_file", write)


@pytest.mark.parametrize(
    "row, changes",
    [
        ("full", {}),
        ("no-moe", {"moe": False}),
        ("no-fal+no-transfer", {"fal": False, "transfer_ratio": 0}),
        ("gan", {"gan": True}),
        ("keep_layers=2,4,6", {"keep_layers": "2,4,6"}),
        ("layers=2+lr=1e-4+soft=0", {"layers": 2, "lr": 1e-4, "soft": False}),
        ("no-moe+gan=1+alignment-weight=3", {"moe": False, "gan": True, "alignment_weight": 3.0}),
        ("epochs=3+labels-only+moe=1",
         {"moe": True, "fal": False, "gan": False, "soft": False, "epochs": 3}),
    ],
)  # fmt: skip
def test_what_a_row_asks(row, changes):
    """Catches a name that switches off something else, and values of the wrong type."""
    given, found = DistillConfig(task="RTE", epochs=9), row_config(DistillConfig(task="RTE"), row)
    assert found == microbert.replace(DistillConfig(task="RTE"), **changes)
    assert row_config(given, "labels-only").epochs == 0  # as many as the teacher's


def test_every_row_of_the_default_is_known():
    """Catches a default row that the parser refuses, and a part of the method without its row."""
    rows = DistillConfig().rows.split()
    assert row_config(DistillConfig(), rows[0]) == DistillConfig() and len(rows) == 8
    for row, on in (("no-moe", False), ("no-fal", False), ("gan", True), ("no-soft", False)):
        found = row_config(DistillConfig(), row)
        assert found == DistillConfig(**{row.removeprefix("no-"): on}) and row in rows
    assert not row_config(DistillConfig(gan=True), "no-gan").gan and not DistillConfig().gan
    assert all(row_config(DistillConfig(), row) for row in rows)


def test_the_table_and_the_runs(files, capsys):  # noqa: F811
    """Catches rows or seeds left out, one teacher for all seeds, one for each row, wrong means."""
    names = ["full", "layers=1+no-moe", "labels-only", "epochs=2+keep_layers=1,3"]
    assert ablate(files, rows="full,layers=1+no-moe labels-only," + names[3]) == 0
    found, shown = microbert.ablation_report(files / "out"), capsys.readouterr().out
    expected = [(row, seed) for seed in (0, 1) for row in ["teacher", *names]]
    assert [(r["row"], r["seed"]) for r in found["runs"]] == expected
    assert shown.count("teacher     1/5") == 2  # and the pass of each text and layers once
    assert shown.count("cache: runs the teacher once") == 8 and shown.count(" MB for ") == 6
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
    layers = {line["row"]: line["layers"] for line in found["runs"]}
    assert layers == {"teacher": 4, "full": 2, names[1]: 1, "labels-only": 2, names[3]: 2}
    assert all(run["seconds"] > 0 for run in found["runs"])  # the teachers' fine-tuning, too
    away = [r["distance"] for r in found["runs"] if r["row"] != "teacher"]
    assert all(0 < distance < 9 for distance in away), away
    updates = {line["row"]: line["updates"] for line in found["runs"] if line["row"] != "teacher"}
    assert updates == {"full": 8, names[1]: 8, "labels-only": 5, names[3]: 16}  # of 40 and 60 texts
    assert not [*files.glob("out/seed-*/*.f16*"), *files.glob("out/**/*.state")]
    assert not [*files.glob("out/seed-*/*/teacher")]  # the seed's is shared


def test_a_row_is_what_distil_makes_of_the_same_options(files):  # noqa: F811
    """Catches options that a row loses, and rows that leak into one another: bit for bit."""
    assert ablate(files, rows="no-gan no-transfer no-moe+layers=3", seeds="4") == 0
    quick = ["--task", "SST-2", "--bert", files / "bert", *QUICK, "--force", "--seed", "4"]
    for row, flags in (("no-moe+layers=3", ["--no-moe", "--layers", "3"]), ("no-gan", ["--no-gan"]),
                       ("no-transfer", ["--transfer-ratio", "0"])):  # fmt: skip
        assert run(files, *quick, *flags, "--out", files / "alone" / row) == 0
        homes = [files / "alone" / row, files / "out/seed-4" / row]
        found = [json.loads((home / "results.json").read_text()) for home in homes]
        assert found[0]["student"] == found[1]["student"]
        weights = [(home / "student/model.safetensors").read_bytes() for home in homes]
        assert weights[0] == weights[1]
        said = []
        for part in (homes[0] / "student", homes[0] / "teacher"):
            texts = glue.read("SST-2", files, "dev").texts
            encoded = data.encode(data.load_tokenizer(files / "bert"), texts)
            config = DistillConfig(device="cpu", precision="fp32")
            logits = microbert.predict_logits(microbert.load_bert(part), encoded, config)
            said.append(logits.log_softmax(-1))
        away = (said[1].exp() * (said[1] - said[0])).sum(-1).mean().item()
        assert found[1]["student"]["distance"] == pytest.approx(away, rel=1e-3, abs=1e-7)


def test_no_row_sees_what_its_options_exclude(files, monkeypatch):  # noqa: F811
    """Catches transfer text in a row without: in its training or in what its experts saw."""
    seen, fit = [], microbert.fit_experts

    def watched(experts, features, logits, labels, **rest):
        seen.append((len(labels), int(labels.isnan().sum())))
        return fit(experts, features, logits, labels, **rest)

    monkeypatch.setattr(microbert, "fit_experts", watched)
    assert ablate(files, rows="full no-transfer", seeds="0") == 0
    assert seen == [(60, 20), (40, 0)]
    (files / "mine.txt").write_text("".join(f"a cat {i}\n" for i in range(99)))
    more = ("--transfer", files / "mine.txt", "--transfer-ratio", "-1")
    assert ablate(files, *more, rows="full no-transfer", seeds="0", out="mine") == 0
    assert seen[2:] == [(320, 280), (40, 0)]


@pytest.mark.parametrize(
    "where, row",
    [later(("teacher", 4), ""), later(("student", 5), ""), ((), "full"),
     later((), "labels-only"), later((), "seed-3")],
)  # fmt: skip
def test_interrupted_and_continued(files, monkeypatch, capsys, where, row):  # noqa: F811
    """Catches a student trained twice, lost, or other than it would have been."""
    assert ablate(files, out="whole", seeds="3,0", rows="full labels-only") == 0
    with monkeypatch.context() as patch:
        stop_at(patch, *where, row=row)
        assert ablate(files, seeds="3,0", rows="full labels-only") == 130
    assert "the same command continues from" in capsys.readouterr().err
    assert ablate(files, seeds="3,0", rows="full labels-only") == 0
    shown = capsys.readouterr().out
    assert shown.count("teacher     1/5") == 1 and ("continues after" in shown) == bool(where)
    assert numbers(files / "out") == numbers(files / "whole")
    assert not [*files.glob("out/**/*.state"), *files.glob("out/**/*.part")]


def test_rows_and_seeds_added_later(files, capsys):  # noqa: F811
    """Catches a teacher trained again for a new row, and rows that depend on which came before."""
    assert ablate(files, out="whole", rows="full layers=1") == 0
    assert ablate(files, rows="layers=1", seeds="0") == 0
    logs = {path: path.read_bytes() for path in files.glob("out/**/log.jsonl")}
    assert ablate(files, rows="full", seeds="0") == 0
    assert len(logs) == 2 and all(path.read_bytes() == log for path, log in logs.items())
    capsys.readouterr()
    assert ablate(files, rows="full layers=1") == 0
    shown = capsys.readouterr().out
    assert shown.count("teacher     1/5") == 1 and shown.count("student     1/8") == 2  # of 4
    assert numbers(files / "out") == numbers(files / "whole")
    assert ablate(files, rows="full layers=1") == 0
    shown = capsys.readouterr().out
    assert "1/8" not in shown and "of teacher" in shown  # the table alone


def test_other_flags_and_overwriting(files, monkeypatch, capsys):  # noqa: F811
    """Catches a table that mixes two settings, --overwrite that never ends or starts over where it
    was killed, and one that takes what is not its own."""
    assert ablate(files, rows="full no-moe", seeds="0") == 0
    mine = [files / "out" / n for n in ("notes", "seed-0/notes", "seed-0/full/student/notes")]
    for path in mine:
        path.write_text("mine")
    before = numbers(files / "out")
    capsys.readouterr()
    code = ablate(files, "--temperature", "3", rows="full", seeds="1")
    refused(capsys, code, files / "out", "temperature was 2.0, is 3.0", "--overwrite")
    assert numbers(files / "out") == before
    again = {"rows": "full no-moe", "seeds": "0"}
    with monkeypatch.context() as patch:
        stop_at(patch, row="no-moe")
        assert ablate(files, "--overwrite", **again) == 130
    capsys.readouterr()
    assert ablate(files, "--overwrite", **again) == 0
    assert "student     1/8" not in capsys.readouterr().out  # both were trained before
    assert numbers(files / "out") == before
    assert ablate(files, "--overwrite", **again) == 0
    shown = capsys.readouterr().out
    assert shown.count("student     1/8") == 2 and "teacher     1/5" not in shown
    assert ablate(files, "--temperature", "3", "--overwrite", rows="full", seeds="1") == 0
    names = [(r["row"], r["seed"]) for r in numbers(files / "out")]
    assert names == [("full", 1), ("teacher", 1)]
    assert all(path.read_text() == "mine" for path in mine)
    microbert.save_bert(microbert.Bert(shape()), files / "bert")  # as in another session
    capsys.readouterr()
    code = ablate(files, "--temperature", "3", rows="full", seeds="1")
    refused(capsys, code, "crc of the weights was", "--overwrite")
    assert ablate(files, "--temperature", "3", "--overwrite", rows="full", seeds="1") == 0
    assert "teacher     1/5" in capsys.readouterr().out


@slow
def test_two_ablations_side_by_side(files):  # noqa: F811
    """Catches processes that write over one another: seeds of their own, on one OUT."""
    for seed in ("0", "1"):
        assert ablate(files, rows="full", seeds=seed, out="whole") == 0
    script = (
        "import sys, microbert\n"
        f"microbert.fit_experts.__kwdefaults__['steps'] = {FIT_STEPS}\n"
        "sys.exit(microbert.main(sys.argv[1:]))\n"
    )
    started, folder = [], microbert.Path(microbert.__file__).parent
    for seed in ("0", "1"):
        words = [*command(files, rows="full", seeds=seed), "--data-dir", files]
        pipes = {"cwd": folder, "stdout": subprocess.DEVNULL}
        started.append(subprocess.Popen([sys.executable, "-c", script, *map(str, words)], **pipes))
    assert [process.wait() for process in started] == [0, 0]
    assert numbers(files / "out") == numbers(files / "whole")


def test_a_teacher_for_each_seed(files, capsys):  # noqa: F811
    """Catches {seed} in --teacher that stays as it is, and a row of layers beside --keep-layers."""
    for seed, lr in (("0", "1e-3"), ("1", "1e-5")):
        made = ["--task", "SST-2", "--bert", files / "bert", "--batch-size", "8", "--epochs", "1"]
        made += ["--seed", seed, "--lr", lr, "--out", files / f"t{seed}"]
        assert run(files, "finetune", *made) == 0
    capsys.readouterr()
    given = ["--bert", "", "--teacher", files / "t{seed}", "--keep-layers", "1,2,3"]
    assert ablate(files, *given, rows="full layers=1", seeds="0,1,0") == 0
    shown = capsys.readouterr().out
    assert "teacher     1/" not in shown and shown.count("layers 1, 2, 3, as they are") == 2
    for seed in "01":
        parts = [files / p / "teacher/model.safetensors" for p in (f"t{seed}", f"out/seed-{seed}")]
        assert parts[0].read_bytes() == parts[1].read_bytes()
    layers = [(r["row"], r["layers"]) for r in numbers(files / "out")]
    assert layers == 2 * [("full", 3), ("layers=1", 1), ("teacher", 4)]


@pytest.mark.parametrize(
    "arguments, needles",
    [
        (["--rows", "fulll"], ["'fulll'", "full", "layers=2"]),
        (["--rows", ""], ["''"]),
        (["--rows", "layers=two"], ["layers", "two"]),
        (["--rows", "moe=maybe"], ["maybe"]),
        (["--rows", "bert=x"], ["'bert=x'"]),
        (["--rows", "transfer=a/b"], ["a/b"]),
        (["--rows", "layers=9"], ["9 student layers", "4"]),
        (["--seeds", "0;1"], ["--seeds", "0,1,2"]),
        (["--seeds", "0,-1"], ["--seeds", "0,1,2"]),
        (["--rows", "layers=1+keep_layers=1,2"], ["--layers and --keep-layers exclude"]),
        (["--transfer", "nowhere.txt"], ["nowhere.txt: no such file"]),
    ],
)
def test_bad_rows_and_seeds(files, capsys, arguments, needles):  # noqa: F811
    """Catches a mistake in a row that is found hours after the first one."""
    refused(capsys, ablate(files, *arguments), *needles)
    assert not list(files.rglob("log.jsonl"))


def test_damaged_results(files, capsys):  # noqa: F811
    """Catches a traceback, and results thrown away without a word."""
    assert ablate(files, rows="full", seeds="0") == 0
    file = files / "out/seed-0/full/results.json"
    for content in ("", "[]", '{"runs": 3}'):
        file.write_text(content)
        capsys.readouterr()
        refused(capsys, ablate(files, rows="full", seeds="0"), file)
        assert file.read_text() == content


# --- a file of transfer text ---------------------------------------------------------------------


def gathered(files, task, lines, ratio=2.0):  # noqa: F811
    """The transfer text of a task, with a file of these lines."""
    (files / "mine.txt").write_text("".join(f"{line}\n" for line in lines))
    config = DistillConfig(transfer=str(files / "mine.txt"), transfer_ratio=ratio,
                           data_dir=str(files))  # fmt: skip
    task = glue.find_task(task)
    return microbert.gather_transfer(config, task, glue.read(task, files, "train").texts, {})


def test_a_file_of_sentences_or_pairs(files, capsys):  # noqa: F811
    """Catches a file that is not read, is cut to its share or to lengths, or brings dev text in."""
    dev = glue.read("SST-2", files, "dev").texts[3]
    mine = ["mine", f"my own {'very ' * 40}long one", f" {dev.upper()}!", "left\tand right", "d"]
    texts = gathered(files, "SST-2", [*mine, "", " ", "\t"])
    assert not {"", " "} & {*texts} and len(texts) == 80 and {mine[0], mine[1]} <= {*texts}
    assert "left" in texts and "and right" in texts and not any(dev in t.lower() for t in texts)
    told = capsys.readouterr()
    assert f"(5 of 5 texts of {files / 'mine.txt'} before" in told.out
    assert told.err == f"note: of {files / 'mine.txt'} 1 are pairs, read as two texts each\n"
    many = gathered(files, "SST-2", [f"number {i}" for i in range(500)])
    assert len(many) == 80 and all(text.startswith("number") for text in many)
    assert len(gathered(files, "SST-2", [f"number {i}" for i in range(500)], ratio=-1)) == 500
    assert "(500 of 500 texts of" in capsys.readouterr().out  # and not 4 to an example
    with pytest.raises(ValueError, match="--transfer and --transfer-ratio 0 exclude each other"):
        gathered(files, "SST-2", mine, ratio=0)
    pairs = gathered(files, "RTE", ["one\ttwo", "alone", "three\tfour"])
    assert ("one", "two") in pairs and ("three", "four") in pairs
    assert all(isinstance(text, tuple) and len(text) == 2 for text in pairs)
    assert any(first == "alone" for first, _ in pairs)


@pytest.mark.parametrize("raw, needle", [(b"fine\na\tb\tc\n", "3 tab"), (b"fine\n\xff\n", "utf-8")])
def test_a_broken_file_is_located(files, capsys, raw, needle):  # noqa: F811
    """Catches a traceback, and a run that drops lines in silence."""
    (files / "mine.txt").write_bytes(raw)
    code = run(files, "--task", "SST-2", "--bert", files / "bert", "--out", files / "out",
               "--transfer", files / "mine.txt", "--max-length", "24")  # fmt: skip
    refused(capsys, code, f"{files / 'mine.txt'}:2", needle)
    assert not (files / "out").exists()


def test_the_users_text_comes_first():
    """Catches given text that is lost among others', and texts that change where none is given."""
    own, others = [f"own {i} word" for i in range(50)], [[f"foreign {i} x" for i in range(50)]]
    before = data.transfer_texts(own, others, [], 40, 0)
    assert data.transfer_texts(own, others, [], 40, 0, given=[]) == before
    texts, left_out = data.transfer_texts(own, others, ["given 3"], 40, 0, given=["given 3", "g 4"])
    assert "g 4" in texts and "given 3" not in texts and left_out == 1 and len(texts) == 40
    assert sum("foreign" in text for text in texts) == 7  # a fifth, less what is given
