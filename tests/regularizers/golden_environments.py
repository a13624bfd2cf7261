"""The golden cases of domain generalization as padded environments and Flax heads."""

import functools

import jax.numpy as jnp
import numpy as np
import optax


def environments_of(case):
  """Features, labels and mask, padded to the largest environment."""
  features = [case[f"feat{e}"] for e in range(sum(name.startswith("feat") for name in case))]
  labels = [np.ravel(case[f"label{e}"]).astype(np.int32) for e in range(len(features))]
  size = max(map(len, labels))
  pad = lambda array, value: np.pad(
    array, [(0, size - len(array))] + [(0, 0)] * (array.ndim - 1), constant_values=value
  )
  where = np.stack([np.arange(size) < len(own) for own in labels])
  return np.stack([pad(x, 0) for x in features]), np.stack([pad(y, 0) for y in labels]), where


def head_of(case):
  """Kernel and bias; PyTorch's weights are transposed."""
  return {"kernel": jnp.asarray(case["head_W"].T), "bias": jnp.asarray(case["head_b"])}


def losses_of(features, labels, head, where):
  """The environments' risks."""
  losses = optax.softmax_cross_entropy_with_integer_labels(features @ head["kernel"] + head["bias"], labels)
  return jnp.sum(losses * where, axis=1) / jnp.sum(where, axis=1)


def close_to(name):
  return functools.partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-11, err_msg=name)
