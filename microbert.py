"""MicroBERT: distil a fine-tuned BERT into a layer-pruned student, all of it in this file.

[1] Zheng et al. 2024, MicroBERT             https://doi.org/10.3390/app14146171
[2] Devlin et al. 2018, BERT                 https://arxiv.org/abs/1810.04805
[3] Hinton et al. 2015, soft targets         https://arxiv.org/abs/1503.02531
[4] Shazeer et al. 2017, mixture of experts  https://arxiv.org/abs/1701.06538
[5] Goodfellow et al. 2014, GAN              https://arxiv.org/abs/1406.2661
[6] Miyato et al. 2018, spectral norm        https://arxiv.org/abs/1802.05957
[7] Menon et al. 2021, logit adjustment      https://arxiv.org/abs/2007.07314

Shapes: B batch, T tokens, H hidden_size, N heads, L layers, K matched layers, E = 3 experts
(cls, max, mean), P expert_size, C labels, F what a discriminator sees of a text, n examples.
OURS(i) marks a choice that [1]'s public part does not settle; row i of the README table says why.

Reading order: configs, encoder, pruning, losses, features and experts, discriminator, the student's
objective, the training loop and the teacher's pass: that is the method. Then what a tool needs:
continuing a killed run, checkpoint files, the run as a whole (`distill`) and its command line.
Copied alone into another project this file has model, checkpoints and losses; from the training
loop on data.py is needed too, and glue.py to run a task.
"""

import argparse
import copy
import difflib
import inspect
import io
import json
import math
import os
import platform
import re
import shlex
import shutil
import statistics
import struct
import sys
import time
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, field, fields, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    import numpy
    from tokenizers import Tokenizer

    import data
    import glue

__all__ = [
    "Bert", "BertConfig", "BertOutput", "Discriminator", "DistillConfig", "Distillation",
    "FeatureMapping", "Log", "SentenceExperts", "TeacherCache", "ablate", "adversarial_loss",
    "alignment_loss", "discriminator_loss", "distill", "download_bert", "evaluate",
    "finetune", "fit_experts", "hard_loss", "kept_layers", "layer_map", "load_bert", "make_experts",
    "model_outputs", "predict_logits", "prune", "save_bert", "sentence_features",
    "soft_loss", "teacher_pass", "train",
]  # fmt: skip
__version__ = "0.1.0"


# --- configs -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class BertConfig:
    """Shape of a BERT [2], under the keys of Hugging Face's config.json."""

    vocab_size: int = 30522
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    classifier_dropout: float | None = None  # None is hidden_dropout_prob
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-12
    pad_token_id: int = 0
    labels: tuple[str, ...] = ("LABEL_0", "LABEL_1")  # id2label; a single one is a score

    @classmethod
    def load(cls, path: str | Path) -> "BertConfig":
        """Reads config.json. Raises ValueError naming what is not a BERT this file implements."""
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file; a checkpoint folder has a config.json")
        if path.stat().st_size > 2**24:
            raise ValueError(f"{path}: {path.stat().st_size} bytes, expected a page of JSON")
        try:
            stored = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}: not JSON: {error}") from None
        if not isinstance(stored, dict):
            raise ValueError(f"{path}: a JSON {type(stored).__name__}, expected an object")
        for key, implemented in _IMPLEMENTED.items():
            if stored.get(key, implemented[0]) not in implemented:
                raise ValueError(f"{path}: {key} {stored[key]!r}, implemented: {implemented[0]!r}")
        values = {f.name: stored[f.name] for f in fields(cls) if f.name in stored}
        try:
            unnamed = {i: f"LABEL_{i}" for i in range(min(stored.get("num_labels", 2), 2**10 + 1))}
            names = {int(i): str(name) for i, name in (stored.get("id2label") or unnamed).items()}
            if sorted(names) != list(range(len(names))):
                raise ValueError(f"id2label has the ids {sorted(names)}, expected 0, 1, ...")
            values["labels"] = tuple(names[i] for i in range(len(names)))
            config = cls(**values)
            config._check()
        except (TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"{path}: {error}") from None
        return config

    def _check(self) -> None:
        for f in fields(self):
            value, low = getattr(self, f.name), 0 if f.name == "pad_token_id" else 1
            high = 2**10 if f.name.startswith("num_") else 2**24  # nobody's BERT is larger
            if f.type is int and not (type(value) is int and low <= value <= high):
                raise ValueError(f"{f.name} is {value!r}, expected a whole number, {low} to {high}")
            value = 0 if value is None and f.name == "classifier_dropout" else value
            share = f.type in (float, float | None)
            if share and not (type(value) in (int, float) and 0 <= value <= 1):
                raise ValueError(f"{f.name} is {value!r}, expected a number, 0 to 1")
        if not 1 <= len(self.labels) <= 2**10:
            raise ValueError(f"{len(self.labels)} labels or more, expected 1 to {2**10}")
        if len({*self.labels}) < len(self.labels) or _CONTROL.search("".join(self.labels)):
            shown = f"{self.labels!r:.80}"
            raise ValueError(f"labels {shown}, expected different names, no control characters")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} is no multiple of num_attention_heads "
                f"{self.num_attention_heads}"
            )

    def to_json(self) -> str:
        """A config.json as transformers' AutoModelForSequenceClassification reads it."""
        stored = asdict(self)
        labels = stored.pop("labels")
        stored |= {
            "model_type": "bert",
            "architectures": ["BertForSequenceClassification"],
            "position_embedding_type": "absolute",
            "id2label": {str(i): name for i, name in enumerate(labels)},
            "label2id": {name: i for i, name in enumerate(labels)},
            "problem_type": "regression" if len(labels) == 1 else "single_label_classification",
        }
        return json.dumps(stored, indent=2, sort_keys=True) + "\n"


_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")  # would break a line
_IMPLEMENTED: dict[
    str, tuple[Any, ...]
] = {  # what BertConfig.load accepts under keys it does not keep
    "model_type": ("bert",),
    "position_embedding_type": ("absolute", None),
    "hidden_act": ("gelu",),
    "problem_type": ("single_label_classification", "regression", None),
    "is_decoder": (False, None),
    "add_cross_attention": (False, None),
}


def opt(default: Any, help: str, group: str = "") -> Any:
    """A config field whose help text is its documentation; --help prints the same words.

    group: heading in --help of this field and of those that follow.
    """
    return field(default=default, metadata={"help": help, "group": group})


@dataclass(frozen=True)
class DistillConfig:
    """Every option of every command: its default, and what --help says of it."""

    task: str = opt(
        "toy",
        "'toy' (built in), a GLUE task (CoLA SST-2 MRPC ...) or a folder of data of your own",
        group="task and files",
    )
    regression: bool = opt(False, "the labels of your own data are scores, not classes")
    data_dir: str = opt("glue", "folder of the GLUE files, DATA_DIR/TASK/train.tsv and so on")
    bert: str = opt(
        "", "a pre-trained BERT to fine-tune into the teacher: a folder, or its name on the Hub"
    )
    teacher: str = opt(
        "", "or a teacher already fine-tuned: a folder, a run's --out, or its name on the Hub"
    )
    out: str = opt("", "folder to write [out]; for predict, file to write [standard output]")
    overwrite: bool = opt(False, "replace the run that --out holds: finished, or of other flags")
    force: bool = opt(False, "distil even a teacher that is no better than the majority label")

    layers: int = opt(
        0,
        "encoder layers it keeps, the lowest ones and the last, of pairs evenly spaced ones; "
        "0 is half the teacher's",
        group="the student",
    )
    keep_layers: str = opt("", "or the layers themselves, counted from 1: 2,4,6")
    baseline: bool = opt(
        True, "fine-tune it on labels alone too, passes as the teacher's, for the closing table"
    )

    moe: bool = opt(True, "mixture of experts over the sentence features", group="the method")
    fal: bool = opt(True, "feature alignment loss")
    gan: bool = opt(True, "discriminator and adversarial loss")
    soft: bool = opt(True, "soft targets")

    temperature: float = opt(2.0, "tau of the soft targets")
    soft_weight: float = opt(0.7, "weight a of the soft targets; the hard labels have 1 - a")
    alignment_weight: float = opt(3.0, "weight b of the feature alignment loss")
    adversarial_weight: float = opt(0.05, "weight c of the adversarial loss, once ramped up")
    expert_size: int = opt(128, "width P of an expert's projection")
    routing: str = opt("task", "'task': one gate per layer; 'sentence': a gate for each sentence")
    balance_weight: float = opt(0.01, "weight of the importance loss that keeps every expert used")
    transfer: str = opt(
        "", "file of unlabelled texts to distil on too, one a line, a tab between the two of a pair"
    )
    transfer_ratio: float = opt(
        -1.0, "transfer texts, of every source, per training example; -1 chooses, 0 is none"
    )
    logit_adjustment: float = opt(
        -1.0,
        "tau of the logit adjustment: answers that leave out how frequent the classes are; "
        "-1 is 1 for CoLA, else 0",
    )
    dropout: float = opt(
        0.0, "dropout of the student's layers while it is trained; embeddings keep the teacher's"
    )

    epochs: int = opt(
        0, "passes over training and transfer text; 0 chooses by their size", group="training"
    )
    label_epochs: int = opt(-1, "then passes over the labels alone; -1 is 3 for CoLA, else 0")
    teacher_epochs: int = opt(0, "passes of the teacher's fine-tuning; 0 chooses")
    lr: float = opt(0.0, "the student's peak learning rate; 0 is 3e-4, 1e-4 for CoLA, 1e-3 for toy")
    teacher_lr: float = opt(0.0, "the teacher's peak learning rate; 0 chooses")
    batch_size: int = opt(32, "texts per step")
    warmup: float = opt(0.1, "share of the steps in which the learning rate rises")
    weight_decay: float = opt(0.01, "AdamW's decay, of matrices only")
    clip: float = opt(1.0, "largest norm of the gradient")
    max_length: int = opt(128, "tokens per text, [CLS] and [SEP] included; longer ones are cut")
    limit: int = opt(0, "use the first N training examples; 0 is all")
    seed: int = opt(0, "of every random choice")
    device: str = opt("auto", "'auto', 'cpu', 'cuda' or 'mps'", group="machine and log")
    precision: str = opt(
        "auto",
        "'fp32', 'bf16' (autocast), or 'auto': bf16 to train where that is faster, else fp32",
    )
    log_every: int = opt(50, "steps between two lines of the log")
    save_every: int = opt(500, "steps between two checkpoints, from which a killed run continues")
    seeds: str = opt(
        "0,1,2", "seeds of teacher and students; {seed} in --teacher is each", group="the ablation"
    )
    rows: str = opt(
        "full,no-moe,no-fal,no-gan,no-soft,no-transfer,soft-only,soft-only+no-transfer,labels-only",
        "students to compare; a row is names and option=value joined by '+': layers=1+no-gan",
    )
    checkpoint: str = opt(
        "",
        "a checkpoint: its folder, the --out of a run (its student), or its name on the Hub",
        group="what to answer",
    )
    split: str = opt("dev", "the split: 'dev', 'test', or for MNLI 'test_mismatched'")
    text: Sequence[str] = opt((), "a text, or the two of a pair; none: --file or standard input")
    file: str = opt("", "file of texts, one a line, a tab between the two of a pair")
    json: bool = opt(False, "an object with all probabilities on each line")


# --- encoder -------------------------------------------------------------------------------------


class BertOutput(NamedTuple):
    """What a BERT returns."""

    logits: Tensor  # (B, C)
    hidden_states: tuple[Tensor, ...]  # L + 1 of (B, T, H), embeddings first


def dropout(hidden: Tensor, rate: float, training: bool) -> Tensor:
    """F.dropout; on the CPU one random number decides on four elements.

    Drawn for each element they took a fifth of a training step. `rate` is met to 1 / 65536.
    """
    if not training or not 0 < rate < 0.999 or hidden.device.type != "cpu":
        return F.dropout(hidden, rate, training)
    numbers = torch.empty(hidden.numel() // 4 + 1, dtype=torch.int64).random_(-(2**63), None)
    quarters = numbers.view(torch.int16)[: hidden.numel()].view(hidden.shape)
    kept = quarters >= round(rate * 2**16) - 2**15
    return hidden * (kept.to(hidden.dtype) * (1 / (1 - rate)))


class BertLayer(nn.Module):
    """Self-attention and feed-forward, each followed by a residual sum and a LayerNorm [2, 3.1]."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        hidden, eps = config.hidden_size, config.layer_norm_eps
        self.heads = config.num_attention_heads
        self.attention_dropout = config.attention_probs_dropout_prob
        self.hidden_dropout = config.hidden_dropout_prob
        self.query = nn.Linear(hidden, hidden)
        self.key = nn.Linear(hidden, hidden)
        self.value = nn.Linear(hidden, hidden)
        self.attention_output = nn.Linear(hidden, hidden)
        self.attention_norm = nn.LayerNorm(hidden, eps)
        self.intermediate = nn.Linear(hidden, config.intermediate_size)
        self.output = nn.Linear(config.intermediate_size, hidden)
        self.output_norm = nn.LayerNorm(hidden, eps)

    def forward(self, hidden: Tensor, mask: Tensor | None) -> Tensor:
        """hidden (B, T, H), mask (B, 1, 1, T) bool, True where a key may be seen -> (B, T, H)"""
        attended = self.attention_output(self.attend(hidden, mask))  # (B, T, H)
        attended = dropout(attended, self.hidden_dropout, self.training)  # (B, T, H)
        hidden = self.attention_norm(hidden + attended)  # (B, T, H)
        widened = F.gelu(self.intermediate(hidden))  # (B, T, intermediate_size), exact GELU
        narrowed = dropout(self.output(widened), self.hidden_dropout, self.training)  # (B, T, H)
        normed: Tensor = self.output_norm(hidden + narrowed)  # (B, T, H)
        return normed

    def attend(self, hidden: Tensor, mask: Tensor | None) -> Tensor:
        """Multi-head attention before its output projection, (B, T, H) -> (B, T, H)."""
        batch, tokens, width = hidden.shape
        split = (batch, tokens, self.heads, width // self.heads)
        query = self.query(hidden).view(split).transpose(1, 2)  # (B, N, T, H / N)
        key = self.key(hidden).view(split).transpose(1, 2)  # (B, N, T, H / N)
        value = self.value(hidden).view(split).transpose(1, 2)  # (B, N, T, H / N)
        rate = self.attention_dropout if self.training else 0.0
        mixed: Tensor  # (B, N, T, H / N)
        if self.training and hidden.device.type == "cpu":  # 2 to 4 times the fused one's speed here
            scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-1, -2)  # (B, N, T, T)
            if mask is not None:
                scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
            mixed = dropout(scores.softmax(-1), rate, True) @ value
        else:
            mixed = F.scaled_dot_product_attention(query, key, value, mask, rate)
        return mixed.transpose(1, 2).reshape(batch, tokens, width)


def _embedding(rows: int, size: int) -> nn.Embedding:
    """An embedding not drawn yet; nn.Embedding(rows, size) draws, even where `_draw` will again."""
    table: nn.Embedding = nn.Embedding.from_pretrained(torch.empty(rows, size), freeze=False)
    return table


class Bert(nn.Module):
    """BERT with a classifier over its pooler: Hugging Face's BertForSequenceClassification."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.config = config
        hidden = config.hidden_size
        self.word_embeddings = _embedding(config.vocab_size, hidden)
        self.position_embeddings = _embedding(config.max_position_embeddings, hidden)
        self.token_type_embeddings = _embedding(config.type_vocab_size, hidden)
        self.embeddings_norm = nn.LayerNorm(hidden, config.layer_norm_eps)
        self.layers = nn.ModuleList(BertLayer(config) for _ in range(config.num_hidden_layers))
        self.pooler = nn.Linear(hidden, hidden)
        self.classifier = nn.Linear(hidden, len(config.labels))
        head = config.classifier_dropout
        self.head_dropout = config.hidden_dropout_prob if head is None else head
        self.fresh: tuple[str, ...] = ()  # parts that load_bert had to draw at random
        self.apply(self._draw)

    def _draw(self, module: nn.Module) -> None:
        """BERT's initialisation, here normal where [2] truncates."""
        if isinstance(module, (nn.Linear, nn.Embedding)) and not module.weight.is_meta:
            nn.init.normal_(module.weight, std=self.config.initializer_range)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
    ) -> BertOutput:
        """input_ids (B, T); attention_mask (B, T), 0 at padding; token_type_ids (B, T), 0 or 1.

        Raises ValueError where T exceeds max_position_embeddings.
        """
        tokens = input_ids.shape[1]
        if tokens > self.config.max_position_embeddings:
            raise ValueError(
                f"{tokens} tokens for a BERT of {self.config.max_position_embeddings} positions"
            )
        positions = torch.arange(tokens, device=input_ids.device)  # (T,)
        segments = torch.zeros_like(input_ids) if token_type_ids is None else token_type_ids
        hidden = self.word_embeddings(input_ids) + self.token_type_embeddings(segments)  # (B, T, H)
        hidden = self.embeddings_norm(hidden + self.position_embeddings(positions))  # (B, T, H)
        hidden = dropout(hidden, self.config.hidden_dropout_prob, self.training)
        mask = None if attention_mask is None else attention_mask[:, None, None, :].bool()
        hidden_states = [hidden]
        for layer in self.layers:
            hidden_states.append(layer(hidden_states[-1], mask))  # (B, T, H)
        pooled = torch.tanh(self.pooler(hidden_states[-1][:, 0]))  # (B, H)
        pooled = dropout(pooled, self.head_dropout, self.training)
        return BertOutput(self.classifier(pooled), tuple(hidden_states))

    def parameter_count(self) -> int:
        """Numbers that training can move."""
        return sum(parameter.numel() for parameter in self.parameters())


