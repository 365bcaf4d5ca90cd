# Copyright 2026 The trl-rkld authors. Licensed under the Apache License, Version 2.0.
"""What a checkpoint's hash depends on: its weights and configuration, and no other file."""

import pytest

from unlearn_eval.fingerprint import hash_weights


@pytest.mark.parametrize("weights", ["model.safetensors", "pytorch_model.bin", "adapter_model.bin"])
@pytest.mark.parametrize("configuration", ["config.json", "generation_config.json", "adapter_config.json"])
def test_hash_of_weights(tmp_path, weights, configuration):
    (tmp_path / weights).write_bytes(b"weights")
    plain = hash_weights(tmp_path)
    (tmp_path / configuration).write_text("{}")
    configured = hash_weights(tmp_path)
    (tmp_path / "training_args.bin").write_bytes(b"arguments")
    (tmp_path / "README.md").write_text("card")
    assert hash_weights(tmp_path) == configured != plain
    (tmp_path / weights).write_bytes(b"others")
    assert hash_weights(tmp_path) not in (plain, configured)


def test_no_weights(tmp_path):
    (tmp_path / "optimizer.bin").write_bytes(b"state")
    with pytest.raises(ValueError, match="holds no weights"):
        hash_weights(tmp_path)
