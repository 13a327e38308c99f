"""Text to batches: a tokenizer, encoding once, length-bucketed batches, the built-in task.

    encoded = encode(load_tokenizer("teacher"), ["one sentence", "another"])
    for rows in bucketed_batches(encoded.lengths, 32, seed=0, epoch=0):
        batch = collate(encoded, rows)  # input_ids, token_type_ids, attention_mask, each (B, T)

Shapes: B batch, T tokens of the longest text in the batch, n texts, S tokens of all texts
"""

import json
import math
import random
import re
import sys
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import pairwise, zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import AddedToken, Tokenizer
from tokenizers.implementations import BertWordPieceTokenizer  # type: ignore[attr-defined]
from tokenizers.models import WordPiece
from tokenizers.processors import BertProcessing
from torch import Tensor

Texts = Sequence[Any]  # sentences, or (first, second) pairs of them
Rows = np.ndarray  # numbers of texts
Near = Mapping[str, Sequence[str]]  # words that a word may give way to
TOKENIZER_FILES = ("tokenizer.json", "vocab.txt", "tokenizer_config.json",
                   "special_tokens_map.json", "added_tokens.json")  # fmt: skip
_SWITCHES = {"do_lower_case": "lowercase", "strip_accents": "strip_accents",
             "tokenize_chinese_chars": "handle_chinese_chars"}  # fmt: skip
_SPECIAL = {"unk_token": "[UNK]", "pad_token": "[PAD]", "mask_token": "[MASK]",
            "cls_token": "[CLS]", "sep_token": "[SEP]"}  # fmt: skip
_BERTS = r"((Distil|Mobile)?Bert|Electra)Tokenizer(Fast)?"  # classes that read texts as BERT does
_STAND_IN = rb"\s*(<!doctype|<html|<\?xml|version https://git-lfs)"  # in place of a file
_NO_TEXTS = {  # how files begin that are not texts, one a line
    rb"\xff\xfe|\xfe\xff|.?\0": "UTF-16, not UTF-8",
    _STAND_IN: "an HTML page or a Git LFS pointer",
    rb"[^\n]*\r[^\n]": "lines that end in CR alone",
    rb"((sentence[12]?|label)[\t\r\n]+){2,3}$": "a header; --task FOLDER --split dev reads it",
}


def load_tokenizer(folder: str | Path, max_length: int = 128) -> Tokenizer:
    """The tokenizer of a BERT checkpoint folder; cuts a text, of a pair the longer, to max_length.

    Raises FileNotFoundError without tokenizer.json or vocab.txt, ValueError where a file is broken
    or asks for another kind of tokenizer than BERT's.
    """
    tokenizer, settings = _read_tokenizer(Path(folder))
    if settings.get("do_lower_case") is None and getattr(tokenizer.normalizer, "lowercase", False):
        special = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
        if cased := {word for word in tokenizer.get_vocab() if word != word.lower()} - special:
            told = f"its {len(cased)} words with capitals, such as {min(cased)}, are never met"
            how = 'a tokenizer_config.json with "do_lower_case": false keeps capitals'
            print(f"note: {folder} lower-cases texts, so {told}; {how}", file=sys.stderr)
    tokenizer.enable_truncation(max_length, direction=settings["truncation_side"])
    return tokenizer


def tokenizer_files(folder: str | Path, positions: int) -> dict[str, bytes]:
    """A checkpoint's tokenizer files, by name, to go with a model of so many positions.

    They say all that `load_tokenizer` makes of them, so that `transformers` reads texts alike.
    """
    tokenizer, settings = _read_tokenizer(Path(folder))
    files = {n: p.read_bytes() for n in TOKENIZER_FILES if (p := Path(folder, n)).is_file()}
    files["tokenizer.json"] = tokenizer.to_str().encode()
    for theirs, ours in _SWITCHES.items():
        settings[theirs] = getattr(tokenizer.normalizer, ours, settings.get(theirs))
    added = json.loads(files["tokenizer.json"])["added_tokens"]
    settings["added_tokens_decoder"] = {token.pop("id"): token for token in added}
    settings["model_max_length"] = min(positions, settings.get("model_max_length") or positions)
    settings |= {"tokenizer_class": "PreTrainedTokenizerFast", "padding_side": "right"}
    settings["model_input_names"] = ["input_ids", "token_type_ids", "attention_mask"]
    files["tokenizer_config.json"] = (json.dumps(settings, indent=1) + "\n").encode()
    return files


