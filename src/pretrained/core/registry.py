# SPDX-License-Identifier: Apache-2.0
"""Which classes a model_type has: one static table, read without importing any of them.

A row of `FAMILIES` names the config class of a model_type and, for each framework, the module and the
classes that its tasks mean. A task is the part of an Auto class's name after ``AutoModel``; the headless
model's is ``"Model"``. Adding an architecture is adding a row.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from pretrained.core.collector import no_collection
from pretrained.errors import ArgumentError, ConfigError, MissingDependencyError, did_you_mean

# Task -> the Auto class that asks for it.
AUTO_CLASSES: dict[str, str] = {
    "Model": "AutoModel",
    "ForPreTraining": "AutoModelForPreTraining",
    "ForCausalLM": "AutoModelForCausalLM",
    "ForMaskedLM": "AutoModelForMaskedLM",
    "ForSeq2SeqLM": "AutoModelForSeq2SeqLM",
    "ForSequenceClassification": "AutoModelForSequenceClassification",
    "ForTokenClassification": "AutoModelForTokenClassification",
    "ForQuestionAnswering": "AutoModelForQuestionAnswering",
    "ForMultipleChoice": "AutoModelForMultipleChoice",
    "ForNextSentencePrediction": "AutoModelForNextSentencePrediction",
    "ForTextEncoding": "AutoModelForTextEncoding",
    "WithLMHead": "AutoModelWithLMHead",
}


@dataclass(frozen=True, slots=True)
class Models:
    """The classes that one framework has for a model_type.

    Attributes:
        module: Where they are defined.
        tasks: Task -> class name.
        others: Public classes that no task means.
    """

    module: str
    tasks: Mapping[str, str]
    others: tuple[str, ...] = ()

    @property
    def classes(self) -> tuple[str, ...]:
        """Every public class of the module, each once, in the table's order."""
        return tuple(dict.fromkeys((*self.tasks.values(), *self.others)))


@dataclass(frozen=True, slots=True)
class Family:
    """What a model_type stands for.

    Attributes:
        arch: Module with its config class.
        config: Name of its config class.
        models: Framework (``"torch"``) -> its classes.
    """

    arch: str
    config: str
    models: Mapping[str, Models]


def _roberta(module: str, name: str) -> dict[str, Models]:
    """Return the row of RoBERTa or of a family that is RoBERTa under a name of its own."""
    tasks = {
        "Model": "Model",
        "ForPreTraining": "ForMaskedLM",
        "ForCausalLM": "ForCausalLM",
        "ForMaskedLM": "ForMaskedLM",
        "ForSequenceClassification": "ForSequenceClassification",
        "ForTokenClassification": "ForTokenClassification",
        "ForQuestionAnswering": "ForQuestionAnswering",
        "ForMultipleChoice": "ForMultipleChoice",
        "ForTextEncoding": "Model",
        "WithLMHead": "ForMaskedLM",
    }
    classes = {task: f"{name}{head}" for task, head in tasks.items()}
    return {"torch": Models(f"pretrained.torch.models.{module}", classes, (f"{name}PreTrainedModel",))}


