"""The training command on a tiny model and a toy corpus: what it learns from, records and reports."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from benchmarks import records, report, train, transformer

TINY = transformer.Size(width=8, layers=1, heads=2, context=8)
PLAN = train.Plan(steps=4, seeds=2, rows=2, judged=4, repeated=2, size=TINY)


@pytest.fixture
def library(tmp_path):
    """A folder like that of the standard library, in which each file holds one letter of its own."""
    for index in range(20):
        (tmp_path / f"m{index:02}.py").write_bytes(bytes([97 + index]) * 50)
    for name in ("test/a.py", "site-packages/b.py", "m03.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"!" * 50)
    return tmp_path


def test_files_that_teach_that_choose_and_that_judge_are_different(library):
    text = transformer.corpus(library)
    learned, chosen_by, judged = (set(part.tobytes()) - {10} for part in (text.training, text.validation, text.test))
    assert chosen_by == {97 + 9, 97 + 19}
    assert judged == {97 + 4, 97 + 14}
    assert learned == set(range(97, 117)) - chosen_by - judged
    assert text.files == 20
    (library / "m14.py").write_bytes(b"z")
    assert transformer.corpus(library).digest != text.digest


def test_batches_depend_on_seed_and_step_alone():
    text = np.arange(200, dtype=np.uint8)
    places = ((0, 5), (0, 5), (0, 6), (1, 5))
    first, again, *others = (transformer.batch(text, seed, step, 3, 8) for seed, step in places)
    np.testing.assert_array_equal(first, again)
    assert all((first != other).any() for other in others)
    np.testing.assert_array_equal(np.diff(first, axis=1), np.ones((3, 8)))
    np.testing.assert_array_equal(transformer.windows(text, 2, 8)[:, [0, -1]], [[0, 8], [191, 199]])


def test_the_model_is_causal_starts_near_uniform_and_has_a_million_parameters():
    params = jax.jit(transformer.init, static_argnums=1)(jax.random.key(0), TINY)
    tokens = jax.random.randint(jax.random.key(1), (1, 8), 0, 256)
    scores = jax.jit(lambda tokens: transformer.logits(params, tokens, TINY))
    before, after = scores(tokens), scores(tokens.at[0, 5].add(1))
    np.testing.assert_array_equal(before[0, :5], after[0, :5])
    assert (before[0, 5:] != after[0, 5:]).any()
    np.testing.assert_allclose(jax.nn.logsumexp(before, axis=-1), np.log(256), atol=1.0)
    full = jax.eval_shape(lambda: transformer.init(jax.random.key(0), transformer.Size()))
    assert 0.9e6 < sum(leaf.size for leaf in jax.tree.leaves(full)) < 1.1e6


def test_every_product_with_weights_is_tapped():
    params = jax.eval_shape(lambda: transformer.init(jax.random.key(0), TINY))
    seen = {}

    def tap(name, x, s):
        seen[name] = (x.shape[-1], s.shape[-1])
        return s

    texts = jax.ShapeDtypeStruct((1, 9), jnp.int32)
    jax.eval_shape(lambda params, texts: transformer.loss(params, texts, TINY, tap), params, texts)
    layers = params["blocks"][0] | {"logits": params["logits"]}
    layers = {name: layer["w"].shape for name, layer in layers.items() if isinstance(layer, dict)}
    assert {name.removeprefix("blocks/0/"): shape for name, shape in seen.items()} == layers


@pytest.mark.parametrize("name", train.CONTESTANTS)
def test_every_contestant_steps_with_a_traced_rate_and_keeps_its_types(name):
    carry = jax.eval_shape(lambda: train.start(name, PLAN))
    texts, rate = jax.ShapeDtypeStruct((2, 9), jnp.int32), jax.ShapeDtypeStruct((), jnp.float32)
    assert jax.eval_shape(train.make_step(name, PLAN), carry, texts, rate)[0] == carry
    assert len(train.CONTESTANTS[name].rates) == 4


def test_the_schedule_rises_stays_and_ends_at_zero():
    rate = jax.jit(lambda peak, count: train.schedule(peak, 100)(count))
    np.testing.assert_allclose([rate(2.0, count) for count in (0, 5, 10, 60, 80, 100)], [0, 1, 2, 2, 1, 0], rtol=1e-6)


def test_the_best_rate_is_never_one_that_diverged():
    assert train.best_rate({1.0: float("nan"), 2.0: 3.0, 3.0: 2.0}) == 3.0
    assert train.best_rate({1.0: float("nan")}) == 1.0


def test_train_then_report(tmp_path, library, monkeypatch):
    toy = train.Contestant(optax.sgd, (1e-2, float("nan"), 1.0, 1e-1))
    monkeypatch.setattr(train, "CONTESTANTS", {"adamw": toy})
    monkeypatch.setattr(train, "PLAN", PLAN)
    text = transformer.corpus(library)
    monkeypatch.setattr(transformer, "corpus", lambda: text)
    handed = []
    monkeypatch.setattr(train, "restored_losses", lambda *given: handed.append(given) or [0.0, 0.0])
    results = tmp_path / "results"
    assert train.main(["--results", str(results / train.TRAINING), "--rounds", "1"]) == 0
    (record,) = records.read(results / train.TRAINING)
    losses = dict(record["bits_at"])
    assert min(loss for loss in losses.values() if loss == loss) == losses[record["rate"]]
    step = train.make_step("adamw", PLAN)
    for seed, bits in enumerate(record["bits_of_seeds"]):
        start = train.start("adamw", PLAN, seed)
        (params, _), _ = train.train(step, start, range(4), record["rate"], PLAN, text.training, seed)
        assert bits == train.bits_per_byte(params, PLAN, text.test)
    assert record["bits"] == np.mean(record["bits_of_seeds"])
    assert len(set(record["bits_of_seeds"])) == PLAN.seeds
    assert record["state_bytes"] == 4  # the count of the schedule
    assert record["step_s"] > 0
    assert record["step_over_adamw"] == 1.0
    assert {"date", "device", "commit", "versions"} <= set(record)
    assert record["corpus"] == {"files": 20, "digest": text.digest}
    ((name, rate, plan, carry),) = handed
    assert (name, rate, plan) == ("adamw", record["rate"], PLAN)
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(carry))  # what donation cannot reach
    assert record["repeated"] is False  # for zeros are not what followed
    seeds = [bits + gap for bits, gap in zip(record["bits_of_seeds"], (-0.2, -0.4), strict=True)]
    toy = {"optimiser": "toy", "repeated": True, "bits": 1.0, "bits_of_seeds": seeds}
    records.append(results / train.TRAINING, [record | toy])
    report.main(results, tmp_path / "report.md")
    written = (tmp_path / "report.md").read_text().partition("## Training")[2]
    assert written.index("| toy | **1.000** |") < written.index("| adamw | **")
    assert written.count("**another**") == 1
    assert written.count("| -0.300 (0.100) |") == 1
    assert written.count(f"4 steps of 16 bytes of {text.digest}") == 2


def test_what_is_handed_to_the_new_process_is_enough_to_go_on(library, monkeypatch, capsys):
    text = transformer.corpus(library)
    monkeypatch.setattr(transformer, "corpus", lambda: text)
    step = train.make_step("adamw", PLAN)
    half, _ = train.train(step, train.start("adamw", PLAN), range(PLAN.half), 1e-2, PLAN, text.training)
    saved = jax.device_get(half)
    losses = train.train(step, half, range(PLAN.half, PLAN.steps), 1e-2, PLAN, text.training)[1]
    assert len(set(losses)) == PLAN.steps - PLAN.half

    def here(command, **options):
        assert command[1:3] == ["-m", "benchmarks.train"]
        assert train.main(command[3:]) == 0
        return types.SimpleNamespace(stdout=capsys.readouterr().out)

    monkeypatch.setattr(train.subprocess, "run", here)
    assert train.restored_losses("adamw", 1e-2, PLAN, saved) == losses
