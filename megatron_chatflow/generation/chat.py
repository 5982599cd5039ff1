"""Holds a conversation with a model.

The oldest turns are dropped once the conversation no longer fits into the model's context.
"""

from dataclasses import replace

from megatron_chatflow.generation.generate import Generator, Sampling, Write


class Conversation:
    """A conversation.

    Attributes:
        messages: OpenAI messages so far, without the system message.
    """

    def __init__(self, generator: Generator, sampling: Sampling, system: str | None = None) -> None:
        """Starts a conversation.

        Args:
            generator: The model.
            sampling: Sampling settings; each answer uses the next seed.
            system: System message.

        Raises:
            UserError: The model has no chat template, or it does not support system messages.
        """
        self._generator = generator
        self._sampling = sampling
        self._system = [{"role": "system", "content": system}] if system else []
        self.messages: list[dict[str, str]] = []
        generator.encode_chat([*self._system, {"role": "user", "content": "?"}])

    def reset(self) -> None:
        """Drops all messages but the system message."""
        self.messages = []

    def answer(self, text: str, write: Write) -> int:
        """Generates an answer and appends both messages.

        If an exception interrupts the answer, the part so far is kept.

        Args:
            text: Message of the user.
            write: Receives each new part of the answer.

        Returns:
            Number of oldest messages that were dropped to make room.

        Raises:
            UserError: The message is longer than the model's context; the conversation is
                unchanged.
        """
        messages = [*self.messages, {"role": "user", "content": text}]
        ids = self._generator.encode_chat(self._system + messages)
        room = min(self._sampling.max_new_tokens, self._generator.max_length // 4)
        while len(messages) > 1 and len(ids) + room > self._generator.max_length:
            del messages[:2]
            ids = self._generator.encode_chat(self._system + messages)
        self._generator.num_free_tokens(ids)
        num_forgotten = len(self.messages) + 1 - len(messages)
        self.messages = messages
        pieces: list[str] = []

        def keep(piece: str) -> None:
            pieces.append(piece)
            write(piece)

        sampling = self._sampling
        if sampling.seed is not None:
            sampling = replace(sampling, seed=sampling.seed + len(self.messages) // 2)
        try:
            self._generator.stream(ids, sampling, keep)
        finally:
            self.messages.append({"role": "assistant", "content": "".join(pieces)})
        return num_forgotten
