"""What makes it fast must change nothing: dropout, attention, embeddings, precision, processes."""

import json
import os
import subprocess
import sys
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from conftest import slow

import data
import glue
import microbert
from microbert import Bert, BertConfig, DistillConfig, dropout, load_bert, main, prune, settle

TINY = BertConfig(
    vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
    intermediate_size=32, max_position_embeddings=16, initializer_range=0.3,
    hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
)  # fmt: skip


class Quiet:
    """A log that says nothing."""

    def due(self):
        return False

    def step(self, *_):
        pass


def texts(count=50, words=25):
    """Random ids from 5 on, of one to twelve tokens; ids from `words` on do not occur."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 13, count)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    ids = rng.integers(5, words, offsets[-1]).astype(np.int32)
    return data.Encoded(ids, np.zeros_like(ids, np.uint8), offsets)


# --- dropout and attention -----------------------------------------------------------------------


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropout_drops_its_share_independently(rate, dtype):
    """Catches a wrong rate or scale, and four neighbours that share one fate."""
    torch.manual_seed(0)
    dropped = dropout(torch.ones(1000, 1001, dtype=dtype), rate, True)
    gone = (dropped == 0).float()
    assert gone.mean().item() == pytest.approx(rate, abs=0.003)
    kept = dropped[dropped != 0].float()
    torch.testing.assert_close(kept, torch.full_like(kept, 1 / (1 - rate)), atol=0, rtol=0.005)
    fours = gone.flatten()[:1_000_000].view(-1, 4).sum(1)
    assert fours.var().item() == pytest.approx(4 * rate * (1 - rate), rel=0.02)  # binomial
    assert gone.mean(0).std().item() < 0.03  # no column is favoured


@pytest.mark.parametrize("rate", [0.0, 1e-6, 0.9999, 1.0])
def test_extreme_rates(rate):
    """Catches an overflow of the threshold and a division by zero."""
    dropped = dropout(torch.ones(100, 100), rate, True)
    assert (dropped == 0).float().mean().item() == pytest.approx(rate, abs=0.01)
    assert dropped.isfinite().all()


def test_dropout_is_seeded_and_off_outside_training():
    """Catches a generator of its own, and noise in answers."""
    hidden, drawn = torch.randn(3, 5, 7), []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        drawn.append(dropout(hidden.transpose(0, 1), 0.3, True))
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    assert torch.equal(dropout(hidden, 0.3, False), hidden)


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


def test_loading_and_pruning_draw_no_random_numbers(tmp_path):
    """Catches an initialisation that is overwritten at once: most of the time of loading."""
    microbert.save_bert(Bert(TINY), tmp_path)
    torch.manual_seed(0)
    prune(load_bert(tmp_path), [2])
    after = torch.rand(1)
    torch.manual_seed(0)
    assert torch.equal(after, torch.rand(1))


# --- embeddings of the words that occur ----------------------------------------------------------


def trained(weight_decay=0.0):
    """A model after some steps, the one it came from, and the embedding rows it had meanwhile."""
    torch.manual_seed(0)
    model, encoded, rows = Bert(TINY), texts(), []
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def objective(output, mask, batch, progress):
        rows.append(len(model.word_embeddings.weight))
        return {"hard": microbert.hard_loss(output.logits, (batch % 2).float())}

    config = settle(DistillConfig(device="cpu", precision="fp32", batch_size=8, clip=0.5,
                                  weight_decay=weight_decay))  # fmt: skip
    microbert.train(model, encoded, objective, config, Quiet(), epochs=3, lr=1e-2)
    return model.state_dict(), start, set(rows)


def test_words_that_do_not_occur_cost_and_change_nothing(monkeypatch):
    """Catches ids not renumbered, rows put back in the wrong place, and a table left small."""
    small, start, rows = trained()
    occur = np.unique(texts().ids)
    assert rows == {len(occur)} and len(occur) < TINY.vocab_size
    monkeypatch.setattr(microbert, "only_seen_words", lambda _, encoded: nullcontext(encoded))
    large, _, rows = trained()
    assert rows == {TINY.vocab_size}
    for name, tensor in large.items():
        torch.testing.assert_close(small[name], tensor, atol=1e-5, rtol=1e-4)
    words = small["word_embeddings.weight"]
    others = [i for i in range(TINY.vocab_size) if i not in occur]
    assert torch.equal(words[others], start["word_embeddings.weight"][others])
    moved = (words - start["word_embeddings.weight"]).abs().amax(1)
    assert (moved[occur] > 1e-4).all()


def test_a_frozen_or_interrupted_table_stays_whole():
    """Catches frozen embeddings that move, and a model left with a few words after an error."""
    model, encoded = Bert(TINY), texts()
    table = model.word_embeddings.weight.requires_grad_(False)
    before = table.clone()

    def objective(output, mask, batch, progress):
        if progress > 0.5:
            raise KeyboardInterrupt
        return {"hard": output.logits.square().mean()}

    config = settle(DistillConfig(device="cpu", precision="fp32", batch_size=8))
    with pytest.raises(KeyboardInterrupt):
        microbert.train(model, encoded, objective, config, Quiet(), epochs=3, lr=1e-2)
    assert model.word_embeddings.weight is table and torch.equal(table, before)
    assert not table.requires_grad and model(torch.tensor([[TINY.vocab_size - 1]])).logits.shape


def test_weight_decay_leaves_words_alone_that_do_not_occur():
    """Catches a decay of embeddings that no gradient holds up."""
    after, start, _ = trained(weight_decay=0.5)
    others = [i for i in range(TINY.vocab_size) if i not in texts().ids]
    name = "word_embeddings.weight"
    assert torch.equal(after[name][others], start[name][others])


# --- encoding ------------------------------------------------------------------------------------


def test_encoding_does_not_depend_on_chunks_or_version(tmp_path):
    """Catches segments lost where sentences and pairs meet, and an old tokenizers refused."""
    (tmp_path / "vocab.txt").write_text("\n".join(data.toy_vocabulary()))
    tokenizer = data.load_tokenizer(tmp_path)
    some = ["the soup", ("the bread was good", "bad"), "a", ("calm", "the the"), "good soup"]
    found = [data.encode(tokenizer, some, chunk) for chunk in (1, 2, 3, 100)]

    class Old:
        encode_batch = tokenizer.encode_batch

    found.append(data.encode(Old(), some))
    for other in found[1:]:
        for name in ("ids", "type_ids", "offsets"):
            assert np.array_equal(getattr(found[0], name), getattr(other, name))
    start, stop = found[0].offsets[1:3]
    assert found[0].type_ids[start:stop].tolist() == [0] * 6 + [1] * 2


# --- precision -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "features, expected",
    [({"avx512_bf16": True}, "bf16"), ({"amx_bf16": True}, "bf16"), ({"avx512_f": True}, "fp32")],
)
def test_bf16_trains_where_the_processor_has_it(monkeypatch, features, expected):
    """Catches slow emulation, and answers that depend on the processor."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: features, raising=False)
    assert settle(DistillConfig(device="cpu")).precision == expected
    assert settle(DistillConfig(device="cpu", checkpoint="somewhere")).precision == "fp32"
    assert settle(DistillConfig(device="cpu", precision="fp32")).precision == "fp32"
    answering = DistillConfig(device="cpu", precision="bf16", checkpoint="somewhere")
    assert settle(answering).precision == "bf16"


