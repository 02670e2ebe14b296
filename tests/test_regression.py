"""Linear models per group against NumPy's least squares and other exact answers."""

from importlib import resources

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gdjax import Status
from gdjax.grouping import Groups
from gdjax.losses import named_loss
from gdjax.optimizers import named_optimizer, optax_rules
from gdjax.regression import fit
from gdjax.table import label_column, number_column, read_table

TABLE = read_table(
    resources.files("gdjax") / "data" / "gapminder.csv", ["country", "year", "lifeExp", "gdpPercap", "pop"]
)
YEAR, LIFE, GDP, POP = (number_column(TABLE, name) for name in ("year", "lifeExp", "gdpPercap", "pop"))
COUNTRIES, COUNTRY = label_column(TABLE, "country")
RELATIVE = {"float64": 1e-6, "float32": 1e-3}


def least_squares(x, t, codes, intercept=True):
    """`[N, P + intercept]` weights by NumPy in float64; inputs centred, for good conditioning."""
    answers = []
    for code in range(codes.max() + 1):
        own = x[codes == code]
        centre = own.mean(axis=0) * intercept
        columns = np.column_stack([own - centre, np.ones(len(own))]) if intercept else own
        answer = np.linalg.lstsq(columns, t[codes == code], rcond=None)[0]
        if intercept:
            answer[-1] -= answer[:-1] @ centre
        answers.append(answer)
    return np.array(answers)


@pytest.fixture
def random_groups():
    """Seven groups of 3 to 40 rows in mixed order, two inputs of very different size."""
    rng = np.random.default_rng(7)
    codes = rng.permutation(np.repeat(np.arange(7), [3, 40, 5, 17, 8, 8, 20]))
    x = rng.normal(size=(len(codes), 2)) * [1e-3, 1e6] + [5.0, -3e6]
    return x, x @ [400.0, 2e-6] + rng.normal(size=len(codes)) + codes, codes


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_gapminder_agrees_with_least_squares(dtype):
    result = fit(YEAR[:, None], LIFE, COUNTRY, dtype=dtype)
    assert len(COUNTRIES) == 142
    assert (result.status == Status.CONVERGED).all()
    wanted = least_squares(YEAR[:, None], LIFE, COUNTRY)
    np.testing.assert_allclose(result.weights, wanted[:, :1], rtol=RELATIVE[dtype])
    np.testing.assert_allclose(result.intercept, wanted[:, 1], rtol=RELATIVE[dtype])
    residual = LIFE - result.weights[COUNTRY, 0] * YEAR - result.intercept[COUNTRY]
    mean_loss = np.array([0.5 * (residual[code == COUNTRY] ** 2).mean() for code in range(142)])
    np.testing.assert_allclose(result.loss, mean_loss, rtol=RELATIVE[dtype])


@pytest.mark.parametrize(("dtype", "intercept"), [("float64", True), ("float32", False)])
def test_unsorted_groups_of_different_sizes(random_groups, dtype, intercept):
    x, t, codes = random_groups
    if not intercept:
        x = x - [5.0, -3e6]
    result = fit(x, t, codes, dtype=dtype, intercept=intercept)
    assert (result.status == Status.CONVERGED).all()
    assert result.rows.tolist() == [3, 40, 5, 17, 8, 8, 20]
    wanted = least_squares(x, t, codes, intercept)
    np.testing.assert_allclose(result.weights, wanted[:, :2], rtol=20 * RELATIVE[dtype])
    assert (result.intercept is None) == (not intercept)


def test_no_groups_is_one_group():
    result = fit(YEAR[:, None], LIFE)
    wanted = least_squares(YEAR[:, None], LIFE, np.zeros(len(LIFE), int))
    np.testing.assert_allclose([result.weights[0, 0], result.intercept[0]], wanted[0], rtol=1e-9)


