# Copyright 2026 The trl-rkld authors. Licensed under the Apache License, Version 2.0.
"""The frozen models behind the loss, read from a cache or run live: the same numbers either way."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from peft import PeftModel
from safetensors import safe_open

from unlearn_eval.fingerprint import hash_tensors

from ..losses import HeadInput, LMHead
from .private_folder import save_private
from .roles import AUGMENTED, Role
from .token_states import TokenStates


@dataclass
class LiveTeacher:
    """
    Runs the models at each step.

    Args:
        original_role ([`~trl_rkld.teacher.roles.Role`]):
            The original model.
        augmented_role ([`~trl_rkld.teacher.roles.Role`], *optional*):
            The augmented model, for methods that have one.
        accelerator ([`~accelerate.Accelerator`]):
            Gives the autocast.
    """

    original_role: Role
    augmented_role: Role | None
    accelerator: Accelerator

    def original(self, inputs: dict[str, torch.Tensor]) -> HeadInput:
        """Hidden states and head of the original model for a batch."""
        return self.original_role.head_input(inputs, self.accelerator)

    def augmented(self, inputs: dict[str, torch.Tensor]) -> HeadInput:
        """Hidden states and head of the augmented model for a batch."""
        return self.augmented_role.head_input(inputs, self.accelerator)

    def original_log_probs(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """Log-probabilities of a batch's counted tokens under the original model, of shape `(num_tokens,)`."""
        return self.original_role.label_log_probs(inputs, self.accelerator)

    def digest(self) -> str:
        """SHA-256 of what was trained for the teacher: the augmented model, or its adapter."""
        if self.augmented_role is None:
            return hash_tensors([])
        model = self.augmented_role.model
        return hash_tensors(
            (name, parameter)
            for name, parameter in model.named_parameters()
            if not isinstance(model, PeftModel) or f".{AUGMENTED}." in f"{name}."
        )


@dataclass
class CachedTeacher:
    """
    Holds what the models gave once. A head of `None` is the student's own, which does not train.

    Args:
        student_head ([`~trl_rkld.losses.LMHead`]):
            Head of the student, sharing its tensors.
        original_states ([`~trl_rkld.teacher.token_states.TokenStates`], *optional*):
            Hidden states of the original model, for losses that need its logits.
        original_head ([`~trl_rkld.losses.LMHead`], *optional*):
            Its head, where the student's changes.
        augmented_states ([`~trl_rkld.teacher.token_states.TokenStates`], *optional*):
            States of the augmented model, for methods that have one.
        augmented_head ([`~trl_rkld.losses.LMHead`], *optional*):
            Its head, where it is another than the student's.
        original_answers ([`~trl_rkld.teacher.token_states.TokenStates`], *optional*):
            Log-probabilities of the labels under the original model, for methods that need no more of it.
    """

    student_head: LMHead
    original_states: TokenStates | None = None
    original_head: LMHead | None = None
    augmented_states: TokenStates | None = None
    augmented_head: LMHead | None = None
    original_answers: TokenStates | None = None

    def original(self, inputs: dict[str, torch.Tensor]) -> HeadInput:
        """Hidden states and head of the original model for a batch."""
        return HeadInput(self.original_states.of(inputs), self.original_head or self.student_head)

    def augmented(self, inputs: dict[str, torch.Tensor]) -> HeadInput:
        """Hidden states and head of the augmented model for a batch."""
        return HeadInput(self.augmented_states.of(inputs), self.augmented_head or self.student_head)

    def original_log_probs(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """Log-probabilities of a batch's counted tokens under the original model, of shape `(num_tokens,)`."""
        return self.original_answers.of(inputs)

    def tensors(self) -> dict[str, torch.Tensor]:
        """Everything the teacher consists of, by name."""
        tensors = {}
        for role, states, head in (
            ("original", self.original_states, self.original_head),
            ("augmented", self.augmented_states, self.augmented_head),
            ("answers", self.original_answers, None),
        ):
            if states is not None:
                tensors |= {f"{role}.states": states.states, f"{role}.starts": states.starts}
            if head is not None:
                tensors[f"{role}.weight"] = head.weight
                if head.bias is not None:
                    tensors[f"{role}.bias"] = head.bias
        return tensors

    def digest(self) -> str:
        """SHA-256 of the teacher's numbers."""
        return hash_tensors(sorted(self.tensors().items()))

    def save(self, path: Path, fingerprint: dict[str, str]) -> None:
        """
        Write the teacher to a file that only its owner can read, complete or not at all.

        Args:
            path (`Path`):
                File, in a private folder.
            fingerprint (`dict[str, str]`):
                Hashes of what it was made from.
        """
        save_private(self.tensors(), path, metadata={"fingerprint": json.dumps(fingerprint)})

    @classmethod
    def load(cls, path: Path, student_head: LMHead, device: torch.device) -> "CachedTeacher":
        """
        Read a teacher written by [`CachedTeacher.save`].

        Args:
            path (`Path`):
                File.
            student_head ([`~trl_rkld.losses.LMHead`]):
                Head of the student; gives the scale and the soft cap, too, which the file does not hold.
            device (`torch.device`):
                Where the heads go.

        Returns:
            [`CachedTeacher`]:
                The same teacher.
        """
        with safe_open(path, framework="pt") as file:
            names = set(file.keys())

            def states(role):
                if f"{role}.states" in names:
                    return TokenStates(file.get_tensor(f"{role}.states"), file.get_tensor(f"{role}.starts"))

            def head(role):
                if f"{role}.weight" in names:
                    bias = file.get_tensor(f"{role}.bias").to(device) if f"{role}.bias" in names else None
                    return student_head._replace(weight=file.get_tensor(f"{role}.weight").to(device), bias=bias)

            return cls(
                student_head,
                states("original"),
                head("original"),
                states("augmented"),
                head("augmented"),
                states("answers"),
            )


def read_fingerprint(path: Path) -> dict[str, str]:
    """The fingerprint that a teacher's file was written with."""
    with safe_open(path, framework="pt") as file:
        return json.loads(file.metadata()["fingerprint"])


def _is_shared(tensor: torch.Tensor | None, students: torch.Tensor | None) -> bool:
    if tensor is None or students is None:
        return tensor is students
    return not students.requires_grad and torch.equal(tensor, students)


def frozen_head(role: Role, student_head: LMHead) -> LMHead | None:
    """
    The head of a role as it is now, kept for later.

    Args:
        role ([`~trl_rkld.teacher.roles.Role`]):
            Original or augmented model.
        student_head ([`~trl_rkld.losses.LMHead`]):
            Head of the student.

    Returns:
        [`~trl_rkld.losses.LMHead`] or `None`:
            A copy; `None` where it is the student's own, which does not train: one head serves all.
    """
    head = role.head()
    if all(_is_shared(*tensors) for tensors in zip(head[:2], student_head[:2], strict=True)):
        return None
    bias = None if head.bias is None else head.bias.detach().clone()
    return head._replace(weight=head.weight.detach().clone(), bias=bias)
