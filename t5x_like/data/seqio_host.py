"""TensorFlow stays on the host: it would take the accelerator's memory, which the model needs."""

from __future__ import annotations

import tensorflow as tf

from t5x_like.errors import UserError


def hide_accelerators() -> None:
    """Lets TensorFlow see no GPU in this process; JAX sees them all the same.

    Raises:
      UserError: something has run TensorFlow on a GPU already.
    """
    try:
        tf.config.set_visible_devices([], "GPU")
    except RuntimeError as error:
        raise UserError(
            f"TensorFlow uses the GPU of this process already ({error}): let the module that "
            "registers the Tasks run nothing of TensorFlow when it is imported."
        ) from None
