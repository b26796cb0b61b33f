"""Every objective against dense float64 sums under autograd, token by token and bucket by bucket.

Shape suffixes: C positions, V vocabulary, K kept logits.
"""

import math
from typing import Literal

import pytest
import torch

from configs.training import CrossEntropy, ForwardKl, Objective, ReverseKl
from train.objectives import OBJECTIVES, chunk_loss
from train.objectives.cross_entropy import cross_entropy
from train.objectives.reverse_kl import TAIL_FLOOR
from train.objectives.rows import BLOCK_ELEMENTS, row_blocks
from train.objectives.targets import TeacherTargets

Kl = Literal["forward_kl", "reverse_kl"]
KLS: dict[Kl, type[ForwardKl] | type[ReverseKl]] = {"forward_kl": ForwardKl, "reverse_kl": ReverseKl}
C, V, K = 6, 23, 5


def top_k(logits_CV: torch.Tensor, k: int, temperature: float) -> TeacherTargets:
    """What data/logits.py stores of these logits, without its rounding of them."""
    log_probs_CV = (logits_CV.double() / temperature).log_softmax(-1)
    best = log_probs_CV.topk(k, -1)
    return TeacherTargets(best.indices, best.values, torch.ones(len(logits_CV), dtype=torch.bool))


def reference_kl(kind: Kl, logits_V: torch.Tensor, ids: list[int], probs: list[float], temperature: float) -> torch.Tensor:
    """The divergence of one position, bucket by bucket; ids that the student does not have are in the tail."""
    q_V = (logits_V / temperature).softmax(-1)
    ours = [(p, q_V[token]) for token, p in zip(ids, probs, strict=True) if token < len(logits_V)]
    outside = [token for token in range(len(logits_V)) if token not in ids]
    if outside:
        ours.append((1 - sum(p for p, _ in ours), sum((q_V[token] for token in outside), torch.zeros((), dtype=torch.float64))))
    total = torch.zeros((), dtype=torch.float64)
    for p, q in ours:
        total = total + (p * (math.log(p) - q.log()) if kind == "forward_kl" else q * (q.log() - math.log(p)))
    return total


def reference(objective: Objective, logits_CV: torch.Tensor, targets_C: torch.Tensor, teacher: TeacherTargets) -> torch.Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for logits_V, target, ids_K, log_probs_K, has in zip(logits_CV, targets_C, *teacher, strict=True):
        entropy = -logits_V.log_softmax(-1)[target]
        if isinstance(objective, CrossEntropy) or not has:
            total = total + entropy
            continue
        used = [
            (token, math.exp(log_p)) for token, log_p in zip(ids_K.tolist(), log_probs_K.tolist(), strict=True) if log_p > -1e9
        ]
        ids, probs = [token for token, _ in used], [p for _, p in used]
        kl = reference_kl(objective.type, logits_V, ids, probs, objective.temperature)
        total = total + (1 - objective.weight) * entropy + objective.weight * objective.temperature**2 * kl
    return total


def draw(
    seed: int = 0, *, vocabulary: int = V, teacher_vocabulary: int = V, k: int = K, t: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor, TeacherTargets]:
    """logits_CV, targets_C (the likeliest of the teacher's for some, so that they are kept ones) and the teacher's targets."""
    generator = torch.Generator().manual_seed(seed)
    logits_CV = torch.randn(C, vocabulary, generator=generator, dtype=torch.float64) * 3
    teacher = top_k(torch.randn(C, teacher_vocabulary, generator=generator, dtype=torch.float64) * 3, k, t)
    targets_C = torch.randint(vocabulary, (C,), generator=generator)
    targets_C[::2] = teacher.ids_NK[::2, 0].clamp(max=vocabulary - 1)
    return logits_CV, targets_C, teacher


def run(
    objective: Objective, logits_CV: torch.Tensor, targets_C: torch.Tensor, teacher: TeacherTargets, *, gradient: bool
) -> torch.Tensor:
    """The loss, as train/losses.py asks for it; the gradient stands in logits_CV afterwards."""
    function, temperature = chunk_loss(objective)
    return function(logits_CV.div_(temperature), targets_C, teacher, gradient=gradient)