def test_a_random_start_ends_at_the_same_answer_and_is_repeatable():
    plain, one, same, other = (
        fit(YEAR[:, None], LIFE, COUNTRY, seed=seed, steps=steps)
        for seed, steps in [(None, 10_000), (1, 10_000), (1, 10_000), (2, 10_000)]
    )
    np.testing.assert_array_equal(one.weights, same.weights)
    assert (one.weights != other.weights).any()
    np.testing.assert_allclose(one.weights, plain.weights, rtol=1e-7)


def test_a_long_group_among_many_short_ones_is_fitted_as_alone():
    rng = np.random.default_rng(0)
    codes = np.concatenate([np.zeros(1200, int), np.repeat(np.arange(1, 1500), 3)])
    x = rng.normal(size=(len(codes), 1))
    t = 3 * x[:, 0] + codes + rng.normal(size=len(codes))
    batches = list(Groups.of(codes).batches())
    assert len(batches) == 2
    assert sorted(np.concatenate(batches)) == list(range(1500))
    result = fit(x, t, codes)
    np.testing.assert_allclose(
        np.column_stack([result.weights, result.intercept]), least_squares(x, t, codes), rtol=1e-6, atol=1e-9
    )


# Losses, each against an exact answer


def best_line_through_two_points(x, t, loss):
    """A piecewise linear loss is least on a line through two of the points."""
    lines = [
        (slope, t[i] - slope * x[i])
        for i in range(len(x))
        for j in range(i)
        for slope in [(t[i] - t[j]) / (x[i] - x[j])]
    ]
    return min(loss(slope * x + bias, t).mean() for slope, bias in lines)


@pytest.mark.parametrize(
    ("name", "options", "loss"),
    [
        ("absolute", {}, lambda f, t: np.abs(f - t)),
        ("quantile", {"quantile": 0.8}, lambda f, t: np.maximum(0.8 * (t - f), -0.2 * (t - f))),
    ],
)
def test_losses_with_kinks_reach_the_exact_optimum(name, options, loss):
    some = COUNTRY < 10
    result = fit(YEAR[some, None], LIFE[some], COUNTRY[some], loss=name, **options)
    best = [best_line_through_two_points(YEAR[c == COUNTRY], LIFE[c == COUNTRY], loss) for c in range(10)]
    np.testing.assert_allclose(result.loss, best, rtol=1e-6)
    assert (result.status == Status.RAN_ALL_STEPS).all()


@pytest.mark.parametrize(
    ("name", "target", "slope"),
    [
        ("huber", LIFE, lambda f, t: np.clip(f - t, -1, 1)),
        ("poisson", np.round(POP / 1e6), lambda f, t: np.exp(f) - t),
        ("logistic", (GDP > 5000) * 1.0, lambda f, t: 1 / (1 + np.exp(-f)) - t),
    ],
)
def test_smooth_losses_end_where_the_gradient_vanishes(name, target, slope):
    """In the user's units, from the weights that came back."""
    intercept = name != "logistic"
    x, codes = (YEAR[:, None] - 1950) / 10, COUNTRY % 5
    result = fit(x, target, codes, loss=name, intercept=intercept)
    assert (result.status == Status.CONVERGED).all()
    prediction = (x * result.weights[codes]).sum(axis=1)
    if intercept:
        prediction += result.intercept[codes]
    error = slope(prediction, target)
    for code in range(5):
        own = codes == code
        scale = np.abs(error[own]).mean()
        assert abs((error[own] * x[own, 0]).mean()) < 1e-6 * scale
        assert not intercept or abs(error[own].mean()) < 1e-6 * scale


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("squared", lambda f, t: 0.5 * (f - t) ** 2),
        ("absolute", lambda f, t: np.abs(f - t)),
        ("huber", lambda f, t: np.where(abs(f - t) < 2, 0.5 * (f - t) ** 2, 2 * (abs(f - t) - 1))),
        ("quantile", lambda f, t: np.maximum(0.3 * (t - f), -0.7 * (t - f))),
        ("poisson", lambda f, t: np.exp(f) - t * f),
        ("logistic", lambda f, t: np.log1p(np.exp(f)) - t * f),
    ],
)
def test_the_loss_is_told_in_the_users_units(name, value):
    intercept = name not in ("huber", "logistic")
    x, codes = (YEAR[:, None] - 1950) / 10, COUNTRY % 5
    target = {"poisson": np.round(POP / 1e6), "logistic": (GDP > 5000) * 1.0}.get(name, LIFE)
    result = fit(x, target, codes, loss=name, intercept=intercept, delta=2.0, quantile=0.3, steps=20)
    prediction = (x * result.weights[codes]).sum(axis=1)
    if intercept:
        prediction += result.intercept[codes]
    losses = value(prediction, target)
    wanted = [losses[codes == code].mean() for code in range(5)]
    np.testing.assert_allclose(result.loss, wanted, rtol=1e-9)


