"""Text to batches: a tokenizer, encoding once, length-bucketed batches, the built-in task.

    tokenizer = load_tokenizer("teacher", max_length=128)
    encoded = encode(tokenizer, ["one sentence", "another"])      # flat arrays, no padding
    for rows in bucketed_batches(encoded.lengths, 32, seed=0, epoch=0):
        batch = collate(encoded, rows)   # input_ids, token_type_ids, attention_mask, each (B, T)

`python data.py CHECKPOINT "text" ["pair"]` shows how a text is cut into tokens.
Shapes: B batch, T tokens of the longest text in the batch, n texts, S tokens of all texts
"""

import json
import random
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from tokenizers.implementations import BertWordPieceTokenizer  # type: ignore[attr-defined]
from tokenizers.normalizers import BertNormalizer
from torch import Tensor

__all__ = [
    "Encoded", "bucketed_batches", "collate", "concatenate", "encode", "load_tokenizer",
    "sentences_of", "sorted_batches", "toy_examples", "toy_vocabulary", "transfer_texts",
]  # fmt: skip

Texts = Sequence[Any]  # sentences, or (first, second) pairs of them

# --- tokenizer -----------------------------------------------------------------------------------


def load_tokenizer(folder: str | Path, max_length: int = 128) -> Tokenizer:
    """The tokenizer of a BERT checkpoint folder, from tokenizer.json or else vocab.txt.

    Truncates to max_length tokens, [CLS] and [SEP] included, a pair from its longer side first.
    `do_lower_case`, `strip_accents` and `tokenize_chinese_chars` of tokenizer_config.json are
    honoured. Raises FileNotFoundError where neither file is there, ValueError for broken ones.
    """
    folder = Path(folder)
    options = _tokenizer_options(folder)
    try:
        if (folder / "tokenizer.json").is_file():
            tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
            if isinstance(tokenizer.normalizer, BertNormalizer):
                for name, value in options.items():
                    setattr(tokenizer.normalizer, name, value)
        elif (folder / "vocab.txt").is_file():
            tokenizer = BertWordPieceTokenizer(str(folder / "vocab.txt"), **options)._tokenizer
        else:
            raise FileNotFoundError(f"{folder}: neither tokenizer.json nor vocab.txt in it")
    except (FileNotFoundError, MemoryError):
        raise
    except Exception as error:  # the library raises bare Exception for a file it cannot parse
        raise ValueError(f"{folder}: its tokenizer cannot be read: {error}") from None
    unknown = getattr(tokenizer.model, "unk_token", None)
    if unknown and tokenizer.token_to_id(unknown) is None:
        raise ValueError(f"{folder}: its tokenizer lacks {unknown}, the token of unknown words")
    tokenizer.no_padding()
    tokenizer.enable_truncation(max_length, strategy="longest_first")
    return tokenizer


def _tokenizer_options(folder: Path) -> dict[str, Any]:
    """tokenizer_config.json's switches under the names the tokenizers library gives them."""
    path = folder / "tokenizer_config.json"
    try:
        stored = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON: {error}") from None
    if not isinstance(stored, dict):
        raise ValueError(f"{path}: not a JSON object")
    names = {
        "do_lower_case": "lowercase",
        "strip_accents": "strip_accents",
        "tokenize_chinese_chars": "handle_chinese_chars",
    }
    return {
        ours: stored[theirs] for theirs, ours in names.items() if stored.get(theirs) is not None
    }


