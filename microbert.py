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

The method comes first and ends with `distill`; what follows loads, saves, compares and reports.
Copied alone this file has model, checkpoints and losses; training needs data.py, a task glue.py.
"""

import argparse
import copy
import difflib
import importlib
import inspect
import io
import json
import math
import mmap
import os
import platform
import re
import shlex
import shutil
import signal
import statistics
import sys
import threading
import time
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, field, fields, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend as Kernel
from torch.nn.attention import sdpa_kernel
from torch.overrides import TorchFunctionMode

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    import data
    import glue
else:

    class Neighbour:
        """data.py or glue.py, of this file's package or folder, imported when first needed."""

        def __init__(self, name: str) -> None:
            self.name = f"{__package__}.{name}" if __package__ else name

        def __getattr__(self, attribute: str) -> Any:
            return getattr(importlib.import_module(self.name), attribute)

    data, glue = Neighbour("data"), Neighbour("glue")

__all__ = [
    "Bert", "BertConfig", "BertOutput", "Discriminator", "DistillConfig", "Distillation",
    "FeatureMaps", "Log", "SentenceExperts", "TeacherCache", "ablate", "adversarial_loss",
    "alignment_loss", "discriminator_loss", "distill", "download_bert", "evaluate", "finetune",
    "fit_experts", "hard_loss", "kept_layers", "layer_map", "load_bert", "make_experts",
    "model_outputs", "predict", "predict_logits", "prune", "save_bert", "sentence_features",
    "soft_loss", "teacher_pass", "train",
]  # fmt: skip
__version__ = "0.1.0"

# --- the encoder ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class BertConfig:
    """Shape of a BERT [2], under Hugging Face's keys. ValueError for a size that no BERT has."""

    vocab_size: int = 30522
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    classifier_dropout: float | None = None  # None is hidden_dropout_prob
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-12
    pad_token_id: int | None = 0  # which nothing here uses
    sentence_pairs: bool | None = None  # whether it learnt from pairs; None is not known
    labels: tuple[str, ...] = ("LABEL_0", "LABEL_1")  # id2label; a single one is a score

    def __post_init__(self) -> None:
        for f in fields(self):
            value, whole = getattr(self, f.name), f.type is int
            high = 2**10 if f.name.startswith("num_") else 2**24 if whole else 1
            if f.name in ("pad_token_id", "sentence_pairs", "labels") or value is f.default is None:
                continue
            if type(value) not in ([int] if whole else [int, float]) or not whole <= value <= high:
                raise ValueError(f"{f.name} is {value!r:.80}, expected {int(whole)} to {high}")
        if not 1 <= len(set(self.labels)) == len(self.labels) <= 2**10:
            raise ValueError(f"labels {self.labels!r:.80}, expected 1 to {2**10} different names")
        if self.hidden_size % self.num_attention_heads:
            told = f"hidden_size {self.hidden_size} is no multiple of num_attention_heads"
            raise ValueError(f"{told} {self.num_attention_heads}")


class BertOutput(NamedTuple):
    """What a BERT returns."""

    logits: Tensor  # (B, C)
    hidden_states: tuple[Tensor, ...]  # L + 1 of (B, T, H), embeddings first


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
        split, rate = (*hidden.shape[:2], self.heads, -1), self.hidden_dropout
        query = self.query(hidden).view(split).transpose(1, 2)  # (B, N, T, H / N)
        key = self.key(hidden).view(split).transpose(1, 2)  # (B, N, T, H / N)
        value = self.value(hidden).view(split).transpose(1, 2)  # (B, N, T, H / N)
        mixed = attention(query, key, value, mask, self.attention_dropout, self.training)
        mixed = self.attention_output(mixed.transpose(1, 2).flatten(2))  # (B, T, H)
        hidden = self.attention_norm(hidden + dropout(mixed, rate, self.training))
        widened = F.gelu(self.intermediate(hidden))  # (B, T, intermediate_size), exact GELU
        narrowed = dropout(self.output(widened), rate, self.training)  # (B, T, H)
        normed: Tensor = self.output_norm(hidden + narrowed)  # (B, T, H)
        return normed


def attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, rate: float, training: bool
) -> Tensor:
    """softmax(Q K^T / sqrt(H / N)) V over the keys of the mask: (B, N, T, H / N), the same back.

    Written out where a CPU trains: torch's ways take a tenth longer. Elsewhere all but cuDNN's,
    whose gradients under a mask can be wrong (https://github.com/pytorch/pytorch/issues/196678).
    """
    if not training or query.device.type != "cpu":
        with sdpa_kernel([Kernel.FLASH_ATTENTION, Kernel.EFFICIENT_ATTENTION, Kernel.MATH]):
            return F.scaled_dot_product_attention(query, key, value, mask, rate * training)
    scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-1, -2)  # (B, N, T, T)
    if mask is not None:
        scores = scores + (~mask).to(scores.dtype) * torch.finfo(scores.dtype).min
    return dropout(scores.softmax(-1), rate, training) @ value


class Bert(nn.Module):
    """BERT with a classifier over its pooler: Hugging Face's BertForSequenceClassification."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.config, hidden = config, config.hidden_size
        self.word_embeddings = nn.Embedding(config.vocab_size, hidden)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, hidden)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, hidden)
        self.embeddings_norm = nn.LayerNorm(hidden, config.layer_norm_eps)
        self.layers = nn.ModuleList(BertLayer(config) for _ in range(config.num_hidden_layers))
        self.pooler = nn.Linear(hidden, hidden)
        self.classifier = nn.Linear(hidden, len(config.labels))
        head = config.classifier_dropout
        self.head_dropout = config.hidden_dropout_prob if head is None else head
        self.fresh: tuple[str, ...] = ()  # parts that load_bert had to draw at random
        for module in self.modules():  # BERT's initialisation, normal where [2] truncates
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=config.initializer_range)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
    ) -> BertOutput:  # fmt: skip
        """input_ids (B, T); attention_mask (B, T), 0 at padding; token_type_ids (B, T), 0 or 1.

        Raises ValueError where T exceeds max_position_embeddings.
        """
        tokens, most = input_ids.shape[1], self.config.max_position_embeddings
        if tokens > most:
            raise ValueError(f"{tokens} tokens for a BERT of {most} positions")
        if self.config.type_vocab_size < 2 and token_type_ids is not None and token_type_ids.any():
            raise ValueError(
                "pairs of texts, for a BERT of type_vocab_size 1: it takes single ones"
            )
        positions = torch.arange(tokens, device=input_ids.device)  # (T,)
        segments = torch.zeros_like(input_ids) if token_type_ids is None else token_type_ids
        hidden = self.word_embeddings(input_ids) + self.token_type_embeddings(segments)  # (B, T, H)
        hidden = self.embeddings_norm(hidden + self.position_embeddings(positions))  # (B, T, H)
        hidden_states = [dropout(hidden, self.config.hidden_dropout_prob, self.training)]
        mask = None if attention_mask is None else attention_mask[:, None, None, :].bool()
        for layer in self.layers:
            hidden_states.append(layer(hidden_states[-1], mask))  # (B, T, H)
        pooled = torch.tanh(self.pooler(hidden_states[-1][:, 0]))  # (B, H)
        pooled = dropout(pooled, self.head_dropout, self.training)
        return BertOutput(self.classifier(pooled), tuple(hidden_states))


def bert_without_weights(config: BertConfig) -> Bert:
    """A BERT that takes no memory until `load_state_dict(tensors, assign=True)` gives it some."""
    with torch.device("meta"), Unfilled():
        return Bert(config)


# --- the student: layers of its teacher ----------------------------------------------------------

# A student *starts as* M of its teacher's L layers, those that do most for it at once: the lowest
# build what all others read, the classifier reads the last. Each of its layers is then *aligned*
# with a block of the teacher's: with fewer layers to the top each has to do the work of several.


def layer_map(teacher_layers: int, student_layers: int) -> tuple[tuple[int, ...], ...]:
    """The teacher's layers whose features student layer m = 1..M learns: its block, OURS(12).

    The ceil(L / M) layers up to t(m) = ceil(m L / M), so that none is left out and all blocks have
    one size. Raises ValueError unless 1 <= M <= L.
    """
    if not 1 <= student_layers <= teacher_layers:
        raise ValueError(f"{student_layers} student layers of a teacher with {teacher_layers}")
    numbers = range(1, student_layers + 1)
    tops = [math.ceil(m * teacher_layers / student_layers) for m in numbers]
    return tuple(tuple(range(top - tops[0] + 1, top + 1)) for top in tops)


def kept_layers(teacher_layers: int, student_layers: int) -> tuple[int, ...]:
    """The teacher's layers that M student layers start as, OURS(1): the lowest M - 1 and its last.

    Raises ValueError unless 1 <= M <= L.
    """
    layer_map(teacher_layers, student_layers)  # raises it
    return *range(1, student_layers), teacher_layers


def prune(teacher: Bert, keep: Sequence[int]) -> Bert:
    """A new BERT of the teacher's embeddings, its layers `keep` (from 1), pooler and classifier.

    Raises ValueError unless keep rises from at least 1 to at most the teacher's last layer.
    """
    keep, layers = list(keep), teacher.config.num_hidden_layers
    if not keep or keep != sorted(set(keep)) or keep[0] < 1 or keep[-1] > layers:
        raise ValueError(f"layers {keep}, expected rising numbers from 1 to {layers}")
    state = {}
    for name, tensor in teacher.state_dict().items():
        if name.startswith("layers."):
            _, layer, rest = name.split(".", 2)
            if int(layer) + 1 not in keep:
                continue
            name = f"layers.{keep.index(int(layer) + 1)}.{rest}"
        state[name] = tensor.clone()
    pruned = bert_without_weights(replace(teacher.config, num_hidden_layers=len(keep)))
    pruned.load_state_dict(state, assign=True)
    return pruned.train(teacher.training)


# --- losses on predictions -----------------------------------------------------------------------


def soft_loss(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(teacher || student) of softened predictions, times temperature squared [3].

    student, teacher: logits (B, C) -> (). A softmax over one logit is constant, so scores (C = 1)
    take the mean squared error, OURS(7). The gradient is the student's alone.
    """
    teacher = teacher.detach()
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
        largest = (hidden + never_largest).max(1).values  # (B, H)
        mean = torch.bmm(share.unsqueeze(1), hidden).squeeze(1)  # (B, H)
        features.append(torch.stack([hidden[:, 0], largest, mean], dim=1))  # (B, E, H)
    stacked = torch.stack(features, dim=1)  # (B, K, E, H)
    return F.layer_norm(stacked, stacked.shape[-1:])


class SentenceExperts(nn.Module):
    """Per student layer: an expert for each view of each layer in its block, and a gate over them.

    The gate belongs to the task, the same for every sentence, as [1] says.
    Fitted by `fit_experts` on the teacher, then frozen: OURS(3). block: layers in one.
    """

    def __init__(
        self, matched: int, hidden_size: int, expert_size: int, labels: int, block: int = 1
    ) -> None:
        super().__init__()
        shape, spread = (matched, 3 * block, hidden_size, expert_size), hidden_size**-0.5
        self.experts = nn.Parameter(torch.randn(shape) * spread)
        self.heads = nn.Parameter(torch.randn(matched, expert_size, labels) * expert_size**-0.5)
        self.biases = nn.Parameter(torch.zeros(matched, labels))
        self.gate_bias = nn.Parameter(torch.zeros(matched, 3 * block))

    def gate(self) -> Tensor:
        """Weights of the experts (K, E), at least 0, sum 1."""
        return self.gate_bias.softmax(-1)

    def forward(self, features: Tensor) -> Tensor:
        """z = sum_j g_j e_j(f_j): features (B, K, E, H) -> (B, K, P)"""
        views = torch.einsum("bkeh,kehp->bkep", features, self.experts)  # (B, K, E, P)
        return torch.einsum("bkep,ke->bkp", views, self.gate())

    def predict(self, fused: Tensor) -> Tensor:
        """fused (B, K, P) -> each layer's guess at the task (B, K, C)"""
        return torch.einsum("bkp,kpc->bkc", fused, self.heads) + self.biases


class FeatureMaps(nn.Module):
    """Reads a student's three views as the experts read a block's: OURS(14).

    Starts as the experts, gated, those of a view summed over the block; trained with the student,
    because its layer does the work of several, and thrown away in the end.
    """

    lr = 5e-4  # their peak rate, whatever the student's

    def __init__(self, experts: SentenceExperts) -> None:
        super().__init__()
        gated = experts.gate()[..., None, None] * experts.experts  # (K, E, H, P)
        self.weight = nn.Parameter(gated.detach().unflatten(1, (-1, 3)).sum(1))  # (K, 3, H, P)

    def forward(self, features: Tensor) -> Tensor:
        """(B, K, 3, H) -> (B, K, P)"""
        return torch.einsum("bkvh,kvhp->bkp", features, self.weight)


