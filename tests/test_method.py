"""The method's parts: features, experts, alignment, discriminator, losses, objective, loop."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import data
import microbert
from microbert import (
    Bert,
    BertConfig,
    BertOutput,
    Discriminator,
    Distillation,
    DistillConfig,
    FeatureMapping,
    SentenceExperts,
    TeacherCache,
    adversarial_loss,
    alignment_loss,
    class_offset,
    discriminator_loss,
    fit_experts,
    hard_loss,
    importance_loss,
    model_outputs,
    prune,
    schedule,
    sentence_features,
    soft_loss,
    teacher_pass,
    train,
)

TINY = BertConfig(
    vocab_size=40, hidden_size=16, num_hidden_layers=4, num_attention_heads=2,
    intermediate_size=32, max_position_embeddings=32, labels=("no", "yes"), initializer_range=0.3,
)  # fmt: skip


class Quiet:
    """A log that keeps the steps it is given."""

    def __init__(self):
        self.steps = []

    def due(self):
        return False

    def step(self, step, steps, terms, lr, size, started, kept):
        self.steps.append((step, {name: term.item() for name, term in terms.items()}, lr))


def texts(count=37, seed=0):
    """Random token ids of uneven lengths, as data.encode would give them."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(3, 12, count)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    ids = rng.integers(1, 40, offsets[-1]).astype(np.int32)
    return data.Encoded(ids, np.zeros(len(ids), np.uint8), offsets)


def random_features(batch=8, matched=2, hidden=16, seed=0):
    """Features (B, K, E, H), standardised as sentence_features leaves them."""
    generator = torch.Generator().manual_seed(seed)
    return F.layer_norm(torch.randn(batch, matched, 3, hidden, generator=generator), (hidden,))


# --- features ------------------------------------------------------------------------------------


def test_features_by_hand():
    """Catches swapped views and a missing standardisation.

    Tokens (1, 5), (3, 1), (2, 9) of which the last is padding: cls (1, 5), max (3, 5),
    mean (2, 3). Two numbers standardised over H = 2 are -1 and 1 in their order.
    """
    hidden = torch.tensor([[[1.0, 5.0], [3.0, 1.0], [2.0, 9.0]]])
    features = sentence_features([hidden], torch.tensor([[1, 1, 0]]))
    assert features.shape == (1, 1, 3, 2)
    expected = torch.tensor([[-1.0, 1.0], [-1.0, 1.0], [-1.0, 1.0]])
    torch.testing.assert_close(features[0, 0], expected, atol=1e-4, rtol=0)
    wide = torch.tensor([[[0.0, 2.0, 4.0], [6.0, 0.0, 0.0]]])  # cls, max (6, 2, 4), mean (3, 1, 2)
    views = sentence_features([wide], torch.ones(1, 2))[0, 0]
    for view, raw in zip(views, ([0.0, 2, 4], [6.0, 2, 4], [3.0, 1, 2])):
        raw = torch.tensor(raw)
        standard = (raw - raw.mean()) / raw.var(correction=0).sqrt()
        torch.testing.assert_close(view, standard, atol=1e-4, rtol=0)


@pytest.mark.parametrize("filler", [0.0, 100.0, -100.0, float("inf"), float("nan")])
def test_padding_never_enters_the_features(filler):
    """Catches max or mean over padding, whatever stands there."""
    torch.manual_seed(0)
    hidden, mask = torch.randn(2, 5, 8), torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    alone = sentence_features([hidden[:1, :3]], torch.ones(1, 3, dtype=torch.long))
    hidden[0, 3:] = filler
    torch.testing.assert_close(sentence_features([hidden], mask)[:1], alone)


def test_feature_mapping():
    """Catches a map where widths are equal, one shared by the layers, or none where they differ."""
    features = random_features(hidden=16)
    assert torch.equal(FeatureMapping(2, 16, 16)(features), features)
    mapped = FeatureMapping(2, 16, 24)
    assert mapped(features).shape == (8, 2, 3, 24)
    torch.testing.assert_close(mapped(features)[:, 1], mapped.maps[1](features[:, 1]))


