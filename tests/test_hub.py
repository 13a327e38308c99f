# ruff: noqa: F811 (fixtures)
"""Checkpoints by name, from a server of our own that answers as the Hub's endpoint does."""

import collections
import hashlib
import json
import os
import re
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from conftest import slow
from test_run import few_steps, files, shape  # noqa: F401

import data
import microbert
from microbert import Bert, load_bert, main, save_bert

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub(files):
    """The server; its `models` are folders by name, `asked` has (method, file, token) of each."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_):
            pass

        def answer(self, status, headers=(), body=b""):
            self.send_response(status)
            for name, value in {"Content-Length": str(len(body)), **dict(headers)}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def do_GET(self):
            path = self.path.partition("?")[0].removeprefix("/api/models").lstrip("/")
            name, kind, rest = re.split("/(revision|tree|resolve)/", path)
            revision, _, file = rest.partition("/")
            token = self.headers.get("Authorization", "").removeprefix("Bearer ")
            http.asked.append((self.command, file, token))
            http.revisions[file].add(revision)
            folder = http.models.get(name)
            if revision not in ("main", COMMIT):
                return self.answer(404, {"X-Error-Code": "RevisionNotFound"})
            if name == "acme/broken" and file == "vocab.txt":
                return self.answer(500)
            if name == "acme/gated" and token != "secret":
                return self.answer(403, {"X-Error-Code": "GatedRepo"})
            if not folder:
                return self.answer(401, {"X-Error-Code": "RepoNotFound"})
            if kind != "resolve":  # of the API: what the repository has
                sizes = {path.name: path.stat().st_size for path in folder.iterdir()}
                tree = [dict(type="file", path=n, size=b, oid=n) for n, b in sizes.items()]
                about = dict(id=name, sha=COMMIT, siblings=[dict(rfilename=n) for n in sizes])
                body = json.dumps(tree if kind == "tree" else about).encode()
                return self.answer(200, {"Content-Type": "application/json"}, body)
            path = folder / file
            if not path.is_file():
                return self.answer(404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
            body = path.read_bytes()
            tag = hashlib.sha256(body).hexdigest()
            self.answer(200, {"ETag": f'"{tag}"', "X-Repo-Commit": COMMIT}, body)

        do_HEAD = do_GET

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    http.revisions = collections.defaultdict(set)
    http.asked, http.url = [], f"http://127.0.0.1:{http.server_port}"
    http.models = {f"acme/{name}": files / name for name in ("tiny", "old", "bare", "empty")}
    http.models |= dict.fromkeys(("acme/broken", "acme/gated", "tiny-bert"), files / "tiny")
    save_bert(Bert(shape(labels=("no", "yes"))), files / "tiny", files / "bert")
    save_bert(load_bert(files / "tiny"), files / "old", files / "bert")
    torch.save(
        microbert.read_safetensors(files / "old/model.safetensors"), files / "old/pytorch_model.bin"
    )
    (files / "old/model.safetensors").unlink()
    save_bert(load_bert(files / "tiny"), files / "bare")
    (files / "empty").mkdir()
    for extra in ("flax_model.msgpack", "README.md", "tf_model.h5"):
        (files / "tiny" / extra).write_bytes(b"not needed")
    threading.Thread(target=http.serve_forever, args=(0.01,), daemon=True).start()
    yield http
    http.shutdown()
    http.server_close()


SCRIPT = """
import contextlib, io, json, sys
sys.path.insert(0, sys.argv[1])
import microbert
for command in json.loads(sys.argv[2]):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = microbert.main(command)
    print(json.dumps([code, out.getvalue(), err.getvalue()]))
"""


def in_new_process(root, cwd, commands, **environment):
    """[exit code, stdout, stderr] of each command; huggingface_hub reads its variables once."""
    environment = {
        **{k: v for k, v in os.environ.items() if not k.startswith("HF_")},
        "HF_HOME": str(cwd / "hf"), "HF_HUB_DISABLE_PROGRESS_BARS": "1", **environment,
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(root), json.dumps(commands)],
        cwd=cwd, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def ask(name):
    return ["predict", name, "a cat", "--device", "cpu", "--max-length", "32"]


def test_a_checkpoint_by_name(root, hub, files, capsys):
    """Catches a name that is not looked up, needless downloads, and a failure without advice."""
    assert main(ask(str(files / "tiny"))) == 0
    expected = capsys.readouterr().out
    found = ["acme/tiny", "acme/tiny", "tiny-bert", "acme/old"]
    wrong = {"acme/none": "nor on the Hub: ", "acme/gated": "gated", "acme/empty": "nor on the Hub",
             "acme/bare": "neither tokenizer.json", "files/none": "no such file"}  # fmt: skip
    (files / "files").mkdir()
    commands = [ask(name) for name in (*found, *wrong)]
    answers = in_new_process(root, files, commands, HF_ENDPOINT=hub.url)
    assert {file for method, file, _ in hub.asked if method == "GET" and file} <= {
        "config.json",
        "model.safetensors",
        "pytorch_model.bin",
        *data.TOKENIZER_FILES,
    }
    assert answers[:4] == [[0, expected, ""]] * 4
    got = [file for method, file, _ in hub.asked if method == "GET"]
    assert got.count("model.safetensors") == 3  # of acme/tiny, tiny-bert and acme/bare once each
    assert got.count("pytorch_model.bin") == 1  # of acme/old, which has no other
    for (code, out, err), (name, needle) in zip(answers[4:], wrong.items()):
        assert code == 2 and not out and err.count("\n") == 1, err
        assert err.startswith("error: ") and needle in err.replace("Gated", "gated"), err
        assert name in err or (name == "acme/bare" and "models--acme--bare" in err), err
    assert hub.revisions["model.safetensors"] == {COMMIT}  # of the commit that the others are of
    asked = len(hub.asked)
    offline = in_new_process(
        root, files, [ask("acme/tiny"), ask("acme/old"), ask("acme/else")],
        HF_ENDPOINT=hub.url, HF_HUB_OFFLINE="1",
    )  # fmt: skip
    assert offline[:2] == [[0, expected, ""]] * 2 and len(hub.asked) == asked
    assert offline[2][0] == 2 and "HF_HUB_OFFLINE" in offline[2][2]
    assert offline[2][2].startswith("error: acme/else: ") and offline[2][2].count("\n") == 1


@slow
def test_a_checkpoint_by_name_in_foul_weather(root, hub, files):
    """Catches a token that is not sent, a server that is gone, and a file that it fails to send
    taken for one that the checkpoint does not have.
    """
    commands = [ask("acme/gated"), ask("acme/broken")]
    gated, broken = in_new_process(root, files, commands, HF_ENDPOINT=hub.url, HF_TOKEN="secret")
    assert gated[0] == 0 and "secret" in {token for _, _, token in hub.asked}
    assert broken[0] == 2 and "acme/broken" in broken[2] and broken[2].count("\n") == 1
    command = ["--task", "RTE", "--bert", "acme/gated", "--data-dir", str(files), "--epochs", "1",
               "--teacher-epochs", "1", "--device", "cpu", "--force",
               "--max-length", "32"]  # fmt: skip
    hub.shutdown()
    hub.server_close()
    started = time.monotonic()
    cached, gone = in_new_process(root, files, [command, ask("acme/else")], HF_ENDPOINT=hub.url)
    assert cached[0] == 0 and (files / "out/student/vocab.txt").is_file(), cached[2]
    assert time.monotonic() - started < 60
    assert gone[0] == 2 and gone[2].startswith("error: acme/else: ") and gone[2].count("\n") == 1
