"""Killed, starved and fed rubbish: what a run leaves, and what the same command makes of it."""

import contextlib
import errno
import json
import os
import random
import resource
import subprocess
import sys
import textwrap
import zipfile

import numpy as np
import pytest
import torch
from conftest import slow
from test_run import QUICK, distil, few_steps, files, refused, run, shape  # noqa: F401

import data
import glue
import microbert
from microbert import Bert, BertConfig, DistillConfig, load_bert, main, save_bert, settle

SLOW = "SLOW" in os.environ
STEADY = ("--save-every", "2", "--log-every", "1")


def stop_at(monkeypatch, phase, step, error=KeyboardInterrupt, also=lambda: None):
    """Makes the log of this step raise, after the step before it was saved."""
    log_step = microbert.Log.step

    def stopping(self, now, *rest):
        if (self.phase, now) == (phase, step):
            also()
            if error:
                raise error
        log_step(self, now, *rest)

    monkeypatch.setattr(microbert.Log, "step", stopping)


def same_end(one, other):
    """Both runs left the same weights and scores, and nothing to continue from."""
    for part in ("teacher", "student"):
        weights = [(out / part / "model.safetensors").read_bytes() for out in (one, other)]
        assert weights[0] == weights[1], part
    found = [json.loads((out / "results.json").read_text()) for out in (one, other)]
    for part in ("teacher", "pruned", "student", "retention"):
        assert found[0][part] == found[1][part]
    for out in (one, other):
        left = sorted(p.name for p in out.iterdir())
        assert left == ["log.jsonl", "results.json", "student", "teacher"]
        assert not list(out.rglob("*.part"))


@pytest.fixture
def whole(files):  # noqa: F811
    """A run that nothing disturbed."""
    assert distil(files, "SST-2", *STEADY, out="whole") == 0
    return files / "whole"


# --- continuing ----------------------------------------------------------------------------------


@pytest.mark.parametrize("phase, step", [("teacher", 4), ("student", 1), ("student", 6)])
def test_interrupted_and_continued(files, whole, monkeypatch, capsys, phase, step):  # noqa: F811
    """Catches a part that is not restored, a phase begun again, and an interruption without a word.

    Step 4 of the teacher stops after the checkpoint of step 2, step 1 of the student after the
    teacher's last one: the teacher has 5 steps, the student 8.
    """
    with monkeypatch.context() as patch:
        stop_at(patch, phase, step)
        assert distil(files, "SST-2", *STEADY) == 130
    error = capsys.readouterr().err
    assert error.startswith("interrupted; the same command continues from ")
    assert "resume.ckpt" in error and error.count("\n") == 1
    header = (files / "out/resume.ckpt").read_bytes().partition(b" ")[2].partition(b"\n")[0]
    before = json.loads(header)["seconds"]
    assert distil(files, "SST-2", *STEADY) == 0
    expected = {4: "teacher: continues after step 2", 1: "teacher: continues after step 5"}
    shown = capsys.readouterr().out
    assert expected.get(step, "student: continues after step 4") in shown
    assert "teacher     1/5" not in shown  # it is not trained twice
    same_end(whole, files / "out")
    seconds = json.loads((files / "out/results.json").read_text())["seconds"]
    assert before["teacher"] > 0 and all(seconds[phase] >= before[phase] for phase in before)
    logged = [json.loads(line) for line in (files / "out/log.jsonl").read_text().splitlines()]
    assert {e["step"] for e in logged if e["phase"] == "student" and "step" in e} == {*range(1, 9)}


def test_the_comparison_continues_too(files, monkeypatch, capsys):  # noqa: F811
    """Catches a student trained again or lost where only the comparison was interrupted."""
    assert distil(files, "STS-B", *STEADY, "--baseline", out="whole") == 0
    with monkeypatch.context() as patch:
        stop_at(patch, "baseline", 4)
        assert distil(files, "STS-B", *STEADY, "--baseline") == 130
    assert (files / "out/student/model.safetensors").exists()
    capsys.readouterr()
    assert distil(files, "STS-B", *STEADY, "--baseline") == 0
    shown = capsys.readouterr().out
    assert "baseline: continues after step 2" in shown
    assert "student     1/" not in shown and "teacher     1/" not in shown
    same_end(files / "whole", files / "out")
    found = [json.loads((files / o / "results.json").read_text()) for o in ("whole", "out")]
    assert found[0]["baseline"] == found[1]["baseline"] and "score" in found[0]["baseline"]
    with monkeypatch.context() as patch:
        stop_at(patch, "baseline", 4)
        assert distil(files, "STS-B", *STEADY, "--baseline", out="third") == 130
    assert distil(files, "STS-B", *STEADY, "--no-baseline", out="third") == 0  # enough of it
    same_end(files / "whole", files / "third")
    assert "baseline" not in json.loads((files / "third/results.json").read_text())


