"""Real GLUE files and a real pre-trained BERT: slow, and skipped where they are not at hand.

GLUE_DIR: folder of the GLUE files. BERT_DIR: checkpoint folder of all-MiniLM-L6-v2.
"""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

import data
import glue
import microbert

GLUE_DIR, BERT_DIR = os.environ.get("GLUE_DIR", ""), os.environ.get("BERT_DIR", "")
pytestmark = pytest.mark.skipif(
    not (GLUE_DIR and BERT_DIR), reason="needs GLUE_DIR (GLUE files) and BERT_DIR (a checkpoint)"
)


@pytest.mark.filterwarnings("ignore:.*drawn at random")
def test_hidden_states_equal_transformers():
    """Catches an encoder right on toy weights alone, and a tokenizer that cuts otherwise."""
    transformers = pytest.importorskip("transformers")
    texts = glue.read("MRPC", GLUE_DIR, "dev").texts[:64]
    theirs = transformers.AutoModel.from_pretrained(BERT_DIR, output_hidden_states=True).eval()
    their_tokenizer = transformers.AutoTokenizer.from_pretrained(BERT_DIR)
    batch = their_tokenizer(
        [a for a, _ in texts], [b for _, b in texts], padding=True, truncation="longest_first",
        max_length=48, return_tensors="pt",
    )  # fmt: skip
    encoded = data.encode(data.load_tokenizer(BERT_DIR, 48), texts)
    ours = data.collate(encoded, np.arange(64))
    for name in ("input_ids", "token_type_ids", "attention_mask"):
        assert torch.equal(ours[name], batch[name])
    with torch.no_grad():
        states = microbert.load_bert(BERT_DIR)(**ours).hidden_states
        expected = theirs(**batch).hidden_states
    seen = ours["attention_mask"].bool()
    assert len(states) == len(expected) == 7
    for mine, other in zip(states, expected):
        torch.testing.assert_close(mine[seen], other[seen], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "task, options, teacher_floor, retention_floor",
    [
        ("SST-2", ["--limit", "3000", "--teacher-epochs", "1"], 75, 0.93),
        ("STS-B", ["--limit", "3000", "--teacher-epochs", "2", "--teacher-lr", "1e-4"], 70, 0.85),
    ],
)
def test_a_short_run_teaches_and_keeps(tmp_path, task, options, teacher_floor, retention_floor):
    """Catches a method that runs but does not learn from real text."""
    out = tmp_path / "out"
    code = microbert.main(
        ["--task", task, "--data-dir", GLUE_DIR, "--bert", BERT_DIR, "--out", str(out),
         "--epochs", "2", "--transfer-ratio", "1", *options]
    )  # fmt: skip
    assert code == 0
    results = json.loads((out / "results.json").read_text())
    teacher, pruned, student = (results[k]["score"] for k in ("teacher", "pruned", "student"))
    assert teacher > teacher_floor and pruned < student
    assert results["retention"] > retention_floor
    assert results["student"]["parameters"] == 17_390_594 - 385 * (task == "STS-B")
    where, rows = tmp_path / "p.tsv", len(glue.read(task, GLUE_DIR, "test").texts)
    code = microbert.main(
        ["predict", str(out), "--task", task, "--data-dir", GLUE_DIR, "--split", "test",
         "--out", str(where)]
    )  # fmt: skip
    assert code == 0
    lines = where.read_text().split("\n")[1:-1]
    assert [line.split("\t")[0] for line in lines] == [str(i) for i in range(rows)]


def test_the_student_is_at_home_in_transformers(tmp_path):
    """Catches a saved student that transformers scores otherwise than we do."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    teacher = microbert.load_bert(BERT_DIR, labels=("negative", "positive"))
    microbert.save_bert(microbert.prune(teacher, (2, 4, 6)), tmp_path, tokenizer_from=BERT_DIR)
    texts = glue.read("SST-2", GLUE_DIR, "dev").texts[:100]
    encoded = data.encode(data.load_tokenizer(tmp_path), texts)
    config = microbert.DistillConfig(device="cpu")
    ours = microbert.predict_logits(microbert.load_bert(tmp_path), encoded, config).softmax(-1)
    classify = transformers.pipeline("text-classification", model=str(tmp_path), top_k=None)
    for row, found in zip(ours, classify(texts, batch_size=10)):
        scores = {entry["label"]: entry["score"] for entry in found}
        assert scores["positive"] == pytest.approx(row[1].item(), abs=1e-5)


def test_the_benchmark_runs(root, tmp_path):
    """Catches a benchmark that has fallen behind the code."""
    pytest.importorskip("transformers")
    command = ["tests/bench.py", "--bert", BERT_DIR, "--data-dir", GLUE_DIR, "--repeats", "1",
               "--rows", "start,encode", "--json", str(tmp_path / "j")]  # fmt: skip
    done = subprocess.run([sys.executable, *command], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(json.loads((tmp_path / "j").read_text())["rows"]) == 2
