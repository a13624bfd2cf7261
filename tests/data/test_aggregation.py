"""Bags and their private release."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxreg.data import aggregation
from jaxreg.data.aggregation import aggregate, gaussian_private_bag_means, laplace_private_bag_means
from tests.conformance import EXAMPLES, draw_logits, row


def test_every_example_is_in_one_bag_and_the_rest_is_left_out():
  inputs = jnp.arange(11.0)[:, None]
  bags, means = aggregate(jax.random.key(1), inputs, inputs[:, 0], bag_size=4)
  assert bags.shape == (2, 4, 1) and len(np.unique(bags)) == 8
  np.testing.assert_allclose(means, bags[..., 0].mean(1))
  _, shares = aggregate(jax.random.key(1), inputs, jax.nn.one_hot(jnp.arange(11) % 2, 2), bag_size=4)
  np.testing.assert_allclose(shares.sum(-1), 1)


def test_laplace_noise_has_the_stated_variance():
  clip, epsilon, size = 1.5, 0.7, 5
  released = laplace_private_bag_means(jax.random.key(0), jnp.zeros((100_000, size)), clip=clip, epsilon=epsilon)
  np.testing.assert_allclose(released.var(), 8 * clip**2 / (size * epsilon) ** 2, rtol=0.03)
  assert abs(float(released.mean())) < 0.02


def test_gaussian_noise_has_the_stated_deviation():
  released = gaussian_private_bag_means(jax.random.key(0), jnp.zeros((100_000, 4)), clip=1.0, epsilon=0.5, delta=1e-5)
  np.testing.assert_allclose(released.std(), np.sqrt(2 * np.log(1.25e5)) * (2 / 4) / 0.5, rtol=0.02)


def test_responses_are_clipped_before_averaging():
  responses = jnp.array([[10.0, -1.0, 0.0, 0.0]])
  released = laplace_private_bag_means(jax.random.key(0), responses, clip=2.0, epsilon=1e9)
  np.testing.assert_allclose(released, [(2.0 - 1.0) / 4], atol=1e-6)


@pytest.mark.parametrize("bag_size", [0, 12])
def test_bad_bag_size(bag_size):
  with pytest.raises(ValueError, match="bag_size"):
    aggregate(jax.random.key(0), jnp.zeros((11, 2)), jnp.zeros(11), bag_size=bag_size)


@pytest.mark.parametrize("change, named", [({"epsilon": 0.0}, "epsilon"), ({"clip": -1.0}, "clip")])
def test_bad_privacy_parameters(change, named):
  with pytest.raises(ValueError, match=named):
    laplace_private_bag_means(jax.random.key(0), jnp.zeros((3, 2)), **{"clip": 1.0, "epsilon": 1.0, **change})


ROWS = [
  row(
    aggregation.aggregate,
    lambda rng: (draw_logits(rng), rng.normal(size=EXAMPLES)),
    call=lambda inputs, responses: list(aggregation.aggregate(jax.random.key(0), inputs, responses, bag_size=4)),
    bad=(("responses", lambda inputs, responses: (inputs, responses[1:])),),
  ),
]


EXEMPT = {
  "gaussian_private_bag_means": "draws; its tests compare the distributions",
  "laplace_private_bag_means": "draws; its tests compare the distributions",
}
