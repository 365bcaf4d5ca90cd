# Copyright 2026 The trl-rkld authors. Licensed under the Apache License, Version 2.0.
"""Scoring and greedy generation with vLLM: full models, and adapters that one engine serves unmerged."""

import asyncio
import json
import os
from collections.abc import Coroutine, Iterator, Sequence
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from typing import TYPE_CHECKING, Any

import numpy as np
from peft import load_peft_weights

from . import AnswerScores, GenerateRequest, ScoreRequest


if TYPE_CHECKING:
    from vllm.outputs import RequestOutput
    from vllm.v1.engine.async_llm import AsyncLLM

# vLLM reads them when it is imported, and its processes inherit them. What the user has set stays.
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
# A fork would copy the locks that other threads hold, and CUDA doesn't survive it.
os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
# GiB for keys and values, on a CPU only: else the engine takes most of the memory.
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")

# The ranks that vLLM makes room for.
_LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


class VLLMBackend:
    """
    A model, with or without adapters, in an engine of vLLM's: a process of its own per card.

    The engine logs errors only, neither texts nor token ids, and reports no usage; results come from token ids alone,
    so it has no tokenizer. They depend on what else stands in a batch, by rounding: in bfloat16 an answer's loss moves by up
    to 0.03 nats per token (SmolLM2-135M, on a CPU).

    Args:
        model (`str`):
            Folder or Hub id of the model.
        end_ids (`Sequence[int]`):
            Tokens that end an answer.
        dtype (`str`):
            Of the weights, such as `"bfloat16"`. vLLM's `"auto"` would make float16 of float32.
        adapters (`Sequence[str]`, *optional*, defaults to `()`):
            Folders of LoRA adapters of this model.
        max_model_len (`int`, *optional*, defaults to `2048`):
            Longest prompt and answer together, in tokens, plus one.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the engine.
        tensor_parallel_size (`int`, *optional*, defaults to `1`):
            Cards that share one copy of the model.
        data_parallel_size (`int`, *optional*, defaults to `1`):
            Copies of the model.
        gpu_memory_utilization (`float`, *optional*, defaults to `0.8`):
            Share of a card's memory that the engine takes. The logits of a batch come on top of it.
    """

    def __init__(
        self,
        model: str,
        end_ids: Sequence[int],
        dtype: str,
        adapters: Sequence[str] = (),
        max_model_len: int = 2048,
        seed: int = 0,
        tensor_parallel_size: int = 1,
        data_parallel_size: int = 1,
        gpu_memory_utilization: float = 0.8,
    ):
        self.end_ids = list(end_ids)
        arguments = dict(
            model=model,
            dtype=dtype,
            # Logits rounded to bfloat16 are off by up to 0.06.
            hf_overrides={"head_dtype": "float32"},
            max_model_len=max_model_len,
            max_num_batched_tokens=2048,  # as many rows of logits are held when scoring
            # With it, log-probabilities of a prompt may depend on the order of requests (vllm#42019).
            enable_prefix_caching=False,
            generation_config="vllm",
            skip_tokenizer_init=True,
            use_tqdm_on_load=False,
            seed=seed,
            tensor_parallel_size=tensor_parallel_size,
            data_parallel_size=data_parallel_size,
            gpu_memory_utilization=gpu_memory_utilization,
            disable_log_stats=True,
            **_lora_arguments(adapters),
        )
        # A loop in a thread: in a notebook, this one has a loop already.
        self.loop = asyncio.new_event_loop()
        Thread(target=self.loop.run_forever, daemon=True).start()
        self.engine = self._call(_start(arguments))

        from vllm.lora.request import LoRARequest

        self.adapters = {path: LoRARequest(path, number, path) for number, path in enumerate(adapters, start=1)}
        try:
            for request in self.adapters.values():  # now, so that a faulty one is refused before anything is computed
                self._call(self.engine.add_lora(request))
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Stop the engine and free what it holds."""
        self._call(_stop(self.engine))
        self.loop.call_soon_threadsafe(self.loop.stop)

    def score(
        self, requests: Sequence[ScoreRequest], adapter: str | None = None
    ) -> Iterator[tuple[int, AnswerScores]]:
        """
        Score answers, the longest first.

        Args:
            requests (`Sequence[ScoreRequest]`):
                Prompts and answers, none of them empty.
            adapter (`str`, *optional*):
                One of `adapters`. If `None`, the model is used as it is.

        Yields:
            `tuple[int, AnswerScores]`:
                Index of a request and its scores, as soon as they are there.
        """
        prompts = [[*prompt_ids, *answer_ids] for prompt_ids, answer_ids in requests]
        # The token that vLLM insists on adding is thrown away.
        arguments = [{"max_tokens": 1, "prompt_logprobs": 0}] * len(requests)
        for index, output in self._run(prompts, arguments, adapter):
            start = len(requests[index].prompt_ids)
            tokens = [
                position[token]
                for position, token in zip(output.prompt_logprobs[start:], prompts[index][start:], strict=True)
            ]
            logprobs = np.array([token.logprob for token in tokens], dtype=np.float32)
            yield index, AnswerScores(logprobs, np.array([token.rank == 1 for token in tokens]))

    def generate(
        self, requests: Sequence[GenerateRequest], adapter: str | None = None
    ) -> Iterator[tuple[int, list[int]]]:
        """
        Continue prompts greedily, whatever the model's own generation settings say.

        Args:
            requests (`Sequence[GenerateRequest]`):
                Prompts.
            adapter (`str`, *optional*):
                One of `adapters`. If `None`, the model is used as it is.

        Yields:
            `tuple[int, list[int]]`:
                Index of a request and the new tokens, without the one that ends the turn.
        """
        prompts = [list(request.prompt_ids) for request in requests]
        arguments = [
            # The end of the turn is named by `end_ids`, not by the model.
            {"max_tokens": request.max_new_tokens, "stop_token_ids": self.end_ids, "ignore_eos": True}
            for request in requests
        ]
        for index, output in self._run(prompts, arguments, adapter):
            ids = list(output.outputs[0].token_ids)
            yield index, ids[:-1] if ids[-1] in self.end_ids else ids

    def _call(self, coroutine: Coroutine) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result()

    def _run(
        self, prompts: list[list[int]], arguments: list[dict[str, Any]], adapter: str | None
    ) -> Iterator[tuple[int, "RequestOutput"]]:
        """Give all prompts to the engine and yield each output with its index."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        lora_request = None if adapter is None else self.adapters[adapter]

        async def run(index: int) -> "RequestOutput":
            params = SamplingParams(
                temperature=0.0, detokenize=False, output_kind=RequestOutputKind.FINAL_ONLY, **arguments[index]
            )
            prompt = {"prompt_token_ids": prompts[index]}
            outputs = self.engine.generate(prompt, params, str(index), lora_request=lora_request)
            return [output async for output in outputs][-1]

        order = sorted(range(len(prompts)), key=lambda i: (arguments[i]["max_tokens"], len(prompts[i])), reverse=True)
        indices = {asyncio.run_coroutine_threadsafe(run(index), self.loop): index for index in order}
        done: SimpleQueue = SimpleQueue()
        for future in indices:
            future.add_done_callback(done.put)
        try:
            for _ in order:
                future = done.get()
                yield indices[future], future.result()
        finally:
            for future in indices:  # where the caller stops early, or one request failed
                future.cancel()


