"""Loading the policy of a run from its folder, and exporting it to Hugging Face or PEFT directories and the hub."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import jax
from huggingface_hub import HfApi
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from jax.sharding import Mesh

from lsp_jax.checkpoint.manager import Checkpoints, Damaged, abstract
from lsp_jax.checkpoint.model_card import model_card
from lsp_jax.checkpoint.provenance import parameters_digest, reference_of
from lsp_jax.checkpoint.run_dir import BASE, CHECKPOINTS, checked_step
from lsp_jax.config import TrainConfig
from lsp_jax.core.errors import InputError
from lsp_jax.core.files import user_path
from lsp_jax.model.config import LlamaConfig
from lsp_jax.model.llama import Params, cast, init_params, params_shape
from lsp_jax.model.lora import check_adapters_replaceable, init_adapters, merged, save_adapters
from lsp_jax.model.weight_checks import check_range
from lsp_jax.model.weights import check_dtype, load_params, read_config
from lsp_jax.policy import Policy, check_replaceable, open_pretrained, save_pretrained
from lsp_jax.text.tokenizer import Tokenizer


def open_run(run: str | Path) -> Policy:
    """Returns the model configuration and tokenizer of a run; `params` is empty.

    Raises InputError if the folder holds no run.
    """
    run = user_path("run", run)
    TrainConfig.load(run / "config.json")
    config = read_config(run / BASE)
    return Policy(config, {}, Tokenizer.from_pretrained(run / BASE).within(config.vocab_size), str(run))


def load_run_params(run: str | Path, step: int, dtype: str | None = None, mesh: Mesh | None = None) -> Params:
    """Loads the policy's parameters at checkpoint `step` of a run in `dtype` (None keeps the checkpoint's).

    They are sharded over `mesh`, whatever mesh saved them; adapters are merged. Raises InputError for a value that
    would become infinite in `dtype`.
    """
    run = user_path("run", run)
    model, config = read_config(run / BASE), TrainConfig.load(run / "config.json")
    if config.lora.rank:
        adapters = load_run_adapters(run, step, mesh)
        params = merged(_base_params(run, config, model, mesh), adapters, config.lora, over=True)
        dtype = dtype or config.param_dtype
        check_range(params, model, dtype)
        return cast(params, dtype)
    shapes = abstract(mesh, lambda: cast(init_params(model, jax.random.key(0)), config.param_dtype))
    params = _restored(run, step, shapes)
    if dtype is None:
        return params
    check_range(params, model, dtype)
    return cast(params, dtype)


def load_run_adapters(run: str | Path, step: int, mesh: Mesh | None = None) -> Params:
    """Loads the float32 adapters at checkpoint `step` of a run. Raises InputError if the run trained no adapters."""
    run = user_path("run", run)
    lora = TrainConfig.load(run / "config.json").lora
    if not lora.rank:
        raise InputError("run", str(run), "trained all parameters, not adapters (--lora.rank): export the full model")
    model = params_shape(read_config(run / BASE))
    return _restored(run, step, abstract(mesh, lambda: init_adapters(model, lora)))


def _restored(run: Path, step: int, shapes: Params) -> Params:
    """Restores the policy's parameters from a checkpoint."""
    checkpoints = Checkpoints(run / CHECKPOINTS)
    try:
        return checkpoints.restore_params(step, shapes)
    except Damaged as error:
        raise InputError("checkpoint", f"{checkpoints.directory}/{step}", f"is damaged: {error}") from error
    finally:
        checkpoints.close()


def _base_params(run: Path, config: TrainConfig, model: LlamaConfig, mesh: Mesh | None) -> Params:
    """Loads the frozen float32 parameters under a run's adapters; InputError if they have changed since."""
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
    """Writes the adapters of a run's checkpoint (default: the newest) as PEFT's two files.

    Returns the checkpoint's iteration. Raises InputError if the folder holds no run with adapters or no such
    checkpoint, if `directory` holds anything but an earlier export of adapters, and if the base of the adapters is the
    policy of another run, which PEFT could not load.
    """
    target, run = user_path("directory", directory), user_path("run", run)
    check_adapters_replaceable(target)
    step = checked_step(run, step, "step")
    config = TrainConfig.load(run / "config.json")
    if config.init_from and config.lora.rank:
        raise InputError(
            "run", str(run), f"its adapters belong to the policy of {config.init_from}: export the merged model"
        )
    adapters = load_run_adapters(run, step)
    revision = reference_of(run)["commit"] or config.revision or None
    card = model_card(run, step, adapters=True)
    save_adapters(adapters, config.lora, config.model, target, revision, card)
    return step


def export_run(run: str | Path, directory: str | Path, step: int | None = None, dtype: str | None = None) -> int:
    """Writes the policy of a run's checkpoint (default: the newest) as a Hugging Face directory.

    Returns the checkpoint's iteration. Raises InputError if the folder holds no run or no such checkpoint.
    """
    if dtype is not None:
        check_dtype(dtype)
    check_replaceable(user_path("directory", directory))
    step = checked_step(user_path("run", run), step, "step")
    policy = open_run(run)
    card = model_card(user_path("run", run), step)
    save_pretrained(replace(policy, params=load_run_params(run, step)), directory, dtype, card)
    return step


def check_repo_id(repo_id: str) -> None:
    """Raises InputError unless `repo_id` is a valid repository name on the hub, including its owner."""
    try:
        validate_repo_id(repo_id)
        if "/" not in repo_id:
            raise HFValidationError("it has no owner")
    except HFValidationError as error:
        raise InputError("push_to_hub", repo_id, f"must be OWNER/NAME as the hub allows it ({error})") from None


def push_to_hub(directory: str | Path, repo_id: str, private: bool = False) -> str:
    """Uploads an export, of a model or of adapters, to the hub repository `repo_id` and returns its URL.

    The repository is created if missing. Needs HF_TOKEN with write permission. Raises InputError if the upload fails,
    and if `private` is requested for an existing public repository.
    """
    folder = user_path("directory", directory)
    if not any((folder / name).is_file() for name in ("config.json", "adapter_config.json")):
        raise InputError("directory", str(directory), "holds no export; write one first")
    check_repo_id(repo_id)
    try:
        # None: the default visibility of the owner's account or organisation
        url = HfApi().create_repo(repo_id, private=private or None, exist_ok=True)
        seen = private and not HfApi().repo_info(repo_id).private
    except Exception as error:
        raise _refused(repo_id, error) from None
    if seen:
        raise InputError("private", True, f"{repo_id} already exists and is not private: nothing was uploaded")
    try:
        HfApi().upload_folder(repo_id=repo_id, folder_path=folder, commit_message="Export of lsp_jax")
    except Exception as error:
        raise _refused(repo_id, error) from None
    return str(url)


def _refused(repo_id: str, error: Exception) -> InputError:
    """Returns the InputError for a failed upload, without the error's text, which may quote the token."""
    remedy = f"could not be uploaded ({type(error).__name__}): is HF_TOKEN set, with write permission?"
    return InputError("push_to_hub", repo_id, remedy)
