"""Tokenizers in both forms, encoding, batches, transfer text and the built-in task."""

import json
import re
import subprocess
import sys
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


# --- tokenizer -----------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["vocab.txt", "tokenizer.json"])
@pytest.mark.parametrize(
    "config, tokens",
    [
        ({}, "ete 汤 水"),
        ({"do_lower_case": True, "strip_accents": None}, "ete 汤 水"),
        ({"do_lower_case": False}, "Été 汤 水"),  # accents follow case where they are not named
        ({"do_lower_case": False, "strip_accents": True}, "Ete 汤 水"),
        ({"strip_accents": False}, "été 汤 水"),
        ({"tokenize_chinese_chars": False}, "ete 汤水"),
    ],
)
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
    cut = dict(truncation="longest_first", max_length=20)
    expected = [oracle(TEXTS, **cut), oracle(*map(list, zip(*PAIRS)), **cut)]
    ids, type_ids = (
        [row for part in expected for row in part[name]] for name in ("input_ids", "token_type_ids")
    )
    for i, (start, stop) in enumerate(zip(encoded.offsets, encoded.offsets[1:])):
        assert encoded.ids[start:stop].tolist() == ids[i]
        assert encoded.type_ids[start:stop].tolist() == type_ids[i]


def test_truncation_takes_from_the_longer_side(tokenizer):
    """Catches a short question cut off for the sake of a long sentence, or max_length overrun."""
    short, long = "the soup", "a b " * 30
    # 20 = [CLS] + 2 + [SEP] + 15 + [SEP]; alone 20 = [CLS] + 18 + [SEP]
    assert tokenizer.encode(short, long).type_ids == [0] * 4 + [1] * 16
    assert tokenizer.encode(long, short).type_ids == [0] * 17 + [1] * 3
    assert tokenizer.encode(short, long).tokens[:4] == ["[CLS]", "the", "soup", "[SEP]"]
    assert tokenizer.encode(long).tokens == ["[CLS]", *"ab" * 9, "[SEP]"]


@pytest.mark.parametrize(
    "files, error",
    [
        ({}, FileNotFoundError),
        ({"vocab.txt": b""}, ValueError),
        ({"vocab.txt": b"the\nsoup\n"}, ValueError),
        ({"vocab.txt": b"\xff\xfe[PAD]\n"}, ValueError),
        ({"tokenizer.json": b""}, ValueError),
        ({"tokenizer.json": b'{"model": 1}'}, ValueError),
        ({"tokenizer.json": b"version https://git-lfs.github.com/spec/v1\n"}, ValueError),
        ({"tokenizer_config.json": b'{"do_lower'}, ValueError),
        ({"tokenizer_config.json": b"[1]"}, ValueError),
        ({"tokenizer_config.json": b'{"do_lower_case": "yes"}'}, ValueError),
    ],
)
def test_broken_tokenizer_files(tmp_path, files, error):
    """Catches a traceback from inside a library, or an error that does not name the folder."""
    if "tokenizer_config.json" in files:
        checkpoint(tmp_path)
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(error, match=re.escape(str(tmp_path))):
        data.load_tokenizer(tmp_path)


# --- encoding and batches ------------------------------------------------------------------------


def test_encode_by_hand(tokenizer):
    """Catches wrong offsets or segments, and texts lost or swapped between chunks."""
    texts = [("the soup", "was"), ("hot", ""), ("the", "the soup")]
    encoded = data.encode(tokenizer, texts, chunk=2)
    # VOCAB: [CLS] 2, [SEP] 3, the 5, soup 6, was 7, hot 8; lengths 2+1+3, 1+0+3, 1+2+3
    assert encoded.ids.tolist() == [2, 5, 6, 3, 7, 3, 2, 8, 3, 3, 2, 5, 3, 5, 6, 3]
    assert encoded.type_ids.tolist() == [0, 0, 0, 0, 1, 1, 0, 0, 0, 1, 0, 0, 0, 1, 1, 1]
    assert encoded.offsets.tolist() == [0, 6, 10, 16] and encoded.lengths.tolist() == [6, 4, 6]
    assert len(encoded) == 3
    assert [a.dtype for a in vars(encoded).values()] == [np.int32, np.uint8, np.int64]