def test_the_last_passes_continue(files, monkeypatch, capsys):  # noqa: F811
    """Catches passes over the labels that are begun again, or follow other text, once continued."""
    made = (*STEADY, "--label-epochs", "1")
    assert distil(files, "SST-2", *made, out="whole") == 0
    with monkeypatch.context() as patch:
        stop_at(patch, "student", 11)  # 8 steps on all texts, 5 on labels
        assert distil(files, "SST-2", *made) == 130
    assert distil(files, "SST-2", *made) == 0
    assert "student: continues after step 10" in capsys.readouterr().out
    same_end(files / "whole", files / "out")


def test_fine_tuning_continues(files, monkeypatch, capsys):  # noqa: F811
    """Catches a resume that only `distill` has."""
    command = ("finetune", "--task", "STS-B", "--bert", files / "bert", "--batch-size", "8",
               "--epochs", "1", *STEADY)  # fmt: skip
    assert run(files, *command, "--out", files / "whole") == 0
    with monkeypatch.context() as patch:
        stop_at(patch, "teacher", 4)
        assert run(files, *command, "--out", files / "out") == 130
    assert run(files, *command, "--out", files / "out") == 0
    ends = [(files / out / "teacher/model.safetensors").read_bytes() for out in ("whole", "out")]
    assert ends[0] == ends[1] and not (files / "out/resume.ckpt").exists()


def interrupted(files, monkeypatch, step=6, *more):  # noqa: F811
    """A run that stopped in the student's phase, with two checkpoints."""
    with monkeypatch.context() as patch:
        stop_at(patch, "student", step)
        assert distil(files, "SST-2", *STEADY, *more) == 130
    return files / "out"


