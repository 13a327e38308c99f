"""The encoder against transformers, checkpoints in and out, pruning, labels and tokenizer."""

import json
import logging
import os
import random
import shutil
import struct
import subprocess
import sys
from contextlib import suppress
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from conftest import later

import data
import glue
import microbert
from microbert import Bert, BertConfig, load_bert, prune, read_safetensors, save_bert

TINY = BertConfig(
    vocab_size=30, hidden_size=16, num_hidden_layers=3, num_attention_heads=4,
    intermediate_size=24, max_position_embeddings=12, labels=("no", "maybe", "yes"),
)  # fmt: skip
IDS = torch.tensor([[2, 7, 9, 11, 3], [2, 29, 5, 8, 3]])


def tiny(**changes):
    """A BERT in which no two tensors are alike, biases and norms included."""
    torch.manual_seed(0)
    model = Bert(replace(TINY, **changes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.5)
    return model


def exactly(got, expected):
    """Equal bit for bit, in dtype and shape."""
    torch.testing.assert_close(got, expected, rtol=0, atol=0)


def close(got, expected, tolerance=1e-5):
    """Equal up to rounding."""
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


@pytest.fixture
def folder(tmp_path):
    """A checkpoint of tiny()."""
    save_bert(tiny(), tmp_path / "bert")
    return tmp_path / "bert"


def edit(folder, **keys):
    """Changes keys of config.json."""
    stored = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(stored | keys))


def repack(folder, tensors):
    """Puts these tensors, of any dtype, in pytorch_model.bin in place of model.safetensors."""
    (folder / "model.safetensors").unlink(missing_ok=True)
    torch.save(tensors, folder / "pytorch_model.bin")


