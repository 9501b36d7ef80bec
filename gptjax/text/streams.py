"""Opens a file as bytes of UTF-8: decompressed by its ending, and transcoded from another encoding."""

import bz2
import codecs
import contextlib
import gzip
import io
import zlib
from collections.abc import Iterator
from typing import Any

from gptjax.errors import UserError
from gptjax.text.remote import File, RemoteFile, file_size, redact

COMPRESSIONS = (".gz", ".zst", ".bz2")
_CHUNK_BYTES = 2**16


def open_raw(path: File) -> io.BufferedReader:
    """Opens a file as it is, here or behind an address; the caller closes it."""
    if isinstance(path, RemoteFile):
        return io.BufferedReader(path.open(), buffer_size=2**20)
    return open(path, "rb")


def open_binary(path: File, encoding: str = "utf-8") -> io.BufferedReader:
    """Opens a file for reading; the caller closes it.

    Args:
        path: Decompressed where its name ends in one of `COMPRESSIONS`.
        encoding: Encoding of the text in it. Text of another one than UTF-8 is transcoded; what is not valid in it
            gives bytes that are no UTF-8 either, so that the reader finds the row that they are in.

    Raises:
        EOFError: A compressed file is empty.
    """
    compression = path.suffix.lower()
    file = open_raw(path)
    if compression in COMPRESSIONS:
        if file_size(path) == 0:
            file.close()
            raise EOFError
        raw: Any = {".gz": _OwningGzip, ".zst": _ZstdStream, ".bz2": _OwningBzip2}[compression](file)
        file = io.BufferedReader(raw, buffer_size=2**20)
    if encoding == "utf-8":
        return file
    transcoded: Any = _Transcoded(file, encoding)
    return io.BufferedReader(transcoded, buffer_size=2**20)


@contextlib.contextmanager
def named_errors(path: File) -> Iterator[None]:
    """Turns what reading raises into one line that names the file."""
    import zstandard

    try:
        yield
    except EOFError:
        raise UserError(f"{path}: ends too early: the compressed file is truncated") from None
    except (gzip.BadGzipFile, zlib.error, zstandard.ZstdError) as error:
        raise UserError(f"{path}: not a valid {path.suffix} file: {one_line_of(error)}") from None
    except OSError as error:
        if path.suffix.lower() == ".bz2" and error.errno is None:
            raise UserError(f"{path}: not a valid .bz2 file: {one_line_of(error)}") from None
        raise UserError(f"{path}: cannot be read: {redact(error.strerror or error)}") from None
    except UserError:
        raise
    except Exception as error:  # the library behind an address has errors of its own, which may name credentials
        if isinstance(path, RemoteFile):
            raise UserError(f"{path}: cannot be read: {redact(error)}") from None
        raise


def one_line_of(error: BaseException) -> str:
    """The message of a library's error on one line."""
    return " ".join(str(error).split()) or type(error).__name__


class _OwningGzip(gzip.GzipFile):
    """A gzip reader that closes the file below it, and that has no `raw` file to seek in."""

    def __init__(self, file: io.BufferedReader):
        super().__init__(fileobj=file, mode="rb")
        self._below = file

    def close(self) -> None:
        super().close()
        self._below.close()


class _OwningBzip2(bz2.BZ2File):
    """A bzip2 reader that closes the file below it."""

    def __init__(self, file: io.BufferedReader):
        super().__init__(file)
        self._below = file

    def close(self) -> None:
        super().close()
        self._below.close()


class _BytesSource(io.RawIOBase):
    """A stream whose bytes come in chunks from `_next_chunk`."""

    def __init__(self, file: io.BufferedReader):
        self._below = file
        self._ready = memoryview(b"")

    def _next_chunk(self) -> bytes | None:
        """The next bytes, possibly none; None at the end."""
        raise NotImplementedError

    def readable(self) -> bool:
        return True

    def readinto(self, buffer, /) -> int:
        while not self._ready:
            chunk = self._next_chunk()
            if chunk is None:
                return 0
            self._ready = memoryview(chunk)
        target = memoryview(buffer)
        size = min(len(target), len(self._ready))
        target[:size] = self._ready[:size]
        self._ready = self._ready[size:]
        return size

    def close(self) -> None:
        self._below.close()
        super().close()


class _ZstdStream(_BytesSource):
    """Decompresses frame after frame.

    zstandard's own stream reader takes a truncated file for a complete one; this one raises EOFError.
    """

    def __init__(self, file: io.BufferedReader):
        super().__init__(file)
        self._frame = None
        self._compressed = b""

    def _next_chunk(self) -> bytes | None:
        import zstandard

        self._compressed = self._compressed or self._below.read(_CHUNK_BYTES)
        if not self._compressed:
            if self._frame is not None:
                raise EOFError
            return None
        if self._frame is None:
            self._frame = zstandard.ZstdDecompressor(max_window_size=2**31).decompressobj()
        chunk = self._frame.decompress(self._compressed)
        self._compressed = b""
        if self._frame.eof:
            self._compressed = self._frame.unused_data
            self._frame = None
        return chunk


class _Transcoded(_BytesSource):
    """Text of another encoding as UTF-8."""

    def __init__(self, file: io.BufferedReader, encoding: str):
        super().__init__(file)
        # Lone surrogates stand for what is not valid: bytes that cp1252 leaves open, halves of pairs in UTF-16.
        self._errors = "surrogatepass" if encoding == "utf-16" else "surrogateescape"
        self._decoder = codecs.getincrementaldecoder(encoding)(self._errors)
        self._encoding, self._ended = encoding, False

    def _next_chunk(self) -> bytes | None:
        if self._ended:
            return None
        chunk = self._below.read(_CHUNK_BYTES)
        self._ended = not chunk
        try:
            return self._decoder.decode(chunk, self._ended).encode("utf-8", self._errors)
        except UnicodeError as error:
            reason = getattr(error, "reason", error)
            raise OSError(f"not valid {self._encoding}: {reason}; is data.encoding right?") from None
