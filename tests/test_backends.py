# Copyright 2026 The trl-rkld authors. Licensed under the Apache License, Version 2.0.
"""The transformers backend against plain logits and plain greedy decoding, one sequence at a time."""

import random

import numpy as np
import pytest
import torch
from conftest import FORGET, RETAIN, tiny_llama
from peft import LoraConfig, PeftModel, get_peft_model
from plain import plain_greedy, plain_scores
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, BitsAndBytesConfig, GenerationConfig

from unlearn_eval.backends import GenerateRequest
from unlearn_eval.backends.transformers import TransformersBackend
from unlearn_eval.prompts import OpenUnlearningTemplate, TokenizedAnswer
from unlearn_eval.quantization import keep_quantized_weights


VOCAB = 400
END = 2  # what the tiny tokenizer ends a turn with, and pads with

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
GROUPED = SMALL | {"num_key_value_heads": 2}
WINDOW = {"sliding_window": 8}
# By name: kind, settings, and whether a prompt can be shared. Random texts below are up to 55 tokens long.
ARCHITECTURES = {
    "llama": ("llama", GROUPED, True),
    "qwen3": ("qwen3", GROUPED | {"head_dim": 8}, True),
    "gpt2": ("gpt2", {"n_embd": 32, "n_layer": 2, "n_head": 4}, True),  # learned positions
    "gpt_neox": ("gpt_neox", SMALL, True),
    "phi": ("phi", SMALL, True),  # head with a bias
    "gemma2": ("gemma2", GROUPED | {"head_dim": 8, "final_logit_softcapping": 2.0}, False),
    "cohere": ("cohere", GROUPED | {"logit_scale": 0.25}, True),
    "granite": ("granite", GROUPED | {"logits_scaling": 4.0}, True),
    "gemma2, window": ("gemma2", GROUPED | WINDOW | {"head_dim": 8}, False),
    "gemma3, window": (
        "gemma3_text",
        GROUPED | WINDOW | {"head_dim": 8, "layer_types": ["sliding_attention", "full_attention"]},
        False,
    ),
    "mistral, window": ("mistral", GROUPED | WINDOW, False),
    "lfm2": ("lfm2", GROUPED | {"layer_types": ["conv", "full_attention"]}, False),  # convolutions
    "mamba": ("mamba", {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}, False),  # a recurrence
    "bloom": ("bloom", {"hidden_size": 32, "n_layer": 2, "n_head": 4}, False),  # positions from the mask
}


def build(name, seed=0):
    torch.manual_seed(seed)
    kind, settings, _ = ARCHITECTURES[name]
    common = {
        "vocab_size": VOCAB,
        "initializer_range": 0.3,
        "bos_token_id": 1,
        "pad_token_id": END,
        "eos_token_id": END,
    }
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**common, **settings)).eval()
    if getattr(model.get_output_embeddings(), "bias", None) is not None:
        torch.nn.init.normal_(model.get_output_embeddings().bias)  # zero by default: it would hide a lost bias
    return model


def random_requests(sizes, seed=0):
    """Random answers after random prompts, from `(length of the prompt, lengths of its answers)`, in random order."""
    generator = random.Random(seed)

    def ids(length):
        return [generator.randrange(3, VOCAB) for _ in range(length)]

    requests = []
    for length, answers in sizes:
        prompt = ids(length)
        requests += [TokenizedAnswer(prompt, ids(answer)) for answer in answers]
    generator.shuffle(requests)
    return requests


# Several answers, one answer, one token, and a prompt of one token.
REQUESTS = random_requests([(12, (7, 1, 12)), (3, (4,)), (25, (9, 9, 2, 30)), (40, (1,)), (1, (5, 1)), (30, (2, 3))])


def assert_scores(found, expected, atol=2e-5):
    assert sorted(found) == list(range(len(expected)))
    for index, scores in enumerate(expected):
        assert found[index].logprobs.dtype == np.float32
        assert found[index].matches.dtype == bool
        np.testing.assert_allclose(found[index].logprobs, scores.logprobs, atol=atol, rtol=1e-5)
        np.testing.assert_allclose(found[index].means, scores.means, atol=atol, rtol=1e-5)
        np.testing.assert_allclose(found[index].variances, scores.variances, atol=10 * atol, rtol=1e-4)
        assert found[index].matches.tolist() == scores.matches.tolist()