@pytest.mark.parametrize("name", ["squared", "absolute", "huber", "quantile", "poisson"])
def test_units_of_the_target_change_nothing_but_the_units(name):
    """Steps taken and status are those of the standard problem, whatever the target is counted in."""
    some = COUNTRY < 5
    x, target, codes = YEAR[some, None], np.round(POP[some] / 1e6) + 1, COUNTRY[some]
    one = fit(x, target, codes, loss=name, dtype="float32", steps=300)
    big = fit(x, 1024.0 * target, codes, loss=name, delta=1024.0, dtype="float32", steps=300)
    np.testing.assert_array_equal(one.steps, big.steps)
    np.testing.assert_array_equal(one.status, big.status)
    if name == "poisson":
        np.testing.assert_allclose(big.intercept, one.intercept + np.log(1024), rtol=1e-6)
    else:
        np.testing.assert_allclose(big.weights, 1024 * one.weights, rtol=1e-12)


def log_cosh(prediction, target):
    error = prediction - target
    return jnp.logaddexp(error, -error) - jnp.asarray(np.log(2), error.dtype)


@pytest.mark.parametrize("loss", [log_cosh, f"{__name__}:log_cosh"])
def test_a_users_own_loss(loss):
    x = (YEAR[:, None] - 1980) / 30
    result = fit(x, LIFE / 10, COUNTRY % 3, loss=loss)
    assert (result.status == Status.CONVERGED).all()
    error = LIFE / 10 - (x * result.weights[COUNTRY % 3]).sum(axis=1) - result.intercept[COUNTRY % 3]
    for code in range(3):
        assert abs(np.tanh(error[code == COUNTRY % 3]).mean()) < 1e-9


# Padding


def test_padding_contributes_nothing_not_even_a_nan():
    """log is not finite at a prediction of 0 or below: padding with zeros would spoil value and gradient."""

    def log_error(prediction, target):
        return 0.5 * (jnp.log(prediction) - jnp.log(target)) ** 2

    rng = np.random.default_rng(1)
    codes = np.repeat([0, 1], [30, 3])
    x = rng.uniform(1, 2, (33, 1))
    t = x[:, 0] * np.exp(rng.normal(size=33) / 10)
    # A random start of positive weights: where the logarithm is defined.
    options = {"loss": log_error, "intercept": False, "seed": 6, "learning_rate": 0.1}
    both, alone = fit(x, t, codes, **options), fit(x[30:], t[30:], **options)
    assert (both.status == Status.CONVERGED).all()
    np.testing.assert_allclose(both.weights[1], alone.weights[0], rtol=1e-8)


def test_padded_rows_repeat_the_first_and_own_none():
    groups = Groups.of(np.array([1, 0, 1, 1]))
    index, own = groups.padded(np.array([0, 1]))
    assert index.tolist() == [[0] * 16, [1, 2, 3] + [1] * 13]
    assert own.tolist() == [[True] + [False] * 15, [True] * 3 + [False] * 13]


