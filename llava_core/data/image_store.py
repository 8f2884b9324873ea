"""Opens the images of a data set: nothing outside its folder, and nothing too large to decode."""

from __future__ import annotations

import io
import os
import stat
import struct
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from PIL import Image, UnidentifiedImageError

from llava_core.data.records import EmbeddedImage
from llava_core.errors import BadRow, DataError

# Pixels of the largest image made on the way (512 MiB): a 1 x 100000 image is small on disk and in memory, but
# neither as a padded square nor with its shortest edge at 336.
MAX_WORKING_PIXELS = 2**27

# Rasters only: Pillow would hand an EPS file to Ghostscript, which runs it as a program.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")

# What Pillow raises on damaged files; AVIF's is a RuntimeError.
DAMAGED = (OSError, SyntaxError, ValueError, EOFError, RuntimeError, TypeError, LookupError, struct.error, zlib.error)


class ImageStore:
    """The images of a data set, in a folder or in the rows: nothing outside is read, and nothing large is decoded.

    Args:
        root: the folder; None where rows bring their images along.

    Raises:
        DataError: `root` is not a folder.
    """

    def __init__(self, root: Path | None, max_pixels: int) -> None:
        if root is not None and not root.is_dir():
            raise DataError(f"the image folder {root} is not a folder that can be read; check the path")
        Image.init()  # fills Image.OPEN, which lacks the formats this Pillow was built without
        self.root = None if root is None else root.resolve()
        self.max_pixels = max_pixels
        self._formats = tuple(name for name in FORMATS if name in Image.OPEN)

    def open(self, image: str | EmbeddedImage) -> Image.Image:
        """The decoded image, by its path in the folder or from its bytes.

        Its pixels are those of `Image.open(path).convert("RGB")`, as the original LLaVA reads it.

        EXIF rotation is not applied and transparency is dropped, not blended: the original does neither.

        Raises:
            BadRow: `image_outside_folder`, `missing_image`, `image_too_large` (from the header, before decoding),
                `broken_image`, or `unexpected_image` for a path without a folder.
        """
        name, open_file = self._source(image)
        with self._reading(name), open_file() as file:
            rgb = self.to_rgb(self._identify(name, file))
        # Left there by palette images: other libraries would take it as a colour to blend on white.
        rgb.info.pop("transparency", None)
        return rgb

    def to_rgb(self, image: Image.Image) -> Image.Image:
        """The decoded pixels of an image of which only the header was read."""
        return image.convert("RGB")

    def size(self, image: str | EmbeddedImage) -> tuple[int, int]:
        """The image's (height, width), from its header alone.

        Raises:
            BadRow: as `open`, but for what only decoding can find.
        """
        name, open_file = self._source(image)
        with self._reading(name), open_file() as file:
            found = self._identify(name, file)
            return found.height, found.width

    def format_of(self, image: EmbeddedImage) -> str:
        """What Pillow calls the format of an image, all of which can be decoded. Raises BadRow as `open`."""
        self.open(image)
        with self._reading(image.name):
            return str(self._identify(image.name, io.BytesIO(image.data)).format)

    def read_bytes(self, image: str | EmbeddedImage) -> bytes:
        """The image file as it is, which may be no image.

        Raises:
            BadRow: as `open`, of where it is.
        """
        name, open_file = self._source(image)
        with self._reading(name), open_file() as file:
            return file.read()

    def _source(self, image: str | EmbeddedImage) -> tuple[str, Callable[[], BinaryIO]]:
        if isinstance(image, EmbeddedImage):
            return image.name, lambda: io.BytesIO(image.data)
        path = self._locate(image)
        return image, lambda: path.open("rb")

    def _identify(self, name: str, file: BinaryIO) -> Image.Image:
        """The image of a file, not decoded yet."""
        image = Image.open(file, formats=self._formats)
        check_size(f"{name!r}", image.size, self.max_pixels)
        return image

    @contextmanager
    def _reading(self, name: str) -> Iterator[None]:
        """Around what Pillow reads; what it raises becomes a BadRow."""
        try:
            with warnings.catch_warnings():
                # The limit that holds is max_pixels; Pillow's warning would come beside it, or alone and to no effect.
                warnings.simplefilter("ignore", Image.DecompressionBombWarning)
                warnings.filterwarnings("ignore", message="Palette images with Transparency")
                yield
        except BadRow:  # a ValueError too
            raise
        except Image.DecompressionBombError as error:
            raise BadRow("image_too_large", f"{name!r}: {error} The limit is {self.max_pixels} pixels") from error
        except UnidentifiedImageError as error:  # whose message has an address in it that differs each time
            known = ", ".join(self._formats)
            raise BadRow("broken_image", f"{name!r} is no image in a format that is read: {known}") from error
        except DAMAGED as error:
            raise BadRow("broken_image", f"{name!r} cannot be read: {type(error).__name__}: {error}") from error

    def _locate(self, relative: str) -> Path:
        """The real path of a file in the folder; every link followed, so that what is inside cannot lead out."""
        if self.root is None:
            raise BadRow(
                "unexpected_image",
                f"the row has the image {relative!r}, and no image folder is given: "
                "set data.images or the source's images, or --images of data prepare",
            )
        try:
            path = Path(os.path.realpath(self.root / relative))
        except ValueError as error:  # a NUL, or half of a surrogate pair
            raise BadRow("missing_image", f"{relative!r} cannot be a file name: {error}") from error
        if os.path.isabs(relative) or not path.is_relative_to(self.root):
            raise BadRow(
                "image_outside_folder",
                f"{relative!r} leads to {path}, outside the image folder {self.root}; "
                "paths must be relative to the folder, and links must stay inside it",
            )
        try:
            mode = path.stat().st_mode
        except (FileNotFoundError, NotADirectoryError) as error:
            raise BadRow("missing_image", f"{relative!r} is not in the image folder {self.root}") from error
        except OSError as error:
            raise BadRow("broken_image", f"{relative!r} cannot be read: {error.strerror}") from error
        if not stat.S_ISREG(mode):  # opening a pipe would wait for ever
            raise BadRow("broken_image", f"{relative!r} is a {'folder' if stat.S_ISDIR(mode) else 'special file'}")
        return path


def check_size(what: str, size: tuple[int, int], limit: int) -> None:
    """Refuse an image of no pixels or of more than `limit`. Raises BadRow."""
    pixels = size[0] * size[1]
    if pixels > limit:
        raise BadRow("image_too_large", f"{what} is {size[0]} x {size[1]} = {pixels} pixels, the limit is {limit}")
    if not pixels:
        raise BadRow("broken_image", f"{what} is {size[0]} x {size[1]} pixels")
