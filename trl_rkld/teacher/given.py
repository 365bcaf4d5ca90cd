# Copyright 2026 The trl-rkld authors. Licensed under the Apache License, Version 2.0.
"""An augmented model that is given: loaded as the student was, and checked to be like it."""

from accelerate import PartialState
from accelerate.utils import DistributedType
from peft import PeftModel
from transformers import AutoConfig, PreTrainedModel
from trl.trainer.utils import create_model_from_path

from unlearn_eval.models import without_peft
from unlearn_eval.quantization import is_quantized

from ..adapters import base_of


def load_like(path_or_id: str, model: PreTrainedModel | PeftModel, init_kwargs: dict | None) -> PreTrainedModel:
    """
    Load a model, or an adapter with its base, at the precision and quantisation of another.

    Args:
        path_or_id (`str`):
            Local folder or Hub id of a model or of an adapter.
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            The other.
        init_kwargs (`dict`, *optional*):
            Further arguments of `from_pretrained`.

    Returns:
        [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]:
            The model, frozen.
    """
    causal_lm = without_peft(model)
    # Of another attention the logits differ, and α multiplies that.
    kwargs = {"attn_implementation": causal_lm.config._attn_implementation} | dict(init_kwargs or {})
    kwargs |= {"dtype": causal_lm.dtype} | device_map_kwargs()
    if is_quantized(causal_lm):
        kwargs["quantization_config"] = causal_lm.hf_quantizer.quantization_config
    base = base_of(path_or_id)
    name, kwargs["revision"] = base or (path_or_id, "main")  # the student's revision is that of another repository
    loaded = create_model_from_path(name, **kwargs)
    if base is not None:
        loaded = PeftModel.from_pretrained(loaded, path_or_id)
    return loaded.requires_grad_(False).eval()


def device_map_kwargs() -> dict[str, None]:
    """Keeps `create_model_from_path` from splitting a model over all GPUs where each has a process, as TRL does."""
    distributed = PartialState().distributed_type in (DistributedType.MULTI_GPU, DistributedType.DEEPSPEED)
    return {"device_map": None} if distributed else {}


def check_augmented_model(augmented: str | PreTrainedModel | PeftModel, model: PreTrainedModel | PeftModel) -> None:
    """Raise where a given augmented model can't be found, or is not like the model. A path's weights are not read."""
    if not isinstance(augmented, str):
        check_same_precision(augmented, model)
        return
    name, revision = base_of(augmented) or (augmented, "main")
    config = AutoConfig.from_pretrained(name, revision=revision)
    _check_same_vocabulary(
        config.get_text_config().vocab_size, without_peft(model).config.get_text_config().vocab_size
    )


def check_same_precision(teacher: PreTrainedModel | PeftModel, student: PreTrainedModel | PeftModel) -> None:
    """Raise where the augmented model has another vocabulary, dtype or quantisation than the student."""
    teacher, student = without_peft(teacher), without_peft(student)
    _check_same_vocabulary(*(model.get_output_embeddings().weight.shape[0] for model in (teacher, student)))
    precisions = [(str(model.dtype), _quantization(model)) for model in (teacher, student)]
    if precisions[0] != precisions[1]:
        raise ValueError(
            f"`augmented_model` is held as {precisions[0]} and the model as {precisions[1]} (dtype, quantisation). "
            "α would multiply that difference. Load both alike, or pass `augmented_model` as a path: it is then."
        )


def _check_same_vocabulary(augmented: int, student: int) -> None:
    if augmented != student:
        raise ValueError(
            f"`augmented_model` has {augmented} tokens in its vocabulary and the model {student}. It must be the same "
            "model trained further."
        )


def _quantization(model: PreTrainedModel) -> str | None:
    if not is_quantized(model):
        return None
    config = model.hf_quantizer.quantization_config
    kind = f"{config.quant_method} {config.bnb_4bit_quant_type} double={config.bnb_4bit_use_double_quant}"
    return f"{kind} compute={config.bnb_4bit_compute_dtype}"