MASKS = {
    "none": lambda n: None, "holes": lambda n: torch.arange(n) % 3 != 1,
    "right padding": lambda n: torch.arange(n) < max(1, n // 2),
    "left padding": lambda n: torch.arange(n) >= n // 2,
}  # fmt: skip


@pytest.fixture(scope="module", params=[1, 2, 3], ids="{} labels".format)
def pair(request, tmp_path_factory):
    """A random BERT of transformers, and ours loaded from what it saved."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(request.param)
    config = transformers.BertConfig(
        vocab_size=30, hidden_size=16, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=24, max_position_embeddings=512, num_labels=request.param,
    )  # fmt: skip
    config._attn_implementation = "eager"
    theirs = transformers.BertForSequenceClassification(config).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_(std=0.5)
    path = tmp_path_factory.mktemp("theirs")
    theirs.save_pretrained(path)
    return theirs, load_bert(path)


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("length", [1, 7, 512])
def test_equals_transformers(pair, kind, length):
    """Catches any step of the encoder or the loader that is not BERT's, at any length or mask."""
    theirs, ours = pair
    ids = torch.randint(30, (2, length))
    row = MASKS[kind](length)
    mask = None if row is None else torch.stack([torch.ones_like(row), row]).long()
    for types in (None, torch.randint(2, (2, length))):
        with torch.no_grad():
            expected = theirs(ids, mask, types, output_hidden_states=True)
            got = ours(ids, mask, types)
        close(got.logits, expected.logits)
        close(got.hidden_states, expected.hidden_states)


def test_golden_numbers(tmp_path):
    """Catches a changed encoder or name table where transformers is not installed to tell.

    Weights are sines, told apart by the place of their Hugging Face name in the alphabet; the
    numbers are transformers' own (5.23).
    """
    save_bert(Bert(replace(TINY, num_hidden_layers=2)), tmp_path)
    shapes = read_safetensors(tmp_path / "model.safetensors")
    filled = {}
    for place, name in enumerate(sorted(shapes), start=1):
        steps = torch.arange(1, shapes[name].numel() + 1, dtype=torch.float64)
        filled[name] = torch.sin(steps * place).view(shapes[name].shape)
    microbert.write_safetensors(tmp_path / "model.safetensors", filled)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    types = torch.tensor([[0, 0, 0, 1, 1], [0, 1, 1, 0, 0]])
    golden = [[0.4262059, 0.0126358, -0.7699906], [-0.0185470, 1.1985504, -2.2922989]]
    close(load_bert(tmp_path)(IDS, mask, types).logits, torch.tensor(golden))


def test_masked_tokens_are_never_seen():
    """Catches a mask that is ignored, inverted, applied to queries, or to some layer or head; a
    text beyond the positions that is cut in silence or dies as an IndexError.
    """
    model, mask = tiny(), torch.tensor([[1, 0, 1, 1, 0], [1, 1, 0, 0, 1]])
    first, second = (model(torch.where(mask.bool(), IDS, n), mask).hidden_states for n in (1, 13))
    for one, other in zip(first[1:], second[1:], strict=True):
        close(one[mask.bool()], other[mask.bool()])
        assert (one - other)[~mask.bool()].abs().min() > 0  # the change was a change
    alone, padding = model(IDS), F.pad(torch.ones_like(IDS), (0, 5))
    for filler in (0, 17):  # nor does it matter what stands in the padding
        padded = model(F.pad(IDS, (0, 5), value=filler), padding)
        close(padded.logits, alone.logits)
        close([h[:, :5] for h in padded.hidden_states], list(alone.hidden_states))
    close(model(IDS, torch.ones_like(IDS)).logits, alone.logits)
    assert model(torch.ones(1, 12, dtype=torch.long)).logits.shape == (1, 3)
    with pytest.raises(ValueError, match="13 tokens.* 12 positions"):
        model(torch.ones(1, 13, dtype=torch.long))


@pytest.mark.parametrize("kind", ["hidden", "attention_probs", "classifier"])
def test_dropout_only_in_training(kind):
    """Catches a dropout that is missing, on in eval mode, or reads another key of the config."""
    rates = {name: 0.0 for name in TINY.__dict__ if "_dropout" in name}
    model = tiny(**rates | {kind + "_dropout" + "_prob" * (kind != "classifier"): 0.5})
    exactly(model(IDS).logits, model(IDS).logits)
    one, other = model.train()(IDS), model(IDS)
    assert (one.logits != other.logits).any()
    changed = [not torch.equal(*pair) for pair in zip(one.hidden_states, other.hidden_states)]
    first = {"hidden": 0, "attention_probs": 1, "classifier": 4}[kind]
    assert changed == [layer >= first for layer in range(4)]


def test_where_dropout_applies():
    """Catches a layer whose attention or feed-forward part goes without, a classifier's None read
    as no dropout, and a 0 read as None.
    """
    for silenced in ("attention_output", "output"):
        layer = tiny(attention_probs_dropout_prob=0.0, hidden_dropout_prob=0.5).layers[0].train()
        for parameter in getattr(layer, silenced).parameters():
            torch.nn.init.zeros_(parameter)
        hidden = torch.randn(2, 5, 16)
        assert not torch.equal(layer(hidden, None), layer(hidden, None))
    assert tiny(hidden_dropout_prob=0.3).head_dropout == 0.3
    assert tiny(hidden_dropout_prob=0.3, classifier_dropout=0.0).head_dropout == 0.0


def old_names(tensors, prefix=""):
    """As the first BERT checkpoints were published, the pre-training heads on top."""
    plain = {name.removeprefix("bert."): tensor for name, tensor in tensors.items()}
    for now, then in (("weight", "gamma"), ("bias", "beta")):
        plain = {k.replace(f"LayerNorm.{now}", f"LayerNorm.{then}"): t for k, t in plain.items()}
    renamed = {k if "classifier" in k else prefix + k: t for k, t in plain.items()}
    return renamed | {"cls.predictions.bias": torch.ones(30), "cls.seq_relationship.bias": IDS}


DIALECTS = {
    "as saved": dict,
    "old names": old_names,
    "old names, prefixed": lambda tensors: old_names(tensors, "bert."),
    "position ids": lambda t: t | {"bert.embeddings.position_ids": torch.arange(12)[None]},
    "fp16": lambda t: {name: tensor.half() for name, tensor in t.items()},
    "bf16": lambda t: {name: tensor.bfloat16() for name, tensor in t.items()},
}


@pytest.mark.parametrize("dialect", DIALECTS)
def test_dialects_of_checkpoints(folder, dialect, recwarn):
    """Catches a name left untranslated, a harmless extra refused, weights not made fp32."""
    stored = DIALECTS[dialect](read_safetensors(folder / "model.safetensors"))
    repack(folder, stored)
    model, state = load_bert(folder), tiny().state_dict()
    dtype = {"fp16": torch.half, "bf16": torch.bfloat16}.get(dialect, torch.float)
    exactly(dict(model.state_dict()), {name: t.to(dtype).float() for name, t in state.items()})
    assert not model.training and model.fresh == () and not recwarn.list


HEADS = [("classifier",), ("pooler",), ("pooler", "classifier")]


@pytest.mark.parametrize("lost", [(), *HEADS], ids=str)
def test_missing_heads_are_drawn(folder, lost, recwarn):
    """Catches an untrained head passed off as a trained one; labels= that keep the old classifier,
    its shape or its names, or warn needlessly.
    """
    stored = read_safetensors(folder / "model.safetensors")
    repack(folder, {k: t for k, t in stored.items() if not any(part in k for part in lost)})
    assert load_bert(folder).fresh == lost
    assert [" and ".join(lost) in str(w.message) for w in recwarn.list] == [True] * bool(lost)
    recwarn.clear()
    model = load_bert(folder, labels=("a", "b", "c"))
    assert "classifier" in model.fresh and model.config.labels == ("a", "b", "c")
    assert (model.classifier.weight != tiny().classifier.weight).all()
    assert load_bert(folder, labels=("score",))(IDS).logits.shape == (2, 1)
    exactly(dict(model.layers.state_dict()), dict(tiny().layers.state_dict()))
    if "pooler" not in lost:
        exactly(model.pooler.weight, tiny().pooler.weight)
        assert not recwarn.list and model.fresh == ("classifier",)


KEY = "bert.encoder.layer.1.attention.self.key.bias"
MISFITS = {  # what is put in the file (None: taken out), and what the error says of it
    "four": ({KEY: None, "bert.encoder.layer.3.output.dense.bias": torch.zeros(16),
              "bert.embeddings.word_embeddings.weight": torch.zeros(31, 16),
              "bert.pooler.dense.bias": torch.zeros(16, dtype=torch.int64)},
             ["pytorch_model.bin: 4 faults", f"'{KEY}' is None", "layer.3.output.dense.bias",
              "int64", "word_embeddings.weight", "(31, 16)", "(30, 16)", "pooler.dense.bias"]),
    "twice": ({"embeddings.LayerNorm.gamma": torch.zeros(16)},
              ["bert.embeddings.LayerNorm.weight' twice"]),
    "half a head": ({"bert.pooler.dense.bias": None}, ["'bert.pooler.dense.bias' is None"]),
}  # fmt: skip


@pytest.mark.parametrize("kind", MISFITS)
def test_every_misfit_is_named(folder, kind):
    """Catches a bad tensor that is skipped, an error that names only the first one, two candidates
    for one tensor, and a head of which half would be drawn at random.
    """
    changes, told = MISFITS[kind]
    stored = read_safetensors(folder / "model.safetensors") | changes
    repack(folder, {name: tensor for name, tensor in stored.items() if tensor is not None})
    with pytest.raises(ValueError) as error:
        load_bert(folder)
    assert all(part in str(error.value) for part in told), error.value


def test_of_other_heads_the_encoder_is_taken(folder, capsys):
    """Catches a pre-trained BERT that is refused for a head it loses, and a fine-tuned one that is
    taken although its head is another's.
    """
    edit(folder, problem_type="multi_label_classification", id2label={"0": "a", "7": "a"},
         pad_token_id=None)  # fmt: skip
    stored = microbert.read_weights(folder)[1]
    heads = {"fit_dense.weight": torch.ones(3, 2), "qa_outputs.bias": torch.ones(2),
             "qa_outputs.n": torch.tensor([1]), "classifier.weight": torch.ones(9, 7)}  # fmt: skip
    repack(folder, stored | heads)
    found = load_bert(folder, labels=("x", "y", "z")).state_dict()
    source = microbert.read_weights(folder)[0]
    assert capsys.readouterr().err == f"note: {source}: skips fit_dense, qa_outputs, other heads\n"
    assert torch.equal(found["pooler.weight"], stored["bert.pooler.dense.weight"])
    assert found["classifier.weight"].shape == (3, 16)
    with pytest.raises(ValueError, match="problem_type 'multi"):
        load_bert(folder)
    edit(folder, problem_type=None, id2label={"0": "a", "1": "b", "2": "c"})
    with pytest.raises(ValueError, match="fit_dense.weight.*qa_outputs.bias"):
        load_bert(folder)
    repack(folder, stored)
    save_bert(load_bert(folder), folder / "copy")
    assert load_bert(folder / "copy").config.pad_token_id is None
    repack(folder, stored | {"bert.encoder.layer.9.output.dense.bias": torch.ones(8)})
    with pytest.raises(ValueError, match="layer.9"):  # no head's
        load_bert(folder, labels=("x", "y"))


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 438\n"


@pytest.mark.parametrize("content", [POINTER, b"\n<!DOCTYPE html><p>Not found</p>"])
@pytest.mark.parametrize("name", [
    "model.safetensors", "pytorch_model.bin", "config.json", *data.TOKENIZER_FILES])  # fmt: skip
def test_what_was_downloaded_in_place_of_a_file_is_named(folder, name, content):
    """Catches broken JSON, odd headers or an unknown [UNK] told where a pointer or a page lies."""
    if name == "pytorch_model.bin":
        (folder / "model.safetensors").unlink()
    (folder / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\na\n")
    (folder / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{name}.*an HTML page or a Git LFS pointer") as error:
        data.load_tokenizer(folder) if name in data.TOKENIZER_FILES else load_bert(folder)
    assert "weights_only" not in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("content", [b"", b"\x80\x02}q\x00.", b"PK\x03\x04" + bytes(99), b"ustar"])
def test_broken_pickles_come_without_advice(folder, content):
    """Catches torch's advice to run what is in a file."""
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(content)
    with pytest.raises(ValueError, match="pytorch_model.bin") as error:
        load_bert(folder)
    assert not any(word in str(error.value) for word in ("weights_only", "trust", "\n"))


@pytest.mark.parametrize("name, told", [
    ("model.safetensors.index.json", "weights in shards"),
    ("pytorch_model.bin.index.json", "weights in shards"), ("tf_model.h5", "TensorFlow's weights"),
    ("bert_model.ckpt.index", "TensorFlow's weights"), ("flax_model.msgpack", "Flax's weights"),
    ("adapter_config.json", "an adapter"), ("checkpoint-500/config.json", "transformers' Trainer"),
    ("0_Transformer/config.json", "a checkpoint in a folder below"), ("notes.txt", "neither"),
])  # fmt: skip
@pytest.mark.parametrize("kept", ["config.json", ""])
def test_folders_of_another_form_are_named(folder, name, told, kept):
    """Catches a Trainer's or a sharded folder that is only said to lack a file."""
    for path in folder.iterdir():
        if path.name != kept:
            path.unlink()
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).touch()
    with pytest.raises(FileNotFoundError, match=f"{folder}: ne|{folder}: no checkpoint") as error:
        load_bert(microbert.checkpoint_folder(str(folder), "student"))
    assert told in str(error.value) or (told, kept) == ("neither", "")


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_missing_files(folder, name):
    """Catches a missing file reported as anything else, or without its name."""
    (folder / name).unlink()
    with pytest.raises(FileNotFoundError, match=name):
        load_bert(folder)


class Payload:
    """Pickles as a call that creates a folder."""

    def __reduce__(self):
        return os.mkdir, ("ran",)


def test_pickled_code_is_not_run(folder, monkeypatch):
    """Catches pytorch_model.bin read with weights_only=False."""
    monkeypatch.chdir(folder)
    repack(folder, {"bert.pooler.dense.bias": Payload()})
    with pytest.raises(
        ValueError, match="pytorch_model.bin: damaged, or not a file of plain tensors"
    ):
        load_bert(folder)
    assert not (folder / "ran").exists()
    torch.load(folder / "pytorch_model.bin", weights_only=False)
    assert (folder / "ran").exists()  # it would have


WRONG = {
    "list": [torch.ones(2)], "tensor": torch.ones(2), "number": 3, "numbered": {3: torch.ones(2)},
    "list inside": {"classifier.bias": [1.0, 2.0, 3.0]}, "None inside": {"classifier.bias": None},
    "nothing": b"", "no zip": b"PK\3\4", "no pickle": b"garbage", "cut": {},
}  # fmt: skip


@pytest.mark.parametrize("kind", WRONG)
def test_pickle_of_something_else(folder, kind):
    """Catches whatever torch.load or its result raises where there is no dict of tensors."""
    repack(folder, WRONG[kind])
    path = folder / "pytorch_model.bin"
    if kind == "cut" or isinstance(WRONG[kind], bytes):
        path.write_bytes(WRONG[kind] or path.read_bytes()[:-40] * (kind == "cut"))
    with pytest.raises(ValueError, match="pytorch_model.bin"):
        load_bert(folder)


NAN = float("nan")
UNFIT = [
    ("model_type", "roberta"), ("position_embedding_type", "relative_key"), ("is_decoder", True),
    ("problem_type", "multi_label_classification"),
    ("add_cross_attention", True), ("hidden_act", "relu"), ("hidden_act", ["gelu"]),
    ("hidden_size", "16"), ("hidden_size", 16.0), ("hidden_size", None), ("hidden_size", 18),
    ("hidden_size", 0), ("hidden_size", -16), ("num_attention_heads", 0),
    ("num_attention_heads", -1), ("num_hidden_layers", 0), ("num_hidden_layers", True),
    ("num_hidden_layers", 2**24),
    ("type_vocab_size", 0), ("vocab_size", 2**24 + 1), ("vocab_size", 10**400),
    ("hidden_dropout_prob", "0.1"), ("hidden_dropout_prob", 2.0),
    ("classifier_dropout", []), ("classifier_dropout", True), ("layer_norm_eps", "small"),
    ("layer_norm_eps", None), ("layer_norm_eps", NAN), ("initializer_range", -1.0),
    *[("num_labels", value) for value in ("two", 0, -1, 2.5, 10**9)],
    *[("id2label", value) for value in (
        {"0": "a", "2": "b"}, {"1": "a", "2": "b"}, {"-1": "a", "0": "b"}, {"zero": "a"},
        {"0.0": "a"}, ["a", "b"], 3, "01", {"0": "a", "1": "a"})],
]  # fmt: skip


@pytest.mark.parametrize("key, value", UNFIT, ids=lambda x: str(x)[:24])
def test_unfit_configs_name_the_key(folder, key, value, monkeypatch):
    """Catches another architecture loaded as BERT, a bad value that dies deep in torch, class
    names whose ids are not 0, 1, ... and would shift the others, the memory of 10**9 labels.
    """

    def bounded(count, *more):
        assert not isinstance(count, int) or count < 10**6, "would fill the memory"
        return range(count, *more)

    monkeypatch.setattr(microbert, "range", bounded, raising=False)
    monkeypatch.delattr(microbert, "Bert")  # config.json alone must settle it
    edit(folder, **({"id2label": None} if key == "num_labels" else {}) | {key: value})
    with pytest.raises(ValueError, match="config.json: " + key * ("label" not in key)):
        load_bert(folder)


def test_unnamed_labels(folder):
    """Catches ids sorted as text (10 before 2), and a default other than Hugging Face's."""
    many = {str(i): f"name {i}" for i in reversed(range(11))}
    path = folder / "config.json"
    edit(folder, id2label=many)
    assert microbert.load_config(path).labels == tuple(f"name {i}" for i in range(11))
    edit(folder, id2label=None, num_labels=3)
    assert microbert.load_config(path).labels == ("LABEL_0", "LABEL_1", "LABEL_2")
    path.write_text("{}")
    assert microbert.load_config(path) == BertConfig()


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"3", b"null", b"\xff\xfe\xff", b"[" * 100_000])
def test_broken_config_files(folder, text):
    """Catches a config.json that is no JSON object and is not refused as such."""
    (folder / "config.json").write_bytes(text)
    with pytest.raises(ValueError, match="config.json"):
        load_bert(folder)


