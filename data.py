"""Text to batches: a tokenizer, encoding once, length-bucketed batches, the built-in task.

    encoded = encode(load_tokenizer("teacher"), ["one sentence", "another"])
    for rows in bucketed_batches(encoded.lengths, 32, seed=0, epoch=0):
        batch = collate(encoded, rows)  # input_ids, token_type_ids, attention_mask, each (B, T)

Shapes: B batch, T tokens of the longest text in the batch, n texts, S tokens of all texts
"""

import json
import random
import sys
from array import array
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from tokenizers.implementations import BertWordPieceTokenizer  # type: ignore[attr-defined]
from torch import Tensor

Texts = Sequence[Any]  # sentences, or (first, second) pairs of them
Rows = np.ndarray  # numbers of texts
_SWITCHES = {"do_lower_case": "lowercase", "strip_accents": "strip_accents",
             "tokenize_chinese_chars": "handle_chinese_chars"}  # fmt: skip


def load_tokenizer(folder: str | Path, max_length: int = 128) -> Tokenizer:
    """The tokenizer of a BERT checkpoint folder; cuts a text, of a pair the longer, to max_length.

    Raises FileNotFoundError without tokenizer.json or vocab.txt, ValueError where one is broken.
    """
    whole, config = Path(folder, "tokenizer.json"), Path(folder, "tokenizer_config.json")
    path = whole if whole.is_file() else Path(folder, "vocab.txt")
    if not path.is_file():
        raise FileNotFoundError(f"{folder}: neither tokenizer.json nor vocab.txt in it")
    try:
        stored = json.loads(config.read_text(encoding="utf-8")) if config.is_file() else {}
        if path == whole:
            tokenizer = Tokenizer.from_file(str(path))
        else:
            tokenizer = BertWordPieceTokenizer(str(path))._tokenizer
        for theirs, ours in _SWITCHES.items():
            if stored.get(theirs) is not None and hasattr(tokenizer.normalizer, ours):
                setattr(tokenizer.normalizer, ours, stored[theirs])
    except Exception as error:  # the library raises bare Exception for a file it cannot parse
        raise ValueError(f"{folder}: {path.name} or {config.name} is broken: {error}") from None
    unknown = getattr(tokenizer.model, "unk_token", None)
    if unknown and tokenizer.token_to_id(unknown) is None:
        raise ValueError(f"{path}: its tokenizer lacks {unknown}, the token of unknown words")
    tokenizer.no_padding()
    tokenizer.enable_truncation(max_length, strategy="longest_first")
    return tokenizer


def read_lines(path: Path | None) -> Iterator[tuple[str, Any]]:
    """Where each line stands, and its text, pair (a tab between) or ValueError; None: stdin."""
    with path.open("rb") if path else nullcontext(sys.stdin.buffer) as file:
        for number, raw in enumerate(file, 1):
            try:
                cells = raw.decode("utf-8-sig").rstrip("\r\n").split("\t")
                if len(cells) > 2:
                    raise ValueError(f"{len(cells)} tab-separated texts, expected one or a pair")
                text: Any = cells[0] if len(cells) == 1 else tuple(cells)
            except ValueError as error:  # UnicodeDecodeError is one
                text = error
            yield f"{path or 'standard input'}:{number}", text


@dataclass(frozen=True)
class Encoded:
    """n texts as token ids without padding; text i is ids[offsets[i]:offsets[i + 1]]."""

    ids: np.ndarray  # (S,) int32
    type_ids: np.ndarray  # (S,) uint8, 1 in the second text of a pair
    offsets: np.ndarray  # (n + 1,) int64

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each text, (n,)."""
        return np.diff(self.offsets)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def first(self, count: int) -> "Encoded":
        """The first texts, so many."""
        end = self.offsets[count]
        return Encoded(self.ids[:end], self.type_ids[:end], self.offsets[: count + 1])


def encode(tokenizer: Tokenizer, texts: Texts, chunk: int = 1024) -> Encoded:
    """The texts' tokens, chunk by chunk; ValueError names a chunk with what is no Unicode text."""
    ids, type_ids, offsets = array("i"), array("B"), array("q", [0])
    for start in range(0, len(texts), chunk):
        try:
            for encoding in tokenizer.encode_batch(texts[start : start + chunk]):
                ids.extend(encoding.ids)
                type_ids.extend(encoding.type_ids)
                offsets.append(len(ids))
        except Exception as error:  # bare ones of the library, TypeErrors for no text
            raise ValueError(f"texts {start + 1} on: the tokenizer fails: {error}") from None
    return Encoded(np.asarray(ids), np.asarray(type_ids), np.asarray(offsets))


def concatenate(first: Encoded, second: Encoded) -> Encoded:
    """The texts of both, first's first."""
    ids = np.append(first.ids, second.ids)
    type_ids = np.append(first.type_ids, second.type_ids)
    return Encoded(ids, type_ids, np.append(first.offsets, len(first.ids) + second.offsets[1:]))


