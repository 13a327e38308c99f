"""Tokenizers in both forms, encoding, batches, transfer text and the built-in task."""

import io
import itertools
import json
import random
import re
import subprocess
import sys
import zlib
from collections import Counter, defaultdict

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

import data

VOCAB = """[PAD] [UNK] [CLS] [SEP] [MASK] the soup was hot not , ! " ' été ete Été Ete 汤 水 汤水
un ##hot ##ly a b ##a ##b""".split()
TEXTS = [
    "The soup was hot", "", "unhotly , Été !", 'a "aab" \'b\' 汤水 été', "the [MASK] was xyz 🙂",
    "[SEP] was\u2028hot\u0085\x00 a", "a b " * 30,
]  # fmt: skip
PAIRS = [(a, b) for a in TEXTS for b in TEXTS]


def crc(value):
    """Four bytes that stand for what an earlier version gave."""
    return zlib.crc32(json.dumps(value).encode())


def checkpoint(folder, form="vocab.txt", vocab=VOCAB, **config):
    """A folder with a tokenizer in that form, tokenizer.json as the hub's files have it."""
    if form == "vocab.txt":
        (folder / form).write_text("\n".join(vocab) + "\n", encoding="utf-8")
    else:
        ids = {token: i for i, token in enumerate(vocab)}
        tokenizer = Tokenizer(models.WordPiece(ids, unk_token="[UNK]"))
        tokenizer.add_special_tokens(vocab[:5])
        tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        special = [(name, ids[name]) for name in ("[CLS]", "[SEP]")]
        tokenizer.post_processor = processors.TemplateProcessing(
            "[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1", special
        )
        tokenizer.enable_padding(length=50)  # hub files carry both: neither may stay
        tokenizer.enable_truncation(5)
        tokenizer.save(str(folder / form))
    if config:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def tokenizer(tmp_path):
    return data.load_tokenizer(checkpoint(tmp_path), max_length=20)


@pytest.mark.parametrize("form", ["vocab.txt", "tokenizer.json"])
@pytest.mark.parametrize("config, tokens", [
    ({}, "ete 汤 水"),
    ({"do_lower_case": True, "strip_accents": None}, "ete 汤 水"),
    ({"do_lower_case": False}, "Été 汤 水"),  # accents follow case where they are not named
    ({"do_lower_case": False, "strip_accents": True}, "Ete 汤 水"),
    ({"strip_accents": False}, "été 汤 水"),
    ({"tokenize_chinese_chars": False}, "ete 汤水"),
])  # fmt: skip
def test_switches_of_the_tokenizer(tmp_path, form, config, tokens):
    """Catches a cased checkpoint lower-cased, and switches honoured in one of the forms only."""
    tokenizer = data.load_tokenizer(checkpoint(tmp_path, form, **config))
    assert tokenizer.encode("Été 汤水").tokens[1:-1] == tokens.split()


def test_both_forms_agree(tmp_path):
    """Catches padding or truncation left over from tokenizer.json, and special tokens cut up."""
    found = []
    for form in ("vocab.txt", "tokenizer.json"):
        (tmp_path / form[:5]).mkdir()
        tokenizer = data.load_tokenizer(checkpoint(tmp_path / form[:5], form), max_length=20)
        found.append([(e.ids, e.type_ids) for e in tokenizer.encode_batch(TEXTS + PAIRS)])
    assert found[0] == found[1]


@pytest.mark.parametrize("lower", [True, False])
def test_tokens_equal_transformers(tmp_path, lower):
    """Catches ids, segments or truncation that differ from what the checkpoint was trained on."""
    transformers = pytest.importorskip("transformers")
    folder = checkpoint(tmp_path, do_lower_case=lower)
    oracle = transformers.BertTokenizerFast.from_pretrained(folder)
    encoded = data.encode(data.load_tokenizer(folder, max_length=20), TEXTS + PAIRS)
    for i, text in enumerate(TEXTS + PAIRS):
        sides = [text] if isinstance(text, str) else text
        expected = oracle(*[[side] for side in sides], truncation="longest_first", max_length=20)
        start, stop = encoded.offsets[i : i + 2]
        assert encoded.ids[start:stop].tolist() == expected["input_ids"][0]
        assert encoded.type_ids[start:stop].tolist() == expected["token_type_ids"][0]


