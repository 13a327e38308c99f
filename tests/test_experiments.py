"""The experiments' script: the peers' losses, what it writes, its tables and its picture."""

import json
import shutil
from xml.etree import ElementTree

import experiments
import numpy as np
import pytest
import torch
from conftest import slow
from test_run import QUICK, few_steps, files, shape  # noqa: F401

import data
import glue
from microbert import (
    Bert,
    DistillConfig,
    TeacherCache,
    gather_transfer,
    load_bert,
    prune,
    sentence_features,
    settle,
)


@pytest.fixture
def encoded():
    """Five texts of 3 to 7 tokens."""
    lengths = [3, 7, 4, 5, 6]
    ids = np.arange(sum(lengths), dtype=np.int32) % 15 + 5
    offsets = np.cumsum([0, *lengths])
    return data.Encoded(ids, np.zeros(len(ids), np.uint8), offsets)


CONFIG = DistillConfig(device="cpu", precision="fp32")


def test_tinybert_by_hand(encoded):
    """Catches layers compared with the wrong ones, padding that counts, a softmax that stays in."""
    torch.manual_seed(0)
    teacher = Bert(shape()).eval()
    student = prune(teacher, (2, 4)).eval()
    rows = torch.arange(5)
    batch = data.collate(encoded, rows.numpy())
    output, wanted = student(**batch), teacher(**batch)
    objective = experiments.TinyBert(teacher, student, encoded, (2, 4), CONFIG)
    terms = objective(output, batch["attention_mask"], rows, 0.0)
    hidden = attention = torch.zeros(())
    real = batch["attention_mask"].bool()
    for mine, theirs in ((0, 0), (1, 2), (2, 4)):
        away = output.hidden_states[mine] - wanted.hidden_states[theirs]
        hidden = hidden + away[real].square().mean()
    pair = (real[:, :, None] & real[:, None, :])[:, None].expand(-1, 2, -1, -1)
    for mine, theirs in ((1, 2), (2, 4)):
        scores = []
        for model, hs, n in ((student, output, mine), (teacher, wanted, theirs)):
            layer, x = model.layers[n - 1], hs.hidden_states[n - 1]
            q, k = (f(x).view(5, 7, 2, 8).transpose(1, 2) for f in (layer.query, layer.key))
            scores.append(q @ k.transpose(-1, -2) / 8**0.5)
        attention = attention + (scores[0] - scores[1])[pair].square().mean()
    assert terms["hidden"].item() == pytest.approx(hidden.item(), rel=1e-5)
    assert terms["attention"].item() == pytest.approx(attention.item(), rel=1e-5)
    objective.logits = wanted.logits
    terms = objective(output, batch["attention_mask"], rows, 0.9)
    guess, target = (x.logits.log_softmax(-1) for x in (output, wanted))
    divergence = (target.exp() * (target - guess)).sum(-1).mean()
    assert list(terms) == ["soft"]
    assert terms["soft"].item() == pytest.approx(divergence.item(), abs=1e-6)


def test_tinybert_stages(encoded):
    """Catches a stage that a single pass leaves out, and texts lost or cut between the stages."""
    passes = [experiments.two_stages(encoded, n) for n in (2, 3)]
    assert [[n for _, n in stages] for stages in passes] == [[1, 1], [2, 1]]
    assert all(rows.tolist() == [*range(5)] for stages in passes for rows, _ in stages)
    (first, once), (second, again) = experiments.two_stages(encoded, 1)
    assert (len(first), len(second), once, again) == (3, 2, 1, 1)
    assert sorted([*first, *second]) == [*range(5)] != [*first, *second]
    part = experiments.some(encoded, np.array([3, 0]))
    ids = [part.ids[a:b].tolist() for a, b in zip(part.offsets, part.offsets[1:])]
    assert ids == [encoded.ids[14:19].tolist(), encoded.ids[:3].tolist()]
    assert len(part.type_ids) == 8 and part.offsets[0] == 0


