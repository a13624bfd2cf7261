"""SAM, SAGM and GAM: golden directions, optax's own SAM, closed forms of a quadratic, edges."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, PartitionSpec

from jaxreg.adversarial import craft_domain
from jaxreg.training import gradient_task
from jaxreg.transforms.sharpness import gam, sagm, sam, udim_value_and_grad
from tests.conformance import transform_row

NAMES = ("W1", "b1", "W2", "b2")


def of_case(case):
  """Parameters, batch and hyperparameters of a golden case, and its network."""
  params = {name: jnp.asarray(case[name]) for name in NAMES}
  return params, jnp.asarray(case["x"]), jnp.asarray(case["y"]), json.loads(str(case["hp"]))


def logits_of(params, inputs):
  hidden = jnp.tanh(inputs.reshape(len(inputs), -1) @ params["W1"].T + params["b1"])
  return hidden @ params["W2"].T + params["b2"]


def cross_entropy(params, inputs, labels):
  return optax.softmax_cross_entropy_with_integer_labels(logits_of(params, inputs), labels).mean()


def smoothed_divergences(logits, labels, smoothing=0.1):
  """Smoothed cross-entropy minus its least value, the smoothing spread over the other classes."""
  classes = logits.shape[-1]
  targets = optax.smooth_labels(jax.nn.one_hot(labels, classes), smoothing * classes / (classes - 1))
  return optax.kl_divergence(jax.nn.log_softmax(logits), targets)


def direction(transform, params, loss, **hyperparameters):
  """What SGD of rate 1 takes off the parameters."""
  tx, grad = transform(optax.sgd(1.0), **hyperparameters), jax.grad(loss)
  updates, _ = tx.update(grad(params), tx.init(params), params, grad_fn=lambda params, _: grad(params))
  return jax.tree.map(jnp.negative, updates)


@pytest.mark.golden
def test_golden_udim_directions(golden, x64):
  for name, case, _ in golden("45-udim").cases("case"):
    params, inputs, labels, hp = of_case(case)
    plain = lambda params, inputs=inputs, labels=labels: cross_entropy(params, inputs, labels)
    of_gam = {key.removeprefix("gam_"): value for key, value in hp.items() if key.startswith("gam_")}
    found = {
      "sam": direction(sam, params, plain, rho=hp["rho"]),
      "sagm": direction(sagm, params, plain, rho=hp["rho"], alpha=hp["sagm_alpha"]),
      "gam": direction(gam, params, plain, **of_gam),
    }
    for method, gradient in found.items():
      for key in NAMES:
        expected = case[f"flat_{method}_grad_{key}"]
        np.testing.assert_allclose(gradient[key], expected, rtol=1e-8, atol=1e-12, err_msg=f"{name} {method} {key}")
    smoothed = smoothed_divergences(case["flat_smoothce_logits"], labels)
    np.testing.assert_allclose(smoothed, case["flat_smoothce_out"], rtol=1e-9)


def network_of(params, inputs):
  """Features and head in the form that UDIM takes."""
  hidden = jnp.tanh(inputs.reshape(len(inputs), -1) @ params["W1"].T + params["b1"])
  return hidden, {"kernel": params["W2"].T, "bias": params["b2"]}


@pytest.mark.golden
def test_golden_udim_update(golden, x64):
  for name, case, _ in golden("45-udim").cases("case"):
    params, inputs, labels, hp = of_case(case)
    crafted = functools.partial(craft_domain, step_size=hp["syn_lr"], rho=hp["rho"])
    variants = {
      "pooled": (crafted, 1),
      "domwise": (crafted, hp["num_domains"]),
      "advstyle": (lambda loss_fn, params, inputs: inputs, 1),  # as the released code has it
    }
    for variant, (craft, num_domains) in variants.items():

      @jax.jit
      def of_weight(weight, params, craft=craft, num_domains=num_domains, rho=hp["rho"], batch=(inputs, labels)):
        gradient_fn = udim_value_and_grad(network_of, craft, weight=weight, rho=rho, num_domains=num_domains)
        return gradient_fn(params, *batch)

      close = lambda got, key, case=case, name=name, variant=variant: np.testing.assert_allclose(
        got, case[f"udim_{variant}_{key}"], rtol=1e-9, atol=1e-12, err_msg=f"{name} {variant} {key}"
      )
      (_, inconsistency), update = of_weight(hp["lam"], params)
      _, without = of_weight(0.0, params)
      close(inconsistency, "out_inconsistency")
      for key in NAMES:
        close(update[key], f"update_grad_{key}")
        close(without[key], f"sam_grad_{key}")
        close((update[key] - without[key]) / hp["lam"], f"inc_grad_{key}")


def _small(rng, batch=6):
  draw = lambda *shape: jnp.asarray(rng.normal(size=shape))
  params = {"W1": draw(4, 3), "b1": draw(4), "W2": draw(3, 4), "b2": draw(3)}
  return params, draw(batch, 3), jnp.asarray(rng.integers(0, 3, batch))


CRAFT = functools.partial(craft_domain, step_size=0.5)


def test_udim_without_weight_is_sam(x64):
  params, inputs, labels = _small(np.random.default_rng(5))
  loss = lambda params: cross_entropy(params, inputs, labels)
  gradient_fn = jax.jit(udim_value_and_grad(network_of, CRAFT, weight=0.0, rho=0.3))
  (value, _), gradient = gradient_fn(params, inputs, labels)
  np.testing.assert_allclose(value, loss(params), rtol=1e-12)
  sharp = jax.jit(lambda params: direction(sam, params, loss, rho=0.3))(params)
  jax.tree.map(np.testing.assert_array_equal, gradient, sharp)


def test_udim_reads_what_counts_alone():
  params, inputs, labels = _small(np.random.default_rng(6))
  kept = np.arange(6) != 2
  gradient_fn = jax.jit(udim_value_and_grad(network_of, CRAFT, rho=0.3))
  expected = gradient_fn(params, inputs[kept], labels[kept])
  spoiled = jnp.where(kept[:, None], inputs, jnp.nan)
  outside = jnp.where(kept, labels, 255).astype(jnp.uint8)
  for given, where in ((labels, kept), (outside, None)):
    found = gradient_fn(params, spoiled, given, where)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), found, expected)
  _, none = gradient_fn(params, spoiled, jnp.full(6, 255, jnp.uint8), None)
  assert not any(np.any(leaf) for leaf in jax.tree.leaves(none))


def test_udim_of_a_split_batch_is_of_the_whole(x64):
  params, inputs, labels = _small(np.random.default_rng(7), batch=8)
  where = jnp.arange(8) != 1  # so that the devices do not count alike

  def gradient(axis_name, inputs, labels, where):
    craft = functools.partial(craft_domain, step_size=0.5, axis_name=axis_name)
    return udim_value_and_grad(network_of, craft, rho=0.3, axis_name=axis_name)(params, inputs, labels, where)

  mapped = jax.shard_map(
    functools.partial(gradient, "devices"),
    mesh=jax.make_mesh((2,), ("devices",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2]),
    in_specs=PartitionSpec("devices"),
    out_specs=PartitionSpec(),
    check_vma=False,
  )
  found, expected = jax.jit(lambda *batch: (mapped(*batch), gradient(None, *batch)))(inputs, labels, where)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12), found, expected)


def test_udim_refuses_bad_input():
  params, inputs, labels = _small(np.random.default_rng(8))
  with pytest.raises(ValueError, match="4 equal blocks"):
    udim_value_and_grad(network_of, CRAFT, num_domains=4)(params, inputs, labels)
  with pytest.raises(ValueError, match="labels integers"):
    udim_value_and_grad(network_of, CRAFT)(params, inputs, labels[1:])
  with pytest.raises(ValueError, match="two classes at least"):
    udim_value_and_grad(lambda p, x: (x, {"kernel": p}), CRAFT)(jnp.ones((3, 1)), inputs, labels)
  with pytest.raises(ValueError, match="weight must lie in"):
    udim_value_and_grad(network_of, CRAFT, weight=-1.0)


def test_smoothed_divergence_is_the_cross_entropy_minus_the_entropy(x64):
  rng = np.random.default_rng(0)
  logits, labels = rng.normal(size=(5, 4)), rng.integers(0, 4, 5)
  targets = np.full((5, 4), 0.1 / 3)
  targets[np.arange(5), labels] = 0.9
  expected = optax.softmax_cross_entropy(logits, targets) + np.sum(targets * np.log(targets), axis=1)
  np.testing.assert_allclose(smoothed_divergences(logits, labels), expected, rtol=1e-12)


def test_sam_is_optax_sam(x64):
  """Over several steps of Adam, in its mode of one gradient a step too."""
  rng = np.random.default_rng(0)
  params = {"a": rng.normal(size=(3, 2)), "b": rng.normal(size=2)}
  grad = jax.grad(lambda p: jnp.sum(jnp.sin(p["a"]) @ p["b"]) ** 2)
  ours = sam(optax.adam(0.1), rho=0.3)
  theirs = optax.contrib.sam(optax.adam(0.1), optax.chain(optax.contrib.normalize(), optax.sgd(0.3)))

  @jax.jit
  def both(one, other):
    state, turns = ours.init(one), theirs.init(other)
    for _ in range(3):
      updates, state = ours.update(grad(one), state, one, grad_fn=lambda params, _: grad(params))
      one = optax.apply_updates(one, updates)
      for _ in range(2):
        updates, turns = theirs.update(grad(other), turns, other)
        other = optax.apply_updates(other, updates)
    return one, other

  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10), *both(params, params))


def test_directions_on_a_quadratic(x64):
  rng = np.random.default_rng(1)
  matrix = rng.normal(size=(4, 4))
  matrix, params = matrix @ matrix.T, rng.normal(size=4)
  loss = lambda w: w @ matrix @ w / 2
  gradient, close = matrix @ params, lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12)
  norm = np.linalg.norm(gradient)
  np.testing.assert_array_equal(direction(sam, params, loss, rho=0.0), jax.grad(loss)(params))
  close(direction(sam, params, loss, rho=0.5), gradient + 0.5 / norm * matrix @ gradient)
  close(direction(sagm, params, loss, rho=0.0, alpha=0.0), gradient)
  close(direction(sagm, params, loss, rho=0.5, alpha=0.5 / norm), gradient)
  close(direction(sagm, params, loss, rho=0.5, alpha=0.1), gradient + (0.5 / norm - 0.1) / 2 * matrix @ gradient)
  close(direction(gam, params, loss, rho=0.5, beta1=1.0, gamma=0.0), direction(sam, params, loss, rho=0.5))
  options = dict(rho=0.5, rho_norm=0.3, beta0=0.2, beta1=0.4)
  flat, whole = (direction(gam, params, loss, gamma=gamma, **options) for gamma in (0.0, 1.0))
  assert np.abs(whole - flat).max() > 1e-2
  assert abs(np.dot(whole - flat, flat)) < 1e-10


@pytest.mark.parametrize("transform", [sam, sagm, gam])
def test_a_gradient_of_zeros_and_of_any_size(transform):
  assert not np.any(direction(transform, jnp.zeros(3), lambda w: jnp.sum(w**2)))
  options = {"alpha": 0.0} if transform is sagm else {}  # or else it looks less far for a large gradient
  at = lambda size: direction(transform, jnp.ones(2), lambda w: size * jnp.sum(w**2), **options)
  for size in (2e-30, 2e25):
    np.testing.assert_allclose(at(size) / size, at(1.0), rtol=1e-5)


@pytest.mark.parametrize("transform", [sam, sagm, gam])
def test_a_gradient_task_gives_what_they_ask_for(transform):
  data = {"x": np.linspace(-1, 1, 8, dtype=np.float32)[:, None] * np.ones(3, np.float32)}

  def objective(params, extra, batch, context):
    return jnp.mean(jnp.cos(batch["x"] @ params)), (extra, {})

  def task(**computation):
    return gradient_task(
      lambda key, hparams: (jnp.arange(3.0), {}),
      objective,
      lambda hparams: optax.chain(optax.identity(), transform(optax.sgd(0.1))),
      data=data,
      batch_size=8,
      **computation,
    )

  @jax.jit
  def trained():
    plain, parts = task(), task(accumulate=2)
    state = plain.init(jax.random.key(0), {})
    return [each.step(state, data, {})[0].params for each in (plain, parts)]

  plain, parts = trained()
  loss = lambda params: objective(params, {}, data, None)[0]
  expected = jnp.arange(3.0) - 0.1 * direction(transform, jnp.arange(3.0), loss)
  np.testing.assert_allclose(plain, expected, rtol=1e-5)
  np.testing.assert_allclose(parts, expected, rtol=1e-5)


def test_bad_input_is_refused():
  params = jnp.ones(2)
  for transform in (sam, sagm, gam):
    tx = transform(optax.sgd(0.1))
    with pytest.raises(ValueError, match=f"grad_fn must be given to the update of {transform.__name__}"):
      tx.update(params, tx.init(params), params)
    with pytest.raises(ValueError, match="rho must lie in"):
      transform(optax.sgd(0.1), rho=-1.0)
  with pytest.raises(ValueError, match="beta1 must lie in"):
    gam(optax.sgd(0.1), beta1=1.5)


def _looking(transform):
  """In the table's chains: a fixed function of the parameters stands for the gradient elsewhere.

  The two dtypes of the table's tree are steps of their own, for the norms couple what is in one tree.
  """
  by_dtype = lambda tree: jax.tree.map(lambda leaf: "narrow" if leaf.dtype == jnp.bfloat16 else "wide", tree)

  def build(base, **hyperparameters):
    tx = transform(base, **hyperparameters)
    grad_fn = lambda params, _: jax.tree.map(lambda leaf: jnp.sin(leaf) + leaf / 2, params)
    update = lambda updates, state, params=None: tx.update(updates, state, params, grad_fn=grad_fn)
    alone = optax.GradientTransformation(tx.init, update)
    return optax.multi_transform({"narrow": alone, "wide": alone}, by_dtype)

  return build


TRANSFORMS = [
  transform_row(sam, _looking(sam), rho=(0.0, 0.2)),
  transform_row(sagm, _looking(sagm), rho=(0.01, 0.2), alpha=(0.0, 0.1)),
  transform_row(
    gam,
    _looking(gam),
    rho=(0.01, 0.2),
    rho_norm=(0.01, 0.2),
    beta0=(0.1, 0.9),
    beta1=(0.0, 1.0),
    gamma=(0.0, 0.1),
  ),
]

EXEMPT = {"udim_value_and_grad": "takes functions of the caller; tested here"}