NAMED = {"unk_token": "hot", "cls_token": "[MASK]", "sep_token": "!"}
ODD, FREE = "[CLS] [UNK] {} un ! [UNK] {} ete [SEP]", "[UNK] [UNK] [UNK]"  # <, o, > without it
O_IS_28 = {"28": {"content": "<O>", "special": True}}
FOLDERS = [  # what stands beside the words, and tokens of "my <O> un!ly <o> Été"
    ("added_tokens.json", {"<O>": 28}, ODD.format("<o>", "<o>")),  # no special one: normalised
    ("tokenizer_config.json", {"added_tokens_decoder": O_IS_28}, ODD.format("<O>", FREE)),
    ("tokenizer_config.json", {"additional_special_tokens": ["<O>"]}, ODD.format("<O>", FREE)),
    ("tokenizer_config.json", {"extra_special_tokens": ["<O>"]}, ODD.format("<O>", FREE)),
    ("special_tokens_map.json", {"additional_special_tokens": ["<O>"]}, ODD.format("<O>", FREE)),
    ("tokenizer_config.json", NAMED, "[MASK] hot hot hot hot un ! hot hot hot hot ete !"),
    ("special_tokens_map.json", NAMED, "[MASK] hot hot hot hot un ! hot hot hot hot ete !"),
    ("tokenizer_config.json", {"do_lower_case": False, "truncation_side": "left"}, "Été [SEP]"),
    ("tokenizer_config.json", {"strip_accents": False}, "été [SEP]"),
    ("tokenizer_config.json", {"model_max_length": 24, "split_special_tokens": True}, "ete [SEP]"),
]
STORED = {  # by a tokenizer.json beside a silent config, which transformers would not honour
    "cased": {"normalizer": normalizers.BertNormalizer(lowercase=False)},
    "accents": {"normalizer": normalizers.BertNormalizer(strip_accents=False)},
    "chinese": {"normalizer": normalizers.BertNormalizer(handle_chinese_chars=False)},
    "sequence": {"normalizer": normalizers.Sequence([normalizers.NFD(), normalizers.Lowercase()])},
    "words": {"pre_tokenizer": pre_tokenizers.WhitespaceSplit()},
    "segments": {"post_processor": processors.TemplateProcessing(
        "[CLS] $A [SEP]", "[CLS] $A [SEP] $B:0 [SEP]:0", [("[CLS]", 2), ("[SEP]", 3)])},
}  # fmt: skip


def read_alike(folder, here, there):
    """What ours reads in `here` is what transformers reads in `there`, and is returned."""
    transformers = pytest.importorskip("transformers")
    (there / "config.json").write_text('{"model_type": "bert"}')
    ours, other = data.load_tokenizer(here, 20), transformers.AutoTokenizer.from_pretrained(there)
    for text in [*TEXTS, *PAIRS, "a <O>b <s> [SEP] hot", ("Été <O>", "b a " * 30)]:
        sides = [text] if isinstance(text, str) else text
        found = ours.encode(*sides)
        expected = other(*[[side] for side in sides], truncation=True, max_length=20)
        assert found.ids == expected["input_ids"][0]
        assert found.type_ids == expected["token_type_ids"][0]
    return " ".join(ours.encode("my <O> un!ly <o> Été").tokens), other.model_max_length


def copied(folder):
    """A folder with the tokenizer files that go beside a student of 40 positions."""
    (folder / "copy").mkdir()
    for name, content in data.tokenizer_files(folder, 40).items():
        (folder / "copy" / name).write_bytes(content)
    return folder / "copy"