@pytest.mark.parametrize("key", ["vocab_size", "intermediate_size", "max_position_embeddings"])
def test_absurd_sizes_take_no_memory(folder, key):
    """Catches a model built as big as config.json says, 64 TiB here, before the file is read."""
    edit(folder, hidden_size=2**20, **{key: 2**24})
    with pytest.raises(ValueError, match="config.json says"):
        load_bert(folder)


def sample():
    """Tensors of every kind that a checkpoint may hold."""
    numbers = torch.arange(-3.0, 3).view(2, 3)
    kinds = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32)
    found = {str(kind): (numbers * 1.1).to(kind) for kind in kinds}
    found |= {"bytes": torch.arange(5, dtype=torch.uint8), "flags": numbers > 0}
    return found | {"scalar": torch.tensor(2.5), "empty": torch.zeros(0, 4), "ünïcode": numbers.mT}


def test_files_of_the_library_and_ours(tmp_path):
    """Catches a misread dtype, shape, offset or byte order in files we did not write, and a file
    that only our own reader understands.
    """
    library, path = pytest.importorskip("safetensors.torch"), tmp_path / "x"
    tensors = {name: t.contiguous() for name, t in sample().items()}
    library.save_file(tensors, path, metadata={"format": "pt"})
    exactly(read_safetensors(path), tensors)
    library.save_file({}, path)
    assert read_safetensors(path) == {}
    microbert.write_safetensors(path, sample())
    for read in (library.load_file, read_safetensors):
        exactly(read(path), {k: t.float() for k, t in sample().items()})
    for name in ("a", "ab"):  # the data starts at a multiple of 8 whatever the header holds
        microbert.write_safetensors(path, {name: torch.ones(2)})
        assert struct.unpack("<Q", path.read_bytes()[:8])[0] % 8 == 0


