"""What makes it fast must change nothing: attention, embeddings, precision, processes."""

import json
import os
import subprocess
import sys
from argparse import Namespace
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import later, slow
from test_method import TINY as DROPPING
from test_method import Quiet, run_of, texts
from test_run import distil, files, shape  # noqa: F401

import data
import glue
import microbert
from microbert import Bert, DistillConfig, load_bert, main, prune, save_bert, settle

CALM = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
TINY = replace(DROPPING, num_hidden_layers=2, **CALM)


@pytest.mark.parametrize("padded", [True, False])
def test_attention_of_training_equals_that_of_answering(padded):
    """Catches a wrong scale, mask or softmax in the formula that training on a CPU uses."""
    torch.manual_seed(0)
    model, found = Bert(TINY), []
    ids = torch.randint(5, 40, (3, 9))
    mask = torch.ones_like(ids)
    mask[0, 4:] = mask[1, 7:] = 0
    for training in (True, False):
        model.train(training).zero_grad()
        output = model(ids, mask if padded else None)
        (output.logits.sum() + output.hidden_states[-1][:, 0].square().sum()).backward()
        found.append([output.logits, *(p.grad for p in model.parameters())])
    for trained, answered in zip(*found):
        torch.testing.assert_close(trained, answered, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("device, training", [("meta", True), ("cpu", False), ("cpu", True)])
def test_kernels_of_attention(monkeypatch, device, training):
    """Catches cuDNN's, whose gradients can be wrong, dropout in answers, torch's where slow."""
    ways, seen = torch.backends.cuda, []

    def watched(*arguments):
        seen.append((ways.cudnn_sdp_enabled(), ways.flash_sdp_enabled(), arguments[-1]))

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
    one = torch.ones(1, 1, 2, 4, device=device)
    microbert.attention(one, one, one, None, 0.1, training)
    assert seen == ([] if (device, training) == ("cpu", True) else [(False, True, 0.1 * training)])
    assert ways.cudnn_sdp_enabled()


@pytest.mark.parametrize("rate", [0.0, 0.001, 0.1, 0.5, 0.999, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropout(rate, dtype):
    """Catches another share, another scale, the same numbers twice, a gradient of others."""
    torch.manual_seed(0)
    x = torch.ones(101, 333, dtype=dtype, requires_grad=True)
    first, second = (microbert.dropout(x, rate, True) for _ in range(2))
    first.sum().backward()
    assert x.grad.equal(first) and first.dtype == dtype
    assert (first == 0).float().mean().item() == pytest.approx(rate, abs=0.005)
    if 0.01 < rate < 0.9:
        assert first.mean(dtype=torch.float32).item() == pytest.approx(1, abs=0.01)
        both = ((first == 0) & (second == 0)).float().mean().item()
        assert both == pytest.approx(rate**2, abs=0.01)
    assert microbert.dropout(x, rate, False) is x


def test_a_pruned_model_is_in_its_teachers_mode():
    """Catches dropout in the answers of what an answering teacher was pruned to."""
    assert not prune(Bert(TINY).eval(), [1]).training and prune(Bert(TINY).train(), [1]).training


def test_loading_and_pruning_draw_no_random_numbers(tmp_path):
    """Catches an initialisation that is overwritten at once: most of the time of loading."""
    save_bert(Bert(TINY), tmp_path)
    torch.manual_seed(0)
    prune(load_bert(tmp_path), [2])
    after = torch.rand(1)
    torch.manual_seed(0)
    assert torch.equal(after, torch.rand(1))


def test_loading_imports_nothing_more(root, tmp_path):
    """Catches what torch imports to draw numbers on no device: a second of every command."""
    save_bert(Bert(TINY), tmp_path)
    code = (
        "import sys, microbert; microbert.load_bert(sys.argv[1]); sys.exit('sympy' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code, tmp_path], cwd=root).returncode == 0


@pytest.mark.parametrize("weight_decay", [0.0, 0.5])
def test_words_that_do_not_occur_cost_and_change_nothing(monkeypatch, tmp_path, weight_decay):
    """Catches ids not renumbered, rows put back in the wrong place, a table left small, and a
    decay of embeddings that no gradient holds up.
    """
    torch.manual_seed(0)
    model, encoded, rows, ends = Bert(TINY), texts(50, words=25), [], []
    words, start = "word_embeddings.weight", model.word_embeddings.weight.detach().clone()
    config = settle(DistillConfig(device="cpu", precision="fp32", batch_size=8, clip=0.5,
                                  weight_decay=weight_decay))  # fmt: skip
    labels = torch.arange(50) % 2.0
    monkeypatch.setattr(
        microbert, "in_parallel", lambda m: rows.append(len(m.word_embeddings.weight)) or m
    )
    for name in ("small", "large"):
        lesson = microbert.Lesson(encoded, microbert.of_labels(labels, 2, config), 3, 1e-2)
        run = run_of(tmp_path, config, encoded, labels)
        ends.append(microbert.fit(run, name, model, lesson, 0).state_dict())
        monkeypatch.setattr(microbert, "only_seen_words", lambda _, some: nullcontext(some))
    occur = np.unique(encoded.ids)
    others = [i for i in range(TINY.vocab_size) if i not in occur]
    assert rows == [len(occur), TINY.vocab_size] and len(others) > 10
    small, large = (end.pop(words) for end in ends)
    torch.testing.assert_close(*ends, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(small[occur], large[occur], atol=1e-5, rtol=1e-4)
    assert torch.equal(small[others], start[others])
    assert torch.equal(large[others], start[others]) == (weight_decay == 0)
    assert ((small - start).abs().amax(1)[occur] > 1e-4).all()


def test_a_frozen_or_interrupted_table_stays_whole():
    """Catches frozen embeddings that move, and a model left with a few words after an error."""
    model, encoded = Bert(TINY), texts(50, words=25)
    table = model.word_embeddings.weight.requires_grad_(False)
    before = table.clone()

    def objective(output, mask, batch, progress):
        if progress > 0.5:
            raise KeyboardInterrupt
        return {"hard": output.logits.square().mean()}

    config = settle(DistillConfig(device="cpu", precision="fp32", batch_size=8))
    with pytest.raises(KeyboardInterrupt), microbert.only_seen_words(model, encoded) as seen:
        assert len(model.word_embeddings.weight) < 25
        microbert.train(model, seen, objective, config, Quiet(), epochs=3, lr=1e-2)
    table = model.word_embeddings.weight
    assert torch.equal(table, before) and not table.requires_grad
    assert model(torch.tensor([[TINY.vocab_size - 1]])).logits.shape


def test_the_table_comes_back_where_the_model_is():
    """Catches a model that moved to a GPU in training, and a table that stayed behind."""
    model, encoded = Bert(TINY), texts(50, words=25)
    with microbert.only_seen_words(model, encoded):
        model.to("meta")  # stands for a GPU: as there, no tensor of the CPU's fits
    table = model.word_embeddings.weight
    assert isinstance(table, torch.nn.Parameter) and table.device.type == "meta"
    assert len(table) == TINY.vocab_size


@pytest.mark.parametrize(
    "features, fast",
    [({"avx512_bf16": True}, True), ({"amx_bf16": True}, True), ({"avx512_f": True}, False),
     (None, False)],
)  # fmt: skip
def test_bf16_trains_where_the_processor_has_it(monkeypatch, features, fast):
    """Catches slow emulation, answers that depend on the processor, and a torch that cannot name
    the processor's features.
    """
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: features, raising=False)
    if features is None:
        monkeypatch.delattr(torch.cpu, "get_capabilities")
    for precision, checkpoint, expected in (
        ("auto", "", "bf16" if fast else "fp32"),
        ("auto", "somewhere", "fp32"),
        ("fp32", "", "fp32"),
        ("bf16", "somewhere", "bf16"),
    ):
        config = DistillConfig("RTE", device="cpu", precision=precision, checkpoint=checkpoint)
        assert settle(config).precision == expected


@pytest.mark.parametrize("parts", [1, 2, 3, 70])
def test_processes_share_the_rows(parts):
    """Catches a text that is scored twice, or by nobody."""
    model, encoded, config = Bert(TINY), texts(50), DistillConfig(device="cpu", precision="fp32")
    rows = [
        row
        for part in range(parts)
        for some, _, _ in microbert.run_batches(model, encoded, config, part, parts)
        for row in some.tolist()
    ]
    assert sorted(rows) == list(range(len(encoded)))


def test_only_the_first_process_writes(monkeypatch, tmp_path):
    """Catches two processes that write one file."""
    monkeypatch.setattr(microbert, "process", lambda: (1, 2))
    microbert.write_file(tmp_path / "a", b"x")
    microbert.save_state(tmp_path / "b", step=1)
    microbert.Log(tmp_path / "log").write(step=1)
    assert list(tmp_path.iterdir()) == []


def torchrun(root, *arguments, processes=2):
    """The script under torchrun, on the CPU."""
    environment = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone",
         f"--nproc-per-node={processes}", *map(str, arguments)],
        cwd=root, env=environment, capture_output=True, text=True, timeout=120,
    )  # fmt: skip


def made(files, *more):  # noqa: F811
    """Flags of a small run: 40 texts, 5 steps a pass."""
    return ["--task", "SST-2", "--data-dir", str(files), "--device", "cpu", "--precision", "fp32",
            "--batch-size", "8", "--log-every", "1", "--max-length", "24", *more]  # fmt: skip


def losses(folder):
    events = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [[e[k] for k in ("loss", "hard", "soft", "align", "adv") if k in e]
            for e in events if "loss" in e]  # fmt: skip


@slow
def test_two_processes_follow_one(root, files):  # noqa: F811
    """Catches gradients of student or discriminator not averaged, batches not shared, a text
    scored twice, a cache with holes, two processes that print or write the same, and a text that
    weighs more than others because its process has fewer of them: 80 texts in batches of 7.
    """
    save_bert(Bert(shape(labels=("0", "1"), **CALM)), files / "bert")
    flags = made(files, "--teacher", str(files / "bert"), "--epochs", "2", "--force",
                 "--transfer-ratio", "1", "--no-baseline", "--batch-size", "7")  # fmt: skip
    assert main([*flags, "--out", str(files / "alone")]) == 0
    ran = torchrun(root, "microbert.py", *flags, "--out", files / "two")
    assert ran.returncode == 0, ran.stderr
    assert len(losses(files / "alone")) == 24
    np.testing.assert_allclose(losses(files / "two"), losses(files / "alone"), atol=1e-5, rtol=0)
    assert ran.stdout.count("of teacher") == 1 and ran.stdout.count("student     1/24") == 1
    one, other = [json.loads((files / f"{n}/results.json").read_text()) for n in ("alone", "two")]
    for name in ("teacher", "student"):
        distances = [run[name].pop("distance", 0) for run in (one, other)]
        assert distances[0] == pytest.approx(distances[1], abs=1e-5) and one[name] == other[name]
    assert not list(files.glob("two/cache*"))


@slow
def test_a_failing_process_ends_all_and_they_continue(root, files):  # noqa: F811
    """Catches a run that waits for ever for a process that is gone, or continues differently."""
    script = files / "fails.py"
    script.write_text(
        "import os, sys\n"
        f"sys.path.insert(0, {str(root)!r})\n"
        "import microbert\n"
        "def step(self, step, *rest):\n"
        "    if os.environ['RANK'] == '1' and step == 9:\n"
        "        raise ValueError('the disk of this machine is gone')\n"
        "microbert.Log.step = step\n"
        "sys.exit(microbert.main())\n"
    )
    command = ["finetune", *made(files, "--bert", files / "bert", "--epochs", "2"),
               "--save-every", "4", "--out"]  # fmt: skip
    ran = torchrun(root, script, *command, files / "out")
    assert ran.returncode != 0
    assert "error in process 1: the disk of this machine is gone" in ran.stderr
    assert not (files / "out/results.json").exists()
    continued = torchrun(root, "microbert.py", *command, files / "out")
    assert continued.returncode == 0, continued.stderr
    assert continued.stdout.count("teacher: continues after step 8") == 1
    assert torchrun(root, "microbert.py", *command, files / "whole").returncode == 0
    ends = [(files / f"{n}/teacher/model.safetensors").read_bytes() for n in ("out", "whole")]
    assert ends[0] == ends[1]


def test_the_benchmark_counts_products(root, monkeypatch):
    """Catches products that are missed, counted wrongly or not timed again."""
    monkeypatch.syspath_prepend(root / "tests")
    import bench

    products = bench.Products()
    first, second = torch.randn(3, 4, requires_grad=True), torch.randn(5, 4, requires_grad=True)
    with products:
        torch.nn.functional.linear(first, second).sum().backward()
    assert products.flops == 3 * 2 * 3 * 4 * 5  # forward, and one for each gradient
    assert sum(products.found.values()) == 3
    products.again()
    lengths = np.array([3, 5, 2])  # of 2 layers, widths 16 and 32
    expected = 2 * ((2 * 3 + 5) * 2 * (4 * 16 * 16 + 2 * 16 * 32) + (2 * 9 + 25) * 4 * 16)
    assert bench.flops(shape(), 2, lengths, [[0, 2], [1]]) == expected


@slow
def test_the_benchmark_trains(files, monkeypatch, root):  # noqa: F811
    """Catches rows that have fallen behind the code, limits of another side."""
    monkeypatch.syspath_prepend(root / "tests")
    import bench

    monkeypatch.setattr(bench, "BATCH", 1)
    save_bert(Bert(shape(num_hidden_layers=6, max_position_embeddings=128)), files / "bert")
    lines = ["Quality\t#1 ID\t#2 ID\t#1 String\t#2 String", *["1\t1\t2\ta b c\td e"] * 24]
    (files / "MRPC").mkdir()
    (files / "MRPC/train.tsv").write_text("\n".join(lines) + "\n")
    s = bench.Setting(Namespace(bert=files / "bert", data_dir=files, repeats=1))
    found = [row for name in ("encode", "step", "loops") for row in bench.ROWS[name](s)]
    assert len(found) == 1 + 4 * 3 + 4 * 2 and all(row["limit"] > 0.9 for row in found)
    assert all(0 < row["share"] < 9 for row in found)


@pytest.mark.parametrize("task, labels", [later("SST-2", ("0", "1")), ("STS-B", ("score",))])
def test_what_a_run_hands_on(files, monkeypatch, task, labels):  # noqa: F811
    """Catches features of other layers, dropout in the student, a distance by another measure."""
    passes, rates = [], set()
    teacher_pass, train = microbert.teacher_pass, microbert.train

    def watched(model, *arguments, **options):
        rates.update([model.head_dropout, *(layer.hidden_dropout for layer in model.layers)])
        train(model, *arguments, **options)

    monkeypatch.setattr(microbert, "train", watched)
    monkeypatch.setattr(microbert, "teacher_pass", lambda *a: passes.append(a) or teacher_pass(*a))
    teacher = Bert(shape(labels=labels, initializer_range=0.5))
    save_bert(teacher, files / "sure", tokenizer_from=files / "bert")
    made = ("--bert", "", "--teacher", files / "sure", "--precision", "bf16", "--layers", "2")
    assert distil(files, task, *made) == 0
    assert [given[3] for given in passes] == [((1, 2), (3, 4))] and rates == {0.0}
    dev = data.encode(data.load_tokenizer(files / "bert", 24), glue.read(task, files, "dev").texts)
    config = DistillConfig(device="cpu", precision="fp32")
    models = [load_bert(files / "out" / part) for part in ("teacher", "student")]
    said = [microbert.predict_logits(model, dev, config).double() for model in models]
    wanted, found = (logits.log_softmax(-1) for logits in said)
    expected = (wanted.exp() * (wanted - found)).sum(-1).mean().item()
    if task == "STS-B":  # scores .5, 1.5, ... 4.5: variance 2
        expected = (said[0] - said[1]).square().mean().item() / 2
    results = json.loads((files / "out/results.json").read_text())
    assert results["student"]["distance"] == pytest.approx(expected, rel=1e-4) and expected > 1e-3


def test_how_much_is_chosen(files, monkeypatch):  # noqa: F811
    """Catches transfer text without a bound, and passes of a whole task or of distillation."""
    counts = []
    monkeypatch.setattr(data, "transfer_texts", lambda *a: counts.append(a[3]) or ([], 0))
    config = DistillConfig(data_dir=str(files), device="cpu")
    for known in (40, 30_000, 200_000):
        microbert.gather_transfer(config, glue.TASKS["SST-2"], ["a"] * known, {})
    assert counts == [280, 70_000, 0]
    assert [settle(replace(config, task="CoLA", limit=n)).teacher_epochs for n in (0, 9)] == [5, 0]
    for epochs, passes in ((7, 7), (0, 2)):
        config = replace(config, soft=False, fal=False, gan=False, epochs=epochs, teacher_epochs=2)
        run = run_of(files, config, texts(9), torch.zeros(9))
        cache = microbert.TeacherCache(torch.zeros(0), torch.zeros(9, 2), torch.zeros(12))
        own, _, trained, _ = microbert.student_lesson(run, cache, None)
        assert (len(own), trained) == (9, passes)


def test_the_built_in_tasks_bert_is_of_no_seed(monkeypatch, tmp_path):
    """Catches runs of several seeds that do not start from the same BERT."""
    seen, own = set(), lambda *a, **_: seen.add((microbert.checksum(a[0]), a[3].seed))
    monkeypatch.setattr(microbert, "train", own)
    for seed in (0, 5):
        microbert.toy(settle(DistillConfig(precision="fp32", seed=seed)), tmp_path / str(seed))
    assert len(seen) == 1
