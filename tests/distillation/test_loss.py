import pytest
import torch
from torch.nn.functional import cross_entropy

from peft_lrqat import distillation_loss
from peft_lrqat.distillation.loss import TopK, token_losses, top_k
from peft_lrqat.tuners.common import loss as lean
from peft_lrqat.tuners.common.loss import causal_lm_loss

V = 50


def reference(logits, labels, teacher, temperature=1.0, weight=1.0, items=None):
    """The formula in fp64; `teacher` is logits, or TopK."""
    student = logits[..., :-1, :].reshape(-1, V)
    targets = labels[..., 1:].reshape(-1)
    counted = targets != -100
    log_q = (student[counted] / temperature).log_softmax(-1)
    if isinstance(teacher, TopK):
        log_p = teacher.log_probs.double().log_softmax(-1)
        index = teacher.indices
        rest = 1 - log_q.exp().gather(1, index).sum(-1, keepdim=True)
        log_q = torch.cat([log_q.gather(1, index), rest.log()], 1)
    else:
        log_p = (teacher[..., :-1, :].reshape(-1, V)[counted] / temperature).log_softmax(-1)
    kl = (log_p.exp() * (log_p - log_q)).sum()
    ce = cross_entropy(student, targets, ignore_index=-100, reduction="sum")
    return (weight * temperature**2 * kl + (1 - weight) * ce) / (counted.sum() if items is None else items)


def batch(dtype=torch.float32, scale=3.0):
    labels = torch.randint(0, V, (2, 9))
    labels[0, :5] = -100
    labels[1, 7:] = -100
    logits = (torch.randn(2, 9, V) * scale).to(dtype).requires_grad_()
    return logits, labels, (logits.detach() + torch.randn(2, 9, V)).to(dtype)


def of_counted(teacher, labels, k, temperature):
    rows = teacher[..., :-1, :].reshape(-1, V)[labels[..., 1:].reshape(-1) != -100]
    return top_k(rows, k, temperature)