@pytest.mark.parametrize("form", ["vocab.txt", "tokenizer.json"])
@pytest.mark.parametrize("name, content, tokens", FOLDERS, ids=range(len(FOLDERS)))
def test_a_folder_means_what_it_says(tmp_path, form, name, content, tokens):
    """Catches added tokens cut up, other special tokens or switches ignored, and a copy of the
    folder, as beside a student, that `transformers` reads otherwise than it was read here.
    """
    (checkpoint(tmp_path, form) / name).write_text(json.dumps(content))
    copy, most = copied(tmp_path), 24 if "24" in str(content) else 40
    for here in (tmp_path, copy):
        assert read_alike(tmp_path, here, copy) == (read_alike(tmp_path, here, tmp_path)[0], most)
        assert read_alike(tmp_path, here, copy)[0].endswith(tokens)


@pytest.mark.parametrize("form", ["vocab.txt", "tokenizer.json"])
@pytest.mark.parametrize("config, token", [({}, "hot"), ({"added_tokens_decoder": O_IS_28}, "un")])
def test_two_files_that_disagree(tmp_path, form, config, token):
    """Catches another file believed than `transformers` does: the map, but not beside tokens."""
    checkpoint(tmp_path, form, unk_token="un", **config)
    (tmp_path / "special_tokens_map.json").write_text('{"unk_token": {"content": "hot"}}')
    assert data.load_tokenizer(tmp_path).encode("xyz").tokens == ["[CLS]", token, "[SEP]"]
    read_alike(tmp_path, tmp_path, tmp_path)


@pytest.mark.parametrize("kind", STORED)
def test_what_tokenizer_json_says_is_said_to_transformers(tmp_path, kind):
    """Catches a student that is cased here and lower-cased there, and so on."""
    tokenizer = data.load_tokenizer(checkpoint(tmp_path, "tokenizer.json"))
    for part, value in STORED[kind].items():
        setattr(tokenizer, part, value)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    before = [data.load_tokenizer(tmp_path).encode(text).ids for text in TEXTS]
    assert before == [tokenizer.encode(text).ids for text in TEXTS]
    copy = copied(tmp_path)
    read_alike(tmp_path, tmp_path, copy), read_alike(tmp_path, copy, copy)


@pytest.mark.parametrize("place", ["tokenizer_config.json", "config.json"])
@pytest.mark.parametrize(
    "kind", ["BertJapaneseTokenizer", "RobertaTokenizerFast", "BertweetTokenizer"]
)
def test_another_kind_of_tokenizer_is_refused(tmp_path, place, kind):
    """Catches word pieces made of a text that the checkpoint wants cut otherwise."""
    (checkpoint(tmp_path) / place).write_text(json.dumps({"tokenizer_class": kind}))
    with pytest.raises(ValueError, match=f"tokenizer_class is {kind}, expected BERT's"):
        data.load_tokenizer(tmp_path)
    (tmp_path / place).write_text('{"tokenizer_class": "BertTokenizerFast"}')
    assert data.load_tokenizer(tmp_path).encode("hot").tokens == ["[CLS]", "hot", "[SEP]"]
    Tokenizer(models.WordLevel({"[UNK]": 0}, "[UNK]")).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match="tokenizer.json.*its model is WordLevel, expected WordP"):
        data.load_tokenizer(tmp_path)


