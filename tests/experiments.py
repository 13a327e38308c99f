"""The experiments behind tests/RESULTS.md: runs them, writes its tables, draws its picture.

python tests/experiments.py run --tasks MRPC,CoLA --seeds 0,1,2 --rows full,soft-only,tinybert
    --out runs/experiments --data-dir glue --bert path/to/bert [any option of distil]
python tests/experiments.py cut --data-dir glue --out runs/cut
python tests/experiments.py tables
python tests/experiments.py draw

`cut` makes GLUE folders to choose in: a tenth of train, at most 2,000 texts, stands in for dev.
`run` trains `microbert.py ablate`'s rows, and the peers' recipes below, task by task and seed by
seed. Every finished student is a line of tests/results.jsonl at once and is not run again.
`tables` (between the two marks of tests/RESULTS.md) and `draw` (tests/results.svg) read that file
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
TASKS = ("SST-2", "MRPC", "STS-B", "CoLA")  # the average is over these
PEERS = ("tinybert", "pkd")
ABLATED = ("full", "no-moe", "no-fal", "no-gan", "no-soft", "no-transfer", "soft-only",
           "soft-only+no-transfer", "labels-only")  # fmt: skip
SIZES = ("layers=1", "layers=2", "full", "layers=4", "layers=5")
COMPARED = {  # the README's table
    "teacher": "teacher, 6 layers", "full": "MicroBERT, 3 layers",
    "soft-only": "soft targets alone, 3", "pkd": "PKD's recipe, 3",
    "tinybert": "TinyBERT's recipe, 3", "labels-only": "labels alone, 3",
    "layers=2": "MicroBERT, 2 layers", "layers=4": "MicroBERT, 4 layers",
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
    """Objective, texts and passes of a peer's trainings: as many updates as ours in each."""
    config, ours = run.config, m.student_stages(run, cache, None)
    labelled, again = encoded.first(len(run.labels)), sum(stage.epochs for stage in ours[1:])
    if name == "pkd":
        objective = Pkd(cache, config)
        return [(objective, encoded, ours[0].epochs), (objective, labelled, again)]
    stages = []
    for predicting, (rows, passes) in enumerate(two_stages(encoded, ours[0].epochs)):
        logits, part = cache.logits[rows].float() if predicting else None, some(encoded, rows)
        stages.append((TinyBert(teacher, student, part, layers, config, logits), part, passes))
    soft = cache.logits[: len(labelled)].float()
    return [*stages, (TinyBert(teacher, student, labelled, layers, config, soft), labelled, again)]


def train_peers(config, names):
    """Results of the peers' students: same teacher, texts, shape and number of updates as ours."""
    run, teacher = m.start(config)
    config, log, (center, spread) = run.config, run.log, run.unit
    with log.timed("teacher", "as it was given"):
        wanted = m.score(run, "teacher", teacher)
        (cache, _), encoded = m.ask(run, teacher), run.encoded
    depth, reached = teacher.config.num_hidden_layers, run.results["teacher"]["score"]
    own = m.start_layers(config, depth, pairs=run.task.pairs)
    aligned = tuple(block[-1] for block in m.layer_map(depth, len(own)))
    updates = sum(
        stage.epochs * math.ceil(stage.texts / config.batch_size)
        for stage in m.student_stages(run, cache, None)
    )
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
    """Transfer texts of another seed that a run of this config has not learnt from."""
    near, ratio = data.near_words(tokenizer, words, texts), 2 * count / len(texts)
    other = replace(config, seed=config.seed + 10**6, transfer="", transfer_ratio=ratio)
    drawn, learnt = (m.gather_transfer(c, task, texts, near) for c in (other, config))
    return random.Random(0).sample(sorted({*drawn} - {*learnt}, key=str), count)