def fit_experts(
    experts: SentenceExperts,
    features: "Tensor | StoredFeatures",
    logits: Tensor,
    labels: Tensor,
    *,
    temperature: float = 2.0,
    logit_adjustment: float = 0.0,
    steps: int = 300,
    seed: int = 0,
) -> SentenceExperts:
    """Teaches experts and gate to predict the task from the teacher's features, then freezes them.

    features (n, K, E, H), logits (n, C), labels (n,), NaN for unlabelled. OURS(3): trained on the
    alignment loss itself they would be constant. OURS(4): the importance loss keeps all in use.
    """
    device, generator = experts.gate_bias.device, torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam([experts.experts, experts.heads, experts.biases], lr=1e-3)
    optimizer.add_param_group({"params": [experts.gate_bias], "lr": 2e-2})
    offset = class_offset(labels, logits.shape[1], logit_adjustment).to(device)  # (C,)
    for _ in range(steps):
        rows = torch.randint(len(labels), (256,), generator=generator)
        seen, target, known = (t[rows].to(device).float() for t in (features, logits, labels))
        loss = 0.01 * importance_loss(experts.gate())
        for guess in experts.predict(experts(seen)).unbind(1):  # (B, C) of each layer
            loss = loss + hard_loss(guess, known, offset) + soft_loss(guess, target, temperature)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return experts.eval().requires_grad_(False)


def importance_loss(gate: Tensor) -> Tensor:
    """Squared coefficient of variation of the experts' weights [4, section 4]: (K, E) -> ()"""
    return (gate.var(-1, correction=0) / gate.mean(-1).square()).mean()


def alignment_loss(
    student: Tensor, teacher: Tensor, gate: Tensor | None = None,
    fused: tuple[Tensor, Tensor] | None = None,
) -> Tensor:  # fmt: skip
    """Feature Alignment Loss, guided by the experts [1]; the formula is OURS(5).

    mean over texts and layers of (sum_v g_v mean_H[(f_v^S - f_v^T)^2]) + 1 - cos(z^S, z^T), f^T of
    the block's last layer, g_v summed over the block. Without experts every view weighs 1/3 and
    the fused term is dropped.
    student: features (B, K, 3, H), teacher: (B, K, E, H), gate (K, E), fused: z of student and of
    teacher, (B, K, P) each; gradient into the student's alone -> ()
    """
    distance = (student - teacher[:, :, -3:].detach()).square().mean(-1)  # (B, K, 3)
    if gate is None or fused is None:
        return distance.mean()
    weight: Tensor = gate.detach().unflatten(1, (-1, 3)).sum(1)  # (K, 3)
    direction = 1 - F.cosine_similarity(fused[0], fused[1].detach(), dim=-1)  # (B, K)
    return ((weight * distance).sum(-1) + direction).mean()


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


# --- options -------------------------------------------------------------------------------------


def opt(default: Any, help: str, low: float = 0, high: float = 10**9, *, group: str = "") -> Any:
    """A config field whose help text is its documentation; --help prints the same words.

    low, high: bounds of a number. group: heading in --help of this field and the following.
    """
    return field(default=default, metadata={"help": help, "range": (low, high), "group": group})


_ALL_ROWS = "full no-moe no-fal gan no-soft no-transfer no-fal+no-transfer labels-only"


@dataclass(frozen=True)
class DistillConfig:
    """Every option of every command: its default, and what --help says of it."""

    task: str = opt("toy", "'toy', a GLUE task or a folder of your own data", group="the data")
    data_dir: str = opt("glue", "folder of the GLUE files, DATA_DIR/TASK/train.tsv and so on")
    max_length: int = opt(128, "tokens of a text, [CLS] and [SEP] included; the rest is cut", 3)

    regression: bool = opt(False, "your own data's labels are scores", group="the run")
    limit: int = opt(0, "use the first N training examples; 0 is all")
    out: str = opt("", "folder to write [out]; for predict, file to write [standard output]")
    overwrite: bool = opt(False, "replace the run that --out holds: finished, or of other flags")
    force: bool = opt(False, "distil even a teacher that is no better than the majority label")
    bert: str = opt("", "a pre-trained BERT to make the teacher of: a folder, or its Hub name")
    teacher: str = opt("", "or a teacher already fine-tuned: a folder, a run's --out, a Hub name")
    teacher_epochs: int = opt(0, "passes of the teacher's fine-tuning; 0 chooses")
    teacher_lr: float = opt(0.0, "the teacher's peak learning rate; 0 chooses")

    layers: int = opt(0, "encoder layers it keeps; 0 is half the teacher's", group="the student")
    keep_layers: str = opt("", "or the layers themselves, counted from 1: 2,4,6")
    epochs: int = opt(0, "passes over training and transfer text; 0 chooses by their size")
    lr: float = opt(0.0, "the student's peak learning rate; 0 is 1e-4, for toy 1e-3")

    moe: bool = opt(True, "mixture of experts over the sentence features", group="the method")
    fal: bool = opt(True, "feature alignment loss")
    gan: bool = opt(False, "discriminator and adversarial loss, off because it helped no task")
    soft: bool = opt(True, "soft targets")
    temperature: float = opt(2.0, "tau of the soft targets", 1e-3, 1000)
    soft_weight: float = opt(0.9, "weight a of the soft targets; the labels have 1 - a", 0, 1)
    alignment_weight: float = opt(5.0, "weight b of the feature alignment loss, at the start")
    adversarial_weight: float = opt(0.05, "weight c of the adversarial loss, once ramped up")
    expert_size: int = opt(128, "width P of an expert's projection", 1, 2**16)
    transfer: str = opt("", "file of unlabelled texts to distil on too, one (or a pair) a line")
    transfer_ratio: float = opt(-1.0, "transfer texts per training example; -1 chooses", -1, 1000)

    batch_size: int = opt(32, "texts per step", 1, group="training")
    warmup: float = opt(0.1, "share of the steps in which the learning rate rises", 0, 0.99)
    weight_decay: float = opt(0.01, "AdamW's decay, of matrices only")
    clip: float = opt(1.0, "largest norm of the gradient", 1e-9)
    logit_adjustment: float = opt(-1.0, "tau of `class_offset`; -1 is 1 for CoLA, else 0", -1)
    log_every: int = opt(50, "steps between two lines of the log", 1)
    save_every: int = opt(500, "steps between two saved states, where a killed run goes on", 1)
    seed: int = opt(0, "of every random choice", 0, 2**63 - 1, group="a single run")
    baseline: bool = opt(True, "fine-tune the student on labels alone too, for the closing table")
    device: str = opt("auto", "'auto', 'cpu', 'cuda' or 'mps'", group="the machine")
    precision: str = opt("auto", "'fp32', 'bf16' or 'auto': bf16 to train where it is faster")

    seeds: str = opt("0,1,2", "of its runs; {seed} in --teacher is each", group="the ablation")
    rows: str = opt(_ALL_ROWS, "students: names and option=value joined by '+': layers=1+no-moe")
    checkpoint: str = opt("", "a folder, a run's --out or a Hub name", group="what to answer")
    split: str = opt("dev", "the split: 'dev', 'test', or for MNLI 'test_mismatched'")
    text: Sequence[str] = opt((), "a text, or the two of a pair; none: --file or standard input")
    file: str = opt("", "file of texts, one a line, a tab between the two of a pair")
    json: bool = opt(False, "JSON: on each line all probabilities, or of evaluate all scores")

    def __post_init__(self) -> None:
        for f in fields(self):
            value, (low, high) = getattr(self, f.name), f.metadata["range"]
            if f.type in (int, float) and not low <= value <= high:  # NaN is not, either
                raise ValueError(f"{flag(f.name)} is {value!r}, expected {low} to {high}")
        if self.precision not in ("auto", "fp32", "bf16"):
            raise ValueError(f"--precision is {self.precision!r}, expected auto, fp32 or bf16")
        if not re.fullmatch(r"\d{1,18}(,\d{1,18})*", self.seeds):
            raise ValueError(f"--seeds is '{self.seeds}', expected e.g. 0,1,2")
        if self.bert and self.teacher:
            raise ValueError("--bert and --teacher exclude each other: one becomes a teacher")
        if self.transfer and not self.transfer_ratio:
            raise ValueError("--transfer and --transfer-ratio 0 exclude each other: text, or none")
        if self.layers and self.keep_layers:
            raise ValueError("--layers and --keep-layers exclude each other: how many, or which")


# What the options choose by themselves, for any task ('') and where one has a setting of its own: a
# recipe for its teacher, and what CoLA's Matthews correlation asks for, balanced answers, OURS(13).
# They were found on dev, mostly with one seed. A model as small as the built-in task's is faster on
# a CPU than on a GPU, and in fp32 than in bf16.
RECIPES: dict[str, dict[str, Any]] = {
    "": {"lr": 1e-4, "teacher_lr": 5e-5, "logit_adjustment": 0.0},
    "CoLA": {"teacher_epochs": 5, "logit_adjustment": 1.0},
    "MRPC": {"teacher_lr": 1e-4, "teacher_epochs": 5},
    "SST-2": {"teacher_epochs": 2},
    "STS-B": {"teacher_lr": 2e-4, "teacher_epochs": 4},
    "toy": {"epochs": 6, "lr": 1e-3, "teacher_lr": 5e-4, "transfer_ratio": 75.0, "device": "cpu",
            "precision": "fp32"},
}  # fmt: skip


# --- the student's objective ---------------------------------------------------------------------


Objective = Callable[[BertOutput, Tensor, Tensor, float], dict[str, Tensor]]


class TeacherCache(NamedTuple):
    """All that is kept of the teacher, for each of n training and transfer texts."""

    features: "Tensor | StoredFeatures"  # (n, K, E, H) fp16, standardised, on the disk
    logits: Tensor  # (n, C) fp16
    labels: Tensor  # (n,) class ids or scores as floats, NaN for a transfer text


class Distillation:
    """loss = a soft + (1 - a) hard + b FAL + c adversarial: the weighted terms of one step.

    b falls to 0 by half of the training, c rises until then, OURS(8): first features, then answers.
    Holds the frozen experts and the discriminator, which it trains on every batch it is given. The
    student has K layers, the m-th matched with t(m). `stateful` is what a killed run keeps of it.
    """

    def __init__(
        self, cache: TeacherCache, experts: SentenceExperts | None, config: DistillConfig
    ) -> None:
        self.cache, self.experts, self.config = cache, experts, config
        self.soft_weight = config.soft_weight if config.soft else 0.0
        device, classes = resolve_device(config.device), cache.logits.shape[1]
        self.offset = class_offset(cache.labels, classes, config.logit_adjustment).to(device)
        self.stateful: dict[str, Any] = {}
        self.maps = self.mapping = None
        if experts:
            self.maps = FeatureMaps(experts)
            self.mapping, self.stateful["maps"] = in_parallel(self.maps), self.maps
        if config.gan:
            torch.manual_seed(config.seed)
            fused = (cache.features if experts is None else experts.experts).shape[-1]
            self.discriminator = Discriminator(fused + classes).to(device)
            self.in_parallel = in_parallel(self.discriminator)
            parameters = self.discriminator.parameters()
            self.optimizer = torch.optim.Adam(parameters, lr=2e-4, betas=(0.5, 0.999), fused=True)
            self.stateful |= {"discriminator": self.discriminator, "its optimizer": self.optimizer}

    def __call__(
        self, output: BertOutput, attention_mask: Tensor, rows: Tensor, progress: float
    ) -> dict[str, Tensor]:
        """output of the student for these rows of the cache; progress 0..1 through the training."""
        config, device = self.config, output.logits.device
        logits, labels = output.logits.float(), ship(self.cache.labels[rows], device)
        target = ship(self.cache.logits[rows], device).float()  # (B, C)
        terms = {"hard": (1 - self.soft_weight) * hard_loss(logits, labels, self.offset)}
        if config.soft:
            terms["soft"] = self.soft_weight * soft_loss(logits, target, config.temperature)
        aligned = 0.0
        if config.fal:
            aligned = config.alignment_weight * max(1 - 2 * progress, 0.0) ** 2
            terms["align"] = logits.new_zeros(())
        if not (aligned or config.gan):
            return terms
        student = sentence_features(output.hidden_states[1:], attention_mask)  # (B, K, 3, H)
        teacher = ship(self.cache.features[rows], device).float()  # (B, K, E, H)
        gate, fused = None, (student.mean(2), teacher[:, :, -3:].mean(2))  # (B, K, H) each
        if self.experts and self.mapping:
            gate, fused = self.experts.gate(), (self.mapping(student), self.experts(teacher))
        if aligned:
            terms["align"] = aligned * alignment_loss(student, teacher, gate, fused)
        if config.gan:
            fake, real = (model_outputs(z[:, -1], answer, config.temperature)
                          for z, answer in zip(fused, (logits, target)))  # fmt: skip
            terms["adv"] = self.contest(real, fake, progress)
        return terms

    def contest(self, real: Tensor, fake: Tensor, progress: float) -> Tensor:
        """One step of the discriminator, then what it makes of the student: weighted, ()."""
        self.optimizer.zero_grad()
        (discriminator_loss(self.in_parallel, real, fake) * share(fake)).backward()
        self.optimizer.step()
        ramp = min(max((progress - 0.1) / 0.4, 0.0), 1.0)  # 0 for a tenth, full at half
        weight = self.config.adversarial_weight * ramp
        return weight * adversarial_loss(self.discriminator, fake)


def of_labels(labels: Tensor, classes: int, config: DistillConfig) -> Objective:
    """The objective of labels (n,) alone: the teacher's, and the comparison's."""
    offset = class_offset(labels, classes, config.logit_adjustment)
    offset = offset.to(resolve_device(config.device))  # (C,)

    def objective(
        output: BertOutput, attention_mask: Tensor, rows: Tensor, progress: float
    ) -> dict[str, Tensor]:
        known = ship(labels[rows], output.logits.device)
        return {"hard": hard_loss(output.logits.float(), known, offset)}

    return objective


