# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Rewards
#
# What an answer is worth: a function of your own, the frozen model's quality score, a preference model, and how they
# are mixed. `docs/rewards.md` says the same in prose.
#
# Two CPU cores, 8 GB of memory, 4.4 minutes with the demo model (AMD EPYC, two training runs beside it).

# %%
import os
import tempfile
from dataclasses import replace
from pathlib import Path

import jax.numpy as jnp
import numpy as np

import lsp_jax as lsp
from lsp_jax.config import RewardConfig
from lsp_jax.model.weights import save_params
from lsp_jax.reward.arithmetic import final_number, grade, parse_arithmetic
from lsp_jax.reward.preference import load_reward_model, preference_template, score_conversations
from lsp_jax.reward.user_callable import callable_reward

DEMO = Path("models/SmolLM2-135M-Instruct")  # `lsp-jax demo-model models/SmolLM2-135M-Instruct` in the checkout
ABOVE = [folder for folder in (Path.cwd(), *Path.cwd().parents) if (folder / DEMO).is_dir()]
MODEL = os.environ.get("LSP_JAX_NOTEBOOK_MODEL", str(ABOVE[0] / DEMO if ABOVE else DEMO))
FOLDER = Path(tempfile.mkdtemp(prefix="lsp-jax-"))
policy = lsp.load_pretrained(MODEL)

# %% [markdown]
# ## A verifier
#
# Reads texts with small grammars and evaluates nothing. NaN: the query is no question, its answers have no value.

# %%
print(parse_arithmetic("What is 3 + 4 x 2?"), final_number("That makes 11 in all."))
grade(["What is 7 - 9?", "Tell me a story."], [["It is -2.", "9 - 7 = 2"], ["Once upon a time", "No."]])


# %% [markdown]
# ## A function of your own
#
# From N queries and their N lists of G answers to [N, G] numbers. A function object runs in a thread of
# this process with a time limit (one named as `my_reward.py:brevity` in a process of its own, which can be ended). NaN
# masks an answer, an exception all of this iteration; the run goes on.


# %%
def brevity(queries, answers):
    """Short answers, in hundreds of characters."""
    return [[-len(text) / 100 for text in group] for group in answers]


seen = []
config = replace(
    lsp.presets.quickstart(),
    model=MODEL,
    output_dir=str(FOLDER / "brief"),
    max_steps=2,
    save_steps=2,
    reward=RewardConfig(quality_weight=0.0),
)
lsp.train(
    config,
    policy=policy,
    rewards=[callable_reward(brevity, "brevity", weight=2.0)],
    callbacks=[lambda event: seen.append(event)],
)
print({name: round(value, 3) for name, value in seen[-1].metrics.items() if name.startswith("rewards/")})
seen[-1].transcripts[0]["answers"][0]

# %% [markdown]
# From the command line the same function is `--reward.callable my_reward.py:brevity`.
#
# ## The quality score
#
# The frozen reference reads seven questions about query and answer and says yes or no to each; the score is the sum of
# p(yes), 0 to 7. As LSP has it both roles are paid for it.

# %%
judged = []
config = replace(config, output_dir=str(FOLDER / "judged"), reward=RewardConfig(quality_weight=1.0), max_steps=1)
lsp.train(config, policy=policy, callbacks=[lambda event: judged.append(event)])
for record in judged[-1].transcripts[:3]:
    print(f"{record['answers'][0]['R_Q']:.2f}", repr(record["query"]), "->", repr(record["answers"][0]["text"]))

# %% [markdown]
# ## A preference model
#
# Any Hugging Face Llama with a score head (`LlamaForSequenceClassification`, one label). There is none in a package:
# here a head drawn at random on the demo model shows how one is loaded and asked. Its scores mean nothing.

# %%
head = np.random.default_rng(0).normal(0, 0.02, (policy.config.hidden_size, 1))
scorer = {name: leaf for name, leaf in policy.params.items() if name != "lm_head"}
scorer["score"] = {"weight": jnp.asarray(head, jnp.float32)}
save_params(scorer, replace(policy.config, head="score"), FOLDER / "reward-model")
policy.tokenizer.save(FOLDER / "reward-model")

# %%
model = load_reward_model(FOLDER / "reward-model", "float32")
template = preference_template(model.tokenizer)


def padded(texts):
    """Texts as right-padded ids and lengths."""
    rows = [model.tokenizer.encode(text) for text in texts]
    width = max(map(len, rows))
    return jnp.asarray([row + [0] * (width - len(row)) for row in rows]), jnp.asarray([len(row) for row in rows])


queries = padded(["Name a colour.", "Say hello."])
tokens, lengths = padded(["Blue.", "I would rather not say.", "Hello!", "Hello to all of you, and a good morning."])
answers = tokens.reshape(2, 2, -1), lengths.reshape(2, 2)
score_conversations(model.params, queries, answers, model.config, template, rows=16)

# %% [markdown]
# In a run it is `--reward.preference-model PATH_OR_HUB_ID`, its raw score the task reward.

# %%
config = replace(
    config,
    output_dir=str(FOLDER / "preferred"),
    reward=RewardConfig(
        preference_model=str(FOLDER / "reward-model"),
        quality_weight=0.1,
        standardize=("preference",),
        clip=("preference:-3:3",),
    ),
)
preferred = []
lsp.train(config, policy=policy, callbacks=[lambda event: preferred.append(event.metrics)])
{name: round(value, 3) for name, value in preferred[-1].items() if name.startswith("rewards/")}