def apart(config, folder, row):
    """How far a student is from its teacher, on dev and on `unseen` texts."""
    config, task, train, dev = m.read_task(config)
    source = m.checkpoint_folder(config.bert or config.teacher, "teacher")
    words = m.load_bert(source, ("a", "b")).word_embeddings.weight.detach()
    tokenizer, found = data.load_tokenizer(folder / "teacher", config.max_length), {}
    models = [m.load_bert(folder / part) for part in (f"{row}/student", "teacher")]
    fresh = unseen(config, task, train.texts, tokenizer, words)
    _, spread = m.score_unit(task, train.labels)
    for split, texts in (("dev", dev.texts), ("unseen", fresh)):
        encoded = data.encode(tokenizer, texts)
        own, wanted = (m.predict_logits(x, encoded, config).double() / spread for x in models)
        found[f"{split}_distance"] = m.soft_loss(own, wanted).item()
        if len(task.labels):
            same = own.argmax(1) == wanted.argmax(1)
            found[f"{split}_agreement"] = 100 * same.float().mean().item()
    return found


# --- running -------------------------------------------------------------------------------------


def results():
    """Every line of results.jsonl."""
    lines = RESULTS.read_text(encoding="utf-8").splitlines() if RESULTS.exists() else []
    return [json.loads(line) for line in lines]


def run(tasks, seeds, rows, options):
    """Trains what results.jsonl lacks, all rows of a task and seed in turn."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=7", "--exclude=*"]
    commit = subprocess.run(command, cwd=HERE, capture_output=True, text=True).stdout.strip()
    ours = [row for row in rows if row not in PEERS]
    for seed in seeds:
        for task in tasks:
            _, config = m.parse(["ablate", "--task", task, *options, "--seeds", str(seed)])
            out = Path(config.out) / task
            kept = [w for w in options if w not in ("--out", config.out)]

            def note(found, task=task, seed=seed, kept=kept, config=config, out=out):
                """Appends what is not there yet."""
                known = {(r["task"], r["seed"], r["row"]) for r in results()}
                for result in found:
                    if (task, result["seed"], result["row"]) not in known:
                        if result["row"] not in ("teacher", *PEERS):
                            teacher = config.teacher.replace("{seed}", str(seed))
                            asked = m.row_config(replace(config, teacher=teacher), result["row"])
                            asked = replace(asked, seed=seed)
                            result |= apart(asked, out / f"seed-{seed}", result["row"])
                        line = {"task": task, **result, "options": kept, "commit": commit}
                        with RESULTS.open("a", encoding="utf-8") as file:
                            file.write(json.dumps(line) + "\n")

            known = {r["row"] for r in results() if (r["task"], r["seed"]) == (task, seed)}
            for row in (row for row in ours if row not in known):
                note(m.ablate(replace(config, out=str(out), rows=row))["runs"])
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


def average(found, row, key="retention"):
    """100 times the mean over the tasks, {seed: mean}, of the seeds that have all tasks."""
    kept = [by_seed(found, row, task, key) for task in TASKS]
    seeds = sorted(set.intersection(*map(set, kept)))
    return {seed: 100 * statistics.fmean(k[seed] for k in kept) for seed in seeds}


def ratio_of_means(found, row):
    """The mean score in percent of the teacher's mean score, of each seed that has all tasks."""
    teacher = average(found, "teacher", "score")
    return [100 * mean / teacher[s] for s, mean in average(found, row, "score").items()]


def spread(values, digits):
    """mean ± sd, in a table's cell."""
    sd = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.{digits}f}{sd}"


def shown(values, digits):
    """mean ± sd (n), in a table's cell."""
    return f"{spread([*values], digits)} ({len(values)})" if values else "–"


def lead(full, own):
    """full - own over the seeds that both have, in a table's cell: mean ± standard error (n)."""
    gains = [full[seed] - own[seed] for seed in full if seed in own]
    if not gains:
        return "–"
    error = f" ± {statistics.stdev(gains) / len(gains) ** 0.5:.2f}" if len(gains) > 1 else ""
    return f"{statistics.fmean(gains):+.2f}{error} ({len(gains)})"


def table(title, *rows):
    """A Markdown table under its title; the first row of cells is its heading."""
    lines = [f"| {' | '.join(cells)} |" for cells in rows]
    lines.insert(1, "|---" * len(rows[0]) + "|")
    return "\n".join([f"### {title}\n", *lines, "\n"])