def _read_tokenizer(folder: Path) -> tuple[Tokenizer, dict[str, Any]]:
    """The tokenizer, uncut, and all that the folder says of it as in tokenizer_config.json."""
    there = [path for name in TOKENIZER_FILES[:2] if (path := folder / name).is_file()]
    if not there:
        raise FileNotFoundError(f"{folder}: neither tokenizer.json nor vocab.txt in it")
    path, (settings, tokens) = there[0], _tokenizer_settings(folder)
    with _blaming(f"{path} or {TOKENIZER_FILES[2]}"):
        if path.suffix == ".json":
            tokenizer = Tokenizer.from_str(_text(path))
        else:
            settings |= {key: settings.get(key) or token for key, token in _SPECIAL.items()}
            tokenizer = BertWordPieceTokenizer()._tokenizer
            tokenizer.model = WordPiece.from_file(str(path) if _text(path) else "")
        if not isinstance(tokenizer.model, WordPiece):
            raise ValueError(f"its model is {type(tokenizer.model).__name__}, expected WordPiece")
        for token in sorted(tokens, key=lambda token: token.get("id", math.inf)):
            number = token.pop("id", None)
            tokenizer.add_tokens([AddedToken(**token)])
            if number not in (None, found := tokenizer.token_to_id(token["content"])):
                raise ValueError(f"added token {token['content']} is {found}, expected {number}")
        _adjust(tokenizer, settings)
    return tokenizer, settings


