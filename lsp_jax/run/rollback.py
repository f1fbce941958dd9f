"""A run that has collapsed goes back to its last good checkpoint, and plays on from there with other noise.

Everything is as if the run had been resumed from that checkpoint (the files are cut back to it, later checkpoints are
gone), but for two numbers: `attempt` in the train state, from which all noise is drawn, and the count of rollbacks.
Both follow from what was played, so a run that is killed on the way comes to the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from lsp_jax import host
from lsp_jax.errors import Collapsed, RunError
from lsp_jax.learn.update import TrainState
from lsp_jax.run.checkpoint import Checkpoints, Damaged
from lsp_jax.run.health import Event
from lsp_jax.run.metrics import ALARMS_FILE, MetricsWriter
from lsp_jax.run.saving import Saving


def check_rollback(event: Event, saving: Saving, rollbacks: int, most: int) -> int:
    """The checkpoint to go back to; raises Collapsed where there is none, or it was done `most` times already."""
    if rollbacks >= most:
        raise Collapsed(f"{event.said}, though the run has gone back {rollbacks} times (health.max_rollbacks)")
    target = saving.good_before(event.iteration)
    if target is None:
        raise Collapsed(f"{event.said}, and there is no good checkpoint to go back to (save_steps)")
    return target


def roll_back(
    target: int, state: TrainState, checkpoints: Checkpoints, writer: MetricsWriter | None, events: Sequence[Event]
) -> tuple[TrainState, dict[str, Any]]:
    """The state of checkpoint `target`, with another attempt, and its host part; `state` is consumed. No save may be
    under way. All processes together."""
    attempt = int(host.to_host(state.attempt))
    wanted = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
    for leaf in jax.tree.leaves(state):
        leaf.delete()  # there is room for one state
    try:
        state, saved = checkpoints.restore(target, wanted)
        checkpoints.remove_after(target)
    except (Damaged, OSError) as error:
        raise RunError(f"a collapsed run cannot go back to checkpoint {target}: {error}") from error
    if writer is not None:
        earlier = writer.returns(saved["offsets"][ALARMS_FILE])
        writer.cut_back(saved["offsets"])
        now = [{**event._asdict(), "back_to": target, "attempt": attempt + 1} for event in events]
        writer.write_alarms([*earlier, *now])
    raised = np.asarray(attempt + 1, np.int32)
    raised = jax.make_array_from_callback((), state.attempt.sharding, lambda index: raised[index])
    return state._replace(attempt=raised), saved