def test_pkd_by_hand(encoded):
    """Catches patience on the last layer or another view than [CLS], and labels that NaN spoils."""
    torch.manual_seed(1)
    teacher = Bert(shape()).eval()
    student = prune(teacher, (1, 4)).eval()
    rows = torch.arange(5)
    batch = data.collate(encoded, rows.numpy())
    output, wanted = student(**batch), teacher(**batch)
    kept = sentence_features([wanted.hidden_states[n] for n in (2, 4)], batch["attention_mask"])
    labels = torch.tensor([0.0, 1.0, torch.nan, 0.0, torch.nan])
    cache = TeacherCache(kept.detach(), wanted.logits.detach(), labels)
    terms = experiments.Pkd(cache, CONFIG)(output, batch["attention_mask"], rows, 0.0)
    units = []
    for hidden in (output.hidden_states[1], wanted.hidden_states[2]):
        centred = hidden[:, 0] - hidden[:, 0].mean(-1, keepdim=True)
        units.append(centred / centred.norm(dim=-1, keepdim=True))
    assert terms["patience"].item() == pytest.approx(
        100 * (units[0] - units[1]).square().mean().item(), rel=1e-4
    )
    known = -output.logits.log_softmax(-1)[[0, 1, 3], [0, 1, 0]].sum() / 5
    assert terms["hard"].item() == pytest.approx(0.1 * known.item(), rel=1e-5)


def cells_of(page, title):
    """{row: its other cells} of the table under this title."""
    lines = page.split(f"### {title}\n\n")[1].split("\n\n")[0].splitlines()
    return {(c := line[2:-2].split(" | "))[0]: c[1:] for line in lines[2:]}


