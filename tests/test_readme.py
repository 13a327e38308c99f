"""README, code and packaging agree."""

import re
import shlex
import subprocess
import sys

import pytest
import torch

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
        options = vars(microbert.parser().parse_args(words))
        assert options["task"] in ("", "toy", "tickets") or glue.find_task(options["task"])
    commands = [line.removeprefix("python glue.py") for line in lines if "python glue.py" in line]
    assert len(commands) > 3
    for command in commands:
        options = vars(glue.parser().parse_args(shlex.split(command)))
        assert set(options.get("tasks", [])) <= {"all", *glue.TASKS}


def tiny_bert(folder, words):
    """Saves an untrained checkpoint with a vocabulary."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    shape = microbert.BertConfig(
        vocab_size=len(words) + 5, hidden_size=8, num_hidden_layers=4, num_attention_heads=2,
        intermediate_size=8, max_position_embeddings=32,
    )  # fmt: skip
    microbert.save_bert(microbert.Bert(shape), folder)
    (folder / "vocab.txt").write_text("\n".join([*special, *words]) + "\n")


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
    for name in FILES:
        folder = tmp_path / name
        folder.mkdir()
        (folder / f"{name}.py").write_bytes((root / f"{name}.py").read_bytes())
        code = f"import sys, {name}; print([m for m in {banned[name]} if m in sys.modules])"
        done = subprocess.run(
            [sys.executable, "-W", "error", "-c", code], cwd=folder, capture_output=True, text=True
        )
        assert (done.stdout, done.stderr) == ("[]\n", ""), name


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


def test_python_snippets_of_the_readme_run(readme, tmp_path, monkeypatch):
    """Catches a snippet that has fallen behind the code, or a value beside it that is not so."""
    shape = microbert.BertConfig(
        vocab_size=9, hidden_size=8, num_hidden_layers=3, num_attention_heads=2,
        intermediate_size=8, max_position_embeddings=8,
    )  # fmt: skip
    monkeypatch.chdir(tmp_path)
    microbert.save_bert(microbert.Bert(shape), "runs/MRPC/student")
    (tmp_path / "glue/RTE").mkdir(parents=True)
    row = "index|sentence1|sentence2|label\n0|first sentence|second sentence|entailment\n"
    (tmp_path / "glue/RTE/dev.tsv").write_text(row.replace("|", "\t"))
    names = {name: torch.ones(2, 4).long() for name in ("input_ids", "attention_mask")}
    names["token_type_ids"] = torch.zeros(2, 4).long()
    for snippet in re.findall(r"```python\n(.*?)```", readme, flags=re.S):
        exec(snippet, names)
        for expression, value in re.findall(r"^(glue\.\S.*?)  # (.*)$", snippet, flags=re.M):
            assert eval(expression, names) == eval(value)
    assert names["smaller"].config.num_hidden_layers == 2


def test_versions_agree(root):
    """Catches a release that forgets one of the two places."""
    packaging = (root / "pyproject.toml").read_text(encoding="utf-8")
    assert f'version = "{microbert.__version__}"' in packaging
