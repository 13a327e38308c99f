"""The method's parts: features, experts, alignment, discriminator, losses, objective, loop."""

import copy
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import data
import glue
import microbert
from microbert import (
    Bert,
    BertConfig,
    Distillation,
    DistillConfig,
    FeatureMaps,
    SentenceExperts,
    TeacherCache,
)

TINY = BertConfig(
    vocab_size=40, hidden_size=16, num_hidden_layers=4, num_attention_heads=2,
    intermediate_size=32, max_position_embeddings=32, labels=("no", "yes"), initializer_range=0.3,
)  # fmt: skip


class Quiet(microbert.Log):
    """A log that prints nothing and keeps every step it is given."""

    def __init__(self):
        super().__init__(None, every=1)
        self.steps = []

    def write(self, **event):
        self.steps.append(event)

    def show(self, *_):
        pass


def texts(count=37, seed=0, words=40):
    """Random token ids below `words`, of uneven lengths, as data.encode would give them."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(3, 12, count)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    ids = rng.integers(1, words, offsets[-1]).astype(np.int32)
    return data.Encoded(ids, np.zeros(len(ids), np.uint8), offsets)


def random_features(batch=8, matched=2, hidden=16, seed=0):
    """Features (B, K, E, H), standardised as sentence_features leaves them."""
    generator = torch.Generator().manual_seed(seed)
    return F.layer_norm(torch.randn(batch, matched, 3, hidden, generator=generator), (hidden,))


def test_features_by_hand():
    """Catches swapped views and a missing standardisation.

    Tokens (1, 5), (3, 1), (2, 9) of which the last is padding: cls (1, 5), max (3, 5),
    mean (2, 3). Two numbers standardised over H = 2 are -1 and 1 in their order.
    """
    hidden = torch.tensor([[[1.0, 5.0], [3.0, 1.0], [2.0, 9.0]]])
    features = microbert.sentence_features([hidden], torch.tensor([[1, 1, 0]]))
    assert features.shape == (1, 1, 3, 2)
    torch.testing.assert_close(features[0, 0], torch.tensor([[-1.0, 1]] * 3), atol=1e-4, rtol=0)
    wide = torch.tensor([[[0.0, 2.0, 4.0], [6.0, 0.0, 0.0]]])  # cls, max (6, 2, 4), mean (3, 1, 2)
    views = microbert.sentence_features([wide], torch.ones(1, 2))[0, 0]
    for view, raw in zip(views, ([0.0, 2, 4], [6.0, 2, 4], [3.0, 1, 2])):
        raw = torch.tensor(raw)
        standard = (raw - raw.mean()) / raw.var(correction=0).sqrt()
        torch.testing.assert_close(view, standard, atol=1e-4, rtol=0)


@pytest.mark.parametrize("filler", [0.0, 100.0, -100.0, float("inf"), float("nan")])
def test_padding_never_enters_the_features(filler):
    """Catches max or mean over padding, whatever stands there."""
    torch.manual_seed(0)
    hidden, mask = torch.randn(2, 5, 8), torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    alone = microbert.sentence_features([hidden[:1, :3]], torch.ones(1, 3, dtype=torch.long))
    hidden[0, 3:] = filler
    torch.testing.assert_close(microbert.sentence_features([hidden], mask)[:1], alone)


def experts_by_hand():
    """One layer, H = 2, P = 1: experts (1, 0), (0, 1), (1, 1), gate .5 .25 .25."""
    experts = SentenceExperts(1, 2, 1, 2)
    with torch.no_grad():
        experts.experts.copy_(torch.tensor([[[[1.0], [0]], [[0], [1]], [[1], [1]]]]))
        experts.gate_bias.copy_(torch.tensor([[0.5, 0.25, 0.25]]).log())
    return experts


def test_experts_by_hand():
    """Catches experts that share weights, a gate left out or not normalised, layers mixed up.

    f = (1, 2), (3, 4), (5, 6): views 1, 4, 11; gate .5 .25 .25 -> .5 + 1 + 2.75 = 4.25.
    """
    experts, features = experts_by_hand(), torch.tensor([[[[1.0, 2], [3, 4], [5, 6]]]])
    torch.testing.assert_close(experts.gate(), torch.tensor([[0.5, 0.25, 0.25]]))
    assert experts(features).item() == pytest.approx(4.25)
    two, features = SentenceExperts(2, 16, 4, 2), random_features()
    nn.init.normal_(two.gate_bias)
    torch.testing.assert_close(two.gate().sum(-1), torch.ones(2))
    each = [sum(two.gate()[k, e] * features[:, k, e] @ two.experts[k, e] for e in range(3))
            for k in range(2)]  # fmt: skip
    torch.testing.assert_close(two(features), torch.stack(each, 1))


def test_maps_start_as_the_experts():
    """Catches views and layers of a block mixed up: a block whose layers are one and the same."""
    experts, features = SentenceExperts(2, 16, 4, 2, block=2), random_features()
    nn.init.normal_(experts.gate_bias)
    maps = FeatureMaps(experts)
    torch.testing.assert_close(maps(features), experts(features.repeat(1, 1, 2, 1)))
    maps.weight.data += 1
    maps(features).sum().backward()
    assert maps.weight.grad.abs().min() > 0 and experts.experts.grad is None


def test_importance_by_hand():
    """Catches a wrong CV^2: weights (.5, .3, .2), mean 1/3, variance .14/9, CV^2 .14."""
    gate = torch.tensor([[0.5, 0.3, 0.2], [1 / 3, 1 / 3, 1 / 3]])
    assert microbert.importance_loss(gate[:1]).item() == pytest.approx(0.14)
    assert microbert.importance_loss(gate[1:]).item() == pytest.approx(0, abs=1e-9)
    assert microbert.importance_loss(gate).item() == pytest.approx(0.07)


@pytest.mark.parametrize("regression", [False, True])
def test_experts_find_the_view_that_knows(regression):
    """Catches a gate that is not trained or not frozen: only the mean tells the label here."""
    torch.manual_seed(0)
    features = random_features(600, 2, 16).half()
    signal = features[:, :, 2, 0].float().mean(1) * 2
    logits = signal[:, None] if regression else torch.stack([-signal, signal], 1) * 4
    labels = signal.clone() if regression else (signal > 0).float()
    labels[::2] = torch.nan
    features[:, 1] = features[:, 0]
    experts = SentenceExperts(2, 16, 8, logits.shape[1])
    gate = microbert.fit_experts(experts, features, logits, labels).gate()
    assert (gate.argmax(-1) == 2).all() and (gate[:, 2] > 0.5).all()
    assert not experts.training and not any(p.requires_grad for p in experts.parameters())


def test_alignment_by_hand():
    """Catches a gate left out, a sum for a mean, a missing term.

    Without experts: squares 1, 0, 4 in every entry of the three views, mean 5/3. With the gate of
    experts_by_hand: .5 * 1 + .25 * 0 + .25 * 4 = 1.5; z of one number each, 4.25 - (.5 + 0 +
    1) and 4.25 have the same sign, so the cosine is 1 and the second term 0; turned round it is 2.
    """
    teacher = torch.tensor([[[[1.0, 2], [3, 4], [5, 6]]]])
    student = teacher - torch.tensor([1.0, 0, 2])[:, None]
    block = torch.cat([teacher + 100, teacher], 2)  # of two layers, the last one counts
    assert microbert.alignment_loss(student, teacher).item() == pytest.approx(5 / 3)
    assert microbert.alignment_loss(student, block).item() == pytest.approx(5 / 3)
    gate, fused = experts_by_hand().gate(), experts_by_hand()(teacher)
    both = torch.cat([0.1 * gate, 0.9 * gate], 1)
    for seen, weights in ((teacher, gate), (block, both)):
        found = microbert.alignment_loss(student, seen, weights, (fused - 1.5, fused))
        assert found.item() == pytest.approx(1.5)
    turned = microbert.alignment_loss(-teacher, teacher, gate, (-fused, fused))
    assert turned.item() == pytest.approx(0.5 * 10 + 0.25 * 50 + 0.25 * 122 + 2)  # 4 f^2 and 2


@pytest.mark.parametrize("moe", [False, True])
def test_alignment_moves_the_student_alone(moe):
    """Catches a detached student or half a gradient, and one into teacher, gate or experts."""
    experts = SentenceExperts(2, 16, 4, 2)
    nn.init.normal_(experts.gate_bias)
    student, teacher = random_features(seed=1).requires_grad_(), random_features().requires_grad_()
    maps = FeatureMaps(experts)
    given = (experts.gate(), (maps(student), experts(teacher))) if moe else ()
    found = microbert.alignment_loss(student, teacher, *given)
    found.backward()
    assert (student.grad.abs().sum((0, 3)) > 0).all()  # every layer and every view
    assert teacher.grad is None
    assert all(p.grad is None for p in experts.parameters())
    distance = (student - teacher).square().mean(-1)
    cosine = F.cosine_similarity(experts(student), experts(teacher), dim=-1)
    whole = (experts.gate() * distance).sum(-1) + 1 - cosine
    expected = whole.mean() if moe else distance.mean()
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(student.grad, torch.autograd.grad(expected, student)[0])


def test_each_side_moves_itself_alone():
    """Catches a missing detach of teacher or student in the discriminator's step, and gradients
    or spectral norm's power iteration reaching it in the student's.
    """
    discriminator = microbert.Discriminator(6)
    before = {name: tensor.clone() for name, tensor in discriminator.state_dict().items()}
    teacher, student = torch.randn(4, 6, requires_grad=True), torch.randn(4, 6, requires_grad=True)
    microbert.adversarial_loss(discriminator, student).backward()
    assert (student.grad != 0).any()
    assert all(torch.equal(before[name], t) for name, t in discriminator.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in discriminator.parameters())
    student.grad = None
    microbert.discriminator_loss(discriminator, teacher, student).backward()
    assert student.grad is None and teacher.grad is None
    assert all(p.grad is not None for p in discriminator.parameters())


def test_adversarial_losses_by_hand():
    """Catches swapped labels, two-sided smoothing and a saturating form.

    D(x) = x: teacher 2, student -1. BCE(2, .9) = log(1 + e^2) - .9 * 2 = .326928;
    BCE(-1, 0) = log(1 + e^-1) = .313262. The student pays softplus(1) = log(1 + e) = 1.313262.
    """
    identity = nn.Flatten(0)
    real, fake = torch.tensor([[2.0]]), torch.tensor([[-1.0]])
    expected = math.log(1 + math.exp(2)) - 1.8 + math.log(1 + math.exp(-1))
    assert microbert.discriminator_loss(identity, real, fake).item() == pytest.approx(expected)
    assert microbert.adversarial_loss(identity, fake).item() == pytest.approx(math.log(1 + math.e))


def test_discriminator_learns_and_is_bounded():
    """Catches a discriminator that cannot tell, and one steep enough to drown the other terms."""
    torch.manual_seed(0)
    discriminator = microbert.Discriminator(6)
    optimizer = torch.optim.Adam(discriminator.parameters(), lr=1e-2)
    for _ in range(200):
        real, fake = torch.randn(32, 6) + 1, torch.randn(32, 6) - 1
        optimizer.zero_grad()
        microbert.discriminator_loss(discriminator, real, fake).backward()
        optimizer.step()
    assert (discriminator(real) > discriminator(fake).mean()).float().mean() > 0.9
    steep = torch.randn(64, 6, requires_grad=True)
    discriminator(steep).sum().backward()
    assert steep.grad.norm(dim=-1).max() < 1.1


def test_outputs_of_a_model():
    """Catches unsoftened answers and a softmax over a single score."""
    fused, logits = torch.randn(4, 8), torch.tensor([[2.0, 0.0]]).expand(4, 2)
    seen = microbert.model_outputs(fused, logits, 2.0)
    torch.testing.assert_close(seen[:, 8:], (logits / 2).softmax(-1))
    torch.testing.assert_close(seen[:, :8], F.layer_norm(fused, (8,)))
    assert torch.equal(microbert.model_outputs(fused, logits[:, :1], 2.0)[:, 8:], logits[:, :1])


def test_soft_loss_by_hand():
    """Catches a missing T^2, swapped arguments, a mean over classes, and KL over one logit; a lost
    T^2: at high T the gradient tends to (s - t) / C [3, section 2.1]; a gradient into the teacher.

    T = 2, teacher (2 ln 3, 0) -> (.75, .25), student (0, 0) -> (.5, .5):
    KL = .75 ln 1.5 + .25 ln .5 = .130812, times 4 = .523248. Scores: ((3 - 1)^2 + 0) / 2.
    """
    teacher, student = torch.tensor([[2 * math.log(3), 0.0]]), torch.zeros(1, 2)
    expected = 4 * (0.75 * math.log(1.5) + 0.25 * math.log(0.5))
    assert microbert.soft_loss(student, teacher, 2.0).item() == pytest.approx(expected)
    doubled = microbert.soft_loss(student.expand(6, 2), teacher.expand(6, 2), 2.0)
    assert doubled.item() == pytest.approx(expected)
    for temperature in (20.0, 200.0):
        teacher = torch.tensor([[1.0, -1.0]], requires_grad=True)
        student = torch.zeros(1, 2, requires_grad=True)
        microbert.soft_loss(student, teacher, temperature).backward()
        torch.testing.assert_close(student.grad, -teacher.detach() / 2, atol=1e-2, rtol=0)
        assert teacher.grad is None
    student, teacher = torch.tensor([[1.0], [4.0]]), torch.tensor([[3.0], [4.0]]).requires_grad_()
    assert microbert.soft_loss(student, teacher, 2.0).item() == pytest.approx(2.0)
    assert not microbert.soft_loss(student, teacher).requires_grad  # no more do scores


def test_hard_loss_by_hand():
    """Catches unlabelled texts that count: their share of the batch adds 0.

    Logits 0, 0 cost ln 2 each; the second of two has no label: ln 2 / 2. Scores: (3 - 1)^2 / 2.
    """
    labels = torch.tensor([1.0, torch.nan])
    logits = torch.zeros(2, 2, requires_grad=True)
    loss = microbert.hard_loss(logits, labels)
    loss.backward()
    assert loss.item() == pytest.approx(math.log(2) / 2)
    assert logits.grad[0].abs().sum() > 0 and logits.grad[1].abs().sum() == 0
    assert microbert.hard_loss(torch.tensor([[3.0], [7.0]]), labels).item() == pytest.approx(2.0)


def test_logit_adjustment_by_hand():
    """Catches counts of unlabelled texts, a missing class that makes the loss infinite, tau."""
    labels = torch.tensor([1.0, 1.0, torch.nan, 0.0, 1.0])
    offset = microbert.class_offset(labels, 2, 1.0)
    torch.testing.assert_close(offset, torch.tensor([0.25, 0.75]).log())
    torch.testing.assert_close(microbert.class_offset(labels, 2, 0.5), offset / 2)
    for none in (microbert.class_offset(labels, 2, 0.0), microbert.class_offset(labels, 1, 1.0)):
        assert not none.any()
    assert microbert.class_offset(labels, 3, 1.0).isfinite().all()
    loss = microbert.hard_loss(torch.zeros(1, 2), torch.tensor([0.0]), offset)
    assert loss.item() == pytest.approx(-math.log(0.25))  # the class of every fourth text


@pytest.mark.parametrize("distils", [True, False])
@pytest.mark.parametrize("tau, gap", [(1.0, 0.0), (0.0, math.log(3))])
def test_logit_adjustment_leaves_the_frequency_out(distils, tau, gap):
    """Catches an offset that is added to the answers, subtracted, or not used by an objective.

    A model that sees nothing but frequencies ends undecided, without the adjustment at log 3.
    """
    labels = torch.tensor([1.0, 1.0, 1.0, 0.0])
    cache = TeacherCache(torch.zeros(4, 2, 3, 16), torch.zeros(4, 2), labels)
    config = DistillConfig(soft=False, fal=False, gan=False, logit_adjustment=tau, device="cpu")
    objective = microbert.of_labels(labels, 2, config)
    objective = Distillation(cache, None, config) if distils else objective
    bias = torch.zeros(2, requires_grad=True)
    optimizer = torch.optim.SGD([bias], lr=1.0)
    for _ in range(200):
        output = microbert.BertOutput(bias.expand(4, 2), ())
        objective(output, torch.ones(4, 1), torch.arange(4), 0.5)["hard"].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert (bias[1] - bias[0]).item() == pytest.approx(gap, abs=1e-3)


def test_teacher_is_run_in_eval_mode(tmp_path):
    """Catches a teacher with dropout on, as peers have it, and batches put back in wrong order."""
    torch.manual_seed(0)
    teacher, encoded, path = Bert(TINY).train(), texts(), tmp_path / "cache"
    config = DistillConfig(device="cpu")
    blocks = ((1, 2), (3, 4))
    cache = microbert.teacher_pass(teacher, encoded, torch.zeros(37), blocks, config, path)
    assert not teacher.training and cache.features[:].dtype == torch.float16
    assert path.stat().st_size == 37 * 2 * 6 * 16 * 2
    for row in (0, 5, 36):
        batch = data.collate(encoded, np.array([row]))
        output = teacher.eval()(**batch)
        torch.testing.assert_close(
            cache.logits[row].float(), output.logits[0], atol=1e-3, rtol=1e-3
        )
        found = microbert.sentence_features(output.hidden_states[1:], batch["attention_mask"])[0]
        features = torch.stack([torch.cat([found[0], found[1]]), torch.cat([found[2], found[3]])])
        torch.testing.assert_close(cache.features[row].float(), features, atol=2e-3, rtol=2e-3)
    assert not cache.logits.requires_grad and not cache.features[:].requires_grad


def cut(path):
    path.write_bytes(path.read_bytes()[:-2])


CACHES = {  # what is other the second time, and how it is made so: (teacher, encoded, path)
    "nothing": lambda teacher, encoded, path: None,
    "a layer that is not kept": lambda teacher, *_: teacher.layers[0].key.weight[3, 5].add_(1e-3),
    "the last layer's end": lambda teacher, *_: teacher.layers[3].output_norm.bias[15].add_(1e-3),
    "the classifier": lambda teacher, *_: teacher.classifier.bias[1].add_(1e-3),
    "the words": lambda teacher, *_: teacher.word_embeddings.weight[39, 0].add_(1e-3),
    "a token": lambda _, encoded, __: np.add.at(encoded.ids, 7, -1),
    "a segment": lambda _, encoded, __: np.add.at(encoded.type_ids, -1, 1),
    "where a text ends": lambda _, encoded, __: np.add.at(encoded.offsets, 3, 1),
    "the numbers, cut": lambda _, __, path: cut(path),
    "the numbers, gone": lambda _, __, path: path.unlink(),
    "the logits, cut": lambda _, __, path: cut(path.with_name("cache.f16.logits")),
    "the logits, gone": lambda _, __, path: path.with_name("cache.f16.logits").unlink(),
    "the layers": lambda *_: None,
}


@pytest.mark.parametrize("other", CACHES)
def test_the_pass_is_used_again_for_the_same_alone(tmp_path, other):
    """Catches a teacher run again for nothing, and what another teacher said of other texts."""
    torch.manual_seed(0)
    teacher, encoded, path, config = (
        Bert(TINY),
        texts(),
        tmp_path / "cache.f16",
        DistillConfig(device="cpu"),
    )
    forwards, labels, caches = [], torch.zeros(37), []
    teacher.register_forward_hook(lambda *_: forwards.append(1))
    caches.append(microbert.teacher_pass(teacher, encoded, labels, ((2,), (4,)), config, path))
    first, kept = len(forwards), caches[0].features[:].clone()
    assert first > 0
    with torch.no_grad():
        CACHES[other](teacher, encoded, path)
    layers = ((1,), (4,)) if other == "the layers" else ((2,), (4,))
    caches.append(microbert.teacher_pass(teacher, encoded, labels + 1, layers, config, path))
    assert (len(forwards) == first) == (other == "nothing")
    assert torch.equal(caches[1].labels, labels + 1)  # the caller's, whatever was stored
    fresh = microbert.teacher_pass(teacher, encoded, labels, layers, config, tmp_path / "fresh")
    assert torch.equal(caches[1].features[:], fresh.features[:])
    assert torch.equal(caches[1].logits, fresh.logits)
    if "cut" not in other:
        assert torch.equal(caches[0].features[:], kept)  # the file before stays mapped


def objective_of(folder, **options):
    """A teacher's cache of random texts, the objective over it and the student."""
    torch.manual_seed(0)
    teacher, encoded = Bert(TINY), texts()
    fixed = {"device": "cpu", "precision": "fp32", "batch_size": 9, "lr": 1e-3}  # 37 = 4 * 9 + 1
    options = {"gan": True, "expert_size": 8} | fixed | options
    config = microbert.settle(DistillConfig(**options))
    labels = torch.arange(37).remainder(2).float()
    labels[20:] = torch.nan
    blocks = ((1, 2), (3, 4))
    cache = microbert.teacher_pass(teacher, encoded, labels, blocks, config, folder / "cache")
    experts = SentenceExperts(2, 16, 8, 2, block=2) if config.moe else None
    objective = Distillation(
        cache, experts and microbert.fit_experts(experts, *cache, steps=5), config
    )
    return teacher, microbert.prune(teacher, (2, 4)), encoded, objective, config