def overview(found, title, key, unit, names, seeds=None):
    """Tasks, speed and share kept of these rows, over the seeds that have all tasks, or `seeds`."""
    rows = []
    for row, name in names.items():
        wanted = average(found, row, key) if seeds is None else seeds
        own = [r for r in found if r["row"] == row and r["task"] in TASKS and r["seed"] in wanted]
        if own:
            cells = [spread([unit * r[key] for r in own if r["task"] == t], 1) for t in TASKS]
            speed = statistics.fmean(r.get("speed_up", 1) for r in own)  # the teacher's is 1
            kept = [mean for seed, mean in average(found, row).items() if seed in wanted]
            rows.append([name, *cells, f"{speed:.2f}", spread(kept or [100], 1), str(len(wanted))])
    return table(title, ["", *TASKS, "times as fast", "% kept", "seeds"], *rows)


def every_row(found, title, key, unit, digits, rows, tasks):
    """One number of every row that has it, task by task."""
    lines, more = [], ["mean of the four", "ratio of means"] * (key == "retention")
    for row in rows:
        cells = [[unit * n for n in by_seed(found, row, t, key).values()] for t in tasks]
        means = [average(found, row).values(), ratio_of_means(found, row)] if more else []
        if any(cells):
            lines.append([row, *(shown(c, digits) for c in cells), *(shown(c, 2) for c in means)])
    return table(title, ["", *tasks, *more], *lines)


def leads(found, title, rows, tasks):
    """How far full is ahead of each row, in points of score and of the mean percentage kept."""
    lines = [["", *tasks, "% kept, mean of the four"]]
    for row in rows:
        pairs = [[by_seed(found, r, t, "score") for r in ("full", row)] for t in tasks]
        pairs.append([average(found, r) for r in ("full", row)])
        lines.append([row, *(lead(*pair) for pair in pairs)])
    return table(title, *lines)


def tables():
    """Writes the tables of tests/RESULTS.md anew, between its two marks."""
    found, file = results(), HERE / "RESULTS.md"
    had = dict.fromkeys(r["row"] for r in found)
    rows = [r for r in dict.fromkeys(["teacher", *ABLATED, *PEERS, *SIZES, *had]) if r in had]
    tasks = list(dict.fromkeys([*TASKS, *(r["task"] for r in found)]))
    sizes = {r: r.replace("full", "layers=3") for r in SIZES if average(found, r)}
    common = set.intersection(*(set(average(found, r)) for r in sizes)) if sizes else ()
    made = [
        overview(found, "Compared", "score", 1, COMPARED),
        overview(found, "Sizes, % of the teacher's score", "retention", 100, sizes, common),
        leads(found, "Full's lead", [r for r in rows if r not in ("teacher", "full")], tasks),
        every_row(found, "Score", "score", 1, 2, rows, tasks),
        every_row(found, "% of the teacher's score", "retention", 100, 1, rows, tasks),
        every_row(found, "Distance", "distance", 1, 3, rows, tasks),
        every_row(found, "Minutes", "seconds", 1 / 60, 1, rows, tasks),
    ]
    before, rest = file.read_text(encoding="utf-8").split(START)
    file.write_text(before + START + "".join(made) + END + rest.split(END)[1], encoding="utf-8")


def curves(found):
    """{name: [(speed-up, [percent kept by each seed]), ...]} of what the picture shows.

    A curve of several sizes is of the seeds that all its points have, its speed-ups of all runs.
    """
    sizes = [row for row in SIZES if average(found, row)]
    rows = {"MicroBERT's sizes": sizes} if len(sizes) > 1 else {}
    rows |= {"MicroBERT": ["full"], "soft targets only": ["soft-only"]}
    rows |= {"labels only": ["labels-only"], "PKD's recipe": ["pkd"]}
    rows |= {"TinyBERT's recipe": ["tinybert"]}
    lines = {}
    for name, own in rows.items():
        kept = {row: average(found, row) for row in own}
        if seeds := set.intersection(*map(set, kept.values())):
            speeds = [[r["speed_up"] for r in found if r["row"] == row] for row in own]
            values = [[kept[row][seed] for seed in sorted(seeds)] for row in own]
            lines[f"{name} (n {len(seeds)})"] = sorted(zip(map(statistics.fmean, speeds), values))
    return lines


