"""The safetensors files of a Hugging Face directory: which ones are read, and which of them holds a tensor."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes  # noqa: F401  the import registers bfloat16 with numpy, for safetensors
import numpy as np
from safetensors import SafetensorError, safe_open

from lsp_jax.core.console import printable, warn
from lsp_jax.core.errors import InputError
from lsp_jax.core.files import read_json_object
from lsp_jax.model.lora import FILES

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
ADAPTER = FILES[0]
"""File that makes a directory a PEFT adapter."""
STORED = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
"""Names of the supported dtypes in safetensors."""
_PICKLED = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.pickle", "*.ckpt")
_CONVERT = (
    "convert a trusted model to safetensors with transformers: "
    "AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(OUT), for a reward model with "
    "AutoModelForSequenceClassification"
)


class Source(NamedTuple):
    """An open file with the tensor that it is read from."""

    path: Path
    name: str
    handle: Any

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape in the file."""
        return tuple(self.handle.get_slice(self.name).get_shape())

    @property
    def dtype(self) -> str:
        """Name of the dtype in safetensors."""
        return self.handle.get_slice(self.name).get_dtype()

    def read(self, index: Any = slice(None)) -> np.ndarray:
        """Reads the slice `index`, in the axis order of the file, and no other bytes."""
        try:
            return self.handle.get_slice(self.name)[index]
        except (SafetensorError, OSError, ValueError) as error:
            raise _damaged(self.name, error) from error


def refuse_adapters(directory: Path) -> None:
    """Raises InputError for a directory with a PEFT adapter, which would not be applied to the model beside it."""
    if (directory / ADAPTER).is_file():
        remedy = "is a PEFT adapter, which is not applied; merge it into its model first (merge_and_unload of PEFT)"
        raise InputError(ADAPTER, str(directory), remedy)


def holds(directory: Path, tensor: str) -> bool:
    """Whether the weights in a directory hold a tensor: by the header of `model.safetensors`, or else by the index."""
    if (directory / SINGLE).is_file():
        with _open(directory / SINGLE) as handle:
            return tensor in handle.keys()  # noqa: SIM118
    return (directory / INDEX).is_file() and tensor in _weight_map(directory)


def open_weights(directory: Path, stack: ExitStack, say: bool = False) -> dict[str, Source]:
    """Opens the files with the weights; returns for every tensor the file from which it is read.

    Reads `model.safetensors` if there is one, as transformers does, else the shards of the index, in which each tensor
    is read from the file that the index names. `say` warns of files and copies that are not read. Raises InputError
    for a directory without either, a shard that is missing, and shards that do not hold what the index says.
    """
    if (directory / SINGLE).is_file():
        path = directory / SINGLE
        if say:
            _say_unread(directory, {SINGLE}, f"{SINGLE} is read, as in transformers")
        handle = stack.enter_context(_open(path))
        return {name: Source(path, name, handle) for name in handle.keys()}  # noqa: SIM118
    if not (directory / INDEX).is_file():
        raise _no_weights(directory)
    shard_of = _weight_map(directory)
    present = {path.name for path in directory.iterdir() if path.is_file()}
    for name, shard in sorted(shard_of.items(), key=lambda entry: entry[1]):
        if shard not in present:
            raise InputError(name, shard, f"this shard of {INDEX} is not in {directory}; download it again")
    handles = {name: stack.enter_context(_open(directory / name)) for name in sorted(set(shard_of.values()))}
    held = {shard: set(handle.keys()) for shard, handle in handles.items()}
    for name, shard in shard_of.items():
        if name not in held[shard]:
            raise InputError(name, shard, f"is not in this file, although {INDEX} says so; download both again")
    copies = []
    for shard, names in held.items():
        for name in sorted(names):
            if name not in shard_of:
                raise InputError(name, shard, f"is in this file, but not in {INDEX}; download both again")
            if shard_of[name] != shard:
                copies.append((name, shard))
    if say:
        _say_unread(directory, set(handles), f"the files of {INDEX} are read")
    if copies and say:
        (name, shard), more = copies[0], f" (and {len(copies) - 1} more tensors)" if len(copies) > 1 else ""
        named = f"{printable(name)}{more} is read from {printable(shard_of[name])}, which {INDEX} names"
        warn(f"{named}; its copy in {printable(shard)} is not used")
    return {name: Source(directory / shard, name, handles[shard]) for name, shard in shard_of.items()}


def _say_unread(directory: Path, read: set[str], told: str) -> None:
    """Warns of other files with weights in the directory."""
    others = sorted(path.name for path in directory.glob("*.safetensors") if path.name not in read)
    if others:
        more = f" and {len(others) - 1} more are" if len(others) > 1 else " is"
        warn(f"{printable(str(directory))}: {told}; {printable(others[0])}{more} not")


def _weight_map(directory: Path) -> dict[str, str]:
    """Returns the file of every tensor, from the index."""
    shard_of = read_json_object(directory / INDEX, "it lists the shards").get("weight_map")
    named = isinstance(shard_of, dict) and shard_of
    if not named or not all(isinstance(name, str) and Path(name).name == name for name in named.values()):
        raise InputError(INDEX, str(directory), "'weight_map' must map tensor names to files in the same directory")
    return named


def _no_weights(directory: Path) -> InputError:
    pickled = sorted(path.name for pattern in _PICKLED for path in directory.glob(pattern))
    others = sorted(path.name for path in directory.glob("*.safetensors"))
    if others:
        remedy = (
            f"is neither {SINGLE} nor listed in {INDEX}, which is missing: no other file is read; download it again"
        )
        return InputError("weights", others[0], remedy)
    if pickled:
        remedy = f"pickled weights can run arbitrary code and are never opened; {_CONVERT}"
        return InputError("weights", pickled[0], remedy)
    return InputError("weights", str(directory), f"contains neither {SINGLE} nor {INDEX}; {_CONVERT}")


def _damaged(path: str, error: Exception) -> InputError:
    return InputError("safetensors", path, f"the file is damaged or truncated ({error}); download it again")


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="numpy")
    except (SafetensorError, OSError) as error:
        raise _damaged(str(path), error) from error