def test_terms_are_weighted_and_switched(tmp_path):
    """Catches a weight applied twice or never, a switch that does nothing, and a term computed
    from detached student outputs.
    """
    _, student, encoded, objective, _ = objective_of(tmp_path)
    batch, rows = data.collate(encoded, np.arange(8)), torch.arange(8)
    output = student.eval()(**batch)
    terms = objective(output, batch["attention_mask"], rows, 0.3)
    cache, experts = objective.cache, objective.experts
    features = microbert.sentence_features(output.hidden_states[1:], batch["attention_mask"])
    wanted = cache.features[rows].float()
    fused = objective.maps(features), experts(wanted)
    expected = {
        "hard": 0.1 * microbert.hard_loss(output.logits, cache.labels[rows]),
        "soft": 0.9 * microbert.soft_loss(output.logits, cache.logits[rows].float(), 2.0),
        "align": 0.8 * microbert.alignment_loss(features, wanted, experts.gate(), fused),
    }
    for name, value in expected.items():
        torch.testing.assert_close(terms[name], value)
    assert set(terms) == {*expected, "adv"} and terms["adv"].item() > 0
    for name, term in terms.items():
        student.zero_grad()
        term.backward(retain_graph=True)
        assert student.layers[0].query.weight.grad.abs().sum() > 0, name
    for switch, name in (("soft", "soft"), ("fal", "align"), ("gan", "adv")):
        less = objective_of(tmp_path, **{switch: False})[3]
        found = less(output, batch["attention_mask"], rows, 0.3)
        assert set(terms) - set(found) == {name}
        share = 0.1 if switch == "soft" else 1  # without it the labels get all the weight
        torch.testing.assert_close(found["hard"], expected["hard"] / share)