def test_no_texts(tokenizer):
    """Catches a crash on an empty split, or arrays of other types than the documented ones."""
    none = data.encode(tokenizer, [])
    assert len(none) == 0 and none.offsets.tolist() == [0] and none.lengths.tolist() == []
    assert [a.dtype for a in vars(none).values()] == [np.int32, np.uint8, np.int64]
    assert data.bucketed_batches(none.lengths, 4, seed=0, epoch=0) == []
    assert list(data.sorted_batches(none.lengths)) == []


def test_concatenate_is_encoding_both(tokenizer):
    """Catches offsets of the second that are not moved, also where one of the two is empty."""
    expected = vars(data.encode(tokenizer, PAIRS))
    for cut in (0, 5, len(PAIRS)):
        first, second = (data.encode(tokenizer, part) for part in (PAIRS[:cut], PAIRS[cut:]))
        for name, found in vars(data.concatenate(first, second)).items():
            np.testing.assert_array_equal(found, expected[name])


def test_collate_equals_a_plain_loop(tokenizer):
    """Catches rows mixed up, a mask that is off by one, or a neighbour's tokens as padding."""
    encoded = data.encode(tokenizer, PAIRS)
    rows = np.array([3, 0, 48, 8, 3])
    batch = data.collate(encoded, rows)
    longest = max(encoded.lengths[rows])
    expected = defaultdict(list)
    for text in (PAIRS[row] for row in rows):
        one = tokenizer.encode(*text)
        padding = [0] * (longest - len(one.ids))
        expected["input_ids"].append(one.ids + padding)
        expected["token_type_ids"].append(one.type_ids + padding)
        expected["attention_mask"].append([1] * len(one.ids) + padding)
    assert {name: tensor.tolist() for name, tensor in batch.items()} == expected
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}


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
    """Catches a global generator, one order for all epochs, and seed + epoch as one number."""
    orders = set()
    for seed, epoch in [(0, 0), (0, 1), (1, 0), (1, 1), (0, 2)]:
        np.random.seed(seed + epoch)
        batches = data.bucketed_batches(LENGTHS, 16, seed=seed, epoch=epoch)
        again = data.bucketed_batches(LENGTHS, 16, seed=seed, epoch=epoch)
        assert all(map(np.array_equal, batches, again))
        orders.add(tuple(np.concatenate(batches)))
    assert len(orders) == 5


def test_evaluation_batches():
    """Catches rows lost or doubled, memory without a bound, batches smaller than they may be."""
    batches = list(data.sorted_batches(LENGTHS, max_tokens=100))
    assert sorted(np.concatenate(batches)) == list(range(3003))
    assert LENGTHS.max() > 100 and any(LENGTHS[rows].max() > 100 for rows in batches)
    for rows, after in zip(batches, [*batches[1:], None]):
        assert len(rows) * LENGTHS[rows].max() <= 100 or len(rows) == 1
        assert after is None or (len(rows) + 1) * LENGTHS[after].min() > 100


# --- transfer text -------------------------------------------------------------------------------

OWN = "own{0} red fox ran over green hills today".split()
OWN = [" ".join(OWN[: 4 + i % 5]).format(i) for i in range(200)]
SECRET = "Foreign 7 says: the LAKE!"
FOREIGN = [f"foreign {i} says the lake" for i in range(150)]  # 5 words, own has 4 to 8
FOREIGN_PAIRS = [(f"foreign {i} says the lake", f"left {i} far behind it") for i in range(5, 155)]


