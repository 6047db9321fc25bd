"""The driver beyond the contract: options, phases, batches, printing, progress, nonsense arguments."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxnum
from jaxnum import FixedPoint, Status
from jaxnum.solvers import halpern, phase, picard, restarted, then, warm_started
from tests.compiles import count_compiles


def halve(x):
    return 0.5 * x + 1


def closer(x, problem):
    return jnp.full_like(x, 1.9)


def test_phases_have_their_own_loops_tolerances_and_steps(x64):
    both = then(phase(picard(), rtol=1e-2), phase(picard(damping=0.5), max_steps=3), picard())
    solution = jaxnum.fixed_point(halve, jnp.zeros(3), solver=both, history=True)
    assert solution.phase_steps.shape == (3,)
    assert int(solution.phase_steps[1]) == 3
    assert int(solution.steps) == int(solution.phase_steps.sum())
    np.testing.assert_allclose(solution.x, 2.0, atol=1e-7)
    recorded = np.isfinite(np.asarray(solution.history)).sum()
    assert recorded == int(solution.steps) + 3  # each phase records its start
    nested = then(then(phase(picard(), max_steps=2)), halpern(contraction=0.5))
    assert jaxnum.fixed_point(halve, jnp.zeros(3), solver=nested).phase_steps.shape == (2,)


def test_phases_under_vmap_equal_a_loop(x64):
    both = then(phase(picard(), rtol=1e-2), halpern(contraction=0.5))
    f = lambda c: jaxnum.fixed_point(lambda x: 0.5 * x + c, jnp.zeros(2), solver=both)  # noqa: E731
    cs = jnp.array([1.0, 10.0, 0.1])
    many = jax.vmap(f)(cs)
    for i, c in enumerate(cs):
        one = f(c)
        np.testing.assert_allclose(many.x[i], one.x, atol=1e-7)
        assert np.max(np.abs(many.phase_steps[i] - one.phase_steps)) <= 1


def test_no_residual_is_small_beside_a_scale_that_overflows(x64):
    """The norm of T(x) = 2 x + 1 becomes infinite one step before that of x - T(x)."""
    solution = jaxnum.fixed_point(lambda x: 2 * x + 1, jnp.zeros(3), on_failure="return")
    assert int(solution.status) == Status.nonfinite
    assert np.all(np.isfinite(solution.x))


def test_warm_started_computes_its_start_from_the_problem(x64):
    cold = jaxnum.fixed_point(halve, jnp.zeros(2))
    warm = jaxnum.fixed_point(halve, jnp.zeros(2), solver=warm_started(picard(), closer))
    assert int(warm.steps) < int(cold.steps)
    np.testing.assert_allclose(warm.x, cold.x, atol=1e-7)


def test_solve_batched_gives_each_problem_its_own_steps(x64):
    rates = jnp.array([0.1, 0.5, 0.9])
    problem = FixedPoint(lambda x, r: r * x + 1, (rates,))
    solution = jaxnum.solve_batched(picard(), jnp.zeros((3, 2)), problem)
    single = [jaxnum.fixed_point(lambda x, r: r * x + 1, jnp.zeros(2), r) for r in rates]
    np.testing.assert_array_equal(solution.steps, [int(s.steps) for s in single])
    shared = jaxnum.solve_batched(picard(), jnp.zeros(2), problem, in_axes=(None, 0))
    np.testing.assert_allclose(shared.x, solution.x)
    prefix = FixedPoint(None, (0,))
    spelled = jaxnum.solve_batched(picard(), jnp.zeros((3, 2)), problem, in_axes=(0, prefix))
    np.testing.assert_allclose(spelled.x, solution.x)

    def total(rates):
        problem = FixedPoint(lambda x, r: r * x + 1, (rates,))
        return jaxnum.solve_batched(picard(), jnp.zeros((3, 2)), problem).x.sum()

    np.testing.assert_allclose(jax.grad(total)(rates), 2 / (1 - rates) ** 2, rtol=1e-6)


def test_solve_batched_compiles_nothing_on_the_second_call(x64):
    def call(c):
        problem = FixedPoint(lambda x, r: r * x + jnp.sin(c), (jnp.array([0.1, 0.2]),))
        return jaxnum.solve_batched(picard(), x0, problem)

    x0, c, d = jnp.zeros((2, 3)), jnp.ones(3), jnp.zeros(3)
    call(c)
    with count_compiles() as compiled:
        call(d)
    assert compiled() == 0


def test_solve_batched_names_disagreeing_axes():
    problem = FixedPoint(lambda x, r: r * x, (jnp.ones(4),))
    with pytest.raises(ValueError, match=r"solve_batched: `in_axes` must select axes of one size; got \[3, 4\]"):
        jaxnum.solve_batched(picard(), jnp.zeros((3, 2)), problem)


def test_new_hyperparameters_and_tolerances_compile_nothing(x64):
    x0 = jnp.zeros(5)
    jaxnum.fixed_point(halve, x0, solver=picard(damping=0.9))
    with count_compiles() as compiled:
        jaxnum.fixed_point(halve, x0, solver=picard(damping=0.8), rtol=1e-5, atol=1e-5)
    assert compiled() == 0


def test_scan_over_solves(x64):
    def body(x, c):
        x = jaxnum.fixed_point(lambda x: 0.5 * x + c, x).x
        return x, x

    _, xs = jax.lax.scan(body, jnp.zeros(()), jnp.arange(3.0))
    np.testing.assert_allclose(xs, [0, 2, 4], atol=1e-6)


def test_a_solution_prints_shapes_and_status():
    text = repr(jaxnum.fixed_point(halve, jnp.zeros((3, 2))))
    assert "float32[3, 2]" in text
    assert "status=converged" in text
    assert len(text) < 200
    traced = jax.eval_shape(lambda x: jaxnum.fixed_point(halve, x), jnp.zeros(3))
    assert "float32[3]" in repr(traced)


@pytest.mark.parametrize("kind", ["text", "tqdm"])
def test_progress_is_visible_before_the_first_step(kind, capfd):
    jaxnum.fixed_point(halve, jnp.zeros(3), progress=kind, max_steps=50)
    jax.effects_barrier()
    shown = capfd.readouterr().err
    assert "0" in shown
    assert ("starting" if kind == "text" else "step") in shown
    assert "residual" in shown


def test_failed_solve_raises_when_eager_and_returns_when_traced():
    with pytest.raises(jaxnum.SolverError, match=r"picard: max_steps after 3 steps, residual .*\. The step limit") as e:
        jaxnum.fixed_point(lambda x: x + 1, jnp.zeros(2), max_steps=3)
    assert e.value.status is Status.max_steps
    assert e.value.solution.x.shape == (2,)
    traced = jax.jit(lambda x: jaxnum.fixed_point(lambda x: x + 1, x, max_steps=3))(jnp.zeros(2))
    assert int(traced.status) == Status.max_steps


def test_every_status_has_a_sentence():
    for status in Status:
        assert jaxnum.sentence(status).endswith(".")


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"adjoint": "magic"}, "solve: `adjoint` must be one of 'implicit', 'unrolled', 'none'; got 'magic'"),
        ({"on_failure": "hide"}, "solve: `on_failure` must be one of 'raise', 'return'; got 'hide'"),
        ({"check_every": 0}, "solve: `check_every` must be a Python int >= 1; got 0"),
        ({"checkpoint_every": 5}, 'solve: `checkpoint_every` must be None unless adjoint="unrolled"; got 5'),
        ({"progress": "bar"}, "solve: `progress` must be one of None, 'text', 'tqdm'; got 'bar'"),
    ],
)
def test_bad_options(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        jaxnum.solve(picard(), jnp.zeros(2), FixedPoint(halve), **options)


def test_bad_combinators():
    with pytest.raises(ValueError, match="then: `members` must hold at least one solver"):
        then()
    with pytest.raises(ValueError, match=r"restarted: `factor` must be in \(0, 1\); got 1.5"):
        restarted(halpern(), factor=1.5)
    with pytest.raises(ValueError, match="restarted: `every` must be at least 1; got 0"):
        restarted(halpern(), every=0)
    with pytest.raises(ValueError, match="phase: `max_steps` must be a Python int >= 0; got -1"):
        phase(picard(), max_steps=-1)
