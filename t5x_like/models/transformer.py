"""What every Transformer of this package has: token table, positions, stacks, output."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from t5x_like.errors import UserError
from t5x_like.kernels.matmul import project
from t5x_like.layers.checks import (
    check_bools,
    check_choice,
    check_instance,
    check_number,
    check_positive_ints,
)
from t5x_like.layers.embeddings import TokenEmbedder
from t5x_like.layers.linear import Linear
from t5x_like.layers.norms import Norm
from t5x_like.layers.parameter import (
    Initializer,
    activation_dtype,
    in_use,
    mlp_kernel_init,
    parameter,
)
from t5x_like.layers.positions import (
    LearnedPositions,
    LearnedPositionsConfig,
    RelativePositionsConfig,
    SinusoidalPositions,
    SinusoidalPositionsConfig,
)
from t5x_like.models.block import BlockConfig
from t5x_like.models.stack import Pattern, Stack, as_pattern, remat_policy
from t5x_like.parallel.logical import constrain


@dataclasses.dataclass(frozen=True, kw_only=True)
class TransformerConfig:
    """What all models have in common.

    Attributes:
      vocab_size: rows of the token table.
      block: the shape of every block, or of each block of a pattern that repeats over the depth.
      leading_blocks: other blocks for the first layers of a stack, before the pattern begins
        (DeepSeek's dense layers).
      positions: relative (in every self-attention), learned or sinusoidal, or None; rotary and
        others that belong to a layer are `AttentionConfig.positions`.
      logits: `dense` has an output kernel of its own (T5 1.1); `tied` multiplies with the token
        table (GPT-2); `tied_rescaled` also divides by sqrt(embed_dim) (T5 1.0).
      logits_bias: adds a learned bias to the logits.
      logits_softcap: c in `c * tanh(logits / c)` (Gemma 2), or None.
      scale_embeddings: multiply token embeddings by sqrt(embed_dim) (Gemma).
      embedding_norm: normalise the embedded input (BERT).
      embedding_dim: width of a factorised token table, projected to embed_dim; None for none.
      dtype: of activations: float32, bfloat16, float16, or auto (float32 on a CPU, else bfloat16).
        Parameters, softmax, norms and loss are float32.
      remat: see `models.stack.remat_policy`.
      scan_unroll: layers in one iteration of the loop over layers: more run faster and compile
        slower; the result is the same.
    """

    vocab_size: int
    block: Pattern
    leading_blocks: tuple[BlockConfig, ...] = ()
    positions: (
        RelativePositionsConfig | LearnedPositionsConfig | SinusoidalPositionsConfig | None
    ) = None
    logits: Literal["dense", "tied", "tied_rescaled"] = "dense"
    logits_bias: bool = False
    logits_softcap: float | None = None
    scale_embeddings: bool = False
    embedding_norm: bool = False
    embedding_dim: int | None = None
    dtype: str = "auto"
    remat: str = "none"
    scan_unroll: int = 1

    def __post_init__(self) -> None:
        check_positive_ints(self, "vocab_size", "scan_unroll")
        self._check_pattern("block")
        if self.leading_blocks:
            self._check_pattern("leading_blocks")
            widths = self.leading_blocks[0].embed_dim, self.first_block.embed_dim
            if widths[0] != widths[1]:
                raise UserError(
                    f"{type(self).__name__}.leading_blocks has embed_dim {widths[0]} and block "
                    f"{widths[1]}; make them equal"
                )
        kinds = (RelativePositionsConfig, LearnedPositionsConfig, SinusoidalPositionsConfig)
        check_instance(self, "positions", *kinds, type(None))
        check_choice(self, "logits", ("dense", "tied", "tied_rescaled"))
        check_bools(self, "logits_bias", "scale_embeddings", "embedding_norm")
        if self.logits_softcap is not None:
            check_number(self, "logits_softcap", low=1e-6)
        if self.embedding_dim is not None:
            check_positive_ints(self, "embedding_dim")
        check_choice(self, "dtype", ("auto", "float32", "bfloat16", "float16"))
        remat_policy(self.remat)

    def _check_pattern(self, name: str) -> None:
        """A block, or a sequence of blocks of one width, which becomes a tuple."""
        value = getattr(self, name)
        if isinstance(value, list | tuple):
            object.__setattr__(self, name, tuple(value))
        blocks = tuple(value) if isinstance(value, list | tuple) else (value,)
        if not blocks or not all(isinstance(block, BlockConfig) for block in blocks):
            raise UserError(
                f"{type(self).__name__}.{name} is {value!r}; give a BlockConfig or several"
            )
        widths = {block.embed_dim for block in blocks}
        if len(widths) > 1:
            raise UserError(
                f"{type(self).__name__}.{name} has blocks of embed_dim {sorted(widths)}; "
                "a residual stream has one width"
            )

    @property
    def first_block(self) -> BlockConfig:
        """What embeddings and output take their width and initialisation from."""
        return as_pattern(self.block)[0]


class Transformer(nnx.Module):
    """Token table, position embeddings, and the decoder with its output kernel."""

    token_embedder: TokenEmbedder
    decoder: Stack  # Made by the subclass.

    def __init__(self, config: TransformerConfig) -> None:
        self.config, self.dtype = config, activation_dtype(config.dtype)
        self._add_embeddings("")
        block, factor = config.first_block, config.embedding_dim
        if config.logits != "dense" and factor is not None:
            self.logits_projection = self._linear(
                (block.embed_dim, factor), logical_axes=("embed", "factor")
            )
        if config.logits != "dense" and config.logits_bias:
            zeros = jax.nn.initializers.zeros
            self.logits_bias = parameter(
                (config.vocab_size,), logical_axes=("vocab",), initializer=zeros
            )

    def _linear(
        self,
        shape: tuple[int, int],
        *,
        logical_axes: tuple[str, str | None],
        use_bias: bool = False,
    ) -> Linear:
        """A projection outside of the blocks, initialised as they are."""
        stddev = self.config.first_block.init_stddev
        init: Initializer = (
            mlp_kernel_init if stddev is None else jax.nn.initializers.normal(stddev)
        )
        return Linear(
            shape, logical_axes=logical_axes, initializer=init, use_bias=use_bias, dtype=self.dtype
        )

    def _add_embeddings(self, prefix: str) -> None:
        """Adds what `embed` uses, under names that begin with `prefix`."""
        config, block = self.config, self.config.first_block
        width, factor = block.embed_dim, config.embedding_dim
        init_stddev, dtype = block.embedding_stddev, self.dtype
        tables: dict[str, Any] = {
            "token_embedder": TokenEmbedder(
                config.vocab_size, embed_dim=factor or width, init_stddev=init_stddev, dtype=dtype
            )
        }
        if isinstance(config.positions, LearnedPositionsConfig):
            tables["position_embedder"] = LearnedPositions(
                config.positions, embed_dim=width, init_stddev=init_stddev, dtype=dtype
            )
        elif isinstance(config.positions, SinusoidalPositionsConfig):
            tables["position_embedder"] = SinusoidalPositions(
                config.positions, embed_dim=width, dtype=dtype
            )
        if factor is not None:
            tables["embedding_projection"] = self._linear(
                (factor, width), logical_axes=("factor", "embed")
            )
        if config.embedding_norm:
            tables["embedding_norm"] = Norm(block.norm, embed_dim=width, dtype=dtype)
        for name, module in tables.items():
            setattr(self, prefix + name, module)

    def _stack(
        self, block: Pattern, *, num_layers: int, decoder: bool, cross_attention: bool
    ) -> Stack:
        config = self.config
        positions = config.positions
        stack = Stack(
            block,
            num_layers=num_layers,
            decoder=decoder,
            cross_attention=cross_attention,
            relative_positions=(
                positions if isinstance(positions, RelativePositionsConfig) else None
            ),
            dtype=self.dtype,
            remat=config.remat,
            scan_unroll=config.scan_unroll,
            leading=config.leading_blocks,
        )
        if decoder and config.logits == "dense":
            shape = (config.first_block.embed_dim, config.vocab_size)
            stack.logits_dense = self._linear(
                shape, logical_axes=("embed", "vocab"), use_bias=config.logits_bias
            )
        return stack

    def embed(
        self,
        tokens: Int[Array, "batch length"],
        positions: Int[Array, "batch length"] | None = None,
        *,
        prefix: str = "",
        extra: Float[Array, "batch length embed"] | None = None,
    ) -> Float[Array, "batch length embed"]:
        """Token embeddings, plus position embeddings and `extra` ones (of token types), normed.

        `positions` counts from 0 within each packed example; None means one example a row.
        """

        def part(name: str) -> Any:
            return getattr(self, prefix + name, None)

        x = part("token_embedder")(tokens)
        if (project_up := part("embedding_projection")) is not None:
            x = project_up(x)
        if self.config.scale_embeddings:
            x = x * jnp.asarray(math.sqrt(x.shape[-1]), x.dtype)
        if (embed_positions := part("position_embedder")) is not None:
            x = x + embed_positions(tokens.shape[1], positions)
        if extra is not None:
            x = x + extra
        if (norm := part("embedding_norm")) is not None:
            x = norm(x)
        return constrain(x, ("batch", "length", "embed"))

    def to_logits(
        self, x: Float[Array, "batch length embed"]
    ) -> Float[Array, "batch length vocab"]:
        """float32 logits of the decoder's output."""
        config = self.config
        if config.logits == "tied_rescaled":
            x = x / math.sqrt(x.shape[-1])
        if config.logits == "dense":
            dense = self.decoder.logits_dense
            logits = project(x, in_use(dense.kernel, self.dtype), float32=True)
            bias = dense.bias if config.logits_bias else None
        else:
            x = self.logits_projection(x) if config.embedding_dim is not None else x
            logits = self.token_embedder.attend(x)
            bias = self.logits_bias if config.logits_bias else None
        if bias is not None:
            logits = logits + in_use(bias, jnp.dtype("float32"))
        if config.logits_softcap is not None:
            logits = config.logits_softcap * jnp.tanh(logits / config.logits_softcap)
        return constrain(logits, ("batch", "length", "vocab"))
