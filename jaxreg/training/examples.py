"""A small task for docstrings and tests of the harness: nothing to download, compiles in a second."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxreg.training.gradient import gradient_task
from jaxreg.training.task import Task

__all__ = ["least_squares"]


def least_squares(*, examples: int = 64, features: int = 4, batch_size: int | None = 16, seed: int = 0) -> Task:
  """Linear regression on noiseless data by SGD with momentum; the hyperparameter is `learning_rate`."""
  rng = np.random.default_rng(seed)
  inputs = rng.normal(size=(examples, features)).astype(np.float32)
  truth = rng.normal(size=features).astype(np.float32)
  data = {"x": inputs, "y": inputs @ truth}

  def objective(params, extra, batch, context):
    del context
    error = predict(params, extra, batch["x"]) - batch["y"]
    return jnp.mean(error**2), (extra, {"error": jnp.mean(jnp.abs(error))})

  def predict(params, extra, inputs):
    del extra
    return inputs @ params["w"] + params["b"]

  return gradient_task(
    init_params=lambda key, hparams: ({"w": jax.random.normal(key, (features,)), "b": jnp.zeros(())}, {}),
    objective=objective,
    optimizer=lambda hparams: optax.sgd(hparams["learning_rate"], momentum=0.9),
    data=data,
    batch_size=batch_size,
    hparams={"learning_rate": 0.05},
    evaluate=lambda params, extra, hparams: {"distance": jnp.linalg.norm(params["w"] - truth)},
    predict=predict,
  )
