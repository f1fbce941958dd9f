"""TRL as a peer: one step of its GRPOTrainer, by its own training loop. Rollout and log-probabilities: transformers.

Nothing of TRL is replaced: its `rollout_func` first calls the trainer's own generation (`generate` on the prompts
repeated to rows, the stop token barred by `min_new_tokens`) and then hands over the given completions. The batch is
generated at once; the reference pass and the update go through it by `micro_batch_size` rows, with accumulation.

Settings: `loss_type="grpo"` (mean over a row's tokens, then over rows), `scale_rewards="group"` (advantages divided by
the group's standard deviation + 1e-4), KL k3 without TRL's correction, AdamW without decay, gradients clipped at norm
1, float32. transformers gives the embedding's padding row no gradient from its input side (`padding_idx`), so rows that
contain the model's padding id have another `grad_norm` here than elsewhere.

Further request field `checkpointing`: whether activations are recomputed, by default true as in GRPOConfig.
"""

from __future__ import annotations

import gc
import tempfile
import time
from pathlib import Path
from typing import Any

import datasets
import torch
import trl
from protocol import Reply, peak_bytes, reset_peak, serve, versions
from transformers import TrainerCallback
from transformers_peer import TransformersPeer


class Clock(TrainerCallback):
    """Seconds of one training step by phase, and its memory. Loading and data preparation are outside."""

    def __init__(self) -> None:
        self.generation = self.scoring = self.total = 0.0
        self.peak, self.began = 0, 0.0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        reset_peak()
        self.began = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.total, self.peak = time.perf_counter() - self.began, peak_bytes()

    def seconds(self) -> dict[str, float]:
        reference = self.scoring - self.generation
        update = self.total - self.scoring
        return {"generation": self.generation, "reference": reference, "update": update, "total": self.total}


class TrlPeer(TransformersPeer):
    """The steps each start from the model's own weights."""

    def versions(self) -> Reply:
        reply = super().versions()
        return {**reply, "packages": versions("torch", "transformers", "trl", "accelerate")}

    def step(
        self,
        prompts: list[list[int]],
        completions: list[list[int]],
        rewards: list[float],
        beta: float,
        learning_rate: float,
        micro_batch_size: int,
        generate: bool,
        checkpointing: bool = True,
    ) -> Reply:
        self.model, self.dtype = None, ""
        gc.collect()  # what a rollout loaded is not part of the step's memory
        clock, repeats = Clock(), len(completions) // len(prompts)
        rows = [prompt for prompt in prompts for _ in range(repeats)]

        def rollout(texts: list[str], trainer: Any) -> dict[str, Any]:
            assert texts == [str(i // repeats) for i in range(len(rows))], "TRL orders prompts as they were given"
            start = time.perf_counter()
            if generate:
                trainer._generate_single_turn(rows, None, {}, repeats)
            clock.generation = time.perf_counter() - start
            return {"prompt_ids": rows, "completion_ids": completions, "logprobs": None}

        def reward(completions: list[str], **_: Any) -> list[float]:
            return rewards

        with tempfile.TemporaryDirectory() as output:
            args = self.arguments(Path(output), completions, beta, learning_rate, micro_batch_size, checkpointing)
            args.num_generations = repeats
            data = datasets.Dataset.from_list([{"prompt": str(i)} for i in range(len(prompts))])
            trainer = trl.GRPOTrainer(
                self.model_dir, reward, args, train_dataset=data, rollout_func=rollout, callbacks=[clock]
            )
            scored = trainer._generate_and_score_completions

            def timed(inputs: Any) -> Any:
                start = time.perf_counter()
                result = scored(inputs)
                clock.scoring = time.perf_counter() - start
                return result

            trainer._generate_and_score_completions = timed
            trainer.train()
            logged = next(entry for entry in trainer.state.log_history if "loss" in entry)
        settings = f"checkpointing {checkpointing}, {args.optim}, {trainer.model.config._attn_implementation}"
        reply = {"loss": logged["loss"], "grad_norm": logged["grad_norm"], "settings": settings}
        del trainer
        gc.collect()
        return {**clock.seconds(), "peak_bytes": clock.peak, **reply}

    @staticmethod
    def arguments(
        output: Path,
        completions: list[list[int]],
        beta: float,
        learning_rate: float,
        micro_batch_size: int,
        checkpointing: bool,
    ) -> Any:
        longest = max(map(len, completions))
        if len(completions) % micro_batch_size:
            raise ValueError(f"micro_batch_size {micro_batch_size} must divide {len(completions)} completions")
        return trl.GRPOConfig(
            output_dir=str(output),
            max_steps=1,
            per_device_train_batch_size=micro_batch_size,
            gradient_accumulation_steps=len(completions) // micro_batch_size,
            max_completion_length=longest,
            generation_kwargs={"min_new_tokens": longest},
            num_generations=len(completions),  # the step sets its own
            beta=beta,
            learning_rate=learning_rate,
            lr_scheduler_type="constant",
            loss_type="grpo",
            scale_rewards="group",
            use_bias_correction_kl=False,
            importance_sampling_level="token",
            temperature=1.0,
            top_k=0,
            shuffle_dataset=False,
            gradient_checkpointing=checkpointing,
            use_cpu=True,
            bf16=False,
            logging_steps=1,
            save_strategy="no",
            disable_tqdm=True,
            report_to="none",
            model_init_kwargs={"dtype": "float32"},
        )


if __name__ == "__main__":
    torch.manual_seed(0)
    serve(TrlPeer)