def check(objective: Objective, logits_CV: torch.Tensor, targets_C: torch.Tensor, teacher: TeacherTargets) -> None:
    leaf_CV = logits_CV.clone().requires_grad_()
    expected = reference(objective, leaf_CV, targets_C, teacher)
    (expected_CV,) = torch.autograd.grad(expected, leaf_CV)
    for gradient in (True, False):
        found_CV = logits_CV.clone()
        found = run(objective, found_CV, targets_C, teacher, gradient=gradient)
        torch.testing.assert_close(found, expected.detach(), rtol=1e-12, atol=1e-13)
        if gradient:
            torch.testing.assert_close(found_CV, expected_CV, rtol=1e-10, atol=1e-13)


# --- equal to the reference --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KLS)
@pytest.mark.parametrize("temperature", [1.0, 2.0, 0.5, 3.0])
@pytest.mark.parametrize("weight", [0.3, 1.0])
def test_loss_and_gradient_equal_the_dense_reference(kind: Kl, temperature: float, weight: float) -> None:
    check(KLS[kind](weight=weight, temperature=temperature), *draw(t=temperature))


@pytest.mark.parametrize("kind", KLS)
@pytest.mark.parametrize("temperature", [1.0, 2.0, 3.0])
def test_unused_slots_and_positions_without_logits_equal_the_reference(kind: Kl, temperature: float) -> None:
    logits_CV, targets_C, (ids_NK, log_probs_NK, has_N) = draw(1, t=temperature)
    ids_NK[1, 3:], log_probs_NK[1, 3:] = 0, -math.inf  # token 0 is someone's, or the tail's
    ids_NK[2, 1:], log_probs_NK[2, 1:] = ids_NK[2, 0], -math.inf
    ids_NK[3], log_probs_NK[3], has_N[3] = 0, -math.inf, False
    has_N[4] = False  # whatever stands there
    check(KLS[kind](weight=0.6, temperature=temperature), logits_CV, targets_C, TeacherTargets(ids_NK, log_probs_NK, has_N))


@pytest.mark.parametrize("kind", KLS)
@pytest.mark.parametrize(("students", "teachers"), [(20, 23), (23, 20)])
def test_vocabularies_padded_to_different_sizes_equal_the_reference(kind: Kl, students: int, teachers: int) -> None:
    logits_CV, targets_C, teacher = draw(2, vocabulary=students, teacher_vocabulary=teachers, k=12, t=2.0)
    assert students > teachers or (teacher.ids_NK >= students).any(), "no teacher id is out of the student's reach"
    check(KLS[kind](weight=0.5, temperature=2.0), logits_CV, targets_C, teacher)


@pytest.mark.parametrize(
    "objective", [CrossEntropy(), ForwardKl(temperature=2.0), ReverseKl(temperature=2.0)], ids=lambda o: o.type
)
def test_several_blocks_of_rows_equal_one(objective: Objective, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("train.objectives.rows.BLOCK_ELEMENTS", 4 * V)
    logits_CV, targets_C, teacher = draw(3, t=2.0)
    assert len(list(row_blocks(logits_CV))) == 2
    check(objective, logits_CV, targets_C, teacher)


@pytest.mark.parametrize("kind", KLS)
def test_where_no_position_has_logits_every_objective_is_cross_entropy(kind: Kl) -> None:
    logits_CV, targets_C, teacher = draw(4)
    absent = teacher._replace(has_N=torch.zeros(C, dtype=torch.bool))
    expected_CV, found_CV = logits_CV.clone(), logits_CV.clone()
    expected = cross_entropy(expected_CV, targets_C, gradient=True)
    found = run(KLS[kind](weight=1.0, temperature=2.0), found_CV, targets_C, absent, gradient=True)
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=0)
    torch.testing.assert_close(found_CV, expected_CV, rtol=1e-12, atol=1e-15)


# --- values by hand, and properties ------------------------------------------------------------------------------


def divergence(kind: Kl, logits_CV: torch.Tensor, teacher: TeacherTargets, temperature: float = 1.0) -> torch.Tensor:
    """float64 [C]: nats, without the factor t^2."""
    objective = KLS[kind](weight=1.0, temperature=temperature)
    targets_1 = torch.zeros(1, dtype=torch.long)
    parts = [slice(row, row + 1) for row in range(len(logits_CV))]
    values = [run(objective, logits_CV[part].clone(), targets_1, teacher.part(part), gradient=False) for part in parts]
    return torch.stack(values) / temperature**2


