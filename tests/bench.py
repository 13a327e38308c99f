"""Ratios of speed: this code against `transformers`, the usual distillation loops and the machine.

    python tests/bench.py --bert all-MiniLM-L6-v2 --data-dir glue [--rows step,loops] [--json FILE]

Every ratio comes from alternating runs in one call, the median of --repeats (5); above 1 is in our
favour unless the row says otherwise. Beside it stand its limit, what the FLOPs of both sides would
allow (of matrix products, padding included) or the machine's own products, and the share of the
limit that is reached. `transformers` is needed only by the rows that name it. Leave the machine
alone meanwhile; of two torch processes at once each would lose far more than half.
"""

# ruff: noqa: E501

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import data  # noqa: E402
import glue  # noqa: E402
import microbert as mb  # noqa: E402

BATCH = 32
KEEP = (2, 4, 6)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Setting:
    """What the rows share: the checkpoint, the texts of two tasks, the number of repeats."""

    def __init__(self, options):
        self.bert, self.repeats = options.bert, options.repeats
        self.data_dir = options.data_dir
        self.tokenizer = data.load_tokenizer(self.bert)
        self.texts = {t: glue.read(t, self.data_dir, "train").texts for t in ("SST-2", "MRPC")}
        self.all = {t: data.encode(self.tokenizer, x) for t, x in self.texts.items()}
        self.encoded = {t: x.first(min(3584, len(x))) for t, x in self.all.items()}

    def teacher(self):
        torch.manual_seed(0)
        return mb.load_bert(self.bert, labels=("0", "1"))

    def config(self, precision):
        return mb.settle(mb.DistillConfig(device="cpu", precision=precision))

    def batches(self, task, count):
        """Rows of batches in random order."""
        order = np.random.default_rng(0).permutation(len(self.encoded[task]))
        return [order[i * BATCH : (i + 1) * BATCH] for i in range(count)]


def seconds(run):
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def alternate(runs, repeats):
    """Median seconds of each of these, run in turn after one unmeasured round."""
    taken = [[seconds(run) for run in runs] for _ in range(repeats + 1)][1:]
    return [statistics.median(column) for column in zip(*taken)]


def row(name, ratio, limit, target, detail):
    """limit: the best that the ratio could be, None where nothing says; less is better with <=."""
    share = limit and (limit / ratio if target.startswith("<") else ratio / limit)
    line = {"row": name, "ratio": round(ratio, 3), "limit": limit and round(limit, 3),
            "share": share and round(share, 3), "target": target, "detail": detail}  # fmt: skip
    told = f"{limit:6.2f} {100 * share:5.0f} %" if limit else " " * 14
    print(f"{name:66} {ratio:6.2f} {told}   {target:>8}   {detail}", flush=True)
    return line


def flops(config, layers, lengths, batches, pad=0):
    """Of the matrix products of a forward pass over these batches of rows, padding included."""
    hidden, total = config.hidden_size, 0
    for rows in batches:
        tokens = pad or lengths[rows].max()
        linear = 2 * (4 * hidden**2 + 2 * hidden * config.intermediate_size)
        total += len(rows) * tokens * layers * (linear + 4 * tokens * hidden)
    return total


# --- inference -----------------------------------------------------------------------------------


def forward(s):
    """Our encoder against transformers' on the same batches, and on batches as they come."""
    from transformers import AutoModelForSequenceClassification

    ours, folder = s.teacher().eval(), tempfile.mkdtemp()
    mb.save_bert(ours, folder, tokenizer_from=s.bert)
    theirs = AutoModelForSequenceClassification.from_pretrained(
        folder, attn_implementation="sdpa"
    ).eval()
    for precision in ("fp32", "bf16"):
        cast = torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16")
        for task in ("SST-2", "MRPC"):
            encoded = s.encoded[task]
            batches = [data.collate(encoded, rows) for rows in s.batches(task, 12)]
            sizes = encoded.lengths[:1024]
            sorted_rows = list(data.sorted_batches(sizes))
            random_rows = np.random.default_rng(0).permutation(1024).reshape(-1, BATCH)
            by, come = (flops(ours.config, 6, sizes, r) for r in (sorted_rows, random_rows))

            def run(model, batches=batches, cast=cast):
                with torch.no_grad(), cast:
                    for batch in batches:
                        model(**batch)

            def as_they_come(model, rows, encoded=encoded, cast=cast):
                with torch.no_grad(), cast:
                    for some in rows:
                        model(**data.collate(encoded, some))

            a, b = alternate([lambda: run(ours), lambda: run(theirs)], max(s.repeats, 9))
            yield row(f"forward, {task}, {precision}, same batches",
                      b / a, None, ">= 1.0", f"{12 * BATCH / a:.0f} and {12 * BATCH / b:.0f} ex/s")  # fmt: skip
            a, b = alternate(
                [
                    lambda: as_they_come(ours, sorted_rows),
                    lambda: as_they_come(theirs, random_rows),
                ],
                s.repeats,
            )
            yield row(f"forward, {task}, {precision}, sorted against as they come",
                      b / a, come / by, ">= 85 %", f"{1024 / a:.0f} and {1024 / b:.0f} ex/s")  # fmt: skip


