"""Request fields that other servers honour and this one does not: 400 instead of an answer that ignores them.

Fields that nobody would miss (`user`, `metadata`, `store`, …) and unknown ones are ignored.
"""

from __future__ import annotations

from collections.abc import Mapping

from tandem.common.errors import InvalidRequest

Fields = Mapping[str, tuple[object, ...]]  # name → the values that ask for nothing, beside null

_EVERYWHERE: Fields = {
    "allowed_token_ids": (),
    "bad_words": ([],),
    "best_of": (1,),
    "bootstrap_host": (),
    "bootstrap_port": (),
    "bootstrap_room": (),
    "data_parallel_rank": (),
    "disaggregated_params": (),
    "ebnf": (),
    "guided_choice": (),
    "guided_decoding_backend": (),
    "guided_grammar": (),
    "guided_json": (),
    "guided_regex": (),
    "guided_whitespace_pattern": (),
    "json_schema": (),
    "kv_transfer_params": (),
    "length_penalty": (1,),
    "logits_processors": ([],),
    "priority": (0,),
    "prompt_logprobs": (),
    "regex": (),
    "response_format": ({"type": "text"},),
    "return_tokens_as_token_ids": (False,),
    "structural_tag": (),
    "structured_outputs": (),
    "thinking_token_budget": (),
    "truncate_prompt_tokens": (),
    "use_beam_search": (False,),
    "vllm_xargs": ({},),
}
CHAT: Fields = {
    **_EVERYWHERE,
    "add_special_tokens": (False,),
    "audio": (),
    "chat_template": (),
    "continue_final_message": (False,),
    "documents": ([],),
    "echo": (False,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "media_io_kwargs": (),
    "mm_processor_kwargs": (),
    "modalities": (["text"],),
    "prediction": (),
    "reasoning_effort": ("none",),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "verbosity": ("medium",),
    "web_search_options": (),
}
COMPLETIONS: Fields = {**_EVERYWHERE, "prompt_embeds": (), "suffix": ("",)}


def refuse_unsupported(body: Mapping[str, object], fields: Fields) -> None:
    """Raises InvalidRequest that names the first field of `fields` with which `body` asks for something."""
    for name, harmless in fields.items():
        value = body.get(name)
        if value is not None and value not in harmless:
            raise InvalidRequest(f"{name} is not supported by this server; remove it from the request", param=name)
