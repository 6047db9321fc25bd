"""Matrices of gradient codes and the equations that decode them, in NumPy's float64."""

from __future__ import annotations

import jax
import numpy as np

from jaxnum.training.coding import generator

KINDS = ("cyclic", "roots", "fractional")


def decodable(stragglers: int, kind: str, alive: np.ndarray) -> np.ndarray:
    """Whether enough workers of the last axis answered."""
    if kind == "fractional":
        groups = alive.shape[-1] // (stragglers + 1)
        return np.asarray(alive.reshape(*alive.shape[:-1], groups, stragglers + 1).any(axis=-1).all(axis=-1))
    return np.asarray(alive.sum(axis=-1) >= alive.shape[-1] - stragglers)


def random_rows(n: int, s: int, key: jax.Array) -> np.ndarray:
    """The cyclic code of random coefficients, [n, n]."""
    H = generator(key).normal(size=(s, n))
    H[:, -1] = -H[:, :-1].sum(axis=1)
    matrix = np.eye(n)
    for i in range(n):
        others = (i + 1 + np.arange(s)) % n
        matrix[i, others] = -np.linalg.solve(H[:, others], H[:, i])
    return matrix


def roots_of_unity(n: int, s: int) -> np.ndarray:
    """The cyclic code of a polynomial with s neighbouring roots of 1, or of -1, around -1; [n, n]."""
    angles = np.pi + 2 * np.pi * (np.arange(s) - (s - 1) / 2) / n
    coefficients = np.poly(np.exp(1j * angles)).real[::-1]
    odd = (n - s) % 2 == 1
    matrix = np.zeros((n, n))
    for i in range(n):
        for k, coefficient in enumerate(coefficients):
            # Where the roots are those of x^n = -1, what wraps around changes its sign.
            matrix[i, (i + k) % n] = coefficient if odd or i + k < n else -coefficient
    if odd:
        return matrix / coefficients.sum()
    # The sines are words of the code, and a square wave's first terms are positive between its jumps.
    frequencies = np.arange(1, n - s, 2)
    word = (np.sin(np.pi * np.outer(np.arange(n) + 0.5, frequencies) / n) / frequencies).sum(axis=1)
    matrix = matrix / word
    return matrix / matrix.sum(axis=0).mean()


def solve(matrix: np.ndarray, alive: np.ndarray) -> np.ndarray:
    """Least a with a^T matrix = 1^T, 0 where not alive."""
    vector = np.zeros(len(matrix))
    vector[alive] = np.linalg.lstsq(matrix[alive].T, np.ones(matrix.shape[1]), rcond=None)[0]
    return vector


def error(matrix: np.ndarray, alive: np.ndarray) -> float:
    """Largest difference of a^T matrix to 1."""
    return float(np.abs(solve(matrix, alive) @ matrix - 1).max())
