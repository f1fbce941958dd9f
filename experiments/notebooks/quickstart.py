# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Language Self-Play, stage by stage
#
# One model writes questions and answers them. Here one iteration is taken apart: what each stage takes, what it gives,
# what shape it has; then one update, and a few iterations with curves.
#
# Two CPU cores and 8 GB of memory: 6.2 minutes with the demo model (AMD EPYC, two training runs beside it), much of it
# compiling.
# On a GPU or TPU nothing changes but the time. Before: `lsp-jax demo-model models/SmolLM2-135M-Instruct`.

# %%
import os
import tempfile
from dataclasses import replace
from pathlib import Path

import jax
import plotly.graph_objects as go

import lsp_jax as lsp
from lsp_jax.algorithm import rollout, stages
from lsp_jax.algorithm.learner_batch import learn_batch, rows_without_rewards
from lsp_jax.core.stage import execute
from lsp_jax.learn.update import reference_logprobs
from lsp_jax.reward.base import episode_texts
from lsp_jax.reward.scoring import score
from lsp_jax.training.setup import setup

DEMO = Path("models/SmolLM2-135M-Instruct")  # `lsp-jax demo-model models/SmolLM2-135M-Instruct` in the checkout
ABOVE = [folder for folder in (Path.cwd(), *Path.cwd().parents) if (folder / DEMO).is_dir()]
MODEL = os.environ.get("LSP_JAX_NOTEBOOK_MODEL", str(ABOVE[0] / DEMO if ABOVE else DEMO))
FOLDER = Path(tempfile.mkdtemp(prefix="lsp-jax-"))


def shapes(tree):
    """Every array of a stage's result: its name, type and shape."""
    for path, leaf in jax.tree.leaves_with_path(tree):
        print(f"{jax.tree_util.keystr(path):42} {leaf.dtype}{list(leaf.shape)}")


# %% [markdown]
# ## A model
#
# `policy.params` is a nested dict of arrays, layers stacked; `policy.config` is static. `forward` is pure.

# %%
policy = lsp.load_pretrained(MODEL)
print(f"{sum(leaf.size for leaf in jax.tree.leaves(policy.params)) / 1e6:.1f} million parameters")
ids = jax.numpy.asarray([policy.tokenizer.encode("Seven and five are twelve.")])
print("logits", lsp.forward(policy.params, policy.config, ids).shape)
greedy = lsp.SamplingConfig(temperature=0.0)
lsp.generate(policy, ["What is 3 + 4?", "Name a colour."], greedy, max_completion_length=16)

# %% [markdown]
# ## One iteration
#
# `setup` checks a configuration, loads what it needs, and returns the parameters to start from. `run.game` holds all
# that is static, and `run.hyper` the numbers that only scale: every stage is a compiled function of arrays and of that
# part of `run.game` that it depends on. With other numbers the programs are the same.

# %%
config = replace(lsp.presets.quickstart(), model=MODEL, output_dir=str(FOLDER / "run"), max_steps=3, save_steps=3)
run, start = setup(config, policy=policy)
state = jax.jit(run.game.init_train_state)(start)
key = stages.iteration_key(run.seed_key, state.iteration, state.attempt)
params = stages.rollout_params(state.params, run.game, run.reference)
print("Challenger is asked:", run.policy.tokenizer.decode(run.game.prompts.challenger_ids))

# %% [markdown]
# The Challenger samples N queries, all from this prompt.

# %%
queries = rollout.challenge(params, run.token_classes, key, run.game)
shapes(queries)

# %% [markdown]
# Each is spliced into the Solver's template, ids into ids, and answered G times. The prompt is run once for all G.

# %%
episode = rollout.solve(params, queries, key, run.game)
shapes(episode.answers)
texts = episode_texts(episode, run.policy.tokenizer)
for query, answers in zip(texts.queries[:3], texts.answers, strict=False):
    print(f"Q {query!r}\nA {answers[0]!r}")

# %% [markdown]
# The verifier reads the texts, the frozen reference judges on the device: R and R_Q, both [N, G].

# %%
outputs = score(run.rewards, run.policy.tokenizer, episode)
for spec, output in zip(run.specs, outputs, strict=True):
    print(f"{spec.name} ({spec.kind}, weight {spec.weight})\n{jax.device_get(output.values).round(2)}")

# %% [markdown]
# Rewards become advantages: of each answer against the others of its query, of each query against the other queries.

# %%
rows = rows_without_rewards(episode, game=run.game)
references = reference_logprobs(run.reference, rows, spec=run.game.learner)
learnable = learn_batch(episode, outputs, run.specs, run.hyper, game=run.game)
print("advantages of the Challenger", jax.device_get(learnable.batch.challenger.advantages).round(3))
shapes(learnable.batch.solver)

# %% [markdown]
# One joint gradient of both roles, one step of AdamW. The old state is consumed.

# %%
state, metrics = stages.learn(execute, state, learnable.batch, references, run.game, run.hyper)
{name: round(float(value), 4) for name, value in metrics.items() if name.endswith(("loss", "grad_norm", "kl"))}

# %% [markdown]
# ## A run
#
# `train` is these stages in a loop, with checkpoints, monitors and files. A callback sees every iteration.

# %%
run.workers.close()
seen = []
trained = lsp.train(config, policy=policy, callbacks=[lambda event: seen.append(event.metrics)])

# %%
figure = go.Figure()
for name in ("solver/reward", "challenger/reward", "solver/kl", "challenger/kl"):
    figure.add_scatter(x=list(range(1, len(seen) + 1)), y=[metrics[name] for metrics in seen], name=name)
figure.update_layout(xaxis_title="iteration", template="simple_white")
figure

# %% [markdown]
# Three iterations show that it runs, not that it learns: `experiments/arithmetic` does. The run's folder holds the
# whole story; `report.html` in it opens in a browser.

# %%
sorted(path.name for path in (FOLDER / "run").iterdir())