@slow
def test_runs_are_written_at_once_and_not_repeated(files, tmp_path, monkeypatch, capsys):  # noqa: F811
    """Catches a student lost or trained twice, peers of other texts or updates, tables that lie."""
    monkeypatch.setattr(experiments, "RESULTS", tmp_path / "results.jsonl")
    monkeypatch.setattr(experiments, "HERE", tmp_path)
    monkeypatch.setattr(experiments, "TASKS", ("SST-2", "STS-B"))
    train, checked, trained = experiments.m.train, [], set()

    def check_targets(student, texts, objective, config, *more, **named):
        if getattr(objective, "logits", None) is not None:
            wanted = experiments.m.predict_logits(objective.teacher, texts, config)
            assert torch.allclose(objective.logits, wanted, atol=1e-4)
            checked.append(len(texts))
        trained.add((type(objective).__name__, len(texts), named["epochs"]))
        train(student, texts, objective, config, *more, **named)

    monkeypatch.setattr(experiments.m, "train", check_targets)
    options = ["--bert", files / "bert", "--data-dir", files, "--force", *QUICK]
    options = [str(word) for word in options if word != "--no-baseline"]
    options += ["--lr", "1e-3", "--precision", "fp32"]
    options[options.index("--epochs") + 1] = "2"
    made = ["run", "--tasks", "SST-2,STS-B", "--out", str(tmp_path / "runs"), *options]
    assert experiments.main([*made, "--seeds", "0", "--rows", "full"]) == 0
    first = (tmp_path / "results.jsonl").read_text()
    assert experiments.main([*made, "--seeds", "0,1", "--rows", "full,tinybert,pkd"]) == 0
    assert (tmp_path / "results.jsonl").read_text().startswith(first)
    own = json.loads(first.splitlines()[1])
    assert own["row"] == "full" and own["dev_distance"] == pytest.approx(own["distance"], rel=0.05)
    assert own["unseen_distance"] > 0 and 0 <= own["unseen_agreement"] <= 100
    folder = tmp_path / "runs/SST-2/seed-0"
    shutil.copytree(folder / "teacher", folder / "same/student")
    (folder / "same/results.json").write_text('{"gates": [[1]], "seconds": {"student": 5}}')
    _, config = experiments.m.parse(["--task", "SST-2", *options])
    same = experiments.apart(config, folder, "same")
    assert same == {"dev_distance": 0, "dev_agreement": 100, "gates": [[1]]} | {
        "unseen_distance": 0, "unseen_agreement": 100, "phases": {"student": 5}}  # fmt: skip
    shutil.rmtree(folder / "same")
    assert checked == [60] * 4  # TinyBERT's second stage
    assert {("Pkd", 60, 2), ("TinyBert", 60, 1)} < trained
    found = experiments.results()
    rows = ["full", "pkd", "teacher", "tinybert"]
    scored = next(r for r in found if (r["task"], r["row"], r["seed"]) == ("STS-B", "full", 0))
    assert scored["dev_distance"] == pytest.approx(scored["distance"], rel=0.05)  # in the unit
    for task in ("SST-2", "STS-B"):
        for seed in (0, 1):
            own = [r for r in found if (r["task"], r["seed"]) == (task, seed)]
            assert sorted(r["row"] for r in own) == rows
            assert len({r["updates"] for r in own if r["row"] != "teacher"}) == 1
            teacher = next(r["score"] for r in own if r["row"] == "teacher")
            assert all(
                r["retention"] * teacher == pytest.approx(r["score"])
                for r in own if r["row"] != "teacher"
            )  # fmt: skip
    before = (tmp_path / "results.jsonl").read_text()
    capsys.readouterr()
    assert experiments.main([*made, "--seeds", "0,1", "--rows", "full,tinybert,pkd"]) == 0
    assert (tmp_path / "results.jsonl").read_text() == before
    assert capsys.readouterr().out.count(" has full, tinybert, pkd; --results FILE ") == 4
    again = [str(tmp_path / "new") if word == str(tmp_path / "runs") else word for word in made]
    at = again.index("--bert")  # the peers alone, of a given teacher, in another --out
    again[at : at + 2] = ["--teacher", str(tmp_path / "runs/SST-2/seed-{seed}")]
    again[again.index("SST-2,STS-B")] = "SST-2"
    kept_lines = before.splitlines(keepends=True)
    missing = next(i for i, r in enumerate(found) if (r["row"], r["seed"]) == ("pkd", 1))
    also = next(i for i, r in enumerate(found) if (r["row"], r["seed"]) == ("full", 1))
    less = "".join(line for i, line in enumerate(kept_lines) if i not in (missing, also))
    (tmp_path / "results.jsonl").write_text(less)
    assert experiments.main([*again, "--seeds", "1", "--rows", "full,pkd"]) == 0
    *_, student, remade = experiments.results()
    assert student["row"] == "full" and student["unseen_distance"] > 0
    assert remade["score"] == found[missing]["score"] and remade["task"] == found[missing]["task"]
    (tmp_path / "results.jsonl").write_text("".join(reversed(kept_lines)))
    page = tmp_path / "RESULTS.md"
    page.write_text(f"above\n\n{experiments.START}old{experiments.END}\n\nbelow\n")
    assert experiments.main(["tables"]) == 0
    shown = page.read_text()
    assert shown.startswith(f"above\n\n{experiments.START}### Compared\n")
    assert shown.endswith(f"\n\n{experiments.END}\n\nbelow\n") and "old" not in shown
    of = {(r["row"], r["task"], r["seed"]): r for r in found}

    def mean_and_sd(row, task, key, unit=1):
        one, two = (unit * of[row, task, seed][key] for seed in (0, 1))
        return (one + two) / 2, abs(one - two) / 2**0.5

    kept = cells_of(shown, "% of the teacher's score")
    assert [*kept] == ["full", "tinybert", "pkd"]
    mean, sd = mean_and_sd("pkd", "STS-B", "retention", 100)
    assert kept["pkd"][1] == f"{mean:.1f} ± {sd:.1f} (2)"
    beside = cells_of(shown, "Compared")
    assert [*beside] == ["teacher, 12 layers", "MicroBERT, 6 layers"]
    mean, sd = mean_and_sd("full", "SST-2", "dev_distance")
    assert beside["MicroBERT, 6 layers"][2] == f"{mean:.3f} ± {sd:.3f} (2)"
    assert beside["teacher, 12 layers"][2:] == ["–", "–"]
    gaps = [of["pkd", "STS-B", s]["score"] - of["full", "STS-B", s]["score"] for s in (0, 1)]
    told = f"{sum(gaps) / 2:+.2f} ± {abs(gaps[0] - gaps[1]) / 2:.2f} (2)"  # sd / sqrt 2 of two
    assert cells_of(shown, "Score, minus full's")["pkd"][1] == told
    assert [*cells_of(shown, "Distance on unseen transfer text")] == ["full"]
    assert "STS-B" not in str(cells_of(shown, "Agreement on dev, %"))
    assert experiments.apart_by({1: 2.0}, {0: 1.0, 1: 3.0}, 2) == "-1.00 (1)"
    assert experiments.main(["draw"]) == 0
    picture = ElementTree.parse(tmp_path / "gates.svg").getroot()
    gates = of["full", "SST-2", 0]["gates"]
    assert len(gates) == 2 and all(abs(sum(row) - 1) < 1e-3 for row in gates)
    assert len(picture.findall("{*}rect")) == 1 + 2 * 2 * len(gates[0])
    both = [of["full", "SST-2", seed]["gates"][1][0] for seed in (0, 1)]
    said = [text.text for text in picture.findall("{*}text")]
    first = said.index("2")  # the highest layer's row comes first or last, whole
    assert f"{sum(both) / 2:.2f}" == said[first + 1]


