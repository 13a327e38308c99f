"""README, code and packaging agree."""

import dataclasses
import json
import re
import shlex
import subprocess
import sys

import pytest
import torch
from conftest import later, slow

import glue
import microbert

FILES = ("microbert", "data", "glue")


@pytest.fixture(scope="module")
def readme(root):
    """The README's text."""
    return (root / "README.md").read_text(encoding="utf-8")


def test_every_choice_of_ours_is_in_code_and_table(root, readme):
    """Catches an OURS tag without a row, a row without a tag, and a row that names nothing."""
    source = "".join((root / f"{name}.py").read_text(encoding="utf-8") for name in FILES)
    tagged = {int(number) for number in re.findall(r"OURS\((\d+)\)", source)}
    rows = re.findall(r"^\| OURS\((\d+)\) `(\w+)` \|", readme, flags=re.M)
    assert tagged == {int(number) for number, _ in rows} and len(rows) == len(tagged)
    for _, name in rows:
        assert re.search(rf"(def|class) {name}\b", source), name


def test_first_two_commands_are_one_line_each(readme):
    """Catches a README whose first commands .ci/run could not take as they are."""
    blocks = re.findall(r"^```sh\n(.*?)^```$", readme, flags=re.M | re.S)
    first, second = (block.splitlines() for block in blocks[:2])
    assert len(first) == len(second) == 1
    assert "python microbert.py" in first[0] and "pytest" in second[0]


def test_commands_of_the_readme_are_understood(readme):
    """Catches a command with a flag that was renamed."""
    blocks = re.findall(r"^```sh\n(.*?)^```$", readme, flags=re.M | re.S)
    lines = [line for block in blocks for line in block.splitlines()]
    commands = [line.split(" microbert.py", 1)[1] for line in lines if "microbert.py" in line]
    commands += re.findall(r"`python microbert.py([^`]*)`", readme)
    assert len(commands) > 5
    for command in commands:
        words = [w for w in shlex.split(command, comments=True) if w != "--help"]
        words = words[: words.index("<")] if "<" in words else words
        _, config = microbert.parse(words)
        assert config.task in ("", "toy", "tickets") or glue.find_task(config.task)
    commands = [line.removeprefix("python glue.py") for line in lines if "python glue.py" in line]
    assert len(commands) > 3
    for command in commands:
        options = vars(glue.parser().parse_args(shlex.split(command)))
        assert set(options.get("tasks", [])) <= {"all", *glue.TASKS}