# --- experts -------------------------------------------------------------------------------------


@pytest.mark.parametrize("routing", ["task", "sentence"])
def test_gate_is_a_distribution(routing):
    """Catches an unnormalised gate, and task routing that looks at the sentence."""
    experts = SentenceExperts(2, 16, 4, 2, routing)
    for parameter in (experts.gate_bias, experts.router):
        if parameter is not None:
            nn.init.normal_(parameter)
    gate = experts.gate(random_features())
    assert gate.shape == (8, 2, 3) and (gate > 0).all()
    torch.testing.assert_close(gate.sum(-1), torch.ones(8, 2))
    assert torch.equal(gate[0], gate[1]) == (routing == "task")


def test_experts_by_hand():
    """Catches experts that share weights, a gate left out, or layers mixed up.

    One layer, H = 2, P = 1: f = (1, 2), (3, 4), (5, 6); experts (1, 0), (0, 1), (1, 1);
    views 1, 4, 11; gate .5 .25 .25 -> .5 + 1 + 2.75 = 4.25.
    """
    experts = SentenceExperts(1, 2, 1, 2)
    with torch.no_grad():
        experts.experts.copy_(torch.tensor([[[[1.0], [0]], [[0], [1]], [[1], [1]]]]))
    features = torch.tensor([[[[1.0, 2], [3, 4], [5, 6]]]])
    fused = experts(features, torch.tensor([[[0.5, 0.25, 0.25]]]))
    assert fused.item() == pytest.approx(4.25)


def test_unknown_routing_is_refused():
    """Catches a misspelt routing that falls back in silence."""
    with pytest.raises(ValueError, match="routing 'token'"):
        SentenceExperts(2, 16, 4, 2, "token")


def test_importance_by_hand():
    """Catches a wrong CV^2: mean gate (.5, .3, .2), mean 1/3, variance .14/9, CV^2 .14."""
    gate = torch.tensor([[[0.4, 0.4, 0.2]], [[0.6, 0.2, 0.2]]])
    assert importance_loss(gate).item() == pytest.approx(0.14)
    assert importance_loss(torch.full((4, 2, 3), 1 / 3)).item() == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("regression", [False, True])
def test_experts_find_the_view_that_knows(regression):
    """Catches a gate that is not trained or not frozen: only the mean tells the label here."""
    features = random_features(600, 2, 16).half()
    signal = features[:, :, 2, 0].float().mean(1) * 2
    logits = signal[:, None] if regression else torch.stack([-signal, signal], 1) * 4
    labels = signal.clone() if regression else (signal > 0).float()
    labels[::2] = torch.nan
    features[:, 1] = features[:, 0]
    experts = SentenceExperts(2, 16, 8, logits.shape[1])
    fit_experts(experts, features, logits, labels, balance_weight=0.0)
    gate = experts.gate(features[:1].float())[0]
    assert (gate.argmax(-1) == 2).all() and (gate[:, 2] > 0.5).all()
    assert not experts.training and not any(p.requires_grad for p in experts.parameters())


# --- feature alignment ---------------------------------------------------------------------------


def test_alignment_by_hand():
    """Catches a gate left out, a sum for a mean, a missing term.

    Without experts: squares 1, 0, 4 in every entry of the three views, mean 5/3. With the gate of
    test_experts_by_hand: .5 * 1 + .25 * 0 + .25 * 4 = 1.5; z of one number each, 4.25 - (.5 + 0 +
    1) and 4.25 have the same sign, so the cosine is 1 and the second term 0; turned round it is 2.
    """
    teacher = torch.tensor([[[[1.0, 2], [3, 4], [5, 6]]]])
    student = teacher - torch.tensor([1.0, 0, 2])[:, None]
    assert alignment_loss(student, teacher).item() == pytest.approx(5 / 3)
    experts = SentenceExperts(1, 2, 1, 2)
    with torch.no_grad():
        experts.experts.copy_(torch.tensor([[[[1.0], [0]], [[0], [1]], [[1], [1]]]]))
        experts.gate_bias.copy_(torch.tensor([[0.5, 0.25, 0.25]]).log())
    assert alignment_loss(student, teacher, experts).item() == pytest.approx(1.5)
    turned = alignment_loss(-teacher, teacher, experts).item()  # squares 4 f^2: 10, 50, 122
    assert turned == pytest.approx(0.5 * 10 + 0.25 * 50 + 0.25 * 122 + 2)


