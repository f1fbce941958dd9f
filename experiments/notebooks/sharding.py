# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # The same code on many devices
#
# Eight CPU devices stand for eight accelerators: the functions are those of a single device, told where arrays lie by
# one table (`lsp_jax/model/sharding.py`). Nothing here knows how many devices there are but the first cell.
#
# Two CPU cores, 8 GB of memory, 6.5 minutes with the demo model (AMD EPYC, two training runs beside it): eight devices
# share the two cores.

# %%
import os
import tempfile
from dataclasses import replace
from pathlib import Path

import jax

jax.config.update("jax_num_cpu_devices", 8)  # before JAX starts; on a machine with accelerators leave it out

import lsp_jax as lsp
from lsp_jax.model.sharding import MeshConfig, make_mesh, partitions

DEMO = Path("models/SmolLM2-135M-Instruct")  # `lsp-jax demo-model models/SmolLM2-135M-Instruct` in the checkout
ABOVE = [folder for folder in (Path.cwd(), *Path.cwd().parents) if (folder / DEMO).is_dir()]
MODEL = os.environ.get("LSP_JAX_NOTEBOOK_MODEL", str(ABOVE[0] / DEMO if ABOVE else DEMO))
FOLDER = Path(tempfile.mkdtemp(prefix="lsp-jax-"))
jax.devices()

# %% [markdown]
# ## A mesh
#
# `data` holds copies, `fsdp` spreads parameters and rows, `tensor` spreads heads, the MLP and the vocabulary. Sizes are
# chosen by the number of devices, or given; one may be -1. What does not divide the model is said at once.

# %%
base = lsp.load_pretrained(MODEL)
mesh = make_mesh(MeshConfig(data=1, fsdp=-1, tensor=1), base.config)
print(mesh)
try:
    make_mesh(MeshConfig(fsdp=-1, tensor=8), base.config)
except lsp.InputError as error:
    print(error)

# %% [markdown]
# ## Where parameters lie
#
# Weights go from the files straight into their shards. `decode` keeps them whole over `fsdp`.

# %%
policy = lsp.load_pretrained(MODEL, mesh=mesh)
for (path, leaf), spec in zip(
    jax.tree.leaves_with_path(policy.params), jax.tree.leaves(partitions(policy.params)), strict=True
):
    shard, name = leaf.addressable_shards[0].data.shape, jax.tree_util.keystr(path, simple=True, separator="/")
    print(f"{name:48} {list(leaf.shape)} {spec}, a device: {list(shard)}")

# %%
weight = policy.params["model"]["layers"]["self_attn"]["q_proj"]["weight"]
jax.debug.visualize_array_sharding(weight[0])  # of the first layer: rows over fsdp

# %% [markdown]
# ## The same text
#
# Rows are spread, noise belongs to the row: in float32 any mesh samples what one device samples.

# %%
asked = ["What is 3 + 4?", "Name a colour.", "Say hello."]
sampling = lsp.SamplingConfig(temperature=0.8)
alone, spread = (lsp.generate(p, asked, sampling, max_completion_length=12, seed=3) for p in (base, policy))
print(alone)
print("the same on the mesh:", alone == spread)

# %% [markdown]
# ## The same training
#
# One iteration on each: a run takes the mesh from its configuration, and its folder may be resumed on another one.


# %%
def one_iteration(name, mesh):
    seen = []
    config = replace(
        lsp.presets.quickstart(), model=MODEL, output_dir=str(FOLDER / name), mesh=mesh, max_steps=1, save_steps=1
    )
    config = replace(config, optimizer=replace(config.optimizer, micro_batch_size=4))
    lsp.train(config, callbacks=[lambda event: seen.append(event)])
    return seen[0]


event = one_iteration("spread", MeshConfig(fsdp=-1))
{name: round(event.metrics[name], 5) for name in ("loss", "grad_norm", "solver/reward", "solver/entropy")}

# %%
held = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(event.state))
whole = sum(leaf.nbytes for leaf in jax.tree.leaves(event.state))
print(f"state: {whole / 2**20:.1f} MiB, of which one device holds {held / 2**20:.1f}")