@pytest.mark.parametrize("form", ["vocab.txt", "tokenizer.json"])
def test_the_side_that_is_cut(tmp_path, form):
    """Catches texts cut at their end although the checkpoint cuts their beginning."""
    checkpoint(tmp_path, form, truncation_side="left")
    assert data.load_tokenizer(tmp_path, 4).encode("the soup was hot").tokens[1:-1] == [
        "was",
        "hot",
    ]
    if form == "tokenizer.json":
        (tokenizer := Tokenizer.from_file(str(tmp_path / form))).enable_truncation(
            9, direction="left"
        )
        tokenizer.save(str(tmp_path / form))
        (tmp_path / "tokenizer_config.json").unlink()
        assert data.load_tokenizer(tmp_path, 3).encode("the soup was hot").tokens[1:-1] == ["hot"]
    with pytest.raises(ValueError, match="truncation_side|direction|middle"):
        data.load_tokenizer(checkpoint(tmp_path, form, truncation_side="middle"))


def test_added_tokens_need_their_own_rows(tmp_path):
    """Catches a token that is read with another's embedding."""
    (checkpoint(tmp_path) / "added_tokens.json").write_text('{"<O>": 30}')
    with pytest.raises(ValueError, match="added token <O> is 28, expected 30"):
        data.load_tokenizer(tmp_path)


def test_cased_words_that_are_never_met_are_noted(tmp_path, capsys):
    """Catches a cased vocab.txt that is lower-cased without a word, and a note without need."""
    data.load_tokenizer(checkpoint(tmp_path))
    told = f"note: {tmp_path} lower-cases texts, so its 2 words with capitals, such as Ete, are nev"
    assert capsys.readouterr().err.startswith(told)
    data.load_tokenizer(checkpoint(tmp_path, do_lower_case=True))
    data.load_tokenizer(checkpoint(tmp_path, vocab=[word for word in VOCAB if "t" not in word]))
    assert capsys.readouterr().err == ""


def test_truncation_takes_from_the_longer_side(tokenizer):
    """Catches a short question cut off for the sake of a long sentence, or max_length overrun."""
    short, long = "the soup", "a b " * 30
    # 20 = [CLS] + 2 + [SEP] + 15 + [SEP]; alone 20 = [CLS] + 18 + [SEP]
    assert tokenizer.encode(short, long).type_ids == [0] * 4 + [1] * 16
    assert tokenizer.encode(long, short).type_ids == [0] * 17 + [1] * 3
    assert tokenizer.encode(short, long).tokens[:4] == ["[CLS]", "the", "soup", "[SEP]"]
    assert tokenizer.encode(long).tokens == ["[CLS]", *"ab" * 9, "[SEP]"]


@pytest.mark.parametrize("name, content", [
    ("neither", b""), ("vocab.txt", b""), ("vocab.txt", b"the\nsoup\n"), ("vocab.txt", b"\xff\n"),
    ("vocab.txt", b"[CLS]\n[SEP]\nthe\n"), ("tokenizer.json", b'{"model": 1}'),
    ("tokenizer.json", b"version https://git-lfs.github.com/spec/v1\n"), ("tokenizer.json", b""),
    ("tokenizer_config.json", b'{"do_lower'), ("tokenizer_config.json", b"[1]"),
    ("tokenizer_config.json", b'{"do_lower_case": "yes"}'),
])  # fmt: skip
def test_broken_tokenizer_files(tmp_path, name, content):
    """Catches a traceback from inside a library, or an error that does not name the file."""
    if name == "tokenizer_config.json":
        checkpoint(tmp_path)
    (tmp_path / name).write_bytes(content)
    error = FileNotFoundError if name == "neither" else ValueError
    with pytest.raises(error, match=f"{re.escape(str(tmp_path))}.*{name}"):
        data.load_tokenizer(tmp_path)


def test_lines_of_a_file_and_of_standard_input(tmp_path, monkeypatch):
    """Catches a byte order mark kept, a bad line that ends the others, a line number off by one."""
    raw = b"\xef\xbb\xbfa cat\r\n\xff\nbig\tdog\n\na\tb\tc\n \xe2\x80\xa8 "
    (path := tmp_path / "lines").write_bytes(raw)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(raw)))
    for given, where in ((path, path), (None, "standard input")):
        places, texts = zip(*data.read_lines(given))
        assert list(places) == [f"{where}:{n}" for n in range(1, 7)]
        assert isinstance(texts[1], UnicodeDecodeError) and isinstance(texts[4], ValueError)
        assert str(texts[4]) == "3 tab-separated texts, expected one or a pair"
        assert [texts[i] for i in (0, 2, 3, 5)] == ["a cat", ("big", "dog"), "", " \u2028 "]