def pack(header, data=b"", size=None):
    """A safetensors file of this header, JSON unless given as bytes."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if size is None else size) + text + data


def entry(start, stop, shape=None, dtype="F32"):
    """A tensor's entry in the header, one axis unless told otherwise."""
    shape = [(stop - start) // 4] if shape is None else shape
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


EIGHT = bytes(8)
HOSTILE = {
    "empty file": b"", "size alone": struct.pack("<Q", 2), "giant size": pack({}, size=2**64 - 1),
    "size beyond the file": pack({}, size=3), "no header": pack(b""), "not JSON": pack(b"{]"),
    "not text": pack(b"\xff\xfe\xff"), "a list": pack([]), "null": pack(b"null"),
    "deep": pack(b"[" * 100_000), "deep inside": pack(b'{"a":' * 100_000),
    "overlap": pack({"a": entry(0, 8), "b": entry(4, 8)}, EIGHT),
    "same range": pack({"a": entry(0, 8), "b": entry(0, 8)}, EIGHT),
    "gap": pack({"a": entry(0, 4), "b": entry(8, 12)}, bytes(12)),
    "gap at the start": pack({"a": entry(4, 8)}, EIGHT),
    "trailing bytes": pack({"a": entry(0, 4)}, EIGHT), "no tensor": pack({}, EIGHT),
}  # fmt: skip
ENTRIES = {  # each alone, before eight bytes of data
    "beyond the end": entry(0, 12), "far beyond": entry(0, 2**62), "backwards": entry(8, 0),
    "negative start": entry(-8, 0), "negative shape": entry(0, 8, [-1, -2]),
    "float offset": entry(0, 8.0, [2]), "bool offset": entry(False, 8, [2]),
    "float shape": entry(0, 8, [2.0]), "bool shape": entry(0, 8, [2, True]),
    "shape too small": entry(0, 8, [1]), "shape too big": entry(0, 8, [2**40]),
    "shape a number": entry(0, 8, 2), "shape a text": entry(0, 8, "", "F64"),
    "shape an object": entry(0, 8, {}, "F64"), "no shape": {"dtype": "F32", "data_offsets": [0, 8]},
    "unknown dtype": entry(0, 8, [2], "F33"), "dtype a list": entry(0, 8, [2], ["F32"]),
    "three offsets": entry(0, 8) | {"data_offsets": [0, 4, 8]},
    "offsets a text": entry(0, 8) | {"data_offsets": "08"}, "a list for all": [0, 8], "a number": 8,
}  # fmt: skip
HOSTILE |= {f"entry: {kind}": pack({"a": ENTRIES[kind]}, EIGHT) for kind in ENTRIES}
for axes in ([0, 2**70], [2**62, 2**62, 0]):  # no bytes at all, and yet beyond every integer
    HOSTILE[f"empty {axes}"] = pack({"a": entry(0, 0, axes)})


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_safetensors(tmp_path, kind):
    """Catches a lie in the header that is believed, or that raises anything but ValueError."""
    (tmp_path / "x").write_bytes(HOSTILE[kind])
    with pytest.raises(ValueError, match="x: "):
        read_safetensors(tmp_path / "x")


def test_damaged_safetensors(tmp_path):
    """Catches a file cut short anywhere that loads, and damage that raises anything else."""
    path, rng = tmp_path / "x", random.Random(0)
    tensors = {"a": torch.ones(2, 3), "b": torch.ones(()), "c": torch.ones(0, 2)}
    microbert.write_safetensors(path, tensors)
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError):
            read_safetensors(path)
    loaded = 0
    for _ in range(600):
        damaged = bytearray(whole)
        for _ in range(rng.randint(1, 3)):
            damaged[rng.randrange(len(whole))] = rng.choice(b'09-.,:[]{}"\0\xff \x7f')
        path.write_bytes(damaged)
        with suppress(ValueError):
            loaded += bool(read_safetensors(path))
    assert 0 < loaded < 600