def tokens_computed(model, function):
    """How many tokens, padding included, go through a model's embeddings."""
    counts = []
    hook = model.get_input_embeddings().register_forward_pre_hook(lambda _, args: counts.append(args[0].numel()))
    function()
    hook.remove()
    return sum(counts)


@pytest.mark.parametrize("batch_tokens", [45, 60, 200, 10_000])
@pytest.mark.parametrize("packs", [True, False])
def test_scores_are_those_of_plain_logits(packs, batch_tokens):
    """Packed or not, in batches of any size, each answer scores as it does alone; some are the model's own."""
    model = build("llama")
    prompts = sorted({tuple(prompt) for prompt, _ in REQUESTS})
    own = [TokenizedAnswer(list(prompt), plain_greedy(model, prompt, 6)) for prompt in prompts[:4]]
    requests = [*REQUESTS, *own, REQUESTS[0], REQUESTS[3]]
    backend = TransformersBackend(model, [END], batch_tokens)
    backend.packs = None if packs else False
    found = dict(backend.score(requests))
    assert backend.packs is packs
    assert_scores(found, [plain_scores(model, *request) for request in requests])
    assert all(found[len(REQUESTS) + i].matches.all() for i in range(4))
    assert not all(scores.matches.all() for scores in found.values())


def test_requests_of_one_answer_a_prompt():
    model = build("llama")
    requests = random_requests([(9, (4,)), (2, (1,)), (30, (8,))])
    assert_scores(dict(TransformersBackend(model, [END]).score(requests)), [plain_scores(model, *r) for r in requests])
    assert list(TransformersBackend(model, [END]).score([])) == []


def test_a_prompt_is_computed_once():
    """
    6 answers of 5 tokens after 50 are 50 + 6 × 4 tokens, not 6 × 54: for all of 10 questions, and one more to try. One
    text of 55 goes through the whole model and through it less its head.
    """
    model = build("llama")
    requests = random_requests([(50, (5,) * 6)] * 10)
    backend = TransformersBackend(model, [END])
    alone = 54
    assert tokens_computed(model, lambda: list(backend.score(requests))) == 11 * 74 + 2 * alone + 2 * 55


def test_batches_hold_as_many_tokens_as_asked():
    model, sizes = build("llama"), []
    requests = random_requests([(length, (2,)) for length in range(1, 30)])
    model.get_input_embeddings().register_forward_pre_hook(lambda _, args: sizes.append(args[0].shape))
    list(TransformersBackend(model, [END], batch_tokens=64).score(requests))
    del sizes[:2]  # of the look at the head
    assert sum(shape[0] for shape in sizes) == len(requests)
    assert max(shape.numel() for shape in sizes) <= 64
    assert len(sizes) < len(requests) / 2


@pytest.mark.parametrize("length, batch_tokens", [(1, 64), (30, 64), (30, 1)])
def test_a_prompt_with_more_answers_than_a_batch_holds(length, batch_tokens):
    """All texts of a tokenizer with a first token begin alike: they still go through the model in batches."""
    model, sizes = build("llama"), []
    requests = random_requests([(length, (20, 3, 11, 8, 2, 15, 9, 9, 1, 30))])
    model.get_input_embeddings().register_forward_pre_hook(lambda _, args: sizes.append(args[0].numel()))
    found = dict(TransformersBackend(model, [END], batch_tokens).score(requests))
    assert max(sizes) <= max(batch_tokens, length + 30)
    assert_scores(found, [plain_scores(model, *request) for request in requests])


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_architectures(name):
    """Also where a mask of its own would be ignored or fail, and where logits are scaled, capped or biased."""
    model = build(name)
    backend = TransformersBackend(model, [END], batch_tokens=100)
    found = dict(backend.score(REQUESTS))
    assert_scores(found, [plain_scores(model, *request) for request in REQUESTS])
    assert backend.packs is ARCHITECTURES[name][2]


