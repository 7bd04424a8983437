# SPDX-License-Identifier: Apache-2.0
"""A tokenizer's chat template: conversations as text and ids."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pretrained.errors import ArgumentError, NotYetError, TokenizerError
from pretrained.text.encoding import BatchEncoding
from pretrained.text.vocabulary import VocabularyMixin


class ChatMixin(VocabularyMixin):
    """Adds `apply_chat_template` to a tokenizer.

    Attributes:
        name_or_path: Where the tokenizer came from, for errors.
    """

    name_or_path: str
    __call__: Callable[..., BatchEncoding]

    def apply_chat_template(
        self,
        conversation: Sequence[Any],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        chat_template: str | None = None,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
        tokenize: bool = True,
        padding: bool | str = False,
        truncation: bool | str | None = None,
        max_length: int | None = None,
        return_tensors: str | None = None,
        return_dict: bool = False,
        return_assistant_tokens_mask: bool = False,
        tokenizer_kwargs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Write a conversation as the model was trained to read it.

        Args:
            conversation: Messages, each ``{"role": ..., "content": ...}``, or a list of conversations.
            tools: JSON schemas of functions that the model may call.
            documents: Texts that it may refer to.
            chat_template: A template, or the name of one of the tokenizer's; None for its own.
            add_generation_prompt: End with the start of an answer.
            continue_final_message: End inside the last message, for the model to go on with.
            tokenize: False to return text.
            padding: As for a call, and so are the next two.
            truncation: See `padding`.
            max_length: See `padding`.
            return_tensors: ``"pt"``, ``"np"`` or None.
            return_dict: Return a `BatchEncoding` instead of the ids alone.
            return_assistant_tokens_mask: Not offered yet.
            tokenizer_kwargs: Further arguments of the call that tokenizes.
            **kwargs: What else the template reads, such as ``enable_thinking``.

        Raises:
            TokenizerError: there is no template, or it fails or refuses the conversation.
            ArgumentError: arguments that contradict each other.
        """
        # Imported here: it is optional, and only chats need it.
        from pretrained.text.chat import cut_after_final_message, render_chat  # noqa: PLC0415

        if return_assistant_tokens_mask:
            raise NotYetError("return_assistant_tokens_mask is not offered yet", where="apply_chat_template")
        if add_generation_prompt and continue_final_message:
            raise ArgumentError(
                "add_generation_prompt starts a new message and continue_final_message goes on with the last",
                mend="Pass only one of them.",
            )
        template = self.get_chat_template(chat_template, tools)
        is_batch = bool(conversation) and isinstance(conversation[0], list | tuple)
        texts = []
        for messages in conversation if is_batch else [conversation]:
            text = render_chat(
                template,
                messages,
                tools=tools,
                documents=documents,
                add_generation_prompt=add_generation_prompt,
                **{**self.special_tokens_map, **kwargs},
            )
            texts.append(cut_after_final_message(text, messages) if continue_final_message else text)
        if not tokenize:
            return texts if is_batch else texts[0]
        encoded = self(
            texts if is_batch else texts[0],
            padding=padding,
            truncation=truncation,
            max_length=max_length,
            return_tensors=return_tensors,
            # The template writes the special tokens itself.
            **{"add_special_tokens": False, **(tokenizer_kwargs or {})},
        )
        return encoded if return_dict else encoded["input_ids"]

    @property
    def chat_template(self) -> str | dict[str, str] | None:
        """The chat template, several by name, or None."""
        return self.settings.chat_template

    @chat_template.setter
    def chat_template(self, template: str | dict[str, str] | None) -> None:
        self.settings.chat_template = template

    def get_chat_template(
        self, chat_template: str | None = None, tools: Sequence[Mapping[str, Any]] | None = None
    ) -> str:
        """Return the template that a conversation is written with.

        Args:
            chat_template: A template, or the name of one of the tokenizer's; None for its own.
            tools: A tokenizer with several templates has one for conversations with tools.

        Raises:
            TokenizerError: there is none.
        """
        own = self.settings.chat_template
        named = own if isinstance(own, dict) else {}
        if chat_template is not None:
            return named.get(chat_template, chat_template)
        if isinstance(own, str):
            return own
        name = "tool_use" if tools and "tool_use" in named else "default"
        if name in named:
            return named[name]
        choice = f"one of {', '.join(named)} or " if named else ""
        raise TokenizerError(
            "This tokenizer has no chat template",
            where=self.name_or_path or None,
            mend=f"Pass {choice}a template as chat_template=..., or tokenize plain text.",
        )