# --- training and running a model ----------------------------------------------------------------


def train(
    model: Bert, encoded: "data.Encoded", objective: Objective, config: DistillConfig, log: "Log",
    *, epochs: int, lr: float, state: Path | None = None,
) -> None:  # fmt: skip
    """The one training loop; the objective decides whether it fine-tunes or distils.

    objective: (output, attention_mask (B, T), rows (B,), progress) -> named, weighted loss terms.
    state: a file that keeps what a killed run needs to end as if it had not been; begins there.
    Ctrl-C ends it after the step, with its state saved, a second one at once. Raises ValueError
    where a loss or gradient is not finite, before it moves a weight.
    """
    device, (rank, processes), size = resolve_device(config.device), process(), config.batch_size
    maps = getattr(objective, "maps", None)
    optimizer = adamw(model.to(device).train(), lr, config.weight_decay, maps)
    parts = {"model": model, "optimizer": optimizer, **getattr(objective, "stateful", {})}
    drawn = (data.bucketed_batches(encoded.lengths, size, seed=config.seed, epoch=epoch)
             for epoch in range(epochs))  # fmt: skip
    batches = [rows for epoch in drawn for rows in epoch]
    done = log.goes_on(load_state(state, **parts)) if state else 0
    forward, started = in_parallel(model), time.perf_counter()
    broken = torch.zeros((), device=device)  # steps since a loss or gradient was not finite
    with interrupt_held() as interrupted:
        for step, rows in enumerate(batches[done:], done + 1):
            torch.manual_seed(zlib.crc32(f"{config.seed} {rank} {step}".encode()))  # dropout's
            progress = (step - 0.5) / len(batches)  # the middle of the step: no rate is 0
            rows = rows[rank::processes] if len(rows) >= processes else rows
            batch = data.collate(encoded, rows, device)
            with autocast(config):
                output = forward(**batch)
            terms = objective(output, batch["attention_mask"], torch.from_numpy(rows), progress)
            if processes > 1:
                weight = share(output.logits)
                terms = {name: term * weight for name, term in terms.items()}
            rate = lr * schedule(progress, config.warmup)
            norm = update(model, optimizer, terms, rate, config.clip, broken)
            kept = step % config.save_every == 0 or step == len(batches) or bool(interrupted)
            if device.type != "cuda" or kept or step % config.log_every == 0:  # else no waiting
                refuse_not_finite(broken, terms, norm, f"{log.phase} step {step}")
            speed = size * (step - done) / (time.perf_counter() - started)
            log.step(step, len(batches), terms, rate, speed, size)
            if state and kept:
                save_state(state, **parts, step=step, seconds=log.so_far())
            if interrupted:
                raise KeyboardInterrupt
    model.eval()


def update(
    model: Bert, optimizer: torch.optim.Optimizer, terms: dict[str, Tensor], lr: float,
    clip: float, broken: Tensor,
) -> Tensor:  # fmt: skip
    """Moves the weights down the gradient of the terms' sum; returns the gradient's norm, ().

    broken: counts the steps since a loss or gradient was not finite; no such step moves a weight.
    """
    loss = torch.stack([*terms.values()]).sum()
    loss.backward()
    norm = nn.utils.clip_grad_norm_(model.parameters(), clip)
    broken += (broken > 0) | ~(loss + norm).isfinite()
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("times", 1.0)
    optimizer.found_inf = broken.clamp(max=1)  # type: ignore[attr-defined]  # read by its kernel
    optimizer.step()
    optimizer.zero_grad()
    return norm


def refuse_not_finite(broken: Tensor, terms: dict[str, Tensor], norm: Tensor, where: str) -> None:
    """Raises ValueError with the terms of a loss, if one or its gradient was not finite of late."""
    if steps := int(broken):
        shown = " + ".join(f"{name} {term.item():g}" for name, term in terms.items())
        since = f" (and {steps - 1} before it)" if steps > 1 else ""
        told = f"loss or gradient not finite: {shown}, gradient's norm {norm.item():g}"
        rate = "--teacher-lr" if where.startswith("teacher") else "--lr"
        raise ValueError(f"{where}{since}: {told}; start anew: --overwrite and a lower {rate}")


def schedule(progress: float, warmup: float) -> float:
    """Share of the peak learning rate: linear up over `warmup`, then linear down to 0."""
    return progress / warmup if progress < warmup else (1 - progress) / (1 - warmup)