@pytest.mark.parametrize("chunk", [1, 200, 1 << 23])
@pytest.mark.parametrize("k", [None, 5])
@pytest.mark.parametrize(("temperature", "weight"), [(1.0, 1.0), (2.0, 0.3), (0.7, 0.0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_the_formula_and_its_gradient(monkeypatch, chunk, k, temperature, weight, dtype):
    monkeypatch.setattr(lean, "CHUNK", chunk)
    logits, labels, teacher = batch(dtype)
    target = teacher if k is None else of_counted(teacher, labels, k, temperature)
    options = {"temperature": temperature, "weight": weight}
    found = distillation_loss(logits, labels, target, num_items_in_batch=7, **options)
    exact = logits.detach().double().requires_grad_()
    expected = reference(exact, labels, teacher.double() if k is None else target, items=7, **options)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)
    got = torch.autograd.grad(3 * found, logits)[0]
    wanted = torch.autograd.grad(3 * expected, exact)[0]
    assert got.dtype == dtype
    torch.testing.assert_close(got.double(), wanted, rtol=1e-2 if dtype == torch.bfloat16 else 1e-4, atol=1e-6)


def test_all_of_the_vocabulary_is_the_full_loss():
    logits, labels, teacher = batch()
    full, parts = (
        distillation_loss(logits, labels, target) for target in (teacher, of_counted(teacher, labels, V, 1.0))
    )
    torch.testing.assert_close(parts, full)
    torch.testing.assert_close(*(torch.autograd.grad(loss, logits)[0] for loss in (parts, full)))


def test_top_k_is_a_lower_bound_that_grows_with_k():
    logits, labels, teacher = batch()
    found = [distillation_loss(logits, labels, of_counted(teacher, labels, k, 1.0)).item() for k in (1, 4, 16, V)]
    assert found == sorted(found)
    assert found[0] > 0


def test_half_precision_of_what_is_stored_hardly_matters():
    logits, labels, teacher = batch()
    target = of_counted(teacher, labels, 8, 1.0)
    rounded = TopK(target.indices.to(torch.uint16), target.log_probs.half())
    torch.testing.assert_close(*(distillation_loss(logits, labels, t) for t in (rounded, target)), rtol=2e-3, atol=1e-4)


def test_weight_zero_is_the_models_own_loss():
    logits, labels, teacher = batch()
    found, expected = distillation_loss(logits, labels, teacher, weight=0), causal_lm_loss(logits, labels, V)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(*(torch.autograd.grad(loss, logits)[0] for loss in (found, expected)))


def test_a_perfect_student_has_nothing_to_learn():
    logits, labels, _ = batch()
    found = distillation_loss(logits, labels, logits.detach().clone())
    assert found == 0
    assert not torch.autograd.grad(found, logits)[0].any()


def test_what_does_not_count_is_not_looked_at():
    """Rows of padding may hold anything: a fully masked query gives NaN."""
    logits, labels, teacher = batch()
    expected = torch.autograd.grad(distillation_loss(logits, labels, teacher), logits)[0]
    idle = (lean.shifted(labels, None, -100) == -100).view(2, 9)
    teacher[idle] = torch.nan
    logits = logits.detach().masked_fill(idle.unsqueeze(-1), torch.nan).requires_grad_()
    assert torch.equal(torch.autograd.grad(distillation_loss(logits, labels, teacher), logits)[0], expected)


def test_a_token_that_both_exclude():
    logits, labels, teacher = batch()
    teacher[..., 3] = -torch.inf
    masked = logits.detach().clone()
    masked[..., 3] = -torch.inf
    masked.requires_grad_()
    labels[labels == 3] = 4
    found = distillation_loss(masked, labels, teacher)
    keep = [i for i in range(V) if i != 3]
    new = (labels - (labels > 3).long()).where(labels >= 0, labels)
    torch.testing.assert_close(found, distillation_loss(masked[..., keep], new, teacher[..., keep]))
    assert torch.autograd.grad(found, masked)[0].isfinite().all()


def test_nothing_that_counts_is_zero():
    logits, labels, teacher = batch()
    found = distillation_loss(logits, torch.full_like(labels, -100), teacher, num_items_in_batch=3)
    assert found == 0
    assert not torch.autograd.grad(found, logits)[0].any()


def test_labels_that_are_shifted_already():
    logits, labels, teacher = batch()
    shift = lean.shifted(labels, None, -100).view_as(labels)
    expected = distillation_loss(logits, labels, teacher)
    assert torch.equal(distillation_loss(logits, labels, teacher, shift_labels=shift), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gradient_may_take_the_place_of_the_teachers_logits(dtype):
    logits, labels, teacher = (tensor.flatten(0, 1) for tensor in batch(dtype))
    teacher[(labels == -100)] = torch.nan
    plain = torch.autograd.grad(token_losses(logits, labels, teacher).loss.sum(), logits, retain_graph=True)[0]
    loss = token_losses(logits, labels, teacher, overwrite=True).loss.sum()
    found = torch.autograd.grad(loss, logits, retain_graph=True)[0]
    assert torch.equal(found, plain)
    assert found.data_ptr() == teacher.data_ptr()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(loss, logits)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"temperature": 0.0}, "`temperature` is 0.0"),
        ({"weight": 1.5}, "`weight` is 1.5"),
        ({"teacher": torch.zeros(2, 9, V + 1)}, "same vocabulary"),
        ({"teacher": "name"}, "`teacher` is a str"),
        ({"labels": torch.zeros(2, 10, dtype=torch.long)}, r"`labels` is .* \(2, 10\); it must be int64 \(2, 9\)"),
        ({"labels": torch.zeros(2, 9)}, "`labels` is a tensor of torch.float32"),
        ({"shift_labels": torch.zeros(2, 8, dtype=torch.long)}, "`shift_labels` is"),
        ({"teacher": TopK(torch.zeros(3, 4, dtype=torch.long), torch.zeros(3, 5))}, "10 tokens that count"),
    ],
)
def test_refusals(change, message):
    logits, labels, teacher = batch()
    with pytest.raises(ValueError, match=message):
        distillation_loss(logits, **{"labels": labels, "teacher": teacher, **change})