@pytest.mark.parametrize("moe", [False, True])
def test_alignment_moves_the_student_alone(moe):
    """Catches a detached student, and a gradient into teacher, gate or experts."""
    experts = fit_experts(
        SentenceExperts(2, 16, 4, 2, "sentence"), random_features(), torch.randn(8, 2),
        torch.zeros(8), steps=2,
    )  # fmt: skip
    student, teacher = random_features(seed=1).requires_grad_(), random_features().requires_grad_()
    alignment_loss(student, teacher, experts if moe else None).backward()
    assert (student.grad.abs().sum((0, 3)) > 0).all()  # every layer and every view
    assert teacher.grad is None
    assert all(p.grad is None for p in experts.parameters())


def test_gate_of_the_alignment_comes_from_the_teacher():
    """Catches a gate computed from the student, which could then look away, or half a gradient."""
    experts = SentenceExperts(2, 16, 4, 2, "sentence").requires_grad_(False)
    nn.init.normal_(experts.router)
    teacher, student = random_features(), random_features(seed=1).requires_grad_()
    gate = experts.gate(teacher)
    distance = ((student - teacher).square().mean(-1) * gate).sum(-1)
    cosine = F.cosine_similarity(experts(student, gate), experts(teacher, gate), dim=-1)
    expected = (distance + 1 - cosine).mean()
    found = alignment_loss(student, teacher, experts)
    torch.testing.assert_close(found, expected)
    gradients = torch.autograd.grad(found, student), torch.autograd.grad(expected, student)
    torch.testing.assert_close(*gradients)


# --- discriminator -------------------------------------------------------------------------------


def test_discriminator_step_does_not_move_the_student():
    """Catches a missing detach, of either side."""
    discriminator = Discriminator(6)
    teacher = torch.randn(4, 6, requires_grad=True)
    student = torch.randn(4, 6, requires_grad=True)
    discriminator_loss(discriminator, teacher, student).backward()
    assert student.grad is None and teacher.grad is None
    assert all(p.grad is not None for p in discriminator.parameters())


def test_student_step_does_not_move_the_discriminator():
    """Catches gradients, or spectral norm's power iteration, reaching it in the student's step."""
    discriminator = Discriminator(6)
    before = {name: tensor.clone() for name, tensor in discriminator.state_dict().items()}
    student = torch.randn(4, 6, requires_grad=True)
    adversarial_loss(discriminator, student).backward()
    assert (student.grad != 0).any()
    assert all(p.grad is None for p in discriminator.parameters())
    assert all(torch.equal(before[name], t) for name, t in discriminator.state_dict().items())
    assert all(p.requires_grad for p in discriminator.parameters())


def test_adversarial_losses_by_hand():
    """Catches swapped labels, two-sided smoothing and a saturating form.

    D(x) = x: teacher 2, student -1. BCE(2, .9) = log(1 + e^2) - .9 * 2 = .326928;
    BCE(-1, 0) = log(1 + e^-1) = .313262. The student pays softplus(1) = log(1 + e) = 1.313262.
    """
    identity = nn.Flatten(0)
    real, fake = torch.tensor([[2.0]]), torch.tensor([[-1.0]])
    expected = math.log(1 + math.exp(2)) - 1.8 + math.log(1 + math.exp(-1))
    assert discriminator_loss(identity, real, fake).item() == pytest.approx(expected)
    assert adversarial_loss(identity, fake).item() == pytest.approx(math.log(1 + math.e))


