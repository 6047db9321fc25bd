import jax
import jax.numpy as jnp
import numpy as np

from jaxnum.tour import _poisson as stop
from tests.tolerances import tolerance


def dense(function, n):
    eye = jnp.eye(n * n).reshape(-1, n, n)
    return np.asarray(jax.vmap(function)(eye).reshape(n * n, n * n))


def test_stencil_has_the_eigenvalues_of_the_continuous_problem(x64):
    n = 64
    centres = (jnp.arange(n) + 0.5) / n
    u = jnp.outer(jnp.sin(jnp.pi * centres), jnp.sin(2 * jnp.pi * centres))
    discrete = 4 * n**2 * (np.sin(np.pi / (2 * n)) ** 2 + np.sin(np.pi / n) ** 2)
    np.testing.assert_allclose(stop.laplacian(u), discrete * u, rtol=0, atol=discrete * tolerance("float64", n**2))
    assert abs(discrete / (5 * np.pi**2) - 1) < 1e-2


def test_v_cycle_is_symmetric_positive_definite_and_close_to_the_inverse(x64):
    n = 16
    cycle, matrix = dense(stop.v_cycle, n), dense(stop.laplacian, n)
    size = np.abs(cycle).max()
    np.testing.assert_allclose(cycle, cycle.T, rtol=0, atol=size * tolerance("float64", n**2))
    spectrum = np.linalg.eigvals(cycle @ matrix)
    np.testing.assert_allclose(spectrum.imag, 0, atol=tolerance("float64", n**2, condition=1e4))
    assert spectrum.real.min() > 0.7
    assert spectrum.real.max() < 1.3


def test_interpolation_is_exact_on_lines_away_from_the_walls(x64):
    coarse = 2.0 * np.arange(8) + 0.5
    fine = np.asarray(stop.interpolation(8, jnp.float64) @ coarse)
    np.testing.assert_allclose(fine[1:-1], np.arange(1, 15), rtol=tolerance("float64", 16))


def test_stop_reports_what_it_claims():
    found = stop.poisson(n=32, side=8, steps=160)
    rows = dict(found.rows)
    plain = int(rows["steps, CG"])
    quick = int(rows["steps, CG with a multigrid V-cycle"].split()[0])
    errors = rows["relative error against scipy's direct solver, CG / multigrid CG"].split(" / ")
    assert 4 * quick < plain
    assert max(map(float, errors)) < 1e-8
    cg, ssor, deep = map(int, rows["steps to 1e-04 on 16 x 16 cells, CG / SSOR-CG / dcdm"].split(" / "))
    assert ssor < cg
    assert deep < cg