def test_features_first_then_answers(tmp_path, monkeypatch):
    """Catches an alignment that does not fade, or that costs time where it weighs nothing."""
    _, student, encoded, objective, config = objective_of(tmp_path, gan=False)
    batch, rows = data.collate(encoded, np.arange(8)), torch.arange(8)
    output, mask = student.eval()(**batch), batch["attention_mask"]
    at = {p: objective(output, mask, rows, p).get("align") for p in (1e-9, 0.25, 0.499)}
    torch.testing.assert_close(at[1e-9] / 4, at[0.25])  # squared: at half the way a quarter
    assert 0 < at[0.499] < 1e-4 * at[1e-9]
    monkeypatch.delattr(microbert, "sentence_features")
    for progress in (0.5, 0.75, 1.0):
        assert objective(output, mask, rows, progress)["align"].item() == 0


def test_experts_can_be_switched_off(tmp_path):
    """Catches --no-moe that still needs experts, in the alignment or before the discriminator."""
    _, student, encoded, objective, _ = objective_of(tmp_path, moe=False)
    batch = data.collate(encoded, np.arange(8))
    output = student(**batch)
    terms = objective(output, batch["attention_mask"], torch.arange(8), 0.3)
    features = microbert.sentence_features(output.hidden_states[1:], batch["attention_mask"])
    teacher = objective.cache.features[:8, :, 3:].float()
    torch.testing.assert_close(terms["align"], 0.8 * (features - teacher).square().mean())
    assert objective.discriminator.layers[0].in_features == 16 + 2


