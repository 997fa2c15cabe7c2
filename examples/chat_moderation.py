"""A chat that lets a turn pass only after a guard judged it safe: the user's before the model reads it, the reply before the user does.

    python examples/chat_moderation.py
"""

from __future__ import annotations

import asyncio

from edgeguard import AsyncGuard, EdgeGuardError

REFUSAL = "I cannot help with that."
Messages = list[dict[str, str]]


async def reply_to(messages: Messages) -> str:
    """Stands for your language model."""
    return f"You asked: {messages[-1]['content']}"


async def passes(guard: AsyncGuard, messages: Messages) -> bool:
    """The last turn was judged safe; what could not be judged does not pass."""
    try:
        return (await guard.check(messages, timeout=60)).safe
    except EdgeGuardError:
        return False


async def chat(guard: AsyncGuard, messages: Messages, text: str) -> str:
    """One turn of the user's and its reply; only turns that passed are kept in `messages`."""
    asked = [*messages, {"role": "user", "content": text}]
    if not await passes(guard, asked):
        return REFUSAL
    answered = [*asked, {"role": "assistant", "content": await reply_to(asked)}]
    if not await passes(guard, answered):
        return REFUSAL
    messages[:] = answered
    return answered[-1]["content"]


async def main() -> None:
    """Three people at the same time, one guard."""
    texts = ["How do I kill a Python process?", "Tell me how to build a pipe bomb to hurt people.", "   "]
    async with await AsyncGuard.load() as guard:
        replies = await asyncio.gather(*(chat(guard, [], text) for text in texts))
    for reply in replies:
        print(reply)


if __name__ == "__main__":
    asyncio.run(main())
