"""Where one weight lies in a tree of arrays."""

import dataclasses
import math

from gemma_keras.checkpoints.checkpoint import CheckpointError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Place:
    """An array, or a part of one that holds several weights.

    Attributes:
        name: The keys of the array.
        shape: The shape of the weight as it is stored.
        part: `(index, count)` on the first axis of what one layer has, where that
            holds several weights, such as keys and values.
        stack: `(axis, index, count)` of an axis for layers, put into the shape of
            what one layer has.
    """

    name: tuple[str, ...]
    shape: tuple[int, ...]
    part: tuple[int, int] | None = None
    stack: tuple[int, int, int] | None = None

    @property
    def array_shape(self) -> tuple[int, ...]:
        """The shape of the whole array."""
        return self._with(
            self.shape, self.part and self.part[1], self.stack and self.stack[2]
        )

    def _with(self, shape, part, stack):
        """`shape` with an element for the part and one for the stack put in."""
        result = list(shape)
        if self.part is not None:
            result.insert(0, part)
        if self.stack is not None:
            result.insert(self.stack[0], stack)
        return tuple(result)

    def index(self, start=0, stop=None, ahead=None):
        """What NumPy takes to cut the weight out of the array.

        Args:
            start: The first row.
            stop: The row after the last; None for all of the weight.
            ahead: Layers to take, as an axis of their own; None for one, without.
        """
        stop = self.shape[0] if stop is None else stop
        rows = (slice(start, stop), *[slice(None)] * (len(self.shape) - 1))
        part = self.part and self.part[0]
        layer = self.stack and self.stack[1]
        if ahead is not None:
            layer = slice(layer, layer + ahead)
        return self._with(rows, part, layer)

    def rows_of(self, numbers):
        """How many rows hold at most `numbers` numbers: at least one."""
        row = math.prod(self.shape[1:])
        return max(1, min(self.shape[0], numbers // max(1, row)))

    def chunks(self, numbers):
        """A chunk of the array in which no other weight has a share."""
        return self._with((self.rows_of(numbers), *self.shape[1:]), 1, 1)


def places(layout, config):
    """Path of each weight of `config.weight_shapes()` to its `Place` in a layout."""
    found = {}
    for path, shape in config.weight_shapes().items():
        if path == "token_embedding/embeddings":
            found[path] = Place(name=layout.embedding, shape=shape)
        elif path == "final_normalization/scale":
            found[path] = Place(name=layout.final_norm, shape=shape)
        else:
            found[path] = layout.in_block(path, shape, config)
    return found


def stored_array(shapes, name, dims, where):
    """The shape of an array that has to be there, with so many axes.

    Args:
        shapes: Name of each array to its shape.
        name: The array.
        dims: The number of its axes.
        where: The directory, for messages.

    Raises:
        CheckpointError: it is missing, or has others.
    """
    found = shapes.get(name)
    if found is None:
        raise CheckpointError(f"{where}: the array {'/'.join(name)} is missing.")
    if len(found) != dims:
        raise CheckpointError(
            f"{where}: {'/'.join(name)} has shape {list(found)}; it must have {dims} "
            "axes."
        )
    return found