def test_contest_ramps_up_and_trains_the_discriminator_on_its_own_loss(tmp_path):
    """Catches an adversarial loss at full weight while the student is trivially recognisable, a
    discriminator that is never stepped, or stepped by the student's loss.
    """
    objective = objective_of(tmp_path, adversarial_weight=2.0)[3]
    real, fake = torch.randn(4, 10), torch.randn(4, 10, requires_grad=True)
    parameters = list(objective.discriminator.parameters())
    for progress, share in ((0.0, 0.0), (0.1, 0.0), (0.3, 0.5), (0.5, 1.0), (1, 1)):
        before = [p.detach().clone() for p in parameters]
        paid = objective.contest(real, fake, progress)
        full = 2.0 * microbert.adversarial_loss(objective.discriminator, fake)
        torch.testing.assert_close(paid, share * full)
        assert any(not torch.equal(a, b) for a, b in zip(before, parameters))
    grads = [p.grad.clone() for p in parameters]
    paid.backward()
    assert all(torch.equal(a, p.grad) for a, p in zip(grads, parameters))
    assert fake.grad is not None


def test_train_shows_every_row_in_every_epoch_and_logs_terms(tmp_path):
    """Catches a dropped last batch (of one), a schedule not ending at 0, terms not logged."""
    teacher, student, encoded, objective, config = objective_of(tmp_path)
    seen, log = [], Quiet()
    frozen = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}

    def watched(output, mask, rows, progress):
        seen.extend(rows.tolist())
        assert student.training and len(output.logits) == len(rows) == len(mask)
        return objective(output, mask, rows, progress)

    microbert.train(student, encoded, watched, config, log, epochs=2, lr=1e-3)
    assert sorted(seen) == sorted([*range(37), *range(37)]) and len(log.steps) == 10
    assert seen[:37] != seen[37:] and {"hard", "soft", "align", "adv"} < {*log.steps[0]}
    rates = [step["lr"] for step in log.steps]
    assert 0.9e-3 < max(rates) < 1e-3 and 0 < rates[-1] < 0.2e-3 and not student.training
    assert all(torch.equal(frozen[name], t) for name, t in teacher.state_dict().items())