def predict(s):
    """2,000 sentences of mixed lengths from file to file, models loaded on the way."""
    from transformers import pipeline
    from transformers.utils import logging

    logging.set_verbosity_error()
    pairs = s.texts["MRPC"][:1000]
    texts = s.texts["SST-2"][:1000] + [first for first, _ in pairs]
    random.Random(0).shuffle(texts)
    work = Path(tempfile.mkdtemp())
    student = mb.prune(s.teacher(), KEEP)
    mb.save_bert(student, work / "student", tokenizer_from=s.bert)
    lines = [f"{text}\t{i % 2}\n" for i, text in enumerate(texts)]
    for split in ("train", "dev", "test"):
        (work / f"{split}.tsv").write_text("sentence\tlabel\n" + "".join(lines), encoding="utf-8")

    def ours():
        config = mb.DistillConfig(
            checkpoint=str(work / "student"), task=str(work), split="test", device="cpu",
            out=str(work / "ours.tsv"),
        )  # fmt: skip
        mb.predict(mb.settle(config))

    def theirs():
        pipe = pipeline("text-classification", model=str(work / "student"), device="cpu")
        stored = (work / "test.tsv").read_text(encoding="utf-8").split("\n")[1:-1]
        found = pipe([line.split("\t")[0] for line in stored], batch_size=32, truncation=True)
        answers = "".join(f"{i}\t{answer['label']}\n" for i, answer in enumerate(found))
        (work / "theirs.tsv").write_text("index\tprediction\n" + answers)

    a, b = alternate([ours, theirs], s.repeats)
    same = (work / "ours.tsv").read_text() == (work / "theirs.tsv").read_text()
    lengths = data.encode(s.tokenizer, texts).lengths
    as_they_come = np.split(np.arange(len(texts)), range(BATCH, len(texts), BATCH))
    by, come = (
        flops(student.config, 3, lengths, r) for r in (data.sorted_batches(lengths), as_they_come)
    )
    yield row("predict, file to file, fp32, against a transformers pipeline", b / a, come / by,
              ">= 85 %",
              f"{2000 / a:.0f} and {2000 / b:.0f} ex/s, {'same' if same else 'OTHER'} answers")  # fmt: skip


def depth(s):
    """What half the layers save."""
    teacher = s.teacher().eval()
    student = mb.prune(teacher, KEEP).eval()
    for precision in ("fp32", "bf16"):
        for task in ("SST-2", "MRPC"):
            encoded, config = s.encoded[task].first(1024), s.config(precision)
            a, b = alternate(
                [
                    lambda e=encoded, c=config: mb.predict_logits(student, e, c),
                    lambda e=encoded, c=config: mb.predict_logits(teacher, e, c),
                ],
                s.repeats,
            )
            yield row(f"student of 3 layers, {task}, {precision}, of its 6-layer teacher's speed",
                      b / a, 2.0, ">= 1.9", f"{len(encoded) / a:.0f} and {len(encoded) / b:.0f} ex/s")  # fmt: skip


def start(s):
    """Time to the first answer of a new process."""
    work = Path(tempfile.mkdtemp())
    mb.save_bert(mb.prune(s.teacher(), KEEP), work / "student", tokenizer_from=s.bert)
    (work / "test.tsv").write_text("sentence\nhow long does it take\n")
    weights = work / "student/model.safetensors"
    least = f"import torch, tokenizers; torch.load({str(work / 'weights.pt')!r})"
    torch.save(mb.read_safetensors(weights), work / "weights.pt")
    ours = [ROOT / "microbert.py", "predict", work / "student", "--task", work, "--split", "test"]

    def run(*command):
        subprocess.run([sys.executable, *command], check=True, capture_output=True)

    a, b = alternate([lambda: run(*ours), lambda: run("-c", least)], max(s.repeats, 9))
    yield row("predict one sentence, of the time of imports and reading the weights (less is better)",
              a / b, 1.0, "<= 1.1", f"{a:.2f} and {b:.2f} s")  # fmt: skip


