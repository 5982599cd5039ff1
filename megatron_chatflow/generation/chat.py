"""A conversation with a model: what was said so far, and the next answer.

In: a `Generator` and what the user says. Out: answers; the oldest turns are forgotten once they no
longer fit into what the model reads.
"""

from dataclasses import replace

from megatron_chatflow.generation.generate import Generator, Sampling, Write


class Conversation:
    """What was said so far.

    Attributes:
        messages: OpenAI messages.
    """

    def __init__(self, generator: Generator, sampling: Sampling, system: str | None = None) -> None:
        """Begins a conversation.

        Args:
            generator: The model.
            sampling: How it answers; each answer takes the next seed.
            system: What stands before everything.

        Raises:
            UserError: The model has no chat template, or one that takes no system text.
        """
        self._generator = generator
        self._sampling = sampling
        self._system = [{"role": "system", "content": system}] if system else []
        self.messages: list[dict[str, str]] = []
        generator.encode_chat([*self._system, {"role": "user", "content": "?"}])

    def reset(self) -> None:
        """Forgets everything but the system text."""
        self.messages = []

    def answer(self, text: str, write: Write) -> int:
        """Answers, and remembers both sides.

        An answer that is cut short by an exception is remembered as far as it came.

        Args:
            text: What the user says.
            write: Takes each new piece of the answer as it comes.

        Returns:
            How many of the oldest messages were forgotten to make room.

        Raises:
            UserError: What was said is longer than the model reads; nothing is remembered or
                forgotten.
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