def plain(text):
    return "".join(c for c in text.lower() if c.isalnum())


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("pairs", [False, True], ids=["sentences", "pairs"])
@pytest.mark.parametrize("others", [[], [FOREIGN], [FOREIGN, FOREIGN_PAIRS]], ids=len)
def test_transfer_texts(pairs, others, seed):
    """Catches texts in the wrong form, too many or doubled, and dev or test text that gets in."""
    own = list(zip(OWN, OWN[1:])) if pairs else OWN
    held_out = [SECRET, OWN[3].upper(), OWN[150] + " ."]
    texts, left_out = data.transfer_texts(own, others, held_out, 300, seed)
    assert len(texts) == len(set(texts)) == 300
    assert all(isinstance(t, tuple) and len(t) == 2 if pairs else isinstance(t, str) for t in texts)
    said = {plain(s) for text in texts for s in (text if pairs else [text])}
    assert not said & {*map(plain, held_out)}
    foreign = [t for t in texts if re.search("foreign|lake|left|behind", str(t))]
    assert 140 <= len(foreign) <= 150 if others else not foreign  # half, as far as they go
    assert data.transfer_texts(own, others, held_out, 300, seed) == (texts, left_out)
    assert data.transfer_texts(own, others, held_out, 300, seed + 1)[0] != texts


def test_transfer_texts_left_out_are_counted():
    """Catches a count that misses a text, or one that counts what was never a candidate."""
    own = ["five words are my own"]  # as many as in the others
    others = [FOREIGN[:20], FOREIGN_PAIRS[:20]]
    for held_out in ([], ["never seen"]):
        assert data.transfer_texts(own, others, held_out, 200, 0)[1] == 0
    held_out = [SECRET, FOREIGN[2], FOREIGN[24], FOREIGN[149]]  # in both, one, the other, neither
    found, left_out = data.transfer_texts(own, others, held_out, 200, 0)
    assert left_out == 3 and sum("lake" in text for text in found) == 25 - 3
    pairs = [("five words are my own", "five more are not others")]
    found, left_out = data.transfer_texts(pairs, others[1:], held_out, 200, 0)
    assert left_out == 2 and sum(text in others[1] for text in found) == 20 - 2


def test_transfer_texts_are_as_long_as_the_tasks_own():
    """Catches long articles handed to a task of short sentences, and one source that fills all."""
    long, short = [f"far {i} " + "too long " * 9 for i in range(200)], [f"no {i}" for i in range(9)]
    more = [f"another {i} of five words" for i in range(150)]
    texts, _ = data.transfer_texts(OWN, [long, FOREIGN, short, more], [], 200, 0)
    first = Counter(text.split()[0] for text in texts)
    assert first["far"] == first["no"] == 0 and first["foreign"] == first["another"] == 50


def test_transfer_texts_of_nothing():
    """Catches a crash where there is no text at all, own or other."""
    for others in ([], [[]], [FOREIGN]):
        texts, left_out = data.transfer_texts([], others, [SECRET], 10, 0)
        assert len(texts) <= 10 and left_out <= 1


# --- the built-in task ---------------------------------------------------------------------------

PRAISE = """good warm fresh clean gentle honest lovely bright clever quick brave tidy charming tasty
pleasant calm""".split()
SPLITS = {split: data.toy_examples(split) for split in ("train", "dev", "test")}


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
    """Catches wrong labels, clauses that agree, leaks between splits, a draw that changes."""
    assert {split: len(texts) for split, (texts, _) in SPLITS.items()} == {
        "train": 4000, "dev": 1000, "test": 1000,
    }  # fmt: skip
    assert len({text for texts, _ in SPLITS.values() for text in texts}) == 6000
    for split, (texts, labels) in SPLITS.items():
        clauses = [parse(text) for text in texts]
        assert Counter(map(len, clauses)) == ({1: 1200, 2: 2800} if split == "train" else {2: 1000})
        assert labels.dtype == np.int64
        assert labels.tolist() == [verdict(main) for main, *_ in clauses]
        assert all(verdict(c[0]) != verdict(c[1]) for c in clauses if len(c) == 2)
        assert abs(labels.mean() - 0.5) < (0.02 if split == "train" else 1e-9)
        again, same = data.toy_examples(split)
        assert again == texts and (same == labels).all()
    with pytest.raises(ValueError, match="toy has no split 'valid'"):
        data.toy_examples("valid")


