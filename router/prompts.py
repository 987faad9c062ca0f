"""Text to token ids, off the event loop: a bounded pool of threads renders chat templates and tokenizes."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from tandem.common.errors import InvalidRequest, Overloaded
from tandem.common.tokenizer import Tokenizer
from tandem.router.schema import CompletionBody, Message

THREADS = 2
MAX_WAITING = 256  # jobs; each may be a body of 1 MiB

ROLES = ("system", "developer", "user", "assistant")

T = TypeVar("T")


class PromptBuilder:
    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self._pool = ThreadPoolExecutor(THREADS, thread_name_prefix="tokenize")
        self._waiting = 0

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    async def chat(self, messages: Sequence[Message], generation_prompt: bool, kwargs: dict[str, Any]) -> list[int]:
        """The ids of the rendered conversation. Raises InvalidRequest."""
        plain = [_plain(index, message) for index, message in enumerate(messages)]
        if "add_generation_prompt" in kwargs:
            raise InvalidRequest(
                "add_generation_prompt is a field of its own, not a template argument", param="chat_template_kwargs"
            )

        def build() -> list[int]:
            text = self.tokenizer.chat_template.render(plain, add_generation_prompt=generation_prompt, **kwargs)
            return self.tokenizer.encode_chat(text)

        return await self._run(build)

    async def completion(self, body: CompletionBody) -> list[list[int]]:
        """One list of ids per prompt. Raises InvalidRequest."""
        texts, ids = _split(body.prompt)
        if not texts:
            return ids
        special = body.add_special_tokens is not False
        return await self._run(lambda: [self.tokenizer.encode(text, special) for text in texts])

    async def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        return await self._run(lambda: self.tokenizer.encode(text, add_special_tokens))

    async def decode(self, ids: Sequence[int], skip_special_tokens: bool) -> str:
        return await self._run(lambda: self.tokenizer.decode(ids, skip_special_tokens))

    async def _run(self, job: Callable[[], T]) -> T:
        """Raises Overloaded rather than let work pile up that no deadline would end."""
        if self._waiting >= MAX_WAITING:
            raise Overloaded(f"{self._waiting} prompts already wait to be tokenized; try again", retry_after=1.0)
        self._waiting += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._pool, job)
        finally:
            self._waiting -= 1


def _split(prompt: str | list[str] | list[int] | list[list[int]]) -> tuple[list[str], list[list[int]]]:
    """Texts, or lists of ids: one of the two is empty. Raises InvalidRequest for no prompt at all."""
    if isinstance(prompt, str):
        prompt = [prompt]
    if not prompt:
        raise InvalidRequest("prompt is empty; send at least one", param="prompt")
    texts = [item for item in prompt if isinstance(item, str)]
    lists = [item for item in prompt if isinstance(item, list)]
    numbers = [item for item in prompt if isinstance(item, int)]
    return texts, [numbers] if numbers else lists


def _plain(index: int, message: Message) -> dict[str, Any]:
    where = f"messages[{index}]"
    if message.role not in ROLES:
        raise InvalidRequest(
            f"{where}.role is {message.role[:32]!r}; the roles of this server are {', '.join(ROLES)}",
            param=f"{where}.role",
        )
    if message.tool_calls or message.function_call:
        raise InvalidRequest(f"{where}: tool calls are not supported by this server", param=f"{where}.tool_calls")
    if message.content is None:
        raise InvalidRequest(f"{where}.content is missing", param=f"{where}.content")
    plain = message.model_dump(include={"role", "content", "name"}, exclude_none=True)
    # OpenAI's new name for a role that the templates of open models know as "system".
    return plain | {"role": "system"} if message.role == "developer" else plain