def tiny_bert(folder, words, **changes):
    """Saves an untrained checkpoint with a vocabulary."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words = sorted({*words})
    shape = microbert.BertConfig(
        vocab_size=len(words) + 5, hidden_size=8, num_hidden_layers=4, num_attention_heads=2,
        intermediate_size=8, max_position_embeddings=32,
    )  # fmt: skip
    microbert.save_bert(microbert.Bert(dataclasses.replace(shape, **changes)), folder)
    (folder / "vocab.txt").write_text("\n".join([*special, *words]) + "\n")
    options = {"tokenizer_class": "BertTokenizer", "do_lower_case": True, "model_max_length": 32}
    (folder / "tokenizer_config.json").write_text(json.dumps(options))


def small_glue(folder, monkeypatch):
    """MRPC, STS-B and SST-2 of a few sentences of our own; glue takes their sizes for official."""
    sizes = {"train": 12, "dev": 6, "test": 5}
    texts = ["a cat sat", "the dog ran", "birds sing at noon", "he left", "why not", "it is late"]
    layouts = {  # header, cells of row i
        "MRPC": ("Quality\t#1 ID\t#2 ID\t#1 String\t#2 String",
                 lambda i, test: [str(i % 2), "1", "2", texts[i % 6], texts[(i * 5 + 1) % 6]]),
        "STS-B": ("index\tsentence1\tsentence2\tscore",
                  lambda i, test: [str(i), texts[i % 6], texts[-i % 6], f"{i % 5}.5"][: 4 - test]),
        "SST-2": ("sentence\tlabel", lambda i, test: [texts[i % 6] + " again", str(i % 2)]),
    }  # fmt: skip
    for name, (header, cells) in layouts.items():
        for split, size in sizes.items():
            test = split == "test"
            lines = [header.replace("\tscore", "") if test else header]
            lines += ["\t".join(cells(i, test)) for i in range(size)]
            if test and name == "SST-2":
                lines = ["index\tsentence", *[f"{i}\t{texts[i % 6]}" for i in range(size)]]
            if test and name == "MRPC":
                lines = [line.replace("Quality", "index", 1) for line in lines]
            (folder / name).mkdir(parents=True, exist_ok=True)
            (folder / name / f"{split}.tsv").write_text("\n".join(lines) + "\n")
        changed = dataclasses.replace(glue.TASKS[name], rows=tuple(sizes.values()))
        monkeypatch.setitem(glue.TASKS, name, changed)
    return texts


@slow
def test_commands_of_the_readme_run(root, readme, tmp_path, monkeypatch, capsys):
    """Catches a command that is understood and then fails: each one, on small files.

    Download, benchmark and torchrun have tests of their own (glue_tools, real, fast); the first two
    blocks are .ci/run's, the folder `tickets` is the next test's.
    """
    monkeypatch.chdir(tmp_path)
    texts = small_glue(tmp_path / "glue", monkeypatch)
    for name in ("path/to/bert", "google-bert/bert-base-uncased"):
        tiny_bert(tmp_path / name, " ".join(texts).split())
    (tmp_path / "pairs.tsv").write_text("he left\twhy not\n" * 5)
    downloaded = []
    monkeypatch.setattr(glue, "download", lambda task, *_, **__: downloaded.append(task.name) or [])
    blocks = re.findall(r"^```sh\n(.*?)^```$", readme, flags=re.M | re.S)
    lines = [line for block in blocks[2:] if "mkdir" not in block for line in block.splitlines()]
    lines += re.findall(r"^\| .* \| `(python microbert.py [^`]*)` \|$", readme, flags=re.M)
    commands = [shlex.split(line) for line in lines]
    quick = ["--epochs", "1", "--teacher-epochs", "1", "--force", "--device", "cpu",
             "--precision", "fp32", "--transfer-ratio", "1"]  # fmt: skip
    ran, outs = 0, set()
    for command in commands:
        if command[0] == "torchrun" or command[1].startswith("tests/"):
            continue
        ran += 1
        capsys.readouterr()
        if command[1] == "glue.py":
            assert glue.main(command[2:]) == 0, capsys.readouterr()
        elif "|" in command:
            script = shlex.quote(str(root / "microbert.py"))
            line = shlex.join(command).replace("python microbert.py", f"{sys.executable} {script}")
            line = line.replace("'<'", "<").replace("'|'", "|")
            done = subprocess.run(
                ["bash", "-o", "pipefail", "-c", line], capture_output=True, text=True
            )
            assert done.returncode == 0 and done.stdout.count("\n") == 3, done.stderr
        elif command[2] in ("predict", "evaluate"):
            assert microbert.main([*command[2:], "--device", "cpu"]) == 0
            out = command[command.index("--out") + 1] if "--out" in command else ""
            assert (tmp_path / out).is_file() if out else capsys.readouterr().out
        else:
            again = ["--overwrite"] if command[command.index("--out") + 1] in outs else []
            outs.add(command[command.index("--out") + 1])
            own = quick[:-2] if command[2] == "finetune" else quick
            assert microbert.main([*command[2:], *own, *again]) == 0, capsys.readouterr().err
    assert ran >= 11 and downloaded == [*glue.TASKS]
    assert (tmp_path / "submission.zip").exists()


def test_data_of_your_own_as_the_readme_shows_it(readme, tmp_path, monkeypatch, capsys):
    """Catches an example folder that does not work when it is pasted."""
    blocks = re.findall(r"^```sh\n(.*?)^```$", readme, flags=re.M | re.S)
    (block,) = [block for block in blocks if "mkdir" in block]
    monkeypatch.chdir(tmp_path)
    make = block[: block.index("python")]
    subprocess.run(["bash", "-euc", make], check=True)
    words = re.findall(r"\w+", (tmp_path / "tickets/train.tsv").read_text().lower())
    tiny_bert(tmp_path / "bert", sorted(set(words)))
    commands = [shlex.split(line)[1:] for line in block.splitlines() if line.startswith("python")]
    assert [command[0] for command in commands] == ["glue.py", "microbert.py", "microbert.py"]
    assert glue.main(commands[0][1:]) == 0
    quick = ["--epochs", "1", "--teacher-epochs", "1", "--force", "--device", "cpu"]
    assert microbert.main([w.replace("path/to/", "") for w in commands[1][1:]] + quick) == 0
    capsys.readouterr()
    assert microbert.main(commands[2][1:]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4 and {line.split("\t")[1] for line in lines[1:]} <= {
        "billing", "delivery", "repair"}  # fmt: skip


def test_modules_are_silent_and_stand_alone(root, tmp_path):
    """Catches work at import, and a file that needs its neighbours or more than its packages."""
    banned = {
        "microbert": ("data", "glue", "tokenizers", "transformers", "huggingface_hub"),
        "data": ("microbert", "glue", "transformers"),
        "glue": ("microbert", "data", "torch", "tokenizers"),
    }
    started = []
    for name in FILES:
        folder = tmp_path / name
        folder.mkdir()
        (folder / f"{name}.py").write_bytes((root / f"{name}.py").read_bytes())
        code = f"import sys, {name}; print([m for m in {banned[name]} if m in sys.modules])"
        command = [sys.executable, "-W", "error", "-c", code]
        pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        started.append(subprocess.Popen(command, cwd=folder, **pipes))
    for process in started:
        assert process.communicate() == ("[]\n", "")


def test_the_model_part_works_without_its_neighbours(root, tmp_path):
    """Catches a model, checkpoint or loss that needs data.py or glue.py."""
    (tmp_path / "microbert.py").write_bytes((root / "microbert.py").read_bytes())
    code = """