def adamw(
    model: nn.Module, lr: float, weight_decay: float, maps: FeatureMaps | None = None
) -> torch.optim.AdamW:
    """AdamW with decay on matrices only, fused: the default loop takes four times as long.

    maps: learn along, without decay, at a rate of their own: `times` the model's.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    if maps:
        groups += [{"params": [maps.weight], "weight_decay": 0.0, "times": maps.lr / lr}]
    return torch.optim.AdamW(groups, lr=lr, fused=True)


def teacher_pass(
    teacher: Bert, encoded: "data.Encoded", labels: Tensor, blocks: Sequence[Sequence[int]],
    config: DistillConfig, path: Path, log: "Log | None" = None,
) -> TeacherCache:  # fmt: skip
    """Runs the teacher once over all texts, keeps its logits and features, of `layer_map`'s blocks.

    path: the file that backs the features, 2 bytes * n * K * E * H of it; beside it PATH.logits,
    whose mark says of which teacher and texts both are: one process takes them as they are for the
    same again; several of a machine fill it together. Raises OSError where the disk lacks room.
    """
    part, parts = process_here()
    layers = np.array(blocks)  # (K, layers of a block)
    shape = (len(encoded), len(layers), 3 * layers.shape[1], teacher.config.hidden_size)
    mark, beside = checksum(teacher, encoded, layers), Path(f"{path}.logits")
    known = load_state(beside) if path.exists() and not dist.is_initialized() else {}
    if known.get("mark") == mark and path.stat().st_size == 2 * math.prod(shape):
        return TeacherCache(StoredFeatures(path, shape), known["logits"], labels)
    print(f"cache: {path}, {2 * math.prod(shape) / 1e6:.0f} MB for {len(encoded)} texts")
    owner = os.getppid() if parts > 1 else os.getpid()  # one name for all of a machine
    unfinished = path.with_name(f".{path.name}.{owner}.part")
    features = StoredFeatures(unfinished, shape, new=True)
    logits = torch.full((len(encoded), len(teacher.config.labels)), -torch.inf, dtype=torch.float16)
    done, count, started = 0, len(encoded), time.perf_counter()
    for rows, mask, output in run_batches(teacher, encoded, config, part, parts):
        found = sentence_features([output.hidden_states[n] for n in layers.flat], mask)
        features[rows] = found.view(len(rows), *shape[1:]).half().cpu()
        logits[rows] = output.logits.half().cpu()
        done = min(done + len(rows) * parts, count)
        if log and (done == count or log.due(30)):
            log.show(done, count, count - done, done / (time.perf_counter() - started), "texts")
    logits = gather(logits, config)
    if part == 0:
        beside.unlink(missing_ok=True)
        os.replace(unfinished, path)  # whoever has mapped the one before keeps it
        save_state(beside, mark=mark, logits=logits)
    return TeacherCache(features, logits, labels)


# --- a run ---------------------------------------------------------------------------------------


def distill(config: DistillConfig, *, shared: Path | None = None) -> dict[str, Any]:
    """The whole method: teacher, its one pass, experts, pruning, distillation, scores.

    Returns what results.json holds of scores and speeds. Raises ValueError, FileNotFoundError or
    OSError for whatever is wrong with options, data or checkpoints, before training where it can.
    shared: a folder with the teacher, where its pass is kept for other runs: the ablation's.
    """
    run, teacher = start(config, shared)
    config, log, results = run.config, run.log, run.results
    given = bool(config.teacher or shared)
    with log.timed("teacher", "as it was given" if given else "fine-tunes a BERT on the labels"):
        teacher = teach(run, teacher)
        wanted = score(run, "teacher", teacher).double()
    refuse_majority(run)
    with log.timed("cache", "runs the teacher once and keeps its logits and sentence features"):
        cache, mark = ask(run, teacher)
    experts = None
    if config.moe and (config.fal or config.gan):
        with log.timed("experts", "fits experts and gate to the task on the teacher's features"):
            experts = make_experts(cache, config)
            gates = experts.gate().tolist()  # (K, E)
            results["gates"] = [[round(weight, 4) for weight in row] for row in gates]
    keep = start_layers(config, teacher.config.num_hidden_layers)
    with log.timed("pruned", f"the teacher's layers {', '.join(map(str, keep))}, as they are"):
        pruned = prune(teacher.cpu(), keep)
        set_dropout(pruned, 0.0)  # it has no capacity to spare
        del teacher  # frees its memory
        score(run, "pruned", pruned)
    lesson = student_lesson(run, cache, experts)
    with log.timed("student", f"the same, distilled on {len(lesson.texts):,} texts"):
        student = fit(run, "student", pruned, lesson, mark)
        said, spread = score(run, "student", student).double(), run.unit[1]
        results["student"]["distance"] = soft_loss(said / spread, wanted / spread).item()
    if config.baseline:
        with log.timed("baseline", "the same, fine-tuned on the labels alone, for comparison"):
            score(run, "baseline", fit(run, "baseline", pruned, label_lesson(run, config.lr), mark))
    finish(run, student)
    return results


def finetune(config: DistillConfig) -> dict[str, Any]:
    """Fine-tunes a BERT on a task and scores it: the teacher, without a student."""
    run, bert = start(replace(config, transfer="", transfer_ratio=0.0))
    with run.log.timed("teacher", f"fine-tunes a BERT on the {len(run.labels):,} training texts"):
        score(run, "teacher", teach(run, bert))
    finish(run)
    return run.results


class Lesson(NamedTuple):
    """What a model is trained on, by what, how often and how fast."""

    texts: "data.Encoded"
    objective: Objective
    epochs: int
    lr: float


@dataclass
class Run:
    """A run of a command: what was asked for, what it works on, where it writes."""

    config: DistillConfig  # settled
    task: "glue.Task"
    dev: "glue.Examples"
    source: Path  # the BERT or teacher it starts from, with the tokenizer
    tokenizer: "Tokenizer"
    encoded: "data.Encoded"  # the training texts, then the unlabelled ones
    labels: Tensor  # (n,) of the former, class ids or scores in the unit
    unit: tuple[float, float]  # mean and standard deviation of the training scores
    log: "Log"
    out: Path
    shared: Path | None  # the folder of the teacher and the cache of several runs
    results: dict[str, Any] = field(default_factory=dict)  # of results.json, as they come


def start(config: DistillConfig, shared: Path | None = None) -> tuple[Run, Bert]:
    """The run, once all is read and found right, and its teacher or the BERT that becomes it."""
    config, task, train_set, dev = read_task(config, shared)
    torch.manual_seed(config.seed)
    source = checkpoint_folder(str(shared or config.teacher or config.bert), "teacher")
    given, labels = shared or config.teacher, task.labels or ("score",)
    bert = match_labels(load_bert(source), task, source) if given else load_bert(source, labels)
    bert.config = replace(bert.config, sentence_pairs=task.pairs)
    start_layers(config, bert.config.num_hidden_layers)
    tokenizer = load_fitting_tokenizer(source, bert, config)
    unit, out = score_unit(task, train_set.labels), Path(config.out or "out")
    learnt = torch.tensor((train_set.labels - unit[0]) / unit[1]).float()  # (n,)
    words = bert.word_embeddings.weight.detach()
    edits = config.transfer_ratio and distils(config)
    near = data.near_words(tokenizer, words, train_set.texts) if edits else {}
    transfer = gather_transfer(config, task, train_set.texts, near)
    encoded = data.encode(tokenizer, [*train_set.texts, *transfer])
    log = Log(out / "log.jsonl", config.log_every)
    run = Run(config, task, dev, source, tokenizer, encoded, learnt, unit, log, out, shared)
    open_run(run, flags_that_matter(config, train_set) | {"crc of the weights": checksum(bert)})
    print(f"MicroBERT on {task.name}: {len(learnt):,} training texts, {len(dev.texts):,} of dev")
    if bert.fresh:
        print(f"{source}: {', '.join(bert.fresh)} drawn at random, to be fine-tuned")
    for number, (text, label) in enumerate(zip(train_set.texts[:2], train_set.labels), 1):
        tokens = tokenizer.encode(*[text] if isinstance(text, str) else text).tokens
        shown = task.labels[label] if task.labels else f"{label:g}"
        print(f"example {number}: {' '.join(tokens)} -> {shown}")
    return run, bert


def read_task(
    config: DistillConfig, shared: Path | None = None
) -> "tuple[DistillConfig, glue.Task, glue.Examples, glue.Examples]":
    """The settled config, the task, its training examples and those of dev."""
    config = settle(config)
    if config.task == "toy":
        config = toy(config, (shared or Path(config.out or "out")) / "toy")
    task = glue.find_task(config.task, regression=config.regression)
    if not (config.bert or config.teacher or shared):
        needs = "--bert, a pre-trained BERT to fine-tune, or --teacher"
        raise ValueError(f"task {task.name} needs {needs}")
    texts, labels = glue.read(task, config.data_dir, "train")
    dev_splits = [split for split in task.splits if split.startswith("dev")]
    dev, *_ = [glue.read(task, config.data_dir, split) for split in dev_splits]  # MNLI has two
    count = config.limit or len(texts)
    return config, task, glue.Examples(texts[:count], labels[:count]), dev


def settle(config: DistillConfig) -> DistillConfig:
    """The config with a value for whatever it leaves to us, or ValueError for what cannot be."""
    config = replace(config, task=glue.official_name(config.task) or config.task)
    recipe = RECIPES[""] | RECIPES.get(config.task, {})
    if config.limit:  # passes depend on how much there is
        recipe.pop("teacher_epochs", None)
    left = [name for name in recipe if getattr(config, name) == getattr(DistillConfig, name)]
    config = replace(config, **{name: recipe[name] for name in left})
    device = resolve_device(config.device)
    if device.index:  # what names no GPU means this one
        torch.cuda.set_device(device)
    if config.precision == "auto":  # to answer, fp32
        fast = not config.checkpoint and has_fast_bf16(device)
        config = replace(config, precision="bf16" if fast else "fp32")
    if config.transfer and not Path(config.transfer).is_file():
        raise FileNotFoundError(f"--transfer {config.transfer}: no such file (--transfer-ratio?)")
    return config


def toy(config: DistillConfig, folder: Path) -> DistillConfig:
    """The built-in task as a folder of own data with a small pre-trained BERT; the config for it.

    As a real BERT does, this one knows more than the task's few labels can teach: it has learnt
    from 8,000 other verdicts, and its classifier is thrown away. It is the same for every seed.
    """
    for name, content in data.toy_files().items():
        write_file(folder / name, content.encode())
    barrier()
    if not (config.bert or config.teacher or (folder / "config.json").exists()):
        texts, labels = data.toy_examples("pretraining")
        encoded, plain = data.encode(data.load_tokenizer(folder), texts), replace(config, seed=0)
        objective = of_labels(torch.from_numpy(labels).float(), 2, plain)
        torch.manual_seed(0)
        words = len(data.toy_vocabulary())
        bert = Bert(
            BertConfig(words, 64, 4, 4, 256, max_position_embeddings=128, initializer_range=0.05)
        )
        log = Log(None, 10**9)
        with log.timed("pretrain", f"the built-in task's BERT, once, into {folder}"):
            set_dropout(bert, 0.0)  # with it the rule is found late or never
            train(bert, encoded, objective, plain, log, epochs=8, lr=5e-4)
        save_bert(bert, folder)
    barrier()
    given = "" if config.teacher else config.bert or str(folder)
    transfer = config.transfer or str(folder / "unlabelled.txt") * (config.transfer_ratio > 0)
    return replace(config, task=str(folder), data_dir=str(folder), bert=given, transfer=transfer)


def start_layers(config: DistillConfig, teacher_layers: int) -> tuple[int, ...]:
    """The teacher's layers that the student of this config keeps, from 1; ValueError as `prune`."""
    if not config.keep_layers:
        return kept_layers(teacher_layers, config.layers or max(1, teacher_layers // 2))
    keep = [int(word) if word.isdecimal() else 0 for word in config.keep_layers.split(",")]
    if keep != sorted({*keep} & {*range(1, teacher_layers + 1)}):
        expected = f"rising numbers, 1 to {teacher_layers}, such as 2,4,6"
        raise ValueError(f"--keep-layers is '{config.keep_layers}', expected {expected}")
    return tuple(keep)


def score_unit(task: "glue.Task", labels: Any) -> tuple[float, float]:
    """Mean and standard deviation of the training scores, the unit they are learnt in: OURS(11).

    Losses weigh alike whatever the scale of the scores. Classes have 0 and 1. Raises ValueError
    where float32, which models speak, could not tell the scores apart.
    """
    with np.errstate(over="ignore"):
        center, spread = float(labels.mean()), float(labels.std())
    if task.regression and not max(1e-5 * abs(center), 1e-30) < spread < 1e30:
        told = f"training scores of mean {center:g} and standard deviation {spread:g}"
        wrong = "too much alike, too small or too large for float32; subtract a constant or rescale"
        raise ValueError(f"{task.name}: {told}: {wrong}")
    return (center, spread) if task.regression else (0.0, 1.0)


@torch.no_grad()
def rescale(model: Bert, spread: float, center: float) -> None:
    """Turns the model's score s into spread * s + center, by its classifier; classes stay."""
    if len(model.config.labels) == 1:
        model.classifier.weight.mul_(spread)
        model.classifier.bias.mul_(spread).add_(center)


def gather_transfer(
    config: DistillConfig, task: "glue.Task", train_texts: Sequence[Any], near: "data.Near"
) -> list[Any]:
    """Unlabelled texts to distil on, OURS(10): own perturbed, other tasks'; none of dev or test."""
    if config.transfer and not distils(config):
        print(f"note: nothing is distilled, so {config.transfer} is not used", file=sys.stderr)
    if not (config.transfer_ratio and distils(config)):
        return []
    lines = [*data.read_lines(Path(config.transfer))] if config.transfer else []
    for where, text in lines:
        if isinstance(text, ValueError):
            raise ValueError(f"{where}: {text}")
    given, known = [text for _, text in lines if "".join(text).strip()], len(train_texts)
    count = round(config.transfer_ratio * known)
    if config.transfer_ratio < 0:
        count = max(min(7 * known, 100_000 - known), len(given))
    beside = glue.text_beside(task, config.data_dir)
    texts, left_out = data.transfer_texts(train_texts, *beside, count, config.seed, given, near)
    some = f"{min(count, len(given)):,} of {len(given):,} texts of {config.transfer}"
    first = f" ({some} before all others)" if given else ""
    if odd := sum(isinstance(text, tuple) != task.pairs for text in given):
        forms = ("pairs, read as two texts each", "single ones, each read as half of a pair")
        print(f"note: of {config.transfer} {odd:,} are {forms[task.pairs]}", file=sys.stderr)
    told = f"{left_out} left out for occurring in dev or test"
    print(f"transfer text: {len(texts)} unlabelled{first}, {told}")
    return texts


def distils(config: DistillConfig) -> bool:
    """Whether a student learns anything from its teacher."""
    return config.soft or config.fal or config.gan


def teach(run: Run, bert: Bert) -> Bert:
    """The teacher, fine-tuned or as it was given, in OUT/teacher unless it is shared."""
    folder = run.out / "teacher"
    if run.config.teacher and not run.shared and run.source.resolve() != folder.resolve():
        save_bert(bert, folder, tokenizer_from=run.source)
    if run.config.teacher or run.shared:
        return bert
    lesson = label_lesson(run, run.config.teacher_lr)
    return fit(run, "teacher", bert, lesson, checksum(bert, lesson.texts, run.labels))


def label_lesson(run: Run, lr: float) -> Lesson:
    """Fine-tuning on the labels: the teacher's, and the student's that it is compared with."""
    config, texts = run.config, run.encoded.first(len(run.labels))
    epochs = config.teacher_epochs or auto_epochs(len(texts), config.batch_size, least=2)
    return Lesson(texts, of_labels(run.labels, max(1, len(run.task.labels)), config), epochs, lr)


def student_lesson(run: Run, cache: TeacherCache, experts: SentenceExperts | None) -> Lesson:
    """What the student learns from its teacher, or, if nothing, from the labels."""
    config = run.config
    if not distils(config):
        labels = label_lesson(run, config.lr)
        return labels._replace(epochs=config.epochs or labels.epochs)
    epochs = config.epochs or auto_epochs(len(run.encoded), config.batch_size, least=1)
    return Lesson(run.encoded, Distillation(cache, experts, config), epochs, config.lr)


def auto_epochs(examples: int, batch_size: int, least: int) -> int:
    """Passes that show 24,000 examples, `least` to 10, or make 200 steps: OURS(9)."""
    steps = math.ceil(examples / batch_size)
    return max(min(max(math.ceil(24_000 / examples), least), 10), math.ceil(200 / steps))


def ask(run: Run, teacher: Bert) -> tuple[TeacherCache, int]:
    """What the teacher says of all texts in its one pass (in `score_unit`s), and a mark of both."""
    config, (center, spread) = run.config, run.unit
    labels = torch.full((len(run.encoded),), torch.nan)  # of transfer text
    labels[: len(run.labels)] = run.labels
    rescale(teacher, 1 / spread, -center / spread)
    depth = teacher.config.num_hidden_layers
    layers = layer_map(depth, len(start_layers(config, depth)))
    mark = checksum(teacher, run.encoded, labels)
    name = f"cache{os.environ.get('GROUP_RANK', '')}-{mark:08x}-{len(layers)}.f16"
    path = (run.shared or run.out) / name
    return teacher_pass(teacher, run.encoded, labels, layers, config, path, run.log), mark


def make_experts(cache: TeacherCache, config: DistillConfig) -> SentenceExperts:
    """Experts and gate fitted on the teacher's cache; prints what the gates came to."""
    _, matched, views, hidden = cache.features.shape
    torch.manual_seed(config.seed)
    classes, block = cache.logits.shape[1], views // 3
    experts = SentenceExperts(matched, hidden, config.expert_size, classes, block)
    experts, tau = experts.to(resolve_device(config.device)), config.logit_adjustment
    given: dict[str, Any] = {"temperature": config.temperature, "logit_adjustment": tau}
    fit_experts(experts, *cache, seed=config.seed, **given)
    for layer, weights in enumerate(experts.gate().view(matched, block, 3).tolist(), 1):
        shown = ", ".join(" ".join(f"{weight:.2f}" for weight in views) for views in weights)
        print(f"gate of student layer {layer}: cls max mean of each teacher layer {shown}")
    return experts


def fit(run: Run, name: str, model: Bert, lesson: Lesson, mark: int) -> Bert:
    """OUT/NAME: a copy of the model, trained, or what a killed run had finished.

    What is returned was read back from the disk, so that a run that continues goes on with the
    very same numbers. mark: of all that the training begins with; a state of other is not used.
    """
    folder, config, (center, spread) = run.out / name, run.config, run.unit
    texts, objective, epochs, lr = lesson
    run.results[name] = {"updates": epochs * math.ceil(len(texts) / config.batch_size)}
    state = run.out / f"{name}-{mark:08x}.state"
    if (folder / "config.json").exists():
        run.log.seconds |= load_state(state).get("seconds", {})
    else:
        model = copy.deepcopy(model)
        with only_seen_words(model, texts) as seen:
            train(model, seen, objective, config, run.log, epochs=epochs, lr=lr, state=state)
        rescale(model, spread, center)
        save_bert(model, folder, tokenizer_from=run.source)
    barrier()
    return load_bert(folder)


def set_dropout(model: Bert, rate: float) -> None:
    """Another dropout of layers and classifier for the training to come; embeddings keep theirs."""
    for module in (model, *model.layers):
        module.head_dropout = module.attention_dropout = module.hidden_dropout = rate


@torch.no_grad()
def run_batches(
    model: Bert, encoded: "data.Encoded", config: DistillConfig, part: int, parts: int
) -> Iterator[tuple[Tensor, Tensor, BertOutput]]:
    """Rows (B,), attention_mask (B, T), output of every parts-th batch, sorted by length."""
    device = resolve_device(config.device)
    model.to(device).eval()
    room = 2048 if device.type == "cpu" else 32_768  # tokens: caches are small
    for rows in islice(data.sorted_batches(encoded.lengths, room), part, None, parts):
        batch = data.collate(encoded, rows, device)
        with autocast(config):
            output = model(**batch)
        yield torch.from_numpy(rows), batch["attention_mask"], output


def predict_logits(model: Bert, encoded: "data.Encoded", config: DistillConfig) -> Tensor:
    """Logits of every text in the order given, (n, C) fp32 on the CPU; ValueError if not finite."""
    logits = torch.full((len(encoded), len(model.config.labels)), -torch.inf)
    for rows, _, output in run_batches(model, encoded, config, *process()):
        logits[rows] = output.logits.float().cpu()
    logits = gather(logits, config)
    if not logits.isfinite().all():
        raise ValueError("the model answers with numbers that are not finite: damaged weights?")
    return logits


def score(run: Run, name: str, model: Bert) -> Tensor:
    """Puts size and scores on dev, in fp32, among the results; returns the logits there, (n, C)."""
    config = replace(run.config, precision="fp32")
    found, logits = score_model(model, run.tokenizer, run.task, config, run.log)
    run.results[name] = found | run.results.get(name, {})
    return logits


def score_model(
    model: Bert, tokenizer: "Tokenizer", task: "glue.Task", config: DistillConfig, log: "Log",
    *, classes: bool = False,
) -> tuple[dict[str, Any], Tensor]:  # fmt: skip
    """Size and metrics of --split; MNLI's mismatched ones under their own name. Logits (n, C).

    classes: those of each class, too, where there are more than two.
    """
    splits = [name for name in task.splits if f"{name}_".startswith(f"{config.split}_")]
    if not splits:
        raise ValueError(f"{task.name} has no split {config.split} to score; use predict")
    count, said = sum(parameter.numel() for parameter in model.parameters()), []
    found: dict[str, Any] = {"layers": model.config.num_hidden_layers, "parameters": count}
    found["megabytes"] = round(4e-6 * count, 1)
    for split in splits:
        texts, labels = glue.read(task, config.data_dir, split)
        if labels is None:
            raise ValueError(f"{task.name} {split} has no labels to score against; use predict")
        said.append(predict_logits(model, data.encode(tokenizer, texts), config))
        metrics: dict[str, Any] = glue.score(task, labels, answers(said[-1]))
        table = [f"{log.phase} | {task.name} {split} n={len(texts)} | {in_words(metrics)}"]
        if classes and len(task.labels) > 2:
            metrics["classes"] = glue.class_scores(task, labels, answers(said[-1]))
            table += [f"  {n}: {in_words(row)}" for n, row in metrics["classes"].items()]
        found |= metrics if split == splits[0] else {split: metrics}
        print(*table, sep="\n", file=sys.stderr if config.json else sys.stdout)
        log.write(split=split, n=len(texts), **metrics)
    return found, said[0]


def in_words(scores: dict[str, Any]) -> str:
    """Names and numbers on one line."""
    return " ".join(
        f"{k} {v:.2f}" if isinstance(v, float) else f"{k} {v}" for k, v in scores.items()
    )


def answers(logits: Tensor) -> np.ndarray:
    """Class ids, or scores where C = 1: (n, C) -> (n,)"""
    return (logits[:, 0] if logits.shape[1] == 1 else logits.argmax(1)).numpy()


def refuse_majority(run: Run) -> None:
    """Stops a run whose teacher knows no more than the most frequent label (or a constant)."""
    reached, labels = run.results["teacher"]["score"], run.dev.labels
    constant = labels.mean() if run.task.regression else np.bincount(labels).argmax()
    majority = glue.score(run.task, labels, np.full(len(labels), constant))["score"]
    if reached <= majority and not run.config.force:
        told = f"the teacher scores {reached:.2f} on {run.task.name} dev, the most frequent label"
        how = "--overwrite with --logit-adjustment 1 helps where a class is rare, --teacher-epochs"
        how += " where it learnt too little; --force insists"
        raise ValueError(f"{told} alone {majority:.2f}: nothing to distil. {how}")


def finish(run: Run, student: Bert | None = None) -> None:
    """Speeds of teacher and student, results.json, the closing table: the run is finished."""
    config, results = run.config, run.results
    if student:
        teacher = load_bert((run.shared or run.out) / "teacher")
        speeds = examples_per_second([teacher, student], run)
        rates = results["examples_per_second"] = dict(zip(("teacher", "student"), speeds))
        reached = results["teacher"]["score"]
        results["retention"] = results["student"]["score"] / reached if reached else None
    modules = {name: sys.modules[name].__version__ for name in ("torch", "tokenizers", "numpy")}
    stored = {
        "task": run.task.name,
        "metric": "mean of " * (len(run.task.metrics) > 1) + " and ".join(run.task.metrics),
        "seed": config.seed,
        **results,
        "seconds": {name: round(seconds, 2) for name, seconds in run.log.seconds.items()},
        "config": {name: getattr(config, name) for name in options_of("distill")},
        "versions": {"microbert": __version__, "python": platform.python_version(), **modules},
    }
    write_file(run.out / "results.json", (json.dumps(stored, indent=2) + "\n").encode())
    sweep(run.out)
    if student:
        print("\n                 layers   parameters  updates  examples/s  dev score  of teacher")
        called = {"teacher": "teacher", "pruned": "pruned", "baseline": "fine-tuned only"}
        for name, title in (called | {"student": "MicroBERT"}).items():
            if row := results.get(name):
                share = f"{100 * row['score'] / reached:.1f} %" if reached else "-"
                size = f"{row['layers']:8}{row['parameters']:13,}{row.get('updates', 0):9,}"
                rate = f"{rates.get(name, rates['student']):12,.0f}"
                print(f"{title:15}{size}{rate}{row['score']:11.2f}{share:>12}")
        if results["student"]["score"] < results.get("baseline", results["student"])["score"]:
            print("note: here the labels alone teach the student more than its teacher does")
        text = min(run.dev.texts, key=lambda text: len(str(text)))
        words = ["predict", str(run.out), *([text] if isinstance(text, str) else text)]
    else:
        words = ["--task", config.task, *["--regression"] * config.regression]
        words += ["--data-dir", config.data_dir] if not run.task.folder else []
        words += ["--teacher", str(run.out), "--out", f"{run.out}-student"]
    print(f"\nnext: python microbert.py {shlex.join(words)}")


def examples_per_second(models: Sequence[Bert], run: Run) -> list[float]:
    """Texts of dev that each answers in a second, in fp32, the best of three alternating rounds."""
    config, best = replace(run.config, precision="fp32"), [0.0] * len(models)
    encoded = data.encode(run.tokenizer, run.dev.texts[:128])
    for i in [*range(len(models))] * 3:
        started = time.perf_counter()
        predict_logits(models[i], encoded, config)
        best[i] = max(best[i], len(encoded) / (time.perf_counter() - started))
    return best


# --- comparing: the ablation ---------------------------------------------------------------------

# Rows that switch off more than one thing, as options of distil without their dashes.
_ROWS = {"full": "", "no-transfer": "transfer-ratio=0",
         "labels-only": "no-moe+no-fal+no-gan+no-soft+epochs=0"}  # fmt: skip


def ablate(config: DistillConfig) -> dict[str, Any]:
    """Trains students with parts of the method switched off, over several seeds, and compares them.

    OUT/seed-S is a run of `finetune`, the teacher; OUT/seed-S/ROW one of `distill`, from that
    teacher and its one pass. The same command goes on where it was killed; with other --rows or
    --seeds it adds them. Returns the runs, and the table of their means.
    """
    out = Path(config.out or "out")
    rows = {row: row_config(config, row) for row in re.split(r"[\s,]+(?=[a-z])", config.rows)}
    teachers = []
    for seed in dict.fromkeys(map(int, config.seeds.split(","))):
        teacher, home = config.teacher.replace("{seed}", str(seed)), str(out / f"seed-{seed}")
        teachers.append(replace(config, seed=seed, teacher=teacher, out=home, baseline=False))
    open_ablation(config, rows, teachers[0])
    asked = [Path(own.out) / row / "results.json" for own in teachers for row in rows]
    if config.overwrite and all(path.exists() for path in asked):
        for path in asked:  # where some are not, a command with --overwrite goes on
            path.unlink()
    for own in teachers:
        folder = Path(own.out)
        if not (folder / "results.json").exists():
            finetune(own)
        for row in (row for row in rows if not (folder / row / "results.json").exists()):
            print(f"\n=== {row}, seed {own.seed}")
            mine = replace(rows[row], seed=own.seed, teacher=own.teacher, baseline=False)
            distill(replace(mine, out=str(folder / row)), shared=folder)
        sweep(folder)
    return print_ablation(ablation_report(out))


def open_ablation(
    config: DistillConfig, rows: dict[str, DistillConfig], own: DistillConfig
) -> None:
    """Refuses wrong rows, and runs of other flags unless --overwrite; makes OUT this ablation's."""
    out = Path(config.out or "out")
    own, _, train_set, _ = read_task(own)
    source = checkpoint_folder(own.teacher or own.bert, "teacher")
    depth = load_config(source / "config.json", head=False).num_hidden_layers
    for asked in rows.values():
        start_layers(settle(asked), depth)
    flags = flags_that_matter(own, train_set)
    flags |= {n: getattr(config, n) for n in ("task", "data_dir", "bert", "teacher", "seed")}
    flags["crc of the weights"] = checksum(*(t.float() for t in read_weights(source)[1].values()))
    if not same_flags(out, flags, config.overwrite) and config.overwrite:
        for path in (*out.glob("seed-*/results.json"), *out.glob("seed-*/*/results.json")):
            path.unlink()
    write_file(out / "run.json", json.dumps(flags, indent=1).encode())


def row_config(config: DistillConfig, row: str) -> DistillConfig:
    """What a row asks of its student: names of _ROWS, switches, option=value, joined by '+'."""
    given = sorted(row.split("+"), key=lambda part: "=" in part)  # a value that is given wins
    words = []
    for part in filter(None, "+".join(_ROWS.get(part, part) for part in given).split("+")):
        name, _, value = part.replace("_", "-").partition("=")
        if isinstance(getattr(DistillConfig, name.replace("-", "_"), None), bool):
            name, value = {"0": (f"no-{name}", ""), "1": (name, "")}.get(value, (name, value))
        words.append(f"--{name}={value}" if value else f"--{name}")
    if re.search(r"(^|\+)(keep.)?layers=", row):  # in place of the others'
        config = replace(config, layers=0, keep_layers="")
    chosen, unknown = parser("row").parse_known_args(words, argparse.Namespace(**vars(config)))
    if unknown or not row or "/" in row:
        names = ", ".join([*_ROWS, "no-moe", "no-fal", "gan", "no-soft"])
        wrong = unknown[0].strip("-") if unknown else row
        raise ValueError(f"--rows: no '{wrong}' ({names}, or option=value, such as layers=2)")
    if not chosen.transfer_ratio:  # a row without transfer text
        chosen.transfer = ""
    return DistillConfig(**vars(chosen))


def ablation_report(out: Path) -> dict[str, Any]:
    """What an ablation's runs got; of each row n seeds, mean and sd (None for one) of it."""
    runs, table, about = [], [], {}
    for file in sorted(out.glob("seed-*/**/results.json"), key=lambda p: p.stat().st_mtime_ns):
        with naming(file):
            stored = json.loads(file.read_text(encoding="utf-8"))
            about = {"task": stored["task"], "metric": stored["metric"]}
            run = {"row": "teacher", "seed": stored["seed"], **stored["teacher"]}
            run |= {"seconds": stored["seconds"]["teacher"]}
            if file.parent.parent != out:
                speeds, seconds = stored["examples_per_second"], stored["seconds"]["student"]
                run |= {"row": file.parent.name, "retention": stored["retention"]}
                run |= {"speed_up": speeds["student"] / speeds["teacher"], "seconds": seconds}
                run |= stored["student"]
            runs.append(run)
    for row in dict.fromkeys(run["row"] for run in runs):
        own = [run for run in runs if run["row"] == row]
        line: dict[str, Any] = {"row": row, "n": len(own)}
        for name in ("score", "retention", "distance", "speed_up", "updates", "seconds"):
            if found := [run[name] for run in own if run.get(name) is not None]:
                line[name] = statistics.fmean(found)
                line[f"{name}_sd"] = statistics.stdev(found) if len(found) > 1 else None
        table.append(line)
    return about | {"table": table, "runs": runs}


def print_ablation(report: dict[str, Any]) -> dict[str, Any]:
    """The table of an ablation: mean +- standard deviation over the seeds. Returns the report."""
    width = max(len(line["row"]) for line in report["table"])
    print(f"\n{report['task']} dev, {report['metric']}, mean +- sd over n seeds")
    print(f"{'':{width}}   n           score    of teacher, %   distance   speed-up  updates")
    for line in report["table"]:
        cells = []
        for name, unit in (("score", 1), ("retention", 100)):
            sd, mean = line.get(f"{name}_sd"), line.get(name)
            cells.append("-" if mean is None else f"{unit * mean:.2f}")
            cells[-1] += "" if sd is None else f" +- {unit * sd:.2f}"
        more = ""
        if "speed_up" in line:
            more = f"{line['distance']:11.4f}{line['speed_up']:11.2f}{line['updates']:9,.0f}"
        print(f"{line['row']:{width}}{line['n']:4}{cells[0]:>16}{cells[1]:>17}{more}")
    return report


# --- answering -----------------------------------------------------------------------------------


def load_trained(config: DistillConfig) -> "tuple[Bert, Tokenizer, glue.Task | None]":
    """The checkpoint of evaluate and predict, its tokenizer and the task, if one is named."""
    folder = checkpoint_folder(config.checkpoint, "student")
    model = load_bert(folder)
    task = glue.find_task(config.task, labels=model.config.labels) if config.task else None
    match_labels(model, task, folder)
    return model, load_fitting_tokenizer(folder, model, config), task


def evaluate(config: DistillConfig) -> dict[str, Any]:
    """Scores a checkpoint on a task's dev split, or on --split, and returns the scores."""
    config = settle(config)
    if config.task == "toy":  # where the checkpoint's run has written it
        config = replace(config, task=str(Path(config.checkpoint) / "toy"))
    model, tokenizer, task = load_trained(config)
    assert task
    found, _ = score_model(model, tokenizer, task, config, Log(None), classes=True)
    if config.json:
        print(json.dumps(found))
    return found


def predict(config: DistillConfig) -> None:
    """Predicts a text, a --file or standard input line by line; with --task, a split of the task.

    Of a text `label<TAB>probability` or the score, of a split `index<TAB>prediction` as GLUE wants.
    """
    config, heading = settle(config), "index\tprediction" if config.task else ""
    if sum(map(bool, (config.text, config.file, config.task))) > 1:
        raise ValueError("a text, --file and --task exclude each other")
    if config.split != "dev" and not config.task:
        raise ValueError("--split needs --task, whose split it is")
    if (count := len(config.text)) > 2:
        raise ValueError(f"{count} texts, expected one or the two of a pair, quoted")
    held = Path(config.out).read_bytes() if Path(config.out).is_file() else b""
    if held and not (heading and held.startswith(heading.encode())):
        raise ValueError(f"{config.out} is there already, and holds no predictions; name another")
    model, tokenizer, task = load_trained(config)
    refused: list[str] = []
    lines = answer_lines(model, tokenizer, config, refused)
    if task:
        texts = glue.read(task, config.data_dir, config.split, with_labels=False).texts
        logits = predict_logits(model, data.encode(tokenizer, texts), config)
        rows = enumerate(glue.values(task, answers(logits)))
        lines = iter([heading, *(f"{index}\t{value}" for index, value in rows)])
    if config.out:
        write_file(config.out, *(f"{line}\n".encode() for line in lines))
        print(f"answers of {config.checkpoint} in {config.out}", file=sys.stderr)
    for line in lines:
        print(line, flush=True)
    if refused:
        raise ValueError(f"{len(refused)} lines without an answer, the first at {refused[0]}")


def fit_or_error(text: Any, pairs: bool | None) -> Any:
    """The text, or an error where it is a pair and the model learnt from single ones, or so."""
    if isinstance(text, ValueError) or pairs in (None, isinstance(text, tuple)):
        return text
    told = ("two texts", "single ones") if isinstance(text, tuple) else ("one text", "pairs")
    return ValueError(f"{told[0]}, for a model that was trained on {told[1]}")


def answer_lines(
    model: Bert, tokenizer: "Tokenizer", config: DistillConfig, refused: list[str]
) -> Iterator[str]:
    """A line for every text given, empty for one told on stderr and put among `refused`."""
    typed, labels = not (config.text or config.file) and sys.stdin.isatty(), model.config.labels
    if typed:
        print("note: reads texts, one a line; Ctrl-D ends", file=sys.stderr)
    given = data.read_lines(Path(config.file) if config.file else None)
    if config.text:
        given = iter([("text", config.text[0] if len(config.text) == 1 else tuple(config.text))])
    given = ((where, fit_or_error(text, model.config.sentence_pairs)) for where, text in given)
    while some := list(islice(given, 1 if typed else 512)):
        texts = [text for _, text in some if not isinstance(text, ValueError)]
        logits = iter(predict_logits(model, data.encode(tokenizer, texts), config))
        for where, text in some:
            if isinstance(text, ValueError):
                if config.text:
                    raise text
                print(f"{where}: {text}", file=sys.stderr)
                refused.append(where)
                yield json.dumps({"error": str(text)}) if config.json else ""
            elif len(labels) == 1:
                score = next(logits).item()
                yield json.dumps({"score": score}) if config.json else f"{score:.4f}"
            else:
                shares = dict(zip(labels, next(logits).softmax(-1).tolist()))
                label = max(shares, key=lambda name: shares[name])
                found = json.dumps({"label": label, "probabilities": shares})
                yield found if config.json else f"{label}\t{shares[label]:.4f}"


# --- checkpoints ---------------------------------------------------------------------------------

_NAMES = {  # module of ours -> of Hugging Face
    "word_embeddings": "bert.embeddings.word_embeddings",
    "position_embeddings": "bert.embeddings.position_embeddings",
    "token_type_embeddings": "bert.embeddings.token_type_embeddings",
    "embeddings_norm": "bert.embeddings.LayerNorm",
    "query": "attention.self.query", "key": "attention.self.key", "value": "attention.self.value",
    "attention_output": "attention.output.dense", "attention_norm": "attention.output.LayerNorm",
    "intermediate": "intermediate.dense", "output": "output.dense",
    "output_norm": "output.LayerNorm", "pooler": "bert.pooler.dense", "classifier": "classifier",
}  # fmt: skip
_IMPLEMENTED: dict[str, tuple[Any, ...]] = {  # of config.json's keys that BertConfig has not
    "model_type": ("bert",), "hidden_act": ("gelu", "gelu_python"), "is_decoder": (False, None),
    "position_embedding_type": ("absolute", None), "add_cross_attention": (False, None),
    "problem_type": ("single_label_classification", "regression", None),
}  # fmt: skip
_OTHER_FORMS = {  # what a folder may be that has not the files of a checkpoint
    "*.index.json": "weights in shards; save_pretrained(DIR, max_shard_size='100GB') joins them",
    "*.h5": "TensorFlow's weights, expected PyTorch's",
    "*.ckpt*": "TensorFlow's weights, expected PyTorch's",
    "*.msgpack": "Flax's weights, expected PyTorch's",
    "adapter_config.json": "an adapter; merge it into the model it belongs to",
    "checkpoint-*": "a folder of transformers' Trainer; name one of the checkpoints in it",
    "*/config.json": "a checkpoint in a folder below; name that",
}
_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


def theirs(name: str) -> str:
    """Hugging Face's name of a tensor of ours; loading and saving go through this one table."""
    *layer, module, kind = name.split(".")
    prefix = f"bert.encoder.layer.{layer[1]}." if layer else ""
    return f"{prefix}{_NAMES[module]}.{kind}"


def load_config(path: str | Path, *, head: bool = True) -> BertConfig:
    """Reads config.json. Raises ValueError naming what is not a BERT this file implements.

    head: False where the classifier is to be a new one, so that what is said of it does not matter.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; a checkpoint folder has a config.json")
    with naming(path):
        stored = {**json.loads(path.read_text(encoding="utf-8"))}
        for key, implemented in _IMPLEMENTED.items():
            matters = head or key != "problem_type"
            if matters and stored.get(key, implemented[0]) not in implemented:
                raise ValueError(f"{key} {stored[key]!r}, implemented: {implemented[0]!r}")
        given, count = (stored.get("id2label"), stored.get("num_labels", 2)) if head else (None, 2)
        unnamed = {i: f"LABEL_{i}" for i in range(min(count, 2**10 + 1))}
        names = {int(i): str(name) for i, name in (given or unnamed).items()}
        if sorted(names) != list(range(len(names))):
            raise ValueError(f"id2label has the ids {sorted(names)}, expected 0, 1, ...")
        stored["labels"] = tuple(names[i] for i in range(len(names)))
        return BertConfig(
            **{f.name: stored[f.name] for f in fields(BertConfig) if f.name in stored}
        )


def load_bert(path: str | Path, labels: Sequence[str] | None = None) -> Bert:
    """A BERT from a folder in Hugging Face's layout, in eval mode and fp32.

    labels: of a new classifier, in place of all heads there are. A part that is missing (pooler,
    classifier) is drawn at random, named in `.fresh` and, unless asked for, warned of.
    Raises FileNotFoundError, or ValueError naming the tensors that do not fit.
    """
    config = load_config(Path(path) / "config.json", head=labels is None)
    source, stored = read_weights(Path(path), head=labels is None)
    config = config if labels is None else replace(config, labels=tuple(labels))
    model = bert_without_weights(config)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    parts = {name.rsplit(".", 1)[0] for name in stored}
    fresh = [part for part in ("pooler", "classifier") if _NAMES[part] not in parts]
    wanted = {theirs(n): shape for n, shape in shapes.items() if n.split(".")[0] not in fresh}
    found = {n: tuple(t.shape) if t.is_floating_point() else t.dtype for n, t in stored.items()}
    if wrong := [n for n in wanted | found if wanted.get(n) != found.get(n)]:
        told = "; ".join(f"{n!r} is {found.get(n)}, expected {wanted.get(n)}" for n in wrong[:8])
        raise ValueError(f"{source}: {len(wrong)} faults, config.json says otherwise: {told}")
    state = {n: stored[theirs(n)].float().contiguous() for n in shapes if theirs(n) in wanted}
    for name in (name for name in shapes if name not in state):
        state[name] = torch.randn(shapes[name]) * config.initializer_range * ("weight" in name)
    model.load_state_dict(state, assign=True)
    model.fresh = tuple(fresh)
    if set(fresh) - ({"classifier"} if labels is not None else set()):
        warnings.warn(f"{source}: no {' and '.join(fresh)} in it, drawn at random", stacklevel=2)
    return model.eval()


def read_weights(folder: Path, *, head: bool = True) -> tuple[Path, dict[str, Tensor]]:
    """The weights file of a folder and its tensors under Hugging Face's present names.

    Names with or without `bert.`, and `LayerNorm.gamma`/`beta` are understood, the heads of
    pre-training (`cls.*`) left out, without `head` all heads.
    """
    path = folder / "model.safetensors"
    path = path if path.is_file() else folder / "pytorch_model.bin"
    if not path.is_file():
        told = f"neither model.safetensors nor pytorch_model.bin in it{other_form(folder)}"
        raise FileNotFoundError(f"{folder}: {told}")
    tensors = read_safetensors(path) if path.suffix == ".safetensors" else read_pickle(path)
    stored: dict[str, Tensor] = {}
    with naming(path):
        for name, tensor in tensors.items():
            if not isinstance(tensor, Tensor) or tensor.is_meta or tensor.is_sparse:
                raise ValueError(f"{name!r} is no dense tensor")
            name = re.sub(r"LayerNorm\.gamma$", "LayerNorm.weight", name)
            name = re.sub(r"LayerNorm\.beta$", "LayerNorm.bias", name)
            name = re.sub(r"^(?=embeddings\.|encoder\.|pooler\.)", "bert.", name)
            if name in stored:
                raise ValueError(f"tensor '{name}' twice, under an old and a new name")
            if not (name.startswith("cls.") or name.endswith(".position_ids")):
                stored[name] = tensor
    heads = {name.split(".")[0] for name in stored} - {"bert", "classifier"}
    if heads and not head:
        print(f"note: {path}: skips {', '.join(sorted(heads))}, other heads", file=sys.stderr)
    return path, {n: t for n, t in stored.items() if head or n.startswith("bert.")}


def other_form(folder: Path) -> str:
    """What a folder is that is no checkpoint, '' if it cannot be told."""
    for pattern, form in _OTHER_FORMS.items():
        if found := sorted(folder.glob(pattern)):
            return f"; {found[0].relative_to(folder)}: {form}"
    return ""


def read_pickle(path: Path) -> Any:
    """What torch.save wrote, of tensors and plain values alone: nothing in it is executed."""
    with naming(path):
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except Exception:  # some of whose words advise to execute what is in it
            raise ValueError("damaged, or not a file of plain tensors") from None


def read_safetensors(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors file: 8 bytes of header size, a JSON header, the numbers.

    https://huggingface.co/docs/safetensors: nothing in the file is trusted. Raises ValueError for
    anything that is not a header of known dtypes whose ranges fill the rest of the file.
    """
    tensors: dict[str, Tensor] = {}
    with naming(path), open(path, "rb") as file:
        left, size = os.fstat(file.fileno()).st_size - 8, int.from_bytes(file.read(8), "little")
        if not 0 < size <= left:
            raise ValueError(f"header of {size} bytes in a file of {left + 8}; cut short?")
        header = json.loads(file.read(size))
        header.pop("__metadata__", None)
        for name, entry in header.items():
            (first, end), shape = entry["data_offsets"], entry["shape"]
            sizes = [first, end - first, len(shape), *shape]
            if not all(type(n) is int and 0 <= n < 2**48 for n in sizes) or len(shape) > 8:
                raise ValueError(f"tensor {name!r} is given as {str(entry)[:120]}")
            file.seek(8 + size + first)
            block = torch.from_numpy(np.frombuffer(bytearray(file.read(end - first)), np.uint8))
            tensors[name] = block.view(_DTYPES[entry["dtype"]]).view(shape)
            left -= end - first
        if left != size:
            raise ValueError("its tensors do not fill it; cut short?")
    return tensors


def write_safetensors(path: str | Path, tensors: dict[str, Tensor]) -> None:
    """Writes fp32 tensors as read_safetensors reads them, the header padded to 8 bytes."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    blocks, end = [], 0
    for name, tensor in tensors.items():
        blocks.append(tensor.detach().float().cpu().contiguous().numpy().tobytes())
        span = [end, end + len(blocks[-1])]
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": span}
        end = span[1]
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    write_file(path, len(text).to_bytes(8, "little"), text, *blocks)


def save_bert(model: Bert, folder: str | Path, tokenizer_from: str | Path | None = None) -> None:
    """Writes tokenizer files, model.safetensors and, last, config.json: Hugging Face's layout.

    tokenizer_from: folder whose tokenizer files take the place of any that are there; raises
    as `data.tokenizer_files`.
    """
    folder, source = Path(folder), Path(tokenizer_from or "")
    if tokenizer_from:
        kept = data.tokenizer_files(source, model.config.max_position_embeddings)
        for name in () if process()[0] else {*data.TOKENIZER_FILES} - kept.keys():
            (folder / name).unlink(missing_ok=True)
        for name, content in kept.items():
            write_file(folder / name, content)
    state = {theirs(name): tensor for name, tensor in model.state_dict().items()}
    write_safetensors(folder / "model.safetensors", state)
    stored = asdict(model.config) | {key: good[0] for key, good in _IMPLEMENTED.items()}
    labels = dict(enumerate(stored.pop("labels")))
    stored |= {"id2label": labels, "label2id": {name: i for i, name in labels.items()}}
    stored |= {"architectures": ["BertForSequenceClassification"]}
    stored |= {"problem_type": "regression"} if len(labels) == 1 else {}
    config = json.dumps(stored, indent=2, sort_keys=True) + "\n"
    write_file(folder / "config.json", config.encode())


def checkpoint_folder(path: str, part: str) -> Path:
    """A folder that is a checkpoint or has one as `part`; else one by its name on the Hub.

    Of a finished run that has no student (`finetune`) it is the teacher.
    """
    folder = Path(path)
    owner = folder.parent != Path() and folder.parent.exists()  # a folder's name, misspelt
    if not folder.exists() and not owner and re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", path):
        return download_bert(path)
    if (folder / "config.json").is_file() or not folder.is_dir():
        return folder
    if (folder / part / "config.json").is_file():
        return folder / part
    there = [name for name in ("teacher", "student") if (folder / name / "config.json").is_file()]
    if there == ["teacher"] and (folder / "results.json").is_file():
        return folder / "teacher"
    hint = f"; {folder / there[0]} is one" if there else other_form(folder)
    hint = hint or ", or the run is not finished"
    raise FileNotFoundError(f"{folder}: no checkpoint in it, and no {part}{hint}")


def download_bert(name: str) -> Path:
    """The folder of a checkpoint of the Hugging Face Hub, such as google-bert/bert-base-uncased.

    Config, weights and tokenizer alone are downloaded, by huggingface_hub into its cache; its
    HF_HOME, HF_TOKEN, HF_ENDPOINT and HF_HUB_OFFLINE hold. Raises FileNotFoundError with the
    Hub's own words where there is no such checkpoint, or none that can be reached.
    """
    from huggingface_hub import errors, hf_hub_download, snapshot_download

    try:
        files = ["config.json", *data.TOKENIZER_FILES]
        folder = Path(snapshot_download(name, allow_patterns=files))
        try:
            hf_hub_download(name, "model.safetensors", revision=folder.name)
        except errors.EntryNotFoundError:
            hf_hub_download(name, "pytorch_model.bin", revision=folder.name)
    except Exception as error:  # of the network, in the kinds of whatever library fetches
        told = " ".join(str(error).split())[:300]
        raise FileNotFoundError(f"{name}: no such folder here, nor on the Hub: {told}") from None
    return folder


def match_labels(model: Bert, task: "glue.Task | None", where: Path) -> Bert:
    """The model with its classes in the task's order, matched by name unless they are LABEL_0 ...

    Raises ValueError for other classes, other texts (pairs) and a head that was never trained.
    """
    if model.fresh:
        parts = " and ".join(model.fresh)
        raise ValueError(f"{where}: no trained {parts}; fine-tune it: --bert {where}")
    if task is None:
        return model
    if model.config.sentence_pairs not in (None, task.pairs):
        raise ValueError(f"{where} has not learnt from {task.form}, which {task.name} has")
    names, wanted, order = model.config.labels, task.labels or ("score",), None
    for plain in (str, lambda name: name.lower().replace("-", "_").replace(" ", "_")):
        for spelling in (wanted, task.spelling):
            given, sought = [plain(n) for n in names], [plain(n) for n in spelling]
            if order is None and sorted(given) == sorted(sought) and len({*given}) == len(given):
                order = [given.index(name) for name in sought]
    silent = names == tuple(f"LABEL_{i}" for i in range(len(names)))
    if order is None and len(names) == len(wanted) and (silent or task.regression):
        order = list(range(len(names)))
        if silent and not task.regression:
            print(f"note: {where} names no labels; taken: {', '.join(wanted)}", file=sys.stderr)
    if order is None:
        shown = [", ".join(some[:8]) + ", ..." * (len(some) > 8) for some in (names, wanted)]
        raise ValueError(f"{where}: its labels are {shown[0]}, those of {task.name} {shown[1]}")
    for tensor in (model.classifier.weight, model.classifier.bias):
        tensor.data = tensor.data[order]
    model.config = replace(model.config, labels=wanted)
    return model


def load_fitting_tokenizer(folder: Path, model: Bert, config: DistillConfig) -> "Tokenizer":
    """The folder's tokenizer, refused with ValueError where it does not fit the model."""
    positions, rows = model.config.max_position_embeddings, model.config.vocab_size
    if config.max_length > positions:
        print(f"note: texts are cut at {positions} tokens, this BERT's positions", file=sys.stderr)
    tokenizer = data.load_tokenizer(folder, min(config.max_length, positions))
    tried = [tokenizer.encode(""), tokenizer.encode("a"), tokenizer.encode("a", "b")]
    ids = [*tokenizer.get_vocab().values(), *(i for encoding in tried for i in encoding.ids)]
    size, segments = max(ids, default=-1) + 1, [i for made in tried for i in made.type_ids]
    if size > rows:
        raise ValueError(
            f"{folder}: tokenizer of {size} tokens for {rows} embeddings; not its own?"
        )
    if not all(map(len, tried)) or max(segments) > 1:
        told = f"its tokenizer makes {[made.tokens for made in tried]} of no text, one, two"
        raise ValueError(f"{folder}: {told}; expected [CLS], [SEP] and the segments 0 and 1")
    return tokenizer


# --- what a run writes ---------------------------------------------------------------------------


@contextmanager
def naming(path: str | Path) -> Iterator[None]:
    """What goes wrong with a file names it: its content is a ValueError, a full disk OSError."""
    try:
        yield
    except (FileNotFoundError, MemoryError):
        raise
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None
    except Exception as error:  # those of json, torch, numpy have no base class in common
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__} "
        told = f"{kind}{' '.join(str(error).split())[:300]}"
        with suppress(OSError), Path(path).open("rb") as file:
            head = file.read(200)
            if re.match(rb"\s*(<!doctype|<html|<\?xml|version https://git-lfs)", head, re.I):
                told = "an HTML page or a Git LFS pointer, not the file itself"
        raise ValueError(f"{path}: {told}") from None


def write_file(path: str | Path, *blocks: bytes | memoryview) -> None:
    """Writes a file whole or not at all; of several processes the first. OSError names the file."""
    path = Path(path).resolve()  # a link stays one
    if process()[0]:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with naming(path), part.open("wb") as file:
            file.writelines(blocks)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def save_state(path: Path, **state: Any) -> None:
    """Writes plain values, and what parts with a state_dict hold."""
    held = {k: v.state_dict() if hasattr(v, "state_dict") else v for k, v in state.items()}
    buffer = io.BytesIO()
    if not process()[0]:
        torch.save(held, buffer)
        write_file(path, buffer.getbuffer())


def load_state(path: Path, **parts: Any) -> dict[str, Any]:
    """What `save_state` wrote, put into the parts; {} where there is none or, noted, it is torn."""
    try:
        saved = read_pickle(path) if path.exists() else {}
    except ValueError as error:
        print(f"note: not used, {error}", file=sys.stderr)
        saved = {}
    with naming(path):
        for name, part in parts.items() if saved else ():
            part.load_state_dict(saved[name])
        return dict(saved)


def open_run(run: Run, flags: dict[str, Any]) -> None:
    """Makes --out this run's: goes on with the same flags, or starts anew; else ValueError."""
    out, config, stale = run.out, run.config, [run.out / "results.json"]
    if stale[0].exists() and not config.overwrite:
        sweep(out)  # a kill may have come between
        raise ValueError(f"{out} holds a finished run (results.json); --overwrite replaces it")
    goes_on = same_flags(out, flags, config.overwrite) and not stale[0].exists()
    for place in (out / "teacher", out / "student", out / "baseline"):
        itself = place.resolve() == run.source.resolve()
        if itself and config.bert:
            raise ValueError(f"--bert {place} is where this run would write; name another --out")
        known = config.overwrite or run.log.path.exists() or itself
        if (place / "config.json").exists() and not known:
            raise ValueError(f"{place} holds a checkpoint of no run here; --overwrite replaces it")
        stale += [] if itself else [place / "config.json"]
    barrier()  # all have looked before the first one writes
    if not goes_on:
        sweep(out)
        for path in stale if not process()[0] else ():
            path.unlink(missing_ok=True)  # a student of before must not answer for this run
        write_file(run.log.path, b"")
        write_file(out / "run.json", json.dumps(flags, indent=1).encode())
    barrier()


def flags_that_matter(config: DistillConfig, train_set: "glue.Examples") -> dict[str, Any]:
    """What a run that continues must have been given before, by name; the rest moves no weight."""
    free = ("out", "overwrite", "force", "baseline", "log_every", "save_every")
    flags = {name: getattr(config, name) for name in options_of("distill") if name not in free}
    flags["device"] = config.device.split(":")[0]  # under torchrun each process has its own
    text = repr([train_set.texts, train_set.labels.tolist()])
    flags["crc of train.tsv"] = zlib.crc32(text.encode("utf-8", "backslashreplace"))
    if config.transfer:
        flags["crc of --transfer"] = zlib.crc32(Path(config.transfer).read_bytes())
    return flags | {"processes": process()[1]}


def same_flags(out: Path, flags: dict[str, Any], overwrite: bool) -> bool:
    """Whether OUT/run.json has them. Raises ValueError naming what differs, unless overwrite."""
    path, before = out / "run.json", {}
    with suppress(*[ValueError] * overwrite), naming(path):
        before = {**json.loads(path.read_text(encoding="utf-8"))} if path.exists() else {}
    differing = [name for name in flags if flags[name] != before.get(name)]
    with naming(path):
        if before and differing and not overwrite:
            shown = [f"{n} was {before.get(n)!r}, is {flags[n]!r}" for n in differing]
            how = "give it the same again, or --overwrite to give it up"
            raise ValueError(f"a run of other flags: {', '.join(shown)}; {how}")
    return not differing


def sweep(out: Path) -> None:
    """Deletes what only an unfinished run needs, by its names; all else in the folder stays."""
    states = f"*-{8 * '[0-9a-f]'}.state"
    names = ("run.json", states, "cache*-????????-*.f16*", ".*.[0-9]*.part")
    for pattern in (*names, "*/.*.[0-9]*.part") if not process()[0] else ():
        for path in out.glob(pattern):
            with suppress(OSError):  # a system that keeps mapped files keeps a cache
                path.unlink()


class Log:
    """log.jsonl, one object a line, and the same for people: lines, or on a terminal a live one.

    path: None writes no file. every: steps between two lines of it.
    """

    def __init__(self, path: Path | None, every: int = 50) -> None:
        self.path, self.every, self.phase = path or Path(os.devnull), every, "evaluate"
        self.seconds: dict[str, float] = {}  # of each phase, those before a kill included
        self.started = self.shown = time.perf_counter()  # the phase, and when its last line was
        self.live, self.open = sys.stdout.isatty(), False  # on a terminal; in the middle of a line

    @contextmanager
    def timed(self, phase: str, what: str) -> Iterator[None]:
        """Names the phase of what is logged inside, says what it does, and takes its time."""
        self.phase, self.started = phase, time.perf_counter()
        print(f"\n{phase}: {what}", flush=True)
        try:
            yield
        finally:
            print(end="\n" * self.open)
        self.seconds = self.so_far()

    def goes_on(self, saved: dict[str, Any]) -> int:
        """Steps that a killed run had done, if it saved any; takes over its seconds."""
        if saved:
            print(f"{self.phase}: continues after step {saved['step']}")
            self.seconds = saved["seconds"]
        return int(saved.get("step", 0))

    def so_far(self) -> dict[str, float]:
        """Seconds of each phase, up to now."""
        before = self.seconds.get(self.phase, 0.0)
        return self.seconds | {self.phase: before + time.perf_counter() - self.started}

    def due(self, seconds: float) -> bool:
        """Whether the last line is that old; on a terminal a fifth of a second is enough."""
        return time.perf_counter() - self.shown > (0.2 if self.live else seconds)

    def write(self, **event: Any) -> None:
        """One line of log.jsonl; of several processes the first one writes."""
        if not process()[0]:
            with naming(self.path), self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"phase": self.phase} | event) + "\n")

    def step(
        self, step: int, steps: int, terms: dict[str, Tensor], lr: float, rate: float, size: int
    ) -> None:
        """Now and then a line whose weighted terms, means over the processes, add up to the loss.

        rate: examples per second; size: examples per step.
        """
        kept = step % self.every == 0 or step == steps
        if not kept and (process()[1] > 1 or not self.due(15)):
            return
        values = torch.stack([term.detach() for term in terms.values()])
        if dist.is_initialized():
            dist.all_reduce(values)
        numbers = dict(zip(terms, (values / process()[1]).tolist()))
        if kept:
            told = {"loss": sum(numbers.values()), **numbers, "lr": lr, "examples_per_second": rate}
            self.write(step=step, steps=steps, **told)
        shown = " ".join(
            f"{name} {f'{number:.3f}'[:5] if number < 99_999 else f'{number:.0e}'}"
            for name, number in numbers.items()
        )
        self.show(step, steps, (steps - step) * size, rate, shown)

    def show(self, done: int, total: int, left: int, rate: float, what: str) -> None:
        """A line of 80 columns; on a terminal the next takes its place, unless it is the last."""
        minutes, seconds = divmod(round(left / rate), 60)
        line = f"{self.phase} {done:5}/{total} {rate:.0f}/s -{minutes}:{seconds:02d} | {what}"
        if self.live:
            width = shutil.get_terminal_size().columns - 1
            line = "\r" + line[:width].ljust(width)
        self.shown, self.open = time.perf_counter(), self.live and done < total
        print(line, end="" if self.open else "\n", flush=True)