def encode(s):
    """Encoding to arrays against the tokenizers library alone."""
    texts = s.texts["SST-2"]
    a, b = alternate(
        [lambda: data.encode(s.tokenizer, texts), lambda: s.tokenizer.encode_batch(texts)],
        s.repeats,
    )
    yield row("encoding SST-2 train, of encode_batch's speed", b / a, 1.0, ">= 90 %",
              f"{len(texts) / a:.0f} and {len(texts) / b:.0f} texts/s")  # fmt: skip


# --- training ------------------------------------------------------------------------------------


def distillation(encoded, teacher, config):
    """Our objective with everything on, over a cache of these texts made here."""
    labels = torch.zeros(len(encoded))
    path = Path(tempfile.mkdtemp()) / "cache.f16"
    blocks = mb.layer_map(teacher.config.num_hidden_layers, len(KEEP))
    cache = mb.teacher_pass(teacher, encoded, labels, blocks, config, path)
    path.unlink()  # mapped still
    _, _, views, hidden = cache.features.shape
    experts = mb.SentenceExperts(len(KEEP), hidden, config.expert_size, 2, views // 3)
    return mb.Distillation(cache, experts.eval().requires_grad_(False), config)


def a_student(teacher):
    """Of half the layers, without dropout as a run trains it."""
    student = mb.prune(teacher, KEEP)
    mb.set_dropout(student, 0.0)
    return student


def train(model, encoded, objective, config, epochs=1):
    """`microbert.train`, saying nothing."""
    mb.train(model, encoded, objective, config, Quiet(None), epochs=epochs, lr=1e-5)


def step(s):
    """Steps of `microbert.train`, of the student and its teacher, against their matrix products."""
    for precision in ("fp32", "bf16"):
        for task in ("SST-2", "MRPC"):
            config, teacher = s.config(precision), s.teacher()
            some, student = s.encoded[task].first(12 * BATCH), a_student(teacher)
            full = distillation(some, teacher, config)
            labels = mb.of_labels(torch.zeros(len(some)), 2, config)
            with (
                mb.only_seen_words(student, s.all[task]) as seen,
                mb.only_seen_words(teacher, s.all[task]),
            ):
                run = partial(train, encoded=seen.first(len(some)), config=config)
                full_method = partial(run, student, objective=full)
                student_alone = partial(run, student, objective=labels)
                teacher_alone = partial(run, teacher, objective=labels)
                found = {do: Products() for do in (full_method, student_alone, teacher_alone)}
                for do, products in found.items():
                    with products:
                        do()
                a, b, c, *least = alternate(
                    [*found, *(products.again for products in found.values())], s.repeats
                )
            more = found[full_method].flops / found[student_alone].flops
            yield row(f"full-method step, {task}, {precision}, of fine-tuning's time (less is better)",
                      a / b, more, "<= 1.10", f"{1e3 * a / 12:.1f} and {1e3 * b / 12:.1f} ms")  # fmt: skip
            for name, taken, do, own in (
                ("full-method step", a, full_method, least[0]),
                ("teacher's step", c, teacher_alone, least[2]),
            ):
                rates = [found[do].flops / t / 1e9 for t in (taken, own)]
                yield row(f"{name}, {task}, {precision}, of its matrix products' own speed",
                          own / taken, 1.0, ">= 60 %", "{:.0f} and {:.0f} GFLOP/s".format(*rates))  # fmt: skip


class Products(TorchDispatchMode):
    """Collects the matrix products that are computed inside; `again` computes them alone."""

    def __init__(self):
        super().__init__()
        self.found, self.flops, self.tensors = {}, 0, {}

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        name = function.__name__.split(".")[0]
        if name in ("mm", "addmm", "bmm"):
            first, second = [a for a in arguments if isinstance(a, torch.Tensor)][-2:]
            key = (name, first.dtype, *((t.shape, t.stride()) for t in (first, second)))
            self.found[key] = self.found.get(key, 0) + 1
            self.flops += 2 * first.numel() * second.shape[-1]
        return function(*arguments, **(options or {}))

    def tensor(self, dtype, shape, stride):
        """One tensor for each shape and layout: the numbers do not matter."""
        if (dtype, shape, stride) not in self.tensors:
            self.tensors[dtype, shape, stride] = torch.empty_strided(
                shape, stride, dtype=dtype
            ).fill_(0.5)
        return self.tensors[dtype, shape, stride]

    def again(self):
        for (name, dtype, first, second), count in self.found.items():
            a, b = self.tensor(dtype, *first), self.tensor(dtype, *second)
            for _ in range(count):
                torch.bmm(a, b) if name == "bmm" else torch.mm(a, b)


def usual_loop(s, task, precision, *, fair):
    """The loop that most distillation code has, as a function of one batch of rows.

    The teacher's forward pass in every step, squared error of the hidden states token by token and
    KL of the softened answers; padded to 128 tokens and the default AdamW, or, made fair, padded
    to the longest of the batch and the fused AdamW.
    """
    teacher, cast = s.teacher().eval().requires_grad_(False), mb.autocast(s.config(precision))
    student = a_student(teacher).train()
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-5, fused=True if fair else None)
    encoded = s.encoded[task]

    def do(rows):
        batch = data.collate(encoded, rows)
        if not fair:
            batch = {k: F.pad(v, (0, 128 - v.shape[1])) for k, v in batch.items()}
        with cast:
            with torch.no_grad():
                wanted = teacher(**batch)
            output = student(**batch)
        loss = mb.soft_loss(output.logits.float(), wanted.logits.float(), 2.0)
        for layer, kept in enumerate(KEEP, 1):
            target = wanted.hidden_states[kept].float()
            loss = loss + F.mse_loss(output.hidden_states[layer].float(), target)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()

    return do