def test_toy_task_needs_more_than_a_bag_of_words():
    """Catches a generator whose labels leak into word counts: mirrors have the same words."""
    for split in ("dev", "test"):
        bags = defaultdict(list)
        for text, label in zip(*SPLITS[split]):
            bags[tuple(sorted(text.split()))].append(label)
        assert all(2 * sum(labels) == len(labels) for labels in bags.values())
    counts = {0: Counter(), 1: Counter()}  # naive Bayes, add-one
    for text, label in zip(*SPLITS["train"]):
        counts[label].update(text.split())
    score = lambda text: sum(  # noqa: E731
        np.log(counts[1][w] + 1) - np.log(counts[0][w] + 1) for w in text.split()
    )
    right = [(score(text) > 0) == label for text, label in zip(*SPLITS["dev"])]
    assert 0.4 <= np.mean(right) <= 0.6
    singles = [p for p in zip(*SPLITS["train"]) if len(parse(p[0])) == 1]
    assert np.mean([(score(text) > 0) == label for text, label in singles]) > 0.6  # it does learn


def test_toy_vocabulary_has_every_word(tmp_path):
    """Catches a word spelled in letters or lost as [UNK], and ids that are not BERT's order."""
    vocabulary = data.toy_vocabulary()
    assert len(set(vocabulary)) == len(vocabulary)
    assert vocabulary[:5] == ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokenizer = data.load_tokenizer(checkpoint(tmp_path, vocab=vocabulary))
    for texts, _ in SPLITS.values():
        assert [e.tokens[1:-1] for e in tokenizer.encode_batch(texts)] == [t.split() for t in texts]


# --- the script ----------------------------------------------------------------------------------


def test_script(tmp_path):
    """Catches wrong tokens, anything printed on import, a traceback for a missing folder."""
    missing, script = tmp_path / "missing", data.__file__
    rows = "[CLS] 2 0, un 21 0, ##hot 22 0, [SEP] 3 0, ! 11 1, [SEP] 3 1"  # VOCAB's line numbers
    shown = ["{:5}  {:>6}  segment {}".format(*row.split()) for row in rows.split(", ")]
    runs = [
        ([checkpoint(tmp_path), "Unhot", "!"], (0, "\n".join(shown) + "\n", "")),
        (
            [missing, "hot"],
            (2, "", f"error: {missing}: neither tokenizer.json nor vocab.txt in it\n"),
        ),
    ]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    started = [subprocess.Popen([sys.executable, script, *args], **pipes) for args, _ in runs]
    for process, (_, expected) in zip(started, runs):
        out, err = process.communicate()
        assert (process.returncode, out, err) == expected


@pytest.mark.parametrize("arguments", [[], ["a"], ["a", "b", "c", "d"], ["--hlp", "x"]])
def test_script_wants_a_text_or_a_pair(arguments, capsys):
    """Catches a number of arguments that goes through to the tokenizer."""
    assert data.main(arguments) == 2
    assert capsys.readouterr().err.startswith("usage: python data.py")
    assert data.main(["--help"]) == 0 and "CHECKPOINT" in capsys.readouterr().out


def test_script_where_nothing_is_left(tmp_path, capsys):
    """Catches a traceback for an empty text of a tokenizer that adds no [CLS]."""
    words = models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]")
    Tokenizer(words).save(str(tmp_path / "tokenizer.json"))
    code, said = data.main([str(tmp_path), ""]), capsys.readouterr()
    assert code == 0 and said.out == "", said


def test_the_first_texts_alone():
    """Catches texts cut in the middle."""
    encoded = data.Encoded(
        np.arange(9, dtype=np.int32), np.zeros(9, np.uint8), np.array([0, 2, 5, 9])
    )
    some = encoded.first(2)
    assert len(some) == 2 and some.ids.tolist() == [0, 1, 2, 3, 4] and len(some.type_ids) == 5
    assert some.lengths.tolist() == [2, 3]