def test_encode_by_hand(tokenizer):
    """Catches wrong offsets, segments or types, texts swapped between chunks, no text at all."""
    texts = [("the soup", "was"), ("hot", ""), ("the", "the soup")]
    encoded = data.encode(tokenizer, texts, chunk=2)
    # VOCAB: [CLS] 2, [SEP] 3, the 5, soup 6, was 7, hot 8; lengths 2+1+3, 1+0+3, 1+2+3
    assert encoded.ids.tolist() == [2, 5, 6, 3, 7, 3, 2, 8, 3, 3, 2, 5, 3, 5, 6, 3]
    assert encoded.type_ids.tolist() == [0, 0, 0, 0, 1, 1, 0, 0, 0, 1, 0, 0, 0, 1, 1, 1]
    assert encoded.offsets.tolist() == [0, 6, 10, 16] and encoded.lengths.tolist() == [6, 4, 6]
    none = data.encode(tokenizer, [])
    assert (len(encoded), len(none)) == (3, 0) and none.offsets.tolist() == [0]
    for found in (encoded, none):
        assert [a.dtype for a in vars(found).values()] == [np.int32, np.uint8, np.int64]
    assert data.bucketed_batches(none.lengths, 4, seed=0, epoch=0) == []
    assert list(data.sorted_batches(none.lengths)) == []


@pytest.mark.parametrize("wrong", [None, 3, ("a", None), ["a", "b", "c"] * 9, b"a", "a\udcffb"])
def test_what_is_no_text_is_located(tokenizer, wrong):
    """Catches a traceback from inside the library, and an error that does not say where."""
    with pytest.raises(ValueError, match="texts 3 on: the tokenizer fails"):
        data.encode(tokenizer, ["the soup", "was", "hot", wrong], chunk=2)


def test_the_first_texts(tokenizer):
    """Catches texts cut in the middle."""
    whole = data.encode(tokenizer, PAIRS)
    for cut in (0, 5, len(PAIRS)):
        for name, found in vars(data.encode(tokenizer, PAIRS[:cut])).items():
            np.testing.assert_array_equal(vars(whole.first(cut))[name], found, strict=True)


def test_collate_equals_the_tokenizers_own_padding(tokenizer):
    """Catches rows mixed up, a mask that is off by one, or a neighbour's tokens as padding."""
    encoded = data.encode(tokenizer, texts := PAIRS[::-1])  # a short one at the end
    tokenizer.enable_padding(pad_id=0)
    for rows in ([3, 0, 48, 8, 3], np.array([48, 1]), [0]):
        batch, alone = data.collate(encoded, rows), tokenizer.encode_batch([texts[i] for i in rows])
        assert {name: tensor.tolist() for name, tensor in batch.items()} == {
            "input_ids": [one.ids for one in alone],
            "token_type_ids": [one.type_ids for one in alone],
            "attention_mask": [one.attention_mask for one in alone],
        }
        assert {tensor.dtype for tensor in batch.values()} == {torch.int64}
        for device in ("cpu", torch.device("meta")):
            moved = data.collate(encoded, rows, device)["attention_mask"]
            assert moved.device == torch.device(device)


LENGTHS = np.random.default_rng(0).geometric(0.05, 3003) + 2


def padded(batches):
    return sum(LENGTHS[rows].max() * len(rows) for rows in batches)