@pytest.mark.parametrize(
    "kind, settings",
    [
        ("modernbert-decoder", GROUPED),  # layers between hidden states and head
        (
            "recurrent_gemma",
            GROUPED | {"head_dim": 8, "lru_width": 32, "logits_soft_cap": 2.0},
        ),  # a cap of another name
    ],
)
def test_a_head_that_is_not_known(kind, settings):
    torch.manual_seed(0)
    config = CONFIG_MAPPING[kind](
        vocab_size=VOCAB, initializer_range=0.3, pad_token_id=END, eos_token_id=END, **settings
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    with pytest.raises(ValueError, match="The logits of `.*` can't be computed from its last hidden states"):
        list(TransformersBackend(model, [END]).score(REQUESTS))


@pytest.mark.parametrize("name", ["gemma2, window", "gemma3, window", "mistral, window"])
def test_a_window_shorter_than_some_texts_only(name):
    """Most texts fit the window, however many answers they have; one reaches beyond it."""
    model = build(name)
    for answers in ((4, 4), (4,)):
        requests = random_requests([(3, (4,) * 8), (12, answers)])
        found = dict(TransformersBackend(model, [END]).score(requests))
        assert_scores(found, [plain_scores(model, *request) for request in requests])


def test_a_window_shorter_than_later_texts():
    """What fits the window in one call says nothing about longer texts in the next."""
    model = build("mistral, window")
    backend = TransformersBackend(model, [END])
    for requests in (random_requests([(3, (4, 4))]), random_requests([(12, (4, 4))])):
        assert_scores(dict(backend.score(requests)), [plain_scores(model, *request) for request in requests])


def lora(model, kind):
    """A random adapter."""
    settings = {
        "attention": dict(target_modules=["q_proj", "v_proj"]),
        "dora": dict(target_modules=["q_proj", "down_proj"], use_dora=True),
        "lm_head": dict(target_modules=["q_proj", "lm_head"]),
        "lm_head saved": dict(target_modules=["q_proj"], modules_to_save=["lm_head"]),
        "embeddings saved": dict(target_modules=["q_proj"], modules_to_save=["embed_tokens"]),
        "tokens": dict(target_modules=["q_proj"], trainable_token_indices=[5, 6, 7]),
    }[kind]
    torch.manual_seed(3)
    model = get_peft_model(model, LoraConfig(r=4, task_type="CAUSAL_LM", **settings))
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.data += 0.3 * torch.randn_like(parameter)
            assert "lora" in name or "modules_to_save" in name or "token_adapter" in name or "trainable_tokens" in name
    return model.eval()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", ["attention", "dora", "lm_head", "lm_head saved", "embeddings saved", "tokens"])
def test_adapters(kind, tied):
    model = lora(tiny_llama(VOCAB, tie_word_embeddings=tied), kind)
    found = dict(TransformersBackend(model, [END]).score(REQUESTS))
    expected = [plain_scores(model, *request) for request in REQUESTS]
    assert_scores(found, expected)
    with model.disable_adapter():
        bare = [plain_scores(model, *request) for request in REQUESTS]
        assert_scores(dict(TransformersBackend(model, [END]).score(REQUESTS)), bare)
    assert max(abs(one.avg_loss - other.avg_loss) for one, other in zip(expected, bare, strict=True)) > 0.05


@pytest.mark.parametrize("adapter", [False, True])
def test_4_bit(adapter, llama_path, tokenizer, tmp_path):
    """Scored as by its own logits, which aren't those of the model before; also with an adapter on top."""
    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    )
    model = AutoModelForCausalLM.from_pretrained(llama_path, quantization_config=quantization, dtype=torch.float32)
    keep_quantized_weights(model)
    if adapter:
        lora(tiny_llama(len(tokenizer), tie_word_embeddings=True), "attention").save_pretrained(tmp_path)
        model = PeftModel.from_pretrained(model, tmp_path)
    model.eval()
    requests = [TokenizedAnswer(*([i % len(tokenizer) for i in ids] for ids in request)) for request in REQUESTS]
    expected = [plain_scores(model, *request) for request in requests]
    assert_scores(dict(TransformersBackend(model, [END]).score(requests)), expected)
    dense = AutoModelForCausalLM.from_pretrained(llama_path)
    before = [plain_scores(dense, *request) for request in requests]
    assert max(abs(one.avg_loss - other.avg_loss) for one, other in zip(expected, before, strict=True)) > 0.01


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_logits_are_not_rounded(dtype):
    """The head is multiplied in 32 bits: its error is far below that of logits in the model's dtype."""
    model = build("llama").to(dtype)
    requests = random_requests([(20, (8,)), (10, (12,))])  # one answer a prompt: the same hidden states
    found = dict(TransformersBackend(model, [END], batch_tokens=1).score(requests))
    ours, theirs = [], []
    for index, (prompt, answer) in enumerate(requests):
        ids = torch.tensor([[*prompt, *answer]])
        with torch.no_grad():
            hidden = model.base_model(ids).last_hidden_state[0]
            exact = hidden.double() @ model.lm_head.weight.double().T
            rounded = model(ids).logits[0]
        expected = plain_scores(None, prompt, answer, exact).logprobs
        ours.append(np.abs(found[index].logprobs - expected).max())
        theirs.append(np.abs(plain_scores(None, prompt, answer, rounded).logprobs - expected).max())
    assert max(ours) < 1e-4
    assert max(theirs) > 1e-3