# --- the machine: device, precision, processes, and what saves time on a CPU ---------------------


def resolve_device(name: str) -> torch.device:
    """'auto' is CUDA, else MPS, else the CPU. Raises ValueError for one that is not there."""
    here = ["cuda"] * torch.cuda.is_available() + ["mps"] * torch.backends.mps.is_available()
    name = [*here, "cpu"][0] if name == "auto" else name
    found = re.fullmatch("([a-z]+)(:([0-9]+))?", name)
    count = torch.cuda.device_count() if name.startswith("cuda") else 1
    if not found or found[1] not in [*here, "cpu"] or int(found[3] or 0) >= count:
        raise ValueError(f"device '{name}' is not there; auto takes the best of cuda, mps and cpu")
    return torch.device(name)


def has_fast_bf16(device: torch.device) -> bool:
    """Whether bf16 is faster than fp32 here: NVIDIA since Ampere, x86 with AVX512-BF16 or AMX."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    told = getattr(torch.cpu, "get_capabilities", dict)  # which an old torch has not
    features: dict[str, Any] = told() if device.type == "cpu" else {}
    return bool(features.get("avx512_bf16") or features.get("amx_bf16"))


def autocast(config: DistillConfig) -> AbstractContextManager[Any]:
    """The precision of a forward pass: fp32 unless config.precision, once settled, is bf16."""
    if config.precision != "bf16":
        return nullcontext()  # some devices of some versions refuse even an autocast that is off
    return torch.autocast(resolve_device(config.device).type, torch.bfloat16)


def ship(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on the device; a GPU is not waited for."""
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def process() -> tuple[int, int]:
    """This process's rank, and how many train together: 0 and 1 without torchrun."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def process_here() -> tuple[int, int]:
    """The same among this machine's processes: all there are, unless torchrun says otherwise."""
    (rank, count), said = process(), os.environ if dist.is_initialized() else {}
    return int(said.get("LOCAL_RANK", rank)), int(said.get("LOCAL_WORLD_SIZE", count))