def test_training_batches():
    """Catches rows lost or doubled, the last batch dropped, much padding, batches by length."""
    batches = data.bucketed_batches(LENGTHS, 16, seed=0, epoch=0)
    assert sorted(np.concatenate(batches)) == list(range(3003))
    assert sorted(map(len, batches)) == [11] + [16] * 187  # 3003 = 187 * 16 + 11
    order = np.random.default_rng(1).permutation(3003)
    at_random = padded([order[i : i + 16] for i in range(0, 3003, 16)])
    assert padded(batches) - LENGTHS.sum() < 0.2 * (at_random - LENGTHS.sum())
    means = [LENGTHS[rows].mean() for rows in batches]
    assert abs(np.corrcoef(means[1:], means[:-1])[0, 1]) < 0.3  # short and long ones come mixed


def test_training_order_depends_on_seed_and_epoch_alone():
    """Catches a global generator, one order for all epochs, and any order but that of before."""
    found = [
        [rows.tolist() for rows in data.bucketed_batches(LENGTHS[:n], size, seed=seed, epoch=epoch)]
        for n in (1, 70, 3003) for size in (1, 16, 33) for seed, epoch in ((0, 0), (0, 1), (1, 0))
    ]  # fmt: skip
    assert crc(found) == 2635191772 and len(set(map(str, found[-3:]))) == 3


def test_evaluation_batches():
    """Catches rows lost or doubled, memory without a bound, batches smaller than they may be."""
    batches = list(data.sorted_batches(LENGTHS, max_tokens=100))
    assert sorted(np.concatenate(batches)) == list(range(3003))
    assert (np.diff(LENGTHS[np.concatenate(batches)]) <= 0).all() and LENGTHS.max() > 100
    for rows in batches:
        assert len(rows) * LENGTHS[rows].max() <= 100 or len(rows) == 1
        assert (len(rows) + 1) * LENGTHS[rows].max() > 100 or rows is batches[-1]


OWN = "own{0} red fox ran over green hills today".split()
OWN = [" ".join(OWN[: 4 + i % 5]).format(i) for i in range(200)]
SECRET = "Foreign 7 says: the LAKE!"
FOREIGN = [f"foreign {i} says the lake" for i in range(150)]  # 5 words, own has 4 to 8
FOREIGN_PAIRS = [(f"foreign {i} says the lake", f"left {i} far behind it") for i in range(5, 155)]
HELD_OUT = [SECRET, OWN[3].upper(), OWN[150] + " ."]
SOME, MIXED = FOREIGN[140:] + OWN[:9], FOREIGN_PAIRS[:40] + FOREIGN[:40] + FOREIGN_PAIRS[:5]


@pytest.mark.parametrize("pairs, given, expected", [
    (False, [], 3855192118), (False, SOME, 3838230559), (False, MIXED, 2054398892),
    (True, [], 505488059), (True, SOME, 769765035), (True, MIXED, 3494310795),
])  # fmt: skip
def test_transfer_texts_are_drawn_as_before(pairs, given, expected):
    """Catches another random draw: every result in the README rests on these texts."""
    sources = ([], [[], FOREIGN], [FOREIGN[:30], FOREIGN_PAIRS],
               [FOREIGN_PAIRS[:60], OWN[100:], FOREIGN])  # fmt: skip
    numbers = ((300, 0), (61, 1), (1, 2), (0, 3))  # of texts, and seeds
    found = []
    for own, others, some in itertools.product((OWN, OWN[:7], OWN[3:5], []), sources, numbers):
        own = list(zip(own, own[1:])) if pairs else own
        found.append(data.transfer_texts(own, others, HELD_OUT, *some, given))
    assert crc(found) == expected


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("pairs", [False, True], ids=["sentences", "pairs"])
@pytest.mark.parametrize("others", [[], [FOREIGN], [FOREIGN, FOREIGN_PAIRS]], ids=len)
def test_transfer_texts(pairs, others, seed):
    """Catches texts in the wrong form, too many or doubled, and dev or test text that gets in."""
    own = list(zip(OWN, OWN[1:])) if pairs else OWN
    texts, _ = data.transfer_texts(own, others, HELD_OUT, 300, seed)
    assert len(texts) == len(set(texts)) == 300
    assert all(isinstance(t, tuple) and len(t) == 2 if pairs else isinstance(t, str) for t in texts)
    said, banned = (
        {"".join(c for c in s.lower() if c.isalnum()) for s in data.sentences_of(some)}
        for some in (texts, HELD_OUT)
    )
    assert not said & banned
    foreign = [t for t in texts if re.search("foreign|lake|left|behind", str(t))]
    assert len(foreign) == (60 if others else 0)  # a fifth
    assert data.transfer_texts(own, others, HELD_OUT, 300, seed + 1)[0] != texts