FAMILIES: dict[str, Family] = {
    "bert": Family(
        "pretrained.arch.bert",
        "BertConfig",
        {
            "torch": Models(
                "pretrained.torch.models.bert",
                {
                    "Model": "BertModel",
                    "ForPreTraining": "BertForPreTraining",
                    "ForCausalLM": "BertLMHeadModel",
                    "ForMaskedLM": "BertForMaskedLM",
                    "ForSequenceClassification": "BertForSequenceClassification",
                    "ForTokenClassification": "BertForTokenClassification",
                    "ForQuestionAnswering": "BertForQuestionAnswering",
                    "ForMultipleChoice": "BertForMultipleChoice",
                    "ForNextSentencePrediction": "BertForNextSentencePrediction",
                    "ForTextEncoding": "BertModel",
                    "WithLMHead": "BertForMaskedLM",
                },
                ("BertPreTrainedModel",),
            )
        },
    ),
    "camembert": Family("pretrained.arch.roberta", "CamembertConfig", _roberta("camembert", "Camembert")),
    "distilbert": Family(
        "pretrained.arch.distilbert",
        "DistilBertConfig",
        {
            "torch": Models(
                "pretrained.torch.models.distilbert",
                {
                    "Model": "DistilBertModel",
                    "ForPreTraining": "DistilBertForMaskedLM",
                    "ForMaskedLM": "DistilBertForMaskedLM",
                    "ForSequenceClassification": "DistilBertForSequenceClassification",
                    "ForTokenClassification": "DistilBertForTokenClassification",
                    "ForQuestionAnswering": "DistilBertForQuestionAnswering",
                    "ForMultipleChoice": "DistilBertForMultipleChoice",
                    "ForTextEncoding": "DistilBertModel",
                    "WithLMHead": "DistilBertForMaskedLM",
                },
                ("DistilBertPreTrainedModel",),
            )
        },
    ),
    "gpt2": Family(
        "pretrained.arch.gpt2",
        "GPT2Config",
        {
            "torch": Models(
                "pretrained.torch.models.gpt2",
                {
                    "Model": "GPT2Model",
                    "ForPreTraining": "GPT2LMHeadModel",
                    "ForCausalLM": "GPT2LMHeadModel",
                    "ForSequenceClassification": "GPT2ForSequenceClassification",
                    "ForTokenClassification": "GPT2ForTokenClassification",
                    "ForQuestionAnswering": "GPT2ForQuestionAnswering",
                    "WithLMHead": "GPT2LMHeadModel",
                },
                ("GPT2DoubleHeadsModel", "GPT2PreTrainedModel"),
            )
        },
    ),
    "llama": Family(
        "pretrained.arch.llama",
        "LlamaConfig",
        {
            "torch": Models(
                "pretrained.torch.models.llama",
                {
                    "Model": "LlamaModel",
                    "ForCausalLM": "LlamaForCausalLM",
                    "ForSequenceClassification": "LlamaForSequenceClassification",
                    "ForTokenClassification": "LlamaForTokenClassification",
                    "ForQuestionAnswering": "LlamaForQuestionAnswering",
                },
                ("LlamaPreTrainedModel",),
            )
        },
    ),
    "mistral": Family(
        "pretrained.arch.llama",
        "MistralConfig",
        {
            "torch": Models(
                "pretrained.torch.models.mistral",
                {
                    "Model": "MistralModel",
                    "ForCausalLM": "MistralForCausalLM",
                    "ForSequenceClassification": "MistralForSequenceClassification",
                    "ForTokenClassification": "MistralForTokenClassification",
                    "ForQuestionAnswering": "MistralForQuestionAnswering",
                },
                ("MistralPreTrainedModel",),
            )
        },
    ),
    "mt5": Family(
        "pretrained.arch.t5",
        "MT5Config",
        {
            "torch": Models(
                "pretrained.torch.models.mt5",
                {
                    "Model": "MT5Model",
                    "ForPreTraining": "MT5ForConditionalGeneration",
                    "ForSeq2SeqLM": "MT5ForConditionalGeneration",
                    "ForSequenceClassification": "MT5ForSequenceClassification",
                    "ForTokenClassification": "MT5ForTokenClassification",
                    "ForQuestionAnswering": "MT5ForQuestionAnswering",
                    "ForTextEncoding": "MT5EncoderModel",
                    "WithLMHead": "MT5ForConditionalGeneration",
                },
                ("MT5PreTrainedModel",),
            )
        },
    ),
    "qwen2": Family(
        "pretrained.arch.llama",
        "Qwen2Config",
        {
            "torch": Models(
                "pretrained.torch.models.qwen2",
                {
                    "Model": "Qwen2Model",
                    "ForCausalLM": "Qwen2ForCausalLM",
                    "ForSequenceClassification": "Qwen2ForSequenceClassification",
                    "ForTokenClassification": "Qwen2ForTokenClassification",
                    "ForQuestionAnswering": "Qwen2ForQuestionAnswering",
                },
                ("Qwen2PreTrainedModel",),
            )
        },
    ),
    "qwen3": Family(
        "pretrained.arch.llama",
        "Qwen3Config",
        {
            "torch": Models(
                "pretrained.torch.models.qwen3",
                {
                    "Model": "Qwen3Model",
                    "ForCausalLM": "Qwen3ForCausalLM",
                    "ForSequenceClassification": "Qwen3ForSequenceClassification",
                    "ForTokenClassification": "Qwen3ForTokenClassification",
                    "ForQuestionAnswering": "Qwen3ForQuestionAnswering",
                },
                ("Qwen3PreTrainedModel",),
            )
        },
    ),
    "roberta": Family("pretrained.arch.roberta", "RobertaConfig", _roberta("roberta", "Roberta")),
    "smollm3": Family(
        "pretrained.arch.llama",
        "SmolLM3Config",
        {
            "torch": Models(
                "pretrained.torch.models.smollm3",
                {
                    "Model": "SmolLM3Model",
                    "ForCausalLM": "SmolLM3ForCausalLM",
                    "ForSequenceClassification": "SmolLM3ForSequenceClassification",
                    "ForTokenClassification": "SmolLM3ForTokenClassification",
                    "ForQuestionAnswering": "SmolLM3ForQuestionAnswering",
                },
                ("SmolLM3PreTrainedModel",),
            )
        },
    ),
    "t5": Family(
        "pretrained.arch.t5",
        "T5Config",
        {
            "torch": Models(
                "pretrained.torch.models.t5",
                {
                    "Model": "T5Model",
                    "ForPreTraining": "T5ForConditionalGeneration",
                    "ForSeq2SeqLM": "T5ForConditionalGeneration",
                    "ForSequenceClassification": "T5ForSequenceClassification",
                    "ForTokenClassification": "T5ForTokenClassification",
                    "ForQuestionAnswering": "T5ForQuestionAnswering",
                    "ForTextEncoding": "T5EncoderModel",
                    "WithLMHead": "T5ForConditionalGeneration",
                },
                ("T5PreTrainedModel",),
            )
        },
    ),
    "umt5": Family(
        "pretrained.arch.t5",
        "UMT5Config",
        {
            "torch": Models(
                "pretrained.torch.models.umt5",
                {
                    "Model": "UMT5Model",
                    "ForPreTraining": "UMT5ForConditionalGeneration",
                    "ForSeq2SeqLM": "UMT5ForConditionalGeneration",
                    "ForSequenceClassification": "UMT5ForSequenceClassification",
                    "ForTokenClassification": "UMT5ForTokenClassification",
                    "ForQuestionAnswering": "UMT5ForQuestionAnswering",
                    "ForTextEncoding": "UMT5EncoderModel",
                    "WithLMHead": "UMT5ForConditionalGeneration",
                },
                ("UMT5PreTrainedModel",),
            )
        },
    ),
    "xlm-roberta": Family(
        "pretrained.arch.roberta", "XLMRobertaConfig", _roberta("xlm_roberta", "XLMRoberta")
    ),
}

