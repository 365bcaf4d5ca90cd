# Copyright 2026 The trl-rkld authors. Licensed under the Apache License, Version 2.0.
"""
Task arithmetic (https://huggingface.co/papers/2212.04089, section "Forgetting via negation"): go from the original
model in the direction away from the one trained further on the records to forget, `θ = θ_o − scale · (θ_aug − θ_o)`.

```bash
trl-rkld task-vector --model_name_or_path path/to/original --augmented_model_name_or_path path/to/augmented \
    --output_dir path/to/result
```

Two models make a model. An adapter of the original model, or two adapters of one base, make an adapter: the base stays
as it is, so it may be used in 4-bit. Nothing is trained, and nothing is hidden either: who has the original and the
result can work out the augmented model.
"""

import argparse
import math
from pathlib import Path

import torch
from peft import LoraConfig, PeftConfig, PeftModel
from peft.utils.save_and_load import load_peft_weights
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

from ..adapters import check_initialisation, is_adapter
from ..run_record import read_record, write_record
from .loading import load_tokenizer, local_folder
from .new_folder import check_new, new_folder


SCALE = 2.5  # the RKLD paper's, https://huggingface.co/papers/2406.01983
_DTYPES = ("bfloat16", "float16", "float32")


def run(arguments: list[str]) -> int:
    """
    Run `trl-rkld task-vector`.

    Args:
        arguments (`list[str]`):
            Command-line arguments.

    Returns:
        `int`:
            Exit code.
    """
    parser = argparse.ArgumentParser(
        prog="trl-rkld task-vector",
        description="Subtract from a model what further training on the forget set has added.",
        allow_abbrev=False,
    )
    parser.add_argument("--model_name_or_path", required=True, help="original model or adapter, a folder or a Hub id")
    parser.add_argument(
        "--augmented_model_name_or_path", required=True, help="the original trained further, a model or an adapter"
    )
    parser.add_argument("--scale", type=float, default=SCALE, help=f"how far to go (default: {SCALE})")
    parser.add_argument("--output_dir", required=True, help="new folder for the result")
    parser.add_argument("--dtype", choices=_DTYPES, help="of the result (default: the original's)")
    args = parser.parse_args(arguments)
    subtract(args.model_name_or_path, args.augmented_model_name_or_path, args.output_dir, args.scale, args.dtype)
    if is_adapter(args.output_dir):
        print(f"💾 Adapter saved to {args.output_dir}. Switched off, it brings all back: merge it (`trl-rkld merge`).")
    else:
        print(f"💾 Model saved to {args.output_dir}.")
    return 0


def subtract(original: str, augmented: str, output_dir: str, scale: float = SCALE, dtype: str | None = None) -> None:
    """
    Save `θ_o − scale · (θ_aug − θ_o)`.

    Args:
        original (`str`):
            Folder or Hub id of the original model, or of an adapter that is the original with its base.
        augmented (`str`):
            The same of the original trained further, or of an adapter trained on the original model.
        output_dir (`str`):
            New folder.
        scale (`float`, *optional*, defaults to `2.5`):
            How far to go; `0` gives the original.
        dtype (`str`, *optional*):
            Of what is saved. If `None`, that of the original model, or of an adapter as it was saved.

    Raises:
        [`ValueError`]: If the two don't fit together, or the output folder is not empty.
    """
    check_new(output_dir)
    if not math.isfinite(scale):
        raise ValueError(f"`scale={scale}` is not a finite number. The RKLD paper's is {SCALE}.")
    if dtype not in (None, *_DTYPES):
        raise ValueError(f"`dtype={dtype!r}` is not one of {', '.join(_DTYPES)}.")
    if is_adapter(augmented):
        make = _combine_adapters if is_adapter(original) else _negate_adapter
        _check_adapters(original, augmented)
    elif is_adapter(original):
        raise ValueError(
            f"`model_name_or_path={original!r}` is an adapter and `augmented_model_name_or_path={augmented!r}` a whole "
            "model. Give two adapters of one base, or merge the first (`trl-rkld merge`)."
        )
    else:
        make = _subtract_models
        _check_models(original, augmented)
    tokenizer = load_tokenizer(original)
    with new_folder(output_dir) as folder:
        make(original, augmented, scale, dtype and getattr(torch, dtype), folder)
        tokenizer.save_pretrained(folder)


def _check_models(original: str, augmented: str) -> None:
    """Raise where two models have other parameters. Their weights are not read."""
    there, here = _shapes(augmented), _shapes(original)
    for name in here | there:
        if here.get(name) != there.get(name):
            raise ValueError(
                f"`augmented_model_name_or_path={augmented!r}` is not `{original}` trained further: its `{name}` is "
                f"{there.get(name)}, the original's {here.get(name)} (another vocabulary or architecture?)."
            )