async def _start(arguments: dict[str, Any]) -> "AsyncLLM":
    """Import vLLM and start an engine. In a thread: the import keeps the frames of who asks for it, variables and all."""
    from vllm import AsyncEngineArgs
    from vllm.platforms import current_platform
    from vllm.v1.engine.async_llm import AsyncLLM

    # A CPU has no graphs to capture, and compiling for it takes longer than it saves.
    return AsyncLLM.from_engine_args(AsyncEngineArgs(enforce_eager=current_platform.is_cpu(), **arguments))


async def _stop(engine: "AsyncLLM") -> None:
    """Stop an engine. In the loop, so that none of its tasks takes that for an accident."""
    engine.shutdown()


def check_served(adapter: str) -> None:
    """
    Raise if vLLM would ignore part of an adapter.

    Args:
        adapter (`str`):
            Folder of a LoRA adapter.

    Raises:
        [`ValueError`]: Naming the first weight that is not applied.
    """
    unserved = sorted(name for name in load_peft_weights(adapter, device="cpu") if not _is_served(name))
    if unserved:
        raise ValueError(
            f"vLLM would ignore part of the adapter `{adapter}`: {unserved[0]}. It serves LoRA weights of linear "
            "layers, but neither of `lm_head` and `embed_tokens` nor whole modules (`modules_to_save`). Merge the "
            f"adapter first (`trl-rkld merge --model_name_or_path {adapter}`), or use `--backend transformers`."
        )


def _lora_arguments(adapters: Sequence[str]) -> dict[str, Any]:
    """Arguments of the engine that serves these adapters."""
    if not adapters:
        return {}
    modules: set[str] = set()
    ranks = []
    for adapter in adapters:
        check_served(adapter)
        modules |= {name.split(".")[-3] for name in load_peft_weights(adapter, device="cpu")}
        config = json.loads(Path(adapter, "adapter_config.json").read_text(encoding="utf-8"))
        ranks += [config["r"], *config["rank_pattern"].values()]
    return {
        "enable_lora": True,
        "max_lora_rank": next((rank for rank in _LORA_RANKS if rank >= max(ranks)), max(ranks)),
        "max_cpu_loras": len(adapters),
        # Else the head gets a layer for adapters, too.
        "lora_target_modules": sorted(modules),
    }


def _is_served(name: str) -> bool:
    """Whether vLLM applies a tensor of an adapter (vllm#51594: that of a head only when generating)."""
    module = name.removesuffix(".lora_A.weight").removesuffix(".lora_B.weight")
    return module != name and module.split(".")[-1] not in ("lm_head", "embed_tokens")