def test_edits():
    """Catches a kind of edit that is missing, a third edit, a word that has no near one lost, and
    the space and punctuation between words that go with the wrong one.
    """
    found = {data._edit("A, b", {"a": ["x"]}, random.Random(seed)) for seed in range(300)}
    assert found == {"A, b", "x, b", "b, A", "b", "b, x", "A"}
    assert data._edit("one", {"one": ["two"]}, random.Random(0)) == "one"  # nothing beside it
    own = [f"one {i}" for i in range(100, 200)]
    texts, _ = data.transfer_texts(own, [], [], 150, 0, near={"one": ["two"]})
    assert {word for text in texts for word in text.split() if word.isalpha()} == {"one", "two"}


def test_near_words(tmp_path):
    """Catches a word's own place among its neighbours, a length for a direction, parts of words."""
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "cat", "dog", "##s", "far", "fax", ","]
    (tmp_path / "vocab.txt").write_text("\n".join([*names, ""]))
    table = torch.zeros(len(names), 2)
    table[5:] = torch.tensor([[1.0, 0], [9, 1], [1, 0.05], [0, 1], [0.3, 1], [1, 0.01]])
    texts = [("A Cat, far off", "cats"), "no dogs"]
    near = data.near_words(data.load_tokenizer(tmp_path), table, texts, 2)
    assert near == {"cat": ["dog", "fax"], "far": ["fax", "dog"]}
    assert data.near_words(data.load_tokenizer(tmp_path), table, texts)["far"][:1] == ["fax"]


def test_transfer_texts_left_out_are_counted():
    """Catches a count that misses a text, or one that counts what was never a candidate."""
    own = ["five words are my own"]  # as many as in the others
    others = [FOREIGN[:20], FOREIGN_PAIRS[:20]]
    for held_out in ([], ["never seen"]):
        assert data.transfer_texts(own, others, held_out, 300, 0)[1] == 0
    held_out = [SECRET, FOREIGN[2], FOREIGN[24], FOREIGN[149]]  # in both, one, the other, neither
    found, left_out = data.transfer_texts(own, others, held_out, 300, 0)
    assert left_out == 3 and sum("lake" in text for text in found) == 25 - 3
    pairs = [("five words are my own", "five more are not others")]
    found, left_out = data.transfer_texts(pairs, others[1:], held_out, 300, 0)
    assert left_out == 2 and sum(text in others[1] for text in found) == 20 - 2


def test_transfer_texts_are_as_long_as_the_tasks_own():
    """Catches long articles handed to a task of short sentences, and one source that fills all."""
    long, short = [f"far {i} " + "too long " * 9 for i in range(200)], [f"no {i}" for i in range(9)]
    more = [f"another {i} of five words" for i in range(150)]
    texts, _ = data.transfer_texts(OWN, [long, FOREIGN, short, more], [], 200, 0)
    first = Counter(text.split()[0] for text in texts)
    assert first["far"] == first["no"] == 0 and first["foreign"] == first["another"] == 20


PRAISE = """good warm fresh clean gentle honest lovely bright clever quick brave tidy charming tasty
pleasant calm""".split()
DRAWN = {
    "train": 734248104,
    "dev": 1359161590,
    "test": 2483781594,
    "unlabelled": 2626446006,
    "pretraining": 3447279627,
}
SPLITS = {split: data.toy_examples(split) for split in DRAWN}


