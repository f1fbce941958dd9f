"""A run's folder: what may be written there, what it holds, and another run's policy read out of it."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
from huggingface_hub import HfApi
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from jax.sharding import Mesh

from lsp_jax import config as configs
from lsp_jax.config import TrainConfig
from lsp_jax.errors import InputError
from lsp_jax.model.config import LlamaConfig
from lsp_jax.model.llama import Params, cast, init_params, params_shape
from lsp_jax.model.lora import check_adapters_replaceable, init_adapters, merged, save_adapters
from lsp_jax.model.weights import check_dtype, load_params, read_config
from lsp_jax.paths import check_writable, user_path
from lsp_jax.policy import Policy, check_replaceable, open_pretrained, save_pretrained
from lsp_jax.run.card import model_card
from lsp_jax.run.checkpoint import Checkpoints, Damaged, abstract
from lsp_jax.run.identity import MANIFEST, parameters_digest, reference_of
from lsp_jax.run.metrics import FILES
from lsp_jax.text.tokenizer import Tokenizer

CHECKPOINTS, BASE, EXPORT, PROFILE = "checkpoints", "base", "export", "profile"
REPORT = "report.html"
_RUN_FILES = ("config.json", *FILES, CHECKPOINTS, EXPORT)


# --- this run's folder -------------------------------------------------------------------------------------------


def check_output(config: TrainConfig, directory: Path) -> None:
    """Raises InputError when the folder cannot be written to, holds another run, or not the one to be resumed."""
    if directory.exists() and not directory.is_dir():
        raise InputError("output_dir", config.output_dir, "is a file; give a directory")
    check_writable("output_dir", directory)
    check_replaceable(directory / EXPORT)
    found = [name for name in _RUN_FILES if (directory / name).exists()]
    if config.resume == "never" and found:
        raise InputError(
            "output_dir",
            config.output_dir,
            f"holds another run ({found[0]}); give a new directory, or --resume auto to go on with it",
        )
    if config.resume == "must" and not saved_steps(directory):
        raise InputError("resume", "must", f"no checkpoint in {directory / CHECKPOINTS}; use auto or never to start")
    if found and "config.json" not in found:
        raise InputError("output_dir", config.output_dir, f"holds {found[0]} but no config.json; give a new directory")
    if "config.json" in found:
        changed = configs.differences(TrainConfig.load(directory / "config.json"), config)
        if changed:
            raise InputError(
                "resume",
                config.resume,
                f"the run in {directory} was started with another {', '.join(changed)}; "
                "use the same values or a new output_dir",
            )


def settled(config: TrainConfig, directory: Path) -> TrainConfig:
    """With what is decided once a run: the day that chat templates show, and the checkpoint that it starts from.

    Given in `config`, else the resumed run's, else today's day and the newest checkpoint of `init_from`.
    """
    saved = directory / "config.json"
    earlier = TrainConfig.load(saved) if config.resume != "never" and saved.is_file() else None
    date, step = config.date, config.init_step
    if earlier is not None:
        date = date or earlier.date
        if config.init_from == earlier.init_from:
            step = step or earlier.init_step
    if config.init_from:
        step = _checked_step(user_path("init_from", config.init_from), step or None, "init_step")
    return replace(config, date=date or time.strftime("%d %b %Y"), init_step=step)


def claim(directory: Path, config: TrainConfig, policy: Policy, identity: Mapping[str, Any]) -> None:
    """Makes the run's folder, with its configuration, what it started with (`identity`, the first time) and, so that
    the run can be exported alone, the base model's configuration and tokenizer."""
    base = directory / BASE
    base.mkdir(parents=True, exist_ok=True)
    files = {"config.json": config.to_json()}
    if not (directory / MANIFEST).exists():
        started_with = {name: value for name, value in identity.items() if name != "config"}
        files = {MANIFEST: json.dumps(started_with, indent=2) + "\n", **files}
    for name, text in files.items():
        fresh = directory / f".{name}.new"
        fresh.write_text(text, encoding="utf-8")
        fresh.replace(directory / name)  # whole or not at all: without a configuration the run cannot be resumed
    hf_config = json.dumps(policy.config.to_hf(), indent=2) + "\n"
    (base / "config.json").write_text(hf_config, encoding="utf-8")
    policy.tokenizer.save(base)


# --- a run's policy, for its export or for the next stage ----------------------------------------------------------


def open_run(run: str | Path) -> Policy:
    """The model configuration and tokenizer of the run in that folder; `params` is empty.

    Raises InputError when the folder holds no run.
    """
    run = user_path("run", run)
    TrainConfig.load(run / "config.json")
    return Policy(read_config(run / BASE), {}, Tokenizer.from_pretrained(run / BASE), str(run))


def load_run_params(run: str | Path, step: int, dtype: str | None = None, mesh: Mesh | None = None) -> Params:
    """The policy's parameters at checkpoint `step` of a run, in `dtype` (None keeps the checkpoint's), spread over
    `mesh`, whatever mesh saved them."""
    run = user_path("run", run)
    model, config = read_config(run / BASE), TrainConfig.load(run / "config.json")
    if config.lora.rank:
        adapters = load_run_adapters(run, step, mesh)
        params = merged(_base_params(run, config, model, mesh), adapters, config.lora, over=True)
        return cast(params, dtype or config.param_dtype)
    shapes = abstract(mesh, lambda: cast(init_params(model, jax.random.key(0)), config.param_dtype))
    params = _restored(run, step, shapes)
    return params if dtype is None else cast(params, dtype)