def run_of(folder, config, encoded, labels):
    """What lessons and `fit` need of a run."""
    (folder / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\na\n")
    return SimpleNamespace(
        config=config, out=folder / "out", source=folder, unit=(0.0, 1.0), log=Quiet(), results={},
        encoded=encoded, labels=labels, task=SimpleNamespace(labels=TINY.labels, pairs=False),
    )  # fmt: skip


def test_a_students_lesson(tmp_path):
    """Catches transfer text left out or one more training after it, and a copy that is none."""
    _, student, encoded, objective, config = objective_of(tmp_path, epochs=2)
    run = run_of(tmp_path, config, encoded, objective.cache.labels[:20])
    lesson = microbert.student_lesson(run, objective.cache, objective.experts)
    assert (len(lesson.texts), lesson.epochs, lesson.lr) == (37, 2, 1e-3)
    before = microbert.checksum(student)
    fitted = microbert.fit(run, "student", student, lesson, 0)
    assert microbert.checksum(student) == before and run.results == {"student": {"updates": 10}}
    assert all({"hard", "soft", "align", "adv"} < {*step} for step in run.log.steps)
    assert len(run.log.steps) == 10
    _, student, _, objective, _ = objective_of(tmp_path)
    microbert.train(student, encoded, objective, config, Quiet(), epochs=2, lr=1e-3)
    torch.testing.assert_close(fitted.state_dict(), student.state_dict(), atol=1e-5, rtol=1e-4)


def test_training_is_deterministic_and_aligns(tmp_path):
    """Catches unseeded randomness, and a loop that does not bring the student to the teacher."""
    finals = []
    for _ in range(2):
        _, student, encoded, objective, config = objective_of(tmp_path)
        experts = microbert.make_experts(objective.cache, config)
        log, objective = Quiet(), Distillation(objective.cache, experts, config)
        microbert.train(student, encoded, objective, config, log, epochs=12, lr=3e-3)
        finals.append(student.state_dict())
    assert all(torch.equal(finals[0][name], finals[1][name]) for name in finals[0])
    first, last = log.steps[0], log.steps[-1]
    assert last["align"] < 0.6 * first["align"] and last["soft"] < first["soft"]


def test_maps_learn_with_the_student(tmp_path):
    """Catches maps that stand still, go at the student's rate, or that a continued run loses."""
    _, student, encoded, objective, config = objective_of(tmp_path)
    before, weight = objective.maps.weight.detach().clone(), student.layers[0].query.weight.clone()
    log, state = microbert.Log(None), tmp_path / "state"
    microbert.train(student, encoded, objective, config, log, epochs=2, lr=1e-9, state=state)
    assert 1e-4 < (objective.maps.weight - before).abs().max() < 10 * 5e-4
    assert (student.layers[0].query.weight - weight).abs().max() < 1e-7
    stored = torch.load(state, weights_only=True)
    assert torch.equal(stored["maps"]["weight"], objective.maps.weight)


def test_schedule():
    """Catches a warm-up that never ends and a decay that does not reach 0."""
    assert microbert.schedule(0.0, 0.1) == 0 and microbert.schedule(0.05, 0.1) == pytest.approx(0.5)
    assert microbert.schedule(0.1, 0.1) == 1 and microbert.schedule(0.55, 0.1) == pytest.approx(0.5)
    assert microbert.schedule(1.0, 0.1) == 0 and microbert.schedule(0.0, 0.0) == 1


@pytest.mark.parametrize("moe", [True, False])
def test_what_the_discriminator_is_shown(tmp_path, moe):
    """Catches a side made of other views, gate, layer, answers or temperature, or detached."""
    _, student, encoded, objective, _ = objective_of(tmp_path, moe=moe)
    batch, shown = data.collate(encoded, np.arange(8)), []
    if moe:
        nn.init.normal_(objective.experts.gate_bias)
    objective.contest = lambda real, fake, _: shown.extend([real, fake]) or fake.sum()
    output, cache = student(**batch), objective.cache
    objective(output, batch["attention_mask"], torch.arange(8), 0.9)
    own = microbert.sentence_features(output.hidden_states[1:], batch["attention_mask"])
    sides = (cache.features[:8].float(), cache.logits[:8].float()), (own, output.logits)
    for found, (features, logits) in zip(shown, sides, strict=True):
        views, fused = features[:, -1], features[:, -1, -3:].mean(1)
        if moe:
            gate, each = objective.experts.gate()[-1], objective.experts.experts[-1]
            weights = (
                gate[:, None, None] * each if len(views[0]) == 6 else objective.maps.weight[-1]
            )
            fused = sum(view @ weight for view, weight in zip(views.unbind(1), weights))
        expected = [F.layer_norm(fused, fused.shape[-1:]), (logits / 2).softmax(-1)]
        torch.testing.assert_close(found, torch.cat(expected, 1))
    shown[1][:, 0].sum().backward()
    assert student.layers[0].query.weight.grad.abs().sum() > 0
    assert objective.optimizer.param_groups[0]["betas"] == (0.5, 0.999)


def test_experts_and_discriminator_are_of_the_seed(monkeypatch):
    """Catches a start or batches that the seed does not decide, and a temperature left out."""
    cache = TeacherCache(random_features(600), torch.randn(600, 2), torch.arange(600) % 2.0)
    fit, soft, given = microbert.fit_experts, microbert.soft_loss, SentenceExperts(2, 16, 8, 2)
    asked, used, drawn = {}, set(), []
    monkeypatch.setattr(microbert, "fit_experts", lambda made, *_, **k: asked.update(k) or made)
    monkeypatch.setattr(microbert, "soft_loss", lambda *a: used.add(a[2:]) or soft(*a))
    for seed in (0, 1, 1):
        torch.rand(3)
        config = DistillConfig(device="cpu", seed=seed, temperature=5.0, gan=True)
        judge = Distillation(cache, None, config).discriminator
        made = microbert.make_experts(cache, config)
        fitted = fit(copy.deepcopy(given), *cache, **asked, steps=3)
        drawn.append([judge.layers[0].weight, made.experts, fitted.experts])
    for first, other, same in zip(*drawn):
        assert not torch.equal(first, other) and torch.equal(other, same)
    assert used == {(5.0,)}


def test_a_step_by_hand():
    """Catches a gradient that is not clipped or is added to the one before, and biases that decay.

    The gradient (3, 4) of norm 5 is cut to (.6, .8) for a clip of 1 and stays below 10. Without a
    gradient a step takes lr * decay = .05 of a matrix.
    """
    weight, broken = nn.Parameter(torch.zeros(2)), torch.zeros(())
    optimizer = torch.optim.SGD([weight], lr=1.0, fused=True)
    for clip, expected in ((1.0, [-0.6, -0.8]), (10.0, [-3.6, -4.8])):
        terms = {"hard": 3 * weight[0], "soft": 4 * weight[1]}
        microbert.update(nn.ParameterList([weight]), optimizer, terms, 1.0, clip, broken)
        torch.testing.assert_close(weight.detach(), torch.tensor(expected))
    model = nn.Linear(2, 3)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    (0 * model(torch.ones(2))).sum().backward()
    microbert.adamw(model, 0.1, 0.5).step()
    torch.testing.assert_close(model.weight.detach(), 0.95 * before[0])
    assert torch.equal(model.bias, before[1])


def test_every_step_and_seed_draws_its_own():
    """Catches dropout that is the same in each step or seed, and texts in the same order."""
    drawn = []

    def objective(output, mask, rows, progress):
        drawn.append((torch.rand(()).item(), rows.tolist()))
        return {"hard": output.logits.square().mean()}

    for seed in (0, 1, 1):
        config = DistillConfig(device="cpu", precision="fp32", seed=seed)
        microbert.train(Bert(TINY), texts(70), objective, config, Quiet(), epochs=2, lr=1e-3)
    rolls, orders = zip(*drawn)
    assert len({*rolls}) == 2 * 6 and drawn[6:12] == drawn[12:] and orders[:6] != orders[6:12]


def test_other_labels_are_another_training(monkeypatch, tmp_path):
    """Catches a run that goes on with labels that were changed meanwhile."""
    monkeypatch.setattr(microbert, "fit", lambda *arguments: arguments[-1])
    config, teacher, found = DistillConfig(device="cpu"), Bert(TINY), set()
    for label in (0.0, 1.0):
        run = run_of(tmp_path, config, texts(9), torch.full((9,), label))
        run.shared, examples = None, glue.Examples(["a"] * 9, np.full(9, label))
        flags = microbert.flags_that_matter(config, examples)
        found |= {microbert.teach(run, teacher), flags["crc of train.tsv"]}
    assert len(found) == 4