def test_discriminator_learns_and_is_bounded():
    """Catches a discriminator that cannot tell, and one steep enough to drown the other terms."""
    torch.manual_seed(0)
    discriminator = Discriminator(6)
    optimizer = torch.optim.Adam(discriminator.parameters(), lr=1e-2)
    for _ in range(200):
        real, fake = torch.randn(32, 6) + 1, torch.randn(32, 6) - 1
        optimizer.zero_grad()
        discriminator_loss(discriminator, real, fake).backward()
        optimizer.step()
    assert (discriminator(real) > discriminator(fake).mean()).float().mean() > 0.9
    steep = torch.randn(64, 6, requires_grad=True)
    discriminator(steep).sum().backward()
    assert steep.grad.norm(dim=-1).max() < 1.1


def test_outputs_of_a_model():
    """Catches unsoftened answers and a softmax over a single score."""
    fused, logits = torch.randn(4, 8), torch.tensor([[2.0, 0.0]]).expand(4, 2)
    seen = model_outputs(fused, logits, 2.0)
    torch.testing.assert_close(seen[:, 8:], (logits / 2).softmax(-1))
    torch.testing.assert_close(seen[:, :8], F.layer_norm(fused, (8,)))
    assert torch.equal(model_outputs(fused, logits[:, :1], 2.0)[:, 8:], logits[:, :1])


# --- losses on predictions -----------------------------------------------------------------------


def test_soft_loss_by_hand():
    """Catches a missing T^2, swapped arguments and a mean over classes.

    T = 2, teacher (2 ln 3, 0) -> (.75, .25), student (0, 0) -> (.5, .5):
    KL = .75 ln 1.5 + .25 ln .5 = .130812, times 4 = .523248.
    """
    teacher, student = torch.tensor([[2 * math.log(3), 0.0]]), torch.zeros(1, 2)
    expected = 4 * (0.75 * math.log(1.5) + 0.25 * math.log(0.5))
    assert soft_loss(student, teacher, 2.0).item() == pytest.approx(expected)
    doubled = soft_loss(student.expand(6, 2), teacher.expand(6, 2), 2.0)
    assert doubled.item() == pytest.approx(expected)


def test_gradient_of_the_soft_loss_keeps_its_size():
    """Catches a lost T^2: at high T the gradient tends to (s - t) / C [3, section 2.1]."""
    teacher = torch.tensor([[1.0, -1.0]])
    for temperature in (20.0, 200.0):
        student = torch.zeros(1, 2, requires_grad=True)
        soft_loss(student, teacher, temperature).backward()
        torch.testing.assert_close(student.grad, -teacher / 2, atol=1e-2, rtol=0)


def test_scores_are_distilled_by_squared_error():
    """Catches KL over one logit, which is 0 for any student."""
    student, teacher = torch.tensor([[1.0], [4.0]]), torch.tensor([[3.0], [4.0]])
    assert soft_loss(student, teacher, 2.0).item() == pytest.approx(2.0)


def test_hard_loss_by_hand():
    """Catches unlabelled texts that count: their share of the batch adds 0.

    Logits 0, 0 cost ln 2 each; the second of two has no label: ln 2 / 2. Scores: (3 - 1)^2 / 2.
    """
    labels = torch.tensor([1.0, torch.nan])
    logits = torch.zeros(2, 2, requires_grad=True)
    loss = hard_loss(logits, labels)
    loss.backward()
    assert loss.item() == pytest.approx(math.log(2) / 2)
    assert logits.grad[0].abs().sum() > 0 and logits.grad[1].abs().sum() == 0
    assert hard_loss(torch.tensor([[3.0], [7.0]]), labels).item() == pytest.approx(2.0)


