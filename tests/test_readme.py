"""README, code and packaging agree."""

import dataclasses
import json
import re
import shlex
import subprocess
import sys

import pytest
import torch
from conftest import slow

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
    commands += re.findall(r"`python microbert.py([^`\[]*)`", readme)
    assert len(commands) > 5
    for command in commands:
        words = shlex.split(command, comments=True)
        if not words or words[0].startswith("-"):
            words.insert(0, "distill")
        if "--help" in words:
            words.remove("--help")
        options = vars(microbert.parser().parse_args(words))
        assert options["task"] in ("", "toy", "tickets") or glue.find_task(options["task"])
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
    for name in ("path/to/bert", "sentence-transformers/all-MiniLM-L6-v2",
                 "google-bert/bert-base-uncased"):  # fmt: skip
        tiny_bert(tmp_path / name, " ".join(texts).split())
    (tmp_path / "pairs.tsv").write_text("he left\twhy not\n" * 5)
    downloaded = []
    monkeypatch.setattr(glue, "download", lambda task, *_, **__: downloaded.append(task.name) or [])
    blocks = re.findall(r"^```sh\n(.*?)^```$", readme, flags=re.M | re.S)
    commands = [shlex.split(line) for block in blocks[2:] if "mkdir" not in block
                for line in block.splitlines()]  # fmt: skip
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
        elif command[2] == "predict":
            assert microbert.main([*command[2:], "--device", "cpu"]) == 0
            assert capsys.readouterr().out
        else:
            again = ["--overwrite"] if command[command.index("--out") + 1] in outs else []
            outs.add(command[command.index("--out") + 1])
            assert microbert.main([*command[2:], *quick, *again]) == 0, capsys.readouterr().err
    assert ran >= 12 and downloaded == ["MRPC", "RTE", "STS-B", *glue.TASKS]
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
    assert len(lines) == 7 and {line.split("\t")[1] for line in lines[1:]} <= {
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
student = m.prune(teacher, m.layer_map(2, 1))
features = [m.sentence_features(b(ids, mask).hidden_states[-1:], mask) for b in (student, teacher)]
experts = m.SentenceExperts(1, 8, 4, 2)
print(m.alignment_loss(*features, experts).shape)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.stdout == "torch.Size([])\n", done.stderr


WORDS = "at noon he left went away the lid is cracked why do i pay twice when will it arrive"


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A folder with the files that the README's snippets name."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    tiny_bert(tmp_path / "runs/MRPC/student", WORDS.split(), max_position_embeddings=512)
    tiny_bert(tmp_path / "runs/tickets/teacher", WORDS.split(), labels=("a", "b", "c"))
    (tmp_path / "glue/RTE").mkdir(parents=True)
    row = "index|sentence1|sentence2|label\n0|first sentence|second sentence|entailment\n"
    (tmp_path / "glue/RTE/dev.tsv").write_text(row.replace("|", "\t"))
    return tmp_path


def snippet(readme, needle):
    """The one python block that holds the needle."""
    blocks = re.findall(r"```python\n(.*?)```", readme, flags=re.S)
    assert len(blocks) == 6  # each has a test here
    (found,) = [block for block in blocks if needle in block]
    return found


def test_snippet_of_glue(readme, home):
    """Catches a value beside a line that is not so."""
    code, names = snippet(readme, "import glue\n"), {}
    exec(code, names)
    shown = re.findall(r"^(glue\.\S.*?)  # (.*)$", code, flags=re.M)
    assert len(shown) == 2
    for expression, value in shown:
        assert eval(expression, names) == eval(value)


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


@pytest.mark.parametrize("kind", ["ours", "transformers"])
def test_snippet_of_a_loop_of_your_own(readme, home, kind):
    """Catches parts that work with our BERT alone, and a loss that does not reach the student."""
    shape = dict(vocab_size=40, hidden_size=16, num_attention_heads=2, intermediate_size=16,
                 hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)  # fmt: skip
    if kind == "ours":
        teacher, student = (
            microbert.Bert(microbert.BertConfig(**shape, num_hidden_layers=n)) for n in (4, 2)
        )
    else:
        transformers = pytest.importorskip("transformers")
        teacher, student = (
            transformers.BertForSequenceClassification(
                transformers.BertConfig(**shape, num_hidden_layers=n, output_hidden_states=True)
            )
            for n in (4, 2)
        )
    ids = torch.randint(1, 40, (6, 4, 7))
    loader = [
        ({"input_ids": x, "attention_mask": torch.ones(4, 7).long()}, torch.arange(4) % 2)
        for x in ids
    ]
    before = [p.clone() for p in teacher.parameters()]
    names = {"teacher": teacher.eval(), "student": student.train(), "loader": loader}
    names["optimizer"] = torch.optim.Adam(student.parameters(), lr=1e-2)
    code = snippet(readme, "adversarial_loss(discriminator, fake)")
    exec(code, names)
    first = names["loss"].item()
    for _ in range(8):
        exec(code[code.index("for batch, labels in loader:") :], names)
    assert names["loss"].item() < 0.7 * first
    assert all(torch.equal(a, b) for a, b in zip(before, teacher.parameters()))
    assert not any(p.requires_grad for p in names["experts"].parameters())


def test_snippet_of_the_method_in_steps(readme, home, capsys):
    """Catches steps that no longer fit together."""
    names = {}
    exec(snippet(readme, "teacher_pass(teacher"), names)
    small = microbert.load_bert("small")
    assert small.config.num_hidden_layers == 2 and small.config.labels == ("a", "b", "c")
    pruned = microbert.prune(names["teacher"], (2, 4)).state_dict()
    assert any(not torch.equal(t, pruned[n]) for n, t in small.state_dict().items())
    assert "loss" in capsys.readouterr().out and (home / "log.jsonl").exists()
    assert microbert.main(["predict", "small", "the lid is cracked"]) == 0


def test_snippet_of_transformers(readme, home, capsys):
    """Catches a student that a pipeline answers otherwise for."""
    pytest.importorskip("transformers")
    code, names = snippet(readme, "import pipeline"), {}
    exec(code, names)
    found = eval(code.strip().splitlines()[-1], names)
    found = found[0] if isinstance(found, list) else found
    assert (
        microbert.main(["predict", "runs/MRPC", "He left at noon.", "At noon he went away."]) == 0
    )
    label, share = capsys.readouterr().out.split()
    assert (label, float(share)) == (found["label"], pytest.approx(found["score"], abs=1e-4))


@slow
@pytest.mark.filterwarnings("ignore")
def test_snippet_of_the_exports(readme, home):
    """Catches a graph that is bound to the example's shape, or that answers otherwise."""
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    exec(snippet(readme, "torch.onnx.export"), {})
    model = microbert.load_bert("runs/MRPC/student")
    graph = torch.export.load("student.pt2").module()
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
