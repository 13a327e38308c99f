# ruff: noqa: F811 (fixtures)
"""Killed, starved and fed rubbish: what a run leaves, and what the same command makes of it."""

import contextlib
import errno
import io
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import later, slow
from test_model import POINTER
from test_run import FIT_STEPS, QUICK, distil, few_steps, files, own_data, refused, run, shape  # noqa: F401
from torch.utils._python_dispatch import TorchDispatchMode

import data
import glue
import microbert
from microbert import Bert, DistillConfig, load_bert, main, save_bert, settle

SLOW = "SLOW" in os.environ
# Three trainings: teacher 5 steps, student 8, baseline 5.
STEADY = ("--save-every", "2", "--log-every", "1", "--baseline")
PARTS = ("teacher", "student", "baseline")


def stop(monkeypatch, *where, also=None):
    """Interrupts at (phase, step, steps), the step before it saved, or before or after OUT/FILE is
    written, at (file, when); also: is called there instead."""
    log_step, write_file = microbert.Log.step, microbert.write_file

    def interrupt():
        raise KeyboardInterrupt

    def step(self, *arguments):
        if (self.phase, *arguments[:2]) == where:
            (also or interrupt)()
        log_step(self, *arguments)

    def write(path, *blocks):
        ours = len(where) == 2 and str(path).endswith(f"out/{where[0]}")
        if not ours or where[1] == "after":
            write_file(path, *blocks)
        if ours:
            interrupt()

    monkeypatch.setattr(microbert.Log, "step", step)
    monkeypatch.setattr(microbert, "write_file", write)


def interrupted(files, monkeypatch, *where, more=(), out="out"):
    """A run that stopped at (phase, step, steps), or at (file, when)."""
    with monkeypatch.context() as patch:
        stop(patch, *where)
        assert distil(files, "SST-2", *STEADY, *more, out=out) == 130
    return files / out


def same_end(one, other):
    """Both runs left the same weights and scores, and nothing to continue from."""
    found = [json.loads((out / "results.json").read_text()) for out in (one, other)]
    for part in PARTS:
        weights = [(out / part / "model.safetensors").read_bytes() for out in (one, other)]
        assert weights[0] == weights[1], part
    for part in (*PARTS, "pruned", "retention"):
        assert found[0][part] == found[1][part]
    for out in (one, other):
        assert {p.name for p in out.iterdir()} == {"log.jsonl", "results.json", *PARTS}
        assert not list(out.rglob("*.part"))


@pytest.fixture
def whole(files, tmp_path_factory):
    """A run that nothing disturbed, made once for all tests."""
    out = tmp_path_factory.getbasetemp() / "whole"
    if not (out / "results.json").exists():
        assert distil(files, "SST-2", *STEADY, out=out) == 0
    return out


# --- continuing ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "phase, step, steps, told",
    [("teacher", 4, 5, "teacher: continues after step 2"), later("student", 1, 8, ""),
     ("student", 6, 8, "student: continues after step 4"),
     later("baseline", 1, 5, ""),
     later("baseline", 4, 5, "baseline: continues after step 2")],
)  # fmt: skip
def test_interrupted_and_continued(files, whole, monkeypatch, capsys, phase, step, steps, told):
    """Catches a part that is not restored, a phase begun again, an interruption without a word."""
    out = interrupted(files, monkeypatch, phase, step, steps)
    error = capsys.readouterr().err
    assert error.startswith(f"interrupted; the same command continues from {out}")
    assert ".state" in error and error.count("\n") == 1
    states = [torch.load(path, weights_only=True)["seconds"] for path in out.glob("*.state")]
    before = max(states, key=lambda seconds: sum(seconds.values()))
    assert distil(files, "SST-2", *STEADY) == 0
    shown = capsys.readouterr().out
    assert ", ".join(line for line in shown.splitlines() if "continues" in line) == told
    finished = PARTS[: PARTS.index(phase)]
    assert not [part for part in finished if f"{part}     1/" in shown]  # not trained twice
    same_end(whole, out)
    seconds = json.loads((out / "results.json").read_text())["seconds"]
    assert before["teacher"] > 0 and all(seconds[phase] > before[phase] - 0.01 for phase in before)
    logged = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    for part, count in (("teacher", 5), ("student", 8), ("baseline", 5)):
        own = [e for e in logged if (e["phase"], e.get("steps")) == (part, count)]
        assert {e["step"] for e in own} == {*range(1, count + 1)}


@pytest.mark.parametrize("when", ["before", later("after")])
@pytest.mark.parametrize("part", ["student", "results", later("teacher"), later("baseline")])
def test_interrupted_between_two_files(files, whole, monkeypatch, capsys, part, when):
    """Catches weights without a config.json taken for a finished phase, or a phase done again."""
    file = "results.json" if part == "results" else f"{part}/config.json"
    out = interrupted(files, monkeypatch, file, when)
    assert (out / file).exists() == (when == "after") and list(out.glob("*/model.safetensors"))
    capsys.readouterr()
    code = distil(files, "SST-2", *STEADY)
    if (part, when) == ("results", "after"):  # and its leftovers go
        refused(capsys, code, "finished run")
    else:
        shown = capsys.readouterr().out
        done = PARTS[: PARTS.index(part) + 1] if part in PARTS else PARTS
        assert code == 0 and not [name for name in done if f"{name}     1/" in shown]
    same_end(whole, out)


@pytest.mark.parametrize(
    "more", [later(["--no-baseline"]), ["--save-every", "5", "--log-every", "7"]]
)
def test_what_moves_no_weight_may_change(files, whole, monkeypatch, more):
    """Catches advice (--force) that is then refused as another flag, and a run that insists on a
    comparison that it was told to leave out."""
    out = interrupted(files, monkeypatch, "baseline", 4, 5)
    assert distil(files, "SST-2", *STEADY, "--force", *more) == 0
    results, expected = (json.loads((o / "results.json").read_text()) for o in (out, whole))
    assert results["student"] == expected["student"]
    assert ("baseline" in results) == (len(more) > 1) and not list(out.glob("*.state"))


def test_fine_tuning_continues(files, monkeypatch, capsys):
    """Catches a resume that only `distill` has."""
    command = ("finetune", "--task", "STS-B", "--bert", files / "bert", "--batch-size", "8",
               "--epochs", "1", *STEADY[:4])  # fmt: skip
    assert run(files, *command, "--out", files / "whole") == 0
    with monkeypatch.context() as patch:
        stop(patch, "teacher", 4, 5)
        assert run(files, *command, "--out", files / "out") == 130
    assert run(files, *command, "--out", files / "out") == 0
    assert "teacher: continues after step 2" in capsys.readouterr().out
    ends = [(files / out / "teacher/model.safetensors").read_bytes() for out in ("whole", "out")]
    assert ends[0] == ends[1] and not list((files / "out").glob("*.state"))