def test_logit_adjustment_by_hand():
    """Catches counts of unlabelled texts, a missing class that makes the loss infinite, tau."""
    labels = torch.tensor([1.0, 1.0, torch.nan, 0.0, 1.0])
    offset = class_offset(labels, 2, 1.0)
    torch.testing.assert_close(offset, torch.tensor([0.25, 0.75]).log())
    torch.testing.assert_close(class_offset(labels, 2, 0.5), offset / 2)
    for none in (class_offset(labels, 2, 0.0), class_offset(labels, 1, 1.0)):
        assert not none.any()
    assert class_offset(labels, 3, 1.0).isfinite().all()
    loss = hard_loss(torch.zeros(1, 2), torch.tensor([0.0]), offset)
    assert loss.item() == pytest.approx(-math.log(0.25))  # the class of every fourth text


def test_logit_adjustment_leaves_the_frequency_out():
    """Catches an offset that is added to the answers, subtracted, or not used by the objective.

    A model that sees nothing but frequencies ends undecided, without the adjustment at log 3.
    """
    labels = torch.tensor([1.0, 1.0, 1.0, 0.0])
    cache = TeacherCache(torch.zeros(4, 2, 3, 16), torch.zeros(4, 2), labels)
    for tau, gap in ((1.0, 0.0), (0.0, math.log(3))):
        config = DistillConfig(soft=False, fal=False, gan=False, logit_adjustment=tau, device="cpu")
        objective, bias = Distillation(cache, None, config), torch.zeros(2, requires_grad=True)
        optimizer = torch.optim.SGD([bias], lr=1.0)
        for _ in range(200):
            output = BertOutput(bias.expand(4, 2), ())
            objective(output, torch.ones(4, 1), torch.arange(4), 0.5)["hard"].backward()
            optimizer.step()
            optimizer.zero_grad()
        assert (bias[1] - bias[0]).item() == pytest.approx(gap, abs=1e-3)


# --- the teacher's pass --------------------------------------------------------------------------


def test_teacher_is_run_in_eval_mode(tmp_path):
    """Catches a teacher with dropout on, as peers have it, and batches put back in wrong order."""
    torch.manual_seed(0)
    teacher, encoded = Bert(TINY).train(), texts()
    config = DistillConfig(device="cpu")
    cache = teacher_pass(teacher, encoded, torch.zeros(37), (2, 4), config, tmp_path / "cache")
    assert not teacher.training and cache.features.dtype == torch.float16
    assert (tmp_path / "cache").stat().st_size == 37 * 2 * 3 * 16 * 2
    for row in (0, 5, 36):
        batch = data.collate(encoded, np.array([row]))
        output = teacher.eval()(**batch)
        torch.testing.assert_close(cache.logits[row], output.logits[0], atol=1e-5, rtol=1e-5)
        matched = [output.hidden_states[2], output.hidden_states[4]]
        features = sentence_features(matched, batch["attention_mask"])[0]
        torch.testing.assert_close(cache.features[row].float(), features, atol=2e-3, rtol=2e-3)
    assert not cache.logits.requires_grad and not cache.features.requires_grad


# --- the student's objective and the loop --------------------------------------------------------


def objective_of(tmp_path, **options):
    """A teacher's cache of random texts, the objective over it and the student."""
    torch.manual_seed(0)
    teacher, encoded = Bert(TINY), texts()
    config = DistillConfig(device="cpu", batch_size=9, lr=1e-3, **options)  # 37 = 4 * 9 + 1
    labels = torch.arange(37).remainder(2).float()
    labels[20:] = torch.nan
    cache = teacher_pass(teacher, encoded, labels, (2, 4), config, tmp_path / "cache")
    experts = fit_experts(SentenceExperts(2, 16, 8, 2), *cache, steps=5) if config.moe else None
    return teacher, prune(teacher, (2, 4)), encoded, Distillation(cache, experts, config), config