def test_round_trip(folder, monkeypatch):
    """Catches a tensor or a config key that is lost, swapped or rounded on the way to disk, and a
    checkpoint written in place, which a crash would leave half new.
    """
    model, before = load_bert(folder), {p.name: p.read_bytes() for p in folder.iterdir()}
    exactly(dict(model.state_dict()), dict(tiny().state_dict()))
    assert model.config == TINY and model.fresh == ()
    exactly(model(IDS).logits, tiny()(IDS).logits)
    assert sorted(before) == ["config.json", "model.safetensors"]
    monkeypatch.setattr(os, "replace", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        save_bert(Bert(TINY), folder)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before


@pytest.mark.parametrize("labels", [("score",), ("bad", "good"), ("no", "maybe", "yes")])
def test_transformers_loads_ours(tmp_path, labels, caplog, recwarn, monkeypatch):
    """Catches a file that Hugging Face users load with a warning, a fresh tensor or other names."""
    transformers = pytest.importorskip("transformers")
    model = tiny(labels=labels)
    save_bert(model, tmp_path)
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)  # to caplog
    theirs, report = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path, output_loading_info=True
    )
    assert not any(report.values()) and not recwarn.list and not caplog.records
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    close(theirs(IDS, mask).logits, model(IDS, mask).logits, 1e-6)
    assert theirs.config.id2label == dict(enumerate(labels))
    assert theirs.config.label2id == {name: i for i, name in enumerate(labels)}
    kind = "regression" if len(labels) == 1 else "single_label_classification"
    assert theirs.config.problem_type == kind
    assert theirs.config.architectures == ["BertForSequenceClassification"]


