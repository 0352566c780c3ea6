"""What `lean` calls in vLLM's GPU runner is there, in the installed vLLM; its results need a GPU (`test_gpu.py`)."""

from __future__ import annotations

import pytest

pytestmark = pytest.mark.vllm


@pytest.fixture
def runner_module():
    return pytest.importorskip("vllm.v1.worker.gpu.model_runner")


def test_everything_is_called_as_vllm_takes_it(runner_module):
    import vllm
    from packaging.version import Version

    from trl_turbo.engine import lean

    found = [
        reason
        for owner, names in ((runner_module, lean._EXPECTED), (runner_module.GPUModelRunner, lean._METHODS))
        for name, wanted in names.items()
        if (reason := lean._misfit(owner, name, wanted)) is not None
    ]
    if Version(vllm.__version__) < Version("0.28"):
        assert not found
    else:  # later ones were never run: their bursts go through vLLM's own steps, and the report says so
        assert all("is not as expected" in reason for reason in found)


def test_another_signature_is_said(runner_module, monkeypatch):
    from trl_turbo.engine import lean

    monkeypatch.setattr(runner_module, "prepare_pos_seq_lens", lambda idx_mapping, pages: None)
    reason = lean._misfit(runner_module, "prepare_pos_seq_lens", lean._EXPECTED["prepare_pos_seq_lens"])
    assert reason == "prepare_pos_seq_lens takes ('idx_mapping', 'pages'), and query_start_loc is not as expected"
    monkeypatch.delattr(runner_module, "prepare_pos_seq_lens")
    assert "has no prepare_pos_seq_lens" in lean._misfit(runner_module, "prepare_pos_seq_lens", ())


def test_another_runner_is_said():
    from trl_turbo.engine import lean

    assert "is not vLLM's second GPU runner" in lean.unfit(object())