def verdict(clause):
    """1 where the clause praises: its last word does, or blames and `not` stands before it."""
    words = clause.split()
    return int((words[-1] in PRAISE) != ("not" in words))


def parse(text):
    """The main clause of a sentence and the other one, by the rule of toy_examples."""
    if text.startswith("although "):
        return text.removeprefix("although ").split(" , ")[::-1]
    return text.split(" although ") if " although " in text else text.split(" but ")[::-1]


def test_toy_task_follows_its_rule():
    """Catches wrong labels, leaks between splits or into the words, a draw that changes."""
    assert len({text for texts, _ in SPLITS.values() for text in texts}) == 16_080
    sizes = [len(texts) for texts, _ in SPLITS.values()]
    assert sizes == [80, 1000, 1000, 6000, 8000]
    for split, (texts, labels) in SPLITS.items():
        clauses = [parse(text) for text in texts]
        single = 2000 if split == "pretraining" else 0
        assert Counter(map(len, clauses)) == {2: len(texts) - single} | (
            {1: single} if single else {}
        )
        assert labels.dtype == np.int64
        assert labels.tolist() == [verdict(main) for main, *_ in clauses]
        assert all(verdict(c[0]) != verdict(c[1]) for c in clauses if len(c) == 2)
        assert abs(labels.mean() - 0.5) < (0.02 if single else 1e-9)
        assert crc([texts, labels.tolist()]) == DRAWN[split]
        bags = defaultdict(list)  # dev and test: mirrors have the same words and the other label
        for text, label in zip(texts, labels.tolist()):
            bags[tuple(sorted(text.split()))].append(label)
        assert single or all(2 * sum(bag) == len(bag) for bag in bags.values())


def test_toy_vocabulary_has_every_word(tmp_path):
    """Catches a word spelled in letters or lost as [UNK], and ids that are not BERT's order."""
    vocabulary = data.toy_vocabulary()
    assert len(set(vocabulary)) == len(vocabulary)
    assert vocabulary[:5] == ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokenizer = data.load_tokenizer(checkpoint(tmp_path, vocab=vocabulary))
    for texts, _ in SPLITS.values():
        assert [e.tokens[1:-1] for e in tokenizer.encode_batch(texts)] == [t.split() for t in texts]


def test_script(tmp_path, capsys):
    """Catches wrong tokens, anything printed on import, a traceback for what is missing."""
    missing, script, run = tmp_path / "missing", data.__file__, tmp_path / "run"
    (run / "student").mkdir(parents=True)
    (checkpoint(run / "student", do_lower_case=True) / "config.json").write_text("{}")
    rows = "[CLS] 2 0, un 21 0, ##hot 22 0, [SEP] 3 0, ! 11 1, [SEP] 3 1"  # VOCAB's line numbers
    shown = ["{:16}  {:>6}  segment {}".format(*row.split()) for row in rows.split(", ")]
    refused = f"error: {missing}: neither tokenizer.json nor vocab.txt in it\n"
    runs = [
        (
            [checkpoint(tmp_path, do_lower_case=True), "Unhot", "!"],
            (0, "\n".join(shown) + "\n", ""),
        ),
        ([missing, "hot"], (2, "", refused)),
    ]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    started = [subprocess.Popen([sys.executable, script, *args], **pipes) for args, _ in runs]
    for process, (_, expected) in zip(started, runs):
        out, err = process.communicate()
        assert (process.returncode, out, err) == expected
    for wrong in ([], ["a"], ["a", "b", "c", "d"], ["--hlp", "x"], ["--help"]):
        assert data.main(wrong) == (0 if wrong == ["--help"] else 2)
        assert capsys.readouterr().err.startswith("usage: python data.py CHECKPOINT")