FORWARD, REVERSE = 0.5 * math.log(4 / 3), 0.75 * math.log(3 / 2) + 0.25 * math.log(1 / 2)


@pytest.mark.parametrize(("kind", "expected"), [("forward_kl", FORWARD), ("reverse_kl", REVERSE)])
def test_divergence_of_hand_computed_buckets(kind: Kl, expected: float) -> None:
    """The teacher gives one token 1/2 and the other three 1/2 together; the student gives it 9 of 12 and them 3 of 12."""
    teacher = TeacherTargets(torch.tensor([[2]]), torch.tensor([[math.log(0.5)]]), torch.tensor([True]))
    logits_CV = torch.tensor([[0.0, 0.0, math.log(9.0), 0.0]], dtype=torch.float64)
    assert divergence(kind, logits_CV, teacher).item() == pytest.approx(expected, abs=1e-7)  # log 1/2 came as float32


def test_mixture_of_hand_computed_parts() -> None:
    """Equal logits at any temperature: CE ln 4; the teacher's 1/2 | 1/2 against 1/4 | 3/4: KL ln(4/3) / 2."""
    teacher = TeacherTargets(torch.tensor([[2]]), torch.tensor([[math.log(0.5)]]), torch.tensor([True]))
    loss = run(ForwardKl(weight=0.25, temperature=2.0), torch.zeros(1, 4), torch.tensor([2]), teacher, gradient=False)
    assert loss.item() == pytest.approx(0.75 * math.log(4) + 0.25 * 4 * 0.5 * math.log(4 / 3), abs=1e-6)