# --- pruning -------------------------------------------------------------------------------------


def kept_layers(
    teacher_layers: int, student_layers: int, *, pairs: bool = False
) -> tuple[int, ...]:
    """The teacher's layers that M student layers start as, OURS(1).

    Its lowest M - 1 and its last; for sentence pairs, which its middle layers compare, evenly
    spaced ones as in `layer_map`. Raises ValueError unless 1 <= M <= L.
    """
    _refuse_depth(teacher_layers, student_layers)
    if pairs:
        return layer_map(teacher_layers, student_layers)
    return (*range(1, student_layers), teacher_layers)


def layer_map(teacher_layers: int, student_layers: int) -> tuple[int, ...]:
    """t(m) = ceil(m L / M), m = 1..M: the teacher's layer whose features student layer m learns.

    Evenly spaced up to the last, OURS(12). Raises ValueError unless 1 <= M <= L.
    """
    _refuse_depth(teacher_layers, student_layers)
    return tuple(
        math.ceil(m * teacher_layers / student_layers) for m in range(1, student_layers + 1)
    )


def _refuse_depth(teacher_layers: int, student_layers: int) -> None:
    if not 1 <= student_layers <= teacher_layers:
        raise ValueError(f"{student_layers} student layers of a teacher with {teacher_layers}")


def prune(teacher: Bert, keep: Sequence[int]) -> Bert:
    """A new BERT of the teacher's embeddings, its layers `keep` (from 1), pooler and classifier.

    Raises ValueError unless keep rises from at least 1 to at most the teacher's last layer.
    """
    layers = teacher.config.num_hidden_layers
    if not keep or list(keep) != sorted(set(keep)) or keep[0] < 1 or keep[-1] > layers:
        raise ValueError(f"layers {list(keep)}, expected rising numbers from 1 to {layers}")
    state = {}
    for name, tensor in teacher.state_dict().items():
        if name.startswith("layers."):
            _, layer, rest = name.split(".", 2)
            if int(layer) + 1 not in keep:
                continue
            name = f"layers.{list(keep).index(int(layer) + 1)}.{rest}"
        state[name] = tensor.clone()
    return _fill(_shell(replace(teacher.config, num_hidden_layers=len(keep))), state)


def _shell(config: BertConfig) -> Bert:
    """A BERT of shapes alone: nothing drawn, no memory taken."""
    with torch.device("meta"):
        return Bert(config)


def _fill(model: Bert, state: dict[str, Tensor]) -> Bert:
    """The shell with these tensors for its own; the parts they leave out are drawn at random."""
    model.load_state_dict(state, strict=False, assign=True)
    model.fresh = tuple(p for p in ("pooler", "classifier") if f"{p}.weight" not in state)
    for part in model.fresh:
        linear = getattr(model, part)
        setattr(model, part, nn.Linear(linear.in_features, linear.out_features))
        model._draw(getattr(model, part))
    return model


# --- losses on predictions -----------------------------------------------------------------------