def test_terms_are_weighted_and_switched(tmp_path):
    """Catches a weight applied twice or never, and a switch that does nothing."""
    _, student, encoded, objective, _ = objective_of(tmp_path)
    rows = np.arange(8)
    batch = data.collate(encoded, rows)
    output, rows = student.eval()(**batch), torch.from_numpy(rows)
    terms = objective(output, batch["attention_mask"], rows, 0.9)
    cache, experts = objective.cache, objective.experts
    features = sentence_features(output.hidden_states[1:], batch["attention_mask"])
    expected = {
        "hard": 0.3 * hard_loss(output.logits, cache.labels[rows]),
        "soft": 0.7 * soft_loss(output.logits, cache.logits[rows], 2.0),
        "align": 3 * alignment_loss(features, cache.features[rows].float(), experts),
    }
    for name, value in expected.items():
        torch.testing.assert_close(terms[name], value)
    assert set(terms) == {*expected, "adv"} and terms["adv"].item() > 0
    for switch, name in (("soft", "soft"), ("fal", "align"), ("gan", "adv")):
        (tmp_path / switch).mkdir()
        _, _, _, less, _ = objective_of(tmp_path / switch, **{switch: False})
        found = less(output, batch["attention_mask"], rows, 0.9)
        assert set(terms) - set(found) == {name}
    torch.testing.assert_close(  # without soft targets the labels get all the weight
        objective_of(tmp_path, soft=False)[3](output, batch["attention_mask"], rows, 0.0)["hard"],
        expected["hard"] / 0.3,
    )


def test_experts_can_be_switched_off(tmp_path):
    """Catches --no-moe that still needs experts, in the alignment or before the discriminator."""
    _, student, encoded, objective, _ = objective_of(tmp_path, moe=False)
    batch = data.collate(encoded, np.arange(8))
    output = student(**batch)
    terms = objective(output, batch["attention_mask"], torch.arange(8), 0.9)
    features = sentence_features(output.hidden_states[1:], batch["attention_mask"])
    teacher = objective.cache.features[:8].float()
    torch.testing.assert_close(terms["align"], 3 * (features - teacher).square().mean())
    assert objective.discriminator.layers[0].in_features == 16 + 2


@pytest.mark.parametrize(
    "progress, share", [(0.0, 0.0), (0.1, 0.0), (0.3, 0.5), (0.5, 1.0), (1, 1)]
)
def test_adversarial_ramp(tmp_path, progress, share):
    """Catches an adversarial loss at full weight while the student is trivially recognisable."""
    objective = objective_of(tmp_path, adversarial_weight=2.0)[3]
    real, fake = torch.randn(4, 10), torch.randn(4, 10)
    paid = objective.contest(real, fake, progress)
    full = 2.0 * adversarial_loss(objective.discriminator, fake)
    torch.testing.assert_close(paid, share * full)


def test_contest_trains_the_discriminator_only_on_its_own_loss(tmp_path):
    """Catches a discriminator that is never stepped, or stepped by the student's loss."""
    objective = objective_of(tmp_path)[3]
    real, fake = torch.randn(4, 10), torch.randn(4, 10, requires_grad=True)
    objective.contest(real, fake, 1.0)
    first = [p.detach().clone() for p in objective.discriminator.parameters()]
    paid = objective.contest(real, fake, 1.0)
    second = [p.detach().clone() for p in objective.discriminator.parameters()]
    assert any(not torch.equal(a, b) for a, b in zip(first, second))
    grads = [p.grad.clone() for p in objective.discriminator.parameters()]
    paid.backward()
    now = [p.grad for p in objective.discriminator.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(grads, now)) and fake.grad is not None


def test_every_part_moves_the_student(tmp_path):
    """Catches a term computed from detached student outputs."""
    _, student, encoded, objective, _ = objective_of(tmp_path)
    batch = data.collate(encoded, np.arange(8))
    for name in ("hard", "soft", "align", "adv"):
        student.zero_grad()
        terms = objective(student(**batch), batch["attention_mask"], torch.arange(8), 0.9)
        terms[name].backward()
        assert student.layers[0].query.weight.grad.abs().sum() > 0, name