# What deserves a note


def test_a_group_with_fewer_rows_than_weights_is_solved_and_noted():
    codes = np.array([0, 0, 0, 0, 1, 1, 2])
    x = np.array([[1.0, 2], [2, 1], [3, 5], [4, 4], [1, 7], [2, 8], [3, 3]])
    t = np.array([1.0, 2, 3, 5, 7, 11, 13])
    result = fit(x, t, codes)
    assert (result.status == Status.CONVERGED).all()
    assert ["fewer rows than weights" in note for note in result.notes] == [False, True, True]
    prediction = (x * result.weights[codes]).sum(axis=1) + result.intercept[codes]
    np.testing.assert_allclose(prediction[4:], t[4:], rtol=1e-8)
    assert result.weights[2].tolist() == [0, 0]


@pytest.mark.parametrize("seed", [None, 5])
@pytest.mark.parametrize("constant", [0.1, 0.0, -1e9])
def test_a_constant_input_has_weight_zero_and_a_note(seed, constant):
    x = np.column_stack([np.full(12, constant), YEAR[:12]])
    result = fit(x, LIFE[:12], seed=seed, names=["height", "year"])
    assert result.status[0] == Status.CONVERGED
    assert result.weights[0, 0] == 0
    assert result.notes[0] == "height is constant"
    np.testing.assert_allclose(
        result.weights[0, 1], least_squares(YEAR[:12, None], LIFE[:12], np.zeros(12, int))[0, 0]
    )


def test_a_constant_target_and_an_all_zero_input_without_intercept():
    result = fit(YEAR[:12, None], np.full(12, 0.1))
    assert result.weights[0, 0] == 0
    assert result.intercept[0] == 0.1
    result = fit(np.zeros((12, 1)), LIFE[:12], intercept=False)
    assert result.weights[0, 0] == 0
    assert result.status[0] == Status.CONVERGED


def test_sizes_that_squares_cannot_hold():
    x, t = np.arange(5.0)[:, None], np.array([1.0, 3, 2, 5, 4])
    plain = fit(x, t)
    for factor in (1e200, 1e-200):
        scaled = fit(x * factor, t)
        np.testing.assert_allclose(scaled.weights * factor, plain.weights, rtol=1e-9)


def test_separable_classes_and_counts_of_zero_are_noted():
    codes = np.repeat([0, 1, 2], 4)
    x = np.tile(np.arange(4.0), 3)[:, None]
    classes = np.array([0.0, 0, 1, 1, 0, 1, 0, 1, 1, 1, 1, 1])
    notes = fit(x, classes, codes, loss="logistic", steps=200).notes
    assert ["separable" in note for note in notes] == [True, False, True]
    counts = np.array([0.0, 0, 0, 0, 1, 2, 1, 5, 0, 0, 0, 1])
    notes = fit(x, counts, codes, loss="poisson", steps=200).notes
    assert ["all counts are 0" in note for note in notes] == [True, False, False]


def test_divergence_is_one_groups_affair():
    """A rate between the limits of two curvatures."""

    def half_square(prediction, target):
        return 0.5 * (prediction - target) ** 2

    x = np.array([[1.0], [2], [3], [1], [2], [3]])
    t = np.array([1.0, 2, 4, 100, 200, 400])
    codes = np.repeat([0, 1], 3)
    steep = lambda prediction, target: half_square(prediction, target) * target  # noqa: E731
    result = fit(x, t, codes, loss=steep, learning_rate=0.1, steps=2000)
    assert result.status.tolist() == [Status.CONVERGED, Status.DIVERGED]
    assert np.isfinite(result.weights[0]).all()


