# Copyright 2026 The trl-rkld authors. Licensed under the Apache License, Version 2.0.
"""From the name of a model or adapter to its files, and to a loaded model."""

import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from peft import LoraConfig, PeftConfig, PeftModel
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from .backends import AnswerScores, GenerateRequest, ScoreRequest
from .backends.transformers import TransformersBackend
from .config import EvalConfig
from .fingerprint import hash_weights
from .models import free_memory
from .quantization import keep_quantized_weights


if TYPE_CHECKING:
    from .backends.vllm import VLLMBackend


@dataclass(frozen=True)
class Checkpoint:
    """
    A model or an adapter on disk.

    Attributes:
        name (`str`):
            Name of its folder, or Hub id.
        folder, base (`Path`):
            Its folder and that of its base: the same one unless it is an adapter.
        base_name (`str`):
            Name of its base's folder, or Hub id.
        changes_base (`bool`):
            Whether loading the adapter changes the base's own weights, so that it can't share them.
        dtype (`str`):
            `"bfloat16"`, `"float16"` or `"float32"`.
        quantization (`dict`, *optional*):
            Arguments of [`~transformers.BitsAndBytesConfig`].
        stored_as (`str`, *optional*):
            Another quantisation in which the base is stored, such as `"gptq"`.
        hashes (`dict[str, str]`):
            SHA-256 of the bytes of `"weights"` (those of the base) and `"adapter"`.
    """

    name: str
    folder: Path
    base: Path
    base_name: str
    changes_base: bool
    dtype: str
    quantization: dict[str, Any] | None
    stored_as: str | None
    hashes: dict[str, str]

    @property
    def adapter(self) -> Path | None:
        """The folder, if this is an adapter."""
        return self.folder if self.folder != self.base else None

    @property
    def engine(self) -> tuple:
        """What two checkpoints must share to share a loaded base."""
        alone = self.folder if self.changes_base else None
        return self.base, self.dtype, json.dumps(self.quantization, sort_keys=True), alone

    @property
    def precision(self) -> str | None:
        """The quantisation in a word or two, such as `"nf4, nested"`."""
        if self.quantization is None:
            return self.stored_as
        nested = ", nested" if self.quantization.get("bnb_4bit_use_double_quant") else ""
        return self.quantization["bnb_4bit_quant_type"] + nested

    @property
    def eos_token_id(self) -> int | list[int] | None:
        """The end tokens of the model's generation settings, if it has some."""
        if not (self.base / "generation_config.json").is_file():
            return None
        return GenerationConfig.from_pretrained(self.base).eos_token_id

    def tokenizer(self, trust_remote_code: bool) -> PreTrainedTokenizerBase:
        """The checkpoint's tokenizer, or else its base's."""
        folder = self.folder if (self.folder / "tokenizer_config.json").is_file() else self.base
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)