@pytest.mark.parametrize(
    "teacher, student, mapped, kept",
    [(6, 3, (12, 34, 56), (1, 2, 6)), (9, 4, (123, 345, 567, 789), (1, 2, 3, 9)),
     (8, 1, (12345678,), (8,)), (4, 4, (1, 2, 3, 4), (1, 2, 3, 4))],
)  # fmt: skip
def test_layers_of_the_student(teacher, student, mapped, kept):
    """t(m) = ceil(m L / M): 9 -> 4 is ceil(2.25, 4.5, 6.75, 9). Catches floor and round, and a
    teacher's layer that no block has, blocks of other sizes.

    It keeps the lowest and the last: catches an even spread, a last layer lost or doubled.
    """
    blocks = tuple(tuple(map(int, str(digits))) for digits in mapped)
    assert microbert.layer_map(teacher, student) == blocks
    assert microbert.kept_layers(teacher, student) == kept
    for count in (0, -1, teacher + 1):
        for layers in (microbert.layer_map, microbert.kept_layers):
            with pytest.raises(ValueError, match=f"of a teacher with {teacher}"):
                layers(teacher, count)


def test_prune_keeps_the_right_tensors():
    """Catches a layer off by one, a part (embeddings, pooler, classifier) drawn anew, a student
    whose training moves its teacher, a layer counted from 0, beyond the last, twice or unordered.
    """
    teacher = tiny(num_hidden_layers=4)
    student = prune(teacher, (2, 4))
    assert student.config == replace(teacher.config, num_hidden_layers=2)
    expected = {name: t for name, t in teacher.state_dict().items() if "layers." not in name}
    for mine, theirs in ((0, 1), (1, 3)):
        for name, tensor in teacher.layers[theirs].state_dict().items():
            expected[f"layers.{mine}.{name}"] = tensor
    exactly(dict(student.state_dict()), expected)
    exactly(prune(teacher, (1, 2, 3, 4)).eval()(IDS).logits, teacher(IDS).logits)
    before = {name: t.clone() for name, t in teacher.state_dict().items()}
    for parameter in student.parameters():
        parameter.data.fill_(7)
    exactly(dict(teacher.state_dict()), before)
    for keep in ((), (0, 1), (1, 5), (2, 1), (1, 1), (-1,)):
        with pytest.raises(ValueError, match="rising numbers from 1 to 4"):
            prune(teacher, keep)


