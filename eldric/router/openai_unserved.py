"""Parameters that would change an answer and are not served: OpenAI's, llama.cpp's and vLLM's.

They are refused by their names, but for values that ask for nothing, which many clients send with every request.
"""

from collections.abc import Mapping
from typing import Any, NoReturn

from eldric.router.errors import InvalidParameter

_TOOLS = "models here call no tools"
_FREE = "answers are not constrained: ask for the form in the prompt"
_SAMPLERS = "of the samplers there are temperature, top_k, top_p, min_p, the penalties and logit_bias"

#: By name: the values that ask for nothing, and what a client is told.
_GENERATION: dict[str, tuple[tuple[Any, ...], str]] = {
    "tools": (([],), _TOOLS),
    "tool_choice": (("none", "auto"), _TOOLS),
    "functions": (([],), _TOOLS),
    "function_call": (("none", "auto"), _TOOLS),
    "web_search_options": ((), _TOOLS),
    "response_format": (({"type": "text"},), _FREE),
    "grammar": (("",), _FREE),
    "json_schema": (({},), _FREE),
    "structured_outputs": (({},), _FREE),
    "guided_json": ((), _FREE),
    "guided_regex": ((), _FREE),
    "guided_choice": ((), _FREE),
    "guided_grammar": ((), _FREE),
    "allowed_token_ids": ((), _FREE),
    "bad_words": (([],), "logit_bias bans tokens"),
    "modalities": ((["text"],), "models here write text only"),
    "audio": ((), "models here write text only"),
    "moderation": ((), "nothing here judges texts"),
    "suffix": (("",), "models here continue texts and fill no gaps"),
    "typical_p": ((1,), _SAMPLERS),
    "tfs_z": ((1,), _SAMPLERS),
    "top_n_sigma": ((-1, 0), _SAMPLERS),
    "mirostat": ((0,), _SAMPLERS),
    "dry_multiplier": ((0,), _SAMPLERS),
    "xtc_probability": ((0,), _SAMPLERS),
    "dynatemp_range": ((0,), _SAMPLERS),
    "samplers": ((), _SAMPLERS),
    "min_keep": ((0, 1), _SAMPLERS),
    "use_beam_search": ((False,), _SAMPLERS),
    "logits_processors": (([],), _SAMPLERS),
    "min_tokens": ((0,), "ignore_eos goes on until max_tokens"),
    "n_indent": ((0,), ""),
    "t_max_predict_ms": ((0, -1), "max_tokens bounds an answer"),
    "lora": (([],), "a model is served as it was deployed"),
    "n_probs": ((0,), "logprobs are the parameter for it"),
    "prompt_logprobs": ((), "only tokens of the answer have logprobs"),
    "truncate_prompt_tokens": ((), "prompts are never cut"),
    "include_stop_str_in_output": ((False,), ""),
    "skip_special_tokens": ((True,), ""),
    "return_token_ids": ((False,), "/tokenize gives ids"),
    "return_tokens_as_token_ids": ((False,), "/tokenize gives ids"),
}
CHAT = _GENERATION | {
    "echo": ((False,), "an answer that continues a message does not repeat it"),
    "chat_template": (("",), "the model's own is used"),
    "documents": (([],), "put them into a message"),
    "add_special_tokens": ((False,), "the chat template says which there are"),
}
COMPLETION = _GENERATION | {
    "prompt_embeds": ((), "prompts are texts or token ids"),
    "top_logprobs": ((0,), "here logprobs is their number"),
}
EMBEDDING: dict[str, tuple[tuple[Any, ...], str]] = {
    "normalize": ((True,), "embeddings have the length 1"),
    "embd_normalize": ((2,), "embeddings have the length 1"),
    "truncate_prompt_tokens": ((), "texts are never cut"),
}


def refuse_unserved(body: Mapping[str, Any], unserved: Mapping[str, tuple[tuple[Any, ...], str]]) -> None:
    """Raises InvalidParameter for the first parameter of `unserved` that asks for something."""
    for name, (harmless, reason) in unserved.items():
        value = body.get(name)
        if value is not None and not any(_same(value, each) for each in harmless):
            _refuse(name, reason)
    if (best_of := body.get("best_of")) is not None and not _same(best_of, body.get("n") or 1):
        _refuse("best_of", "every choice is answered, so it can only be as many as n")


def _refuse(name: str, reason: str) -> NoReturn:
    message = f"The parameter {name!r} is not supported here{f': {reason}' if reason else ''}."
    raise InvalidParameter(message, name, "unsupported_parameter")


def _same(value: Any, other: Any) -> bool:
    """Python's True is 1, JSON's is not."""
    return isinstance(value, bool) == isinstance(other, bool) and bool(value == other)
