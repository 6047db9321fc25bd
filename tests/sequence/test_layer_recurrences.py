"""Whole layers equal their papers' recurrences, written token by token in NumPy float64."""

import jax
import numpy as np
import pytest

from jaxnum.sequence import gated_delta_net, mamba_block, transnormer_block
from tests.tolerances import tolerance

T, WIDTH = 7, 8
X = np.random.default_rng(0).normal(size=(T, WIDTH))


def silu(x):
    return x / (1 + np.exp(-x))


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def softplus(x):
    return np.logaddexp(x, 0)


def rms_norm(x):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)


def convolution(x, kernel, bias=0.0):
    width = len(kernel)
    padded = np.concatenate([np.zeros((width - 1, x.shape[1])), x])
    return np.stack([(padded[t : t + width] * kernel).sum(0) for t in range(T)]) + bias


def compare(layer, recurrence):
    with jax.enable_x64(True):
        params = layer.init(jax.random.key(3))
        got = jax.jit(layer.apply)(params, X)[0]
    want = recurrence({name: np.asarray(p, np.float64) for name, p in params.items()})
    tol = tolerance("float64", T * 64, condition=10)
    np.testing.assert_allclose(got, want, rtol=tol, atol=tol)


@pytest.mark.parametrize("eigenvalues", ["positive", "symmetric"])
def test_mamba_block(eigenvalues):
    N = 3

    def recurrence(p):
        u, z = np.split(X @ p["in"], 2, -1)
        u = silu(convolution(u, p["convolution"], p["convolution_bias"]))
        low, B, C = np.split(u @ p["select"], [len(p["delta"]), len(p["delta"]) + N], -1)
        dt, A = softplus(low @ p["delta"] + p["delta_bias"]), -np.exp(p["A_log"])
        h, y = np.zeros(A.shape), []
        for t in range(T):
            a = np.exp(dt[t][:, None] * A)
            h = (a if eigenvalues == "positive" else 2 * a - 1) * h + (dt[t] * u[t])[:, None] * B[t]
            y.append(h @ C[t] + p["D"] * u[t])
        return (np.array(y) * silu(z)) @ p["out"]

    compare(mamba_block(WIDTH, states=N, eigenvalues=eigenvalues), recurrence)


@pytest.mark.parametrize(
    "options",
    [
        {"eigenvalues": "symmetric"},
        {"decay": "channel", "updates_per_token": 2, "value_heads": 4},
        {"decay": None, "gate": False, "conv_width": 1},
    ],
    ids=("token decay, symmetric", "channel decay, two updates, grouped heads", "plain"),
)
def test_gated_delta_net(options):
    H, K, V = 2, 4, 8
    heads, n = options.get("value_heads", H), options.get("updates_per_token", 1)

    def log_decay(p):
        decay = options.get("decay", "token")
        if decay is None:
            return np.zeros((T, heads, 1))
        x = X @ p["decay_down"] if decay == "channel" else X
        time = softplus(x @ p["decay"] + p["decay_bias"]).reshape(T, heads, -1)
        return -np.exp(p["log_rate"])[:, None] * time

    def recurrence(p):
        mixed = X @ p["qkv"]
        mixed = silu(convolution(mixed, p["convolution"]) if "convolution" in p else mixed)
        q, k, v = np.split(mixed, [H * K, H * K * (1 + n)], -1)
        q, k, v = q.reshape(T, H, K), k.reshape(T, n, H, K), v.reshape(T, n, heads, V)
        q, k = (x / np.sqrt((x**2).sum(-1, keepdims=True) + 1e-6) for x in (q, k))
        beta = sigmoid(X @ p["beta"]).reshape(T, n, heads) * (2 if options.get("eigenvalues") == "symmetric" else 1)
        g, S, o = log_decay(p), np.zeros((heads, K, V)), np.zeros((T, heads, V))
        for t in range(T):
            for h in range(heads):
                own = h // (heads // H)
                S[h] = np.exp(g[t, h])[:, None] * S[h]
                for i in range(n):
                    key = k[t, i, own]
                    S[h] += beta[t, i, h] * np.outer(key, v[t, i, h] - S[h].T @ key)
                o[t, h] = S[h].T @ q[t, own] * K**-0.5
        y = (rms_norm(o) * p["norm"]).reshape(T, -1)
        return (y * silu(X @ p["gate"]) if "gate" in p else y) @ p["out"]

    compare(gated_delta_net(WIDTH, H, **options), recurrence)


@pytest.mark.parametrize(
    "options",
    [{}, {"gate": "linear", "value_activation": None, "relative_phase": True, "layer": 1, "num_layers": 3}],
    ids=("of the model", "linear gate, relative phase, a deeper layer"),
)
def test_transnormer_block(options):
    H, D = 2, 4

    def recurrence(p):
        normed = rms_norm(X)
        q, k, v = np.split(normed @ p["qkv"], 3, -1)
        v = silu(v) if options.get("value_activation", "silu") else v
        q, k, v = (x.reshape(T, H, D) for x in (silu(q), silu(k), v))
        if "phase" in p:
            angle = np.arange(T)[:, None, None] * p["phase"]
            q, k = (np.concatenate([x * np.cos(angle), x * np.sin(angle)], -1) for x in (q, k))
        factor = 1 - 1 / 2 + 1e-5 if options.get("layer") else 1.0
        slopes, o = factor * 2.0 ** (-8 * np.arange(1, H + 1) / H), np.zeros((T, H, D))
        for t in range(T):
            for s in range(t + 1):
                o[t] += (np.exp(-slopes * (t - s)) * (q[t] * k[s]).sum(-1))[:, None] * v[s]
        gate = normed @ p["gate"] if "gate" in p else sigmoid(normed @ p["gate_down"] @ p["gate_up"])
        x = X + (rms_norm(o.reshape(T, H * D)) * gate) @ p["out"]
        first, second = np.split(rms_norm(x) @ p["up"], 2, -1)
        return x + (first * second) @ p["down"]

    compare(transnormer_block(WIDTH, H, **options), recurrence)
