"""The folder of --out: tried before the work, and written to before its outcome is printed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryFile

from .arguments import Wrong


@contextmanager
def made(path: Path) -> Iterator[None]:
    """Makes the folder and tries to write into it, or raises Wrong. What an error leaves empty is removed again."""
    new: list[Path] = []
    try:
        try:
            new = [one for one in (path, *path.parents) if not one.exists()]
            path.mkdir(parents=True, exist_ok=True)
            with TemporaryFile(dir=path) as file:
                file.write(b"0")
        except OSError as error:
            raise Wrong(f"--out must be a folder to write into, got {path}: {error.strerror}") from error
        yield
    except BaseException:
        for one in new:
            with suppress(OSError):
                one.rmdir()
        raise


@contextmanager
def then_printed(text: str) -> Iterator[None]:
    """Prints the text after what is written inside, whatever becomes of that: a disk may be full."""
    try:
        yield
    except OSError as error:
        raise Wrong(f"--out cannot be written: {error}") from error
    finally:
        print(text)
