import itertools
import math
import re

import numpy as np
import pytest
import torch

from skdim.objectives import donsker_varadhan, f_divergence, infonce, jsd

OBJECTIVES = {"infonce": infonce, "jsd": jsd, "dv": donsker_varadhan}
SHAPES = [(2, 1, 1), (2, 1, 3), (2, 5, 1), (3, 4, 7), (5, 9, 2), (4, 6, 18), (8, 16, 112)]
RELATIVE_ERROR = {torch.float32: 2e-6, torch.float64: 1e-9}


def infonce_by_formula(positive, negative):
    terms = []
    for own, others in zip(positive, negative, strict=True):
        terms += [np.log(np.exp(score) + np.exp(others).sum()) - score for score in own]
    return np.mean(terms)


def jsd_by_formula(positive, negative):
    return np.log(1 + np.exp(-positive)).mean() + np.log(1 + np.exp(negative)).mean()


def donsker_varadhan_by_formula(positive, negative):
    return np.log(np.exp(negative).mean()) - positive.mean()


FORMULAS = {"infonce": infonce_by_formula, "jsd": jsd_by_formula, "dv": donsker_varadhan_by_formula}


def infonce_by_logaddexp(positive, negative):
    log_sum = np.logaddexp.reduce(negative, axis=1)
    return (np.logaddexp(positive, log_sum[:, None]) - positive).mean()


def jsd_by_logaddexp(positive, negative):
    return np.logaddexp(0, -positive).mean() + np.logaddexp(0, negative).mean()


def donsker_varadhan_by_logaddexp(positive, negative):
    return np.logaddexp.reduce(negative, axis=None) - np.log(negative.size) - positive.mean()


STABLE_FORMULAS = {
    "infonce": infonce_by_logaddexp,
    "jsd": jsd_by_logaddexp,
    "dv": donsker_varadhan_by_logaddexp,
}


def loss_and_gradients(name, positive, negative, dtype=torch.float64):
    positive = torch.tensor(positive, dtype=dtype, requires_grad=True)
    negative = torch.tensor(negative, dtype=dtype, requires_grad=True)
    loss = OBJECTIVES[name](positive, negative)
    loss.backward()
    return loss.detach(), positive.grad, negative.grad


def normal_scores(shape, scale=3.0, seed=0):
    n_images, n_locations, n_negatives = shape
    rng = np.random.default_rng(seed)
    return scale * rng.standard_normal((n_images, n_locations)), scale * rng.standard_normal((n_images, n_negatives))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", OBJECTIVES)
def test_random_scores_give_the_formula(name, shape, dtype):
    positive, negative = (torch.tensor(scores, dtype=dtype) for scores in normal_scores(shape))
    loss = OBJECTIVES[name](positive, negative)
    assert loss.shape == ()
    assert loss.dtype == dtype
    expected = FORMULAS[name](positive.double().numpy(), negative.double().numpy())
    tolerance = RELATIVE_ERROR[dtype]
    np.testing.assert_allclose(loss.double().numpy(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("score", [0.0, 2.5, -7.0])
def test_equal_scores_give_chance(shape, dtype, score):
    n_images, n_locations, n_negatives = shape
    positive = torch.full((n_images, n_locations), score, dtype=dtype)
    negative = torch.full((n_images, n_negatives), score, dtype=dtype)
    tolerance = {"rel": RELATIVE_ERROR[dtype], "abs": RELATIVE_ERROR[dtype]}
    assert infonce(positive, negative).item() == pytest.approx(math.log(1 + n_negatives), **tolerance)
    assert donsker_varadhan(positive, negative).item() == pytest.approx(0, **tolerance)
    if score == 0:
        assert jsd(positive, negative).item() == pytest.approx(2 * math.log(2), **tolerance)


@pytest.mark.parametrize("name", ["infonce", "dv"])
def test_a_shift_of_all_scores_changes_nothing(name):
    positive, negative = normal_scores((3, 4, 7))
    plain = loss_and_gradients(name, positive, negative)
    shifted = loss_and_gradients(name, positive + 50, negative + 50)
    for value, expected in zip(shifted, plain, strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_higher_positives_and_lower_negatives_lower_the_loss(name):
    _, positive_gradient, negative_gradient = loss_and_gradients(name, *normal_scores((3, 4, 7)))
    assert (positive_gradient < 0).all()
    assert (negative_gradient > 0).all()


def limits(name, positive_sign, negative_sign, shape):
    """Loss, gradient of each positive, gradient of each negative at scores of +-1e4."""
    n_images, n_locations, n_negatives = shape
    per_positive, per_negative = 1 / (n_images * n_locations), 1 / (n_images * n_negatives)
    if name == "jsd":
        wrong_positive, wrong_negative = positive_sign < 0, negative_sign > 0
        loss = 1e4 * (wrong_positive + wrong_negative)
        return loss, -per_positive * wrong_positive, per_negative * wrong_negative
    if name == "dv":
        return 1e4 * (negative_sign - positive_sign), -per_positive, per_negative
    if positive_sign == negative_sign:
        miss = n_negatives / (1 + n_negatives)
        return math.log(1 + n_negatives), -per_positive * miss, per_negative * miss
    if positive_sign > negative_sign:
        return 0.0, 0.0, 0.0
    return 2e4 + math.log(n_negatives), -per_positive, per_negative


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(2, 1, 1), (3, 4, 7)])
@pytest.mark.parametrize(("positive_sign", "negative_sign"), list(itertools.product((1, -1), repeat=2)))
@pytest.mark.parametrize("name", OBJECTIVES)
def test_huge_scores_reach_the_limits(name, positive_sign, negative_sign, shape, dtype):
    n_images, n_locations, n_negatives = shape
    values = loss_and_gradients(
        name,
        np.full((n_images, n_locations), positive_sign * 1e4),
        np.full((n_images, n_negatives), negative_sign * 1e4),
        dtype,
    )
    for value, expected in zip(values, limits(name, positive_sign, negative_sign, shape), strict=True):
        # The last digit of 1e4 in float32 is 1e-3, which is what the gradient of a difference of such scores can lose.
        tolerance = 1e-3 if dtype == torch.float32 else 1e-9
        torch.testing.assert_close(value, torch.full_like(value, expected), rtol=tolerance, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("name", OBJECTIVES)
def test_huge_scores_of_mixed_signs_stay_finite(name, seed, dtype):
    rng = np.random.default_rng(seed)
    positive = rng.choice([-1e4, 1e4, 0.0], (4, 5))
    negative = rng.choice([-1e4, 1e4, 0.0], (4, 9))
    loss, positive_gradient, negative_gradient = loss_and_gradients(name, positive, negative, dtype)
    expected = STABLE_FORMULAS[name](positive, negative)
    np.testing.assert_allclose(loss.double().numpy(), expected, rtol=1e-6)
    assert torch.isfinite(positive_gradient).all()
    assert torch.isfinite(negative_gradient).all()


@pytest.mark.parametrize("name", OBJECTIVES)
def test_gradients_pass_gradcheck(name):
    positive, negative = (torch.tensor(scores, requires_grad=True) for scores in normal_scores((3, 4, 7)))
    assert torch.autograd.gradcheck(OBJECTIVES[name], (positive, negative))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_infonce_takes_no_notice_of_minus_infinity(dtype):
    positive, negative = normal_scores((3, 4, 7))
    excluded = np.zeros_like(negative, dtype=bool)
    excluded[0, :2], excluded[1, 3], excluded[2, 1:] = True, True, True
    expected = np.mean(
        [infonce_by_formula(positive[[i]], negative[i][~excluded[i]][None]) for i in range(len(negative))]
    )
    loss, positive_gradient, negative_gradient = loss_and_gradients(
        "infonce", positive, np.where(excluded, -np.inf, negative), dtype
    )
    assert loss.item() == pytest.approx(expected, rel=RELATIVE_ERROR[dtype])
    assert torch.isfinite(positive_gradient).all()
    assert torch.isfinite(negative_gradient).all()
    assert (negative_gradient[torch.from_numpy(excluded)] == 0).all()
    assert (negative_gradient[torch.from_numpy(~excluded)] > 0).all()


def test_infonce_without_any_negative_is_zero():
    positive, negative = normal_scores((3, 4, 7))
    negative[1] = -np.inf
    loss, positive_gradient, _ = loss_and_gradients("infonce", positive, negative)
    expected = (infonce_by_formula(positive[[0]], negative[[0]]) + infonce_by_formula(positive[[2]], negative[[2]])) / 3
    assert loss.item() == pytest.approx(expected, rel=1e-9)
    assert (positive_gradient[1] == 0).all()


def test_infonce_with_a_single_negative_is_logistic_loss():
    positive, negative = (torch.tensor(scores) for scores in normal_scores((4, 1, 1)))
    expected = torch.nn.functional.binary_cross_entropy_with_logits(positive - negative, torch.ones_like(positive))
    torch.testing.assert_close(infonce(positive, negative), expected)


# The f-GAN forms, maximised: positive term, negative term.
F_GAN = {
    "kl": (lambda t: t, lambda t: np.exp(t - 1)),
    "rkl": (lambda t: -np.exp(-t), lambda t: t - 1),
    "hellinger": (lambda t: 1 - np.exp(-t), lambda t: np.exp(t) - 1),
    "chi2": (lambda t: t, lambda t: t**2 / 4 + t),
}


@pytest.mark.parametrize("divergence", F_GAN)
@pytest.mark.parametrize(("n", "n_locations", "n_negatives"), [(2, 1, 1), (3, 4, 7), (16, 9, 30)])
def test_f_divergence_is_its_formula(divergence, n, n_locations, n_negatives):
    rng = np.random.default_rng(0)
    positive, negative = 3 * rng.standard_normal((n, n_locations)), 3 * rng.standard_normal((n, n_negatives))
    g, conjugate = F_GAN[divergence]
    expected = conjugate(negative).mean() - g(positive).mean()
    loss = f_divergence(torch.from_numpy(positive), torch.from_numpy(negative), divergence)
    assert loss.item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(("divergence", "chance"), [("kl", np.exp(-1)), ("rkl", 0), ("hellinger", 0), ("chi2", 0)])
def test_f_divergence_at_zero_scores(divergence, chance):
    assert f_divergence(torch.zeros(4, 3), torch.zeros(4, 9), divergence).item() == pytest.approx(chance, abs=1e-6)


@pytest.mark.parametrize("divergence", F_GAN)
@pytest.mark.parametrize("positive_sign", [-1e4, 1e4])
@pytest.mark.parametrize("negative_sign", [-1e4, 1e4])
def test_f_divergence_is_finite_at_large_scores(divergence, positive_sign, negative_sign):
    positive = torch.full((2, 3), positive_sign, requires_grad=True)
    negative = torch.full((2, 4), negative_sign, requires_grad=True)
    loss = f_divergence(positive, negative, divergence)
    loss.backward()
    for value in (loss, positive.grad, negative.grad):
        assert torch.isfinite(value).all()
    assert (positive.grad <= 0).all()


@pytest.mark.parametrize("divergence", F_GAN)
def test_f_divergence_gradients(divergence):
    torch.manual_seed(0)
    positive = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    negative = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda p, n: f_divergence(p, n, divergence), (positive, negative))


@pytest.mark.parametrize("objective", [infonce, jsd, donsker_varadhan, f_divergence])
@pytest.mark.parametrize(
    "shapes", [((4, 3), (1, 5)), ((4, 3), (7, 5)), ((4,), (4, 5)), ((4, 3), (4, 0)), ((4, 0), (4, 5))]
)
def test_scores_of_other_shapes_are_refused(objective, shapes):
    positive, negative = (torch.zeros(shape) for shape in shapes)
    with pytest.raises(ValueError, match=re.escape(f"got {shapes[0]} and {shapes[1]}")):
        objective(positive, negative)


def test_an_unknown_divergence_is_refused():
    with pytest.raises(ValueError, match=r"divergence must be one of \['kl', 'rkl', 'hellinger', 'chi2'\], got 'x'"):
        f_divergence(torch.zeros(2, 1), torch.zeros(2, 1), "x")


def test_an_exponential_goes_on_as_its_tangent_beyond_ten():
    # exp(t - 1) of a single negative, at 1 + t for t = 9, 10, 12 and 15.
    for t, factor in ((9, np.exp(-1)), (10, 1), (12, 3), (15, 6)):
        negative = torch.tensor([[1.0 + t]], dtype=torch.float64, requires_grad=True)
        loss = f_divergence(torch.zeros(1, 1, dtype=torch.float64), negative)
        loss.backward()
        assert loss.item() == pytest.approx(factor * np.exp(10))
        # Where both meet, too, which scores in bfloat16 often do.
        assert negative.grad.item() == pytest.approx(min(factor, 1) * np.exp(10))