def resolve_checkpoint(name: str, config: EvalConfig) -> Checkpoint:
    """
    Find a model or adapter, fetching it from the Hub if need be, and hash its bytes. Loads no weights.

    Args:
        name (`str`):
            Folder or Hub id.
        config ([`EvalConfig`]):
            Configuration.

    Returns:
        [`Checkpoint`]:
            The checkpoint.

    Raises:
        [`ValueError`]: If it is not a LoRA adapter of a known base or a model, or settings contradict it.
        [`OSError`]: If it can't be found.
    """
    folder = _find(name, config.model_revision)
    record, hashes, base, base_name, changes_base = {}, {}, folder, name, False
    if (folder / "adapter_config.json").is_file():
        adapter = PeftConfig.from_pretrained(folder)
        if adapter.peft_type != "LORA":
            raise ValueError(
                f"`{name}` is a {adapter.peft_type.value} adapter. Only LoRA adapters can be evaluated; merge it."
            )
        if adapter.alora_invocation_tokens is not None:
            raise ValueError(f"`{name}` is an activated LoRA (`alora_invocation_tokens`), which can't be evaluated.")
        base_name, changes_base = adapter.base_model_name_or_path, _changes_base(adapter)
        try:
            base = _find(base_name, adapter.revision or "main")
        except OSError as error:
            raise ValueError(
                f"The base `{base_name}` of the adapter `{name}` can't be found ({error}). Correct "
                "`base_model_name_or_path` in its adapter_config.json, or run where that path holds."
            ) from None
        if (folder / "unlearning.json").is_file():  # what UnlearningTrainer says of the run
            record = json.loads((folder / "unlearning.json").read_text(encoding="utf-8"))
        hashes["adapter"] = hash_weights(folder)
    hashes["weights"] = hash_weights(base)
    base_config = AutoConfig.from_pretrained(base, trust_remote_code=config.trust_remote_code)
    quantization, stored_as = _stored_quantization(base_config)
    quantization = record.get("quantization") or quantization
    if config.load_in_4bit and stored_as is not None:
        raise ValueError(f"The weights of `{base_name}` are quantised already ({stored_as}): remove `load_in_4bit`.")
    if config.load_in_4bit and quantization is None:  # else it is one that knows its own
        quantization = {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": config.bnb_4bit_quant_type,
            "bnb_4bit_use_double_quant": config.use_bnb_nested_quant,
        }
    dtype = (
        config.dtype
        if config.dtype != "auto"
        else record.get("dtype") or str(base_config.dtype or torch.float32).removeprefix("torch.")
    )
    if quantization is not None:
        quantization = {**quantization, "bnb_4bit_compute_dtype": dtype}
    return Checkpoint(
        name=_shown(name, folder),
        folder=folder,
        base=base,
        base_name=_shown(base_name, base),
        changes_base=changes_base,
        dtype=dtype,
        quantization=quantization,
        stored_as=stored_as,
        hashes=hashes,
    )


@contextmanager
def transformers_backends(
    checkpoints: Sequence[Checkpoint], config: EvalConfig, end_ids: Sequence[int], masked_token_id: int | None
) -> Iterator[Callable[[Checkpoint | None], TransformersBackend]]:
    """
    Load one base with all its adapters.

    Args:
        checkpoints (`Sequence[Checkpoint]`):
            Checkpoints that share an engine.
        config ([`EvalConfig`]):
            Configuration.
        end_ids, masked_token_id:
            As in [`TransformersBackend`].

    Yields:
        `Callable`:
            From a checkpoint, or `None` for the bare base, to its backend. It holds until the next call.
    """
    model = load_base(checkpoints[0], config)
    adapters = {one.adapter: f"adapter{i}" for i, one in enumerate(checkpoints) if one.adapter is not None}
    for folder, name in adapters.items():
        model = _with_adapter(model, folder, name)
    backend = TransformersBackend(model, end_ids, config.batch_tokens, config.batch_size, masked_token_id)
    state = ExitStack()

    def activate(checkpoint: Checkpoint | None) -> TransformersBackend:
        state.close()
        if checkpoint is not None and checkpoint.adapter is not None:
            model.set_adapter(adapters[checkpoint.adapter])
        elif adapters:
            state.enter_context(model.disable_adapter())
        return backend

    try:
        yield activate
    finally:
        state.close()


@contextmanager
def vllm_backends(
    checkpoints: Sequence[Checkpoint], config: EvalConfig, end_ids: Sequence[int], max_model_len: int
) -> Iterator[Callable[[Checkpoint | None], Any]]:
    """
    Start one vLLM engine that serves a base and all its adapters, unmerged.

    Args:
        checkpoints, config, end_ids:
            As in [`transformers_backends`].
        max_model_len (`int`):
            Longest sequence, in tokens.

    Yields:
        `Callable`:
            From a checkpoint, or `None` for the bare base, to its backend.
    """
    from .backends.vllm import VLLMBackend

    free_memory()
    first = checkpoints[0]
    with servable_base(first, config) as base:
        backend = VLLMBackend(
            str(base),
            end_ids,
            dtype="bfloat16" if first.quantization is not None else first.dtype,
            adapters=[str(one.adapter) for one in checkpoints if one.adapter is not None],
            max_model_len=max_model_len,
            seed=config.seed,
            tensor_parallel_size=config.tensor_parallel_size,
            data_parallel_size=config.data_parallel_size,
            gpu_memory_utilization=config.gpu_memory_utilization,
        )
        try:
            yield lambda one: ServedAdapter(backend, None if one is None or one.adapter is None else str(one.adapter))
        finally:
            backend.close()


