"""Programs that TensorFlow's XLA leaves on disk, in the form that it reads in silence.

TensorFlow writes an entry as the bytes of a protocol buffer, and reads it as text
first: of each that is not text it prints an error, and goes on. One that is torn, or
foreign, fails the computation. So what is complete becomes text, and what is not is
removed. The graph, which serves comparison alone, is left out: the key has its 64-bit
fingerprint.

To what an entry asks of a processor, where AVX-512 is part of it, XLA adds what its
compiler was told to prefer. No processor lists that, so TensorFlow prints that the
program may crash (openxla/xla#44565). Entries therefore do not ask for AVX-512: they
lie in a folder for processors with the same instructions.
"""

import os
import re
import shutil
import tempfile

import numpy as np

# Fields of XlaSerializedCacheEntry, and of its key.
_KEY, _GRAPH, _EXECUTABLE = 1, 2, 3
_KEY_FIELDS = {
    1: b"signature_fingerprint",
    2: b"cluster_fingerprint",
    3: b"device_type",
    4: b"prefix",
    5: b"compiled_using_pjrt",
}
_FIRST, _LAST = b"key {", b'"\n'
# The list of what is asked for, with a plus sign, and of what is not.
_ASKED = re.compile(rb"(?:[+-][a-z0-9._-]+,){20,}[+-][a-z0-9._-]+")
_UNASKED = re.compile(rb"\+(?=avx512|prefer-)")


def settle(path):
    """Makes an entry text if it is complete, and removes it if it is not.

    A process that reads it meanwhile finds either form.

    Args:
        path: of the file, which may be gone.

    Raises:
        OSError: the file cannot be read, or the folder not be written to.
    """
    try:
        with open(path, "rb") as file:
            head = file.read(len(_FIRST))
            if head == _FIRST:
                file.seek(-len(_LAST), os.SEEK_END)
                complete = file.read() == _LAST
                text = None
            else:
                text = as_text(head + file.read())
                complete = True
    except FileNotFoundError:
        return
    except ValueError:
        complete = False
    if not complete:
        path.unlink(missing_ok=True)
    elif text is not None:
        _replace(path, text)


def as_text(entry):
    """The text form of an entry's bytes.

    Raises:
        ValueError: it is torn, or something else.
    """
    found = _fields(entry)
    if set(found) != {_KEY, _GRAPH, _EXECUTABLE}:
        raise ValueError("This is no program that XLA has kept, or a part of one.")
    key = _fields(found[_KEY])
    if not set(key) <= set(_KEY_FIELDS):
        raise ValueError("This program's key has fields of another version.")
    words = [b"%s: %s" % (_KEY_FIELDS[n], _said(value)) for n, value in key.items()]
    unasked = lambda asked: _UNASKED.sub(b"-", asked[0])  # noqa: E731
    executable = _said(_ASKED.sub(unasked, found[_EXECUTABLE]))
    return b"key { %s }\nexecutable: %s\n" % (b" ".join(words), executable)


def _fields(message):
    """Number to value of a protocol buffer's integers and bytes."""
    found, at = {}, 0
    while at < len(message):
        tag, at = _integer(message, at)
        value, at = _integer(message, at)
        if tag & 7 == 2:
            start, at = at, at + value
            value = message[start:at]
        elif tag & 7 != 0:
            raise ValueError("Neither an integer nor bytes.")
        found[tag >> 3] = value
    if at != len(message):
        raise ValueError("The last field is torn.")
    return found


def _integer(message, at):
    """A number of seven bits a byte, lowest first, and where it ends."""
    value = shift = 0
    while shift < 64 and at < len(message):
        byte = message[at]
        value, shift, at = value | (byte & 127) << shift, shift + 7, at + 1
        if byte < 128:
            return value, at
    raise ValueError("No end of an integer.")


def _said(value):
    """An integer, or bytes in quotes, as text has them."""
    if isinstance(value, int):
        return b"%d" % value
    spelled = _SPELLED[np.frombuffer(value, np.uint8)]
    return b'"%s"' % spelled[spelled != 0].tobytes()


def _spellings():
    """How text spells each byte: uint8 [256, 4], with zeros at the end."""
    table = np.zeros((256, 4), np.uint8)
    for byte in range(256):
        plain = 32 <= byte < 127 and chr(byte) not in "\"'\\"
        spelling = bytes([byte]) if plain else b"\\%03o" % byte
        table[byte, : len(spelling)] = list(spelling)
    return table


_SPELLED = _spellings()


def _replace(path, text):
    handle, other = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
    try:
        with open(handle, "wb") as file:
            file.write(text)
            file.flush()
            # A file that a crash of the computer leaves empty would fail computations.
            os.fsync(file.fileno())
        shutil.copymode(path, other)
        os.replace(other, path)
    except BaseException:
        os.unlink(other)
        raise
