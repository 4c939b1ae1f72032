"""The folder that media of a record's names lie in."""

import errno
import os
from pathlib import Path

from avlm.config.run import DataConfig
from avlm.config.values import shown


class MediaFolder:
    """Files of ``data.media_root``, or of the folder of a data set if there is none."""

    def __init__(self, own: Path, data: DataConfig) -> None:
        self.own = own
        self.root = Path(data.media_root) if data.media_root else own
        self.max_bytes = data.max_media_bytes

    def read(self, name: str) -> bytes:
        """A file by its name in the folder or by its absolute name, which may also lie in the data set's own folder.
        Names that lead out of both are refused; symbolic links inside them are followed."""
        path = self._inside(name)
        try:
            if not path.is_file():
                raise ValueError(f"no media file {shown(str(path))}")
            size = path.stat().st_size
            if size > self.max_bytes:
                raise ValueError(
                    f"{shown(str(path))} has {size} bytes, more than data.max_media_bytes={self.max_bytes}"
                )
            return path.read_bytes()
        except OSError as error:
            if error.errno not in (errno.ENAMETOOLONG, errno.EACCES, errno.ELOOP):
                raise  # a failing disk is not the sample's fault
            raise ValueError(f"media file {shown(str(path))} cannot be read: {error.strerror}") from None

    def _inside(self, name: str) -> Path:
        if name.startswith("//"):  # POSIX keeps two slashes apart from one
            name = "/" + name.lstrip("/")
        path = Path(os.path.normpath(name))
        fix = ""
        if path.is_absolute():
            roots = [self.root, self.own]
            # An absolute name may go through a link or past it.
            forms = [os.path.abspath(root) for root in roots] + [os.path.realpath(root) for root in roots]
            if not any(path.is_relative_to(form) for form in forms):
                fix = "set data.media_root to a folder that holds it"
        elif path.parts[:1] == ("..",):
            fix = "set data.media_root to a folder that holds all media, and write names relative to it, without .."
        if fix:
            raise ValueError(f"media name {shown(name)!r} leads out of {self.root}: {fix}")
        return self.root / path