@pytest.mark.parametrize("harm", ["cut", "flipped", "empty", "gone"])
def test_a_torn_checkpoint_is_noticed(files, whole, monkeypatch, capsys, harm):  # noqa: F811
    """Catches rubbish taken for a state, and a run that cannot go on without its last file."""
    path = interrupted(files, monkeypatch) / "resume.ckpt"
    raw = path.read_bytes()
    flipped = bytearray(raw)
    flipped[len(raw) // 2] ^= 1
    harmed = {"cut": raw[: len(raw) // 2], "flipped": bytes(flipped), "empty": b"", "gone": None}
    path.unlink() if harmed[harm] is None else path.write_bytes(harmed[harm])
    capsys.readouterr()
    assert distil(files, "SST-2", *STEADY) == 0
    shown = capsys.readouterr()
    assert ("resume.ckpt is torn" in shown.err) == (harm != "gone")
    assert "student: continues after step 2" in shown.out
    same_end(whole, files / "out")


def test_without_a_whole_checkpoint_it_starts_again(files, whole, monkeypatch, capsys):  # noqa: F811
    """Catches a run that never gets past two torn files."""
    out = interrupted(files, monkeypatch)
    (out / "resume.ckpt").write_bytes(b"rubbish")
    (out / "resume.ckpt.old").write_bytes(b"%08x " % microbert.zlib.crc32(b"[1]\n") + b"[1]\n")
    assert distil(files, "SST-2", *STEADY) == 0
    assert "continues" not in capsys.readouterr().out
    same_end(whole, out)


@pytest.mark.parametrize(
    "more, named",
    [(("--lr", "1e-4"), "lr was 0.0003, is 0.0001"), (("--seed", "1"), "seed was 0, is 1"),
     (("--no-gan", "--expert-size", "8"), "gan was True, is False, expert_size was 128, is 8")],
)  # fmt: skip
def test_other_flags_are_refused(files, whole, monkeypatch, capsys, more, named):  # noqa: F811
    """Catches half a run with one setting and half with another."""
    out = interrupted(files, monkeypatch)
    before = (out / "resume.ckpt").read_bytes()
    capsys.readouterr()
    refused(capsys, distil(files, "SST-2", *STEADY, *more), named, out, "--overwrite")
    assert (out / "resume.ckpt").read_bytes() == before
    assert distil(files, "SST-2", *STEADY, *more, "--overwrite") == 0
    assert "continues" not in capsys.readouterr().out
    assert not (out / "resume.ckpt").exists()


def test_overwriting_is_continued_too(files, whole, monkeypatch, capsys):  # noqa: F811
    """Catches a command with --overwrite that starts from zero each time it is killed."""
    assert distil(files, "SST-2", *STEADY, "--seed", "5") == 0
    interrupted(files, monkeypatch, 6, "--overwrite")
    assert not (files / "out/results.json").exists()
    assert distil(files, "SST-2", *STEADY, "--overwrite") == 0
    assert "student: continues after step 4" in capsys.readouterr().out
    same_end(whole, files / "out")


def test_another_number_of_processes_is_refused(files, monkeypatch, capsys):  # noqa: F811
    """Catches batches that are split otherwise from some step on."""
    interrupted(files, monkeypatch)
    capsys.readouterr()
    monkeypatch.setattr(microbert, "process", lambda: (0, 2))
    refused(capsys, distil(files, "SST-2", *STEADY), "processes was 1, is 2")


def test_a_finished_run_is_not_continued(files, monkeypatch, capsys):  # noqa: F811
    """Catches --overwrite that takes over what a run killed at its very end has left."""
    raw = (interrupted(files, monkeypatch) / "resume.ckpt").read_bytes()
    assert distil(files, "SST-2", *STEADY) == 0
    (files / "out/resume.ckpt").write_bytes(raw)
    capsys.readouterr()
    refused(capsys, distil(files, "SST-2", *STEADY), "finished run")
    assert distil(files, "SST-2", *STEADY, "--overwrite") == 0
    assert "continues" not in capsys.readouterr().out


@pytest.mark.parametrize("what", ["label", "text", "teacher"])
def test_changed_data_is_not_continued(files, monkeypatch, capsys, what):  # noqa: F811
    """Catches a run that ends with other data or another teacher than it began with."""
    out = interrupted(files, monkeypatch)
    capsys.readouterr()
    if what == "teacher":
        save_bert(Bert(shape(labels=("negative", "positive"))), out / "teacher")
        named = "weights"
    else:
        path = files / "SST-2/train.tsv"
        lines = path.read_text().split("\n")
        index, text, label = lines[1].split("\t")
        changed = (
            (index, text + " cat", label) if what == "text" else (index, text, str(1 - int(label)))
        )
        path.write_text("\n".join([lines[0], "\t".join(changed), *lines[2:]]))
        named = "train.tsv"
    refused(capsys, distil(files, "SST-2", *STEADY), named, "--overwrite")


def test_a_checkpoint_runs_no_code(files, monkeypatch, capsys):  # noqa: F811
    """Catches pickle's powers: a checkpoint whose sum is right may still be somebody else's."""
    out = interrupted(files, monkeypatch)
    raw = (out / "resume.ckpt").read_bytes()
    line = raw.partition(b" ")[2].partition(b"\n")[0] + b"\n"

    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(files / "pwned"),)

    torch.save({"model": Evil()}, files / "evil")
    rest = line + (files / "evil").read_bytes()
    (out / "resume.ckpt").write_bytes(b"%08x " % microbert.zlib.crc32(rest) + rest)
    capsys.readouterr()
    refused(capsys, distil(files, "SST-2", *STEADY), "resume.ckpt")
    assert not (files / "pwned").exists()


@slow
def test_killed_at_random_moments(files, whole):  # noqa: F811
    """SIGKILLs: catches whatever is not there, not whole or not the same at some moment.

    30 of them. A process that has imported torch forks the runs, so that
    each of them starts at once.
    """
    script = textwrap.dedent("""
        import json, os, random, signal, sys, time
        import torch
        torch.set_num_threads(1)
        import data, glue, microbert
        microbert.fit_experts.__kwdefaults__["steps"] = 30

        def start(arguments):
            child = os.fork()
            if not child:
                sys.stdout = sys.stderr = open(os.devnull, "w")
                os._exit(microbert.main(arguments))
            return child

        arguments, rng, kills, ends = sys.argv[2:], random.Random(0), 0, 0
        with open(os.devnull, "w") as sys.stdout:
            for free in ("free", "again"):  # what the first run imports, all others find
                began = time.perf_counter()
                assert microbert.main([*arguments, "--out", free]) == 0
                span = time.perf_counter() - began
        sys.stdout = sys.__stdout__
        out = "killed0"
        while kills < int(sys.argv[1]):
            child = start([*arguments, "--out", out])
            time.sleep(rng.uniform(0.02, 1.0) * span)
            os.kill(child, signal.SIGKILL)
            status = os.waitpid(child, 0)[1]
            if os.WIFSIGNALED(status):
                kills += 1
            if os.path.exists(f"{out}/results.json"):  # perhaps killed with the checkpoints there
                assert os.waitpid(start([*arguments, "--out", out]), 0)[1] == 2 << 8  # refused
                ends += 1
                out = f"killed{ends}"
        assert os.waitpid(start([*arguments, "--out", out]), 0)[1] == 0
        print(json.dumps([kills, ends + 1]))
    """)
    wanted = "30"
    arguments = ["--task", "SST-2", "--bert", files / "bert", "--force", *QUICK, *STEADY,
                 "--data-dir", files, "--save-every", "1", "--label-epochs", "1"]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false",
                                "PYTHONPATH": os.path.dirname(microbert.__file__)}  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", script, wanted, *map(str, arguments)],
        cwd=files, env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    kills, ends = json.loads(done.stdout)
    assert kills == int(wanted) and ends >= 1
    for number in range(ends):
        same_end(files / "free", files / f"killed{number}")


# --- faults --------------------------------------------------------------------------------------


def test_a_full_disk(files, whole, monkeypatch, capsys):  # noqa: F811
    """Catches a traceback, an unnamed file, a half-written one, and the checkpoint before lost."""
    sync, count = os.fsync, []

    def full(file):
        count.append(file)
        if len(count) == 4:  # the third checkpoint's; the first file is the log
            raise OSError(errno.ENOSPC, "No space left on device")
        sync(file)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        refused(capsys, distil(files, "SST-2", *STEADY), "No space left", "resume.ckpt")
    assert not list((files / "out").rglob("*.part"))
    assert distil(files, "SST-2", *STEADY) == 0
    assert "teacher: continues after step 4" in capsys.readouterr().out
    same_end(whole, files / "out")


def test_no_room_for_the_cache(files, whole, monkeypatch, capsys):  # noqa: F811
    """Catches the death of a process that fills a mapped file on a full disk (SIGBUS)."""
    teacher_pass, limits = microbert.teacher_pass, resource.getrlimit(resource.RLIMIT_FSIZE)

    def limited(*arguments):
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
        return teacher_pass(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(microbert, "teacher_pass", limited)
        try:
            code = distil(files, "SST-2", *STEADY)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    refused(capsys, code, "too large", "cache.f16")
    assert distil(files, "SST-2", *STEADY) == 0
    same_end(whole, files / "out")


@pytest.mark.parametrize("below", ["file", "kernel"])
def test_a_folder_that_cannot_be_written(files, capsys, below):  # noqa: F811
    """Catches hours of training before it shows."""
    (files / "occupied").write_text("")
    out = files / "occupied/out" if below == "file" else "/proc/nobody"
    refused(capsys, distil(files, "SST-2", out=out), out)


def test_a_file_that_vanishes(files, whole, monkeypatch, capsys):  # noqa: F811
    """Catches work lost because a split is gone when the scores are taken."""
    dev, text = files / "SST-2/dev.tsv", (files / "SST-2/dev.tsv").read_text()
    with monkeypatch.context() as patch:
        stop_at(patch, "student", 3, error=None, also=dev.unlink)
        refused(capsys, distil(files, "SST-2", *STEADY), dev, "no such file")
    dev.write_text(text)
    assert distil(files, "SST-2", *STEADY) == 0
    assert "student: continues after step 8" in capsys.readouterr().out
    same_end(whole, files / "out")


@pytest.mark.parametrize("kind", ["loss", "gradient"])
def test_not_a_number(files, monkeypatch, capsys, kind):  # noqa: F811
    """Catches weights moved by NaN, and one noticed only where the log is printed."""
    soft_loss, calls = microbert.soft_loss, []

    class Infinite(torch.autograd.Function):
        @staticmethod
        def forward(context, loss):
            return loss.clone()

        @staticmethod
        def backward(context, gradient):
            return gradient * torch.inf

    def failing(student, teacher, temperature):
        loss = soft_loss(student, teacher, temperature)
        if not student.requires_grad or len(student) > 8:
            return loss
        calls.append(1)
        if len(calls) < 6:
            return loss
        return loss + torch.inf if kind == "loss" else Infinite.apply(loss)

    monkeypatch.setattr(microbert, "soft_loss", failing)
    monkeypatch.setattr(microbert, "fit_experts", lambda experts, *_, **__: experts.eval())
    code = distil(files, "SST-2", "--save-every", "2", "--log-every", "100")
    term = "soft inf" if kind == "loss" else "gradient's norm nan"
    refused(capsys, code, "student step 6", term, "hard 0.", "resume.ckpt")
    body = (files / "out/resume.ckpt").read_bytes().partition(b"\n")[2]
    states = torch.load(microbert.io.BytesIO(body), weights_only=True)
    assert all(t.isfinite().all() for t in states["model"].values())
    assert load_bert(files / "out/teacher")


def test_not_a_number_at_once(files, monkeypatch, capsys):  # noqa: F811
    """Catches a good state that is promised and not there."""
    monkeypatch.setattr(microbert, "hard_loss", lambda logits, *_: logits.sum() * torch.nan)
    assert distil(files, "SST-2") == 2
    told = capsys.readouterr().err
    assert "teacher step 1: the loss is nan" in told and "resume.ckpt" not in told


@pytest.mark.parametrize("kind", ["none", "sure", pytest.param("perfect", marks=slow), "constant"])
def test_a_discriminator_that_wins_or_collapses(tmp_path, kind):
    """Catches an adversarial loss that drowns the others when nothing can be won any more.

    sure: rejects whatever the student does; perfect: trained to the end on every batch before the
    student may answer; constant: collapsed, so there is nothing to learn from it.
    """
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=16, initializer_range=0.2,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    settings = settle(
        DistillConfig(device="cpu", precision="fp32", batch_size=8, gan=kind != "none", log_every=1)
    )
    ids = np.random.default_rng(0).integers(5, 40, 64 * 8).astype(np.int32)
    encoded = data.Encoded(ids, np.zeros_like(ids, np.uint8), np.arange(0, 65 * 8, 8))
    teacher, labels = Bert(config), torch.full((64,), torch.nan)
    cache = microbert.teacher_pass(teacher, encoded, labels, [2], settings, tmp_path / "f16")
    objective = microbert.Distillation(cache, microbert.make_experts(cache, settings), settings)
    student, losses, told_apart = microbert.prune(teacher, [2]), [], []
    contest, judge = objective.contest, getattr(objective, "discriminator", None)

    def unfair(real, fake, progress):
        if kind == "perfect":
            for _ in range(10):
                loss = microbert.discriminator_loss(judge, real, fake)
                objective.optimizer.zero_grad()
                loss.backward()
                objective.optimizer.step()
            told_apart.append((judge(real).mean() - judge(fake).mean()).item())
        return contest(real, fake, progress)

    objective.contest = unfair
    if kind in ("sure", "constant"):
        with torch.no_grad():
            judge.layers[-1].bias.fill_(-1e3 if kind == "sure" else 0.0)
        objective.optimizer.param_groups[0]["lr"] = 0.0
    if kind == "constant":
        judge.forward = lambda outputs: 0 * microbert.Discriminator.forward(judge, outputs)
    if kind == "perfect":
        objective.optimizer.param_groups[0]["lr"] = 1e-2

    class Recorder:
        def step(self, step, steps, terms, *_):
            losses.append(terms["align"].item() + terms["soft"].item())

    microbert.train(student, encoded, objective, settings, Recorder(), epochs=15, lr=3e-3)
    assert np.isfinite(losses).all() and np.mean(losses[-8:]) < 0.5 * np.mean(losses[:8])
    assert kind != "perfect" or min(told_apart[:8]) > 0


# --- hostile input -------------------------------------------------------------------------------


def test_a_tensor_that_repeats_its_numbers(tmp_path):
    """Catches a small file that becomes terabytes: a stored view of stride 0."""
    save_bert(Bert(shape()), tmp_path)
    tensors = microbert.read_safetensors(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    tensors["classifier.bias"] = torch.zeros(1).expand(2)
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="pytorch_model.bin.*classifier.bias.*repeats"):
        load_bert(tmp_path)


def test_a_transposed_tensor_is_continued_too(files):  # noqa: F811
    """Catches a checkpoint of weights that numpy cannot see as one block."""
    bert = files / "bert"
    tensors = microbert.read_safetensors(bert / "model.safetensors")
    (bert / "model.safetensors").unlink()
    name = "bert.pooler.dense.weight"
    tensors[name] = tensors[name].t().contiguous().t()
    assert not tensors[name].is_contiguous()
    torch.save(tensors, bert / "pytorch_model.bin")
    assert distil(files, "SST-2", *STEADY) == 0


@pytest.mark.parametrize("kind", ["sparse", "meta", "views"])
def test_tensors_of_another_kind(tmp_path, kind):
    """Catches a traceback from the middle of torch, and a small file of large tensors."""
    save_bert(Bert(shape()), tmp_path)
    tensors = microbert.read_safetensors(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    name = "bert.pooler.dense.weight"
    made = {"sparse": torch.eye(8).to_sparse(), "meta": torch.empty(8, 8, device="meta")}
    if kind == "views":
        block = torch.zeros(1_000_000)
        tensors |= {f"extra.{i}": block[i:] for i in range(9)}
    else:
        tensors[name] = made[kind]
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="pytorch_model.bin"):
        load_bert(tmp_path)


def test_a_header_of_many_dimensions(tmp_path):
    """Catches minutes spent on multiplying a hostile shape."""
    header = {"a": {"dtype": "F32", "shape": [2**40] * 300_000, "data_offsets": [0, 0]}}
    text = json.dumps(header).encode()
    (tmp_path / "a").write_bytes(microbert.struct.pack("<Q", len(text)) + text)
    with pytest.raises(ValueError, match="tensor 'a' is given as"):
        microbert.read_safetensors(tmp_path / "a")


def test_pairs_need_two_segments(files, capsys):  # noqa: F811
    """Catches an IndexError from the embeddings; single texts are such a BERT's own."""
    save_bert(Bert(shape(type_vocab_size=1)), files / "student", files / "bert")
    assert answer(capsys, files / "student", "cat")[0] == 0
    code, _, err = answer(capsys, files / "student", "cat", "dog")
    assert code == 2 and "type_vocab_size" in err
    assert main(["--task", "RTE", "--data-dir", str(files), "--bert", str(files / "student"),
                 "--out", str(files / "out")]) == 2  # fmt: skip
    assert "type_vocab_size" in capsys.readouterr().err


def test_damaged_weights_do_not_answer(student, files, capsys):  # noqa: F811
    """Catches `nan` with exit code 0."""
    model = load_bert(student)
    with torch.no_grad():
        model.classifier.bias[1] = torch.nan
    save_bert(model, student, files / "bert")
    code, out, err = answer(capsys, student, "cat")
    assert code == 2 and not out and "not finite" in err


def test_a_tokenizer_that_fails_on_a_text(student, files, capsys):  # noqa: F811
    """Catches the library's bare Exception where a word has no token."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.Unigram([("cat", -1.0)]))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    with pytest.raises(ValueError, match="texts 1 on: the tokenizer fails"):
        data.encode(tokenizer, ["dog"])


def test_tokenizer_files_do_not_mix(student, files, capsys):  # noqa: F811
    """Catches words of one BERT under the weights of another, and a model without its words."""
    data.load_tokenizer(files / "bert").save(str(student / "tokenizer.json"))
    save_bert(load_bert(student), student, files / "bert")  # which has a vocab.txt alone
    assert not (student / "tokenizer.json").exists() and (student / "vocab.txt").exists()
    before = (student / "config.json").read_bytes()
    with pytest.raises(FileNotFoundError, match="neither tokenizer.json nor vocab.txt"):
        save_bert(Bert(shape(num_hidden_layers=1)), student, files / "glue")
    assert (student / "config.json").read_bytes() == before


def test_what_only_shows_may_change(files, whole, monkeypatch):  # noqa: F811
    """Catches advice (--force) that is then refused as another flag."""
    interrupted(files, monkeypatch)
    assert distil(files, "SST-2", "--save-every", "5", "--log-every", "7", "--force") == 0
    same_end(whole, files / "out")


@pytest.mark.parametrize("wrong", [
    {"step": "x"}, {"step": 0}, {"flags": []},
])  # fmt: skip
def test_an_odd_header_is_no_state(files, monkeypatch, capsys, wrong):  # noqa: F811
    """Catches a traceback over a checkpoint of the right checksum."""
    out = interrupted(files, monkeypatch)
    (out / "resume.ckpt.old").unlink()
    _, _, rest = (out / "resume.ckpt").read_bytes().partition(b" ")
    line, _, body = rest.partition(b"\n")
    rest = json.dumps(json.loads(line) | wrong).encode() + b"\n" + body
    (out / "resume.ckpt").write_bytes(b"%08x " % microbert.zlib.crc32(rest) + rest)
    capsys.readouterr()
    assert distil(files, "SST-2", *STEADY) == 0
    shown = capsys.readouterr()
    assert "resume.ckpt is torn" in shown.err and "continues" not in shown.out


def test_a_huge_config(files):  # noqa: F811
    """Catches gigabytes read before a word of them is understood."""
    with open(files / "bert/config.json", "ab") as file:
        file.truncate(2**33)  # takes no disk
    with pytest.raises(ValueError, match="config.json: 8589934592 bytes"):
        load_bert(files / "bert")


def test_a_compressed_pickle(files):  # noqa: F811
    """Catches a small file that unpacks to more memory than there is."""
    bert = files / "bert"
    torch.save(microbert.read_safetensors(bert / "model.safetensors"), files / "plain.bin")
    (bert / "model.safetensors").unlink()
    with zipfile.ZipFile(files / "plain.bin") as plain:
        with zipfile.ZipFile(bert / "pytorch_model.bin", "w", zipfile.ZIP_DEFLATED) as packed:
            for member in plain.infolist():
                packed.writestr(member.filename, plain.read(member) + bytes(10**5))
    with pytest.raises(ValueError, match="pytorch_model.bin.* compressed"):
        load_bert(bert)


@pytest.mark.parametrize("kind", ["post-processor", "added", "no special", "segments"])
def test_a_tokenizer_that_promises_more_than_the_embeddings_hold(files, capsys, kind):  # noqa: F811
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
def student(files):  # noqa: F811
    """A checkpoint that can answer."""
    save_bert(Bert(shape(labels=("no", "yes"))), files / "student", files / "bert")
    return files / "student"


def answer(capsys, *arguments):
    """Exit code and both streams of a prediction."""
    capsys.readouterr()
    code = main(["predict", *map(str, arguments), "--device", "cpu", "--max-length", "32"])
    shown = capsys.readouterr()
    return code, shown.out, shown.err


@pytest.mark.parametrize("number", range(len(ODD_TEXTS)))
def test_odd_texts_are_answered(student, capsys, number):
    """Catches a crash, a NaN, and an answer of more than a line."""
    for texts in ([ODD_TEXTS[number]], [ODD_TEXTS[number], "cat"], ["cat", ODD_TEXTS[number]]):
        code, out, _ = answer(capsys, student, *texts)
        label, share = out.rstrip("\n").split("\t")
        assert code == 0 and label in ("no", "yes") and 0.5 <= float(share) <= 1


def test_lone_surrogates_are_refused(student, capsys):
    """Catches a TypeError of the tokenizer's that speaks of something else."""
    assert answer(capsys, student, "a\udcffb")[2].startswith("error: text 1, character 2: ")
    tokenizer = data.load_tokenizer(student)
    for wrong in (None, 3, ("a", None), ["a", "b", "c"] * 9, b"a"):
        with pytest.raises((ValueError, TypeError), match="text|Text"):
            data.encode(tokenizer, ["good", wrong])


def test_a_bad_line_is_named_and_the_others_answered(student, files, capsys):  # noqa: F811
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


def test_a_terminal_that_lacks_a_letter(student, files, monkeypatch):  # noqa: F811
    """Catches an answer lost for its label's spelling."""
    save_bert(Bert(shape(labels=("n\u00f6", "d\u00f6"))), student, files / "bert")
    raw = microbert.io.BytesIO()
    monkeypatch.setattr(sys, "stdout", microbert.io.TextIOWrapper(raw, encoding="ascii"))
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


def test_what_predict_cannot_take(student, files, capsys):  # noqa: F811
    """Catches a traceback for three texts, a missing file, both ways at once, an untrained head."""
    for arguments, needle in (
        (["a", "b", "c"], "3 texts"),
        (["--file", files / "nowhere"], "nowhere"),
        (["a", "--task", "SST-2"], "exclude each other"),
        (["a", "--file", files / "bert/vocab.txt"], "exclude each other"),
        (["a", "--split", "test"], "--split needs --task"),
        (["--file", files / "nowhere"], "nowhere: no such file"),
    ):
        code, _, err = answer(capsys, student, *arguments)
        assert code == 2 and needle in err and err.count("\n") == 1


def test_scores_of_texts(files, capsys):  # noqa: F811
    """Catches a probability where the model gives a score."""
    model = Bert(shape(labels=("score",)))
    save_bert(model, files / "scorer", files / "bert")
    code, out, _ = answer(capsys, files / "scorer", "cat", "dog")
    as_json = json.loads(answer(capsys, files / "scorer", "cat", "dog", "--json")[1])
    assert code == 0 and float(out) == pytest.approx(as_json["score"], abs=1e-4)


# --- fuzz ----------------------------------------------------------------------------------------


def damage(raw, rng):
    """The bytes with a few of them changed, left out, repeated, or replaced by telling ones."""
    raw = bytearray(raw)
    for _ in range(rng.randint(1, 4)):
        i, j = sorted(rng.randrange(len(raw) + 1) for _ in range(2))
        kind = rng.randrange(5)
        if kind == 0 and raw:
            raw[min(i, len(raw) - 1)] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del raw[i : i + rng.choice([1, 8, j - i])]
        elif kind == 2:
            raw[i:i] = raw[i : min(j, i + 64)]
        elif kind == 3:
            raw[i:i] = rng.choice([b"\t", b"\n", b"\r", b"\0", b"\xff", b'"', b"-1", b"[", b"{",
                                   b"1e999", b"9" * 30, b"null", "\u2028".encode()])  # fmt: skip
        else:
            del raw[j:]
    return bytes(raw)


@pytest.mark.parametrize("kind", ["safetensors", "config", "pickle", "vocab", "tokenizer", "tsv",
                                  "scores", "resume"])  # fmt: skip
def test_fuzzed_files(files, monkeypatch, kind):  # noqa: F811
    """Catches whatever a damaged file makes a reader raise but a ValueError that names the file."""
    bert = files / "bert"
    data.load_tokenizer(bert).save(str(files / "tokenizer.json"))
    if kind == "pickle":
        torch.save(
            microbert.read_safetensors(bert / "model.safetensors"), bert / "pytorch_model.bin"
        )
        (bert / "model.safetensors").unlink()
    if kind == "tokenizer":
        (files / "tokenizer.json").rename(bert / "tokenizer.json")
    if kind == "resume":
        interrupted(files, monkeypatch)
        config = settle(DistillConfig(task="SST-2", out=str(files / "out")))
        train_set = glue.read("SST-2", files, "train")

    def continue_run():
        resume = microbert.Resume(files / "out", config, train_set, microbert.Log(files / "log"))
        assert resume.phase in ("", "student")

    path, read, rounds = {
        "safetensors": (bert / "model.safetensors", lambda: load_bert(bert), 150),
        "pickle": (bert / "pytorch_model.bin", lambda: load_bert(bert), 60),
        "config": (bert / "config.json", lambda: load_bert(bert), 300),
        "vocab": (bert / "vocab.txt", lambda: data.load_tokenizer(bert).encode("a cat"), 200),
        "tokenizer": (bert / "tokenizer.json", lambda: data.load_tokenizer(bert).encode("a"), 200),
        "tsv": (files / "RTE/dev.tsv", lambda: glue.read("RTE", files, "dev"), 300),
        "scores": (files / "STS-B/dev.tsv", lambda: glue.read("STS-B", files, "dev"), 300),
        "resume": (files / "out/resume.ckpt", continue_run, 60),
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
    assert refusals > rounds // 10 or kind in ("vocab", "resume")


# --- same in, same out ---------------------------------------------------------------------------


@slow
def test_nothing_around_a_run_changes_it(files, whole):  # noqa: F811
    """Catches a folder, locale, hash seed or terminal that weights and scores depend on."""
    arguments = ["--task", "SST-2", "--bert", "bert", "--out", "else/where", *QUICK, "--force",
                 *STEADY, "--data-dir", "."]  # fmt: skip
    script = (
        "import sys, torch\n"
        f"torch.set_num_threads({torch.get_num_threads()})\n"
        "import microbert\n"
        "microbert.fit_experts.__kwdefaults__['steps'] = 30\n"
        "sys.exit(microbert.main(sys.argv[1:]))\n"
    )
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("LC_", "LANG"))}
    environment |= {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONHASHSEED": "123", "COLUMNS": "30",
                    "PYTHONPATH": os.path.dirname(microbert.__file__), "TZ": "UTC"}  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", script, *arguments],
        cwd=files, env=environment, capture_output=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr.decode()
    same_end(whole, files / "else/where")


@pytest.mark.parametrize("room", [16, 100, 4096])
def test_batches_do_not_change_answers(files, monkeypatch, room):  # noqa: F811
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
