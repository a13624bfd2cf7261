"""Noise with a strength of its own for each example: the right amounts, and no gradient to the strength."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxreg.layers import per_example_noise as noise

KEY = jax.random.key(0)


def test_dropout_scales_what_is_left():
  inputs, rate = jnp.ones((4, 4000)), np.float32([0.0, 0.3, 0.9, 1.0])
  outputs = np.asarray(jax.jit(noise.per_example_dropout)(KEY, inputs, rate=rate))
  dropped = (outputs == 0).mean(1)
  np.testing.assert_allclose(dropped, rate, atol=4 * 0.5 / np.sqrt(4000))
  np.testing.assert_array_equal(outputs[0], 1)
  np.testing.assert_array_equal(outputs[3], 0)
  kept = np.where(rate < 1, 1 / np.where(rate < 1, 1 - rate, 1), 0)
  np.testing.assert_allclose(outputs.max(1), kept, rtol=1e-5)


def test_no_gradient_reaches_the_strengths():
  images = jnp.full((2, 3, 3, 3), 0.4)
  functions = {
    "rate": noise.per_example_dropout,
    "deviation": noise.per_example_scale_noise,
    "brightness": noise.per_example_color_jitter,
    "hue": noise.per_example_color_jitter,
    "length": functools.partial(noise.per_example_cutout, holes=1, max_holes=1),
  }

  @jax.jit
  def gradients(strength):
    total = lambda strength, name, f: jnp.sum(f(KEY, images, **{name: strength}))
    return [jax.grad(total)(strength, name, function) for name, function in functions.items()]

  np.testing.assert_array_equal(gradients(jnp.array([0.2, 0.3])), 0)


def test_cutout_hides_squares():
  images = jnp.ones((200, 8, 8, 1))
  cut = jax.jit(functools.partial(noise.per_example_cutout, max_holes=3))
  holes = np.resize([0, 1, 3], 200)
  hidden = np.asarray(cut(KEY, images, length=2.0, holes=holes))[..., 0] == 0
  count = hidden.sum((1, 2))
  assert (count[holes == 0] == 0).all()
  assert set(count[holes == 1]) == {1, 2, 4}  # cut at corners and at edges
  assert count[holes == 3].max() > 8
  rows, columns = hidden[holes == 1].any(2).sum(1), hidden[holes == 1].any(1).sum(1)
  np.testing.assert_array_equal(rows * columns, count[holes == 1])


def test_jitter():
  images = jnp.asarray(np.random.default_rng(0).uniform(0.4, 0.6, (64, 4, 4, 3)), jnp.float32)
  jitter, names = jax.jit(noise.per_example_color_jitter), ("brightness", "contrast", "saturation", "hue")
  strengths = np.eye(4, dtype=np.float32)[:, :, None] * np.resize(np.float32([0.0, 0.3]), 64)
  outputs = {
    name: np.asarray(jitter(KEY, images, **dict(zip(names, strengths[index])))) for index, name in enumerate(names)
  }
  for value in outputs.values():
    np.testing.assert_allclose(value[::2], images[::2], atol=1e-5)
    assert np.abs(value[1::2] - images[1::2]).max() > 0.02
  spread = lambda x, axes: np.asarray(x).std(axes)
  ratio = outputs["brightness"][1::2] / images[1::2]
  np.testing.assert_allclose(spread(ratio, (1, 2, 3)), 0, atol=1e-5)
  assert (np.abs(ratio - 1) <= 0.3 + 1e-5).all()
  luma = lambda x: np.asarray(x) @ np.float32([0.299, 0.587, 0.114])
  for name in ("saturation", "hue"):
    np.testing.assert_allclose(luma(outputs[name]), luma(images), atol=1e-3)
  np.testing.assert_allclose(luma(outputs["contrast"]).mean((1, 2)), luma(images).mean((1, 2)), atol=1e-5)
  grey = jax.eval_shape(noise.per_example_color_jitter, KEY, images[..., :1])
  assert grey.shape == (64, 4, 4, 1)


def test_scale_noise():
  outputs = noise.per_example_scale_noise(KEY, jnp.ones((500, 3)), deviation=0.2)
  np.testing.assert_array_equal(outputs.std(1) < 1e-6, True)
  np.testing.assert_allclose([outputs.mean(), outputs[:, 0].std()], [1, 0.2], atol=0.03)


@pytest.mark.parametrize(
  "call, message",
  [
    (lambda: noise.per_example_dropout(KEY, jnp.ones((3, 2)), rate=jnp.ones(2)), "rate must be a scalar or have shape"),
    (lambda: noise.per_example_dropout(KEY, jnp.ones(3, int), rate=0.5), "inputs must be floating"),
    (lambda: noise.per_example_color_jitter(KEY, jnp.ones((2, 3, 3, 4))), "images must be"),
    (lambda: noise.per_example_cutout(KEY, jnp.ones((2, 3)), length=1, holes=1, max_holes=1), "images must be"),
  ],
)
def test_bad_input(call, message):
  with pytest.raises(ValueError, match=message):
    call()


EXEMPT = {
  "per_example_color_jitter": "draws in the images' precision; its tests say what it does to each example",
  "per_example_cutout": "draws in the images' precision; its tests say what it does to each example",
  "per_example_dropout": "draws in the inputs' precision; its tests say what it does to each example",
  "per_example_scale_noise": "draws in the inputs' precision; its tests compare the distributions",
}