def test_the_rows_of_a_seed_run_together(tmp_path, monkeypatch, capsys):
    """Catches a teacher's pass for each row, rows run again, and another process's seed noted."""
    monkeypatch.setattr(experiments, "RESULTS", tmp_path / "results.jsonl")
    known = {"task": "RTE", "row": "no-fal", "seed": 1}
    (tmp_path / "results.jsonl").write_text(json.dumps(known) + "\n")
    file, asked = tmp_path / "results.jsonl", []

    def ablate(config):
        asked.append(config.rows)
        rows = ("teacher", *config.rows.split())
        return {"runs": [{"row": row, "seed": seed} for seed in (0, 1) for row in rows]}

    monkeypatch.setattr(experiments.m, "ablate", ablate)
    monkeypatch.setattr(experiments, "apart", lambda config, folder, row: {"from": folder.name})
    experiments.run(["RTE"], [1], ["full", "no-fal", "gan"], ["--bert", "x", "--out", "o"], file)
    assert asked == ["full gan"]
    assert capsys.readouterr().out.startswith(f"RTE, seed 1: {file} has no-fal; --results ")
    assert experiments.main(["draw"]) == 2 and "`full`" in capsys.readouterr().err
    first, *new = experiments.results()
    assert first == known and [(r["row"], r["seed"], r.get("from")) for r in new] == [
        ("teacher", 1, None), ("full", 1, "seed-1"), ("gan", 1, "seed-1")]  # fmt: skip
    asked.clear()  # a second time, to be compared with the first
    again = ["--rows", "full", "--results", str(tmp_path / "new/again.jsonl")]
    command = ["run", "--tasks", "RTE", "--seeds", "1", "--bert", "x", "--out", "o", *again]
    assert experiments.main(command) == 0 and asked == ["full"]
    assert experiments.results(tmp_path / "new/again.jsonl") == new[:2]
    assert len(experiments.results()) == 4
    page = tmp_path / "page.md"
    page.write_text("# Results\n")
    assert experiments.main([*command[:-1], str(page)]) == 2
    assert capsys.readouterr().err.startswith(f"error: {page}:1: '# Results', expected a line ")
    assert page.read_text() == "# Results\n"


