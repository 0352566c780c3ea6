"""The same prompts, greedily, through transformers and through vLLM."""

from __future__ import annotations

from typing import Any

import torch

PROMPTS = ([5, 6, 7, 8, 9], [40, 41, 42], [100, 3, 77, 12, 60, 61, 62])
TOKENS = 12


def by_transformers(model: Any, prompts: Any = PROMPTS, tokens: int = TOKENS) -> list[list[int]]:
    was_training = model.training
    model.eval()
    found = []
    with torch.no_grad():
        for prompt in prompts:
            ids = torch.tensor([list(prompt)])
            for _ in range(tokens):
                ids = torch.cat([ids, model(input_ids=ids, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
            found.append(ids[0, len(prompt) :].tolist())
    model.train(was_training)
    return found


def by_vllm(llm: Any, prompts: Any = PROMPTS, tokens: int = TOKENS) -> list[list[int]]:
    from vllm import SamplingParams

    params = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True, detokenize=False)
    outputs = llm.generate([{"prompt_token_ids": list(p)} for p in prompts], params, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


def train(model: Any, steps: int = 2, lr: float = 0.05) -> None:
    """A few real optimizer steps, large enough to change the answers."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=lr)
    ids = torch.tensor([[5, 9, 13, 17, 21, 25, 29, 33]])
    for _ in range(steps):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
