"""The byte-level model that ships with the package, and what it was trained on: the standard library.

Tokens are bytes, 0 to 255; the mask is 256. ``scripts/train_bytes_model.py`` makes the file.
"""

from __future__ import annotations

import hashlib
import sysconfig
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from driftmax.discrete.network import RADD

__all__ = ["MASK_ID", "decode", "encode", "load_bytes_model", "standard_library"]

#: Id of the mask, behind the 256 bytes.
MASK_ID = 256
PATH = Path(__file__).with_name("bytes_model.safetensors")

# Tests are not library code; the encodings and the help topics are tables and prose; the rest is generated or
# not part of Python.
_SKIPPED = frozenset(
    {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "pydoc_data", "__pycache__"}
)
_GENERATED = "_sysconfigdata"
_LEAST_FILES = 100
_HELD_OUT = 16


def load_bytes_model(*, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> RADD:
    """The shipped network: a `RADD` over bytes of Python source, trained on windows of 256 bytes.

    Parameters
    ----------
    device : torch.device or str, default "cpu"
        Where it goes.
    dtype : torch.dtype, default torch.float32
        Type of its parameters; the file holds float16.

    Returns
    -------
    RADD
        In evaluation mode; ``config.mask_id`` is 256, ``config.length`` 256.

    Raises
    ------
    FileNotFoundError
        If the package was installed without its data file.

    Examples
    --------
    >>> from driftmax.discrete.bytes_model import decode, encode, load_bytes_model
    >>> model = load_bytes_model()
    >>> tokens = encode("        if not self.name:\\n            retur_ None\\n")
    >>> tokens[43] = model.config.mask_id
    >>> decode(model(tokens[None])[0, 43].argmax()[None])
    'n'
    """
    if not PATH.is_file():
        raise FileNotFoundError(
            f"{PATH.name} is missing; reinstall driftmax or run scripts/train_bytes_model.py"
        )
    return RADD.load(PATH, device=device, dtype=dtype)


def encode(text: str) -> Tensor:
    """Bytes of a text in UTF-8 as tokens, int64 ``[L]``.

    Examples
    --------
    >>> from driftmax.discrete.bytes_model import encode
    >>> encode("hi")
    tensor([104, 105])
    """
    return torch.tensor(list(text.encode("utf-8")), dtype=torch.int64)


def decode(tokens: Tensor, *, mask: str = "░") -> str:
    """Text of tokens ``[L]``; bytes that are not UTF-8 become U+FFFD, masks become `mask`.

    Examples
    --------
    >>> import torch
    >>> from driftmax.discrete.bytes_model import decode
    >>> decode(torch.tensor([104, 256, 105, 255]), mask="_")
    'h_i\ufffd'
    """
    replacement = mask.encode("utf-8")
    raw = b"".join(replacement if token == MASK_ID else bytes((token,)) for token in tokens.tolist())
    return raw.decode("utf-8", errors="replace")


def standard_library(split: Literal["train", "held_out"], root: Path | None = None) -> Tensor:
    """The standard library's Python sources, end to end: the text that the shipped model was trained on.

    A file is held out if the SHA-256 of its path relative to the library is 0 modulo 16, so about one in
    sixteen, the same ones on every machine. Left out are tests, ``encodings`` (tables), ``pydoc_data``
    (prose), generated files and installed packages.

    Parameters
    ----------
    split : {"train", "held_out"}
        Which part.
    root : Path, optional
        The library; by default that of the running Python.

    Returns
    -------
    Tensor
        uint8 ``[N]``, the files in order of their paths. Which files there are depends on Python's version.

    Raises
    ------
    FileNotFoundError
        If Python was installed without its sources.

    Examples
    --------
    >>> from driftmax.discrete.bytes_model import standard_library
    >>> text = standard_library("held_out")
    >>> text.dtype, len(text) > 100_000
    (torch.uint8, True)
    """
    root = root or Path(sysconfig.get_path("stdlib"))
    paths = {path.relative_to(root).as_posix(): path for path in root.rglob("*.py")}
    names = [
        name
        for name in sorted(paths)
        if not _SKIPPED & set(name.split("/")) and not paths[name].name.startswith(_GENERATED)
    ]
    if len(names) < _LEAST_FILES:
        raise FileNotFoundError(f"the standard library's sources are not in {root}: {len(names)} files")
    chosen = [name for name in names if _held_out(name) == (split == "held_out")]
    raw = b"".join(paths[name].read_bytes() for name in chosen)
    return torch.frombuffer(bytearray(raw), dtype=torch.uint8)


def _held_out(name: str) -> bool:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") % _HELD_OUT == 0