@pytest.mark.parametrize("training", [True, False])
def test_mode_is_restored(training):
    model = tiny_llama(VOCAB, attention_dropout=0.5).train(training)
    backend = TransformersBackend(model, [END])
    found = dict(backend.score(REQUESTS))
    assert model.training is training
    generated = dict(backend.generate([GenerateRequest([5, 6, 7], 5)]))
    assert all(module.training is training for module in model.modules())
    model.eval()
    assert_scores(found, [plain_scores(model, *request) for request in REQUESTS])
    assert generated == {0: plain_greedy(model, [5, 6, 7], 5)}


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2, window", "lfm2", "mamba"])
@pytest.mark.parametrize("batch_size", [1, 3, 32])
def test_generations_are_plain_greedy_decoding(name, batch_size):
    """In padded batches, each to its own limit, up to its own end, which is not part of it."""
    model = build(name)
    generator = random.Random(1)
    prompts = [[generator.randrange(3, VOCAB) for _ in range(length)] for length in (1, 4, 9, 9, 17, 30, 2, 5)]
    unlimited = [plain_greedy(model, prompt, 12, ()) for prompt in prompts]
    ends = [unlimited[0][3], unlimited[4][0], unlimited[6][11]]  # in the middle, at once, at the limit
    requests = [
        GenerateRequest(prompt, limit) for prompt, limit in zip(prompts, [12, 12, 1, 7, 12, 2, 12, 12], strict=True)
    ]
    found = dict(TransformersBackend(model, ends, batch_size=batch_size).generate(requests))
    expected = {i: plain_greedy(model, *request, ends) for i, request in enumerate(requests)}
    assert found == expected
    assert [] in expected.values()
    assert 7 in map(len, expected.values())
    assert not {token for ids in expected.values() for token in ids} & set(ends)