MATCHING = [  # a task (MNLI's: entailment, neutral, contradiction), a teacher's labels, their order
    ("MNLI", ("CONTRADICTION", "Entailment", "neutral"), (1, 2, 0)),
    ("MNLI", ("entailment", "neutral", "contradiction"), (0, 1, 2)),
    ("MNLI", ("LABEL_0", "LABEL_1", "LABEL_2"), (0, 1, 2)), ("SST-2", ("1", "0"), (1, 0)),
    ("RTE", ("Not-Entailment", "entailment"), (1, 0)),
    ("MRPC", ("Equivalent", "not equivalent"), (1, 0)),
    ("STS-B", ("LABEL_0",), (0,)), ("STS-B", ("similarity",), (0,)),
    ("MNLI", ("entailment", "neutral", "other"), None),
    ("MNLI", ("entailment", "not_entailment"), None), ("MNLI", ("LABEL_0", "LABEL_1"), None),
    ("MNLI", ("LABEL_1", "LABEL_0", "LABEL_2"), None), ("STS-B", ("no", "yes"), None),
    ("SST-2", ("score",), None),
]  # fmt: skip


@pytest.mark.parametrize("task, names, order", MATCHING)
def test_labels_are_matched_by_name(task, names, order):
    """Catches a teacher whose classes stand in another order and are taken by position, one of
    another task or with a classifier drawn at random, and an error that does not show both lists.
    """
    task, model = glue.TASKS[task], tiny(labels=names)
    before, wanted = model(IDS).logits, task.labels or ("score",)
    if order:
        matched = microbert.match_labels(model, task, "here")
        assert matched.config.labels == wanted
        matched.fresh = ("classifier",)
        with pytest.raises(ValueError, match="no trained classifier"):
            microbert.match_labels(matched, task, "here")
        return close(matched(IDS).logits, before[:, list(order)])
    with pytest.raises(ValueError) as error:
        microbert.match_labels(model, task, "here")
    assert ", ".join(names) in str(error.value) and ", ".join(wanted) in str(error.value)