@pytest.mark.parametrize(
    "harm",
    ["code", *map(later, ("cut", "rubbish", "empty", "gone"))],
)
def test_a_damaged_state_is_not_used(files, whole, monkeypatch, capsys, harm):
    """Catches rubbish taken for a state, a run that never gets past it, and pickle's powers."""
    out = interrupted(files, monkeypatch, "student", 6, 8)
    (path,) = out.glob("student-*.state")

    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(files / "pwned"),)

    if harm == "code":
        torch.save({"model": Evil()}, path)
    elif harm == "gone":
        path.unlink()
    else:
        raw = path.read_bytes()
        path.write_bytes({"cut": raw[: len(raw) // 2], "rubbish": b"[1]", "empty": b""}[harm])
    capsys.readouterr()
    assert distil(files, "SST-2", *STEADY) == 0
    shown = capsys.readouterr()
    assert (f"note: not used, {path}" in shown.err) == (harm != "gone")
    assert "continues" not in shown.out and "teacher     1/" not in shown.out
    assert not (files / "pwned").exists()
    same_end(whole, out)


@pytest.mark.parametrize(
    "more, processes, named",
    [later(("--lr", "2e-4"), 1, "lr was 0.0001, is 0.0002"),
     later(("--seed", "1"), 1, "seed was 0, is 1"),
     (("--no-gan", "--expert-size", "8"), 1,
      "gan was True, is False, expert_size was 128, is 8"), ((), 2, "processes was 1, is 2")],
)  # fmt: skip
def test_other_flags_are_refused(files, monkeypatch, capsys, more, processes, named):
    """Catches half a run with one setting and half with another."""
    out = interrupted(files, monkeypatch, "student", 6, 8)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    capsys.readouterr()
    with monkeypatch.context() as patch:
        patch.setattr(microbert, "process", lambda: (0, processes))
        refused(capsys, distil(files, "SST-2", *STEADY, *more), named, "--overwrite")
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    if more:
        assert distil(files, "SST-2", *STEADY, *more, "--overwrite") == 0
        assert "continues" not in capsys.readouterr().out
        same_end(out, out)


@pytest.mark.parametrize(
    "at",
    [("student", 6, 8), later(("run.json", "before")), later(("results.json", "after")),
     later(("baseline/config.json", "before"))],
)  # fmt: skip
def test_overwriting_is_continued_too(files, whole, monkeypatch, capsys, at):
    """Catches a command with --overwrite that starts from zero each time it is killed, parts of
    the run given up taken for the new one's, and what a run killed at its very end has left."""
    assert distil(files, "SST-2", *STEADY, "--seed", "5") == 0
    out = interrupted(files, monkeypatch, *at, more=["--overwrite"])
    assert (out / "results.json").exists() == (at[0] == "results.json")
    capsys.readouterr()
    assert distil(files, "SST-2", *STEADY, "--overwrite") == 0
    shown = capsys.readouterr().out
    told = {"student": ["student: continues after step 4"]}
    told |= {"baseline/config.json": ["baseline: continues after step 5"]}
    assert [line for line in shown.splitlines() if "continues" in line] == told.get(at[0], [])
    assert ("student     1/8" in shown) == (at[0] in ("run.json", "results.json"))
    same_end(whole, out)


@pytest.mark.parametrize("what", ["text", later("weights"), later("label")])
def test_changed_data_is_not_continued(files, monkeypatch, capsys, what):
    """Catches a run that ends with other data or from another BERT than it began with, even
    where its flags are said to be the same."""
    out = interrupted(files, monkeypatch, "teacher", 4, 5)
    capsys.readouterr()
    path = files / "SST-2/train.tsv"
    header, line, *others = path.read_text().split("\n")
    index, text, label = line.split("\t")
    if what == "weights":
        change_a_weight(files / "bert")
    else:
        cells = [text + " cat", label] if what == "text" else [text, str(1 - int(label))]
        path.write_text("\n".join([header, "\t".join([index, *cells]), *others]))
    named = "crc of the weights was" if what == "weights" else "crc of train.tsv was"
    refused(capsys, distil(files, "SST-2", *STEADY), named, "--overwrite")
    shutil.copytree(out, files / "old", dirs_exist_ok=True)
    assert distil(files, "SST-2", *STEADY, "--overwrite", out="old") == 0
    assert "continues" not in capsys.readouterr().out
    clean = interrupted(files, monkeypatch, "teacher", 1, 5, out="clean")
    shutil.copy(clean / "run.json", out)
    capsys.readouterr()
    assert distil(files, "SST-2", *STEADY) == distil(files, "SST-2", *STEADY, out="clean") == 0
    assert "continues" not in capsys.readouterr().out
    same_end(clean, out)


@pytest.mark.parametrize("content", ["{", *map(later, ("[1]", "", "\xff"))])
def test_a_damaged_list_of_flags_is_given_up_by_overwrite(files, monkeypatch, capsys, content):
    """Catches the same error for ever."""
    out = interrupted(files, monkeypatch, "teacher", 4, 5)
    (out / "run.json").write_text(content, encoding="latin-1")
    capsys.readouterr()
    refused(capsys, distil(files, "SST-2", *STEADY), out / "run.json")
    assert distil(files, "SST-2", *STEADY, "--overwrite") == 0


@pytest.mark.parametrize("steps", [1, later(3)])
def test_ctrl_c_keeps_the_step_it_comes_in(files, whole, monkeypatch, capsys, steps):
    """Catches a short training that loses all at Ctrl-C, and a step that is half done."""
    update, seen = microbert.update, []

    def watched(*arguments):
        seen.append(1)
        if len(seen) == steps:
            signal.raise_signal(signal.SIGINT)
        return update(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(microbert, "update", watched)
        assert distil(files, "SST-2", *STEADY, "--save-every", "500") == 130
    assert len(seen) == steps and "teacher-" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert distil(files, "SST-2", *STEADY) == 0
    assert f"teacher: continues after step {steps}\n" in capsys.readouterr().out
    same_end(whole, files / "out")
    monkeypatch.setattr(microbert, "teach", lambda *_: signal.raise_signal(signal.SIGINT))
    assert distil(files, "SST-2", *STEADY, out="none") == 130
    assert capsys.readouterr().err.endswith("interrupted; nothing was kept yet\n")


def test_a_second_ctrl_c_is_not_held(monkeypatch):
    """Catches a training that cannot be stopped, and a handler of the user's that is replaced."""
    with pytest.raises(KeyboardInterrupt), microbert.interrupt_held() as asked:
        signal.raise_signal(signal.SIGINT)
        assert asked == [signal.SIGINT]
        signal.raise_signal(signal.SIGINT)
    before = signal.signal(signal.SIGINT, lambda *_: asked.append(0))
    with microbert.interrupt_held() as held:
        signal.raise_signal(signal.SIGINT)
    signal.signal(signal.SIGINT, before)
    assert asked == [signal.SIGINT, 0] and held == []


def test_the_first_step_moves(files):
    """Catches a learning rate of 0 in the only step, so that a training is none."""
    torch.manual_seed(0)
    model = Bert(shape())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    encoded = data.encode(data.load_tokenizer(files / "bert"), ["a cat", "the dog"])
    config = settle(DistillConfig(device="cpu", precision="fp32"))
    objective = microbert.of_labels(torch.tensor([0.0, 1.0]), 2, config)
    microbert.train(model, encoded, objective, config, microbert.Log(None), epochs=1, lr=1e-3)
    moved = [name for name, t in model.state_dict().items() if not torch.equal(t, before[name])]
    assert len(moved) > len(before) / 2


def test_a_pass_without_a_group_is_whole(files, monkeypatch, tmp_path):
    """Catches rows left at -inf where torchrun's words are set but no process has joined."""
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    encoded = data.encode(data.load_tokenizer(files / "bert"), ["a cat"] * 99)
    config = settle(DistillConfig(device="cpu", precision="fp32"))
    made = load_bert(files / "bert"), encoded, torch.zeros(99), [[2], [4]], config
    cache = microbert.teacher_pass(*made, tmp_path / "cache")
    assert cache.logits.isfinite().all() and (cache.features[:].float().std(-1) > 0.5).all()


def test_the_number_of_a_gpu_is_no_flag(files, monkeypatch):
    """Catches processes that cannot continue as each has a GPU of its own, and one of them alone
    that finds other flags than the first one.
    """
    examples = glue.read("SST-2", files, "train")
    found = [microbert.flags_that_matter(DistillConfig(device=name), examples)
             for name in ("cuda:0", "cuda:1", "cuda", "cpu")]  # fmt: skip
    assert found[0] == found[1] == found[2] != found[3]


def test_a_step_asks_the_device_nothing(tmp_path):
    """Catches a number fetched in every step, for which a GPU would have to be waited for."""
    asked = []

    class Watched(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            asked.extend(re.findall("local_scalar|nonzero|unique|masked_select", str(func)))
            return func(*args, **kwargs or {})

    torch.manual_seed(0)
    config = settle(DistillConfig(device="cpu", expert_size=8, gan=True))
    model, texts = Bert(shape(num_hidden_layers=2)), 6
    features = F.layer_norm(torch.randn(texts, 2, 3, 16), (16,)).half()
    labels = torch.tensor([0.0, 1, 0, torch.nan, 1, 0])
    cache = microbert.TeacherCache(features, torch.randn(texts, 2), labels)
    objective = microbert.Distillation(cache, microbert.make_experts(cache, config), config)
    optimizer, rows = microbert.adamw(model, 1e-3, 0.01), torch.arange(texts)
    ids, mask = torch.randint(5, 20, (texts, 7)), torch.ones(texts, 7, dtype=torch.long)
    with Watched():
        output = model(ids, mask, torch.zeros_like(ids))
        terms = objective(output, mask, rows, 0.3)
        microbert.update(model, optimizer, terms, 1e-3, 1.0, torch.zeros(()))
        assert asked == []
        assert torch.ones(()).item() and asked == ["local_scalar"]


def test_a_run_mixes_no_devices(files, monkeypatch):
    """Catches a tensor left on the CPU, and a number fetched in a step: this device has none."""
    device, plain = torch.device("meta"), torch.optim.RMSprop  # which asks for no kernel
    monkeypatch.setattr(microbert, "resolve_device", lambda _: device)
    monkeypatch.setattr(microbert, "refuse_not_finite", lambda *_: None)
    monkeypatch.setattr(microbert.torch.optim, "Adam", lambda p, **_: plain(p))
    monkeypatch.setattr(microbert.torch.optim, "AdamW", lambda p, **_: plain(p))
    monkeypatch.setattr(microbert.Log, "step", lambda *_: None)
    config, teacher = DistillConfig(precision="fp32", expert_size=8), Bert(shape())
    encoded = data.encode(data.load_tokenizer(files / "bert"), ["a b c", "d e", "f"] * 9)
    features, labels = torch.randn(27, 2, 3, 16).half(), torch.tensor([0.0, 1, torch.nan] * 9)
    cache = microbert.TeacherCache(features, torch.randn(27, 2).half(), labels)
    experts = microbert.SentenceExperts(2, 16, 8, 2).to(device)
    microbert.fit_experts(experts, *cache, steps=2)
    student, log = microbert.prune(teacher, (2, 4)), microbert.Log(None)
    for objective in (
        microbert.Distillation(cache, experts, config),
        microbert.Distillation(cache, None, config),
        microbert.of_labels(labels, 2, config),
    ):
        with microbert.only_seen_words(student, encoded) as seen:
            microbert.train(student, seen, objective, config, log, epochs=1, lr=1e-3)
    batches = microbert.run_batches(teacher, encoded, config, 0, 1)
    assert {output.logits.device for _, _, output in batches} == {device}


def test_a_batch_looks_at_its_own_rows(monkeypatch):
    """Catches the lengths of all texts worked out for every batch."""
    encoded = data.Encoded(np.arange(9, dtype=np.int32), np.zeros(9, np.uint8), np.array([0, 2, 9]))
    monkeypatch.setattr(data.np, "diff", lambda *_: pytest.fail("all lengths"))
    assert data.collate(encoded, [0])["input_ids"].tolist() == [[0, 1]]


def test_what_memory_lacks_is_one_line(files, monkeypatch, capsys):
    """Catches a traceback from a full GPU, and one kept quiet that is a fault of ours."""
    for error, told in (
        (torch.cuda.OutOfMemoryError("CUDA out of memory. Tried\n to allocate 2 GiB"), "2 GiB"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "can't allocate"),
        (RuntimeError("MPS backend out of memory (x)"), "MPS"), (MemoryError(), "out of memory"),
    ):  # fmt: skip

        def fail(*_, error=error, **__):
            raise error

        monkeypatch.setattr(Bert, "forward", fail)
        refused(
            capsys, distil(files, "SST-2", "--overwrite"), "out of memory", "--batch-size", told
        )
    error = RuntimeError("shapes")
    monkeypatch.setattr(Bert, "forward", lambda *_, **__: (_ for _ in ()).throw(error))
    with pytest.raises(RuntimeError, match="shapes"):
        distil(files, "SST-2", "--overwrite")


def test_the_cache_is_never_read_whole(tmp_path, monkeypatch):
    """Catches features copied into memory: the file, full of holes, is larger than memory."""
    monkeypatch.setitem(microbert.fit_experts.__kwdefaults__, "steps", 1)
    texts, path = 20_000_000, tmp_path / "cache"
    with path.open("wb") as file:
        file.truncate(2 * texts * 2 * 3 * 1024)  # 246 GB
    features = microbert.StoredFeatures(path, (texts, 2, 3, 1024))
    cache = microbert.TeacherCache(features, torch.zeros(texts, 2), torch.zeros(texts))
    config = settle(DistillConfig(device="cpu", expert_size=8))
    experts = microbert.make_experts(cache, config)
    objective = microbert.Distillation(cache, experts, config)
    hidden = tuple(torch.randn(4, 5, 1024, requires_grad=True) for _ in range(3))
    output = microbert.BertOutput(torch.zeros(4, 2), hidden)
    terms = objective(output, torch.ones(4, 5), torch.tensor([0, 7, texts // 2, texts - 1]), 0.0)
    assert all(term.isfinite() for term in terms.values())


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux's /proc")
def test_the_cache_does_not_stay_in_memory(tmp_path):
    """Catches a peak of memory that grows with the texts; what was written must still be read."""

    def resident():
        return int(Path("/proc/self/statm").read_text().split()[2]) * os.sysconf("SC_PAGE_SIZE")

    features = microbert.StoredFeatures(tmp_path / "cache", (1000, 2, 3, 4096), new=True)  # 49 MB
    before = resident()
    for rows in torch.arange(1000).split(50):
        features[rows] = rows[:, None, None, None].expand(-1, 2, 3, 4096).half()
    for rows in torch.arange(1000).flip(0).split(50):
        assert features[rows][:, 1, 2, 4095].equal(rows.half())
    assert resident() - before < 10e6


def change_a_weight(folder):
    """Another checkpoint by one number."""
    model = load_bert(folder)
    with torch.no_grad():
        model.layers[3].output.bias[0] += 0.5
    save_bert(model, folder)


@pytest.mark.parametrize("what", ["transfer", later("teacher")])
def test_what_is_of_another_teacher_is_not_used(files, monkeypatch, capsys, what):
    """Catches a student, or the teacher's pass, of other texts or other weights of a teacher."""
    out = interrupted(files, monkeypatch, "student", 6, 8)
    given = ["--bert", files / "bert"]
    if what == "teacher":
        change_a_weight(out / "teacher")
        shutil.copytree(out / "teacher", files / "other")
        given = ["--teacher", files / "other"]
    else:
        for path in files.glob("*/train.tsv"):
            if path.parent.name != "SST-2":
                path.unlink()
    capsys.readouterr()
    assert distil(files, "SST-2", *STEADY) == 0
    shown = capsys.readouterr().out
    assert "continues" not in shown and "cache: " in shown and "teacher     1/" not in shown
    command = ("--task", "SST-2", *given, "--out", files / "clean", *QUICK, "--force", *STEADY)
    assert run(files, *command) == 0
    clean = json.loads((files / "clean/results.json").read_text())["teacher"]
    found = json.loads((out / "results.json").read_text())
    (out / "results.json").write_text(json.dumps(found | {"teacher": clean}))  # has updates
    same_end(files / "clean", out)


def test_a_teachers_pass_is_taken_for_itself_alone(tmp_path, capsys):
    """Catches the answers of another teacher, and a pass that is made again for nothing."""
    config, ids = settle(DistillConfig(device="cpu", precision="fp32")), np.arange(16)
    texts = data.Encoded(ids, np.zeros(16, np.uint8), np.arange(0, 20, 4))
    teacher, other = Bert(shape()), Bert(shape())
    other.load_state_dict(teacher.state_dict())
    other.layers[3].query.bias.data[0] += 1
    reversed_texts = data.Encoded(ids[::-1].copy(), *(texts.type_ids, texts.offsets))
    path, beside = tmp_path / "cache", tmp_path / "cache.logits"
    for model, encoded, layers, harmed in (
        (other, texts, (2, 4), None), (teacher, reversed_texts, (2, 4), None),
        (teacher, texts, (1, 4), None), (teacher, texts, (2, 4), path),
        (teacher, texts, (2, 4), beside), (teacher, texts, (2, 4), False),
    ):  # fmt: skip
        microbert.teacher_pass(teacher, texts, torch.zeros(4), [[2], [4]], config, path)
        before = path.stat().st_ino, path.stat().st_mtime_ns
        if harmed:
            harmed.write_bytes(harmed.read_bytes()[:-10])
        capsys.readouterr()
        arguments = (model, encoded, torch.zeros(4), [[n] for n in layers], config)
        found, shown = microbert.teacher_pass(*arguments, path), capsys.readouterr()
        assert ("cache: " not in shown.out) == (harmed is False)
        assert harmed is not False or (path.stat().st_ino, path.stat().st_mtime_ns) == before
        assert ("note: not used" in shown.err) == (harmed == beside)
        clean = microbert.teacher_pass(*arguments, tmp_path / "clean")
        assert torch.equal(found.features[:], clean.features[:])
        assert torch.equal(found.logits, clean.logits)


@slow
def test_killed_at_random_moments(files):
    """SIGKILLs: catches whatever is not there, not whole or not the same at some moment.

    30 of them, in four trainings one after the other. A process that has imported torch forks the
    runs, so that each of them starts at once.
    """
    script = textwrap.dedent("""
        import json, os, random, signal, sys, time
        import data, glue, microbert
        microbert.torch.set_num_threads(1)
        microbert.fit_experts.__kwdefaults__["steps"] = 30

        def start(out):
            child = os.fork()
            if not child:
                sys.stdout = sys.stderr = open(os.devnull, "w")
                os._exit(microbert.main([*sys.argv[1:], "--out", out]))
            return child

        rng, kills, ends = random.Random(0), 0, 0
        with open(os.devnull, "w") as sys.stdout:
            for out in ("free", "again"):  # what the first run imports, all others find
                began = time.perf_counter()
                assert microbert.main([*sys.argv[1:], "--out", out]) == 0
                span = time.perf_counter() - began
        sys.stdout = sys.__stdout__
        while kills < 30:
            child = start(f"killed{ends}")
            time.sleep(rng.uniform(0.02, 1.0) * span)
            os.kill(child, signal.SIGKILL)
            kills += os.WIFSIGNALED(os.waitpid(child, 0)[1])
            if os.path.exists(f"killed{ends}/results.json"):  # perhaps killed with the states there
                assert os.waitpid(start(f"killed{ends}"), 0)[1] == 2 << 8  # refused
                ends += 1
        assert os.waitpid(start(f"killed{ends}"), 0)[1] == 0
        print(json.dumps([kills, ends + 1]))
    """)
    arguments = ["--task", "SST-2", "--bert", files / "bert", "--force", *QUICK, *STEADY,
                 "--data-dir", files, "--save-every", "1"]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false",
                                "PYTHONPATH": os.path.dirname(microbert.__file__)}  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)],
        cwd=files, env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    kills, ends = json.loads(done.stdout)
    assert kills == 30 and ends >= 1
    same_end(files / "free", files / "again")
    for number in range(ends):
        same_end(files / "free", files / f"killed{number}")


# --- faults --------------------------------------------------------------------------------------


def test_a_full_disk(files, whole, monkeypatch, capsys):
    """Catches a traceback, an unnamed file, a half-written one, and the state before lost."""
    sync, count = os.fsync, []

    def full(file):
        count.append(file)
        if len(count) == 5:  # the third state's; the first files are the log and run.json
            raise OSError(errno.ENOSPC, "No space left on device")
        sync(file)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        refused(capsys, distil(files, "SST-2", *STEADY), "No space left", "teacher-")
    assert not list((files / "out").rglob("*.part"))
    assert distil(files, "SST-2", *STEADY) == 0
    assert "teacher: continues after step 4" in capsys.readouterr().out
    same_end(whole, files / "out")


def test_no_room_for_the_cache(files, whole, monkeypatch, capsys):
    """Catches the death of a process that fills a mapped file on a full disk (SIGBUS)."""
    teacher_pass, limits = microbert.teacher_pass, resource.getrlimit(resource.RLIMIT_FSIZE)

    def limited(*arguments, **named):
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
        return teacher_pass(*arguments, **named)

    with monkeypatch.context() as patch:
        patch.setattr(microbert, "teacher_pass", limited)
        try:
            code = distil(files, "SST-2", *STEADY)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    refused(capsys, code, "too large", "cache")
    assert distil(files, "SST-2", *STEADY) == 0
    same_end(whole, files / "out")


@pytest.mark.parametrize("below", ["file", "kernel"])
def test_a_folder_that_cannot_be_written(files, capsys, below):
    """Catches hours of training before it shows."""
    (files / "occupied").write_text("")
    out = files / "occupied/out" if below == "file" else "/proc/nobody"
    refused(capsys, distil(files, "SST-2", out=out), out)


def test_a_file_that_vanishes(files, whole, monkeypatch, capsys):
    """Catches work lost because a split is gone when the scores are taken."""
    dev, text = files / "SST-2/dev.tsv", (files / "SST-2/dev.tsv").read_text()
    with monkeypatch.context() as patch:
        stop(patch, "student", 3, 8, also=dev.unlink)
        refused(capsys, distil(files, "SST-2", *STEADY), dev, "no such file")
    dev.write_text(text)
    assert distil(files, "SST-2", *STEADY) == 0
    assert "student     1/" not in capsys.readouterr().out
    same_end(whole, files / "out")


def test_steps_that_are_not_finite_move_nothing():
    """Catches a GPU, which is asked only now and then, that trains on after an infinite loss."""
    torch.manual_seed(0)
    model, broken, ends = Bert(shape()), torch.zeros(()), []
    optimizer = microbert.adamw(model, 1e-3, 0.01)
    for scale in (1.0, torch.inf, 1.0, 1.0):
        terms = {"hard": scale * model(torch.tensor([[1, 2]])).logits.square().sum()}
        norm = microbert.update(model, optimizer, terms, 1e-3, 1.0, broken)
        ends.append([parameter.clone() for parameter in model.parameters()])
    assert all(torch.equal(*pair) for end in ends[1:] for pair in zip(ends[0], end))
    with pytest.raises(
        ValueError, match=r"step 4 \(and 2 before it\): loss or gradient not finite"
    ):
        microbert.refuse_not_finite(broken, terms, norm, "step 4")


@pytest.mark.parametrize("kind", [later("loss"), "gradient"])
def test_not_a_number(files, monkeypatch, capsys, kind):
    """Catches weights moved by NaN, and one noticed only where the log is printed."""
    call, calls = microbert.Distillation.__call__, []

    def failing(*arguments):
        terms = call(*arguments)
        calls.append(1)
        if len(calls) == 6 and kind == "loss":
            terms["soft"] = terms["soft"] + torch.inf
        elif len(calls) == 6:
            terms["soft"].register_hook(lambda gradient: gradient * torch.inf)
        return terms

    monkeypatch.setattr(microbert.Distillation, "__call__", failing)
    code = distil(files, "SST-2", "--save-every", "2", "--log-every", "100")
    term = "soft inf" if kind == "loss" else "gradient's norm nan"
    refused(capsys, code, "student step 6", term, "hard 0.", "--overwrite and a lower --lr")
    shutil.copytree(files / "out", files / "copy")
    assert distil(files, "SST-2", "--lr", "1e-5", "--overwrite", out="copy") == 0  # as told
    (path,) = (files / "out").glob("student-*.state")
    state = torch.load(path, weights_only=True)
    assert state["step"] == 4 and all(t.isfinite().all() for t in state["model"].values())
    assert load_bert(files / "out/teacher")


@pytest.mark.parametrize("kind", [later("none"), "sure", later("perfect"), later("constant")])
def test_a_discriminator_that_wins_or_collapses(tmp_path, kind):
    """Catches an adversarial loss that drowns the others when nothing can be won any more.

    sure: rejects whatever the student does; perfect: trained to the end on every batch before the
    student may answer; constant: collapsed, so there is nothing to learn from it.
    """
    torch.manual_seed(0)
    settings = settle(
        DistillConfig(device="cpu", precision="fp32", batch_size=8, gan=kind != "none")
    )
    ids = np.random.default_rng(0).integers(5, 24, 64 * 8).astype(np.int32)
    encoded = data.Encoded(ids, np.zeros_like(ids, np.uint8), np.arange(0, 65 * 8, 8))
    teacher = Bert(
        shape(num_hidden_layers=2, initializer_range=0.2, hidden_dropout_prob=0.0,
              attention_probs_dropout_prob=0.0)
    )  # fmt: skip
    labels = torch.full((64,), torch.nan)
    cache = microbert.teacher_pass(teacher, encoded, labels, [[1, 2]], settings, tmp_path / "f16")
    objective = microbert.Distillation(cache, microbert.make_experts(cache, settings), settings)
    student, losses, told_apart = microbert.prune(teacher, [2]), [], []
    contest, judge = objective.contest, getattr(objective, "discriminator", None)

    def unfair(real, fake, progress):
        for _ in range(10 * (kind == "perfect")):
            loss = microbert.discriminator_loss(judge, real, fake)
            objective.optimizer.zero_grad()
            loss.backward()
            objective.optimizer.step()
        told_apart.append((judge(real).mean() - judge(fake).mean()).item())
        return contest(real, fake, progress)

    objective.contest = unfair
    if kind != "none":
        objective.optimizer.param_groups[0]["lr"] = 1e-2 if kind == "perfect" else 0.0
    if kind in ("sure", "constant"):
        with torch.no_grad():
            judge.layers[-1].bias.fill_(-1e3 if kind == "sure" else 0.0)
    if kind == "constant":
        judge.forward = lambda outputs: 0 * microbert.Discriminator.forward(judge, outputs)
    log = microbert.Log(None)
    log.step = lambda _, __, terms, *___: losses.append((terms["align"] + terms["soft"]).item())
    microbert.train(student, encoded, objective, settings, log, epochs=15, lr=3e-3)
    assert np.isfinite(losses).all() and np.mean(losses[-8:]) < 0.5 * np.mean(losses[:8])
    assert kind != "perfect" or min(told_apart[:8]) > 0


# --- hostile input -------------------------------------------------------------------------------


def in_a_pickle(folder, **tensors):
    """Turns model.safetensors into pytorch_model.bin, with these tensors instead of its own."""
    stored = microbert.read_safetensors(folder / "model.safetensors")
    torch.save(stored | tensors, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


@pytest.mark.parametrize("kind", ["sparse", "meta", "number", "transposed"])
def test_tensors_of_another_kind(tmp_path, kind):
    """Catches a traceback from the middle of torch, and numbers read in the order they lie in."""
    model = Bert(shape())
    save_bert(model, tmp_path)
    plain = model.pooler.weight.detach()
    made = {"sparse": plain.to_sparse(), "meta": plain.to("meta"), "number": 1.0,
            "transposed": plain.t().contiguous().t()}  # fmt: skip
    in_a_pickle(tmp_path, **{"bert.pooler.dense.weight": made[kind]})
    if kind == "transposed":
        assert torch.equal(load_bert(tmp_path).pooler.weight, plain)
    else:
        with pytest.raises(ValueError, match="pytorch_model.bin.*pooler"):
            load_bert(tmp_path)


def test_a_header_of_many_dimensions(tmp_path):
    """Catches minutes spent on multiplying a hostile shape."""
    header = {"a": {"dtype": "F32", "shape": [2**40] * 300_000, "data_offsets": [0, 0]}}
    text = json.dumps(header).encode()
    (tmp_path / "a").write_bytes(len(text).to_bytes(8, "little") + text)
    with pytest.raises(ValueError, match="tensor 'a' is given as"):
        microbert.read_safetensors(tmp_path / "a")


def test_pairs_need_two_segments(files, capsys):
    """Catches an IndexError from the embeddings; single texts are such a BERT's own."""
    save_bert(Bert(shape(type_vocab_size=1)), files / "student", files / "bert")
    assert answer(capsys, files / "student", "cat")[0] == 0
    code, _, err = answer(capsys, files / "student", "cat", "dog")
    assert code == 2 and "type_vocab_size" in err
    assert main(["--task", "RTE", "--data-dir", str(files), "--bert", str(files / "student"),
                 "--out", str(files / "out")]) == 2  # fmt: skip
    assert "type_vocab_size" in capsys.readouterr().err


def test_damaged_weights_do_not_answer(student, files, capsys):
    """Catches `nan` with exit code 0."""
    model = load_bert(student)
    with torch.no_grad():
        model.classifier.bias[1] = torch.nan
    save_bert(model, student, files / "bert")
    code, out, err = answer(capsys, student, "cat")
    assert code == 2 and not out and "not finite" in err


def test_tokenizer_files_do_not_mix(student, files, capsys):
    """Catches words of one BERT under the weights of another, and a model without its words."""
    words = (files / "bert/vocab.txt").read_text()
    (files / "bert/vocab.txt").write_text(words.replace("cat\n", "cow\n"))
    (student / "added_tokens.json").write_text('{"<old>": 999}')
    save_bert(load_bert(student), student, files / "bert")
    assert data.load_tokenizer(student).encode("cow cat").tokens[1] == "cow"
    assert not (student / "added_tokens.json").exists() and (student / "vocab.txt").exists()
    before = (student / "config.json").read_bytes()
    with pytest.raises(FileNotFoundError, match="neither tokenizer.json nor vocab.txt"):
        save_bert(Bert(shape(num_hidden_layers=1)), student, files / "glue")
    assert (student / "config.json").read_bytes() == before


@pytest.mark.parametrize("kind", ["post-processor", "added", "no special", "segments"])
def test_a_tokenizer_that_promises_more_than_the_embeddings_hold(files, capsys, kind):
    """Catches an index error in the middle of a run."""
    from tokenizers import Tokenizer, processors

    tokenizer = data.load_tokenizer(files / "bert")
    if kind == "added":
        tokenizer.add_tokens(["one more"])
    elif kind == "no special":
        stored = json.loads(tokenizer.to_str())
        stored["post_processor"] = None
        tokenizer = Tokenizer.from_str(json.dumps(stored))
    else:
        segment = 7 if kind == "segments" else 1
        tokenizer.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", pair=f"[CLS] $A [SEP] $B:{segment} [SEP]:{segment}",
            special_tokens=[("[CLS]", 2), ("[SEP]", 500 if kind == "post-processor" else 3)],
        )  # fmt: skip
    tokenizer.save(str(files / "bert/tokenizer.json"))
    refused(capsys, distil(files, "RTE"), files / "bert", "tokenizer")
    assert not (files / "out").exists()


ODD_TEXTS = [
    "", " ", "a" * 1_000_000, "cat " * 250_000, "\u0301" * 300, "\x00", "\x1b[31m\x07", "a\x85b",
    "\u202e\u05d0\u05d1", "\ufeff", "\U0010ffff", "\U0001f469\u200d\U0001f680", "\r", "\u2028",
]  # fmt: skip


@pytest.fixture
def student(files):
    """A checkpoint that can answer."""
    save_bert(Bert(shape(labels=("no", "yes"))), files / "student", files / "bert")
    return files / "student"


def answer(capsys, *arguments):
    """Exit code and both streams of a prediction."""
    capsys.readouterr()
    code = main(["predict", *map(str, arguments), "--device", "cpu", "--max-length", "32"])
    shown = capsys.readouterr()
    return code, shown.out, shown.err


@pytest.mark.parametrize("number", [0, 1, later(2), later(3), *range(4, len(ODD_TEXTS))])
def test_odd_texts_are_answered(student, capsys, number):
    """Catches a crash, a NaN, and an answer of more than a line."""
    for texts in ([ODD_TEXTS[number]], [ODD_TEXTS[number], "cat"], ["cat", ODD_TEXTS[number]]):
        code, out, _ = answer(capsys, student, *texts)
        label, share = out.rstrip("\n").split("\t")
        assert code == 0 and label in ("no", "yes") and 0.5 <= float(share) <= 1


def test_a_text_that_the_tokenizer_fails_on(student, capsys):
    """Catches the library's TypeError for a lone surrogate or what is no text, and its bare
    Exception where a word has no token."""
    from tokenizers import Tokenizer, models

    assert answer(capsys, student, "a\udcffb")[2].startswith("error: texts 1 on: the tokenizer")
    tokenizer, other = data.load_tokenizer(student), Tokenizer(models.Unigram([("cat", -1.0)]))
    texts = [(tokenizer, wrong) for wrong in (None, 3, ("a", None), ["a", "b", "c"] * 9, b"a")]
    for tokenizer, wrong in (*texts, (other, "dog")):
        with pytest.raises(ValueError, match="texts 1 on: the tokenizer fails"):
            data.encode(tokenizer, ["cat", wrong])


def test_a_bad_line_is_named_and_the_others_answered(student, files, capsys):
    """Catches answers that move up a line, and a file given up for one of its lines."""
    path = files / "lines"
    path.write_bytes(b"\xef\xbb\xbfa cat\r\n\xff\xfe\nbig\tdog\n\na\tb\tc\n\xed\xa0\x80\nred")
    code, out, err = answer(capsys, student, "--file", path)
    lines = out.split("\n")
    assert code == 2 and len(lines) == 8 and lines[-1] == ""
    assert [bool(line) for line in lines[:7]] == [True, False, True, True, False, False, True]
    told = err.strip().split("\n")
    assert [line.split(": ")[0] for line in told[:3]] == [f"{path}:{n}" for n in (2, 5, 6)]
    assert told[3] == f"error: 3 lines without an answer, the first at {path}:2"
    for i, texts in ((0, ["a cat"]), (2, ["big", "dog"]), (3, [""]), (6, ["red"])):
        assert answer(capsys, student, *texts)[1] == lines[i] + "\n"
    code, out, _ = answer(capsys, student, "--file", path, "--json")
    rows = [json.loads(line) for line in out.splitlines()]
    assert code == 2 and "byte 0xff" in rows[1]["error"]
    assert set(rows[0]["probabilities"]) == {"no", "yes"}
    assert sum(rows[0]["probabilities"].values()) == pytest.approx(1)
    assert lines[0].startswith(f"{rows[0]['label']}\t{max(rows[0]['probabilities'].values()):.4f}")
    code, out, _ = answer(capsys, student, "--file", path, "--out", files / "answers")
    assert code == 2 and (files / "answers").read_text() == "\n".join(lines) and not out
    code, _, err = answer(capsys, student, "cat", "--out", files / "answers")
    assert code == 2 and "answers is there already" in err


def test_a_terminal_that_lacks_a_letter(student, files, monkeypatch):
    """Catches an answer lost for its label's spelling."""
    save_bert(Bert(shape(labels=("n\u00f6", "d\u00f6"))), student, files / "bert")
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    assert main(["predict", str(student), "cat", "--max-length", "32"]) == 0
    assert b"\\xf6\t0." in raw.getvalue()


def test_standard_input_and_a_closed_pipe(student):
    """Catches answers that wait for the whole input, and a traceback where `head` has enough."""
    command = [sys.executable, microbert.__file__, "predict", str(student), "--max-length", "32"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, **pipes) as process:
        process.stdin.write(b"cat\n" * 3000)
        process.stdin.flush()
        first = process.stdout.readline()
        process.stdout.close()
        with contextlib.suppress(BrokenPipeError):  # it may be gone already
            process.stdin.write(b"cat\n" * 3000)
            process.stdin.close()
        error = process.stderr.read()
    assert first.split(b"\t")[0] in (b"no", b"yes")
    assert process.returncode == 0 and error == b"", error


def test_what_predict_cannot_take(student, files, capsys):
    """Catches a traceback for three texts, a missing file, both ways at once, an untrained head."""
    for arguments, needle in (
        (["a", "b", "c"], "3 texts"),
        (["a", "--task", "SST-2"], "exclude each other"),
        (["a", "--file", files / "bert/vocab.txt"], "exclude each other"),
        (["a", "--split", "test"], "--split needs --task"),
        (["--file", files / "nowhere"], "nowhere"),
    ):
        code, _, err = answer(capsys, student, *arguments)
        assert code == 2 and needle in err and err.count("\n") == 1


@pytest.mark.parametrize("texts", [later(1), 2])
def test_what_a_student_learnt_from_is_what_it_is_asked(files, capsys, texts):
    """Catches a pair read by a student of single texts, or one text by a student of pairs."""
    task = own_data(files / "mine", ["no", "yes"], texts)
    assert distil(files, task) == 0
    out, path = files / "out", files / "lines"
    assert json.loads((out / "student/config.json").read_text())["sentence_pairs"] == (texts == 2)
    path.write_text("a cat\na cat\tbig dog\n")
    capsys.readouterr()
    code, shown, err = answer(capsys, out, "--file", path)
    odd = 2 if texts == 1 else 1
    form = ("two texts, for a model that was trained on single ones" if texts == 1
            else "one text, for a model that was trained on pairs")  # fmt: skip
    assert code == 2 and [bool(line) for line in shown.split("\n")[:2]] == [odd == 2, odd == 1]
    assert err.startswith(f"{path}:{odd}: {form}\n")
    code, _, err = answer(capsys, out, *["a", "b"][: 3 - texts])
    assert code == 2 and err == f"error: {form}\n"
    code, _, err = answer(capsys, out, "--file", task / "dev.tsv")
    assert code == 2 and "dev.tsv:1: " in err
    other = own_data(files / "other", ["no", "yes"], 3 - texts)
    refused(capsys, run(files, "evaluate", out, "--task", other), "has not learnt from")
    teacher = ("--task", other, "--teacher", out, "--out", files / "out2")
    refused(capsys, run(files, *teacher, *QUICK), "has not learnt from", "teacher")
    config = json.loads((out / "student/config.json").read_text())
    del config["sentence_pairs"]  # as of a checkpoint from elsewhere
    (out / "student/config.json").write_text(json.dumps(config))
    assert answer(capsys, out, "--file", path)[0] == 0


@pytest.mark.parametrize("raw, told", [
    ("a cat\n".encode("utf-16"), "UTF-16, not UTF-8"), (POINTER, "Git LFS pointer"),
    (b"a cat\rthe dog\r", "lines that end in CR alone"),
    (b"sentence1\tsentence2\nx\ty\n", "a header; --task FOLDER --split dev"),
])  # fmt: skip
def test_files_of_no_texts_are_named(student, files, capsys, raw, told):
    """Catches answers to what are no texts, or an error for every line of them."""
    (files / "lines").write_bytes(raw)
    code, out, err = answer(capsys, student, "--file", files / "lines")
    assert code == 2 and not out and err.count("\n") == 1
    assert err.startswith(f"error: {files / 'lines'}:1: ") and told in err
    more = ("--transfer", files / "lines", "--transfer-ratio", "1")
    refused(capsys, distil(files, "SST-2", *more), "lines:1: ", told)


def test_scores_of_texts(files, capsys):
    """Catches a probability where the model gives a score."""
    model = Bert(shape(labels=("score",)))
    save_bert(model, files / "scorer", files / "bert")
    code, out, _ = answer(capsys, files / "scorer", "cat", "dog")
    as_json = json.loads(answer(capsys, files / "scorer", "cat", "dog", "--json")[1])
    assert code == 0 and float(out) == pytest.approx(as_json["score"], abs=1e-4)


# --- fuzz ----------------------------------------------------------------------------------------


def damage(raw, rng):
    """The bytes with a few of them changed, left out, repeated, or replaced by telling ones."""
    telling = [b"\t", b"\n", b"\r", b"\0", b"\xff", b'"', b"-1", b"[", b"{", b"1e999", b"9" * 30,
               b"null", "\u2028".encode()]  # fmt: skip
    for _ in range(rng.randint(1, 4)):
        i, j = sorted(rng.randrange(len(raw) + 1) for _ in range(2))
        head, middle, tail = raw[:i], raw[i:j], raw[j:]
        flipped = bytes([raw[i] ^ 1 << rng.randrange(8)]) if i < len(raw) else b""
        left_out = raw[i + rng.choice([1, 8, j - i]) :]
        raw = head + rng.choice([flipped + raw[i + 1 :], left_out, middle[:64] + middle + tail,
                                 rng.choice(telling) + middle + tail, middle])  # fmt: skip
    return raw


@pytest.mark.parametrize("kind", ["safetensors", "config", "pickle", "vocab", "tokenizer", "tsv",
                                  "scores", "state", "flags"])  # fmt: skip
def test_fuzzed_files(files, monkeypatch, kind):
    """Catches whatever a damaged file makes a reader raise but a ValueError that names the file."""
    bert = files / "bert"
    data.load_tokenizer(bert).save(str(files / "tokenizer.json"))
    if kind == "pickle":
        in_a_pickle(bert)
    if kind == "tokenizer":
        (files / "tokenizer.json").rename(bert / "tokenizer.json")
    if kind in ("state", "flags"):
        interrupted(files, monkeypatch, "student", 6, 8)
        (state,) = (files / "out").glob("student-*.state")

    out = files / "out"
    path, read, rounds = {
        "safetensors": (bert / "model.safetensors", lambda: load_bert(bert), 150),
        "pickle": (bert / "pytorch_model.bin", lambda: load_bert(bert), 60),
        "config": (bert / "config.json", lambda: load_bert(bert), 300),
        "vocab": (bert / "vocab.txt", lambda: data.load_tokenizer(bert).encode("a cat"), 200),
        "tokenizer": (bert / "tokenizer.json", lambda: data.load_tokenizer(bert).encode("a"), 200),
        "tsv": (files / "RTE/dev.tsv", lambda: glue.read("RTE", files, "dev"), 300),
        "scores": (files / "STS-B/dev.tsv", lambda: glue.read("STS-B", files, "dev"), 300),
        "state": (kind == "state" and state, lambda: microbert.load_state(state), 60),
        "flags": (out / "run.json", lambda: microbert.same_flags(out, {}, False), 60),
    }[kind]
    raw, rng, refusals = path.read_bytes(), random.Random(7), 0
    rounds = rounds if SLOW else rounds // 4
    for _ in range(rounds):
        path.write_bytes(damage(raw, rng))
        try:
            read()
        except (ValueError, FileNotFoundError) as error:
            refusals += 1
            assert str(files) in str(error), error
    assert kind == "vocab" or (refusals == 0 if kind == "state" else refusals > rounds // 10)


# --- same in, same out ---------------------------------------------------------------------------


@slow
def test_nothing_around_a_run_changes_it(files, whole):
    """Catches a folder, locale, hash seed or terminal that weights and scores depend on."""
    arguments = ["--task", "SST-2", "--bert", "bert", "--out", "else/where", *QUICK, "--force",
                 *STEADY, "--data-dir", "."]  # fmt: skip
    script = (
        f"import torch; torch.set_num_threads({torch.get_num_threads()}); import microbert, sys"
    )
    script += f"; microbert.fit_experts.__kwdefaults__['steps'] = {FIT_STEPS}"
    script += "; sys.exit(microbert.main())"
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("LC_", "LANG"))}
    environment |= {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONHASHSEED": "123", "COLUMNS": "30",
                    "PYTHONPATH": os.path.dirname(microbert.__file__), "TZ": "UTC"}  # fmt: skip
    command = [sys.executable, "-W", "error", "-c", script, *arguments]
    done = subprocess.run(command, cwd=files, env=environment, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    same_end(whole, files / "else/where")


@pytest.mark.parametrize("room", [16, 100, 4096])
def test_batches_do_not_change_answers(files, monkeypatch, room):
    """Catches an answer that depends on its neighbours or on padding by more than rounding."""
    torch.manual_seed(0)
    model = Bert(shape(initializer_range=0.3)).eval()
    texts = glue.read("RTE", files, "train").texts
    encoded = data.encode(data.load_tokenizer(files / "bert", 32), texts)
    config = settle(DistillConfig(device="cpu", precision="fp32"))
    alone = [data.collate(encoded, np.array([i])) for i in range(len(encoded))]
    with torch.no_grad():
        expected = torch.cat([model(**batch).logits for batch in alone])
    monkeypatch.setattr(data.sorted_batches, "__defaults__", (room,))
    batches = data.sorted_batches
    monkeypatch.setattr(data, "sorted_batches", lambda lengths, _: batches(lengths, room))
    found = microbert.predict_logits(model, encoded, config)
    assert (found - expected).abs().max() <= 1e-5
