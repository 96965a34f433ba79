"""What an adapter of a model family is made of: a table of names, and operations on tensors.

A family says how their `config.json` and our model config give each other, and which of their
tensors is which of our parameters. Reading, checking, writing and streaming are done elsewhere,
once for all families and for both directions.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from t5x_like.errors import UserError, did_you_mean
from t5x_like.layers.attention import AttentionConfig
from t5x_like.layers.mlp import MlpConfig
from t5x_like.models.block import BlockConfig
from t5x_like.models.stack import Pattern, as_pattern, layer_slots

Shape = tuple[int, ...]


# ---- Operations on tensors.


@dataclasses.dataclass(frozen=True, kw_only=True)
class Op:
    """How tensors of theirs become parameters of ours and back, exactly (bits are only moved).

    Attributes:
      to_ours: their arrays (one argument each) -> tuple of ours, without the layers axis.
      to_theirs: our arrays (one argument each) -> their array, or a tuple of several.
      theirs_shape: our shapes (one argument each) -> their shape, or a tuple of several.
    """

    to_ours: Callable[..., tuple[np.ndarray, ...]]
    to_theirs: Callable[..., Any]
    theirs_shape: Callable[..., Any]


SAME = Op(to_ours=lambda x: (x,), to_theirs=lambda x: x, theirs_shape=lambda shape: shape)
# torch.nn.Linear keeps (out, in), we keep (in, out).
TRANSPOSE = Op(
    to_ours=lambda x: (x.T,), to_theirs=lambda x: x.T, theirs_shape=lambda shape: shape[::-1]
)


# The experts of a layer, a torch.nn.Linear each; ours are stacked.
EXPERTS = Op(
    to_ours=lambda *theirs: (np.stack([x.T for x in theirs]),),
    to_theirs=lambda x: tuple(expert.T for expert in x),
    theirs_shape=lambda shape: (shape[:0:-1],) * shape[0],
)


def fused(sizes: Sequence[int], *, transpose: bool) -> Op:
    """Several of ours side by side in one of theirs.

    Args:
      sizes: output width of each of ours, in their order.
      transpose: theirs is torch.nn.Linear's (sum of sizes, in); otherwise (in, sum of sizes), as
        GPT-2's Conv1D. A bias (sum of sizes,) may be either.
    """
    ends, axis = np.cumsum(sizes)[:-1], 0 if transpose else -1

    def turn(x: np.ndarray) -> np.ndarray:
        return x.T if transpose else x

    def theirs_shape(*shapes: Shape) -> Shape:
        shape = (*shapes[0][:-1], sum(s[-1] for s in shapes))
        return shape[::-1] if transpose else shape

    return Op(
        to_ours=lambda x: tuple(turn(part) for part in np.split(x, ends, axis=axis)),
        to_theirs=lambda *ours: np.concatenate([turn(x) for x in ours], axis=axis),
        theirs_shape=theirs_shape,
    )


# ---- The table of names.


@dataclasses.dataclass(frozen=True)
class Entry:
    """One line of the table of names.

    Attributes:
      ours: our parameter(s), `decoder/layers/mlp/wo/kernel`. It is always written `.../layers/...`,
        whatever groups the stack has: the framework finds the place of each layer.
      theirs: their tensor(s); `{layer}` stands for the layer's number where `ours` is in a stack.
      op: what turns one into the other.
      aliases: further names of the same tensor in their files (tied weights): accepted, checked
        to be equal, not written.
      copied: but these are written, since transformers does not tie what the file ties.
      layers: numbers of the layers that have it, where layers differ; None for all.
    """

    ours: str | tuple[str, ...]
    theirs: str | tuple[str, ...]
    op: Op = SAME
    aliases: tuple[str, ...] = ()
    copied: bool = False
    layers: Sequence[int] | None = None


class Slot(NamedTuple):
    """A parameter, or (`row` given) one layer of a stacked one."""

    name: str
    row: int | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Transfer:
    """An `Entry` for one layer: which parameters or rows of them are which tensors.

    `copies` are names under which the tensor is written once more.
    """

    ours: tuple[Slot, ...]
    theirs: tuple[str, ...]
    op: Op
    aliases: tuple[str, ...]
    copies: tuple[str, ...] = ()

    def theirs_shapes(self, param_info: Mapping[str, Any]) -> tuple[Shape, ...]:
        """Shapes of `theirs`; `param_info` is flat, `ParamInfo` by our name."""
        ours = [param_info[s.name].shape[0 if s.row is None else 1 :] for s in self.ours]
        shape = self.op.theirs_shape(*ours)
        return (shape,) if len(self.theirs) == 1 else shape

    def to_ours(self, *theirs: np.ndarray) -> tuple[np.ndarray, ...]:
        """One array a slot, views of `theirs` where that is possible."""
        return self.op.to_ours(*theirs)

    def to_theirs(self, *ours: np.ndarray) -> tuple[np.ndarray, ...]:
        """One array a tensor of theirs."""
        result = self.op.to_theirs(*ours)
        return (result,) if len(self.theirs) == 1 else result


def transfers(entries: Sequence[Entry], config: Any) -> list[Transfer]:
    """The table, written out for every layer of the model."""
    result = []
    for entry in entries:
        ours, theirs = _tuple(entry.ours), _tuple(entry.theirs)
        if "{layer}" not in theirs[0]:
            slots = tuple(Slot(name, None) for name in ours)
            names = {"aliases": entry.aliases, "copies": entry.aliases if entry.copied else ()}
            result.append(Transfer(ours=slots, theirs=theirs, op=entry.op, **names))
            continue
        places = _slots(config, ours[0].partition("/")[0])
        for layer in places if entry.layers is None else entry.layers:
            place, index = places[layer]
            result.append(
                Transfer(
                    ours=tuple(Slot(n.replace("/layers/", f"/{place}/"), index) for n in ours),
                    theirs=tuple(name.format(layer=layer) for name in theirs),
                    op=entry.op,
                    aliases=tuple(name.format(layer=layer) for name in entry.aliases),
                )
            )
    return result


def _tuple(names: str | tuple[str, ...]) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else names


def _slots(config: Any, side: str) -> dict[int, tuple[str, int]]:
    """Number of each layer -> its place; modules of multi-token prediction count on."""
    if side == "future":
        return {config.num_layers + k: ("layers", k) for k in range(config.future_depth)}
    slots = layer_slots(_pattern(config, side), num_layers(config, side), config.leading_blocks)
    return dict(enumerate(slots))


def _pattern(config: Any, side: str) -> Pattern:
    block: Pattern | None = getattr(config, "encoder_block", None) if side == "encoder" else None
    return block or config.block


def layer_blocks(config: Any, side: str) -> list[BlockConfig]:
    """The block of every layer of the `encoder` or `decoder` of a model without leading blocks."""
    pattern = as_pattern(_pattern(config, side))
    return [pattern[layer % len(pattern)] for layer in range(num_layers(config, side))]


def dense_mlp(block: BlockConfig) -> MlpConfig:
    """The MLP of a block; UserError where it is a mixture of experts."""
    if isinstance(block.mlp, MlpConfig):
        return block.mlp
    raise UserError(f"a mixture of {block.mlp.num_experts} experts is no MLP")


def heads_of(block: BlockConfig) -> AttentionConfig:
    """The attention of a block; UserError where it is a latent one."""
    if isinstance(block.attention, AttentionConfig):
        return block.attention
    raise UserError("latent attention has no key and value heads")


def num_layers(config: Any, side: str) -> int:
    """Depth of the `encoder` or `decoder` of a model."""
    return getattr(config, f"num_{side}_layers", None) or config.num_layers


# ---- Families.


class ConfigJson(dict[str, Any]):
    """Their config.json; a key that is asked for by `[]` and is not there is a `UserError`.

    Attributes:
      tensors: names in their files, as the table of names has them; None where there is no file.
    """

    def __init__(self, content: Mapping[str, Any], tensors: frozenset[str] | None = None) -> None:
        super().__init__(content)
        self.tensors = tensors

    def __missing__(self, key: str) -> Any:
        raise UserError(f"config.json has no '{key}'.{did_you_mean(key, self)}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """An adapter: everything that is known of a family of architectures.

    Attributes:
      name: of the family, as documents call it.
      architectures: values of `architectures` in config.json that it reads, the first being
        what it writes unless `to_config` says.
      model_types: values of `model_type` that it reads where config.json has no architecture.
      from_config: their config.json -> our model config. Raises UserError for a value that we do
        not have.
      to_config: our model config -> their config.json, `architectures` and `model_type` included;
        `from_config(to_config(config))` must give back `config` (but for what only training
        uses), by which the framework finds the family of a model.
      entries: our model config -> the table of names; it names every parameter once.
      ignored: regexes (full match) of their tensors that hold no parameter (buffers).
      renames: (regex, replacement) by `re.sub`, applied in order to the names in their files
        before they are looked up: other spellings of the same checkpoint.
      plain: `to_config` and `entries` take models without latent attention and leading blocks only.
    """

    name: str
    architectures: tuple[str, ...]
    model_types: tuple[str, ...]
    from_config: Callable[[ConfigJson], Any]
    to_config: Callable[[Any], dict[str, Any]]
    entries: Callable[[Any], list[Entry]]
    ignored: tuple[str, ...] = ()
    renames: tuple[tuple[str, str], ...] = ()
    plain: bool = True

    def is_ignored(self, name: str) -> bool:
        return any(re.fullmatch(pattern, name) for pattern in self.ignored)

    def canonical(self, name: str) -> str:
        """The name of a tensor in a file as the table of names has it."""
        for pattern, replacement in self.renames:
            name = re.sub(pattern, replacement, name)
        return name


# Their activation -> ours. Of several names for one function the first is written.
_ACTIVATIONS = {
    "gelu_new": "gelu",
    "gelu_pytorch_tanh": "gelu",
    "gelu_fast": "gelu",
    "gelu_python_tanh": "gelu",
    "gelu": "gelu_exact",
    "gelu_python": "gelu_exact",
    "relu": "relu",
    "relu2": "relu_squared",
    "silu": "silu",
    "swish": "silu",
    "sigmoid": "sigmoid",
    "tanh": "tanh",
    "linear": "linear",
}


def our_activation(name: str) -> str:
    """Their name of an activation -> ours; UserError if we do not have it."""
    if name not in _ACTIVATIONS:
        raise UserError(
            f"config.json: activation '{name}' is not supported; known: {', '.join(_ACTIVATIONS)}."
        )
    return _ACTIVATIONS[name]


def their_activation(name: str, *, prefer: str | None = None) -> str:
    """Our name of an activation -> theirs: `prefer` if it is that function, else the first."""
    if prefer is not None and _ACTIVATIONS.get(prefer) == name:
        return prefer
    theirs = [theirs for theirs, ours in _ACTIVATIONS.items() if ours == name]
    if not theirs:
        raise UserError(f"Activation '{name}' has no name in Hugging Face's config.json.")
    return theirs[0]