def test_train_shows_every_row_in_every_epoch_and_logs_terms(tmp_path):
    """Catches a dropped last batch (of one), a schedule not ending at 0, terms not logged."""
    teacher, student, encoded, objective, config = objective_of(tmp_path, log_every=1)
    seen, log = [], Quiet()
    frozen = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}

    def watched(output: BertOutput, mask, rows, progress):
        seen.extend(rows.tolist())
        assert student.training and len(output.logits) == len(rows) == len(mask)
        return objective(output, mask, rows, progress)

    train(student, encoded, watched, config, log, epochs=2, lr=1e-3)
    assert sorted(seen) == sorted([*range(37), *range(37)]) and len(log.steps) == 10
    assert seen[:37] != seen[37:]
    assert set(log.steps[0][1]) == {"hard", "soft", "align", "adv"}
    rates = [lr for _, _, lr in log.steps]
    assert max(rates) == pytest.approx(1e-3) and rates[-1] < 0.2e-3 and not student.training
    assert all(torch.equal(frozen[name], t) for name, t in teacher.state_dict().items())


def test_last_passes_learn_the_labels_alone(tmp_path):
    """Catches transfer text or the teacher in the passes at the end, and one schedule for both."""
    _, student, encoded, objective, config = objective_of(tmp_path, log_every=1)
    log, last = Quiet(), []

    def watched(output: BertOutput, mask, rows, progress):
        terms = objective(output, mask, rows, progress)
        if progress >= 1:
            last.extend(rows.tolist())
            labels = objective.cache.labels[rows]
            torch.testing.assert_close(terms, {"hard": hard_loss(output.logits, labels)})
        else:
            assert set(terms) == {"hard", "soft", "align", "adv"} and not last
        return terms

    train(student, encoded, watched, config, log, epochs=2, lr=1e-3, last=(20, 3))
    assert len(log.steps) == 10 + 3 * 3 and sorted(last) == sorted([*range(20)] * 3)
    rates = [lr for _, _, lr in log.steps]
    assert rates[10] == 0 and max(rates[10:]) > 0.9e-3 and rates[-1] < 0.2e-3 and rates[9] < 0.2e-3


def test_last_passes_are_a_training_of_their_own(tmp_path, monkeypatch):
    """Catches moments of the distillation's gradients that still steer the passes at the end."""
    batches, ends = data.bucketed_batches, []
    for parts in (
        [{"epochs": 1, "last": (20, 1)}],
        [{"epochs": 1}, {"epochs": 0, "last": (20, 1)}],
    ):
        _, student, encoded, objective, config = objective_of(tmp_path)
        for part in parts:
            monkeypatch.setattr(microbert, "seed_step", lambda *_: torch.manual_seed(0))
            train(student, encoded, objective, config, Quiet(), lr=1e-3, **part)
            monkeypatch.setattr(  # the order of the second pass
                data, "bucketed_batches", lambda *a, **k: batches(*a, **{**k, "epoch": 1})
            )
        monkeypatch.setattr(data, "bucketed_batches", batches)
        ends.append(student.state_dict())
    assert all(torch.equal(tensor, ends[1][name]) for name, tensor in ends[0].items())


def test_training_is_deterministic_and_aligns(tmp_path):
    """Catches unseeded randomness, and a loop that does not bring the student to the teacher."""
    finals = []
    for _ in range(2):
        _, student, encoded, objective, config = objective_of(tmp_path, log_every=1)
        log = Quiet()
        train(student, encoded, objective, config, log, epochs=12, lr=3e-3)
        finals.append(student.state_dict())
    assert all(torch.equal(finals[0][name], finals[1][name]) for name in finals[0])
    first, last = log.steps[0][1], log.steps[-1][1]
    assert last["align"] < 0.6 * first["align"] and last["soft"] < first["soft"]


def test_schedule():
    """Catches a warm-up that never ends and a decay that does not reach 0."""
    assert schedule(0.0, 0.1) == 0 and schedule(0.05, 0.1) == pytest.approx(0.5)
    assert schedule(0.1, 0.1) == 1 and schedule(0.55, 0.1) == pytest.approx(0.5)
    assert schedule(1.0, 0.1) == 0 and schedule(0.0, 0.0) == 1