def share(own: Tensor) -> Tensor | float:
    """What the mean over this process's rows (B, ...) counts in a mean over the processes, about 1.

    Processes whose gradients are averaged may have one row more or less than others.
    """
    if not dist.is_initialized():
        return 1.0
    rows = torch.full((), len(own), dtype=torch.float32, device=own.device)
    dist.all_reduce(rows)
    return len(own) * process()[1] / rows


@contextmanager
def interrupt_held() -> Iterator[list[int]]:
    """Inside, the first Ctrl-C fills the list, no more; nothing changes where others handle it."""
    asked: list[int] = []

    def hold(number: int, frame: Any) -> None:
        asked.append(number)
        signal.signal(number, signal.default_int_handler)

    main_thread = threading.current_thread() is threading.main_thread()
    if main_thread and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, hold)
    try:
        yield asked
    finally:
        if signal.getsignal(signal.SIGINT) is hold:
            signal.signal(signal.SIGINT, signal.default_int_handler)


def barrier() -> None:
    """Waits until all processes are here."""
    if dist.is_initialized():
        dist.barrier()


def in_parallel(model: nn.Module) -> nn.Module:
    """The model, its gradients averaged over the processes and its start the first one's."""
    return nn.parallel.DistributedDataParallel(model) if dist.is_initialized() else model