def soft_loss(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(teacher || student) of softened predictions, times temperature squared [3].

    student, teacher: logits (B, C) -> (). A softmax over one logit is constant, so scores (C = 1)
    take the mean squared error, OURS(7).
    """
    if student.shape[-1] == 1:
        return F.mse_loss(student, teacher)
    target = F.log_softmax(teacher / temperature, dim=-1)  # (B, C)
    guess = F.log_softmax(student / temperature, dim=-1)  # (B, C)
    return F.kl_div(guess, target, reduction="batchmean", log_target=True) * temperature**2


def hard_loss(logits: Tensor, labels: Tensor, offset: Tensor | float = 0.0) -> Tensor:
    """Cross-entropy, or squared error where C = 1; logits (B, C), labels (B,) -> ()

    The mean is over all B; a label NaN, of a text that has none, adds 0.
    offset: added to the logits first, (C,); see `class_offset`.
    """
    logits = logits + offset
    known, target = ~labels.isnan(), labels.nan_to_num()  # (B,)
    if logits.shape[-1] == 1:
        each = (logits[:, 0] - target).square()  # (B,)
    else:
        each = F.cross_entropy(logits, target.long(), reduction="none")  # (B,)
    return (each * known).mean()


def class_offset(labels: Tensor, classes: int, tau: float) -> Tensor:
    """tau times the logarithm of each class's share of the labels, (C,); 0 for scores: OURS(13).

    Added to the logits of `hard_loss` alone it is logit adjustment [7]: what the model answers
    leaves the shares out, as if all classes were equally frequent (tau 1).
    labels (n,), NaN where there is none; a negative tau, of a config not settled, is 0.
    """
    if classes == 1 or tau <= 0:
        return torch.zeros(classes)
    counts = torch.bincount(labels[~labels.isnan()].long(), minlength=classes)  # (C,)
    shares = counts.clamp_min(1) / counts.sum().clamp_min(1)
    return tau * shares.log()


# --- sentence features, mixture of experts, feature alignment ------------------------------------


def sentence_features(hidden_states: Sequence[Tensor], attention_mask: Tensor) -> Tensor:
    """[CLS], max and mean of each layer's tokens [1], each standardised over H, OURS(2).

    hidden_states: K of (B, T, H); attention_mask (B, T), at least one 1 to a row -> (B, K, E, H)
    """
    unseen = (attention_mask == 0).unsqueeze(-1)  # (B, T, 1)
    never_largest = torch.zeros_like(unseen, dtype=torch.float32).masked_fill(unseen, -torch.inf)
    share = attention_mask.float() / attention_mask.sum(1, keepdim=True)  # (B, T)
    features = []
    for hidden in hidden_states:
        hidden = hidden.float().masked_fill(unseen, 0)
        largest = (hidden + never_largest).amax(1)  # (B, H)
        mean = torch.bmm(share.unsqueeze(1), hidden).squeeze(1)  # (B, H)
        features.append(torch.stack([hidden[:, 0], largest, mean], dim=1))  # (B, E, H)
    stacked = torch.stack(features, dim=1)  # (B, K, E, H)
    return F.layer_norm(stacked, stacked.shape[-1:])


class FeatureMapping(nn.Module):
    """Student features in the teacher's width: as they are, or one linear map per matched layer."""

    def __init__(self, matched: int, student_size: int, teacher_size: int) -> None:
        super().__init__()
        same = student_size == teacher_size
        self.maps = nn.ModuleList(
            nn.Identity() if same else nn.Linear(student_size, teacher_size) for _ in range(matched)
        )

    def forward(self, features: Tensor) -> Tensor:
        """(B, K, E, H of the student) -> (B, K, E, H of the teacher)"""
        return torch.stack([m(f) for m, f in zip(self.maps, features.unbind(1))], dim=1)


class SentenceExperts(nn.Module):
    """Per matched layer: three experts, one per view of the sentence, and the gate that mixes them.

    Routing 'task' learns one gate per layer for the whole task, as [1] says; 'sentence' computes
    it from the features. Fitted by `fit_experts` on the teacher, then frozen: OURS(3).
    """

    def __init__(
        self, matched: int, hidden_size: int, expert_size: int, labels: int, routing: str = "task"
    ) -> None:
        super().__init__()
        if routing not in ("task", "sentence"):
            raise ValueError(f"routing '{routing}', expected 'task' or 'sentence'")
        spread = hidden_size**-0.5
        self.experts = nn.Parameter(torch.randn(matched, 3, hidden_size, expert_size) * spread)
        self.heads = nn.Parameter(torch.randn(matched, expert_size, labels) * expert_size**-0.5)
        self.biases = nn.Parameter(torch.zeros(matched, labels))
        self.gate_bias = nn.Parameter(torch.zeros(matched, 3))
        per_sentence = routing == "sentence"
        size = (matched, 3, hidden_size, 3)
        self.router = nn.Parameter(torch.zeros(size)) if per_sentence else None

    def gate(self, features: Tensor) -> Tensor:
        """features (B, K, E, H) -> weights of the experts (B, K, E), at least 0, sum 1."""
        scores = self.gate_bias.expand(len(features), -1, -1)  # (B, K, E)
        if self.router is not None:
            scores = scores + torch.einsum("bkeh,kehg->bkg", features, self.router)
        return scores.softmax(-1)

    def forward(self, features: Tensor, gate: Tensor) -> Tensor:
        """z = sum_j g_j e_j(f_j): features (B, K, E, H), gate (B, K, E) -> (B, K, P)"""
        views = torch.einsum("bkeh,kehp->bkep", features, self.experts)  # (B, K, E, P)
        return torch.einsum("bkep,bke->bkp", views, gate)

    def predict(self, fused: Tensor) -> Tensor:
        """fused (B, K, P) -> each layer's guess at the task (B, K, C)"""
        return torch.einsum("bkp,kpc->bkc", fused, self.heads) + self.biases


def fit_experts(
    experts: SentenceExperts,
    features: Tensor,
    logits: Tensor,
    labels: Tensor,
    *,
    temperature: float = 2.0,
    balance_weight: float = 0.01,
    logit_adjustment: float = 0.0,
    steps: int = 300,
    batch_size: int = 256,
    seed: int = 0,
) -> SentenceExperts:
    """Teaches experts and gate to predict the task from the teacher's features, then freezes them.

    features (n, K, E, H), logits (n, C), labels (n,) with NaN for unlabelled;
    logit_adjustment: tau of `class_offset`. OURS(3): trained on the alignment loss itself they
    would collapse to a constant. OURS(4): CV^2 of the mean gate, the importance loss of
    [4, section 4], keeps every expert in use.
    """
    device = experts.gate_bias.device
    gate_parameters = [p for p in (experts.gate_bias, experts.router) if p is not None]
    others = [experts.experts, experts.heads, experts.biases]
    groups: list[dict[str, Any]] = [{"params": others}, {"params": gate_parameters, "lr": 2e-2}]
    optimizer = torch.optim.Adam(groups, lr=1e-3)
    offset = class_offset(labels, logits.shape[1], logit_adjustment).to(device)  # (C,)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        rows = torch.randint(len(features), (batch_size,), generator=generator)
        batch, target = features[rows].to(device).float(), logits[rows].to(device)
        gate = experts.gate(batch)  # (B, K, E)
        guesses = experts.predict(experts(batch, gate))  # (B, K, C)
        known = labels[rows].to(device)
        task = sum(
            hard_loss(guess, known, offset) + soft_loss(guess, target, temperature)
            for guess in guesses.unbind(1)
        )
        (task + balance_weight * importance_loss(gate)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return experts.eval().requires_grad_(False)


def importance_loss(gate: Tensor) -> Tensor:
    """Squared coefficient of variation of the experts' mean weights [4]: gate (B, K, E) -> ()"""
    importance = gate.mean(0)  # (K, E)
    return (importance.var(-1, correction=0) / importance.mean(-1).square()).mean()


def alignment_loss(
    student: Tensor, teacher: Tensor, experts: SentenceExperts | None = None
) -> Tensor:
    """Feature Alignment Loss, guided by the experts [1]; the formula is OURS(5).

    mean over layers of sum_j g_j * mean_H (f_j^S - f_j^T)^2 + 1 - cos(z^S, z^T), the gate from the
    teacher. Without experts every view weighs 1/3 and the fused term is dropped.
    student, teacher: features (B, K, E, H), gradient into the student alone -> ()
    """
    teacher = teacher.detach()
    distance = (student - teacher).square().mean(-1)  # (B, K, E)
    if experts is None:
        return distance.mean()
    with torch.no_grad():
        gate = experts.gate(teacher)  # (B, K, E)
        target = experts(teacher, gate)  # (B, K, P)
    direction = 1 - F.cosine_similarity(experts(student, gate), target, dim=-1)  # (B, K)
    return ((gate * distance).sum(-1) + direction).mean()


# --- discriminator -------------------------------------------------------------------------------


def model_outputs(fused: Tensor, logits: Tensor, temperature: float) -> Tensor:
    """What the discriminator sees of a model, OURS(6): its fused sentence and its softened answer.

    fused (B, P) of the last matched layer, logits (B, C) -> (B, P + C). A score stands for itself.
    """
    answer = (logits / temperature).softmax(-1) if logits.shape[-1] > 1 else logits  # (B, C)
    return torch.cat([F.layer_norm(fused, fused.shape[-1:]), answer], dim=-1)


class Discriminator(nn.Module):
    """Tells teacher outputs (B, F) from student outputs: one score each, high for the teacher [5].

    Spectral norm [6] bounds how hard it can push the student.
    """

    def __init__(self, size: int, width: int = 128) -> None:
        super().__init__()
        norm = nn.utils.parametrizations.spectral_norm
        self.layers = nn.Sequential(
            norm(nn.Linear(size, width)), nn.LeakyReLU(0.2), norm(nn.Linear(width, 1))
        )

    def forward(self, outputs: Tensor) -> Tensor:
        """(B, F) -> (B,)"""
        score: Tensor = self.layers(outputs)  # (B, 1)
        return score.squeeze(-1)


def discriminator_loss(discriminator: nn.Module, teacher: Tensor, student: Tensor) -> Tensor:
    """Teacher outputs (B, F) are real, with label 0.9 for 1; student outputs (B, F) fake -> ()"""
    real = discriminator(teacher.detach())  # (B,)
    fake = discriminator(student.detach())  # (B,)  this step must not move the student
    bce = F.binary_cross_entropy_with_logits
    return bce(real, torch.full_like(real, 0.9)) + bce(fake, torch.zeros_like(fake))


def adversarial_loss(discriminator: nn.Module, student: Tensor) -> Tensor:
    """softplus(-D(student)), the non-saturating form of [5]: outputs (B, F) -> ().

    The discriminator is called on copies of its parameters and buffers: this step cannot move it.
    """
    frozen = {name: tensor.detach().clone() for name, tensor in discriminator.state_dict().items()}
    return F.softplus(-torch.func.functional_call(discriminator, frozen, (student,))).mean()


# --- the student's objective ---------------------------------------------------------------------


class TeacherCache(NamedTuple):
    """All that is kept of the teacher, for each of n training and transfer texts."""

    features: Tensor  # (n, K, E, H) fp16, standardised, memory-mapped
    logits: Tensor  # (n, C)
    labels: Tensor  # (n,) class ids or scores as floats, NaN for a transfer text


class Distillation:
    """loss = a soft + (1 - a) hard + b FAL + c adversarial: the weighted terms of one step.

    Holds the frozen experts and the discriminator, which it trains on every batch it is given. The
    student has the K matched layers, no other. `stateful` is what a killed run has to keep of it.
    """

    def __init__(
        self, cache: TeacherCache, experts: SentenceExperts | None, config: DistillConfig
    ) -> None:
        self.cache, self.experts, self.config = cache, experts, config
        self.soft_weight = config.soft_weight if config.soft else 0.0
        classes = cache.logits.shape[1]
        offset = class_offset(cache.labels, classes, config.logit_adjustment)  # (C,)
        self.offset = offset.to(resolve_device(config.device))
        self.stateful: dict[str, Any] = {}
        if config.gan:
            torch.manual_seed(config.seed)
            fused = (cache.features if experts is None else experts.experts).shape[-1]
            self.discriminator = Discriminator(fused + cache.logits.shape[1])
            self.in_parallel = in_parallel(self.discriminator.to(resolve_device(config.device)))
            parameters = self.discriminator.parameters()
            self.optimizer = torch.optim.Adam(parameters, lr=2e-4, betas=(0.5, 0.999))
            self.stateful = {"discriminator": self.discriminator, "its optimizer": self.optimizer}

    def __call__(
        self, output: BertOutput, attention_mask: Tensor, rows: Tensor, progress: float
    ) -> dict[str, Tensor]:
        """output of the student for these rows of the cache; progress 0..1 through the training.

        From 1 on, in the passes at the end (OURS(14)), it learns the labels alone.
        """
        config, device = self.config, output.logits.device
        logits, labels = output.logits.float(), ship(self.cache.labels[rows], device)
        target = ship(self.cache.logits[rows], device)  # (B, C)
        hard = hard_loss(logits, labels, self.offset)
        if progress >= 1:
            return {"hard": hard}
        terms = {"hard": (1 - self.soft_weight) * hard}
        if config.soft:
            terms["soft"] = self.soft_weight * soft_loss(logits, target, config.temperature)
        if not (config.fal or config.gan):
            return terms
        student = sentence_features(output.hidden_states[1:], attention_mask)  # (B, K, E, H)
        teacher = ship(self.cache.features[rows], device).float()  # (B, K, E, H)
        if config.fal:
            terms["align"] = config.alignment_weight * alignment_loss(
                student, teacher, self.experts
            )
        if config.gan:
            real = model_outputs(self.fuse(teacher, teacher), target, config.temperature)
            fake = model_outputs(self.fuse(student, teacher), logits, config.temperature)
            terms["adv"] = self.contest(real, fake, progress)
        return terms

    def fuse(self, features: Tensor, teacher: Tensor) -> Tensor:
        """The last matched layer's z (B, P), the gate from the teacher; without experts (B, H)."""
        if self.experts is None:
            return features[:, -1].mean(1)  # (B, H)
        fused: Tensor = self.experts(features, self.experts.gate(teacher))  # (B, K, P)
        return fused[:, -1]

    def contest(self, real: Tensor, fake: Tensor, progress: float) -> Tensor:
        """One step of the discriminator, then what it makes of the student: weighted, ()."""
        self.optimizer.zero_grad()
        discriminator_loss(self.in_parallel, real, fake).backward()
        self.optimizer.step()
        ramp = min(max((progress - 0.1) / 0.4, 0.0), 1.0)  # OURS(8): 0 for a tenth, full at half
        weight = self.config.adversarial_weight * ramp
        return weight * adversarial_loss(self.discriminator, fake)


# --- training and running a model ----------------------------------------------------------------

Objective = Callable[[BertOutput, Tensor, Tensor, float], dict[str, Tensor]]


def train(
    model: Bert,
    encoded: "data.Encoded",
    objective: Objective,
    config: DistillConfig,
    log: "Log",
    *,
    epochs: int,
    lr: float,
    last: tuple[int, int] = (0, 0),
    resume: "Resume | None" = None,
) -> None:
    """The one training loop; the objective decides whether it fine-tunes or distils.

    objective: (output, attention_mask (B, T), rows (B,), progress) -> named, weighted loss terms.
    last: (n, passes) over the first n texts after all others, where progress goes from 1 to 2, the
    learning rate rises and falls once more, and AdamW starts anew.
    resume: saves the state now and then, and begins where one was saved.
    Raises ValueError where a loss or gradient is not finite, before it moves a weight.
    """
    import data

    device, (rank, processes) = resolve_device(config.device), process()
    refuse_segments(model, encoded)
    model.to(device).train()
    with only_seen_words(model, encoded) as encoded:
        size = config.batch_size
        turn = count_steps(len(encoded), epochs, size)
        steps = turn + count_steps(*last, size)
        optimizer = adamw(model, lr, config.weight_decay)
        first = resume.restore(model, optimizer, objective, encoded, log) if resume else 0
        forward, started = in_parallel(model), time.perf_counter()
        batches = passes(encoded.lengths, epochs, last, size, config.seed)
        for step, rows in enumerate(islice(batches, first, None), first + 1):
            seed_step(config.seed, rank, step)
            done = step - 1
            if done == turn:
                optimizer.state.clear()  # moments of other losses' gradients
            progress = done / turn if done < turn else 1 + (done - turn) / (steps - turn)
            for group in optimizer.param_groups:
                group["lr"] = lr * schedule(progress % 1, config.warmup)
            rows = rows[rank::processes] if len(rows) >= processes else rows
            batch = {k: ship(v, device) for k, v in data.collate(encoded, rows).items()}
            with autocast(config):
                output = forward(**batch)
            terms = objective(output, batch["attention_mask"], torch.from_numpy(rows), progress)
            loss = torch.stack(list(terms.values())).sum()
            loss.backward()
            norm = nn.utils.clip_grad_norm_(model.parameters(), config.clip)
            refuse_not_finite(loss, norm, terms, step, log, resume)
            optimizer.step()
            optimizer.zero_grad()
            if (kept := step % config.log_every == 0 or step == steps) or log.due():
                rate = (step - first) * size / (time.perf_counter() - started)
                log.step(step, steps, terms, optimizer.param_groups[0]["lr"], rate, size, kept)
            if resume and (step % config.save_every == 0 or step == steps):
                resume.save(step, log)
    model.eval()


def passes(
    lengths: "numpy.ndarray", epochs: int, last: tuple[int, int], batch_size: int, seed: int
) -> Iterator["numpy.ndarray"]:
    """The batches' rows of so many epochs over all texts, then of `last`'s over its first n."""
    import data

    for epoch in range(epochs + last[1]):
        own = lengths if epoch < epochs else lengths[: last[0]]
        yield from data.bucketed_batches(own, batch_size, seed=seed, epoch=epoch)


def count_steps(examples: int, epochs: int, batch_size: int) -> int:
    """Steps of so many passes; the last batch of each may be smaller."""
    return epochs * math.ceil(examples / batch_size)


def refuse_not_finite(
    loss: Tensor, norm: Tensor, terms: dict[str, Tensor], step: int, log: "Log",
    resume: "Resume | None",
) -> None:  # fmt: skip
    """Raises ValueError with the terms of a loss where it or its gradient's norm is not finite."""
    if (loss + norm).isfinite():
        return
    parts = ", ".join(f"{name} {term.item():g}" for name, term in terms.items())
    kept = f"; {resume.path} keeps the last good state" if resume and resume.saved else ""
    raise ValueError(
        f"{log.phase} step {step}: the loss is {loss.item():g} ({parts}), its gradient's norm "
        f"{norm.item():g}; lower the learning rate{kept}"
    )


def refuse_segments(model: Bert, encoded: "data.Encoded") -> None:
    """Raises ValueError for pairs where the BERT has embeddings for single texts alone."""
    if encoded.type_ids.max(initial=0) >= model.config.type_vocab_size:
        raise ValueError("pairs of texts, for a BERT of type_vocab_size 1: it takes single ones")


def seed_step(seed: int, rank: int, step: int) -> None:
    """Dropout of a step depends on nothing before it, so a run that continues draws the same."""
    import numpy as np

    torch.manual_seed(int(np.random.SeedSequence([seed, rank, step]).generate_state(1)[0]))


@contextmanager
def only_seen_words(model: Bert, encoded: "data.Encoded") -> Iterator["data.Encoded"]:
    """Leaves the model the embeddings of the words that occur in these texts, renumbered.

    The others' gradients are 0, and working those out, clipping and stepping them took up to a
    fifth of a step. Yields the texts in the new numbers; whatever happens meanwhile, the rows are
    put back into the whole table, (vocab_size, H), at the end.
    """
    import numpy as np

    whole = model.word_embeddings.weight
    seen, ids = np.unique(encoded.ids, return_inverse=True)
    rows = torch.from_numpy(seen).long().to(whole.device)
    some = nn.Parameter(whole.detach()[rows], requires_grad=whole.requires_grad)
    model.word_embeddings.weight = some
    try:
        yield replace(encoded, ids=ids.astype(np.int32))
    finally:
        with torch.no_grad():
            whole[rows] = some
        model.word_embeddings.weight = whole


def process() -> tuple[int, int]:
    """This process's rank, and how many train together: 0 and 1 without torchrun."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def in_parallel(model: nn.Module) -> nn.Module:
    """The model, its gradients averaged over the processes and its start the first one's."""
    if not dist.is_initialized():
        return model
    return nn.parallel.DistributedDataParallel(model)


def ship(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on the device; to a GPU without waiting for the copy."""
    return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)


def schedule(progress: float, warmup: float) -> float:
    """Share of the peak learning rate: linear up over `warmup`, then linear down to 0."""
    return progress / warmup if progress < warmup else (1 - progress) / (1 - warmup)


def adamw(model: nn.Module, lr: float, weight_decay: float) -> torch.optim.AdamW:
    """AdamW with decay on matrices only, fused where this torch and device have it."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    try:
        return torch.optim.AdamW(groups, lr=lr, fused=True)
    except (RuntimeError, TypeError):
        return torch.optim.AdamW(groups, lr=lr)


def resolve_device(name: str) -> torch.device:
    """'auto' is CUDA, else MPS, else the CPU. Raises ValueError for one that is not there."""
    here = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if name == "auto":
        return torch.device(next(device for device, there in here.items() if there))
    if not (re.fullmatch(r"\w+(:\d+)?", name) and here.get(name.split(":")[0], False)):
        raise ValueError(f"device '{name}' is not there; auto takes the best of cuda, mps and cpu")
    return torch.device(name)


def has_fast_bf16(device: torch.device) -> bool:
    """Whether bf16 is faster than fp32 here: NVIDIA since Ampere, x86 with AVX512-BF16 or AMX.

    MPS and other processors say no, as does a torch too old to know the processor.
    """
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    features: dict[str, Any] = (
        getattr(torch.cpu, "get_capabilities", dict)() if device.type == "cpu" else {}
    )
    return bool(features.get("avx512_bf16") or features.get("amx_bf16"))


def autocast(config: DistillConfig) -> torch.autocast:
    """The precision of a forward pass: fp32 unless config.precision, once settled, is bf16."""
    device = resolve_device(config.device).type
    return torch.autocast(device, torch.bfloat16, enabled=config.precision == "bf16")


@torch.no_grad()
def run_batches(
    model: Bert, encoded: "data.Encoded", config: DistillConfig, part: int, parts: int
) -> Iterator[tuple[Tensor, Tensor, BertOutput]]:
    """Yields rows (B,), attention_mask (B, T), output; sorted by length, the model in eval mode.

    Of the batches every parts-th, from number `part` on.
    """
    import data

    device = resolve_device(config.device)
    refuse_segments(model, encoded)
    model.to(device).eval()
    room = 2048 if device.type == "cpu" else 32_768  # tokens: caches are small
    for rows in islice(data.sorted_batches(encoded.lengths, room), part, None, parts):
        batch = {k: ship(v, device) for k, v in data.collate(encoded, rows).items()}
        with autocast(config):
            output = model(**batch)
        yield torch.from_numpy(rows), batch["attention_mask"], output


def predict_logits(model: Bert, encoded: "data.Encoded", config: DistillConfig) -> Tensor:
    """Logits of every text in the order given, (n, C) fp32 on the CPU.

    Raises ValueError where one is not finite.
    """
    logits = torch.full((len(encoded), len(model.config.labels)), -torch.inf)
    for rows, _, output in run_batches(model, encoded, config, *process()):
        logits[rows] = output.logits.float().cpu()
    logits = gather(logits, config)
    if not logits.isfinite().all():
        raise ValueError("the model answers with numbers that are not finite: damaged weights?")
    return logits


def gather(rows: Tensor, config: DistillConfig) -> Tensor:
    """The rows that all processes computed together; those of the others hold -inf."""
    if dist.is_initialized():
        rows = rows.to(resolve_device(config.device))
        dist.all_reduce(rows, dist.ReduceOp.MAX)  # waits for the last process, too
    return rows.cpu()


def teacher_pass(
    teacher: Bert,
    encoded: "data.Encoded",
    labels: Tensor,
    keep: Sequence[int],
    config: DistillConfig,
    path: Path,
    log: "Log | None" = None,
) -> TeacherCache:
    """Runs the teacher once over all texts and keeps its logits and the features of layers `keep`.

    path: the file that backs the features, 2 bytes * n * K * E * H of it. The processes of a
    machine fill it together; every machine has its own. Raises OSError where the disk lacks room.
    """
    part, parts = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    shape = (len(encoded), len(keep), 3, teacher.config.hidden_size)
    print(f"cache: {path}, {2 * math.prod(shape) / 1e6:.0f} MB for {len(encoded)} texts")
    path.parent.mkdir(parents=True, exist_ok=True)
    if part == 0:  # a full disk is an error here; filling the mapped file it would be SIGBUS
        with naming(path), path.open("wb") as file:
            for _ in range(len(encoded)):
                file.write(bytes(2 * math.prod(shape[1:])))
    if dist.is_initialized():
        dist.barrier()
    features = torch.from_file(str(path), shared=True, size=math.prod(shape), dtype=torch.float16)
    features = features.view(shape)
    logits = torch.full((len(encoded), len(teacher.config.labels)), -torch.inf)
    done, started = 0, time.perf_counter()
    for rows, mask, output in run_batches(teacher, encoded, config, part, parts):
        matched = [output.hidden_states[layer] for layer in keep]
        features[rows] = sentence_features(matched, mask).half().cpu()
        logits[rows] = output.logits.float().cpu()
        done += len(rows) * parts
        if log:
            log.count(min(done, len(encoded)), len(encoded), started)
    return TeacherCache(features, gather(logits, config), labels)


class Log:
    """log.jsonl, one object a line, and the same for people: lines, or on a terminal a live one."""

    def __init__(self, path: Path) -> None:
        self.path, self.phase, self.started = path, "training", 0.0
        self.seconds: dict[str, float] = {}  # of each phase, those before a kill included
        self.live = sys.stdout.isatty()
        self.shown, self.unfinished = 0.0, False  # when the last line was, and if it stands open

    @contextmanager
    def timed(self, phase: str, what: str) -> Iterator[None]:
        """Names the phase of what is logged inside, says what it does, and takes its time."""
        self.phase, self.started = phase, time.perf_counter()
        self.shown = self.started
        print(f"\n{phase}: {what}", flush=True)
        try:
            yield
        finally:
            if self.unfinished:
                print()
        self.seconds = self.so_far()

    def so_far(self) -> dict[str, float]:
        """Seconds of each phase, up to now."""
        before = self.seconds.get(self.phase, 0.0)
        return self.seconds | {self.phase: before + time.perf_counter() - self.started}

    def write(self, **event: Any) -> None:
        """One line of log.jsonl; of several processes the first one writes."""
        if process()[0]:
            return
        with naming(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"phase": self.phase} | event) + "\n")

    def due(self, seconds: float = 0.2) -> bool:
        """Whether a terminal's line is that old; the losses of several processes take a sum."""
        return self.live and process()[1] == 1 and time.perf_counter() - self.shown > seconds

    def show(self, line: str, last: bool) -> None:
        """A line; on a terminal the next one takes its place, unless it is the last."""
        if self.live:
            width = shutil.get_terminal_size().columns - 1
            line = "\r" + (line if last else line[:width]).ljust(width)
        print(line, end="" if self.live and not last else "\n", flush=True)
        self.shown, self.unfinished = time.perf_counter(), self.live and not last

    def step(
        self, step: int, steps: int, terms: dict[str, Tensor], lr: float, rate: float, size: int,
        kept: bool,
    ) -> None:  # fmt: skip
        """One line whose weighted terms, means over the processes, add up to the loss.

        rate: examples per second; size: examples per step; kept: in log.jsonl, too.
        """
        values = torch.stack([term.detach() for term in terms.values()])
        if dist.is_initialized():
            dist.all_reduce(values)
        numbers = dict(zip(terms, (values / process()[1]).tolist()))
        loss = sum(numbers.values())
        if kept:
            self.write(
                step=step, steps=steps, loss=loss, **numbers, lr=lr, examples_per_second=rate
            )
        parts = " + ".join(f"{name} {number:.4f}" for name, number in numbers.items())
        left = eta(steps - step, rate / size)
        line = f"{self.phase} {step:5d}/{steps} | {rate:.0f} ex/s | eta {left} | loss {loss:.4f}"
        self.show(f"{line} = {parts} | lr {lr:.2e}", last=step == steps)

    def count(self, done: int, total: int, started: float) -> None:
        """How many of the texts are done, now and then; started: perf_counter at the first."""
        wait = 0.2 if self.live else 30.0
        if (last := done >= total) or time.perf_counter() - self.shown > wait:
            rate = done / (time.perf_counter() - started)
            left = eta(total - done, rate)
            self.show(f"{self.phase} {done:7,}/{total:,} | {rate:.0f} ex/s | eta {left}", last)


def eta(left: float, rate: float) -> str:
    """Minutes and seconds for what is left, at this rate per second."""
    seconds = round(left / rate)
    return f"{seconds // 60}:{seconds % 60:02d}"


# --- continuing a killed run ---------------------------------------------------------------------


def flags_that_matter(config: DistillConfig, train_set: "glue.Examples") -> dict[str, Any]:
    """What a run that continues must have been given before, by name; the rest moves no weight."""
    free = {"out", "overwrite", "force", "baseline", "log_every", "save_every", "checkpoint"}
    free |= {*_ANSWER, *_ABLATION}
    text = repr([train_set.texts, train_set.gold.tolist()]).encode("utf-8", "backslashreplace")
    flags = {name: value for name, value in asdict(config).items() if name not in free}
    if config.transfer:
        flags["crc of --transfer"] = zlib.crc32(Path(config.transfer).read_bytes())
    return flags | {"crc of train.tsv": zlib.crc32(text), "processes": process()[1]}


def same_flags(before: dict[str, Any], now: dict[str, Any], out: Path, overwrite: bool) -> bool:
    """Whether they agree. Raises ValueError naming what differs, unless it is to be overwritten."""
    differing = [name for name in now if now[name] != before.get(name)]
    if differing and not overwrite:
        shown = [f"{name} was {before.get(name)!r}, is {now[name]!r}" for name in differing]
        raise ValueError(
            f"{out} holds an unfinished run of other flags: {', '.join(shown)}; give it the "
            "same again, or --overwrite to give it up"
        )
    return not differing


class Resume:
    """resume.ckpt in --out: all that the same command needs to end as if it had not been killed.

    8 hex digits, the CRC-32 of the rest; a line of JSON: flags, phase, step, seconds so far; then
    torch.save of model, optimizer and discriminator. The one before is kept as resume.ckpt.old.
    Everything else a run does again, to the same bits: the teacher's pass, experts, scores.

    Raises ValueError where --out holds a finished run, or an unfinished one of other flags.
    """

    def __init__(
        self, out: Path, config: DistillConfig, train_set: "glue.Examples", log: "Log"
    ) -> None:
        self.path, self.results = out / "resume.ckpt", out / "results.json"
        self.old = self.path.with_suffix(".ckpt.old")
        if self.results.exists() and not config.overwrite:
            self.done()  # a kill may have come between
            raise ValueError(f"{out} holds a finished run (results.json); --overwrite replaces it")
        self.flags = flags_that_matter(config, train_set)
        found = [self._find() if not (self.results.exists() or process()[0]) else ({}, b"")]
        if dist.is_initialized():  # --out may be on the first one's disk alone
            dist.broadcast_object_list(found)
        self.header, self.body = found[0]
        self.saved = bool(self.header)
        before = self.header.get("flags", self.flags)
        if not same_flags(before, self.flags, out, config.overwrite):
            self.header = {}
        log.seconds = self.header.get("seconds", {})

    @property
    def phase(self) -> str:
        """The phase to continue; '' for a run that starts."""
        return str(self.header.get("phase", ""))

    def _find(self) -> tuple[dict[str, Any], bytes]:
        """Header and body of the newest checkpoint that is whole."""
        for path in (self.path, self.old):
            try:
                raw = path.read_bytes()
                crc, _, rest = raw.partition(b" ")
                line, _, body = rest.partition(b"\n")
                header = json.loads(line)
                if crc != b"%08x" % zlib.crc32(rest):
                    raise ValueError("torn")
                known = {k: type(header[k]) for k in ("phase", "step", "start", "flags", "seconds")}
                if [*known.values()] == [str, int, int, dict, dict] and header["step"] > 0:
                    return header, body
            except FileNotFoundError:
                continue
            except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
                pass  # no JSON object, or not one of ours
            print(f"note: {path} is torn and not used", file=sys.stderr)
        return {}, b""

    def begin(self, log: "Log") -> None:
        """Gives up what --out holds, unless it is the run to continue."""
        if not self.phase and not process()[0]:
            student = self.path.parent / "student"
            for path in (self.path, self.old, self.results, student / "config.json"):
                path.unlink(missing_ok=True)  # a student of before must not answer for this run
            write_file(log.path, b"")

    def restore(
        self, model: Bert, optimizer: Any, objective: Any, encoded: "data.Encoded", log: "Log"
    ) -> int:
        """Puts the saved state of this phase into its parts; returns the steps that are done.

        Raises ValueError where the phase no longer starts from the same texts and weights.
        """
        self.parts = {"model": model, "optimizer": optimizer, **getattr(objective, "stateful", {})}
        self.start = 0
        for array in (encoded.ids, encoded.offsets, *model.state_dict().values()):
            numbers = array.cpu().numpy() if isinstance(array, Tensor) else array
            self.start = zlib.crc32(numbers.data, self.start)
        if self.phase != log.phase:
            return 0
        if self.start != self.header["start"]:
            raise ValueError(
                f"{self.path}: the texts or weights that the {log.phase} started from have "
                "changed since; --overwrite gives the unfinished run up"
            )
        try:
            states = torch.load(io.BytesIO(self.body), map_location="cpu", weights_only=True)
            for name, part in self.parts.items():
                part.load_state_dict(states[name])
        except Exception as error:  # whatever a foreign file makes torch raise
            told = " ".join(str(error).split())[:200]
            raise ValueError(f"{self.path}: no state of this run: {told}") from None
        self.body = b""
        print(f"{log.phase}: continues after step {self.header['step']}")
        return int(self.header["step"])

    def save(self, step: int, log: "Log") -> None:
        """Writes where the phase stands; the checkpoint before becomes the old one."""
        if process()[0]:
            return
        body = io.BytesIO()
        torch.save({name: part.state_dict() for name, part in self.parts.items()}, body)
        header = {"phase": log.phase, "step": step, "start": self.start, "flags": self.flags}
        line = json.dumps(header | {"seconds": log.so_far()}).encode() + b"\n"
        if self.path.exists():
            os.replace(self.path, self.old)
        with body.getbuffer() as state:
            crc = b"%08x " % zlib.crc32(state, zlib.crc32(line))
            write_file(self.path, crc, line, state)
        self.saved = True

    def done(self) -> None:
        """The run is finished, and all it left for continuing goes."""
        if not process()[0]:
            for path in (self.path, self.old):
                path.unlink(missing_ok=True)


# --- checkpoint files ----------------------------------------------------------------------------

# Module of ours -> of Hugging Face. Loading and saving go through this one table.
_OUTSIDE_NAMES = {
    "word_embeddings": "bert.embeddings.word_embeddings",
    "position_embeddings": "bert.embeddings.position_embeddings",
    "token_type_embeddings": "bert.embeddings.token_type_embeddings",
    "embeddings_norm": "bert.embeddings.LayerNorm",
    "pooler": "bert.pooler.dense",
    "classifier": "classifier",
}
_LAYER_NAMES = {
    "query": "attention.self.query",
    "key": "attention.self.key",
    "value": "attention.self.value",
    "attention_output": "attention.output.dense",
    "attention_norm": "attention.output.LayerNorm",
    "intermediate": "intermediate.dense",
    "output": "output.dense",
    "output_norm": "output.LayerNorm",
}
_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


def _tensor_names(layers: int) -> dict[str, str]:
    """Tensor of ours -> of Hugging Face, in a BERT of so many layers."""
    modules = dict(_OUTSIDE_NAMES)
    for i in range(layers):
        for ours, name in _LAYER_NAMES.items():
            modules[f"layers.{i}.{ours}"] = f"bert.encoder.layer.{i}.{name}"
    kinds = {o: ("weight",) if o.endswith("_embeddings") else ("weight", "bias") for o in modules}
    return {f"{o}.{kind}": f"{modules[o]}.{kind}" for o in modules for kind in kinds[o]}


def load_bert(path: str | Path, labels: Sequence[str] | None = None) -> Bert:
    """A BERT from a folder in Hugging Face's layout, in eval mode and fp32.

    path: folder with config.json and model.safetensors or pytorch_model.bin; names with or
    without `bert.`, `LayerNorm.gamma`/`beta` and half-precision weights are understood, the
    pre-training heads (`cls.*`) and `position_ids` ignored. labels: put a new classifier for these
    on top. A part that is missing (pooler, classifier) is drawn at random and named in `.fresh`,
    with a warning if it was not asked for.

    Raises FileNotFoundError for a missing file, ValueError naming every tensor that is missing,
    unexpected or of the wrong shape or type.
    """
    folder = Path(path)
    config = BertConfig.load(folder / "config.json")
    source, stored = _read_checkpoint(folder)
    if labels is not None:
        config = replace(config, labels=tuple(labels))
        stored = {name: t for name, t in stored.items() if not name.startswith("classifier.")}
    model = _shell(config)  # nothing is taken until the file is known to fit
    shapes = {name: t.shape for name, t in model.state_dict().items()}
    names = _tensor_names(config.num_hidden_layers)
    heads = {"pooler": "bert.pooler.dense.", "classifier": "classifier."}
    fresh = [part for part, name in heads.items() if not any(k.startswith(name) for k in stored)]
    wanted = {ours: name for ours, name in names.items() if ours.split(".")[0] not in fresh}
    _refuse_misfits(source, {name: shapes[ours] for ours, name in wanted.items()}, stored)
    _fill(model, {ours: stored[name].float().contiguous() for ours, name in wanted.items()})
    if set(fresh) - ({"classifier"} if labels is not None else set()):
        warnings.warn(f"{source}: no {' and '.join(fresh)} in it, drawn at random", stacklevel=2)
    return model.eval()


def download_bert(name: str) -> Path:
    """The folder of a checkpoint of the Hugging Face Hub, such as google-bert/bert-base-uncased.

    Config, weights and tokenizer alone are downloaded, by huggingface_hub into its cache; its
    HF_HOME, HF_TOKEN, HF_ENDPOINT and HF_HUB_OFFLINE hold. Raises FileNotFoundError or OSError
    where there is no such checkpoint, or none that can be reached, saying what to do.
    """
    from huggingface_hub import constants, try_to_load_from_cache
    from huggingface_hub import errors as hub_errors
    from huggingface_hub.utils import logging as hub_logging

    hub = f"{name}: no such folder here, and on {constants.ENDPOINT} "
    if try_to_load_from_cache(name, "config.json") is None and not constants.HF_HUB_OFFLINE:
        print(f"note: {name} is no folder here, asking {constants.ENDPOINT}", file=sys.stderr)
    verbosity = hub_logging.get_verbosity()
    hub_logging.set_verbosity_error()  # its retries are told in one line when they fail
    try:
        if not (config := _from_hub(name, None, "config.json")):
            raise FileNotFoundError(f"{hub}it has no config.json: not a checkpoint")
        commit = config.parent.name  # the other files are taken from the same
        if not _from_hub(name, commit, "model.safetensors", "pytorch_model.bin"):
            raise FileNotFoundError(f"{hub}neither model.safetensors nor pytorch_model.bin")
        if not _from_hub(name, commit, "tokenizer.json", "vocab.txt"):
            raise FileNotFoundError(f"{hub}neither tokenizer.json nor vocab.txt")
        for optional in ("tokenizer_config.json", "special_tokens_map.json"):
            _from_hub(name, commit, optional)
    except hub_errors.GatedRepoError:
        raise FileNotFoundError(
            f"{hub}it is gated: ask for access on its page, then set HF_TOKEN to a token of yours"
        ) from None
    except hub_errors.RepositoryNotFoundError:
        raise FileNotFoundError(
            f"{hub}none of that name, or a private one: check the spelling, or set HF_TOKEN"
        ) from None
    except hub_errors.LocalEntryNotFoundError:
        why = "not all of it in the cache, and HF_HUB_OFFLINE is set: unset it once to download"
        if not constants.HF_HUB_OFFLINE:
            why = "it cannot be reached: check the connection and HF_ENDPOINT"
        raise FileNotFoundError(f"{hub}{why}, or name a checkpoint folder") from None
    except FileNotFoundError:
        raise
    except Exception as error:  # of the network, in the kinds of whatever library fetches
        told = " ".join(str(error).split())[:200]
        raise OSError(f"{name}: download failed: {type(error).__name__}: {told}") from None
    finally:
        hub_logging.set_verbosity(verbosity)
    return config.parent


def _from_hub(name: str, commit: str | None, *files: str) -> Path | None:
    """The first of these files that the checkpoint has, from the cache or downloaded."""
    from huggingface_hub import constants, hf_hub_download, try_to_load_from_cache
    from huggingface_hub import errors as hub_errors

    for file in files:
        cached = try_to_load_from_cache(name, file, revision=commit) if commit else None
        if cached is not None and not isinstance(cached, str):
            continue  # known not to be there
        try:
            return Path(hf_hub_download(name, file, revision=commit))
        except hub_errors.LocalEntryNotFoundError:  # a kind of EntryNotFoundError
            if not (commit and constants.HF_HUB_OFFLINE):
                raise
        except hub_errors.EntryNotFoundError:
            pass
    return None


def _read_checkpoint(folder: Path) -> tuple[Path, dict[str, Tensor]]:
    """The weights file of a folder and its tensors under Hugging Face's present names."""
    if (folder / "model.safetensors").is_file():
        path = folder / "model.safetensors"
        tensors = read_safetensors(path)
    elif (folder / "pytorch_model.bin").is_file():
        path = folder / "pytorch_model.bin"
        try:
            if zipfile.is_zipfile(path):
                with zipfile.ZipFile(path) as zipped:
                    unpacked = sum(member.file_size for member in zipped.infolist())
                if unpacked > path.stat().st_size:
                    raise ValueError(f"compressed, to be {unpacked} bytes")  # torch.save does not
            tensors = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # whatever a broken or unsafe file makes torch raise
            raise ValueError(
                f"{path}: not a file of plain tensors: {error}".split("\n")[0]
            ) from None
    else:
        raise FileNotFoundError(f"{folder}: neither model.safetensors nor pytorch_model.bin in it")
    stored: dict[str, Tensor] = {}
    sound = isinstance(tensors, dict) and all(
        isinstance(name, str)
        and isinstance(t, Tensor)
        and not (t.is_nested or t.is_meta)
        and t.layout is torch.strided
        for name, t in tensors.items()
    )
    if not sound:
        raise ValueError(f"{path}: not a dict of dense tensors by name")
    if sum(t.numel() * t.itemsize for t in tensors.values()) > 2 * path.stat().st_size:
        raise ValueError(f"{path}: its tensors share more numbers than the file holds")
    for name, tensor in tensors.items():
        if tensor.numel() * tensor.itemsize > tensor.untyped_storage().nbytes():
            raise ValueError(
                f"{path}: tensor {name!r} of {tuple(tensor.shape)} repeats its numbers"
            )
        new = name.replace("LayerNorm.gamma", "LayerNorm.weight")
        new = new.replace("LayerNorm.beta", "LayerNorm.bias")
        new = f"bert.{new}" if new.startswith(("embeddings.", "encoder.", "pooler.")) else new
        if new.startswith("cls.") or new.endswith(".position_ids"):
            continue
        if new in stored:
            raise ValueError(f"{path}: tensor '{new}' twice, under an old and a new name")
        stored[new] = tensor
    return path, stored


def _refuse_misfits(path: Path, wanted: dict[str, torch.Size], stored: dict[str, Tensor]) -> None:
    lacks = [name for name in wanted if name not in stored]
    extra = [name for name in stored if name not in wanted]
    problems = [
        f"{verb} {len(names)} of {len(wanted)} BERT tensors: " + ", ".join(map(repr, names[:8]))
        for verb, names in (("lacks", lacks), ("has beyond", extra))
        if names
    ]
    for name in wanted:
        if name in stored and stored[name].shape != wanted[name]:
            got, expected = tuple(stored[name].shape), tuple(wanted[name])
            problems.append(f"{name!r} has shape {got}, config.json says {expected}")
        elif name in stored and not stored[name].is_floating_point():
            problems.append(f"{name!r} holds {stored[name].dtype}, expected floating point")
    if problems:
        raise ValueError(f"{path}: {'; '.join(problems[:8])}")


def read_safetensors(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors file: 8 bytes of header size, a JSON header, the numbers.

    https://huggingface.co/docs/safetensors: nothing in the file is trusted. Raises ValueError for
    anything that is not a header of known dtypes whose ranges tile the rest of the file exactly.
    """
    path = Path(path)
    total = path.stat().st_size
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        if total < 8 or size > min(total - 8, 100_000_000):
            raise ValueError(f"{path}: header of {size} bytes in a file of {total}; cut short?")
        try:
            header = json.loads(file.read(size), object_pairs_hook=_unique)
            if not isinstance(header, dict):
                raise ValueError(f"header is a JSON {type(header).__name__}, expected an object")
            header.pop("__metadata__", None)
            spans = sorted((*_span(name, entry), name) for name, entry in header.items())
            edges = [0, *(stop for _, stop, _ in spans)]
            if [start for start, _, _ in spans] != edges[:-1] or edges[-1] != total - 8 - size:
                raise ValueError(
                    f"the tensors' ranges do not tile the {total - 8 - size} bytes of data"
                )
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}: not a sound safetensors file: {error}") from None
        tensors = {}
        for start, stop, name in spans:
            raw = torch.empty(stop - start, dtype=torch.uint8)
            if file.readinto(raw.numpy().data) != stop - start:
                raise ValueError(f"{path}: ends inside tensor {name!r}")
            tensor = raw.view(_DTYPES[header[name]["dtype"]])
            tensors[name] = tensor.view(header[name]["shape"])
    return tensors


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """json's object hook that refuses a key given twice."""
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"name {twice[:80]!r} twice")
    return found


def _span(name: str, entry: Any) -> tuple[int, int]:
    """First and last byte of a tensor in the data, once its header entry is found sound."""
    try:
        dtype, shape, (start, stop) = entry["dtype"], entry["shape"], entry["data_offsets"]
        whole = type(shape) is list and len(shape) <= 8
        whole = whole and all(type(n) is int and 0 <= n < 2**48 for n in [*shape, start, stop])
        if whole and stop - start == math.prod(shape) * _DTYPES[dtype].itemsize:
            return start, stop
    except (KeyError, TypeError, ValueError):
        pass
    raise ValueError(f"tensor {name!r} is given as {str(entry)[:120]}")


def write_safetensors(path: str | Path, tensors: dict[str, Tensor]) -> None:
    """Writes fp32 tensors as read_safetensors reads them, the header padded to 8 bytes."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    blocks, end = [], 0
    for name, tensor in tensors.items():
        block = tensor.detach().float().cpu().contiguous().numpy().tobytes()
        header[name] = {
            "dtype": "F32",
            "shape": list(tensor.shape),
            "data_offsets": [end, end + len(block)],
        }
        end += len(block)
        blocks.append(block)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    write_file(path, struct.pack("<Q", len(text)), text, *blocks)


def save_bert(model: Bert, folder: str | Path, tokenizer_from: str | Path | None = None) -> None:
    """Writes config.json and model.safetensors in Hugging Face's layout, and the tokenizer's files.

    tokenizer_from: folder whose tokenizer files are copied, in place of any that are there; raises
    FileNotFoundError where it has none.
    """
    folder = Path(folder)
    tokenizer: dict[str, bytes | None] = {}
    for name in _TOKENIZER_FILES if tokenizer_from else ():
        source = Path(tokenizer_from or "") / name
        tokenizer[name] = source.read_bytes() if source.is_file() else None
    if tokenizer_from and not (tokenizer["tokenizer.json"] or tokenizer["vocab.txt"]):
        raise FileNotFoundError(f"{tokenizer_from}: neither tokenizer.json nor vocab.txt in it")
    names = _tensor_names(model.config.num_hidden_layers)
    state = model.state_dict()
    write_safetensors(folder / "model.safetensors", {name: state[o] for o, name in names.items()})
    write_file(folder / "config.json", model.config.to_json().encode())
    for name, content in tokenizer.items():
        if content is not None:
            write_file(folder / name, content)
        elif not process()[0]:
            (folder / name).unlink(missing_ok=True)


_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.txt",
)


def write_file(path: str | Path, *blocks: bytes | memoryview) -> None:
    """Writes a file whole or not at all: a temporary one beside it, flushed, then renamed.

    Of several processes the first one writes. Raises OSError naming the file.
    """
    path = Path(path)
    if process()[0]:
        return
    path = path.resolve()  # a link stays one
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and not path.is_file():  # a pipe or device: nothing to put in its place
        with naming(path), path.open("wb") as file:
            file.writelines(blocks)
        return
    part = path.with_name(f".{path.name}.part")
    try:
        with naming(path), part.open("wb") as file:
            file.writelines(blocks)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Says which file it was that could not be written; a full disk's own error does not."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, f"{error.strerror}, writing", str(path)) from None


# --- running a task ------------------------------------------------------------------------------


# Task -> learning rate and passes of its teacher, the best of those tried on dev with one seed.
_TEACHERS = {"toy": (1e-3, 10), "CoLA": (5e-5, 5), "MRPC": (1e-4, 5), "SST-2": (5e-5, 2),
             "STS-B": (2e-4, 4)}  # fmt: skip


def settle(config: DistillConfig) -> DistillConfig:
    """The config without its zeros that mean 'automatic', or ValueError for what cannot be."""
    import glue

    config = replace(config, task=glue.official_name(config.task) or config.task)
    lr = config.lr or {"toy": 1e-3, "CoLA": 1e-4}.get(config.task, 3e-4)
    teacher_lr = config.teacher_lr or _TEACHERS.get(config.task, (5e-5, 0))[0]
    tau = config.logit_adjustment
    tau = float(config.task == "CoLA") if tau < 0 else tau  # Matthews' score wants balance
    last = 3 * (config.task == "CoLA") if config.label_epochs < 0 else config.label_epochs
    config = replace(config, lr=lr, teacher_lr=teacher_lr, logit_adjustment=tau, label_epochs=last)
    if config.precision == "auto":
        trains = not config.checkpoint  # to evaluate and to predict, fp32
        fast = trains and has_fast_bf16(resolve_device(config.device))
        config = replace(config, precision="bf16" if fast else "fp32")
    for name, good, expected in (
        *((f.name, math.isfinite(getattr(config, f.name)), "a finite number")
          for f in fields(config) if f.type is float),
        ("precision", config.precision in ("fp32", "bf16"), "auto, fp32 or bf16"),
        ("routing", config.routing in ("task", "sentence"), "task or sentence"),
        ("temperature", 0 < config.temperature <= 1000, "more than 0, at most 1000"),
        ("soft_weight", 0 <= config.soft_weight <= 1, "0 to 1"),
        ("warmup", 0 <= config.warmup < 1, "0 to below 1"),
        ("dropout", 0 <= config.dropout < 1, "0 to below 1"),
        ("transfer_ratio", config.transfer_ratio <= 1000, "at most 1000"),
        ("clip", config.clip > 0, "more than 0"),
        ("batch_size", config.batch_size > 0, "at least 1"),
        ("log_every", config.log_every > 0, "at least 1"),
        ("save_every", config.save_every > 0, "at least 1"),
        ("expert_size", 0 < config.expert_size <= 2**16, "1 to 65536"),
        ("max_length", config.max_length > 2, "at least 3"),
        *((name, getattr(config, name) >= 0, "0 or more") for name in
          ("layers", "epochs", "teacher_epochs", "lr", "teacher_lr", "limit", "weight_decay",
           "alignment_weight", "adversarial_weight", "balance_weight")),
        ("seed", 0 <= config.seed < 2**63, "0 or more, below 2 ** 63"),
    ):  # fmt: skip
        if not good:
            flag = "--" + name.replace("_", "-")
            raise ValueError(f"{flag} is {getattr(config, name)!r}, expected {expected}")
    if config.bert and config.teacher:
        raise ValueError(
            "--bert and --teacher exclude each other: one starts a teacher, one is one"
        )
    if config.layers and config.keep_layers:
        raise ValueError("--layers and --keep-layers exclude each other: how many, or which")
    if config.transfer and not Path(config.transfer).is_file():
        hint = ""
        if re.fullmatch(r"-?[\d.]+", config.transfer):
            hint = f"; the amount is --transfer-ratio {config.transfer}"
        raise FileNotFoundError(f"--transfer {config.transfer}: no such file{hint}")
    resolve_device(config.device)
    return config


def auto_epochs(examples: int, budget: int, batch_size: int, least: int) -> int:
    """Passes that show `budget` examples, `least` to 10, or make 200 steps: OURS(9)."""
    steps = math.ceil(examples / batch_size)
    return max(min(max(math.ceil(budget / examples), least), 10), math.ceil(200 / steps))


def fine_tuning_epochs(config: DistillConfig, task: "glue.Task", examples: int) -> int:
    """Passes of the teacher's fine-tuning, and of the student's on labels alone."""
    passes = 0 if config.limit else _TEACHERS.get(task.name, (0, 0))[1]
    if passes or config.teacher_epochs:
        return config.teacher_epochs or passes
    return auto_epochs(examples, 24_000, config.batch_size, least=2)


def find_task(config: DistillConfig, labels: Sequence[str] = ()) -> "glue.Task":
    """The built-in task, one of GLUE's, or data of your own; labels where that has no train.tsv."""
    import glue

    if config.task == "toy":
        return glue.Task("toy", ("sentence",), labels=("negative", "positive"))
    return glue.find_task(config.task, regression=config.regression, labels=labels)


def load_split(
    config: DistillConfig, task: "glue.Task", split: str, *, with_labels: bool = True
) -> "glue.Examples":
    """A split's texts and labels; the training split is cut to --limit."""
    import data
    import glue

    if task.name == "toy":
        texts, labels = data.toy_examples(split)
        found = glue.Examples(texts, None if split == "test" else labels)
    else:
        found = glue.read(task, config.data_dir, split, with_labels=with_labels)
    if split == "train" and config.limit:
        return glue.Examples(found.texts[: config.limit], found.gold[: config.limit])
    return found


def checkpoint_folder(path: str, part: str) -> Path:
    """The checkpoint at a path that is one, or holds one as `part` (a run's --out folder).

    A path that is not there and could be a name, NAME or OWNER/NAME, is one of the Hub's.
    """
    folder = Path(path)
    inner = folder / part
    owner = folder.parent != Path() and folder.parent.exists()  # a folder's name, misspelt
    if not folder.exists() and not owner and re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", path):
        return download_bert(path)
    if (folder / "config.json").is_file() or not folder.is_dir():
        return folder
    if (inner / "config.json").is_file():
        return inner
    there = [name for name in ("teacher", "student") if (folder / name / "config.json").is_file()]
    hint = f"; {folder / there[0]} is one" if there else ", or the run is not finished"
    raise FileNotFoundError(f"{folder}: no checkpoint in it, and no {part}{hint}")


def match_labels(model: Bert, task: "glue.Task", where: Path) -> Bert:
    """The model with its classes in the task's order, matched by name.

    Names that say nothing (LABEL_0) are taken to stand in the task's order. Raises ValueError with
    both lists where the names differ, and for a model whose classifier was never trained.
    """
    names, wanted = model.config.labels, task.labels or ("score",)
    if model.fresh:
        raise ValueError(
            f"{where}: no trained {' and '.join(model.fresh)}; fine-tune it: --bert {where}"
        )
    silent = names == tuple(f"LABEL_{i}" for i in range(len(names))) and {*names} != {*wanted}
    if len(names) == len(wanted) and (silent or task.regression):
        if silent and not task.regression:
            order = ", ".join(wanted)
            print(f"note: {where} names no labels, taken to be {order}", file=sys.stderr)
        model.config = replace(model.config, labels=wanted)
        return model
    for plain in (str, lambda name: name.lower().replace("-", "_").replace(" ", "_")):
        for spelling in (wanted, task.spelling):
            given, sought = [plain(n) for n in names], [plain(n) for n in spelling]
            if sorted(given) != sorted(sought) or len(set(given)) < len(given):
                continue
            rows = torch.tensor([given.index(name) for name in sought])
            with torch.no_grad():
                model.classifier.weight.copy_(model.classifier.weight[rows].clone())
                model.classifier.bias.copy_(model.classifier.bias[rows].clone())
            model.config = replace(model.config, labels=wanted)
            return model
    shown = [", ".join(labels[:8]) + ", ..." * (len(labels) > 8) for labels in (names, wanted)]
    raise ValueError(f"{where}: its labels are {shown[0]}, those of {task.name} {shown[1]}")


def load_fitting_tokenizer(folder: Path, model: Bert, config: DistillConfig) -> "Tokenizer":
    """The folder's tokenizer, refused with ValueError where it does not fit the model."""
    import data

    positions = model.config.max_position_embeddings
    if config.max_length > positions:
        print(f"note: texts are cut at {positions} tokens, this BERT's positions", file=sys.stderr)
    tokenizer = data.load_tokenizer(folder, min(config.max_length, positions))
    size, rows = max(tokenizer.get_vocab().values(), default=-1) + 1, model.config.vocab_size
    tried = [tokenizer.encode(""), tokenizer.encode("a"), tokenizer.encode("a", "b")]
    segments = [segment for encoding in tried for segment in encoding.type_ids]
    size = max(size, *(1 + i for encoding in tried for i in encoding.ids))
    if size > rows:
        raise ValueError(
            f"{folder}: tokenizer of {size} tokens for {rows} embeddings; not its own?"
        )
    if not all(len(encoding) for encoding in tried) or max(segments) > 1:
        raise ValueError(
            f"{folder}: its tokenizer makes {[encoding.tokens for encoding in tried]} of an empty "
            "text, a text and a pair, expected [CLS], [SEP] and the segments 0 and 1"
        )
    return tokenizer


class Run(NamedTuple):
    """A run of a command: what was asked for, what it works on, where it writes."""

    config: DistillConfig  # settled
    students: Sequence[DistillConfig]  # what is asked of each
    task: "glue.Task"
    train_set: "glue.Examples"
    dev: "glue.Examples"
    out: Path
    log: Log
    resume: Resume
    results: dict[str, Any]  # of results.json, as they come


def start_run(config: DistillConfig, students: Sequence[DistillConfig] = ()) -> Run:
    """Reads what the run works on. Raises ValueError for a real task without a BERT.

    students: what is asked of each student to come; none: of one, the same as of the run.
    """
    config = settle(config)
    out, task = Path(config.out or "out"), find_task(config)
    if task.name != "toy" and not (config.bert or config.teacher):
        raise ValueError(
            f"task {task.name} needs --bert, a pre-trained BERT to fine-tune, or --teacher"
        )
    train_set, dev = load_split(config, task, "train"), load_split(config, task, "dev")
    for split in task.splits:
        if split.startswith("dev_"):  # MNLI's other one: scored at the end, found broken now
            load_split(config, task, split)
    log = Log(out / "log.jsonl")
    resume = Resume(out, config, train_set, log)
    return Run(config, students or [config], task, train_set, dev, out, log, resume, {})


def starting_bert(config: DistillConfig, task: "glue.Task", out: Path) -> tuple[Bert, Path]:
    """The teacher, or the BERT that becomes it under a fresh classifier; its tokenizer's folder."""
    torch.manual_seed(config.seed)
    if config.teacher:
        folder = checkpoint_folder(config.teacher, "teacher")
        return match_labels(load_bert(folder), task, folder), folder
    if config.bert:
        folder = checkpoint_folder(config.bert, "teacher")
        model = load_bert(folder, labels=task.labels or ("score",))
        print(f"{folder}: {', '.join(model.fresh)} drawn at random, to be fine-tuned")
        return model, folder
    return toy_bert(task, out / "toy"), out / "toy"


def toy_bert(task: "glue.Task", folder: Path) -> Bert:
    """The built-in task's BERT, untrained, its tokenizer written to the folder."""
    import data

    words = data.toy_vocabulary()
    write_file(folder / "vocab.txt", "".join(f"{word}\n" for word in words).encode())
    options = {"tokenizer_class": "BertTokenizer", "do_lower_case": True, "model_max_length": 128}
    write_file(folder / "tokenizer_config.json", json.dumps(options).encode())
    if dist.is_initialized():
        dist.barrier()  # the others read what the first one wrote
    return Bert(
        BertConfig(
            vocab_size=len(words), hidden_size=64, num_hidden_layers=4, num_attention_heads=4,
            intermediate_size=256, max_position_embeddings=128, labels=task.labels,
            hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, initializer_range=0.05,
        )
    )  # fmt: skip


def score_model(
    model: Bert, tokenizer: "Tokenizer", task: "glue.Task", config: DistillConfig, log: Log | None
) -> dict[str, Any]:
    """Layers, parameters and the metrics of --split; MNLI's mismatched ones under their own name.

    In fp32 whatever the training was in: what `evaluate` and `predict` give by default.
    """
    import data
    import glue

    config = replace(config, precision="fp32") if log else config
    splits = [name for name in task.splits if f"{name}_".startswith(f"{config.split}_")]
    result: dict[str, Any] = {
        "layers": model.config.num_hidden_layers,
        "parameters": model.parameter_count(),
    }
    for split in splits:
        texts, labels = load_split(config, task, split)
        if labels is None:
            raise ValueError(f"{task.name} {split} has no labels to score against; use predict")
        logits = predict_logits(model, data.encode(tokenizer, texts), config)
        metrics = glue.score(task, labels, answers(logits))
        if split == splits[0]:
            result |= metrics
        else:
            result[split] = metrics
        line = " ".join(f"{name} {value:.2f}" for name, value in metrics.items())
        print(f"{log.phase if log else 'evaluate'} | {task.name} {split} n={len(texts)} | {line}")
        if log:
            log.write(split=split, n=len(texts), **metrics)
    if not splits:
        raise ValueError(f"{task.name} has no split {config.split} to score; use predict")
    return result


def score_unit(task: "glue.Task", labels: "numpy.ndarray") -> tuple[float, float]:
    """Mean and standard deviation of the training scores, the unit they are learnt in: OURS(11).

    Losses weigh alike whatever the scale of the scores. Classes have 0 and 1. Raises ValueError
    where float32, which models speak, could not tell the scores apart.
    """
    import numpy as np

    if not task.regression:
        return 0.0, 1.0
    with np.errstate(over="ignore"):
        center, spread = float(labels.mean()), float(labels.std())
    if not max(1e-5 * abs(center), 1e-30) < spread < 1e30:
        raise ValueError(
            f"{task.name}: training scores of mean {center:g} and standard deviation {spread:g}: "
            "too much alike, too small or too large for float32; subtract a constant or rescale"
        )
    return center, spread


@torch.no_grad()
def rescale(model: Bert, spread: float, center: float) -> None:
    """Turns the model's score s into spread * s + center, by its classifier."""
    model.classifier.weight.mul_(spread)
    model.classifier.bias.mul_(spread).add_(center)


def answers(logits: Tensor) -> "numpy.ndarray":
    """Class ids, or scores where C = 1: (n, C) -> (n,)"""
    return (logits[:, 0] if logits.shape[1] == 1 else logits.argmax(1)).numpy()


def refuse_majority(task: "glue.Task", dev: "glue.Examples", reached: float, force: bool) -> None:
    """Stops a run whose teacher knows no more than the most frequent label (or a constant)."""
    import numpy as np

    import glue

    labels = dev.gold
    constant = labels.mean() if task.regression else np.bincount(labels).argmax()
    majority = glue.score(task, labels, np.full(len(labels), constant))["score"]
    if reached <= majority and not force:
        raise ValueError(
            f"the teacher scores {reached:.2f} on {task.name} dev, the most frequent label alone "
            f"{majority:.2f}: nothing to distil. --overwrite and --teacher-epochs fine-tune "
            "it longer, --force insists"
        )


def gather_transfer(
    config: DistillConfig, task: "glue.Task", train_texts: Sequence[Any]
) -> list[Any]:
    """Unlabelled texts for the student's epochs: the task's own perturbed, and other tasks' text.

    OURS(10). Nothing that occurs in the task's dev or test split.
    """
    import data
    import glue

    if not config.transfer_ratio:
        return []
    others, held_out, given = [], [], []
    for where, text in read_lines(Path(config.transfer)) if config.transfer else ():
        if isinstance(text, ValueError):
            raise ValueError(f"{where}: {text}")
        if "".join(text).strip():
            given.append(text)
    for name in task.splits:
        if name != "train":
            try:
                texts = load_split(config, task, name, with_labels=False).texts
            except FileNotFoundError:
                continue  # test files are optional
            held_out += data.sentences_of(texts)
    for other in glue.TASKS.values() if task.name != "toy" else ():
        path = Path(config.data_dir) / other.name / "train.tsv"
        if other.name != task.name and path.is_file():
            others.append(glue.read(other, config.data_dir, "train", with_labels=False).texts)
    chosen = min(4 * len(train_texts), max(0, 100_000 - len(train_texts)))
    if task.name == "toy":
        chosen = len(train_texts)
    ratio = config.transfer_ratio
    count = chosen if ratio < 0 else round(ratio * len(train_texts))
    texts, left_out = data.transfer_texts(
        train_texts, others, held_out, count, config.seed, given=given
    )
    first = f" ({len(given):,} texts of {config.transfer} before all others)" if given else ""
    print(
        f"transfer text: {len(texts)} unlabelled{first}, "
        f"{left_out} left out for occurring in dev or test"
    )
    return texts


def keep_layers(
    config: DistillConfig, teacher_layers: int, *, pairs: bool = False
) -> tuple[int, ...]:
    """The teacher's layers that the student keeps, from 1."""
    if not config.keep_layers:
        count = config.layers or max(1, teacher_layers // 2)
        return kept_layers(teacher_layers, count, pairs=pairs)
    try:
        keep = tuple(int(number) for number in config.keep_layers.split(","))
    except ValueError:
        raise ValueError(f"--keep-layers is '{config.keep_layers}', expected e.g. 2,4,6") from None
    if list(keep) != sorted(set(keep)) or keep[0] < 1 or keep[-1] > teacher_layers:
        raise ValueError(f"--keep-layers is {keep}, expected rising numbers, 1 to {teacher_layers}")
    return keep


def aligned_layers(config: DistillConfig, teacher_layers: int) -> tuple[int, ...]:
    """The teacher's layers that the student's are aligned with, one for one."""
    return layer_map(teacher_layers, len(keep_layers(config, teacher_layers)))


def make_teacher(run: Run) -> tuple[Bert, "Tokenizer", "data.Encoded", Tensor]:
    """The teacher, saved in out/teacher, its tokenizer, the encoded training set and its labels.

    The labels of a score are in its `score_unit`; the teacher speaks in the scores themselves.
    Everything that a user may have got wrong is found before the first step, and only then is
    what an earlier run left in `out` given up.
    """
    import data

    config, task, train_set = run.config, run.task, run.train_set
    if run.resume.phase not in ("", "teacher"):  # the teacher was finished
        config = replace(config, teacher=str(run.out / "teacher"))
    teacher, folder = starting_bert(config, task, run.out)
    if not run.resume.phase:
        refuse_foreign(run, folder)
    for student in run.students:
        keep_layers(student, teacher.config.num_hidden_layers)
    tokenizer = load_fitting_tokenizer(folder, teacher, config)
    encoded = data.encode(tokenizer, train_set.texts)
    center, spread = score_unit(task, train_set.gold)
    labels = torch.tensor((train_set.gold - center) / spread).float()  # (n,)
    run.resume.begin(run.log)
    for row in range(min(2, len(encoded))):
        ids = encoded.ids[encoded.offsets[row] : encoded.offsets[row + 1]]
        tokens = " ".join(tokenizer.id_to_token(int(i)) or "?" for i in ids)
        gold = train_set.gold[row]
        print(f"example {row + 1}: {tokens} -> {task.labels[gold] if task.labels else f'{gold:g}'}")
    if not config.teacher:
        offset = class_offset(labels, len(teacher.config.labels), config.logit_adjustment)
        offset = offset.to(resolve_device(config.device))

        def objective(
            output: BertOutput, mask: Tensor, rows: Tensor, progress: float
        ) -> dict[str, Tensor]:
            known = ship(labels[rows], output.logits.device)
            return {"hard": hard_loss(output.logits.float(), known, offset)}

        epochs = fine_tuning_epochs(config, task, len(encoded))
        train(
            teacher, encoded, objective, config, run.log,
            epochs=epochs, lr=config.teacher_lr, resume=run.resume,
        )  # fmt: skip
        rescale(teacher, spread, center)
    save_bert(teacher, run.out / "teacher", tokenizer_from=folder)
    return teacher, tokenizer, encoded, labels


def refuse_foreign(run: Run, start: Path) -> None:
    """Raises ValueError where --out's teacher or student is a checkpoint that no run here left."""
    for place in (run.out / "teacher", run.out / "student"):
        itself = place.resolve() == start.resolve()
        if run.config.bert and itself:
            raise ValueError(f"--bert {start} is where this run would write; name another --out")
        known = run.config.overwrite or run.log.path.exists() or itself
        if (place / "config.json").exists() and not known:
            raise ValueError(f"{place} holds a checkpoint of no run here; --overwrite replaces it")


def finetune(config: DistillConfig) -> dict[str, Any]:
    """Fine-tunes a BERT on a task and scores it: the teacher, without a student.

    Returns what results.json holds of scores.
    """
    run = start_run(config)
    config, out, texts = run.config, run.out, run.train_set.texts
    with run.log.timed("teacher", f"fine-tunes a BERT on the {len(texts):,} training texts"):
        teacher, tokenizer, _, _ = make_teacher(run)
        run.results["teacher"] = score_model(teacher, tokenizer, run.task, config, run.log)
    write_results(run)
    run.resume.done()
    command = ["--task", config.task, *["--regression"] * config.regression]
    in_glue = not run.task.folder and run.task.name != "toy"
    command += ["--data-dir", config.data_dir] if in_glue else []
    command += ["--teacher", str(out), "--out", f"{out}-student"]
    print(f"\nsaved {out / 'teacher'}\nnext: python microbert.py {shlex.join(command)}")
    return run.results


def distill(config: DistillConfig) -> dict[str, Any]:
    """The whole method: teacher, its one pass, experts, pruning, distillation, scores.

    Returns what results.json holds of scores and speeds. Raises ValueError, FileNotFoundError or
    OSError for whatever is wrong with options, data or checkpoints, before training where it can.
    """
    import data

    run = start_run(config)
    config, task, out, log, results = run.config, run.task, run.out, run.log, run.results
    count = len(run.train_set.texts)
    print(f"MicroBERT on {task.name}: {count:,} training texts, {len(run.dev.texts):,} of dev")
    teacher, ready = prepare(run)
    experts = None
    if needs_experts(config):
        with log.timed("experts", "fits experts and gate to the task on the teacher's features"):
            experts = make_experts(ready.cache, config)
    keep = keep_layers(config, teacher.config.num_hidden_layers, pairs=task.pairs)
    with log.timed("pruned", f"the teacher's layers {', '.join(map(str, keep))}, as they are"):
        pruned = prune(teacher.cpu(), keep)
        del teacher  # its memory is the student's now
        results["pruned"] = score_model(pruned, ready.tokenizer, task, config, log)

    told = f"the same, distilled on {len(ready.encoded):,} texts"
    if last := label_epochs(config):
        told += f", then {last} times through the labels alone"
    with log.timed("student", told):
        if run.resume.phase == "baseline":  # the student was finished
            student = load_bert(out / "student")
        else:
            student = make_student(run, ready, pruned, experts)
        results["student"] = score_model(student, ready.tokenizer, task, config, log)
    save_bert(student, out / "student", tokenizer_from=out / "teacher")

    if config.baseline:
        with log.timed("baseline", "the same, fine-tuned on the labels alone, for comparison"):
            labels_alone = replace(config, **row_options("labels-only"))
            baseline = make_student(run._replace(config=labels_alone), ready, pruned, None)
            results["baseline"] = score_model(baseline, ready.tokenizer, task, config, log)

    sample = data.encode(ready.tokenizer, run.dev.texts[:128])
    finish(run, student, sample)
    example = min(run.dev.texts, key=lambda text: len(str(text)))
    command = ["predict", str(out), *([example] if isinstance(example, str) else example)]
    print(f"next: python microbert.py {shlex.join(command)}")
    remove_cache(run)
    run.resume.done()
    return results


class Prepared(NamedTuple):
    """What every student of a teacher starts from, besides the pruned BERT."""

    encoded: "data.Encoded"  # the training texts, then the transfer texts
    labelled: int  # the number of training texts
    cache: TeacherCache  # of all texts
    layers: tuple[int, ...]  # of the teacher, those with features in the cache
    tokenizer: "Tokenizer"
    unit: tuple[float, float]  # mean and standard deviation of the training scores

    def only(self, layers: tuple[int, ...]) -> "Prepared":
        """The same with these layers alone in the cache, in memory if that leaves any out."""
        if layers == self.layers:
            return self
        columns = [self.layers.index(layer) for layer in layers]
        cache = self.cache._replace(features=self.cache.features[:, columns])
        return self._replace(cache=cache, layers=layers)


def cache_path(run: Run) -> Path:
    """The file of the teacher's features, one to a machine."""
    return run.out / f"cache{os.environ.get('GROUP_RANK', '')}.f16"


def remove_cache(run: Run) -> None:
    """Deletes it."""
    with suppress(OSError):  # a system that keeps mapped files keeps this one
        cache_path(run).unlink()


def prepare(run: Run) -> tuple[Bert, Prepared]:
    """The teacher, speaking in `score_unit`s, and its one pass over all texts."""
    import data

    config, task, log = run.config, run.task, run.log
    transfer = gather_transfer(config, task, run.train_set.texts)
    count = len(run.train_set.texts)
    what = "as it was given" if config.teacher else f"fine-tunes a BERT on the {count:,} texts"
    with log.timed("teacher", what):
        teacher, tokenizer, encoded, labels = make_teacher(run)
        run.results["teacher"] = score_model(teacher, tokenizer, task, config, log)
    refuse_majority(task, run.dev, run.results["teacher"]["score"], config.force)
    with log.timed("cache", "runs the teacher once and keeps its logits and sentence features"):
        depth = teacher.config.num_hidden_layers
        layers = tuple(sorted({n for s in run.students for n in aligned_layers(s, depth)}))
        encoded = data.concatenate(encoded, data.encode(tokenizer, transfer))
        labels = torch.cat([labels, torch.full((len(transfer),), torch.nan)])
        center, spread = score_unit(task, run.train_set.gold)
        rescale(teacher, 1 / spread, -center / spread)
        cache = teacher_pass(teacher, encoded, labels, layers, config, cache_path(run), log)
    return teacher, Prepared(encoded, count, cache, layers, tokenizer, (center, spread))


def needs_experts(config: DistillConfig) -> bool:
    """Whether a part that is switched on looks through the experts."""
    return config.moe and (config.fal or config.gan)


def distils(config: DistillConfig) -> bool:
    """Whether a student learns anything from its teacher."""
    return config.soft or config.fal or config.gan


def label_epochs(config: DistillConfig) -> int:
    """Passes over the labels alone after distillation, OURS(14)."""
    return config.label_epochs if distils(config) else 0


def count_updates(
    config: DistillConfig, ready: Prepared, texts: "data.Encoded", epochs: int
) -> int:
    """Steps of a student's whole training."""
    steps = count_steps(len(texts), epochs, config.batch_size)
    return steps + count_steps(ready.labelled, label_epochs(config), config.batch_size)


def texts_and_passes(run: Run, ready: Prepared) -> tuple["data.Encoded", int]:
    """What a student is trained on and how often; without the teacher, on the labelled texts."""
    config, texts = run.config, ready.encoded
    if not (config.transfer_ratio and distils(config)):
        texts = texts.first(ready.labelled)
    if config.epochs:
        return texts, config.epochs
    if not distils(config):
        return texts, fine_tuning_epochs(config, run.task, len(texts))
    few = len(texts) <= 50_000
    return texts, auto_epochs(len(texts), 24_000, config.batch_size, least=2 if few else 1)


def make_student(run: Run, ready: Prepared, pruned: Bert, experts: SentenceExperts | None) -> Bert:
    """A copy of the pruned BERT, trained."""
    config, student = run.config, copy.deepcopy(pruned)
    texts, epochs = texts_and_passes(run, ready)
    set_dropout(student, config.dropout)
    objective = Distillation(ready.cache, experts, config)
    train(
        student, texts, objective, config, run.log, epochs=epochs, lr=config.lr,
        last=(ready.labelled, label_epochs(config)), resume=run.resume,
    )  # fmt: skip
    center, spread = ready.unit
    rescale(student, spread, center)
    return student


def set_dropout(model: Bert, rate: float) -> None:
    """Another dropout of layers and classifier for the training to come.

    The embeddings keep the config's, and the checkpoint's config keeps the teacher's.
    """
    model.head_dropout = rate
    for layer in model.layers:
        assert isinstance(layer, BertLayer)
        layer.attention_dropout = layer.hidden_dropout = rate


def finish(run: Run, student: Bert, sample: "data.Encoded") -> None:
    """Sizes and speeds of teacher and student, results.json and the closing table."""
    if dist.is_initialized():
        dist.barrier()  # the first one has written the student
    speeds = examples_per_second([load_bert(run.out / "teacher"), student], sample, run.config)
    run.results["examples_per_second"] = dict(zip(("teacher", "student"), speeds))
    for name in run.results.keys() - {"examples_per_second"}:
        file = run.out / ("teacher" if name == "teacher" else "student") / "model.safetensors"
        run.results[name]["megabytes"] = round(file.stat().st_size / 1e6, 1)
    write_results(run)
    print_table(run.results)


def examples_per_second(
    models: Sequence[Bert], encoded: "data.Encoded", config: DistillConfig
) -> list[float]:
    """Texts that each model answers in a second, in fp32, the best of three alternating rounds."""
    config, best = replace(config, precision="fp32"), [0.0] * len(models)
    for _ in range(3):
        for i, model in enumerate(models):
            started = time.perf_counter()
            predict_logits(model, encoded, config)
            best[i] = max(best[i], len(encoded) / (time.perf_counter() - started))
    return best


def make_experts(cache: TeacherCache, config: DistillConfig) -> SentenceExperts:
    """Experts and gate fitted on the teacher's cache; prints what the gates came to."""
    _, matched, _, hidden = cache.features.shape
    torch.manual_seed(config.seed)
    experts = SentenceExperts(
        matched, hidden, config.expert_size, cache.logits.shape[1], config.routing
    ).to(resolve_device(config.device))
    fit_experts(
        experts, *cache, temperature=config.temperature, balance_weight=config.balance_weight,
        logit_adjustment=config.logit_adjustment, seed=config.seed,
    )  # fmt: skip
    gate = experts.gate(cache.features[:512].to(experts.gate_bias.device).float()).mean(0)
    for layer, weights in enumerate(gate.tolist(), 1):
        cls, largest, mean = weights
        print(f"gate of student layer {layer}: cls {cls:.2f} max {largest:.2f} mean {mean:.2f}")
    return experts


def versions() -> dict[str, str]:
    """Of what a result was made with."""
    import numpy
    import tokenizers

    found = {"microbert": __version__, "python": platform.python_version()}
    return found | {m.__name__: str(m.__version__) for m in (torch, tokenizers, numpy)}


def metric_name(task: "glue.Task") -> str:
    """What a score is, in words."""
    metric = " and ".join(task.metrics)
    return f"mean of {metric}" if len(task.metrics) > 1 else metric


def write_results(run: Run) -> None:
    """results.json: what was reached, how long it took and with what."""
    results = run.results
    if "student" in results:
        teacher, student = results["teacher"]["score"], results["student"]["score"]
        results["retention"] = student / teacher if teacher else None
    results = {
        "task": run.task.name,
        "metric": metric_name(run.task),
        "seed": run.config.seed,
        **results,
        "seconds": {name: round(seconds, 2) for name, seconds in run.log.seconds.items()},
        "config": _asked(run.config),
        "versions": versions(),
    }
    write_file(run.out / "results.json", (json.dumps(results, indent=2) + "\n").encode())


def _asked(config: DistillConfig) -> dict[str, Any]:
    """The options of distil, by name."""
    return {name: value for name, value in asdict(config).items() if name not in _OF_OTHERS}


def print_table(results: dict[str, Any]) -> None:
    """Teacher, pruned, fine-tuned only and MicroBERT side by side."""
    teacher, speed = results["teacher"]["score"], results["examples_per_second"]
    print("\n                 layers   parameters       MB  examples/s  dev score  of teacher")
    for name, called in (("teacher", "teacher"), ("pruned", "pruned"),
                         ("baseline", "fine-tuned only"), ("student", "MicroBERT")):  # fmt: skip
        if row := results.get(name):
            share = f"{100 * row['score'] / teacher:.1f} %" if teacher else "-"
            rate = speed["teacher" if name == "teacher" else "student"]
            print(
                f"{called:15}{row['layers']:8}{row['parameters']:13,}{row['megabytes']:9.1f}"
                f"{rate:12,.0f}{row['score']:11.2f}{share:>12}"
            )
    print()


# --- the ablation --------------------------------------------------------------------------------

# Rows of an ablation: what each switches off. Any option of a student can stand beside them.
_ROWS: dict[str, dict[str, Any]] = {
    "full": {},
    "no-moe": {"moe": False},
    "no-fal": {"fal": False},
    "no-gan": {"gan": False},
    "no-soft": {"soft": False},
    "no-transfer": {"transfer_ratio": 0.0},
    "soft-only": {"moe": False, "fal": False, "gan": False},
    "labels-only": {"moe": False, "fal": False, "gan": False, "soft": False, "epochs": 0},
}
_STUDENT = ("layers", "keep_layers", "moe", "fal", "gan", "soft", "temperature", "soft_weight",
            "alignment_weight", "adversarial_weight", "expert_size", "routing", "balance_weight",
            "logit_adjustment", "dropout", "epochs", "label_epochs", "lr", "batch_size", "warmup",
            "weight_decay", "clip")  # fmt: skip


def row_names(rows: str) -> list[str]:
    """The rows of --rows, between spaces or commas; keep_layers=2,4,6 is one."""
    return re.split(r"[\s,]+(?=[a-z])", rows.strip(" ,"))


def row_options(row: str) -> dict[str, Any]:
    """What a row of the ablation changes: names of _ROWS and option=value, joined by '+'.

    Raises ValueError for a part that is neither.
    """
    kinds: dict[str, Any] = {f.name: f.type for f in fields(DistillConfig)}
    options: dict[str, Any] = {}
    for part in sorted(row.split("+"), key=lambda part: "=" in part):  # a given value wins
        name, given, value = part.partition("=")
        name = name.replace("-", "_") if given else name
        if not given and name in _ROWS:
            options |= _ROWS[name]
        elif name in _STUDENT and value:
            try:
                kind = kinds[name]
                options[name] = {"0": False, "1": True}[value] if kind is bool else kind(value)
            except (KeyError, ValueError):
                raise ValueError(f"--rows: {part} in {row}, expected a {kind.__name__}") from None
        else:
            raise ValueError(
                f"--rows: no '{part}' ({', '.join(_ROWS)}, or option=value of a student's option, "
                "such as layers=2)"
            )
    return options


def ablate(config: DistillConfig) -> dict[str, Any]:
    """Trains students with parts of the method switched off, over several seeds, and compares them.

    A seed's rows share its teacher and the teacher's one pass. OUT/ablation.json is written after
    every student; the same command continues from there, and with more --rows or --seeds it adds
    them. Returns what that file holds.
    """
    *_, report = ablation_reports(config)
    print_ablation(report)
    return report


def ablation_reports(config: DistillConfig) -> Iterator[dict[str, Any]]:
    """What ablation.json holds: at first, and again whenever another student is finished."""
    config = settle(config)
    try:
        seeds = list(dict.fromkeys(int(seed) for seed in config.seeds.split(",")))
    except ValueError:
        raise ValueError(f"--seeds is '{config.seeds}', expected e.g. 0,1,2") from None
    for seed in seeds:
        settle(replace(config, seed=seed))
    rows = {row: row_config(config, row) for row in row_names(config.rows)}
    file = Path(config.out or "out") / "ablation.json"
    report = load_ablation(file, config)
    seen, asked = _names(report["runs"]), {(row, seed) for row in rows for seed in seeds}
    if config.overwrite and asked <= seen:
        report["runs"] = [r for r in report["runs"] if (r["row"], r["seed"]) not in asked]
    done = _names(report["runs"])
    yield report
    for seed in seeds:
        teacher = config.teacher.replace("{seed}", str(seed))
        own = replace(config, seed=seed, teacher=teacher, out=str(file.parent / f"seed-{seed}"))
        left = {r: replace(o, seed=seed) for r, o in rows.items() if (r, seed) not in done}
        for result in train_rows(own, left, ("teacher", seed) in done) if left else ():
            seen.add((result["row"], seed))
            report["runs"] += [*runs_beside(file, report["flags"], seen), result]
            seen |= _names(report["runs"])
            report["table"] = summarize(report["runs"])
            write_file(file, (json.dumps(report, indent=1) + "\n").encode())
            yield report


def row_config(config: DistillConfig, row: str) -> DistillConfig:
    """What is asked of a row's student, settled."""
    options = row_options(row)
    if options.keys() & {"layers", "keep_layers"}:
        config = replace(config, layers=0, keep_layers="")
    return settle(replace(config, **options))


def _names(runs: Sequence[dict[str, Any]]) -> set[tuple[str, int]]:
    return {(run["row"], run["seed"]) for run in runs}


def runs_beside(
    file: Path, flags: dict[str, Any], seen: set[tuple[str, int]]
) -> list[dict[str, Any]]:
    """What another process, of other rows or seeds, has added to ablation.json meanwhile."""
    if not file.exists():
        return []
    now = json.loads(file.read_text(encoding="utf-8"))
    same = same_flags(now["flags"], flags, file.parent, overwrite=True)
    return [r for r in now["runs"] if same and (r["row"], r["seed"]) not in seen]


def load_ablation(file: Path, config: DistillConfig) -> dict[str, Any]:
    """ablation.json, or a new one. Raises ValueError where it is damaged or of other flags."""
    task = find_task(config)
    flags = flags_that_matter(config, load_split(config, task, "train"))
    del flags["seed"]
    new = {"task": task.name, "metric": metric_name(task), "flags": flags, "versions": versions()}
    new |= {"table": [], "runs": []}
    if not file.exists():
        return new
    try:
        report: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        report["table"] = summarize(report["runs"])
        same = same_flags(dict(report["flags"]), flags, file.parent, config.overwrite)
    except (TypeError, KeyError, AttributeError, json.JSONDecodeError) as error:
        raise ValueError(f"{file}: no ablation of ours ({error!r:.80}); remove it") from None
    return report if same else new


def train_rows(
    config: DistillConfig, rows: dict[str, DistillConfig], taught: bool
) -> Iterator[dict[str, Any]]:
    """One seed's results: its teacher's, unless that was `taught` before, then the students'.

    distance: mean KL divergence of a student's dev answers from the teacher's, in nats; for scores
    the mean squared difference, in `score_unit`s. It is less noisy than a score.
    """
    import data

    run = start_run(config, [*rows.values()])
    if taught:
        known = replace(run.config, bert="", teacher=str(run.out / "teacher"))
        run = run._replace(config=known)
    teacher, ready = prepare(run)
    reached = run.results["teacher"]
    if not taught:
        yield {"row": "teacher", "seed": config.seed, **reached}
    dev, (center, spread) = data.encode(ready.tokenizer, run.dev.texts), ready.unit
    in_fp32 = replace(config, precision="fp32")
    wanted = predict_logits(teacher, dev, in_fp32)  # (n, C)
    for row, asked in rows.items():
        own = run._replace(config=asked)
        depth = teacher.config.num_hidden_layers
        keep = keep_layers(asked, depth, pairs=run.task.pairs)
        mine = ready.only(aligned_layers(asked, depth))
        with run.log.timed(row, f"a student of layers {', '.join(map(str, keep))}"):
            experts = make_experts(mine.cache, asked) if needs_experts(asked) else None
            student = make_student(own, mine, prune(teacher.cpu(), keep), experts)
            scores = score_model(student, ready.tokenizer, run.task, asked, run.log)
        texts, epochs = texts_and_passes(own, ready)
        speeds = examples_per_second([teacher, student], dev.first(min(128, len(dev))), config)
        given = (predict_logits(student, dev, in_fp32) - center) / spread  # (n, C)
        yield {
            "row": row, "seed": config.seed, **scores, "distance": soft_loss(given, wanted).item(),
            "retention": scores["score"] / reached["score"] if reached["score"] else None,
            "speed_up": speeds[1] / speeds[0],
            "updates": count_updates(asked, ready, texts, epochs),
            "seconds": round(run.log.seconds[row], 1),
        }  # fmt: skip
    remove_cache(run)
    run.resume.done()


def summarize(runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of each row: n seeds, and mean and standard deviation (None for one seed) of what it got."""
    table = []
    for row in dict.fromkeys(run["row"] for run in runs):
        own = [run for run in runs if run["row"] == row]
        line: dict[str, Any] = {"row": row, "n": len(own)}
        for name in ("score", "retention", "distance", "speed_up", "updates", "seconds"):
            found = [run[name] for run in own if run.get(name) is not None]
            if found:
                line[name] = statistics.fmean(found)
                line[f"{name}_sd"] = statistics.stdev(found) if len(found) > 1 else None
        table.append(line)
    return table


def print_ablation(report: dict[str, Any]) -> None:
    """The table of an ablation: mean +- standard deviation over the seeds."""

    def spread(line: dict[str, Any], name: str, unit: float) -> str:
        if name not in line:
            return "-"
        sd = line[f"{name}_sd"]
        return f"{unit * line[name]:.2f}" + (f" +- {unit * sd:.2f}" if sd is not None else "")

    width = max(len(line["row"]) for line in report["table"])
    print(f"\n{report['task']} dev, {report['metric']}, mean +- sd over n seeds")
    print(f"{'':{width}}   n           score    of teacher, %   distance   speed-up  updates")
    for line in report["table"]:
        kept, cells = spread(line, "retention", 100), ""
        if "speed_up" in line:
            cells = f"{line['distance']:11.4f}{line['speed_up']:11.2f}{line['updates']:9,.0f}"
        print(f"{line['row']:{width}}{line['n']:4}{spread(line, 'score', 1):>16}{kept:>17}{cells}")


def load_trained(config: DistillConfig) -> tuple[Bert, "Tokenizer", "glue.Task"]:
    """The checkpoint of evaluate and predict, its tokenizer and the task."""
    folder = checkpoint_folder(config.checkpoint, "student")
    model = load_bert(folder)
    task = find_task(config, labels=model.config.labels)
    model = match_labels(model, task, folder)
    return model, load_fitting_tokenizer(folder, model, config), task


def evaluate(config: DistillConfig) -> dict[str, Any]:
    """Scores a checkpoint on a task's dev split, or on --split, and returns the scores."""
    config = settle(config)
    model, tokenizer, task = load_trained(config)
    return score_model(model, tokenizer, task, config, None)


def predict(config: DistillConfig) -> None:
    """Predicts a text, a --file or standard input line by line; with --task, a split of the task.

    Of a text `label<TAB>probability`, or the score; of a split `index<TAB>prediction` for every
    row, in the GLUE server's form.
    """
    config = settle(config)
    if config.task:
        return predict_split(config)
    folder = checkpoint_folder(config.checkpoint, "student")
    if config.text and config.file:
        raise ValueError("a text and --file exclude each other")
    if config.split != "dev":
        raise ValueError("--split needs --task, whose split it is")
    if len(config.text) > 2:
        raise ValueError(f"{len(config.text)} texts, expected one or the two of a pair, quoted")
    if config.out and Path(config.out).is_file() and Path(config.out).stat().st_size:
        raise ValueError(f"{config.out} is there already; name another")
    model = load_bert(folder)
    if model.fresh:
        raise ValueError(f"{folder}: no trained {' and '.join(model.fresh)}; nothing to predict by")
    tokenizer = load_fitting_tokenizer(folder, model, config)
    refused: list[str] = []
    lines = answer_lines(model, tokenizer, given_texts(config), config, refused)
    if config.out:
        write_file(config.out, *(f"{line}\n".encode() for line in lines))
    for line in lines:
        print(line, flush=True)
    if refused:
        raise ValueError(f"{len(refused)} lines without an answer, the first at {refused[0]}")


def given_texts(config: DistillConfig) -> Iterator[tuple[str, Any]]:
    """Where each text stands, and the text, the pair or the ValueError that it is.

    Lines are UTF-8, with a tab between the texts of a pair.
    """
    if config.text:
        yield "text", config.text[0] if len(config.text) == 1 else tuple(config.text)
        return
    if config.file and not Path(config.file).exists():
        raise FileNotFoundError(f"{config.file}: no such file")
    if not config.file and sys.stdin.isatty():
        print("note: reads texts, one a line; Ctrl-D ends", file=sys.stderr)
    yield from read_lines(Path(config.file) if config.file else None)


def read_lines(path: Path | None) -> Iterator[tuple[str, Any]]:
    """Where each line stands, and the text, the pair or the ValueError that it is; None: stdin."""
    where = path or "standard input"
    with path.open("rb") if path else nullcontext(sys.stdin.buffer) as file:
        for number, raw in enumerate(file, 1):
            try:
                cells = raw.decode().rstrip("\r\n").split("\t")
                if len(cells) > 2:
                    raise ValueError(f"{len(cells)} tab-separated texts, expected one or a pair")
                yield f"{where}:{number}", cells[0] if len(cells) == 1 else tuple(cells)
            except ValueError as error:  # UnicodeDecodeError is one
                yield f"{where}:{number}", error


def answer_lines(
    model: Bert,
    tokenizer: "Tokenizer",
    given: Iterator[tuple[str, Any]],
    config: DistillConfig,
    refused: list[str],
) -> Iterator[str]:
    """The line to print for every text, in their order.

    A text that has no answer is told on stderr and put among `refused`; its line is empty.
    """
    import data

    labels = model.config.labels
    at_once = 1 if not (config.text or config.file) and sys.stdin.isatty() else 512
    while some := list(islice(given, at_once)):
        texts = [text for _, text in some if not isinstance(text, ValueError)]
        logits = iter(predict_logits(model, data.encode(tokenizer, texts), config))
        for where, text in some:
            if isinstance(text, ValueError):
                print(f"{where}: {text}", file=sys.stderr)
                refused.append(where)
                yield json.dumps({"error": str(text)}) if config.json else ""
            elif len(labels) == 1:
                score = next(logits).item()
                yield json.dumps({"score": score}) if config.json else f"{score:.4f}"
            else:
                shares = next(logits).softmax(-1).tolist()
                share, label = max(zip(shares, labels), key=lambda pair: pair[0])
                found = {"label": label, "probabilities": dict(zip(labels, shares))}
                yield json.dumps(found) if config.json else f"{label}\t{share:.4f}"


def predict_split(config: DistillConfig) -> None:
    """index<TAB>prediction for every row of a split, in the GLUE server's form."""
    import data
    import glue

    heading = "index\tprediction\n"
    if config.out and Path(config.out).is_file():
        with open(config.out, "rb") as file:
            if file.read(len(heading)) not in (heading.encode(), b""):
                raise ValueError(f"{config.out} is there and holds no predictions; name another")
    for name in ("text", "file", "json"):
        if getattr(config, name):
            raise ValueError(f"{name} and --task exclude each other: --task predicts a split of it")
    model, tokenizer, task = load_trained(config)
    texts = load_split(config, task, config.split, with_labels=False).texts
    logits = predict_logits(model, data.encode(tokenizer, texts), config)
    rows = [f"{i}\t{value}\n" for i, value in enumerate(glue.values(task, answers(logits)))]
    content = heading + "".join(rows)
    if config.out:
        write_file(config.out, content.encode())
        print(f"{len(rows)} predictions for {task.name} {config.split} in {config.out}")
    else:
        sys.stdout.write(content)


# --- command line --------------------------------------------------------------------------------

_DATA = ("task", "data_dir")
_RUN = ("max_length", "device", "precision")
_ANSWER = ("split", "text", "file", "json")
_ABLATION = ("seeds", "rows")
_OF_OTHERS = ("checkpoint", *_ANSWER, *_ABLATION)  # no option of distil
_TRAIN = ("bert", "out", "overwrite", "limit", "seed", "batch_size", "warmup", "weight_decay",
          "clip", "log_every", "save_every", "teacher_epochs", "teacher_lr",
          "logit_adjustment")  # fmt: skip
# Command -> what runs it, its options, examples of it.
_COMMANDS: dict[str, tuple[Callable[[DistillConfig], Any], tuple[str, ...], str]] = {
    "distill": (
        distill,
        tuple(f.name for f in fields(DistillConfig) if f.name not in _OF_OTHERS),
        """
  python microbert.py
  python microbert.py --task MRPC --bert google-bert/bert-base-uncased --out runs/MRPC
  python microbert.py --task path/to/my_data --bert path/to/bert --layers 2 --out runs/mine""",
    ),
    "finetune": (
        finetune,
        _DATA + ("regression",) + _TRAIN + _RUN,
        """
  python microbert.py finetune --task RTE --bert google-bert/bert-base-uncased --out runs/RTE""",
    ),
    "ablate": (
        ablate,
        tuple(
            f.name
            for f in fields(DistillConfig)
            if f.name not in {"checkpoint", "seed", "baseline", *_ANSWER}
        ),
        """
  python microbert.py ablate --task MRPC --bert google-bert/bert-base-uncased --out runs/ablation
  python microbert.py ablate --rows full,layers=1,layers=3,lr=1e-4+no-gan --seeds 0,1 --out toy""",
    ),
    "evaluate": (
        evaluate,
        ("checkpoint",) + _DATA + ("split",) + _RUN,
        """
  python microbert.py evaluate runs/MRPC --task MRPC --data-dir glue""",
    ),
    "predict": (
        predict,
        ("checkpoint",) + _ANSWER + ("out",) + _DATA + _RUN,
        """
  python microbert.py predict runs/MRPC "He left at noon." "At noon he went away."
  python microbert.py predict runs/MRPC --file pairs.tsv --json
  python microbert.py predict runs/MRPC --task MRPC --split test --out predictions/MRPC.tsv""",
    ),
}
_TOP_FLAGS = ("-h", "--help", "--version")
_ARGUMENTS = {"evaluate": "CHECKPOINT ", "predict": "CHECKPOINT [TEXT [PAIR]] "}


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}; see {self.prog} --help\n")


def parser() -> argparse.ArgumentParser:
    """One flag per field of DistillConfig, for the commands that use it."""

    def page(prog: str) -> argparse.HelpFormatter:
        return argparse.RawDescriptionHelpFormatter(prog, max_help_position=27, width=100)

    prose: dict[str, Any] = {"formatter_class": page, "allow_abbrev": False}
    top = Parser(
        prog="microbert.py", **prose, description="Distils a BERT into a layer-pruned student.",
        epilog="`python microbert.py COMMAND --help` shows the options of a command and examples; "
        "without a\ncommand it is distill, and without options the built-in task.",
    )  # fmt: skip
    top.add_argument("--version", action="version", version=f"microbert {__version__}")
    commands = top.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for command, (run, names, examples) in _COMMANDS.items():
        usage = f"python microbert.py {command} {_ARGUMENTS.get(command, '')}[options]"
        sub = commands.add_parser(
            command, **prose, usage=usage, help=(run.__doc__ or "").split("\n")[0],
            description=inspect.cleandoc(run.__doc__ or "").split("\nReturns")[0],
            epilog=f"examples:{examples}",
        )  # fmt: skip
        headings, heading = {}, ""
        for f in fields(DistillConfig):
            heading = f.metadata["group"] or heading
            if f.name in names:
                if heading not in headings:
                    headings[heading] = sub.add_argument_group(heading)
                add_option(headings[heading], command, f.name, f.default, f.metadata["help"])
    return top


def add_option(group: Any, command: str, name: str, default: Any, text: str) -> None:
    """One field of DistillConfig as a flag, or as an argument without one."""
    flags = ["--" + name.replace("_", "-")]
    if command == "finetune" and name.startswith("teacher_"):
        flags.append(flags[0].replace("teacher-", ""))  # its only training: --epochs, --lr
    default = "" if (command, name) == ("predict", "task") else default
    shown = "" if default in ("", ()) or default is False else f" [{default}]"
    text = (text + shown).replace("%", "%%")
    if name in ("checkpoint", "text"):
        optional = {"nargs": "*", "default": ()} if name == "text" else {}
        group.add_argument(name, help=text, **optional)
    elif default is False:
        group.add_argument(*flags, help=text, action="store_true")
    elif default is True:
        group.add_argument(*flags, default=True, help=text, action=argparse.BooleanOptionalAction)
    else:
        kind = type(default)
        word = {int: "N", float: "X", str: "WORD"}[kind]
        group.add_argument(*flags, default=default, help=text, type=kind, metavar=word)


def parse(arguments: list[str]) -> dict[str, Any]:
    """The command and the values of its options; one that there is not ends with the nearest."""
    if not arguments or arguments[0].startswith("-") and arguments[0] not in _TOP_FLAGS:
        arguments = ["distill", *arguments]
    if arguments[0] not in (*_COMMANDS, *_TOP_FLAGS):
        near = difflib.get_close_matches(arguments[0], _COMMANDS, n=1)
        hint = f", did you mean {near[0]}?" if near else ""
        raise ValueError(f"no command '{arguments[0]}'{hint} ({', '.join(_COMMANDS)})")
    chosen, unknown = parser().parse_known_args(arguments)
    if chosen.command == "predict" and not any(word.startswith("-") for word in unknown):
        chosen.text, unknown = (*chosen.text, *unknown), []  # texts behind an option
    if unknown:
        flags = ["--" + name.replace("_", "-") for name in _COMMANDS[chosen.command][1]]
        found = difflib.get_close_matches(unknown[0].split("=")[0], flags, n=1, cutoff=0.7)
        hint = f", did you mean {found[0]}?" if found else ""
        raise ValueError(
            f"{chosen.command} has no '{unknown[0]}'{hint or '; its --help shows what it has'}"
        )
    return vars(chosen)


def join_processes(config: DistillConfig) -> DistillConfig:
    """Under torchrun, makes this one of its processes, each with a GPU of its own or on the CPU.

    What the first one prints is what all would.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ or dist.is_initialized():
        return config
    device = resolve_device(config.device).type
    if device == "cuda":
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    if process()[0]:
        sys.stdout = open(os.devnull, "w")
    return replace(config, device=device)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; a user's mistake is one line on stderr and exit code 2."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # closed by whoever started this
            setattr(sys, name, open(os.devnull, mode))
    chosen: dict[str, Any] = {}
    for stream in (sys.stdout, sys.stderr):  # a terminal that lacks a letter gets its number
        getattr(stream, "reconfigure", lambda **_: None)(errors="backslashreplace")
    try:
        chosen = parse(list(sys.argv[1:] if argv is None else argv))
        run, *_ = _COMMANDS[chosen.pop("command")]
        warnings.filterwarnings("ignore", ".*drawn at random")  # commands say so, or refuse it
        run(join_processes(DistillConfig(**chosen)))
        if dist.is_initialized():  # together: one that is gone would take the others' threads along
            dist.barrier()
            dist.destroy_process_group()
        sys.stdout.flush()
    except BrokenPipeError:  # `| head` has seen enough
        sys.stdout = open(os.devnull, "w")
        return 0 if chosen.get("checkpoint") else 1
    except (OSError, ValueError) as error:
        where = f" in process {process()[0]}" if process()[0] else ""
        print(f"error{where}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        out = Path(chosen.get("out") or "out")
        places = () if chosen.get("checkpoint") else ("resume.ckpt*", "seed-*/resume.ckpt*")
        found = [path for place in places for path in sorted(out.glob(place))]
        how = f"; the same command continues from {found[0]}" if found else ""
        print(f"interrupted{how}", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
