"""llama.cpp as a peer, through the C interface of its Python binding (`Llama`, its high-level class, has no batches).

The model is written as GGUF to a temporary file when it is first asked for: in float32, or in float16 for `dtype`
float16. The cache has the same type. Every row is a sequence with a stream of its own in the cache; a prompt is decoded
once and its stream copied to its other rows, so it is prefilled once for all of them. One `llama_decode` a step for all
rows, then its own sampler row by row (`dist`: the whole distribution at temperature 1). Stop tokens are not looked at.
Flash attention is off: on a CPU it was three times slower at 64 rows, and rounds (log-probabilities differ by 1e-3).

There is no training step.
"""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path
from typing import Any

import gguf
import llama_cpp as api
import numpy as np
from protocol import Reply, Unsupported, serve, threads, versions
from safetensors import safe_open

TYPES = {"float32": (np.float32, gguf.LlamaFileType.ALL_F32), "float16": (np.float16, gguf.LlamaFileType.MOSTLY_F16)}
LAYER = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
OUTSIDE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
"""What GGUF calls the tensors of a Llama."""


def gguf_name(name: str) -> str:
    stem, kind = name.rsplit(".", 1)
    if stem in OUTSIDE:
        return f"{OUTSIDE[stem]}.{kind}"
    _, _, layer, part = stem.split(".", 3)
    return f"blk.{layer}.{LAYER[part]}.{kind}"


def interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of q or k as llama.cpp rotates them: pairs beside each other, not half a head apart."""
    return weight.reshape(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


def write_gguf(model_dir: Path, path: Path, dtype: str) -> dict[str, Any]:
    """Writes the model, without a vocabulary, and returns its config.json."""
    shape = json.loads((model_dir / "config.json").read_text(encoding="utf-8"))
    rope = shape.get("rope_scaling") or shape.get("rope_parameters") or {}  # as transformers: one of them
    if rope.get("rope_type", rope.get("type", "default")) != "default":
        raise Unsupported("this peer writes no RoPE scaling")
    heads = {"attn_q": shape["num_attention_heads"], "attn_k": shape["num_key_value_heads"]}
    kind, file_type = TYPES[dtype]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_file_type(file_type)
    writer.add_vocab_size(shape["vocab_size"])
    writer.add_context_length(shape["max_position_embeddings"])
    writer.add_embedding_length(shape["hidden_size"])
    writer.add_feed_forward_length(shape["intermediate_size"])
    writer.add_block_count(shape["num_hidden_layers"])
    writer.add_head_count(shape["num_attention_heads"])
    writer.add_head_count_kv(shape["num_key_value_heads"])
    writer.add_key_length(shape["head_dim"])
    writer.add_value_length(shape["head_dim"])
    writer.add_rope_dimension_count(shape["head_dim"])
    writer.add_rope_freq_base(rope.get("rope_theta", shape.get("rope_theta", 10000.0)))
    writer.add_layer_norm_rms_eps(shape["rms_norm_eps"])
    writer.add_tokenizer_model("none")
    for file in sorted(model_dir.glob("*.safetensors")):
        with safe_open(file, "np") as tensors:
            for key in tensors.keys():  # noqa: SIM118
                name, weight = gguf_name(key), tensors.get_tensor(key).astype(np.float32)
                part = name.split(".")[-2]
                if part in heads:
                    weight = interleaved(weight, heads[part])
                # norms stay in float32, as llama.cpp wants them
                writer.add_tensor(name, np.ascontiguousarray(weight, kind if weight.ndim > 1 else np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return shape


class LlamaCppPeer:
    """The model in the precision last asked for, and a context of the size last asked for."""

    def __init__(self, model_dir: str):
        self.model_dir, self.dtype = Path(model_dir), ""
        self.folder = tempfile.TemporaryDirectory()
        self.model: Any = None
        self.context: Any = None
        self.size = (0, 0, 0)
        api.llama_backend_init()

    def load(self, dtype: str) -> None:
        if dtype == self.dtype:
            return
        if dtype not in TYPES:
            raise Unsupported(f"{dtype}: this peer writes {' and '.join(TYPES)}")
        file = Path(self.folder.name, f"{dtype}.gguf")
        shape = write_gguf(self.model_dir, file, dtype)
        self.vocabulary = shape["vocab_size"]
        self.free()
        self.model = api.llama_model_load_from_file(str(file).encode(), api.llama_model_default_params())
        if not self.model:
            raise RuntimeError("llama.cpp cannot load the model")
        self.dtype = dtype

    def free(self) -> None:
        if self.context:
            api.llama_free(self.context)
        if self.model:
            api.llama_model_free(self.model)
        self.context, self.model, self.size = None, None, (0, 0, 0)

    def open(self, rows: int, length: int, batch: int) -> Any:
        """A context for `rows` sequences of `length` tokens, decoding up to `batch` tokens at once; emptied."""
        if self.size != (rows, length, batch):
            if self.context:
                api.llama_free(self.context)
            settings = api.llama_context_default_params()
            settings.n_seq_max, settings.n_ctx = rows, rows * (length + -length % 256)
            settings.n_batch, settings.n_ubatch = batch, min(batch, 512)
            settings.n_threads = settings.n_threads_batch = threads()
            settings.flash_attn_type = api.LLAMA_FLASH_ATTN_TYPE_DISABLED
            settings.kv_unified = False  # one buffer for all rows would let each attend to every other's cells, masked
            settings.type_k = settings.type_v = api.GGML_TYPE_F32 if self.dtype == "float32" else api.GGML_TYPE_F16
            self.context = api.llama_init_from_model(self.model, settings)
            if not self.context:
                raise RuntimeError("llama.cpp cannot make the context")
            self.size = (rows, length, batch)
        api.llama_memory_clear(api.llama_get_memory(self.context), False)
        return self.context

    def decode(self, context: Any, batch: Any, tokens: list[tuple[int, int, int, bool]]) -> None:
        """Runs (token, position, sequence, whether its logits are wanted)."""
        batch.n_tokens = len(tokens)
        for i, (token, position, sequence, wanted) in enumerate(tokens):
            batch.token[i], batch.pos[i], batch.logits[i] = token, position, wanted
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, sequence
        failure = api.llama_decode(context, batch)
        if failure:
            raise RuntimeError(f"llama_decode returned {failure}")

    def versions(self) -> Reply:
        self.load(self.dtype or "float32")
        return {
            "packages": versions("llama-cpp-python", "gguf"),
            "dtype": self.dtype,
            "threads": threads(),
            "settings": f"one batch, a prompt decoded once; {api.llama_print_system_info().decode().strip()}",
        }

    def rollout(
        self, prompts: list[list[int]], repeats: int, new_tokens: int, seed: int, dtype: str = "float32"
    ) -> Reply:
        self.load(dtype)
        count = len(prompts) * repeats
        room = max(sum(map(len, prompts)), count)
        context = self.open(count, max(map(len, prompts)) + new_tokens, room)
        memory, batch = api.llama_get_memory(context), api.llama_batch_init(room, 0, 1)
        sampler = api.llama_sampler_init_dist(seed)
        start = time.perf_counter()
        # prompts are sequences 0 to N - 1, for neighbours decode together; copies of prompt i are i + N, i + 2 N, ...
        pieces = [(t, i, p, i == len(ids) - 1) for p, ids in enumerate(prompts) for i, t in enumerate(ids)]
        self.decode(context, batch, pieces)
        for sequence in range(len(prompts), count):
            api.llama_memory_seq_cp(memory, sequence % len(prompts), sequence, -1, -1)
        last = [i for i, piece in enumerate(pieces) if piece[3]]
        rows = [
            [api.llama_sampler_sample(sampler, context, last[sequence % len(prompts)])] for sequence in range(count)
        ]
        for step in range(new_tokens - 1):
            places = (len(prompts[sequence % len(prompts)]) + step for sequence in range(count))
            self.decode(context, batch, [(rows[s][-1], place, s, True) for s, place in enumerate(places)])
            for sequence, row in enumerate(rows):
                row.append(api.llama_sampler_sample(sampler, context, sequence))
        seconds = time.perf_counter() - start
        api.llama_sampler_free(sampler)
        api.llama_batch_free(batch)
        ordered = [rows[g * len(prompts) + p] for p in range(len(prompts)) for g in range(repeats)]
        return {"seconds": seconds, "tokens": sum(map(len, rows)), "rows": ordered}

    def logprobs(self, rows: list[list[int]], prompt_lengths: list[int], dtype: str = "float32") -> Reply:
        self.load(dtype)
        longest, result = max(map(len, rows)), []
        batch = api.llama_batch_init(longest, 0, 1)
        for row, length in zip(rows, prompt_lengths, strict=True):
            context = self.open(1, longest, longest)
            self.decode(context, batch, [(token, i, 0, i >= length - 1) for i, token in enumerate(row)])
            wanted = (len(row) - length + 1, self.vocabulary)
            logits = np.ctypeslib.as_array(api.llama_get_logits(context), wanted)[:-1].astype(np.float64)
            top = logits.max(-1, keepdims=True)
            total = np.log(np.exp(logits - top).sum(-1)) + top[:, 0]
            result.append((logits[np.arange(len(logits)), row[length:]] - total).tolist())
        api.llama_batch_free(batch)
        return {"logprobs": result}


if __name__ == "__main__":
    serve(LlamaCppPeer)
