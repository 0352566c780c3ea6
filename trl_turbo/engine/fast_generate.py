"""`model.fast_generate`: vLLM's answers from the weights that the model has at the moment of the call."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from trl_turbo.engine.names import base_model

if TYPE_CHECKING:
    from trl_turbo.engine.llm import TurboLLM
    from trl_turbo.engine.pretrained import Engine

#: What vLLM takes over from a `generation_config.json`, and its own name for it.
_DEFAULTS = {
    **{name: name for name in ("repetition_penalty", "temperature", "top_k", "top_p", "min_p")},
    "max_new_tokens": "max_tokens",
}


class FastGenerate:
    """The method `fast_generate` of one model that `trl_turbo.from_pretrained` made.

    It is an attribute of the model and of no class, so that PEFT, which forwards what its wrappers lack, finds it too.
    The model's engine is kept here and not in a table beside it: an engine holds its model, so a table would keep both
    alive for ever, while a cycle is collected.

    Args:
        model: A transformers model; `None` in a copy of one, which has no engine.
        tokenizer: Its tokenizer, whose chat template is applied.
        engine: How its engine is started where there is none yet.

    Attributes:
        llm: The engine, or `None` where none has been started.
    """

    def __init__(self, model: Any = None, tokenizer: Any = None, engine: Engine | None = None) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._engine = engine
        self.llm: TurboLLM | None = None

    @staticmethod
    def of(model: Any) -> FastGenerate | None:
        """The one that belongs to this model, wrapped by PEFT or not."""
        base = base_model(model)
        found = vars(base).get("fast_generate")
        return found if isinstance(found, FastGenerate) and found._model is base else None

    def __reduce__(self) -> Any:
        """Copies and pickles of the model are ordinary models, without the engine."""
        return FastGenerate, ()

    def __call__(self, prompts: Any, sampling_params: Any = None, **kwargs: Any) -> Any:
        """Sample answers with vLLM, from the weights and the adapter as they are now.

        Args:
            prompts: A text, a chat (a list of messages) or token ids, or a list of such.
            sampling_params: `vllm.SamplingParams`, one or one a prompt; `None` takes what `model.generation_config`
                says, as vLLM does.
            **kwargs: Further arguments of `vllm.LLM.generate`.

        Returns:
            vLLM's `RequestOutput`s, one a prompt.

        Raises:
            TypeError: A prompt is none of these.
            ImportError: vLLM is not installed.
            EngineDeclinedError: The model or its adapter cannot be served.
        """
        wanted = vllm_prompts(prompts, self._tokenizer)
        llm = self._started()
        if sampling_params is None:
            sampling_params = self._defaults(llm)
        llm.refresh()
        released = llm.shared is not None and llm.shared.kv_released
        try:
            return llm.generate(wanted, sampling_params, **kwargs)
        finally:
            if released:
                llm.release()

    def _started(self) -> TurboLLM:
        if self._model is None or self._engine is None:
            raise RuntimeError(
                "this model is a copy of one that trl_turbo.from_pretrained made, and a copy has no engine; call "
                "fast_generate on the original"
            )
        if self.llm is None:
            self._engine.start(self._model)
        if self.llm is None or self.llm.shared is None:
            raise RuntimeError("the model's engine was given up; load the model again with trl_turbo.from_pretrained")
        return self.llm

    def _defaults(self, llm: TurboLLM) -> Any:
        params = type(llm.get_default_sampling_params())
        own = self._model.generation_config.to_diff_dict()
        return params(**{into: own[name] for name, into in _DEFAULTS.items() if own.get(name) is not None})


def vllm_prompts(prompts: Any, tokenizer: Any) -> list[Any]:
    """What `fast_generate` takes, as `vllm.LLM.generate` takes it.

    Raises:
        TypeError: A prompt is no text, chat or list of token ids.
    """
    if isinstance(prompts, str) or _is_ids(prompts) or _is_chat(prompts):
        prompts = [prompts]
    if not isinstance(prompts, (list, tuple)):
        raise TypeError(f"prompts is a {type(prompts).__name__}; {_EXPECTED}")
    return [_prompt(prompt, tokenizer) for prompt in prompts]


_EXPECTED = "pass texts, chats (lists of messages with a role) or lists of token ids"


def _prompt(prompt: Any, tokenizer: Any) -> Any:
    if isinstance(prompt, str):
        return prompt
    if _is_ids(prompt):
        return {"prompt_token_ids": list(prompt)}
    if _is_chat(prompt):
        ids = tokenizer.apply_chat_template(list(prompt), add_generation_prompt=True, tokenize=True, return_dict=False)
        return {"prompt_token_ids": list(ids)}
    shown = repr(prompt)
    raise TypeError(f"a prompt is {shown if len(shown) < 60 else shown[:57] + '...'}; {_EXPECTED}")


def _is_ids(prompt: Any) -> bool:
    return isinstance(prompt, (list, tuple)) and len(prompt) > 0 and all(type(token) is int for token in prompt)


def _is_chat(prompt: Any) -> bool:
    listed = isinstance(prompt, (list, tuple)) and len(prompt) > 0
    return listed and all(isinstance(message, dict) and "role" in message for message in prompt)