# --- encoding and batches ------------------------------------------------------------------------


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
    """Encodes sentences, or (first, second) pairs, in chunks that bound the memory taken.

    Raises ValueError naming the text that is no Unicode (a lone surrogate) or no text at all.
    """
    encode_batch = getattr(tokenizer, "encode_batch_fast", tokenizer.encode_batch)
    ids, type_ids, lengths = [np.zeros(0, np.int32)], [np.zeros(0, np.uint8)], [0]
    for start in range(0, len(texts), chunk):
        some = texts[start : start + chunk]
        try:
            encodings = encode_batch(some)
        except TypeError:
            _refuse_odd_text(some, start)
            raise
        except (MemoryError, KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # the library's own bare Exception, or a panic of its code
            raise ValueError(f"texts {start + 1} on: the tokenizer fails: {error}") from None
        found = [encoding.ids for encoding in encodings]
        ids.append(np.fromiter(chain.from_iterable(found), np.int32))
        lengths += map(len, found)
        if all(isinstance(text, str) for text in some):  # no second texts
            type_ids.append(np.zeros(len(ids[-1]), np.uint8))
        else:
            segments = (encoding.type_ids for encoding in encodings)
            type_ids.append(np.fromiter(chain.from_iterable(segments), np.uint8))
    return Encoded(np.concatenate(ids), np.concatenate(type_ids), np.cumsum(lengths))


def _refuse_odd_text(texts: Texts, start: int) -> None:
    """Raises ValueError for the first of these texts, numbers start + 1 on, that is none."""
    for number, text in enumerate(texts, start + 1):
        parts = [text] if isinstance(text, str) else text
        if not isinstance(parts, (list, tuple)) or not all(isinstance(p, str) for p in parts):
            raise ValueError(f"text {number} is {text!r:.80}, expected a string or a pair of them")
        for part in parts:
            try:
                part.encode("utf-8")
            except UnicodeEncodeError as error:
                raise ValueError(f"text {number}, character {error.start + 1}: {error}") from None


def concatenate(first: Encoded, second: Encoded) -> Encoded:
    """The texts of both, first's first."""
    return Encoded(
        np.concatenate([first.ids, second.ids]),
        np.concatenate([first.type_ids, second.type_ids]),
        np.concatenate([first.offsets, first.offsets[-1] + second.offsets[1:]]),
    )


def collate(encoded: Encoded, rows: np.ndarray) -> dict[str, Tensor]:
    """The texts of these rows, padded on the right to the longest of them, each int64 (B, T)."""
    lengths = encoded.lengths[rows]
    columns = np.arange(lengths.max())
    mask = columns < lengths[:, None]  # (B, T)
    place = np.where(mask, encoded.offsets[rows, None] + columns, 0)
    batch = {
        "input_ids": encoded.ids[place] * mask,
        "token_type_ids": encoded.type_ids[place] * mask,
        "attention_mask": mask,
    }
    return {name: torch.from_numpy(array.astype(np.int64)) for name, array in batch.items()}


def bucketed_batches(
    lengths: np.ndarray, batch_size: int, *, seed: int, epoch: int
) -> list[np.ndarray]:
    """Rows of each training batch: shuffled, neighbours in length together, the last one partial.

    A pool of 32 batches is sorted by length and cut into batches, and the batches are shuffled
    again: little padding, and an order that depends on (seed, epoch) alone.
    """
    rng = np.random.default_rng([seed, epoch])
    order = rng.permutation(len(lengths))
    pools = [order[i : i + 32 * batch_size] for i in range(0, len(order), 32 * batch_size)]
    pools = [pool[np.argsort(lengths[pool], kind="stable")] for pool in pools]
    cut = [pool[i : i + batch_size] for pool in pools for i in range(0, len(pool), batch_size)]
    return [cut[i] for i in rng.permutation(len(cut))]


def sorted_batches(lengths: np.ndarray, max_tokens: int = 2048) -> Iterator[np.ndarray]:
    """Rows in order of length, as many to a batch as max_tokens allow, padding included."""
    order = np.argsort(lengths, kind="stable")
    start = 0
    while start < len(order):
        stop = start + 1
        while stop < len(order) and (stop - start + 1) * lengths[order[stop]] <= max_tokens:
            stop += 1
        yield order[start:stop]
        start = stop


# --- transfer text -------------------------------------------------------------------------------


def transfer_texts(
    own: Texts,
    others: Sequence[Texts],
    held_out: Iterable[str],
    count: int,
    seed: int,
    given: Texts = (),
) -> tuple[list[Any], int]:
    """Up to count unlabelled texts in the form of the task's own, and how many were left out.

    own: the task's training texts, sentences or pairs; others: such texts from elsewhere, source
    by source; held_out: sentences of the task's dev and test splits: no text with one of them,
    alone or in a pair, is returned (compared without case, space and punctuation); given: texts
    to take first, of whatever length.
    Half is others' text, the sources in turn, as long as the task's own (5th to 95th percentile of
    the word counts), less what is given; half is the task's own, perturbed; where others is short,
    own fills up.
    """
    rng = random.Random(seed)
    banned = {_plain(text) for text in held_out}
    pairs = bool(own) and not isinstance(own[0], str)
    foreign = _in_turn([_in_form(source, own, pairs) for source in others], rng)
    sentences = [text for text in foreign if isinstance(text, str)]
    kept: dict[Any, None] = {}
    left_out = 0
    first = list(dict.fromkeys(given if pairs else sentences_of(given)))
    alone = [text for text in first if isinstance(text, str)]  # a pair needs another
    rounds: list[tuple[Texts, int]] = [(first, count), (foreign, count // 2)]
    rounds += [(own, count)] * (1 + count // max(1, len(own)))
    for source, limit in rounds:
        for text in source if source is foreign else rng.sample(source, len(source)):
            if len(kept) >= limit:
                break
            if source is own:
                text = _perturb_pair(text, own, rng) if pairs else _drop_words(text, rng)
            elif pairs and isinstance(text, str):
                text = _pair_up(text, alone if source is first else sentences, rng)
            if any(_plain(s) in banned for s in sentences_of([text])):
                left_out += 1
            else:
                kept[text] = None
    return list(kept), left_out


def sentences_of(texts: Iterable[Any]) -> list[str]:
    """The sentences of texts that are sentences or pairs, in order."""
    return [s for text in texts for s in ([text] if isinstance(text, str) else text)]


def _in_form(source: Texts, own: Texts, pairs: bool) -> list[Any]:
    """Pairs (for a task of pairs) and sentences of a source, in length between own's extremes."""
    sizes = sorted(map(_word_count, own or source)) or [0]
    low, high = sizes[len(sizes) // 20], sizes[len(sizes) * 19 // 20]
    sentences = sentences_of(source)
    texts = [text for text in source if pairs and not isinstance(text, str)]
    texts = [text for text in texts if low <= _word_count(text) <= high]
    if not texts:  # a pair needs two sentences, each of half the length
        low, high = low // (1 + pairs), high // (1 + pairs)
        texts = [text for text in sentences if low <= _word_count(text) <= high]
    return list(dict.fromkeys(texts))


def _in_turn(sources: Sequence[list[Any]], rng: random.Random) -> list[Any]:
    """All texts once, shuffled within their source, one of each source after the other."""
    shuffled = [rng.sample(source, len(source)) for source in sources]
    mixed = (text for row in zip_longest(*shuffled) for text in row if text is not None)
    return list(dict.fromkeys(mixed))


def _word_count(text: str | tuple[str, str]) -> int:
    return len((text if isinstance(text, str) else " ".join(text)).split())


def _plain(text: str) -> str:
    return re.sub(r"[\W_]+", "", text).lower()


def _drop_words(text: str, rng: random.Random, rate: float = 0.15) -> str:
    words = text.split()
    return " ".join(word for word in words if rng.random() >= rate) or text


def _pair_up(text: str, sentences: Sequence[str], rng: random.Random) -> tuple[str, str]:
    """A sentence with its own dropped-out copy, or with another one."""
    return text, _drop_words(text, rng) if rng.random() < 0.5 else rng.choice(sentences)


def _perturb_pair(pair: tuple[str, str], own: Texts, rng: random.Random) -> tuple[str, str]:
    first, second = pair if rng.random() < 0.5 else pair[::-1]
    kind = rng.random()
    if kind < 0.6:
        return _drop_words(first, rng), _drop_words(second, rng)
    return _pair_up(first, [rng.choice(own)[rng.randrange(2)]], rng)


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
    train (4,000) has 1,200 single clauses besides, to learn the words from; dev and test (1,000
    each) have none. No sentence is in two splits.
    """
    starts = {"train": 0, "dev": 2800, "test": 3800}
    if split not in starts:
        raise ValueError(f"toy has no split '{split}'; it has {', '.join(starts)}")
    rng = random.Random(0)
    both = _draw_examples(4800, rng, ["{1} but {0}", "although {1} , {0}", "{0} although {1}"])
    single = _draw_examples(1200, rng, ["{0}"])
    start = starts[split]
    chosen = both[:2800] + single if split == "train" else both[start : start + 1000]
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


def main(argv: Sequence[str] | None = None) -> int:
    """Prints tokens, ids and segments of one text or pair."""
    folder, *texts = list(sys.argv[1:] if argv is None else argv) or [""]
    helped = folder in ("-h", "--help")
    if helped or folder.startswith("-") or len(texts) not in (1, 2):
        usage = 'usage: python data.py CHECKPOINT "text" ["pair"] shows tokens, ids and segments'
        print(usage, file=sys.stdout if helped else sys.stderr)
        return 0 if helped else 2
    try:
        encoding = load_tokenizer(folder, max_length=512).encode(
            texts[0], texts[1] if len(texts) > 1 else None
        )
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    width = max(map(len, encoding.tokens), default=0)
    for row in zip(encoding.tokens, encoding.ids, encoding.type_ids):
        print(f"{row[0]:{width}}  {row[1]:6d}  segment {row[2]}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