@pytest.mark.parametrize("kind", KLS)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_divergence_is_never_negative_nor_above_the_whole_vocabularys_and_equals_it_when_all_is_kept(
    kind: Kl, temperature: float
) -> None:
    for seed in range(20):
        logits_CV, _, _ = draw(seed)
        teacher_CV, _, _ = draw(seed + 100)
        log_p_CV, log_q_CV = ((one / temperature).log_softmax(-1) for one in (teacher_CV, logits_CV))
        first, second = (log_p_CV, log_q_CV) if kind == "forward_kl" else (log_q_CV, log_p_CV)
        whole_C = (first.exp() * (first - second)).sum(-1)
        before_C = torch.zeros(C, dtype=torch.float64)
        for k in (1, 4, 12, V):
            found_C = divergence(kind, logits_CV, top_k(teacher_CV, k, temperature), temperature)
            assert (found_C >= before_C - 1e-12).all(), "finer buckets tell more apart"
            before_C = found_C
        torch.testing.assert_close(before_C, whole_C, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", KLS)
@pytest.mark.parametrize("temperature", [1.0, 2.0, 3.0])
@pytest.mark.parametrize("k", [1, K, V])
def test_divergence_and_its_gradient_vanish_where_student_and_teacher_agree(kind: Kl, temperature: float, k: int) -> None:
    logits_CV, targets_C, _ = draw(5)
    objective = KLS[kind](weight=1.0, temperature=temperature)
    teacher = top_k(logits_CV, k, temperature)
    loss = run(objective, logits_CV, targets_C, teacher, gradient=True)
    assert abs(loss.item()) < 1e-13 and logits_CV.abs().max() < 1e-14


def test_uniform_tail_and_renormalised_top_k_are_no_substitute_for_log_z_at_the_temperature() -> None:
    """What one is left with when log Z was stored at temperature 1 only: with V = 154,880, K = 128 and t = 2 a uniform tail gave
    0.29 nats where the truth was 0.78. A teacher sure of one token, a tail of unequal ones, a student that is less sure."""
    temperature, vocabulary, k = 2.0, 20_000, 64
    generator = torch.Generator().manual_seed(0)
    teacher_CV = torch.randn(4, vocabulary, generator=generator, dtype=torch.float64) * 3
    logits_CV = teacher_CV + torch.randn(4, vocabulary, generator=generator, dtype=torch.float64)
    teacher_CV[:, 0], logits_CV[:, 0] = teacher_CV.amax(-1) + 8, logits_CV.amax(-1)
    log_p_CV, log_q_CV = ((one / temperature).log_softmax(-1) for one in (teacher_CV, logits_CV))
    truth = (log_p_CV.exp() * (log_p_CV - log_q_CV)).sum(-1).mean()
    found = divergence("forward_kl", logits_CV, top_k(teacher_CV, k, temperature), temperature).mean()
    ids_CK, log_probs_CK, _ = top_k(teacher_CV, k, 1.0)
    tail_C1 = 1 - log_probs_CK.exp().sum(-1, keepdim=True)
    guess_CV = (tail_C1 / (vocabulary - k)).log().expand(-1, vocabulary).scatter(-1, ids_CK, log_probs_CK)
    uniform = divergence("forward_kl", logits_CV, top_k(guess_CV, k, temperature), temperature).mean()
    renormalised_CK = (log_probs_CK / temperature).log_softmax(-1)
    renormalised = (renormalised_CK.exp() * (renormalised_CK - log_q_CV.gather(-1, ids_CK))).sum(-1).mean()
    assert 0.85 * truth < found < truth, (found, truth)
    assert uniform < 0.6 * truth, (uniform, truth)
    assert renormalised > 3 * truth, (renormalised, truth)


# --- numbers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KLS)
@pytest.mark.parametrize("temperature", [1.0, 2.0, 3.0])
@pytest.mark.parametrize("gap", [20.0, 80.0, 300.0])
def test_a_tail_that_the_student_all_but_gave_up_is_exact_in_float32(kind: Kl, temperature: float, gap: float) -> None:
    """1 - sum(q) is 0 in float32 from a gap of 17 nats on, and exp of the gap from 104 on."""
    logits_CV, targets_C, teacher = draw(6, t=temperature)
    logits_CV.scatter_add_(-1, teacher.ids_NK, torch.full((C, K), gap * temperature, dtype=torch.float64))
    leaf_CV = logits_CV.float().double().requires_grad_()
    expected = reference(KLS[kind](weight=1.0, temperature=temperature), leaf_CV, targets_C, teacher)
    found_CV = logits_CV.float()
    teacher = teacher._replace(log_probs_NK=teacher.log_probs_NK.float())
    found = run(KLS[kind](weight=1.0, temperature=temperature), found_CV, targets_C, teacher, gradient=True)
    torch.testing.assert_close(found.double(), expected.detach(), rtol=2e-5, atol=1e-5)
    torch.testing.assert_close(found_CV.double(), torch.autograd.grad(expected, leaf_CV)[0], rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("kind", KLS)
def test_a_teacher_without_a_tail_gives_finite_losses(kind: Kl) -> None:
    """Rounding of half-precision logits may make the kept probabilities sum to more than 1."""
    logits_CV, targets_C, teacher = draw(7)
    teacher = teacher._replace(log_probs_NK=teacher.log_probs_NK.float().log_softmax(-1) + 1e-4)
    found_CV = logits_CV.float()
    loss = run(KLS[kind](weight=1.0), found_CV, targets_C, teacher, gradient=True)
    assert 0 < loss.item() < C * -math.log(TAIL_FLOOR) and found_CV.isfinite().all()
    # each position's gradient is one of a shift-invariant function, but for what the probabilities have above 1
    assert found_CV.sum(-1).abs().max() < 1e-5


@pytest.mark.parametrize(
    "objective", [CrossEntropy(), ForwardKl(temperature=2.0), ReverseKl(temperature=2.0)], ids=lambda o: o.type
)
def test_float32_of_a_real_vocabulary_equals_float64(objective: Objective) -> None:
    generator = torch.Generator().manual_seed(0)
    logits_CV = torch.randn(5, 65_536, generator=generator) * 4
    teacher = top_k(logits_CV + torch.randn(logits_CV.shape, generator=generator), 128, 2.0)
    targets_C = teacher.ids_NK[:, 1]
    exact_CV = logits_CV.double()
    expected = run(objective, exact_CV, targets_C, teacher, gradient=True)
    found = run(objective, logits_CV, targets_C, teacher._replace(log_probs_NK=teacher.log_probs_NK.float()), gradient=True)
    assert len(logits_CV) > BLOCK_ELEMENTS // 65_536
    assert found.item() == pytest.approx(expected.item(), rel=2e-6)
    torch.testing.assert_close(logits_CV.double(), exact_CV, rtol=1e-4, atol=1e-6)


def test_every_objective_of_a_recipe_is_there() -> None:
    assert set(OBJECTIVES) == {one.model_fields["type"].default for one in (CrossEntropy, *KLS.values())}
    assert chunk_loss(ReverseKl(temperature=2.0)).temperature == 2.0