def test_an_old_torch_trains_in_fp32(monkeypatch):
    """Catches a torch that cannot name the processor's features."""
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    assert settle(DistillConfig(device="cpu")).precision == "fp32"


# --- several processes ---------------------------------------------------------------------------


@pytest.mark.parametrize("parts", [1, 2, 3, 70])
def test_processes_share_the_rows(parts):
    """Catches a text that is scored twice, or by nobody."""
    model, encoded = Bert(TINY), texts()
    config = DistillConfig(device="cpu", precision="fp32")
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


def losses(folder):
    events = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [[e[k] for k in ("loss", "hard", "soft", "align", "adv") if k in e]
            for e in events if "loss" in e]  # fmt: skip


@slow
def test_two_processes_follow_one(root, tmp_path):
    """Catches gradients of student or discriminator not averaged, batches not shared, a text
    scored twice, a cache with holes, and two processes that print or write the same.

    The batches are even: 8 of 8 rows.
    """
    made = ["--limit", "64", "--precision", "fp32", "--device", "cpu", "--seed", "1",
            "--batch-size", "8", "--log-every", "1"]  # fmt: skip
    alone, two = tmp_path / "alone", tmp_path / "two"
    assert main(["finetune", *made, "--epochs", "2", "--out", str(alone / "t")]) == 0
    made += ["--teacher", str(alone / "t"), "--epochs", "2", "--force", "--transfer-ratio", "1",
             "--no-baseline"]  # fmt: skip
    assert main([*made, "--out", str(alone / "s")]) == 0
    ran = torchrun(root, "microbert.py", *made, "--out", two / "s")
    assert ran.returncode == 0, ran.stderr
    assert len(losses(alone / "s")) == 32
    np.testing.assert_allclose(losses(two / "s"), losses(alone / "s"), atol=1e-5, rtol=0)
    assert ran.stdout.count("of teacher") == 1 and ran.stdout.count("student     1/32") == 1
    one, other = [json.loads((f / "s/results.json").read_text()) for f in (alone, two)]
    assert other["student"] == one["student"] and other["teacher"] == one["teacher"]
    assert not list(two.glob("s/cache*"))