_PACKAGES = {"torch": "PyTorch", "tokenizers": "tokenizers", "jinja2": "Jinja2"}
_EXTRAS = {"torch": "torch", "tokenizers": "text", "jinja2": "text"}


def model_type_of(values: Mapping[str, Any]) -> object:
    """Return the model_type of a config.json, told by its class name where the file leaves it out.

    Some published files do: umt5's name only ``architectures``.

    Args:
        values: The content of the file.
    """
    if values.get("model_type") is not None:
        return values["model_type"]
    names = values.get("architectures")
    wanted = names[0] if isinstance(names, list) and names else None
    for model_type, row in FAMILIES.items():
        for models in row.models.values():
            if wanted in models.classes:
                return model_type
    return None


def family(model_type: object, *, where: object, more: tuple[str, ...] = ()) -> Family:
    """Return the row of a model_type.

    Args:
        model_type: What a config.json says; None where it says nothing.
        where: The file (or argument) to name in errors.
        more: Further known types to list in errors, registered at run time.

    Raises:
        ConfigError: it is absent or unknown.
    """
    if isinstance(model_type, str) and model_type in FAMILIES:
        return FAMILIES[model_type]
    known = sorted({*FAMILIES, *more})
    if model_type is None:
        raise ConfigError(
            "The config does not say which architecture it describes",
            where=where,
            expected=f"'model_type' to be one of {', '.join(known)}",
            found="no 'model_type'",
            mend="Add it, or load with the model's own class, such as LlamaForCausalLM.from_pretrained.",
        )
    near = did_you_mean(str(model_type), known)
    advice = "Register a class of your own with AutoConfig.register(model_type, config_class)."
    raise ConfigError(
        f"The architecture {model_type!r} is not known here",
        where=where,
        expected=f"'model_type' to be one of {', '.join(known)}",
        found=repr(model_type),
        mend=f"{near} {advice}".strip(),
    )


def model_class_name(model_type: str, task: str, *, framework: str = "torch") -> tuple[str, str]:
    """Return the module and the name of the class that a task means for a model_type.

    Args:
        model_type: A key of `FAMILIES`.
        task: A key of `AUTO_CLASSES`.
        framework: Which backend.

    Raises:
        ArgumentError: this model_type has no such class; the message lists what it has.
    """
    models = FAMILIES[model_type].models.get(framework)
    if models is not None and task in models.tasks:
        return models.module, models.tasks[task]
    offers = {} if models is None else models.tasks
    listed = ", ".join(f"{AUTO_CLASSES[name]} ({offers[name]})" for name in offers if name != "WithLMHead")
    raise ArgumentError(
        f"{AUTO_CLASSES[task]} has no class for model_type {model_type!r}",
        where="model_type",
        expected=f"one of {', '.join(_types_with(task, framework)) or 'none'}",
        found=repr(model_type),
        mend=f"For {model_type!r} there is {listed or 'no class in this framework'}.",
    )


def _types_with(task: str, framework: str) -> list[str]:
    return [
        model_type
        for model_type, row in FAMILIES.items()
        if framework in row.models and task in row.models[framework].tasks
    ]


def load_name(module: str, name: str) -> Any:
    """Import a module and return a name from it.

    Args:
        module: Dotted module name.
        name: What it defines.

    Raises:
        MissingDependencyError: an optional package that the module needs is not installed.
    """
    try:
        # Definitions leave no garbage to speak of.
        with no_collection():
            return getattr(import_module(module), name)
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in _PACKAGES:
            raise
        raise MissingDependencyError(
            f"{name} needs {_PACKAGES[package]}, which is not installed",
            where=module,
            mend=f"Install it with: pip install 'pretrained[{_EXTRAS[package]}]'",
        ) from error