def collate(encoded: Encoded, rows: Rows | Sequence[int], device: Any = None) -> dict[str, Tensor]:
    """The texts of these rows, padded on the right to the longest, int64 (B, T) on the device."""
    starts, stops = encoded.offsets[rows, None], encoded.offsets[np.add(rows, 1), None]  # (B, 1)
    place = starts + np.arange((stops - starts).max())  # (B, T), past the last text too
    mask = place < stops
    ids, type_ids = (a.take(place, mode="clip") * mask for a in (encoded.ids, encoded.type_ids))
    batch = torch.from_numpy(np.stack([ids, type_ids, mask]).astype(np.int64))  # (3, B, T)
    if device is not None and torch.device(device).type == "cuda":
        batch = batch.pin_memory().to(device, non_blocking=True)
    return dict(zip(("input_ids", "token_type_ids", "attention_mask"), batch.to(device)))


def bucketed_batches(lengths: np.ndarray, batch_size: int, *, seed: int, epoch: int) -> list[Rows]:
    """Rows of each training batch: shuffled by (seed, epoch) alone, similar lengths together."""
    rng = np.random.default_rng([seed, epoch])
    order = rng.permutation(len(lengths))
    pool = np.arange(len(order)) // (32 * batch_size)
    order = order[np.lexsort((lengths[order], pool))]  # each pool by length: little padding
    batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    return [batches[i] for i in rng.permutation(len(batches))]