@pytest.mark.parametrize(
    "settings",
    [
        {"do_sample": True, "temperature": 9.0, "top_k": 3, "top_p": 0.5},
        {"repetition_penalty": 8.0},
        {"no_repeat_ngram_size": 1},
        {"num_beams": 3, "length_penalty": 4.0},
        {"min_new_tokens": 12},
        {"min_length": 40},
        {"eos_token_id": list(range(3, VOCAB))},
        {"max_new_tokens": 2},
        {"suppress_tokens": list(range(3, 200))},
        {"begin_suppress_tokens": list(range(3, 200))},
        {"bad_words_ids": [[token] for token in range(3, 200)]},
        {"sequence_bias": [[[token], -50.0] for token in range(3, 200)]},
        {"forced_eos_token_id": 9},
        {"forced_bos_token_id": 9},
        {"exponential_decay_length_penalty": (1, 50.0)},
        {"encoder_repetition_penalty": 8.0},
        {"guidance_scale": 3.0},
        {"num_return_sequences": 2, "do_sample": True},
        {"return_dict_in_generate": True},
        {"use_cache": False},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_the_models_own_settings_are_ignored(settings):
    model = build("llama")
    prompts = [prompt for prompt, _ in REQUESTS[:4]]
    end = plain_greedy(model, prompts[0], 12, ())[4]
    requests = [GenerateRequest(prompt, 12) for prompt in prompts]
    expected = {i: plain_greedy(model, *request, [end]) for i, request in enumerate(requests)}
    model.generation_config = GenerationConfig(**settings)
    assert dict(TransformersBackend(model, [end]).generate(requests)) == expected


def chat_requests(tokenizer):
    """Questions and answers as open-unlearning has them, the padding token inside; two answers a question."""
    pairs = FORGET + RETAIN
    return [
        OpenUnlearningTemplate(system_prompt="Be brief.").tokenize(tokenizer, question, answer)
        for i, (question, _) in enumerate(pairs)
        for answer in (pairs[i][1], pairs[i - 1][1])
    ]


@pytest.mark.parametrize("packs", [True, False])
def test_hidden_tokens_when_scoring(packs, tokenizer):
    """As the model with open-unlearning's mask: `input_ids != pad`, padding to the right; positions count all tokens."""
    model = tiny_llama(len(tokenizer)).eval()
    requests = chat_requests(tokenizer)
    assert all(prompt.count(END) == 2 and answer.count(END) == 2 for prompt, answer in requests)
    backend = TransformersBackend(model, [END], batch_tokens=200, masked_token_id=END)
    backend.packs = None if packs else False
    found = dict(backend.score(requests))
    assert backend.packs is packs
    width = max(len(prompt) + len(answer) for prompt, answer in requests)
    ids = torch.tensor([prompt + answer + [END] * (width - len(prompt + answer)) for prompt, answer in requests])
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=(ids != END).long()).logits
    expected = [plain_scores(None, *request, one) for request, one in zip(requests, logits, strict=True)]
    assert_scores(found, expected)
    visible = [plain_scores(model, *request) for request in requests]
    assert min(abs(one.avg_loss - other.avg_loss) for one, other in zip(expected, visible, strict=True)) > 1e-3


@pytest.mark.parametrize("packs", [True, False])
def test_a_hidden_first_token(packs):
    """It sees nothing at all, not even itself, and must not spoil what follows."""
    model = build("llama")
    requests = [TokenizedAnswer([END, *prompt], answer) for prompt, answer in REQUESTS]
    backend = TransformersBackend(model, [END], masked_token_id=END)
    backend.packs = None if packs else False
    found = dict(backend.score(requests))
    ids = [torch.tensor([prompt + answer]) for prompt, answer in requests]
    with torch.no_grad():
        logits = [model(input_ids=one, attention_mask=(one != END).long()).logits[0] for one in ids]
    assert_scores(found, [plain_scores(None, *request, one) for request, one in zip(requests, logits, strict=True)])


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_hidden_tokens_when_generating(name, tokenizer):
    """As `model.generate` with open-unlearning's mask, left-padded in one batch: positions count the visible tokens."""
    model = build(name)
    prompts = [prompt for prompt, _ in chat_requests(tokenizer)[::2]]
    width = max(map(len, prompts))
    ids = torch.tensor([[END] * (width - len(prompt)) + prompt for prompt in prompts])
    end = plain_greedy(model, [token for token in prompts[0] if token != END], 12, ())[5]
    output = model.generate(
        input_ids=ids,
        attention_mask=(ids != END).long(),
        do_sample=False,
        max_new_tokens=12,
        eos_token_id=end,
        pad_token_id=END,
    )[:, width:].tolist()
    expected = {i: one[: one.index(end)] if end in one else one for i, one in enumerate(output)}
    backend = TransformersBackend(model, [end], batch_size=5, masked_token_id=END)
    assert dict(backend.generate([GenerateRequest(prompt, 12) for prompt in prompts])) == expected
    assert len({*map(len, expected.values())}) > 1
    shown = TransformersBackend(model, [end]).generate([GenerateRequest(prompt, 12) for prompt in prompts])
    assert dict(shown) != expected
