"""A part of a file, read as a file of its own: what is inside an archive."""

import io

from gemma_keras.checkpoints.mapped_file import MappedFile

# Far above the lists of contents and the pickles of any Gemma. Libraries read as much
# as an archive tells them to; a hostile one must not fill the memory.
MAX_READ = 2**21


class FilePart(io.RawIOBase):
    """Bytes `start` to `start + size` of a `MappedFile`, for reading.

    Raises `ValueError` when more than `MAX_READ` bytes are asked for at once.
    """

    def __init__(self, file: MappedFile, start=0, size=None):
        self._file = file
        self._start = start
        self.size = file.size - start if size is None else size
        self._position = 0

    def readable(self):
        """It is."""
        return True

    def seekable(self):
        """It is."""
        return True

    def tell(self):
        """Where the next read begins."""
        return self._position

    def seek(self, offset, whence=io.SEEK_SET):
        """Moves as files do; before the beginning raises `ValueError`."""
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self.size}
        position = base[whence] + offset
        if position < 0:
            raise ValueError(f"byte {position} is before the beginning")
        self._position = position
        return position

    def read(self, size=-1):
        """At most `size` bytes, fewer at the end; all that is left if negative."""
        left = max(self.size - self._position, 0)
        count = left if size is None or size < 0 else min(size, left)
        if count > MAX_READ:
            raise ValueError(f"{count:,} bytes of headers are too many")
        data = self._file.read(self._start + self._position, count)
        self._position += len(data)
        return data