def gather(rows: Tensor, config: DistillConfig) -> Tensor:
    """The rows that all processes computed together; those of the others hold -inf."""
    if dist.is_initialized():
        rows = rows.to(resolve_device(config.device))
        dist.all_reduce(rows, dist.ReduceOp.MAX)  # waits for the last process, too
    return rows.cpu()


def join_processes(config: DistillConfig) -> DistillConfig:
    """Under torchrun, makes this one of its processes, each with a GPU, if there is one."""
    if "TORCHELASTIC_RUN_ID" not in os.environ or dist.is_initialized():
        return config
    device = resolve_device(config.device).type
    own = int(os.environ["LOCAL_WORLD_SIZE"]) <= torch.cuda.device_count()
    if device == "cuda":
        device = f"cuda:{int(os.environ['LOCAL_RANK']) % torch.cuda.device_count()}"
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device != "cpu" and own else "gloo")
    if process()[0]:  # what the first one prints is what all would
        sys.stdout = open(os.devnull, "w")
    return replace(config, device=device)


class StoredFeatures:
    """Numbers of a file, fp16, mapped into memory for the moment in which rows are read or written.

    new: of zeros, once for all of a machine. It is filled at once, since a full disk would kill a
    process that writes beyond its end; here it is an OSError.
    """

    def __init__(self, path: Path, shape: tuple[int, ...], *, new: bool = False) -> None:
        if new and not process_here()[0]:
            path.parent.mkdir(parents=True, exist_ok=True)
            with naming(path), path.open("wb") as file:
                for _ in range(shape[0]):
                    file.write(bytes(2 * math.prod(shape[1:])))
        if new:
            barrier()
        with path.open("r+b") as file:
            self.mapped = mmap.mmap(file.fileno(), 2 * math.prod(shape))
        self.shape = shape
        self.numbers = torch.frombuffer(self.mapped, dtype=torch.float16).view(shape)

    def __getitem__(self, rows: Any) -> Tensor:
        found = self.numbers[rows]
        self.leave()
        return found

    def __setitem__(self, rows: Any, numbers: Tensor) -> None:
        self.numbers[rows] = numbers
        self.leave()

    def leave(self) -> None:
        """Frees the memory: the system keeps what was touched as long as it has room for files."""
        if hasattr(mmap, "MADV_DONTNEED"):
            self.mapped.madvise(mmap.MADV_DONTNEED)


