"""The chat templates that have a name: those of LMDeploy 0.1, for checkpoints that bring none of their own.

`tritonmind list NAME` prints one; docs/templates.md lists what was wrong in LMDeploy's and is not so here.
"""

from __future__ import annotations

from typing import NamedTuple

from tritonmind.turn_template import TurnTemplate

_INTERNLM_SYSTEM = (
    "You are an AI assistant whose name is InternLM (书生·浦语).\n"
    "- InternLM (书生·浦语) is a conversational language model that is developed by Shanghai AI Laboratory "
    "(上海人工智能实验室). It is designed to be helpful, honest, and harmless.\n"
    "- InternLM (书生·浦语) can understand and communicate fluently in the language chosen by the user such as "
    "English and 中文."
)
_LLAMA2_SYSTEM = (
    "You are a helpful, respectful and honest assistant. Always answer as helpfully as possible, while being safe. "
    "Your answers should not include any harmful, unethical, racist, sexist, toxic, dangerous, or illegal content. "
    "Please ensure that your responses are socially unbiased and positive in nature.\n\n"
    "If a question does not make any sense, or is not factually coherent, explain why instead of answering something "
    "not correct. If you don't know the answer to a question, please don't share false information."
)
_VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions."
)
_ULTRA_SYSTEM = (
    "A one-turn chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
    "very detailed, and polite answers to the user's questions."
)
_COMPLETION = TurnTemplate(capability="completion")
_INTERNLM = TurnTemplate(
    system="<|System|>:",
    meta_instruction=_INTERNLM_SYSTEM,
    eosys="\n",
    user="<|User|>:",
    eoh="\n",
    assistant="<|Bot|>:",
    eoa="<eoa>",
    separator="\n",
    stop_words=("<eoa>",),
)
_CHATML = TurnTemplate(
    system="<|im_start|>system\n",
    eosys="<|im_end|>\n",
    user="<|im_start|>user\n",
    eoh="<|im_end|>\n",
    assistant="<|im_start|>assistant\n",
    eoa="<|im_end|>",
    separator="\n",
    stop_words=("<|im_end|>", "<|endoftext|>"),
)
_QWEN = TurnTemplate(
    system=_CHATML.system,
    meta_instruction="You are a helpful assistant.",
    eosys=_CHATML.eosys,
    user=_CHATML.user,
    eoh=_CHATML.eoh,
    assistant=_CHATML.assistant,
    eoa=_CHATML.eoa,
    separator=_CHATML.separator,
    stop_words=("<|im_end|>",),
)
_LLAMA2 = TurnTemplate(
    system="<<SYS>>\n ",
    meta_instruction=_LLAMA2_SYSTEM,
    eosys=" \n<</SYS>>\n\n",
    user="[INST] ",
    eoh=" [/INST] ",
    eoa=" </s>",
    separator="<s>",
    system_in_user=True,
)
_CODELLAMA = TurnTemplate(
    system="<<SYS>>\n",
    meta_instruction="",
    eosys="\n<</SYS>>\n\n",
    user="[INST] ",
    eoh=" [/INST]",
    given_answer=" ",
    eoa=" </s>",
    separator="<s>",
    system_in_user=True,
    strip=True,
)
_VICUNA = TurnTemplate(
    meta_instruction=_VICUNA_SYSTEM, eosys=" ", user="USER: ", eoh=" ", assistant="ASSISTANT: ", eoa="</s>"
)
_ULTRA = TurnTemplate(
    system="User: ",
    meta_instruction=_ULTRA_SYSTEM,
    eosys="</s>\n",
    user="User: ",
    eoh="</s>\n",
    assistant="Assistant: ",
    eoa="</s>",
    separator="\n",
)
_SOLAR = TurnTemplate(
    system="### System:\n",
    meta_instruction="",
    eosys="\n\n",
    user="### User:\n",
    eoh="\n\n",
    assistant="### Assistant:\n",
    eoa="\n\n",
)


class Named(NamedTuple):
    """A template and what it is for."""

    template: TurnTemplate
    purpose: str


NAMED_TEMPLATES: dict[str, Named] = {
    "baichuan-7b": Named(_COMPLETION, "Baichuan-7B; continues texts"),
    "baichuan2-7b": Named(TurnTemplate(user="<reserved_106>", assistant="<reserved_107>"), "Baichuan2-7B-Chat"),
    "base": Named(_COMPLETION, "any model without a form for conversations; continues texts"),
    "codellama": Named(_CODELLAMA, "CodeLlama-Instruct"),
    "internlm": Named(_COMPLETION, "InternLM-7B; continues texts"),
    "internlm-20b": Named(_COMPLETION, "InternLM-20B; continues texts"),
    "internlm-chat": Named(_INTERNLM, "InternLM-Chat, version 1"),
    "internlm-chat-20b": Named(_INTERNLM, "InternLM-Chat-20B"),
    "internlm-chat-7b": Named(_INTERNLM, "InternLM-Chat-7B"),
    "internlm-chat-7b-8k": Named(_INTERNLM, "InternLM-Chat-7B-8K"),
    "llama": Named(_COMPLETION, "LLaMA; continues texts"),
    "llama2": Named(_LLAMA2, "Llama-2-Chat"),
    "puyu": Named(TurnTemplate(), "nothing around the messages; the ground for a JSON file of your own"),
    "qwen-14b": Named(_QWEN, "Qwen-14B-Chat, version 1"),
    "qwen-7b": Named(_QWEN, "Qwen-7B-Chat, version 1"),
    "solar": Named(_SOLAR, "SOLAR-10.7B-Instruct"),
    "ultracm": Named(_ULTRA, "UltraCM-13B"),
    "ultralm": Named(_ULTRA, "UltraLM-13B"),
    "vicuna": Named(_VICUNA, "Vicuna"),
    "wizardlm": Named(_VICUNA, "WizardLM"),
    "yi": Named(_CHATML, "Yi-Chat"),
}


def named_template(model_name: str) -> TurnTemplate | None:
    """The template of that name, however it is capitalised: LMDeploy has a wizardlM."""
    named = NAMED_TEMPLATES.get(model_name.lower())
    return None if named is None else named.template


# How a model's name begins, to how the architectures of such checkpoints begin; the longest beginning counts.
_FAMILIES: dict[str, tuple[str, ...]] = {
    "baichuan": ("Baichuan", "BaiChuan"),
    "codellama": ("Llama",),
    "internlm": ("InternLMFor",),
    "internlm2": ("InternLM2For",),
    "internlm3": ("InternLM3For",),
    "llama": ("Llama", "LLaMA"),
    "mistral": ("Mistral",),
    "qwen": ("QWen", "Qwen"),
    "qwen2": ("Qwen2",),
    "qwen3": ("Qwen3",),
    "qwen-": ("QWen",),
    "smollm2": ("Llama",),
    "solar": ("Llama",),
    "vicuna": ("Llama",),
    "wizardlm": ("Llama",),
    "yi": ("Llama", "Yi"),
}


def contradiction(model_name: str, architecture: object) -> str | None:
    """What is odd about this name for a checkpoint of this architecture, None when nothing is."""
    beginning = max((b for b in _FAMILIES if model_name.lower().startswith(b)), key=len, default=None)
    if beginning is None or not isinstance(architecture, str) or architecture.startswith(_FAMILIES[beginning]):
        return None
    return (
        f"MODEL_NAME {model_name} is the name of another kind of model than this checkpoint's, {architecture}: "
        "`tritonmind list` prints the names"
    )