def test_texts_to_choose_on(files, tmp_path, capsys):  # noqa: F811
    """Catches a sentence on both sides of the cut, rows lost for nothing, the real dev in it."""
    path = files / "RTE/train.tsv"  # each sentence in two pairs
    header, *rows = path.read_text().splitlines()
    turned = [f"{n}\t{b}\t{a}\t{label}" for n, a, b, label in (row.split("\t") for row in rows)]
    path.write_text("\n".join([header, *rows, *turned, ""]))
    assert experiments.main(["cut", "--data-dir", str(files), "--out", str(tmp_path / "cut")]) == 0
    assert experiments.main(["cut", "--data-dir", "nowhere", "--out", str(tmp_path / "no")]) == 2
    assert capsys.readouterr().err.count("\n") == 1 and not (tmp_path / "no").exists()
    assert experiments.main(["run", "--tasks", "RTE", "--rows", "soft-only", "--bert", "x"]) == 2
    assert capsys.readouterr().err.startswith("error: --rows: no 'soft-only' (full, ")
    assert experiments.main(["run", "--tasks", "RTE", "--seeds", "0;1", "--bert", "x"]) == 2
    assert capsys.readouterr().err == "error: --seeds is '0;1', expected e.g. 0,1,2\n"
    for task, pairs in (("SST-2", False), ("RTE", True)):
        parts = [glue.read(task, tmp_path / "cut", split) for split in ("train", "dev")]
        said = [{*data.sentences_of(part.texts)} for part in parts]
        whole, real = (glue.read(task, files, split) for split in ("train", "dev"))
        assert not said[0] & said[1] and not said[1] & {*data.sentences_of(real.texts)}
        assert 1 <= len(parts[1].texts) <= max(1, len(whole.texts) // 10 + 1)
        labels = dict(zip(whole.texts, whole.labels))
        assert all(labels[t] == n for part in parts for t, n in zip(part.texts, part.labels))
        lost = [t for t in whole.texts if not said[0] | said[1] >= {*data.sentences_of([t])}]
        assert len(lost) < len(whole.texts) / 2 if pairs else not lost


def test_texts_that_no_student_has_seen(files):  # noqa: F811
    """Catches texts that the run has learnt from, or that occur in dev."""
    config = settle(DistillConfig(task="SST-2", data_dir=str(files), device="cpu", bert="x"))
    task, train = glue.find_task("SST-2"), glue.read("SST-2", files, "train").texts
    bert, tokenizer = load_bert(files / "bert"), data.load_tokenizer(files / "bert")
    words = bert.word_embeddings.weight.detach()
    found = experiments.unseen(config, task, train, tokenizer, words, count=30)
    near = data.near_words(tokenizer, words, train)
    assert len({*found}) == 30
    assert not {*found} & {*train, *gather_transfer(config, task, train, near)}
    assert found == experiments.unseen(config, task, train, tokenizer, words, count=30)
    bare = experiments.m.row_config(config, "labels-only+no-transfer")
    assert found == experiments.unseen(bare, task, train, tokenizer, words, count=30)


def test_the_page_of_results_is_made_from_them(root, tmp_path, monkeypatch, capsys):
    """Catches a page older than its numbers, and a README whose table is not that page's."""
    page = (root / "tests/RESULTS.md").read_text(encoding="utf-8")
    above, below = page.split(experiments.START)[0], page.split(experiments.END)[1]
    monkeypatch.setattr(experiments, "HERE", tmp_path)
    (tmp_path / "RESULTS.md").write_text(above + experiments.START + experiments.END + below)
    assert experiments.main(["tables"]) == 0
    assert (tmp_path / "RESULTS.md").read_text() == page and capsys.readouterr().out == ""
    readme = (root / "README.md").read_text(encoding="utf-8")
    section = readme.split("\n## Results\n")[1].split("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("|")]
    assert len(rows) > 5 and set(rows) <= {*page.splitlines()}


def test_targets_beside_what_was_reached():
    """Catches a standard deviation for an error, a teacher of another commit, its score twice."""
    common = {"task": "MRPC", "commit": "x"}
    found = [{"row": "teacher", "seed": seed, "seconds": 100, **common} for seed in (0, 1, 2)]
    for seed, gap in ((0, 0.1), (1, 0.2), (2, 0.6)):
        own = {"row": "full", "seed": seed, "seconds": 7, "retention": 1 - gap, **common}
        own |= {
            "unseen_distance": gap,
            "phases": {"teacher": 50, "cache": 30, "student": 100 * gap},
        }
        found.append(own | ({"commit": "y"} if seed == 2 else {}))
    cells = cells_of(experiments.targets(found, ["MRPC", "CoLA"]), "Targets")
    assert cells["distance on unseen text"][1:] == ["0.300 ± 0.153 (3)", "–"]
    assert cells["agreement on unseen text, %"][1:] == ["–", "–"]
    assert cells["% of the teacher's score"][1] == "70.0 ± 15.3 (3)"
    assert cells["a whole run, in times of its teacher's fine-tuning"][1] == "1.45 ± 0.05 (2)"


def test_what_is_checked_in_is_drawn_from_the_results(root, tmp_path, monkeypatch):
    """Catches a picture older than its numbers, and a line that lacks where it came from."""
    found = experiments.results()
    for result in found:
        assert {"task", "seed", "row", "score", "commit", "options"} <= {*result}
        assert json.dumps(result["options"]).isascii() and "dirty" not in result["commit"]
    monkeypatch.setattr(experiments, "HERE", tmp_path)
    if found:
        experiments.draw()
        assert (tmp_path / "gates.svg").read_text() == (root / "tests/gates.svg").read_text()