def checksum(*things: Any) -> int:
    """CRC-32 of the numbers in models, encoded texts, tensors and arrays."""
    crc = 0
    for thing in things:
        parts = thing.state_dict() if isinstance(thing, nn.Module) else {"": thing}
        parts = vars(thing) if hasattr(thing, "offsets") else parts
        for part in parts.values():
            array = part.cpu().numpy() if isinstance(part, Tensor) else part
            crc = zlib.crc32(np.ascontiguousarray(array).data, crc)
    return crc


def dropout(x: Tensor, rate: float, training: bool) -> Tensor:
    """A share `rate` of the numbers 0, the others so much larger; on a CPU in 256ths.

    There a byte is drawn for each number, eight at once: torch's takes twice as long.
    """
    zeroed = min(round(256 * rate), 255)
    if not (training and zeroed) or x.device.type != "cpu":
        return F.dropout(x, rate, training)
    drawn = torch.randint(-(2**63), 2**63 - 1, (x.numel() // 8 + 1,)).view(torch.uint8)
    kept = drawn[: x.numel()].view(x.shape) >= zeroed
    return x * kept.to(x.dtype) * (256 / (256 - zeroed))


class Unfilled(TorchFunctionMode):
    """Inside, `nn.init` does nothing: on the meta device it would import sympy, for a second."""

    def __torch_function__(self, call: Any, types: Any, given: Any = (), named: Any = None) -> Any:
        ours = getattr(call, "__module__", None) == "torch.nn.init"
        return None if ours else call(*given, **named or {})


@contextmanager
def only_seen_words(model: Bert, encoded: "data.Encoded") -> Iterator["data.Encoded"]:
    """Leaves the model the embeddings of the words that occur in these texts, renumbered.

    The others' gradients are 0, and working those out, clipping and stepping them takes 3 to 21 %
    of a step. Yields the texts in the new numbers; at the end the whole table is back, updated.
    """
    whole = model.word_embeddings.weight
    seen, ids = np.unique(encoded.ids, return_inverse=True)
    rows = torch.from_numpy(seen).long().to(whole.device)
    some = nn.Parameter(whole.detach()[rows], requires_grad=whole.requires_grad)
    model.word_embeddings.weight = some
    try:
        yield replace(encoded, ids=ids.astype(np.int32))
    finally:
        some = model.word_embeddings.weight  # on another device by now, perhaps
        table = whole.detach().to(some.device)
        table[rows.to(some.device)] = some.detach()
        model.word_embeddings.weight = nn.Parameter(table, requires_grad=whole.requires_grad)


# --- command line --------------------------------------------------------------------------------

# Command -> what runs it, the groups of options and single ones that it takes, an example.
_DISTIL = "the data, the run, the student, the method, training, "
_COMMANDS: dict[str, tuple[Callable[[DistillConfig], Any], str, str]] = {
    "distill": (distill, _DISTIL + "a single run, the machine", "--task MRPC --bert path/to/bert"),
    "finetune": (finetune, "the data, the run, training, seed, the machine",
                 "--task RTE --bert google-bert/bert-base-uncased --out runs/RTE"),
    "ablate": (ablate, _DISTIL + "the machine, the ablation",
               "--rows full,layers=1,lr=1e-4+no-moe --seeds 0,1 --out runs/ablation"),
    "evaluate": (evaluate, "the data, checkpoint, split, json, the machine",
                 "runs/MRPC --task MRPC"),
    "predict": (predict, "the data, out, what to answer, the machine",
                'runs/MRPC "He left at noon." "At noon he went away."'),
    "row": (distill, "the student, the method, training", ""),  # of an ablation: no command
}  # fmt: skip


def flag(name: str) -> str:
    """An option's name on the command line."""
    return "--" + name.replace("_", "-")


def options_of(command: str) -> dict[str, str]:
    """The options that a command takes, and the heading of each."""
    found: dict[str, str] = {}
    takes, group = {*_COMMANDS[command][1].split(", ")}, ""
    for f in fields(DistillConfig):
        group = f.metadata["group"] or group
        found |= {f.name: group} if {group, f.name} & takes else {}
    return found


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}; see {self.prog} --help")


def parser(command: str) -> Parser:
    """One flag for every option of the command, under the headings of DistillConfig."""
    run, _, example = _COMMANDS[command]
    made = Parser(
        prog=f"microbert.py {command}", allow_abbrev=False,
        description=inspect.cleandoc(run.__doc__ or "").split("\n\n")[0],
        formatter_class=lambda prog: argparse.HelpFormatter(prog, width=100, max_help_position=27),
        epilog=f"example: python microbert.py {command} {example}",
    )  # fmt: skip
    made.add_argument("--version", action="version", version=f"microbert {__version__}")
    groups: dict[str, Any] = {}
    for name, heading in options_of(command).items():
        f = DistillConfig.__dataclass_fields__[name]
        group = groups[heading] = groups.get(heading) or made.add_argument_group(heading)
        default = "" if (command, name) == ("predict", "task") else f.default
        shown = "" if default in ("", ()) or default is False else f" [{default}]"
        told: dict[str, Any] = {"help": (f.metadata["help"] + shown).replace("%", "%%")}
        flags = [flag(name)]
        if command == "finetune" and name in ("teacher_epochs", "teacher_lr"):
            flags.append(flag(name[8:]))  # its only training: --epochs, --lr
        if name in ("checkpoint", "text"):
            group.add_argument(name, **told, nargs="*" if name == "text" else None)
        elif isinstance(default, bool):
            either = default or heading == "the method"
            action = argparse.BooleanOptionalAction if either else "store_true"
            group.add_argument(*flags, **told, action=action, default=default)
        else:
            word = {int: "N", float: "X", str: "WORD"}[type(default)]
            group.add_argument(*flags, **told, default=default, type=type(default), metavar=word)
    return made


def parse(words: Sequence[str]) -> tuple[str, DistillConfig]:
    """The command and its config. A command or option that there is not ends with the nearest."""
    command, *words = words if words and not words[0].startswith("-") else ["distill", *words]
    known = [name for name in _COMMANDS if name != "row"]
    if command not in known:
        near = "".join(f", did you mean {n}?" for n in difflib.get_close_matches(command, known, 1))
        raise ValueError(f"no command '{command}'{near} ({', '.join(known)})")
    chosen, unknown = parser(command).parse_known_args(words)
    if command == "predict" and not any(word.startswith("-") for word in unknown):
        chosen.text, unknown = (*chosen.text, *unknown), []  # texts behind an option
    if unknown:
        flags = [flag(name) for name in options_of(command)]
        found = difflib.get_close_matches(unknown[0].split("=")[0], flags, n=1, cutoff=0.7)
        hint = f", did you mean {found[0]}?" if found else "; its --help shows what it has"
        raise ValueError(f"{command} has no '{unknown[0]}'{hint}")
    return command, DistillConfig(**vars(chosen))


def what_is_wrong(error: Exception) -> str:
    """What to tell the user; an error that is no fault of data, options or machine is raised."""
    if isinstance(error, (OSError, ValueError)):
        return str(error)
    if isinstance(error, MemoryError) or re.search("out of memory|can't allocate", str(error)):
        told = " ".join(str(error).split())[:200]
        return f"out of memory, a smaller --batch-size or --max-length takes less: {told}"
    raise error


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; a user's mistake is one line on stderr and exit code 2."""
    words, config = list(sys.argv[1:] if argv is None else argv), DistillConfig()
    for stream in (sys.stdout, sys.stderr):  # a terminal that lacks a letter gets its number
        getattr(stream, "reconfigure", lambda **_: None)(errors="backslashreplace")
    try:
        if words[:1] in (["-h"], ["--help"]):
            print("COMMAND --help shows the options of each; without a COMMAND it is distill")
            for command, (run, _, example) in [*_COMMANDS.items()][:-1]:
                print((run.__doc__ or "").split("\n")[0])
                print(f"  python microbert.py {command} {example}")
            return 0
        command, config = parse(words)
        warnings.filterwarnings("ignore", ".*drawn at random")  # commands say so, or refuse it
        _COMMANDS[command][0](join_processes(config))
        if dist.is_initialized():  # together: one that is gone would take the others' threads along
            dist.barrier()
            dist.destroy_process_group()
        sys.stdout.flush()
    except BrokenPipeError:  # `| head` has seen enough
        sys.stdout = open(os.devnull, "w")
        return 0 if config.checkpoint else 1
    except (OSError, ValueError, MemoryError, RuntimeError) as error:
        where = f" in process {process()[0]}" if process()[0] else ""
        print(f"error{where}: {what_is_wrong(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        found = [] if config.checkpoint else sorted(Path(config.out or "out").glob("**/*.state"))
        how = f"; the same command continues from {found[0]}" if found else "; nothing was kept yet"
        how *= not config.checkpoint
        print(f"interrupted{how}", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
