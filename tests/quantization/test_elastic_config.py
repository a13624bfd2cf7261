"""Random configurations of elastic networks."""

import functools

import jax
import numpy as np

from jaxreg.quantization import elastic_config


def test_sampled_configurations():
  keys = jax.random.split(jax.random.key(0), 500)
  configs = jax.jit(jax.vmap(functools.partial(elastic_config.sample_config, layers=5, candidates=(2, 4, 8))))(keys)
  for bits in (configs.weight_bits, configs.act_bits):
    assert (bits[:, [0, -1]] == 8).all()
    assert set(np.unique(bits[:, 1:-1])) == {2, 4, 8}
    np.testing.assert_allclose(np.mean(bits[:, 1:-1] == 4, axis=0), 1 / 3, atol=0.12)
  forms = np.stack([configs.per_channel, configs.weight_symmetric, configs.act_symmetric])
  np.testing.assert_allclose(forms.mean(1), 0.5, atol=0.12)
  assert np.abs(np.corrcoef(forms.transpose(0, 2, 1).reshape(15, -1)) - np.eye(15)).max() < 0.25


EXEMPT = {
  "ElasticLayer": "result of elastic_layers",
  "config_variables": "renames",
  "elastic_layers": "of a module's shapes",
  "sample_config": "of a key and integers",
  "sample_forms": "of a key and integers",
  "uniform_config": "of integers",
}
