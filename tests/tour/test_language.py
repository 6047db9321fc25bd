import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxnum.tour import _language as stop

MIXERS = [stop.softmax(16, 2), stop.delta(16, 2)]


@pytest.mark.parametrize("mixer", MIXERS, ids=("attention", "gated delta net"))
def test_a_prediction_does_not_see_what_follows(mixer):
    params = stop.model(jax.random.key(0), mixer, 16, 2)
    tokens = jnp.arange(20)[None]
    changed = tokens.at[0, 12].set(99)
    before, after = (np.asarray(stop.logits(params, mixer, t)) for t in (tokens, changed))
    np.testing.assert_allclose(before[:, :12], after[:, :12], rtol=1e-4, atol=1e-5)
    assert np.abs(before[:, 12:] - after[:, 12:]).max() > 1e-3


def test_a_step_goes_on_from_what_was_read():
    mixer = MIXERS[1]
    params = stop.model(jax.random.key(0), mixer, 16, 2)
    tokens = jnp.arange(30, 35)[None]
    want, states = stop.logits(params, mixer, tokens), [mixer.start(1)] * 2
    for t in range(tokens.shape[1]):
        got, states = stop.step_logits(params, mixer, tokens[:, t], states)
        np.testing.assert_allclose(got, want[:, t], rtol=1e-4, atol=1e-5)


def test_sources_are_text_and_the_unseen_ones_are_not_learned():
    text = stop.library_sources()
    assert text.train.size > 1_000_000
    assert text.held_out.size > 100_000
    assert b"import" in text.train.tobytes()


def test_stop_learns_and_writes():
    found = stop.language(steps=20, length=32, longer=2, written=64, batch=4, width=32, heads=2, layers=1)
    rows = dict(found.rows)
    for name in ("attention", "gated delta net"):
        before, after = (float(rows[f"{name}: bits a byte on unseen files, {when}"]) for when in ("before", "after"))
        assert before == pytest.approx(8, abs=0.5)
        assert after < before - 1