def loops(s):
    """Three epochs with one teacher pass against loops with a teacher in every step."""
    for precision in ("bf16", "fp32"):
        for task in ("SST-2", "MRPC"):
            config, teacher, encoded = s.config(precision), s.teacher(), s.encoded[task]
            count = 16 * BATCH
            some = encoded.first(count)
            usual = usual_loop(s, task, precision, fair=False)
            fair = usual_loop(s, task, precision, fair=True)
            student = a_student(teacher)

            def ours():
                objective = distillation(some, teacher, config)
                with mb.only_seen_words(student, some) as seen:
                    train(student, seen, objective, config, epochs=3)

            drawn = s.batches(task, 16)
            a, b, c = alternate(
                [ours, lambda: [usual(r) for r in drawn[:4]], lambda: [fair(r) for r in drawn]],
                s.repeats,
            )
            a, b, c = 3 * count / a, 4 * BATCH / b, count / c  # examples per second
            sizes, shape = encoded.lengths, teacher.config
            bucketed = data.bucketed_batches(some.lengths, BATCH, seed=0, epoch=0)
            asked = flops(shape, 6, sizes, data.sorted_batches(some.lengths))
            least = asked / 3 + flops(shape, 3 * 3, sizes, bucketed)  # backward counts twice
            for name, other, pad in (("speed", b, 128), ("made fair", c, 0)):
                limit = flops(shape, 6 + 3 * 3, sizes, drawn, pad) / least
                yield row(f"distillation, {task}, {precision}, of the usual loop's {name}",
                          a / other, limit, ">= 85 %", f"{a:.0f} and {other:.0f} ex/s")  # fmt: skip


class Quiet(mb.Log):
    """A log that says nothing."""

    def step(self, *_):
        pass


def with_peak(*command):
    """The lines that a command prints, and the peak resident memory of its processes in GB."""
    own = ("import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True); "
           "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)")  # fmt: skip
    command = [sys.executable, "-c", own, *map(str, command)]  # one that is small itself
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    *lines, peak = done.stdout.strip().split("\n")
    return lines, int(peak) / 1e6


def memory(s):
    """Peak resident memory of distilling all of SST-2, one pass over training and transfer text."""
    work = Path(tempfile.mkdtemp())
    mb.save_bert(s.teacher(), work / "teacher", tokenizer_from=s.bert)
    lines, peak = with_peak(
        sys.executable, ROOT / "microbert.py", "--task", "SST-2", "--data-dir", s.data_dir,
        "--teacher", work / "teacher", "--out", work / "run", "--epochs", "1", "--force",
        "--device", "cpu", "--no-baseline",
    )  # fmt: skip
    cache = next(line for line in lines if line.startswith("cache: /"))
    yield row("distilling SST-2, peak resident memory in GB (less is better)", peak, None, "<= 2.0",
              cache.replace(f"{work}/run/", ""))  # fmt: skip


