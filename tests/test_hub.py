"""Checkpoints by name, from a server of our own that answers as the Hub's endpoint does."""

import collections
import hashlib
import json
import os
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from conftest import slow
from test_run import few_steps, files, shape  # noqa: F401

import microbert
from microbert import Bert, load_bert, main, save_bert

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub(files):  # noqa: F811
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
            name, _, rest = self.path.lstrip("/").partition("/resolve/")
            token = self.headers.get("Authorization", "").removeprefix("Bearer ")
            http.asked.append((self.command, rest.partition("/")[2], token))
            http.revisions[rest.partition("/")[2]].add(rest.partition("/")[0])
            if not rest or rest.partition("/")[0] not in ("main", COMMIT):
                return self.answer(404, {"X-Error-Code": "RevisionNotFound"})
            if name == "acme/broken" and rest.endswith("tokenizer_config.json"):
                return self.answer(500)
            if name == "acme/gated" and token != "secret":
                return self.answer(403, {"X-Error-Code": "GatedRepo"})
            if name not in http.models and name != "acme/gated":
                return self.answer(401, {"X-Error-Code": "RepoNotFound"})
            path = http.models[name.replace("gated", "tiny")] / rest.partition("/")[2]
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
    http.models["acme/broken"] = files / "tiny"
    http.models["tiny-bert"] = files / "tiny"
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


def test_a_checkpoint_by_name(root, hub, files, capsys):  # noqa: F811
    """Catches a name that is not looked up, needless downloads, and a failure without advice."""
    assert main(ask(str(files / "tiny"))) == 0
    expected = capsys.readouterr().out
    names = ["acme/tiny", "acme/tiny", "tiny-bert", "acme/old", "acme/none", "acme/gated",
             "acme/empty", "acme/bare", "files/none"]  # fmt: skip
    (files / "files").mkdir()
    answers = in_new_process(root, files, [ask(name) for name in names], HF_ENDPOINT=hub.url)
    assert {file for method, file, _ in hub.asked if method == "GET" and file} <= {
        "config.json", "model.safetensors", "pytorch_model.bin", "vocab.txt",
        "tokenizer_config.json", "special_tokens_map.json", "tokenizer.json"}  # fmt: skip
    notes = {name: f"note: {name} is no folder here, asking {hub.url}" for name in names}
    for (code, out, err), name in zip(answers[:4], names):
        assert (code, out) == (0, expected) and set(err.splitlines()) <= {notes[name]}
    assert [f for m, f, _ in hub.asked if (m, f) == ("GET", "model.safetensors")] == (
        ["model.safetensors"] * 3  # of acme/tiny, tiny-bert and acme/bare once each
    )
    for (code, out, err), name, needle in zip(
        answers[4:], names[4:],
        ("none of that name", "gated: ask for access", "no config.json", "neither tokenizer.json",
         "files/none/config.json: no such file"),
    ):  # fmt: skip
        (error,) = [line for line in err.splitlines() if line != notes[name]]
        assert code == 2 and not out and error.startswith(f"error: {name}") and needle in error
    assert hub.revisions["config.json"] == {"main"}  # and the others of the commit that it is of
    assert hub.revisions["model.safetensors"] == hub.revisions["vocab.txt"] == {COMMIT}
    asked = len(hub.asked)
    offline = in_new_process(
        root, files, [ask("acme/tiny"), ask("acme/else")], HF_ENDPOINT=hub.url, HF_HUB_OFFLINE="1"
    )
    assert offline[0][0] == 0 and offline[0][1] == expected and len(hub.asked) == asked
    assert offline[1][0] == 2 and "HF_HUB_OFFLINE is set" in offline[1][2]


@slow
def test_a_checkpoint_by_name_in_foul_weather(root, hub, files):  # noqa: F811
    """Catches a token that is not sent, a server that is gone, and a file that it fails to send
    taken for one that the checkpoint does not have: without its switches a tokenizer is another.
    """
    from urllib.parse import urlsplit

    gated, broken = in_new_process(
        root, files, [ask("acme/gated"), ask("acme/broken")], HF_ENDPOINT=hub.url, HF_TOKEN="secret"
    )
    assert gated[0] == 0 and "secret" in {token for _, _, token in hub.asked}
    assert broken[0] == 2 and "acme/broken" in broken[2] and broken[2].count("\n") == 2
    command = ["--task", "RTE", "--bert", "acme/gated", "--data-dir", str(files), "--epochs", "1",
               "--teacher-epochs", "1", "--device", "cpu", "--force",
               "--max-length", "32"]  # fmt: skip
    port = urlsplit(hub.url).port
    hub.shutdown()
    hub.server_close()
    gone = f"http://127.0.0.1:{port}"
    started = time.monotonic()
    (cached,) = in_new_process(root, files, [command], HF_ENDPOINT=gone)
    assert cached[0] == 0 and (files / "out/student/vocab.txt").is_file(), cached[2]
    assert time.monotonic() - started < 60
    (reached,) = in_new_process(root, files, [ask("acme/tiny")], HF_ENDPOINT=gone)
    assert reached[0] == 2 and "cannot be reached" in reached[2] and reached[2].count("\n") == 2