import torch, microbert as m
shape = m.BertConfig(vocab_size=9, hidden_size=8, num_hidden_layers=2, num_attention_heads=2,
                     intermediate_size=8, max_position_embeddings=8)
m.save_bert(m.Bert(shape), "here")
teacher, ids, mask = m.load_bert("here"), torch.ones(2, 4).long(), torch.ones(2, 4).long()
(block,) = m.layer_map(2, 1)
student = m.prune(teacher, block[-1:])
features = [m.sentence_features(b(ids, mask).hidden_states[-1:], mask) for b in (student, teacher)]
experts = m.SentenceExperts(1, 8, 4, 2)
fused = m.FeatureMaps(experts)(features[0]), experts(features[1])
print(m.alignment_loss(*features, experts.gate(), fused).shape)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.stdout == "torch.Size([])\n", done.stderr


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A folder with the files that the README's snippets name."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    words = "at noon he left went away"
    tiny_bert(tmp_path / "runs/MRPC/student", words.split(), max_position_embeddings=512)
    return tmp_path


def snippet(readme, needle):
    """The one python block that holds the needle."""
    blocks = re.findall(r"```python\n(.*?)```", readme, flags=re.S)
    assert len(blocks) == 2  # each has a test here
    (found,) = [block for block in blocks if needle in block]
    return found


def test_snippet_of_the_model_alone(readme, home):
    """Catches a snippet that has fallen behind the code."""
    names = {}
    exec(snippet(readme, "prune(model"), names)
    assert names["smaller"].config.num_hidden_layers == 2
    assert len(names["output"].hidden_states) == 5
    assert microbert.main(["predict", "runs/MRPC", "He left at noon.", "At noon he went away.",
                           "--json", "--out", "answer"]) == 0  # fmt: skip
    shares = json.loads((home / "answer").read_text())["probabilities"].values()
    assert names["output"].logits.softmax(-1)[0].tolist() == pytest.approx([*shares], abs=1e-6)


@pytest.mark.parametrize("kind, width", [later("ours", 16), ("ours", 8), later("transformers", 8)])
def test_snippet_of_a_loop_of_your_own(readme, home, monkeypatch, kind, width):
    """Catches parts that work with our BERT or one width alone, and a loss that does not reach the
    student or its maps."""
    shape = dict(vocab_size=40, num_attention_heads=2, intermediate_size=16,
                 hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)  # fmt: skip
    sizes = [dict(num_hidden_layers=n, hidden_size=h) for n, h in ((4, 16), (2, width))]
    if kind == "ours":
        made = [microbert.Bert(microbert.BertConfig(**shape, **size)) for size in sizes]
    else:
        them = pytest.importorskip("transformers")
        configs = [them.BertConfig(**shape, **size, output_hidden_states=True) for size in sizes]
        made = [them.BertForSequenceClassification(config) for config in configs]
    teacher, student = made
    ids = torch.randint(1, 40, (6, 4, 7))
    loader = 9 * [
        ({"input_ids": x, "attention_mask": torch.ones(4, 7).long()}, torch.arange(4) % 2)
        for x in ids
    ]
    before = [p.clone() for p in teacher.parameters()]
    names = {"teacher": teacher.train(), "student": student.eval(), "loader": loader}
    code = snippet(readme, "adversarial_loss(discriminator, fake)").replace("lr=1e-4", "lr=1e-2")

    found = {"alignment_loss": [], "soft_loss": []}

    def keep(name, loss):
        def kept(*given):
            found[name].append(loss(*given))
            return found[name][-1]

        monkeypatch.setattr(microbert, name, kept)

    for name in found:
        keep(name, getattr(microbert, name))
    exec(code[: code.index("student.train()")], names)
    maps = [p.clone() for layer in names["maps"] for p in layer.parameters()]
    exec(code[code.index("student.train()") :], names)
    aligned, soft = found["alignment_loss"], found["soft_loss"]
    assert aligned[27] < 0.7 * aligned[0] and soft[-1] < 0.7 * soft[0]
    assert student.training and not teacher.training
    assert all(torch.equal(a, b) for a, b in zip(before, teacher.parameters()))
    assert not any(p.requires_grad for p in names["experts"].parameters())
    now = [p for layer in names["maps"] for p in layer.parameters()]
    assert len(now) == (0 if width == 16 else 4)
    assert not any(torch.equal(a, b) for a, b in zip(maps, now))


