"""Writing large arrays a piece at a time."""

from gemma_keras.buffers import ordered

# Bytes that are written at a time. For longer ones Linux looks for longer runs of free
# memory, which takes it several times as long as the writing.
PIECE = 2**17


def write_array(file, array):
    """Writes the numbers of an array in C order; a strided one by way of a copy."""
    data = ordered(array).reshape(-1).view("uint8")
    for start in range(0, len(data), PIECE):
        file.write(data[start : start + PIECE])