def growth(s):
    """What a text costs in runs of a random teacher on generated texts, of a process each."""
    usual = {"texts": 10_000, "words": 12, "layers": 2, "classes": 2, "processes": 1}
    base, flat = None, "<= 1.1"
    for change, target in (
        ({}, flat), ({"texts": 100_000}, flat), ({"texts": 400_000}, flat), ({"words": 48}, ""),
        ({"layers": 8}, ""), ({"classes": 1000}, flat), ({"processes": 2}, ""),
    ):  # fmt: skip
        seconds, peak, count = generated_run(**usual | change)
        each = {name: seconds[name] / count for name in ("start", "cache", "student")}
        base = base or each
        name = ", ".join(f"{value:,} {key}" for key, value in (change or usual).items())
        told = [f"{k} {1e3 * t:.2f} ({t / base[k]:.2f})" for k, t in each.items()]
        yield row(f"{name}: time of a text, of the first row's", sum(each.values()) /
                  sum(base.values()), None, target, f"ms: {', '.join(told)}; peak {peak:.2f} GB")  # fmt: skip


def generated_run(texts, words, layers, classes, processes):
    """Seconds of the phases of a run and of all before them, peak memory in GB, texts."""
    with tempfile.TemporaryDirectory() as name:
        folder, rng, labels = Path(name), random.Random(0), [f"c{i}" for i in range(classes)]
        for file, content in data.toy_files().items():
            (folder / file).write_text(content)
        known = [word for word in data.toy_vocabulary() if len(word) > 3 and word.isalpha()]
        for split, count in (("train", texts), ("dev", 1000)):
            with (folder / f"{split}.tsv").open("w") as file:
                file.write("sentence\tlabel\n")
                for i in range(count):
                    file.write(f"{' '.join(rng.choices(known, k=words))}\t{labels[i % classes]}\n")
        shape = mb.BertConfig(len(data.toy_vocabulary()), 64, layers, 4, 256, labels=tuple(labels))
        mb.save_bert(mb.Bert(shape), folder / "teacher", tokenizer_from=folder)
        torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", processes]
        started = time.perf_counter()
        _, peak = with_peak(
            sys.executable, *torchrun * (processes > 1), ROOT / "microbert.py", "--task", folder,
            "--teacher", folder / "teacher", "--out", folder / "run", "--epochs", 1, "--force",
            "--device", "cpu", "--precision", "fp32", "--no-baseline", "--transfer-ratio", 0,
        )  # fmt: skip
        taken = time.perf_counter() - started
        seconds = json.loads((folder / "run/results.json").read_text())["seconds"]
        return seconds | {"start": taken - sum(seconds.values())}, peak, texts


ROWS = {
    f.__name__: f for f in (forward, predict, depth, start, encode, step, loops, memory, growth)
}
LONG = ("memory", "growth")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--bert", required=True, help="folder of all-MiniLM-L6-v2")
    parser.add_argument("--data-dir", required=True, help="folder of the GLUE files")
    parser.add_argument("--rows", default=",".join(r for r in ROWS if r not in LONG),
                        help="of " + ", ".join(ROWS) + " [all but these two, which take long]")  # fmt: skip
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", help="file to write the rows to as well")
    options = parser.parse_args()
    rows = options.rows.split(",")
    if unknown := [name for name in rows if name not in ROWS]:
        parser.error(f"--rows: no row {unknown[0]!r}, there are {', '.join(ROWS)}")
    if options.repeats < 1:
        parser.error(f"--repeats is {options.repeats}, expected at least 1")
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, CPU "
          f"{torch.backends.cpu.get_cpu_capability()}, batches of {BATCH}, medians of "
          f"{options.repeats}\n")  # fmt: skip
    print(f"{'row':66} {'ratio':>6} {'limit':>6} {'share':>7}   {'target':>8}   ours and theirs")
    try:
        s, found = Setting(options), []
    except (OSError, ValueError) as error:
        parser.error(str(error))
    for name in rows:
        found += ROWS[name](s)
        if options.json:
            about = {"torch": torch.__version__, "threads": torch.get_num_threads()}
            Path(options.json).write_text(json.dumps(about | {"rows": found}, indent=2) + "\n")


if __name__ == "__main__":
    main()