def _tokenizer_settings(folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """tokenizer_config.json with what the files beside it say; the tokens that they add."""
    read: list[dict[str, Any]] = []
    for path in (folder / name for name in ("config.json", *TOKENIZER_FILES[2:])):
        with _blaming(path):
            read.append({**json.loads(_text(path))} if path.is_file() else {})
    config, stored, special, numbers = read
    kind = stored.get("auto_map") or stored.get("tokenizer_class") or config.get("tokenizer_class")
    kind = str(kind or "BertTokenizer")
    if not re.fullmatch(f"{_BERTS}|PreTrainedTokenizerFast|TokenizersBackend", kind):
        raise ValueError(f"{folder}: tokenizer_class is {kind}, expected BERT's: BertTokenizer")
    with _blaming(folder / TOKENIZER_FILES[2]):
        whole = [{**t, "id": int(i)} for i, t in (stored.get("added_tokens_decoder") or {}).items()]
        settings = (special | stored if whole else stored | special) | {"tokenizer_class": kind}
        lists = [where.get(f"{key}_special_tokens") or () for where in (stored, special)
                 for key in ("additional", "extra")]  # fmt: skip
        named = [t for some in lists for t in (some.values() if isinstance(some, dict) else some)]
        named = [t if isinstance(t, dict) else {"content": t} for t in named]
        for key in (key for key in _SPECIAL if isinstance(settings.get(key), dict)):
            settings[key] = settings[key]["content"]
        marked = {*(t["content"] for t in named), *(settings.get(key) for key in _SPECIAL)}
        added = [{"content": t, "id": i} for t, i in numbers.items()]
        tokens = {t["content"]: t for t in (*named, *added, *whole)}
        for content, token in tokens.items():
            token.setdefault("special", content in marked)
            token.pop("__type", None)
    return settings, [*tokens.values()]


def _adjust(tokenizer: Tokenizer, settings: dict[str, Any]) -> None:
    """Makes the tokenizer what the settings ask for, and has them say what it is."""
    side = (tokenizer.truncation or {}).get("direction", "right")
    tokenizer.no_padding()
    tokenizer.no_truncation()
    own = tokenizer.encode("").tokens  # [CLS] and [SEP], or what it has for them
    other = {settings.get("cls_token"), settings.get("sep_token")} - {None, *own}
    found = {"truncation_side": side, "unk_token": tokenizer.model.unk_token}
    for key, value in (_SPECIAL | found | dict(zip(("cls_token", "sep_token"), own))).items():
        settings[key] = settings.get(key) or value
    if re.fullmatch(_BERTS, settings["tokenizer_class"]):  # the others use tokenizer.json as it is
        for theirs, ours in _SWITCHES.items():
            if settings.get(theirs) is not None and hasattr(tokenizer.normalizer, ours):
                setattr(tokenizer.normalizer, ours, settings[theirs])
        tokenizer.model.unk_token = settings["unk_token"]
    for token in (tokenizer.model.unk_token, *other):
        if tokenizer.token_to_id(token) is None:
            raise ValueError(f"its tokenizer lacks {token}")
    if other:
        ends = [settings["sep_token"], settings["cls_token"]]
        sep, cls = [(token, tokenizer.token_to_id(token) or 0) for token in ends]
        tokenizer.post_processor = BertProcessing(sep, cls)
    settings |= {key: None for key in _SPECIAL if tokenizer.token_to_id(settings[key]) is None}
    tokenizer.add_special_tokens([settings[key] for key in _SPECIAL if settings[key]])
    tokenizer.encode_special_tokens = bool(settings.get("split_special_tokens"))


@contextmanager
def _blaming(path: str | Path) -> Iterator[None]:
    """Whatever goes wrong inside is a ValueError that names the file; the library's are bare."""
    try:
        yield
    except Exception as error:
        raise ValueError(f"{path} is broken: {error}") from None


def _text(path: Path) -> str:
    """What is in a text file. Raises ValueError for what was downloaded in place of it."""
    raw = path.read_bytes()
    if re.match(_STAND_IN, raw, re.I):
        raise ValueError("an HTML page or a Git LFS pointer, not the file itself")
    return raw.decode()


def read_lines(path: Path | None) -> Iterator[tuple[str, Any]]:
    """Where each line stands, and its text, pair (a tab between) or ValueError; None: stdin.

    Raises ValueError where the first line shows that the file is another than one text a line.
    """
    with path.open("rb") if path else nullcontext(sys.stdin.buffer) as file:
        for number, raw in enumerate(file, 1):
            for start, kind in _NO_TEXTS.items() if number == 1 else ():
                if re.match(start, raw, re.I):
                    raise ValueError(
                        f"{path or 'standard input'}:1: {kind}; expected a text a line"
                    )
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
    own: Texts, others: Sequence[Texts], held_out: Texts, count: int, seed: int, given: Texts = (),
    near: Near | None = None,
) -> tuple[list[Any], int]:  # fmt: skip
    """Up to count unlabelled texts, sentences or pairs as own are, and how many were left out.

    First the given ones; up to a fifth are others', the sources in turn, as long as own ones (5th
    to 95th percentile of the words); then own ones, perturbed, with words of `near_words` in place
    of some. None has a sentence of held_out.
    """
    edit = partial(_edit, near=near or {}, rng=random.Random(seed + 1))
    rng = random.Random(seed)
    banned, known = set(map(_plain, sentences_of(held_out))), {*own}
    pairs = bool(own) and not isinstance(own[0], str)
    in_turn = zip_longest(*(_in_form(source, own, pairs, rng) for source in others))
    foreign = list(dict.fromkeys(t for row in in_turn for t in row if t is not None))
    first = list(dict.fromkeys(given if pairs else sentences_of(given)))
    rounds: list[tuple[Texts, int]] = [(first, count), (foreign, count // 5)]
    kept: dict[Any, None] = {}
    left_out = 0
    for source, limit in rounds + [(own, count)] * (1 + 2 * count // max(1, len(own))):
        sentences = [text for text in source if isinstance(text, str)]
        for text in source if source is foreign else rng.sample(source, len(source)):
            if len(kept) >= limit:
                break
            if source is own or (pairs and isinstance(text, str)):
                text = _perturb(text, own, sentences, edit, rng)
            if not banned.isdisjoint(map(_plain, sentences_of([text]))):
                left_out += 1
            elif source is not own or text not in known:
                kept[text] = None
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


def _perturb(
    text: Any, own: Texts, sentences: Texts, edit: Callable[[str], str], rng: random.Random
) -> Any:
    """A text edited; of pairs a fifth are a sentence and its edited copy or another sentence."""
    if isinstance(own[0], str):  # a task of sentences
        return edit(text)
    if not isinstance(text, str):
        text, second = text if rng.random() < 0.5 else text[::-1]
        if rng.random() < 0.8:
            return edit(text), edit(second)
        sentences = [rng.choice(own)[rng.randrange(2)]]
    return text, edit(text) if rng.random() < 0.5 else rng.choice(sentences)


def _edit(text: str, near: Near, rng: random.Random) -> str:
    """One or two words replaced by a near one, dropped, or exchanged with the next."""
    pieces = re.findall(r"\w+|\W+", text)
    for _ in range(rng.choice((1, 1, 2))):
        places = [i for i, piece in enumerate(pieces) if re.match(r"\w", piece)]
        if len(places) < 2:
            break
        (here, after), kind = rng.choice(list(pairwise(places))), rng.random()
        if kind < 0.5:
            here = rng.choice((here, after))  # the last word too
            pieces[here] = rng.choice(near.get(pieces[here].lower()) or [pieces[here]])
        elif kind < 0.75:
            del pieces[here:after]
        else:
            pieces[here], pieces[after] = pieces[after], pieces[here]
    return "".join(pieces)


def near_words(tokenizer: Tokenizer, embeddings: Tensor, texts: Texts, count: int = 12) -> Near:
    """For each word of the texts, lower-cased, that is a token: the nearest ones in a BERT's input.

    embeddings (vocab_size, H), of which the cosine is taken. Words of several tokens have none.
    """
    numbers = {word: n for word, n in tokenizer.get_vocab().items() if word.isalpha()}
    names = sorted(numbers)
    table = F.normalize(embeddings[[numbers[name] for name in names]], dim=-1)  # (words, H)
    wanted = {word.lower() for text in sentences_of(texts) for word in re.findall(r"\w+", text)}
    rows = [row for row, name in enumerate(names) if name in wanted]
    near: dict[str, list[str]] = {}
    for start in range(0, len(rows), 256):
        some = rows[start : start + 256]
        found = (table[some] @ table.T).topk(min(count + 1, len(names))).indices.tolist()
        near |= {names[row]: [names[n] for n in best[1:]] for row, best in zip(some, found)}
    return near


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
    places = [Path(folder, part) for part in ("", "student", "teacher")]  # or of a run
    if folder.startswith("-") or len(texts) not in (1, 2):
        print('usage: python data.py CHECKPOINT "text" ["pair"]', file=sys.stderr)
        return 0 if folder in ("-h", "--help") else 2
    try:
        found = [place for place in places if (place / "config.json").is_file()]
        tokenizer = load_tokenizer((found or places)[0], max_length=512)
        encoded = encode(tokenizer, [texts[0] if len(texts) == 1 else tuple(texts)])
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for number, segment in zip(encoded.ids.tolist(), encoded.type_ids):
        print(f"{tokenizer.id_to_token(number):16}  {number:6d}  segment {segment}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