def test_a_student_in_a_pipeline_of_transformers(home, capsys):
    """Catches a student that a pipeline answers otherwise for."""
    pipeline = pytest.importorskip("transformers").pipeline
    texts = ("He left at noon.", "At noon he went away.")
    classify = pipeline("text-classification", model="runs/MRPC/student")
    found = classify({"text": texts[0], "text_pair": texts[1]})
    found = found[0] if isinstance(found, list) else found
    assert microbert.main(["predict", "runs/MRPC", *texts]) == 0
    label, share = capsys.readouterr().out.split()
    assert (label, float(share)) == (found["label"], pytest.approx(found["score"], abs=1e-4))
    long = [f"{text} " * 99 for text in texts]  # the tokenizer knows how much the model can take
    found = classify({"text": long[0], "text_pair": long[1]}, truncation=True)
    assert microbert.main(["predict", "runs/MRPC", *long, "--max-length", "512"]) == 0
    share = capsys.readouterr().out.split()[1]
    assert float(share) == pytest.approx(
        (found[0] if isinstance(found, list) else found)["score"], abs=1e-4
    )


class Logits(torch.nn.Module):
    """What an exporter takes: tensors in, one tensor out."""

    def __init__(self, bert):
        super().__init__()
        self.bert = bert

    def forward(self, input_ids, attention_mask, token_type_ids):
        return self.bert(input_ids, attention_mask, token_type_ids).logits


@slow
@pytest.mark.filterwarnings("ignore")
def test_a_student_is_exported(home):
    """Catches a graph that is bound to the example's shape, or that answers otherwise."""
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    model = microbert.load_bert("runs/MRPC/student")
    names = ["input_ids", "attention_mask", "token_type_ids"]
    example = tuple(torch.ones(2, 8, dtype=torch.long) for _ in names)  # not one thrice
    shape = {0: torch.export.Dim("batch"), 1: torch.export.Dim("tokens", max=512)}
    exported = torch.export.export(Logits(model).eval(), example, dynamic_shapes=[shape] * 3)
    torch.onnx.export(exported, (), "student.onnx", input_names=names, output_names=["logits"])
    graph = exported.module()
    session = runtime.InferenceSession("student.onnx")
    for batch, tokens in ((1, 1), (1, 5), (3, 17), (7, 2), (2, 512)):
        ids = torch.randint(model.config.vocab_size, (batch, tokens))
        mask = (torch.arange(tokens) <= torch.randint(tokens, (batch, 1))).long()
        segments = (torch.arange(tokens) > tokens // 2).long().expand(batch, -1).contiguous()
        with torch.no_grad():
            expected = model(ids, mask, segments).logits
            torch.testing.assert_close(graph(ids, mask, segments), expected)
        given = {"input_ids": ids, "attention_mask": mask, "token_type_ids": segments}
        (answer,) = session.run(["logits"], {name: t.numpy() for name, t in given.items()})
        torch.testing.assert_close(torch.from_numpy(answer), expected, atol=1e-5, rtol=1e-5)


def test_versions_agree(root):
    """Catches a release that forgets one of the two places."""
    packaging = (root / "pyproject.toml").read_text(encoding="utf-8")
    assert f'version = "{microbert.__version__}"' in packaging
