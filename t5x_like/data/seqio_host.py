"""SeqIO and TensorFlow as this package imports them: quickly, and on the host."""

from __future__ import annotations

from t5x_like.errors import UserError
from t5x_like.quick_import import without

with without("sklearn"):  # Which Keras wraps: a fifth of the time of this import.
    import seqio as seqio
    import tensorflow as tf


def hide_accelerators() -> None:
    """Lets TensorFlow see no GPU in this process; JAX sees them all the same.

    It would take the accelerator's memory, which the model needs.

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