class ServedAdapter(NamedTuple):
    """One of the adapters that an engine serves, or its base (`None`), as a backend."""

    backend: "VLLMBackend"
    adapter: str | None

    def score(self, requests: Sequence[ScoreRequest]) -> Iterator[tuple[int, AnswerScores]]:
        """See [`VLLMBackend.score`]."""
        return self.backend.score(requests, self.adapter)

    def generate(self, requests: Sequence[GenerateRequest]) -> Iterator[tuple[int, list[int]]]:
        """See [`VLLMBackend.generate`]."""
        return self.backend.generate(requests, self.adapter)


@contextmanager
def servable_base(checkpoint: Checkpoint, config: EvalConfig) -> Iterator[Path]:
    """
    The base as vLLM can serve it: vLLM has no bitsandbytes, so a 4-bit one is dequantised to a temporary folder.

    Args:
        checkpoint ([`Checkpoint`]):
            A checkpoint.
        config ([`EvalConfig`]):
            Configuration.

    Yields:
        `Path`:
            Folder of the base, for as long as the context lasts.
    """
    if checkpoint.quantization is None:
        yield checkpoint.base
        return
    with tempfile.TemporaryDirectory(prefix="trl_rkld_") as folder:  # mode 0700
        load_base(checkpoint, config).dequantize().to(torch.bfloat16).save_pretrained(folder)
        free_memory()
        yield Path(folder)


def load_base(checkpoint: Checkpoint, config: EvalConfig) -> PreTrainedModel:
    """Load the base of a checkpoint, quantised if it is to be, on the accelerators or else the CPU."""
    free_memory()
    kwargs: dict[str, Any] = {"dtype": getattr(torch, checkpoint.dtype)}
    if checkpoint.quantization is not None:
        kwargs["quantization_config"] = BitsAndBytesConfig.from_dict(checkpoint.quantization)
    if torch.accelerator.is_available():
        kwargs["device_map"] = "auto"
    model = AutoModelForCausalLM.from_pretrained(
        checkpoint.base,
        attn_implementation=config.attn_implementation,
        trust_remote_code=config.trust_remote_code,
        **kwargs,
    )
    keep_quantized_weights(model)  # else the CPU would round the scales of 4-bit weights
    return model.eval()


def _with_adapter(model: PreTrainedModel | PeftModel, folder: Path, name: str) -> PeftModel:
    try:
        if isinstance(model, PeftModel):
            model.load_adapter(folder, name)
            return model
        return PeftModel.from_pretrained(model, folder, adapter_name=name)
    except (RuntimeError, ValueError) as error:
        raise ValueError(
            f"The adapter `{folder.name}` does not fit its base: it was made for another model ({str(error).splitlines()[0]}). "
            "Correct `base_model_name_or_path` in its adapter_config.json."
        ) from None


def _find(name: str, revision: str) -> Path:
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder.resolve()
    if folder.is_absolute() or name.startswith(".") or name.count("/") != 1:
        raise FileNotFoundError(f"the folder `{name}` does not exist")
    from huggingface_hub import snapshot_download

    patterns = ["*.safetensors", "adapter_model.bin", "*.json", "*.jinja", "*.model", "*.py"]
    return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))


def _shown(name: str, folder: Path) -> str:
    return folder.name if Path(name).expanduser().is_dir() else name


def _changes_base(adapter: LoraConfig) -> bool:
    """PiSSA, OLoRA and their like take from the base what they start with, and biases replace its own, for good."""
    harmless = (True, False, "gaussian", "eva", "orthogonal")
    return adapter.bias != "none" or adapter.init_lora_weights not in harmless


def _stored_quantization(config: PreTrainedConfig) -> tuple[dict[str, Any] | None, str | None]:
    """The quantisation in which a model was saved: that of bitsandbytes in 4 bits, or the name of another."""
    stored = getattr(config, "quantization_config", None) or {}
    if stored.get("load_in_4bit"):
        return dict(stored), None
    return None, "8 bits" if stored.get("load_in_8bit") else stored.get("quant_method")
