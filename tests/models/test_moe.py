"""Experts against loops over tokens in float64 NumPy, and everything a dense decoder does too."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import qat
import qat.nnx
import qat.ptq
from models.mlp import GatedMlp
from models.moe import Router, capacity, mixture, stacked
from models.probe import activations
from models.task import constants_for, language_model, matrix_params
from models.transformer import Transformer, TransformerConfig, inner_rules, split
from qat.policy import Policy, Rules
from qat.training.sharding import make_mesh
from qat.training.step import evaluate, token_losses
from tests.training_checks import STRUCTURE, Walks, batch_at, constants, programs_on, run

CONFIG = TransformerConfig(
    vocabulary=32,
    width=16,
    layers=2,
    heads=4,
    kv_heads=2,
    mlp_width=24,
    experts=4,
    balance=0.5,
)
TOP_2 = dataclasses.replace(CONFIG, experts_per_token=2, capacity_factor=0.75)
TOKENS_BT = jnp.asarray(np.random.default_rng(0).integers(0, 32, (2, 12)))
KV4 = Policy.parse("kv4")
SKIP = "embed|head|.*/router"


@functools.cache
def _made(config, policy):
    """Graph and state of a model whose routers prefer some experts, so that slots are scarce."""

    def make():
        model = Transformer(config, policy, rngs=nnx.Rngs(0))
        kernel = model.blocks.router.kernel
        kernel.set_value(40 * kernel[...])
        return model

    graph = nnx.graphdef(nnx.eval_shape(make))
    return graph, jax.jit(lambda: nnx.state(make()))()


def build(config=TOP_2, policy=None):
    return nnx.clone(nnx.merge(*_made(config, policy)))


@functools.partial(jax.jit, static_argnums=0)
def _logits(graph, state, tokens_BT):
    return nnx.merge(graph, state)(tokens_BT)


def logits(model, tokens_BT=TOKENS_BT):
    return np.asarray(_logits(*nnx.split(model), tokens_BT))


def numpy_expert(params, expert, x_D):
    gate_F, up_F = np.einsum("d,dnf->nf", x_D, params["gate_up"]["kernel"][expert])
    hidden_F = gate_F / (1 + np.exp(-gate_F)) * up_F
    hidden_F = hidden_F / np.sqrt(np.mean(hidden_F**2) + 1e-6) * params["norm"]["scale"][expert]
    return hidden_F @ params["down"]["kernel"][expert]


def numpy_mixture(params, router_DE, x_BTD, per_token, slots):
    """Token by token: its experts, if they have slots left; and how often one had none."""
    update_BTD, dropped = np.zeros_like(x_BTD), 0
    for b in range(len(x_BTD)):
        taken_E = np.zeros(router_DE.shape[1], int)
        for t, x_D in enumerate(x_BTD[b]):
            scores_E = np.exp(x_D @ router_DE)
            probabilities_E = scores_E / scores_E.sum()
            chosen = np.argsort(-probabilities_E, kind="stable")[:per_token]
            total = probabilities_E[chosen].sum() if per_token > 1 else 1
            for expert in chosen:
                taken_E[expert] += 1
                if taken_E[expert] > slots:
                    dropped += 1
                else:
                    gate = probabilities_E[expert] / total
                    update_BTD[b, t] += gate * numpy_expert(params, expert, x_D)
    return update_BTD, dropped


def expert(rngs):
    scale = jax.random.uniform(rngs.params(), (24,), minval=0.5, maxval=1.5)
    mlp = GatedMlp(16, 24, True, 1e-6, jnp.dtype("float32"), inner_rules(None), "mlp", rngs)
    mlp.norm.scale.set_value(scale)
    return mlp


@pytest.mark.parametrize(
    ("per_token", "factor", "slots", "drops"),
    [
        (1, 0.5, 2, True),
        (1, 1.0, 3, True),
        (1, 4.0, 12, False),
        (2, 0.5, 3, True),
        (2, 2.0, 12, False),
    ],
)
def test_updates_equal_a_loop_over_tokens_in_numpy(per_token, factor, slots, drops):
    rngs = nnx.Rngs(1)
    experts, router = stacked(4, expert, rngs), Router(16, 4, per_token, factor, rngs)
    router.kernel.set_value(8 * router.kernel[...])
    x_BTD = jax.random.normal(jax.random.key(2), (2, 12, 16))
    params = jax.tree.map(lambda p: np.asarray(p, np.float64), split(experts)[1])
    router_DE = np.asarray(router.kernel[...], np.float64)
    expected, dropped = numpy_mixture(
        params, router_DE, np.asarray(x_BTD, np.float64), per_token, slots
    )
    assert bool(dropped) == drops
    found = nnx.jit(lambda experts, router, x: mixture(experts, router(x), x))(
        experts, router, x_BTD
    )
    np.testing.assert_allclose(found, expected, rtol=2e-4, atol=2e-5)


def test_capacity_is_of_a_sequence_and_takes_the_factor_as_written():
    assert capacity(128, 4, 1, 1.25) == 40
    assert capacity(128, 4, 2, 1.25) == 80
    assert math.ceil(1.1 * 50 / 5) == 12  # in binary
    assert capacity(50, 5, 1, 1.1) == 11
    assert capacity(1, 8, 1, 1.25) == 1
    assert capacity(6, 4, 2, 10.0) == 6


def test_one_expert_with_room_is_the_dense_decoder():
    """Its probability, the gate, is one."""
    config = dataclasses.replace(CONFIG, experts=1, capacity_factor=1.0)
    shape = dataclasses.replace(CONFIG, experts=0)
    dense = nnx.jit(lambda: Transformer(shape, None, rngs=nnx.Rngs(0)))()
    sparse = nnx.eval_shape(lambda: Transformer(config, None, rngs=nnx.Rngs(0)))
    params = split(dense)[1]
    mlp = jax.tree.map(lambda p: p[:, None], params["blocks"]["mlp"])
    router = {"kernel": jnp.ones((2, 16, 1))}
    graph, _, rest = split(sparse)
    params = {**params, "blocks": {**params["blocks"], "mlp": mlp, "router": router}}
    merged = nnx.merge(graph, params, rest)
    np.testing.assert_allclose(logits(merged), logits(dense), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("config", [dataclasses.replace(CONFIG, capacity_factor=0.5), TOP_2])
def test_a_later_token_does_not_change_earlier_logits(config):
    """Though slots are scarce: of two choices too."""
    model = build(config)
    before = logits(model)
    for place in (3, 7):
        for change in range(1, 5):
            other = TOKENS_BT.at[:, place].set((TOKENS_BT[:, place] + change) % 32)
            after = logits(model, other)
            np.testing.assert_array_equal(before[:, :place], after[:, :place])
            assert (before[:, place:] != after[:, place:]).any()


def test_balance_is_the_product_of_shares_and_probabilities():
    router = Router(16, 4, 2, 1.0, nnx.Rngs(0))
    router.kernel.set_value(8 * router.kernel[...])
    x_BTD = jax.random.normal(jax.random.key(0), (3, 10, 16))
    scores = np.exp(np.asarray(x_BTD, np.float64) @ np.asarray(router.kernel[...], np.float64))
    probabilities = (scores / scores.sum(axis=-1, keepdims=True)).reshape(-1, 4)
    shares = np.bincount(np.argsort(-probabilities)[:, :2].ravel(), minlength=4) / 60
    expected = 4 * (shares * probabilities.mean(axis=0)).sum()
    assert float(router(x_BTD).balance) == pytest.approx(expected, rel=1e-5)
    router.kernel.set_value(jnp.zeros((16, 4)))
    assert float(router(x_BTD).balance) == pytest.approx(1)
    router.kernel.set_value(jnp.ones((16, 4)).at[:, 1].set(2.0))
    router.per_token = 1
    assert float(router(jnp.ones((1, 5, 16))).balance) == pytest.approx(4, rel=1e-4)


def test_gates_of_two_choices_sum_to_one_where_there_is_room():
    routing = Router(16, 4, 2, 2.0, nnx.Rngs(0))(jax.random.normal(jax.random.key(0), (2, 6, 16)))
    np.testing.assert_allclose(routing.combine_BTEC.sum(axis=(2, 3)), 1, rtol=1e-6)
    np.testing.assert_array_equal(routing.dispatch_BTEC.sum(axis=(2, 3)), 2)
    assert routing.dispatch_BTEC.sum(axis=1).max() == 1  # nobody shares a slot


@pytest.fixture(scope="module")
def programs():
    return programs_on(make_mesh(devices=jax.devices()[:1]), CONFIG)


def test_training_lessens_the_balance_too_and_evaluation_does_not(programs):
    task, numbers = language_model(CONFIG, STRUCTURE), constants(config=CONFIG)
    params = jax.jit(task.init)(jax.random.key(0))
    tokens_BS, key = jnp.asarray(batch_at(0)), jax.random.key(1)
    graph = split(nnx.eval_shape(lambda: Transformer(CONFIG, STRUCTURE, rngs=nnx.Rngs(0))))[0]

    @jax.jit
    def parts(params):
        _, balance = nnx.merge(graph, params, numbers).states_and_balance(tokens_BS[:, :-1])
        return token_losses(task, params, numbers, key, tokens_BS).mean(), balance

    plain, balance = map(float, parts(params))
    assert 0.9 < balance < 4
    found = evaluate(programs, params, numbers, Walks(1)).mean()
    assert found == pytest.approx(plain, rel=1e-5)
    state = programs.init_state(jnp.uint32(0))._replace(params=params)
    losses = run(programs, steps=1, config=CONFIG, state=state).losses
    assert losses[1] == pytest.approx(plain + 0.5 * balance, rel=1e-5)


def test_gradients_reach_the_router_and_every_expert():
    task, numbers = language_model(CONFIG, None), constants_for(CONFIG, None)
    tokens_BT = jnp.asarray(batch_at(0))

    @jax.jit
    @jax.grad
    def gradient(params):
        return task.apply(params, numbers, jax.random.key(0), tokens_BT).var()

    blocks = gradient(jax.jit(task.init)(jax.random.key(0)))["blocks"]
    router_LDE, kernels = blocks["router"]["kernel"], blocks["mlp"]
    assert (jnp.abs(router_LDE).max(axis=1) > 0).all()
    for kernel in (kernels["gate_up"]["kernel"], kernels["down"]["kernel"]):
        assert (jnp.abs(kernel).max(axis=tuple(range(2, kernel.ndim))) > 0).all()


def test_decoding_with_the_cache_equals_the_full_pass_where_there_is_room():
    config = dataclasses.replace(TOP_2, capacity_factor=4.0)
    model = build(config, KV4)
    assert capacity(12, 4, config.experts_per_token, 4.0) == 12
    expected = logits(model)
    cache = model.empty_cache(batch=2, length=12)
    graph, state = nnx.split(model)
    step = jax.jit(lambda state, *inputs: nnx.merge(graph, state).decode(*inputs))
    found, cache = step(state, TOKENS_BT[:, :9], jnp.int32(0), cache)
    parts = [found]
    for t in range(9, 12):
        found, cache = step(state, TOKENS_BT[:, t : t + 1], jnp.int32(t), cache)
        parts.append(found)
    np.testing.assert_allclose(jnp.concatenate(parts, axis=1), expected, rtol=1e-4, atol=1e-5)
    graph = nnx.graphdef(nnx.eval_shape(lambda: Transformer(TOP_2, KV4, rngs=nnx.Rngs(0))))
    assert np.abs(logits(nnx.merge(graph, state)) - expected).max() > 1e-3  # drops some


def test_what_is_on_the_way_ends_in_the_logits():
    model = build(TOP_2)
    found = nnx.jit(activations)(model, TOKENS_BT)["logits"]
    np.testing.assert_allclose(found, logits(model), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("config", [CONFIG, TOP_2])
def test_parameters_are_counted(config):
    shapes = jax.eval_shape(language_model(config, None).init, jax.random.key(0))
    sizes = {
        jax.tree_util.keystr(p): s.size for p, s in jax.tree_util.tree_leaves_with_path(shapes)
    }
    inside = {
        path: size for path, size in sizes.items() if "embed" not in path and "head" not in path
    }
    assert config.params == sum(inside.values())
    assert config.kernel_params == sum(n for path, n in inside.items() if "kernel" in path)
    share = config.experts_per_token / 4
    mlp = sum(n for path, n in inside.items() if "['mlp']" in path)
    assert config.active_params == config.params - mlp * (1 - share)
    kernels = sum(n for path, n in inside.items() if "['mlp']" in path and "kernel" in path)
    met = config.kernel_params - kernels * (1 - share)
    assert matrix_params(config) == met + 32 * 16
    dense = dataclasses.replace(config, experts=0)
    assert dense.active_params == dense.params < config.params


def test_a_mesh_changes_no_step(programs):
    """Of two steps: a token that goes elsewhere by the last bit would change all that follow."""
    sharded = programs_on(make_mesh(2, 2, 2), CONFIG)
    kernel = sharded.state_sharding.params["blocks"]["mlp"]["gate_up"]["kernel"]
    assert tuple(kernel.spec) == (None, None, "fsdp", None, "tensor")
    for policy, tolerance in (("none", 1e-5), ("w4a8", 1e-3)):
        one, many = (
            list(run(each, policy, steps=2, config=CONFIG).losses.values())
            for each in (programs, sharded)
        )
        np.testing.assert_allclose(many, one, rtol=tolerance)


@pytest.mark.parametrize("method", ["rtn", "hqq", "gptq", "quarot+gptq"])
def test_experts_are_rounded_each_by_itself_and_routers_not(method):
    """By inputs of their own: their outputs err less than those of rounding to nearest."""
    model = build(TOP_2)
    batches = [jax.random.randint(jax.random.key(i), (4, 16), 0, 32) for i in range(2)]
    rounded, report = qat.ptq.quantize(model, method, "int3/channel", batches, SKIP)
    lines = {line.path: line for line in report}
    mlp = [lines[f"blocks/mlp/{name}/kernel"] for name in ("gate_up", "down")]
    assert all(line.quantized and len(line.output_errors) == 2 for line in mlp)
    assert not lines["blocks/router/kernel"].quantized
    assert np.isfinite(logits(rounded)).all()
    if method == "rtn":
        kernel = model.blocks.mlp.down.kernel[...]
        alone = jax.vmap(jax.vmap(lambda w: qat.fake_quant(w, "int3/channel", axis=0)))(kernel)
        np.testing.assert_allclose(rounded.blocks.mlp.down.kernel[...], alone, rtol=1e-6)
    else:
        for line in mlp:
            assert np.less(line.output_errors, line.rtn_output_errors).all()
    if method == "quarot+gptq":
        assert "not transformed" not in mlp[0].reason
        assert mlp[1].reason.endswith("inputs not transformed: its experts share a layer")


def test_a_rotated_residual_stream_is_the_same_function():
    model = build(TOP_2)
    for index, norm in enumerate((model.blocks.mlp_norm, model.blocks.attention_norm, model.norm)):
        noise = jax.random.normal(jax.random.key(index), norm.scale.shape)
        norm.scale.set_value(1 + 0.3 * noise)
    rotated = nnx.clone(model)
    assert "blocks/router/kernel" in rotated.rotate_residual(3)
    before, after = (m.blocks.router.kernel[...] for m in (model, rotated))
    assert jnp.abs(before - after).max() > 0.1
    np.testing.assert_allclose(logits(rotated), logits(model), rtol=1e-3, atol=1e-4)


def test_rules_of_the_dense_decoder_are_those_of_all_experts():
    rules = Rules([("blocks/mlp/gate_up", "w2a8"), ("blocks/.*", "w4a8"), (".*", None)])
    model = build(TOP_2, Policy.parse("w8a8"))
    qat.nnx.set_policy(model, rules)
    made = build(TOP_2, rules)
    np.testing.assert_array_equal(logits(model), logits(made))
    errors = qat.nnx.quantization_errors(model, TOKENS_BT)
    found = [e for e in errors if e.path == "blocks/mlp/gate_up" and e.operand == "weights"]
    assert [e.index for e in found] == [(layer, i) for layer in range(2) for i in range(4)]
    assert {e.format for e in found} == {"int2/channel"}
    assert len({e.relative_error for e in found}) == 8  # scales of their own


def test_experts_have_noise_and_ranges_of_their_own():
    model = build(
        TOP_2, Policy.parse("weights int4/channel/stochastic, activations int8/tensor/fixed")
    )
    qat.nnx.set_key(model, jax.random.key(2))
    qat.nnx.calibrate(model, [TOKENS_BT])
    ranges_LE = model.blocks.mlp.down.dot_general.activations_value[...]
    assert ranges_LE.shape == (2, 4)
    assert len(np.unique(ranges_LE)) > 4
    qat.nnx.set_key(model, jax.random.key(0))
    words_LEK = np.asarray(model.blocks.mlp.down.dot_general.key.get_value())
    assert len(np.unique(words_LEK.reshape(8, -1), axis=0)) == 8
    first = logits(model)
    qat.nnx.set_key(model, jax.random.key(1))
    assert (logits(model) != first).any()
    assert np.isfinite(first).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"experts": -1}, "experts = -1: expected at least 0"),
        ({"experts_per_token": 5}, "experts_per_token = 5: .* at most experts = 4"),
        ({"experts_per_token": 0}, "experts_per_token = 0: expected at least 1"),
        ({"capacity_factor": 0.0}, "capacity_factor = 0.0: expected a finite number above 0"),
        ({"capacity_factor": math.inf}, "capacity_factor = inf"),
        ({"balance": -0.1}, "balance = -0.1: expected a finite number, at least 0"),
        ({"norm_epsilon": 0.0}, "norm_epsilon = 0: expected a number above 0"),
    ],
)
def test_what_no_mixture_can_be_is_an_error(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **changes)