def test_every_tokenizer_file_is_copied(tmp_path):
    """Catches a checkpoint whose tokenizer is incomplete, or that brings along other files."""
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\na\n")
    (tmp_path / "added_tokens.json").write_text('{"<b>": 5}')
    (tmp_path / "special_tokens_map.json").write_text('{"unk_token": "[UNK]"}')
    (tmp_path / "optimizer.pt").write_text("")
    save_bert(tiny(), tmp_path / "out", tokenizer_from=tmp_path)
    names = {"config.json", "model.safetensors", *data.TOKENIZER_FILES}
    assert {path.name for path in (tmp_path / "out").iterdir()} == names
    assert (
        json.loads((tmp_path / "out/tokenizer_config.json").read_text())["model_max_length"] == 12
    )


def test_tokenizer_must_fit_the_model(tmp_path, capsys):
    """Catches ids without an embedding, and texts longer than the positions."""
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\na\nb\n")
    config = microbert.DistillConfig(max_length=128)
    fitting = microbert.load_fitting_tokenizer(tmp_path, tiny(vocab_size=7), config)
    assert len(fitting.encode("a " * 30).ids) == 12
    assert "cut at 12 tokens" in capsys.readouterr().err
    with pytest.raises(ValueError, match="7 tokens for 6 embeddings"):
        microbert.load_fitting_tokenizer(tmp_path, tiny(vocab_size=6), config)


def test_checkpoint_folder(folder, tmp_path):
    """Catches a run's --out folder not understood as the checkpoint in it."""
    assert microbert.checkpoint_folder(str(folder), "bert") == folder
    assert microbert.checkpoint_folder(str(tmp_path), "bert") == folder
    with pytest.raises(FileNotFoundError, match="no checkpoint in it, and no student"):
        microbert.checkpoint_folder(str(tmp_path), "student")


MODEL_PART = """
import sys, torch
state = torch.get_rng_state()
{import_it}
assert torch.equal(state, torch.get_rng_state())
microbert.save_bert(microbert.prune(microbert.Bert(microbert.BertConfig(
    vocab_size=9, hidden_size=8, num_attention_heads=2, intermediate_size=8)), (1, 2)), "saved")
model, ids = microbert.load_bert("saved"), torch.tensor([[2, 5, 3]])
microbert.soft_loss(model(ids).logits, model(ids).logits).backward()
ours = {name.removeprefix("theirproject.microbert.") for name in sys.modules}
assert not {"data", "glue", "transformers", "tokenizers"} & ours
"""
TRAINING = """
from theirproject.microbert import data, glue, microbert
assert "theirproject" in data.__file__ and microbert.glue.TASKS is glue.TASKS
open("saved/vocab.txt", "w").write("[PAD]\\n[UNK]\\n[CLS]\\n[SEP]\\n[MASK]\\na\\nb\\nc\\n")
encoded = data.encode(data.load_tokenizer("saved"), ["a b", "c"] * 8)
config = microbert.DistillConfig(device="cpu", batch_size=4)
collate, before, called = data.collate, model.pooler.weight.clone(), []
data.collate = lambda *a: called.append(1) or collate(*a)
objective, log = microbert.of_labels(torch.arange(16) % 2.0, 2, config), microbert.Log(None)
microbert.train(model, encoded, objective, config, log, epochs=1, lr=1e-3)
assert len(called) == 4 and not torch.equal(before, model.pooler.weight)
assert not {"data", "glue", "microbert"} & {*sys.modules}
"""
LAYOUTS = [  # a folder, files copied into it, its packages' __init__.py; nothing else is there
    later(".", ["microbert"], []),
    later("theirproject/microbert", ["microbert"], ["theirproject"]),
    later("theirproject/microbert", ["microbert", "data", "glue"], ["theirproject"]),
    ("theirproject/microbert", ["microbert", "data", "glue"],
     ["theirproject", "theirproject/microbert"]),
]  # fmt: skip


@pytest.mark.parametrize("place, names, inits", LAYOUTS)
def test_copied_into_another_project(root, tmp_path, place, names, inits):
    """Catches a host's own data module taken for ours, an import that prints, seeds, or drags in
    what the file alone can do without.
    """
    for path in [tmp_path / name for name in ("data/__init__.py", "data.py", "glue.py")]:
        path.parent.mkdir(exist_ok=True)
        path.write_text("raise RuntimeError('of the host')")
    (tmp_path / place).mkdir(parents=True, exist_ok=True)
    for name in names:
        shutil.copy(root / f"{name}.py", tmp_path / place)
    for init in inits:
        (tmp_path / init / "__init__.py").touch()
    import_it = "from theirproject.microbert import microbert" if inits else "import microbert"
    code = MODEL_PART.replace("{import_it}", import_it) + TRAINING * (len(names) > 1)
    told = [sys.executable, "-c", code]
    done = subprocess.run(told, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert ("evaluate     4/4 " in done.stdout) if len(names) > 1 else done.stdout == ""