def load_run_adapters(run: str | Path, step: int, mesh: Mesh | None = None) -> Params:
    """The adapters at checkpoint `step` of a run, float32. Raises InputError where the run trained no adapters."""
    run = user_path("run", run)
    lora = TrainConfig.load(run / "config.json").lora
    if not lora.rank:
        raise InputError("run", str(run), "trained all parameters, not adapters (--lora.rank): export them merged")
    model = params_shape(read_config(run / BASE))
    return _restored(run, step, abstract(mesh, lambda: init_adapters(model, lora)))


def _restored(run: Path, step: int, shapes: Params) -> Params:
    """What a checkpoint holds as the policy's parameters."""
    checkpoints = Checkpoints(run / CHECKPOINTS)
    try:
        return checkpoints.restore_params(step, shapes)
    except Damaged as error:
        raise InputError("checkpoint", f"{checkpoints.directory}/{step}", f"is damaged: {error}") from error
    finally:
        checkpoints.close()


def _base_params(run: Path, config: TrainConfig, model: LlamaConfig, mesh: Mesh | None) -> Params:
    """The float32 parameters that a run's adapters were trained beside; InputError where they are others by now."""
    if config.init_from:
        source = config.init_from
        base = load_run_params(source, config.init_step, "float32", mesh)
    else:
        source = config.model
        base = load_params(open_pretrained(source, config.revision or None)[0], model, "float32", mesh)
    known = reference_of(run)["digest"]
    if known not in (parameters_digest(base, dtype) for dtype in ("float32", "bfloat16")):
        raise InputError("model", source, f"its parameters are not those that the adapters in {run} were trained on")
    return base


def export_adapters(run: str | Path, directory: str | Path, step: int | None = None) -> int:
    """Writes the adapters of a run's checkpoint (the newest without `step`) as PEFT's two files.

    Returns the checkpoint's iteration. Raises InputError when the folder holds no run with adapters or no such
    checkpoint, when `directory` holds anything else than an earlier export of adapters, and when the adapters belong to
    the policy of another run, which PEFT could not load.
    """
    target, run = user_path("directory", directory), user_path("run", run)
    check_adapters_replaceable(target)
    step = _checked_step(run, step, "step")
    config = TrainConfig.load(run / "config.json")
    if config.init_from and config.lora.rank:
        raise InputError(
            "run", str(run), f"its adapters belong to the policy of {config.init_from}: export them merged"
        )
    adapters = load_run_adapters(run, step)
    revision = reference_of(run)["commit"] or config.revision or None
    card = model_card(run, step, adapters=True)
    save_adapters(adapters, config.lora, config.model, target, revision, card)
    return step


def export_run(run: str | Path, directory: str | Path, step: int | None = None, dtype: str | None = None) -> int:
    """Writes the policy of a run's checkpoint (the newest without `step`) as a Hugging Face directory.

    Returns the checkpoint's iteration. Raises InputError when the folder holds no run or no such checkpoint.
    """
    if dtype is not None:
        check_dtype(dtype)
    check_replaceable(user_path("directory", directory))
    step = _checked_step(user_path("run", run), step, "step")
    policy = open_run(run)
    card = model_card(user_path("run", run), step)
    save_pretrained(replace(policy, params=load_run_params(run, step)), directory, dtype, card)
    return step


def check_repo_id(repo_id: str) -> None:
    """Raises InputError unless the hub could have a repository of that name, its owner named."""
    try:
        validate_repo_id(repo_id)
        if "/" not in repo_id:
            raise HFValidationError("it names no owner")
    except HFValidationError as error:
        raise InputError("push_to_hub", repo_id, f"must be OWNER/NAME as the hub allows it ({error})") from None


def push_to_hub(directory: str | Path, repo_id: str, private: bool = False) -> str:
    """Uploads an export, or a folder of adapters, to the hub as `repo_id`, which is made where it is missing, and
    returns its address. Needs HF_TOKEN with the right to write. Raises InputError where the hub refuses, and where
    `private` is asked of a repository that others can see already."""
    folder = user_path("directory", directory)
    if not any((folder / name).is_file() for name in ("config.json", "adapter_config.json")):
        raise InputError("directory", str(directory), "holds no export; write one first")
    check_repo_id(repo_id)
    try:
        # None: as the owner's account or organisation has it
        url = HfApi().create_repo(repo_id, private=private or None, exist_ok=True)
        seen = private and not HfApi().repo_info(repo_id).private
    except Exception as error:
        raise _refused(repo_id, error) from None
    if seen:
        raise InputError("private", True, f"{repo_id} is there already, and not private: nothing was uploaded")
    try:
        HfApi().upload_folder(repo_id=repo_id, folder_path=folder, commit_message="Export of lsp_jax")
    except Exception as error:
        raise _refused(repo_id, error) from None
    return str(url)


def _refused(repo_id: str, error: Exception) -> InputError:
    """Whatever the network did; its text may quote the token's header: left out."""
    remedy = f"could not be uploaded ({type(error).__name__}): is HF_TOKEN set, with the right to write there?"
    return InputError("push_to_hub", repo_id, remedy)


def _checked_step(run: Path, step: int | None, field: str) -> int:
    """`step`, or the newest checkpoint; InputError where there is no run or no such checkpoint."""
    TrainConfig.load(run / "config.json")
    saved = saved_steps(run)
    if not saved or (step is not None and step not in saved):
        raise InputError(field, step, f"{run} has checkpoints {saved or 'none'}; give one of them or none")
    return max(saved) if step is None else step


def saved_steps(run: Path) -> list[int]:
    """Iterations of the checkpoints in that run's folder, the oldest first."""
    checkpoints = Checkpoints(run / CHECKPOINTS)
    try:
        return checkpoints.steps()
    finally:
        checkpoints.close()