def sorted_batches(lengths: np.ndarray, max_tokens: int = 2048) -> Iterator[Rows]:
    """Rows from the longest text down, as many to a batch as max_tokens allow with padding."""
    order = np.argsort(-lengths, kind="stable")
    while len(order):
        size = max(1, max_tokens // max(1, lengths[order[0]]))
        yield order[:size]
        order = order[size:]


def transfer_texts(
    own: Texts, others: Sequence[Texts], held_out: Texts, count: int, seed: int, given: Texts = ()
) -> tuple[list[Any], int]:
    """Up to count unlabelled texts, sentences or pairs as own are, and how many were left out.

    First the given ones; up to half are others', the sources in turn, as long as own ones (5th to
    95th percentile of the words); then own ones, perturbed. None has a sentence of held_out.
    """
    rng = random.Random(seed)
    banned = set(map(_plain, sentences_of(held_out)))
    pairs = bool(own) and not isinstance(own[0], str)
    in_turn = zip_longest(*(_in_form(source, own, pairs, rng) for source in others))
    foreign = list(dict.fromkeys(t for row in in_turn for t in row if t is not None))
    first = list(dict.fromkeys(given if pairs else sentences_of(given)))
    rounds: list[tuple[Texts, int]] = [(first, count), (foreign, count // 2)]
    kept: dict[Any, None] = {}
    left_out = 0
    for source, limit in rounds + [(own, count)] * (1 + count // max(1, len(own))):
        sentences = [text for text in source if isinstance(text, str)]
        for text in source if source is foreign else rng.sample(source, len(source)):
            if len(kept) >= limit:
                break
            if source is own or (pairs and isinstance(text, str)):
                text = _perturb(text, own, sentences, rng)
            if banned.isdisjoint(map(_plain, sentences_of([text]))):
                kept[text] = None
            else:
                left_out += 1
    return list(kept), left_out


def sentences_of(texts: Iterable[Any]) -> list[str]:
    """The sentences of texts that are sentences or pairs, in order."""
    return [s for text in texts for s in ([text] if isinstance(text, str) else text)]


def _in_form(source: Texts, own: Texts, pairs: bool, rng: random.Random) -> list[Any]:
    """A source's pairs, or else its sentences, in length between own's extremes, shuffled."""
    sizes = sorted(len(" ".join(sentences_of([text])).split()) for text in own or source) or [0]
    low, high = sizes[len(sizes) // 20], sizes[len(sizes) * 19 // 20]
    texts: Texts = [text for text in source if pairs and not isinstance(text, str)]
    texts = [pair for pair in texts if low <= len(" ".join(pair).split()) <= high]
    if not texts:  # a pair needs two sentences, each of half the length
        low, high = low // (1 + pairs), high // (1 + pairs)
        texts = [text for text in sentences_of(source) if low <= len(text.split()) <= high]
    texts = list(dict.fromkeys(texts))
    return rng.sample(texts, len(texts))


def _plain(text: str) -> str:
    return "".join(filter(str.isalnum, text)).lower()  # without space and punctuation


def _perturb(text: Any, own: Texts, sentences: Texts, rng: random.Random) -> Any:
    """Words dropped from a text, or a pair of a sentence and its dropped-out copy or another."""
    if isinstance(own[0], str):  # a task of sentences
        return _drop_words(text, rng)
    if not isinstance(text, str):
        text, second = text if rng.random() < 0.5 else text[::-1]
        if rng.random() < 0.6:
            return _drop_words(text, rng), _drop_words(second, rng)
        sentences = [rng.choice(own)[rng.randrange(2)]]
    return text, _drop_words(text, rng) if rng.random() < 0.5 else rng.choice(sentences)


def _drop_words(text: str, rng: random.Random) -> str:
    return " ".join(word for word in text.split() if rng.random() >= 0.15) or text


# --- the built-in task ---------------------------------------------------------------------------

_THINGS = """soup bread coffee salad film music garden hotel room waiter driver teacher ticket train
bridge market novel story picture dancer singer lamp carpet window""".split()
_GOOD = """good warm fresh clean gentle honest lovely bright clever quick brave tidy charming tasty
pleasant calm""".split()
_BAD = """bad cold stale dirty rude false ugly dull silly slow timid messy boring bitter awful
noisy""".split()
_DEGREES = "really rather very quite truly fairly".split()
_PLACES = """at the station|near the river|on monday|in the old town|after lunch|last winter|
by the door|for a change""".replace("\n", "").split("|")


def toy_examples(split: str) -> tuple[list[str], np.ndarray]:
    """Generated verdicts such as `the soup was not bitter but the waiter was rude` -> 0 (negative).

    The two clauses always disagree and the main one decides: the second after `but` or a leading
    `although`, the first before a trailing `although`; `not` turns its adjective. Every sentence
    comes with its mirror, clauses exchanged, same words, other label: a bag of words scores 50 %.
    train has 80, dev and test 1,000 each, unlabelled 6,000; pretraining, of the task's BERT, 6,000
    and 2,000 single clauses. No sentence is in two splits.
    """
    sizes = {"train": 80, "dev": 1000, "test": 1000, "unlabelled": 6000, "pretraining": 6000}
    rng, count = random.Random(0), sum(sizes.values())
    both = _draw_examples(count, rng, ["{1} but {0}", "although {1} , {0}", "{0} although {1}"])
    start = sum(sizes[name] for name in [*sizes][: [*sizes].index(split)])
    chosen = both[start : start + sizes[split]]
    chosen += _draw_examples(2000, rng, ["{0}"]) if split == "pretraining" else []
    rng.shuffle(chosen)
    return [text for text, _ in chosen], np.array([label for _, label in chosen], dtype=np.int64)


def _draw_examples(count: int, rng: random.Random, forms: list[str]) -> list[tuple[str, int]]:
    """Sentences, each once, with their labels; {0} is the main clause. Mirrors stay together."""
    examples: dict[str, int] = {}
    while len(examples) < count:
        label = rng.randrange(2)
        main, other = _clause(label, rng), _clause(1 - label, rng)
        form = rng.choice(forms)
        examples[form.format(main, other)] = label
        examples[form.format(other, main)] = 1 - label
    return list(examples.items())[:count]


def _clause(label: int, rng: random.Random) -> str:
    turned = rng.random() < 0.3
    words = [f"the {rng.choice(_THINGS)}"]
    words += [rng.choice(_PLACES)] if rng.random() < 0.3 else []
    words += ["was"] + (["not"] if turned else [])
    words += [rng.choice(_DEGREES)] if rng.random() < 0.5 else []
    return " ".join([*words, rng.choice(_GOOD if label != turned else _BAD)])


def toy_vocabulary() -> list[str]:
    """Lines of the built-in task's vocab.txt: special tokens, its words, single letters."""
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    words = {*_THINGS, *_GOOD, *_BAD, *_DEGREES, *" ".join(_PLACES).split()}
    words |= {"the", "was", "not", "but", "although", ","}
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    return special + sorted(words | set(letters)) + [f"##{letter}" for letter in letters]


def toy_files() -> dict[str, str]:
    """The built-in task as files of a folder: name -> content."""
    files = {"vocab.txt": "\n".join([*toy_vocabulary(), ""])}
    files["tokenizer_config.json"] = '{"tokenizer_class": "BertTokenizer", "do_lower_case": true}\n'
    files["unlabelled.txt"] = "\n".join([*toy_examples("unlabelled")[0], ""])
    for split in ("train", "dev", "test"):
        rows = [f"{t}\t{('negative', 'positive')[label]}" for t, label in zip(*toy_examples(split))]
        files[f"{split}.tsv"] = "\n".join(["sentence\tlabel", *rows, ""])
    return files


def main(argv: Sequence[str] | None = None) -> int:
    """`python data.py CHECKPOINT "text" ["pair"]` prints tokens, ids and segments."""
    folder, *texts = list(sys.argv[1:] if argv is None else argv) or [""]
    if folder.startswith("-") or len(texts) not in (1, 2):
        print('usage: python data.py CHECKPOINT "text" ["pair"]', file=sys.stderr)
        return 0 if folder in ("-h", "--help") else 2
    try:
        tokenizer = load_tokenizer(folder, max_length=512)
        encoded = encode(tokenizer, [texts[0] if len(texts) == 1 else tuple(texts)])
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for number, segment in zip(encoded.ids.tolist(), encoded.type_ids):
        print(f"{tokenizer.id_to_token(number):16}  {number:6d}  segment {segment}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