def _shapes(name: str) -> dict[str, tuple[int, ...]]:
    config = AutoConfig.from_pretrained(name)
    if "quantization_config" in config.to_dict():
        raise ValueError(
            f"`{name}` holds quantised weights, which can't be subtracted. Dequantise it, or use adapters."
        )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def _subtract_models(original: str, augmented: str, scale: float, dtype: torch.dtype | None, folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(original, dtype="auto")
    other = AutoModelForCausalLM.from_pretrained(augmented, dtype="auto")
    # Named parameters list tied weights once. Each is rounded once, at the end.
    for name, parameter in model.named_parameters():
        before = parameter.data.float()
        after = (before - scale * (other.get_parameter(name).data.float() - before)).to(dtype or parameter.dtype)
        if not torch.isfinite(after).all():
            raise ValueError(f"`{name}` is not finite any more. Lower `scale`, or set `dtype` to bfloat16 or float32.")
        parameter.data = after
    if dtype is not None:
        model.to(dtype)  # the buffers
    model.save_pretrained(folder)


def _check_adapters(original: str, augmented: str) -> None:
    """Raise where adapters are not of the same base, or not differences of weights."""
    adapters = [augmented, original] if is_adapter(original) else [augmented]
    configs = [PeftConfig.from_pretrained(adapter) for adapter in adapters]
    bases = [config.base_model_name_or_path for config in configs] + [original] * (len(adapters) == 1)
    revisions = [config.revision or "main" for config in configs]
    if len(set(revisions)) > 1:
        bases = [f"{base}@{revision}" for base, revision in zip(bases, revisions, strict=True)]
    if Path(bases[0]).resolve() != Path(bases[1]).resolve():
        raise ValueError(
            f"`augmented_model_name_or_path={augmented!r}` is an adapter of `{bases[0]}`, not of `{bases[1]}`: its "
            "difference from the original is not known. Give the model that it was trained on as `model_name_or_path`."
        )
    for adapter, config in zip(adapters, configs, strict=True):
        if not isinstance(config, LoraConfig):
            raise ValueError(f"`{adapter}` is a {config.peft_type.value} adapter. Only LoRA's can be subtracted.")
        changed = {
            "use_dora": config.use_dora,
            "lora_bias": config.lora_bias,
            "modules_to_save": config.modules_to_save,
            "trainable_token_indices": config.trainable_token_indices,
        }
        for name in [name for name, value in changed.items() if value]:
            raise ValueError(
                f"`{adapter}` has `{name}`: it is more than a product of two matrices for each weight. Merge it, and "
                "what it is compared with (`trl-rkld merge`), and give the whole models."
            )
        check_initialisation(config)


def _negate_adapter(original: str, augmented: str, scale: float, dtype: torch.dtype | None, folder: Path) -> None:
    """The original is the base, so the task vector is B·A, and one of the two is scaled."""
    weights = {}
    for name, tensor in load_peft_weights(augmented, device="cpu").items():
        is_b = "lora_B" in name or "lora_embedding_B" in name
        weights[name] = (tensor.float() * (-scale if is_b else 1)).to(dtype or tensor.dtype).contiguous()
    save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    PeftConfig.from_pretrained(augmented).save_pretrained(folder)
    _write_record(augmented, scale, folder)


def _combine_adapters(original: str, augmented: str, scale: float, dtype: torch.dtype | None, folder: Path) -> None:
    """Both deltas, one beside the other: `(1 + scale) · B_o·A_o − scale · B_aug·A_aug`."""
    base = PeftConfig.from_pretrained(original).base_model_name_or_path
    model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")  # its weights don't matter
    model = PeftModel.from_pretrained(model, original, adapter_name="original")
    model.load_adapter(augmented, adapter_name="augmented")
    # The combination has the scales of both in its matrices, and with rsLoRA would get another one.
    model.peft_config["original"].use_rslora = False
    model.add_weighted_adapter(["original", "augmented"], [1 + scale, -scale], "default", combination_type="cat")
    kept = next(iter(load_peft_weights(original, device="cpu").values())).dtype
    for name, parameter in model.named_parameters():
        if ".default." in f"{name}.":
            parameter.data = parameter.data.to(dtype or kept)
    model.save_pretrained(folder, selected_adapters=["default"])
    _write_record(original, scale, folder)


def _write_record(adapter: str, scale: float, folder: Path) -> None:
    """The record of an adapter that has one: merging and evaluation read from it how the base was held."""
    record = read_record(local_folder(adapter))
    if record is not None:
        write_record(folder, record | {"method": "task-vector", "adapter": None, "settings": {"scale": scale}})