# Bad input


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"inputs": np.ones(3)}, r"inputs must be \[rows, P\]"),
        ({"target": np.ones(2)}, r"inputs must be \[rows, P\] and target \[rows\]"),
        ({"inputs": np.ones((0, 1)), "target": np.ones(0)}, "target has no rows"),
        ({"target": np.array([1, np.nan, 2])}, "must be finite"),
        ({"groups": np.array([0, 1])}, "groups has 2 rows, target has 3"),
        ({"groups": np.array([0, 2, 2])}, "leave none out"),
        ({"groups": np.array([0.0, 1, 1])}, "groups must be integers"),
        ({"loss": "square"}, "no loss 'square'; it must be one of squared"),
        ({"loss": "no_such_module:loss"}, "module 'no_such_module' cannot be imported"),
        ({"loss": "math:no_such"}, "has no function 'no_such'"),
        ({"loss": "math:sqrt"}, "fails on"),
        ({"loss": lambda f, t: jnp.sum(f - t)}, r"must be elementwise.* returned \(\)"),
        ({"loss": "logistic"}, "target, row 2: 2 was given; the logistic loss wants 0 or 1"),
        ({"loss": "poisson", "target": np.array([0, 1.5, -1])}, "target, row 3: -1 was given"),
        ({"loss": "quantile", "quantile": 1.0}, "quantile must lie between 0 and 1"),
        ({"loss": "huber", "delta": 0.0}, "delta must be positive"),
        ({"dtype": "float16"}, "dtype must be one of float32, float64"),
        ({"tol": -1.0}, "tol must be 0 or more"),
        ({"steps": 0}, "steps"),
        ({"learning_rate": -1.0}, "learning_rate"),
        ({"device": "gpu:99"}, "gpu"),
    ],
)
def test_bad_input_is_told(change, message):
    arguments = {"inputs": np.arange(3.0)[:, None], "target": np.array([1.0, 2, 3])} | change
    with pytest.raises(ValueError, match=message):
        fit(**arguments)


def test_steps_are_checked_for_losses_with_kinks_too():
    with pytest.raises(ValueError, match="steps"):
        fit(np.arange(3.0)[:, None], np.arange(3.0), loss="absolute", steps=0)


# optax by name


@pytest.mark.parametrize(("name", "rate"), [("adam", 0.05), ("lbfgs", None), ("sgd", 0.5)])
def test_an_optimizer_of_optax(name, rate):
    rule, hyperparams = named_optimizer(name, rate)
    # optax raises a float to an integer power, which strict promotion refuses.
    with jax.numpy_dtype_promotion("standard"):
        result = fit(YEAR[:, None], LIFE, COUNTRY, optimizer=rule, hyperparams=hyperparams, tol=1e-7)
    assert (result.status == Status.CONVERGED).all()
    wanted = least_squares(YEAR[:, None], LIFE, COUNTRY)
    np.testing.assert_allclose(result.weights, wanted[:, :1], rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "rate", "message"),
    [
        ("adamm", 0.1, r"no optimizer 'adamm'; did you mean adam\? It has: adabelief"),
        ("chain", 0.1, "no optimizer 'chain'"),
        ("adam", None, "adam has no learning rate of its own; give one"),
    ],
)
def test_a_wrong_optimizer_is_told(name, rate, message):
    with pytest.raises(ValueError, match=message):
        named_optimizer(name, rate)


@pytest.mark.filterwarnings("ignore:.*deprecated:DeprecationWarning")
def test_every_rule_of_optax_that_is_listed_makes_a_transformation():
    for name, rule in optax_rules().items():
        hyperparams: dict = {} if name == "polyak_sgd" else {"learning_rate": 0.1}
        if name == "noisy_sgd":
            hyperparams |= {"key": jax.random.key(0)}
        assert hasattr(rule(**hyperparams), "update"), name


def test_a_named_loss_is_the_same_function_every_time():
    """So that the second fit compiles nothing."""
    for name in ("squared", "absolute", "huber", "logistic", "poisson", "quantile"):
        assert named_loss(name).elementwise is named_loss(name).elementwise
