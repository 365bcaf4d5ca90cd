# Copyright 2026 The trl-rkld authors. Licensed under the Apache License, Version 2.0.
"""What the evaluation is held against: plain logits and plain greedy decoding, one sequence at a time."""

import torch

from unlearn_eval.backends import AnswerScores


@torch.no_grad()
def plain_scores(model, prompt_ids, answer_ids, logits=None):
    """Scores from the model's own logits of this sequence alone; the moments in 64 bits."""
    if logits is None:
        logits = model(torch.tensor([[*prompt_ids, *answer_ids]])).logits[0]
    log_probs = logits[len(prompt_ids) - 1 : len(prompt_ids) + len(answer_ids) - 1].double().log_softmax(-1)
    labels = torch.tensor(answer_ids)
    probs = log_probs.exp()
    means = (probs * log_probs).sum(-1)
    return AnswerScores(
        log_probs[range(len(labels)), labels].numpy(),
        (log_probs.argmax(-1) == labels).numpy(),
        means.numpy(),
        (probs * (log_probs - means[:, None]) ** 2).sum(-1).numpy(),
    )


@torch.no_grad()
def plain_greedy(model, prompt_ids, max_new_tokens, end_ids=(2,)):
    """The first choice, appended again and again; nothing is cached."""
    ids, new = list(prompt_ids), []
    while len(new) < max_new_tokens:
        token = model(torch.tensor([ids])).logits[0, -1].argmax().item()
        if token in end_ids:
            break
        new.append(token)
        ids.append(token)
    return new
