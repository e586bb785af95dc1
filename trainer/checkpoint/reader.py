"""Reading the metadata of a checkpoint that anybody may have written: no code of theirs runs.

torch.distributed.checkpoint keeps its metadata as a pickle, and a pickle calls whatever it names. Only
names that real metadata needs are resolved here. The tensors themselves torch reads with
`weights_only=True`; objects that it would unpickle without (`BytesStorageMetadata`) are not on the list.
"""

import pathlib
import pickle
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint import filesystem as dcp_filesystem
from torch.distributed.checkpoint import metadata as dcp_metadata
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta

ALLOWED: dict[tuple[str, str], Any] = {
    **{
        (dcp_metadata.__name__, name): getattr(dcp_metadata, name)
        for name in (
            "Metadata",
            "MetadataIndex",
            "StorageMeta",
            "TensorStorageMetadata",
            "ChunkStorageMetadata",
            "TensorProperties",
            "_MEM_FORMAT_ENCODING",
        )
    },
    (dcp_filesystem.__name__, "_StorageInfo"): dcp_filesystem._StorageInfo,
    ("torch", "Size"): torch.Size,
    ("torch.serialization", "_get_layout"): torch.serialization._get_layout,
    **{
        ("torch", name): value
        for name, value in vars(torch).items()
        if isinstance(value, torch.dtype)
    },
    # Where it was written: never used, and pure, so that no other system's kind of path is missing.
    **{
        (module, name): pathlib.PurePosixPath
        for module in ("pathlib", "pathlib._local")
        for name in ("PosixPath", "PurePosixPath", "Path")
    },
}


class _AllowListUnpickler(pickle.Unpickler):
    """Resolves the names in `ALLOWED`."""

    def find_class(self, module: str, name: str) -> Any:
        try:
            return ALLOWED[module, name]
        except KeyError:
            raise pickle.UnpicklingError(
                f".metadata names {module}.{name}, which no checkpoint needs and which could run code"
            ) from None


class CheckpointReader(FileSystemReader):
    """torch's reader, but for the metadata, which is read by an allow-list."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Reads the metadata.

        Raises:
            pickle.UnpicklingError: It is no metadata, names what is not on the list, or data outside of
                the checkpoint.
        """
        folder = Path(self.path)
        if not (folder / ".metadata").is_file():  # a pipe would never end
            raise pickle.UnpicklingError(".metadata is missing, or no regular file")
        with (folder / ".metadata").open("rb") as file:
            metadata = _AllowListUnpickler(file).load()
        if not isinstance(metadata, Metadata):
            raise pickle.UnpicklingError(f".metadata holds a {type(metadata).__name__}")
        for info in metadata.storage_data.values():
            if not isinstance(info, dcp_filesystem._StorageInfo):
                raise pickle.UnpicklingError(
                    f".metadata places a tensor by a {type(info).__name__}"
                )
            # A device would never end, and a file elsewhere is none of this checkpoint's.
            name = info.relative_path
            if Path(name).name != name or not (folder / name).is_file():
                raise pickle.UnpicklingError(f".metadata names the file {name}, which is not there")
        if metadata.storage_meta is None:
            metadata.storage_meta = StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata
