# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Resume and export
#
# A run that was stopped goes on exactly: the same queries, the same answers, the same bits. What it has learned leaves
# as a Hugging Face directory, or as PEFT's adapter files.
#
# Two CPU cores, 8 GB of memory, 13.6 minutes with the demo model (AMD EPYC, three other processes beside it).

# %%
import os
import tempfile
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np

import lsp_jax as lsp
from lsp_jax.checkpoint.export import export_adapters, export_run
from lsp_jax.model.lora import LoraConfig
from lsp_jax.training.replay import replay

DEMO = Path("models/SmolLM2-135M-Instruct")  # `lsp-jax demo-model models/SmolLM2-135M-Instruct` in the checkout
ABOVE = [folder for folder in (Path.cwd(), *Path.cwd().parents) if (folder / DEMO).is_dir()]
MODEL = os.environ.get("LSP_JAX_NOTEBOOK_MODEL", str(ABOVE[0] / DEMO if ABOVE else DEMO))
FOLDER = Path(tempfile.mkdtemp(prefix="lsp-jax-"))
config = replace(
    lsp.presets.quickstart(),
    model=MODEL,
    output_dir=str(FOLDER / "whole"),
    max_steps=4,
    save_steps=2,
    save_total_limit=2,
)

# %% [markdown]
# ## Four iterations, and two and two
#
# `resume="must"` fails without a checkpoint; `auto` starts where there is none.

# %%
whole = lsp.train(config)

# %%
half = replace(config, output_dir=str(FOLDER / "half"))
lsp.train(replace(half, max_steps=2))
resumed = lsp.train(replace(half, resume="must"))
same = jax.tree.map(lambda one, other: bool(np.array_equal(one, other)), whole.params, resumed.params)
print("every bit is the same:", all(jax.tree.leaves(same)))
lines = [(FOLDER / name / "transcripts.jsonl").read_bytes() for name in ("half", "whole")]
print("the same transcripts:", lines[0] == lines[1])

# %% [markdown]
# ## An iteration again
#
# `replay` plays one iteration of a run anew and says whether the run's own lines are these.

# %%
again = replay(FOLDER / "whole", 3)
print("from checkpoint", again.start, "the same lines:", again.same)

# %% [markdown]
# ## Out
#
# `export/` is written at the end of a run; any checkpoint can be exported later. The directory has weights, tokenizer,
# generation settings and a model card, and transformers, vLLM and llama.cpp's converter read it.

# %%
export_run(FOLDER / "whole", FOLDER / "earlier", step=2)
print(sorted(path.name for path in (FOLDER / "earlier").iterdir()))
print((FOLDER / "earlier" / "README.md").read_text()[:700])

# %%
policy = lsp.load_pretrained(FOLDER / "whole" / "export")
lsp.generate(policy, ["What is 3 + 4?"], lsp.SamplingConfig(temperature=0.0), max_completion_length=12)

# %% [markdown]
# ## Adapters
#
# With `lora.rank` the base stays frozen and is policy, reference and judge at once; checkpoints hold adapters alone.

# %%
small = replace(
    config, output_dir=str(FOLDER / "adapters"), max_steps=2, save_steps=2, lora=LoraConfig(rank=8, alpha=16.0)
)
adapted = lsp.train(small)
print(f"{sum(leaf.size for leaf in jax.tree.leaves(adapted.params)) / 1e6:.2f} million numbers are trained")
export_adapters(FOLDER / "adapters", FOLDER / "peft")
{path.name: path.stat().st_size for path in (FOLDER / "peft").iterdir()}