def draw():
    """tests/results.svg: what students of 1 to 5 layers keep, against how much faster they are."""
    points = curves(results())
    speeds = [x for line in points.values() for x, _ in line]
    kept = [statistics.fmean(y) for line in points.values() for _, y in line]
    left, right = min(1.0, *speeds), max(speeds) * 1.05
    low, high = math.floor(min(kept)) - 1, math.ceil(max(*kept, 101.14)) + 1

    def place(x, y):
        along = math.log(x / left) / math.log(right / left)
        return 60 + 480 * along, 20 + 280 * (high - y) / (high - low)

    parts = [
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 720 350" font-family="sans-serif" '
        'font-size="12">',
        '<rect width="720" height="350" fill="white"/>',
    ]
    for y in range(low, high + 1, max(1, (high - low) // 8)):
        _, at = place(left, y)
        parts.append(f'<path d="M60 {at:.1f}H540" stroke="#ddd"/>')
        parts.append(f'<text x="52" y="{at + 4:.1f}" text-anchor="end">{y} %</text>')
    for x in (x for x in (1, 1.25, 1.5, 2, 2.5, 3, 4, 5, 6, 7, 8) if left <= x <= right):
        at, _ = place(x, low)
        parts.append(f'<text x="{at:.1f}" y="318" text-anchor="middle">{x:g}</text>')
    _, at = place(left, 101.14)
    parts.append(f'<path d="M60 {at:.1f}H540" stroke="#888" stroke-dasharray="4 3"/>')
    parts.append(f'<text x="546" y="{at + 4:.1f}" fill="#666">paper: 101.14 %</text>')
    colours = ("#1b6ca8", "#16a085", "#c0392b", "#7f8c8d", "#d68910", "#6c3483")
    for i, ((name, line), colour) in enumerate(zip(points.items(), colours)):
        aside = 11 * i if len(line) == 1 else 0  # all at the same speed, yet to be told apart
        places = [(place(x, statistics.fmean(y)), y) for x, y in line]
        middle = [(across + aside, down, y) for (across, down), y in places]
        way = " ".join(f"{x:.1f},{y:.1f}" for x, y, _ in middle)
        parts.append(f'<polyline points="{way}" fill="none" stroke="{colour}"/>')
        for x, y, values in middle:
            sd = statistics.stdev(values) if len(values) > 1 else 0
            half = 280 * sd / (high - low)
            parts.append(f'<path d="M{x:.1f} {y - half:.1f}V{y + half:.1f}" stroke="{colour}"/>')
            parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{colour}"/>')
        parts.append(f'<circle cx="556" cy="{200 + 20 * i}" r="4" fill="{colour}"/>')
        parts.append(f'<text x="566" y="{204 + 20 * i}">{name}</text>')
    parts.append(
        '<text x="300" y="340" text-anchor="middle">times as fast as the teacher '
        "(half depth: one speed, set side by side)</text>"
    )
    parts.append('<text x="60" y="13">score kept, mean of four tasks (bars: sd over seeds)</text>')
    (HERE / "results.svg").write_text("\n".join([*parts, "</svg>\n"]), encoding="utf-8")


def main(argv):
    command, *rest = argv or [""]
    if command == "cut":
        parser = argparse.ArgumentParser(allow_abbrev=False)
        parser.add_argument("--data-dir", type=Path, default=Path("glue"))
        parser.add_argument("--out", type=Path, required=True)
        try:
            cut(**vars(parser.parse_args(rest)))
        except (OSError, ValueError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
    elif command == "tables":
        tables()
    elif command == "draw":
        draw()
    elif command == "run":
        parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        parser.add_argument("--tasks", default=",".join(TASKS))
        parser.add_argument("--seeds", default="0,1,2")
        parser.add_argument("--rows", default=",".join([*ABLATED, *PEERS]))
        asked, rest = parser.parse_known_args(rest)
        seeds = [int(seed) for seed in asked.seeds.split(",")]
        run(asked.tasks.split(","), seeds, re.split(r"[\s,]+(?=[a-z])", asked.rows), rest)
    else:
        print(__doc__, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
