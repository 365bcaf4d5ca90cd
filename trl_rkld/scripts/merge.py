# Copyright 2026 The trl-rkld authors. Licensed under the Apache License, Version 2.0.
"""
Merge an adapter into its base: a model that holds nothing else, and that no switch turns back.

```bash
trl-rkld merge --model_name_or_path path/to/adapter --output_dir path/to/merged
```

An adapter trained on a 4-bit base is merged into that base dequantised: merged into the original weights, it would be
another model than the one that was trained.
"""

import argparse
from pathlib import Path

import torch
from peft import PeftConfig, PeftModel
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from unlearn_eval.quantization import is_quantized

from ..adapters import is_adapter
from ..run_record import read_record, write_record
from ..trainer.model_card import ADAPTER_WARNING
from .loading import load_tokenizer, local_folder
from .new_folder import check_new, new_folder


def run(arguments: list[str]) -> int:
    """
    Run `trl-rkld merge`.

    Args:
        arguments (`list[str]`):
            Command-line arguments.

    Returns:
        `int`:
            Exit code.
    """
    parser = argparse.ArgumentParser(prog="trl-rkld merge", description="Merge an adapter into its base.")
    parser.add_argument("--model_name_or_path", required=True, help="adapter, a folder or a Hub id")
    parser.add_argument("--output_dir", required=True, help="new folder for the merged model")
    parser.add_argument(
        "--dtype", choices=["bfloat16", "float16", "float32"], help="of the merged model (default: the base's)"
    )
    args = parser.parse_args(arguments)
    dtype = merge(args.model_name_or_path, args.output_dir, args.dtype and getattr(torch, args.dtype))
    print(f"💾 Merged model saved to {args.output_dir}, in {str(dtype).removeprefix('torch.')}.")
    return 0


def merge(adapter: str, output_dir: str, dtype: torch.dtype | None = None) -> torch.dtype:
    """
    Merge an adapter into its base and save the result.

    Args:
        adapter (`str`):
            Folder or Hub id of the adapter. What [`UnlearningTrainer`] saved says how its base was quantised.
        output_dir (`str`):
            New folder.
        dtype (`torch.dtype`, *optional*):
            Of the merged model. If `None`, that in which the base was held in training.

    Returns:
        `torch.dtype`:
            Of the merged model.
    """
    check_new(output_dir)
    if not is_adapter(adapter):
        raise ValueError(f"`{adapter}` is not an adapter: there is nothing to merge.")
    adapter = local_folder(adapter)
    tokenizer, record = load_tokenizer(adapter), read_record(adapter)
    peft_config = PeftConfig.from_pretrained(adapter)
    # Loaded, and quantised, as it was in training: 4-bit codes depend on the dtype that they were made from.
    kwargs = {"dtype": "auto", "revision": peft_config.revision or "main"}
    if record is not None:
        kwargs["dtype"] = getattr(torch, record["dtype"])
        if record["quantization"] is not None:
            kwargs["quantization_config"] = BitsAndBytesConfig.from_dict(record["quantization"])
    model = AutoModelForCausalLM.from_pretrained(peft_config.base_model_name_or_path, **kwargs)
    dtype = dtype or model.dtype
    if is_quantized(model):
        model = model.dequantize().cpu()  # in float32 it may not fit the card that its 4 bits do
    # The merge itself is done in float32, so that it is rounded once.
    model = PeftModel.from_pretrained(model.float(), adapter).merge_and_unload(progressbar=True, safe_merge=True)
    with new_folder(output_dir) as folder:
        model.to(dtype).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        if record is not None:
            held = {"quantization": None, "dtype": str(dtype).removeprefix("torch.")}
            write_record(folder, record | held | {"adapter": None, "merged": True})
        card = Path(adapter, "README.md")
        if card.is_file():  # what else must be deleted holds for the merged model, too
            text = card.read_text(encoding="utf-8").replace(ADAPTER_WARNING, "")
            (folder / card.name).write_text(text, encoding="utf-8")
    return dtype