@slow
def test_a_failing_process_ends_all_and_they_continue(root, tmp_path):
    """Catches a run that waits for ever for a process that is gone, or continues differently."""
    script = tmp_path / "fails.py"
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
    command = ["finetune", "--limit", "320", "--device", "cpu", "--log-every", "1", "--epochs", "2",
               "--save-every", "4", "--bert", bert_with_dropout(tmp_path), "--out"]  # fmt: skip
    ran = torchrun(root, script, *command, tmp_path / "out")
    assert ran.returncode != 0
    assert "error in process 1: the disk of this machine is gone" in ran.stderr
    assert not (tmp_path / "out/results.json").exists()
    continued = torchrun(root, "microbert.py", *command, tmp_path / "out")
    assert continued.returncode == 0, continued.stderr
    assert continued.stdout.count("teacher: continues after step 8") == 1
    assert torchrun(root, "microbert.py", *command, tmp_path / "whole").returncode == 0
    ends = [(tmp_path / f"{n}/teacher/model.safetensors").read_bytes() for n in ("out", "whole")]
    assert ends[0] == ends[1]


def bert_with_dropout(folder):
    """The built-in task's BERT as a checkpoint, its dropout not 0."""
    task = glue.Task("toy", ("sentence",), labels=("negative", "positive"))
    model = microbert.toy_bert(task, folder / "bert")
    model.config = microbert.replace(model.config, hidden_dropout_prob=0.1)
    microbert.save_bert(model, folder / "bert")
    return folder / "bert"


# --- the benchmark -------------------------------------------------------------------------------


def test_the_benchmark_counts_products(root):
    """Catches products that are missed, counted wrongly or not timed again."""
    sys.path.insert(0, str(root / "tests"))
    import bench

    products = bench.Products()
    first, second = torch.randn(3, 4, requires_grad=True), torch.randn(5, 4, requires_grad=True)
    with products:
        torch.nn.functional.linear(first, second).sum().backward()
    assert products.flops == 3 * 2 * 3 * 4 * 5  # forward, and one for each gradient
    assert sum(products.found.values()) == 3
    products.again()
