"""The experiments behind tests/RESULTS.md: runs them, writes its tables, draws its picture.

python tests/experiments.py run --tasks MRPC,CoLA --seeds 0,1,2 --rows full,no-fal,tinybert
    --out runs/experiments --data-dir glue --bert path/to/bert [--results FILE] [any of distil's]
python tests/experiments.py cut --data-dir glue --out runs/cut
python tests/experiments.py tables
python tests/experiments.py draw

`cut` makes GLUE folders to choose in: a tenth of train, at most 2,000 texts, stands in for dev.
`run` trains `microbert.py ablate`'s rows, and the peers' recipes below, task by task and seed by
seed. A finished row is kept in OUT/TASK/seed-S/ROW at once and not run again; a seed's rows become
lines of tests/results.jsonl together, or of FILE. Seeds may run side by side. What has its line
is not run again: for that name another FILE, and another OUT.
`tables` (between the two marks of tests/RESULTS.md) and `draw` (tests/gates.svg) read that file
alone.
"""

import argparse
import json
import math
import random
import re
import shutil
import statistics
import subprocess
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import data  # noqa: E402
import glue  # noqa: E402
import microbert as m  # noqa: E402

RESULTS = HERE / "results.jsonl"
TASKS = ("MRPC", "STS-B", "CoLA", "SST-2")
PEERS = ("tinybert", "pkd")
COMPARED = {  # the README's table
    "teacher": "teacher, 12 layers", "full": "MicroBERT, 6 layers", "no-moe": "without experts",
    "no-fal": "without FAL", "gan": "with the discriminator",
    "no-soft": "without soft targets", "no-transfer": "without transfer text",
}  # fmt: skip
START, END = "<!-- tables: python tests/experiments.py tables -->\n\n", "<!-- end -->"


# --- the peers' recipes --------------------------------------------------------------------------


class TinyBert:
    """Jiao et al. 2020 (arXiv:1909.10351), its task-specific stage.

    First embeddings, hidden states and attention scores token by token, then the soft labels at
    temperature 1; no hard labels.

    The first stage runs the teacher in every step, since nothing token-level can be kept for
    100,000 texts; the second, which is given the teacher's logits (n, C), does not.
    """

    def __init__(self, teacher, student, encoded, layers, config, logits=None):
        self.teacher, self.student, self.encoded = teacher.eval(), student, encoded
        self.layers, self.config, self.logits = layers, config, logits

    def __call__(self, output, mask, rows, progress):
        if self.logits is not None:
            return {"soft": m.soft_loss(output.logits.float(), self.logits[rows], 1.0)}
        batch = data.collate(self.encoded, rows.numpy())
        with torch.no_grad(), m.autocast(self.config):
            target = self.teacher(**batch)
        seen = mask.unsqueeze(-1).float()  # (B, T, 1)
        pair = (seen @ seen.transpose(1, 2)).unsqueeze(1)  # (B, 1, T, T)
        hidden = attention = torch.zeros(())
        for student_layer, teacher_layer in enumerate((0, *self.layers)):
            own = output.hidden_states[student_layer].float()
            wanted = target.hidden_states[teacher_layer].float()
            hidden = hidden + ((own - wanted).square() * seen).mean(-1).sum() / seen.sum()
        for student_layer, teacher_layer in enumerate(self.layers, 1):
            scores = [
                self.scores(model, output.hidden_states[layer - 1], layer - 1)
                for model, output, layer in (
                    (self.student, output, student_layer),
                    (self.teacher, target, teacher_layer),
                )
            ]
            distance = (scores[0] - scores[1].detach()).square() * pair  # (B, N, T, T)
            attention = attention + distance.mean(1).sum() / pair.sum()
        return {"hidden": hidden, "attention": attention}

    def scores(self, model, hidden, index):
        """A layer's attention before its softmax, (B, N, T, T), from what went into it."""
        layer = model.layers[index]
        with m.autocast(self.config):
            shape = (*hidden.shape[:2], layer.heads, -1)
            query = layer.query(hidden).view(shape).transpose(1, 2)  # (B, N, T, H / N)
            key = layer.key(hidden).view(shape).transpose(1, 2)
            return (query @ key.transpose(-1, -2)).float() * query.shape[-1] ** -0.5


def two_stages(texts, epochs):
    """Rows and passes of TinyBERT's stages: half of the passes each, or of one pass's texts."""
    order, half = np.arange(len(texts)), (len(texts) + 1) // 2
    if epochs > 1:
        return [(order, epochs - epochs // 2), (order, epochs // 2)]
    order = np.random.default_rng(0).permutation(order)
    return [(order[:half], 1), (order[half:], 1)]


def some(encoded, rows):
    """These texts of them, in this order."""
    spans = [slice(*encoded.offsets[row : row + 2]) for row in rows]
    ids, types = (np.concatenate([a[s] for s in spans]) for a in (encoded.ids, encoded.type_ids))
    return data.Encoded(ids, types, np.cumsum([0, *encoded.lengths[rows]]))


class Pkd:
    """Sun et al. 2019 (arXiv:1908.09355), PKD-skip.

    Hard labels, soft targets, and the normalised [CLS] of all layers but the last, beta 100.
    """

    def __init__(self, cache, config):
        self.cache, self.config = cache, config
        classes = cache.logits.shape[1]
        self.offset = m.class_offset(cache.labels, classes, config.logit_adjustment)

    def __call__(self, output, mask, rows, progress):
        logits, share = output.logits.float(), self.config.soft_weight
        labels, target = self.cache.labels[rows], self.cache.logits[rows].float()
        terms = {
            "hard": (1 - share) * m.hard_loss(logits, labels, self.offset),
            "soft": share * m.soft_loss(logits, target, self.config.temperature),
        }
        own = torch.stack([h[:, 0].float() for h in output.hidden_states[1:-1]], dim=1)  # (B, K, H)
        wanted = self.cache.features[rows][:, :-1, -3].float()  # (B, K, H), standardised
        own = F.layer_norm(own, own.shape[-1:])
        unit = own.shape[-1] ** 0.5  # a standardised vector's length
        terms["patience"] = 100 * F.mse_loss(own / unit, wanted / unit)
        return terms


def peer_stages(name, run, cache, encoded, teacher, student, layers):
    """Objective, texts and passes of a peer's trainings, together as many updates as ours."""
    config, epochs = run.config, m.student_lesson(run, cache, None).epochs
    if name == "pkd":
        return [(Pkd(cache, config), encoded, epochs)]
    stages = []
    for predicting, (rows, passes) in enumerate(two_stages(encoded, epochs)):
        logits, part = cache.logits[rows].float() if predicting else None, some(encoded, rows)
        stages.append((TinyBert(teacher, student, part, layers, config, logits), part, passes))
    return stages


def train_peers(config, names):
    """Results of the peers' students: same teacher, texts, shape and number of updates as ours."""
    run, teacher = m.start(config)
    config, log, (center, spread) = run.config, run.log, run.unit
    with log.timed("teacher", "as it was given"):
        wanted = m.score(run, "teacher", teacher)
        (cache, _), encoded = m.ask(run, teacher), run.encoded
    depth, reached = teacher.config.num_hidden_layers, run.results["teacher"]["score"]
    own = m.start_layers(config, depth)
    aligned = tuple(block[-1] for block in m.layer_map(depth, len(own)))
    lesson = m.student_lesson(run, cache, None)
    updates = lesson.epochs * math.ceil(len(lesson.texts) / config.batch_size)
    for name in names:
        keep = aligned if name == "tinybert" else own
        student = m.prune(teacher.cpu(), keep)
        m.set_dropout(student, 0.0)
        with log.timed(name, f"a student of layers {', '.join(map(str, keep))}"):
            stages = peer_stages(name, run, cache, encoded, teacher, student, aligned)
            for objective, part, passes in stages:
                m.train(student, part, objective, config, log, epochs=passes, lr=config.lr)
            m.rescale(student, spread, center)
            given = m.score(run, name, student)
        speeds = m.examples_per_second([teacher, student], run)
        yield {
            "row": name, "seed": config.seed, **run.results[name],
            "retention": run.results[name]["score"] / reached, "speed_up": speeds[1] / speeds[0],
            "distance": m.soft_loss(given / spread, wanted / spread).item(), "updates": updates,
            "seconds": round(log.seconds[name], 1),
        }  # fmt: skip
    m.sweep(run.out)


# --- what to choose on, and by -------------------------------------------------------------------


def cut(data_dir, out):
    """OUT/TASK/{train,dev}.tsv of each task: dev by a hash of train's texts, train without them.

    No sentence of dev is left in train. The real dev is nowhere in OUT; other splits are copied.
    """
    tasks = [name for name in glue.TASKS if (data_dir / name / "train.tsv").exists()]
    if not tasks:
        raise FileNotFoundError(f"{data_dir}: no TASK/train.tsv in it, expected GLUE's folders")
    for task in tasks:
        source, texts = data_dir / task, glue.read(task, data_dir, "train").texts
        numbers = glue._table(source / "train.tsv", task, "train")[0]
        lines = glue._lines(source / "train.tsv")
        lowest = glue.lowest_hashes(texts, max(1, min(len(texts) // 10, 2000)))
        chosen = {text for text, low in zip(texts, lowest) if low}
        known = set(data.sentences_of(chosen))
        rest = {text for text in texts if known.isdisjoint(data.sentences_of([text]))}
        (out / task).mkdir(parents=True, exist_ok=True)
        for split, kept in (("train", rest), ("dev", chosen)):
            own = [lines[n - 1] for n, text in zip(numbers, texts) if text in kept]
            content = "\n".join([*lines[: numbers[0] - 1], *own, ""])
            (out / task / f"{split}.tsv").write_text(content, encoding="utf-8")
        if (source / "test.tsv").exists():
            shutil.copy(source / "test.tsv", out / task)


def unseen(config, task, texts, tokenizer, words, count=4000):
    """Transfer texts of another seed that a run of this config has not learnt from.

    A row that has no transfer text is asked about the same ones as `full`.
    """
    config = replace(config, soft=True, transfer_ratio=config.transfer_ratio or -1.0)
    near, ratio = data.near_words(tokenizer, words, texts), 2 * count / len(texts)
    other = replace(config, seed=config.seed + 10**6, transfer="", transfer_ratio=ratio)
    drawn, learnt = (m.gather_transfer(c, task, texts, near) for c in (other, config))
    return random.Random(0).sample(sorted({*drawn} - {*learnt}, key=str), count)


@cache
def questions(config, folder):
    """Settled config, unit of the scores; tokens and teacher's logits of dev and `unseen` texts.

    Once for all rows of a seed that have the same transfer text.
    """
    config, task, train, dev = m.read_task(config)
    source = m.checkpoint_folder(config.bert or config.teacher, "teacher")
    words = m.load_bert(source, ("a", "b")).word_embeddings.weight.detach()
    tokenizer = data.load_tokenizer(folder / "teacher", config.max_length)
    teacher = m.load_bert(folder / "teacher")
    fresh = unseen(config, task, train.texts, tokenizer, words)
    asked = {"dev": data.encode(tokenizer, dev.texts), "unseen": data.encode(tokenizer, fresh)}
    told = {split: (e, m.predict_logits(teacher, e, config)) for split, e in asked.items()}
    return config, m.score_unit(task, train.labels)[1], told


def apart(config, folder, row):
    """How far a student is from its teacher, on dev and on `unseen` texts; gates, seconds."""
    stored = json.loads((folder / row / "results.json").read_text(encoding="utf-8"))
    found = {"phases": stored["seconds"]}
    if "gates" in stored:
        found["gates"] = stored["gates"]
    config, spread, told = questions(config, folder)
    student = m.load_bert(folder / f"{row}/student")
    for split, (encoded, answers) in told.items():
        own = m.predict_logits(student, encoded, config).double() / spread
        wanted = answers.double() / spread
        found[f"{split}_distance"] = m.soft_loss(own, wanted).item()
        if own.shape[1] > 1:
            same = own.argmax(1) == wanted.argmax(1)
            found[f"{split}_agreement"] = 100 * same.float().mean().item()
    return found


# --- running -------------------------------------------------------------------------------------


def results(file=None):
    """Every line of results.jsonl, or of another file; ValueError for a line that is no run's."""
    file, found = file or RESULTS, []
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    for number, line in enumerate(lines, 1):
        if not re.fullmatch(r'\{"task": .*"row": .*"seed": .*\}', line):
            raise ValueError(f"{file}:{number}: '{line[:40]}', expected a line that `run` wrote")
        found.append(json.loads(line))
    return found


def run(tasks, seeds, rows, options, file):
    """Trains what the file of results lacks, all rows of a task and seed in turn."""
    commit, changed = (
        subprocess.run(["git", *words], cwd=HERE, capture_output=True, text=True).stdout.strip()
        for words in (["rev-parse", "--short=7", "HEAD"],
                      ["status", "--porcelain", "-uno", "--", ":/", f":!/tests/{RESULTS.name}"])
    )  # fmt: skip
    commit += "-dirty" * bool(changed)
    file.parent.mkdir(parents=True, exist_ok=True)
    ours = [row for row in rows if row not in PEERS]
    for seed in seeds:
        for task in tasks:
            _, config = m.parse(["ablate", "--task", task, *options, "--seeds", str(seed)])
            out = Path(config.out) / task
            kept = [w for w in options if w not in ("--out", config.out)]

            def note(found, task=task, seed=seed, kept=kept, config=config, out=out):
                """Appends what is not there yet."""
                known = {(r["task"], r["seed"], r["row"]) for r in results(file)}
                for result in found:
                    if (task, result["seed"], result["row"]) not in known:
                        if result["row"] not in ("teacher", *PEERS):
                            teacher = config.teacher.replace("{seed}", str(seed))
                            asked = replace(config, teacher=teacher, seed=seed)
                            row = m.row_config(asked, result["row"])
                            asked = replace(
                                asked, transfer=row.transfer, transfer_ratio=row.transfer_ratio
                            )  # all of a row that its text depends on
                            result |= apart(asked, out / f"seed-{seed}", result["row"])
                        line = {"task": task, **result, "options": kept, "commit": commit}
                        with file.open("a", encoding="utf-8") as lines:
                            lines.write(json.dumps(line) + "\n")

            known = {r["row"] for r in results(file) if (r["task"], r["seed"]) == (task, seed)}
            if there := ", ".join(row for row in rows if row in known):
                print(f"{task}, seed {seed}: {file} has {there}; --results FILE to run it again")
            if new := [row for row in ours if row not in known]:
                found = m.ablate(replace(config, out=str(out), rows=" ".join(new)))["runs"]
                note(result for result in found if result["seed"] == seed)
            if left := [row for row in rows if row not in (*ours, *known)]:
                given = config.teacher.replace("{seed}", str(seed))
                asked = replace(
                    config, bert="", teacher=given or str(out / f"seed-{seed}/teacher"), seed=seed,
                    out=str(out / f"peers-{seed}"), overwrite=True, baseline=False,
                )  # fmt: skip
                for result in train_peers(asked, left):
                    note([result])


# --- tables and picture --------------------------------------------------------------------------


def by_seed(found, row, task, key):
    """What each seed got."""
    return {r["seed"]: r[key] for r in found if (r["task"], r["row"]) == (task, row) and key in r}


def standard_error(numbers):
    """Of their mean."""
    return statistics.stdev(numbers) / len(numbers) ** 0.5


def shown(values, digits, unit=1, error=statistics.stdev, sign=""):
    """mean ± error (n) of what each seed got, in a table's cell."""
    if not values:
        return "–"
    own = [unit * value for value in values.values()]
    beside = f" ± {error(own):.{digits}f}" if len(own) > 1 else ""
    return f"{statistics.fmean(own):{sign}.{digits}f}{beside} ({len(own)})"


def apart_by(own, full, digits, unit=1):
    """own - full over the seeds that both have: mean ± standard error (n)."""
    gaps = {seed: own[seed] - full[seed] for seed in own if seed in full}
    return shown(gaps, digits, unit, standard_error, "+")


def table(title, *rows):
    """A Markdown table under its title; the first row of cells is its heading. Or nothing."""
    lines = [f"| {' | '.join(cells)} |" for cells in rows]
    if len(lines) < 2:
        return ""
    lines.insert(1, "|---" * len(rows[0]) + "|")
    return "\n".join([f"### {title}\n", *lines, "\n"])


def compared(found, tasks):
    """The README's table: scores, and how far each row is from its teacher."""
    lines = [["", *tasks, *(f"distance, {task}" for task in tasks)]]
    for row, name in COMPARED.items():
        scores = [by_seed(found, row, task, "score") for task in tasks]
        gaps = [by_seed(found, row, task, "dev_distance") for task in tasks]
        if any(scores):
            cells = [*(shown(s, 1) for s in scores), *(shown(g, 3) for g in gaps)]
            lines.append([name, *cells])
    return table("Compared", *lines)


def every_row(found, title, key, unit, digits, rows, tasks):
    """One number of every row that has it, task by task."""
    lines = [["", *tasks]]
    for row in rows:
        cells = [shown(by_seed(found, row, task, key), digits, unit) for task in tasks]
        if {*cells} != {"–"}:
            lines.append([row, *cells])
    return table(title, *lines)


def differences(found, title, key, unit, digits, rows, tasks):
    """How far each row is above full, seed by seed, task by task."""
    lines = [["", *tasks]]
    for row in (row for row in rows if row not in ("teacher", "full")):
        pairs = [[by_seed(found, r, task, key) for r in (row, "full")] for task in tasks]
        lines.append([row, *(apart_by(*pair, digits, unit) for pair in pairs)])
    return table(title, *lines)


def targets(found, tasks):
    """What was to be reached by the row `full`, and what was: mean ± standard error (n).

    A whole run is its teacher's fine-tuning too, if that was timed at the same commit; the student
    on labels alone, which `distill` trains for comparison, is not in it.
    """
    taught = {(r["task"], r["seed"], r["commit"]): r for r in found if r["row"] == "teacher"}
    full = [dict(r) for r in found if r["row"] == "full"]
    for r in full:
        if alone := taught.get((r["task"], r["seed"], r["commit"])):
            spent = sum(s for name, s in r["phases"].items() if name != "teacher")
            r["whole"] = 1 + spent / alone["seconds"]
    lines = [["", "target", *tasks]]
    for key, digits, unit, target, name in (
        ("unseen_distance", 3, 1, "≤ 0.15 on MRPC and CoLA", "distance on unseen text"),
        ("unseen_agreement", 1, 1, "≥ 92", "agreement on unseen text, %"),
        ("whole", 2, 1, "≤ 3", "a whole run, in times of its teacher's fine-tuning"),
        ("retention", 1, 100, "≥ 101.14 on the mean of the tasks", "% of the teacher's score"),
    ):
        got = [by_seed(full, "full", task, key) for task in tasks]
        lines.append([name, target, *(shown(own, digits, unit, standard_error) for own in got)])
    return table("Targets", *lines)


def tables():
    """Writes the tables of tests/RESULTS.md anew, between its two marks."""
    found, file = results(), HERE / "RESULTS.md"
    had = dict.fromkeys(r["row"] for r in found)
    rows = [row for row in dict.fromkeys([*COMPARED, *PEERS, *had]) if row in had]
    tasks = [task for task in TASKS if any(r["task"] == task for r in found)]
    made = [compared(found, tasks), targets(found, tasks)]
    for kind, title in (("dev", "on dev"), ("unseen", "on unseen transfer text")):
        key = f"{kind}_distance"
        made.append(differences(found, f"Distance {title}, minus full's", key, 1, 4, rows, tasks))
        made.append(every_row(found, f"Distance {title}", key, 1, 3, rows, tasks))
        key = f"{kind}_agreement"
        made.append(every_row(found, f"Agreement {title}, %", key, 1, 1, rows, tasks))
    made += [
        differences(found, "Score, minus full's", "score", 1, 2, rows, tasks),
        every_row(found, "Score", "score", 1, 2, rows, tasks),
        every_row(found, "% of the teacher's score", "retention", 100, 1, rows, tasks),
        every_row(found, "Minutes of training", "seconds", 1 / 60, 1, rows, tasks),
    ]
    before, rest = file.read_text(encoding="utf-8").split(START)
    file.write_text(before + START + "".join(made) + END + rest.split(END)[1], encoding="utf-8")


def draw():
    """tests/gates.svg: how much each view of each teacher layer weighs for a student's layers."""
    found = [r for r in results() if r["row"] == "full" and "gates" in r]
    if not found:
        raise ValueError(f"{RESULTS}: no run of the row `full` to draw, see `run`")
    tasks = [task for task in TASKS if any(r["task"] == task for r in found)]
    means = {t: np.mean([r["gates"] for r in found if r["task"] == t], axis=0) for t in tasks}
    layers, views = next(iter(means.values())).shape
    width, height = max(440, 40 + len(tasks) * (36 * views + 24)), 84 + 22 * layers
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        'font-family="sans-serif" font-size="11" text-anchor="middle">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        f'<text x="14" y="{height / 2}" transform="rotate(-90 14 {height / 2})">'
        "student's layer</text>",
    ]
    for place, (task, gates) in enumerate(means.items()):
        left = 40 + place * (36 * views + 24)
        parts.append(f'<text x="{left + 18 * views}" y="16" font-size="13">{task}</text>')
        for k, row in enumerate(gates):
            down = 24 + 22 * (layers - 1 - k)
            parts.append(f'<text x="{left - 8}" y="{down + 15}">{k + 1}</text>')
            for e, weight in enumerate(row):
                shade = round(255 * (1 - min(weight * 2, 1)))
                ink = "white" if weight > 0.25 else "#333"
                parts.append(f'<rect x="{left + 36 * e}" y="{down}" width="35" height="21" '
                             f'fill="rgb({shade},{shade},255)"/>')  # fmt: skip
                parts.append(f'<text x="{left + 36 * e + 17}" y="{down + 15}" '
                             f'fill="{ink}">{weight:.2f}</text>')  # fmt: skip
        for e in range(views):
            at = left + 36 * e + 17
            parts.append(f'<text x="{at}" y="{height - 44}">{("cls", "max", "mean")[e % 3]}</text>')
        for block in range(views // 3):
            at = left + 108 * block + 54
            which = "last layer" if 3 * block + 3 == views else f"layer {block + 1}"
            what = f"its block's {which}"
            parts.append(f'<text x="{at}" y="{height - 28}" fill="#666">{what}</text>')
    told = "weight of each view of the teacher's layers in the gate (mean over seeds)"
    parts.append(f'<text x="{width / 2}" y="{height - 8}">{told}</text>')
    (HERE / "gates.svg").write_text("\n".join([*parts, "</svg>\n"]), encoding="utf-8")


def act(command, words):
    """Runs a command; returns the exit code."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    if command == "cut":
        parser.add_argument("--data-dir", type=Path, default=Path("glue"))
        parser.add_argument("--out", type=Path, required=True)
        cut(**vars(parser.parse_args(words)))
    elif command == "tables":
        tables()
    elif command == "draw":
        draw()
    elif command == "run":
        parser.add_argument("--tasks", default=",".join(TASKS))
        parser.add_argument("--seeds", default="0,1,2")
        parser.add_argument("--rows", default=",".join([*COMPARED][1:]))
        parser.add_argument("--results", type=Path, default=RESULTS)
        asked, rest = parser.parse_known_args(words)
        seeds = [int(seed) for seed in m.DistillConfig(seeds=asked.seeds).seeds.split(",")]
        rows = re.split(r"[\s,]+(?=[a-z])", asked.rows)
        run(asked.tasks.split(","), seeds, rows, rest, asked.results)
    else:
        print(__doc__, file=sys.stderr)
        return 2
    return 0


def main(argv):
    """The same; what is wrong with files or options is one line on stderr and exit code 2."""
    command, *words = argv or [""]
    try:
        return act(command, words)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
