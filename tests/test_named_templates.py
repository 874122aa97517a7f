"""Named chat templates: the prompts of lmdeploy.md and of the tutorial, byte for byte, and which template is taken."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from tests.model_configs import LLAMA_2_7B
from tests.vocabularies import INTERNLM_SYMBOLS, train_sentencepiece, write_config
from tritonmind.chat_template import ChatTemplate, load_chat_template
from tritonmind.errors import ConfigError, InvalidRequestError
from tritonmind.named_templates import NAMED_TEMPLATES, contradiction
from tritonmind.template_choice import TemplateChoice, choose_template
from tritonmind.tokenizer import Tokenizer
from tritonmind_tools.cli import main

# What the tutorial prints for its question.
TUTORIAL_PROMPT = """<|System|>:You are an AI assistant whose name is InternLM (书生·浦语).
- InternLM (书生·浦语) is a conversational language model that is developed by Shanghai AI Laboratory (上海人工智能实验室). It is designed to be helpful, honest, and harmless.
- InternLM (书生·浦语) can understand and communicate fluently in the language chosen by the user such as English and 中文.
<|User|>:你好啊兄嘚
<|Bot|>:"""  # noqa: E501

# One question, and what a second one adds with the answer before it.
PROMPTS = {
    "vicuna": ("{system} USER: {q} ASSISTANT: ", "A</s>USER: {q} ASSISTANT: "),
    "internlm-chat-7b": ("<|System|>:{system}\n<|User|>:{q}\n<|Bot|>:", "A<eoa>\n<|User|>:{q}\n<|Bot|>:"),
    "llama2": ("[INST] <<SYS>>\n {system} \n<</SYS>>\n\n{q} [/INST] ", "A </s><s>[INST] {q} [/INST] "),
    "codellama": ("[INST] <<SYS>>\n{system}\n<</SYS>>\n\n{q} [/INST]", " A </s><s>[INST] {q} [/INST]"),
    "qwen-7b": (
        "<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n{q}<|im_end|>\n<|im_start|>assistant\n",
        "A<|im_end|>\n<|im_start|>user\n{q}<|im_end|>\n<|im_start|>assistant\n",
    ),
    "solar": (
        "### System:\n{system}\n\n### User:\n{q}\n\n### Assistant:\n",
        "A\n\n### User:\n{q}\n\n### Assistant:\n",
    ),
    "ultralm": ("User: {system}</s>\nUser: {q}</s>\nAssistant: ", "A</s>\nUser: {q}</s>\nAssistant: "),
    "yi": (
        "<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n{q}<|im_end|>\n<|im_start|>assistant\n",
        "A<|im_end|>\n<|im_start|>user\n{q}<|im_end|>\n<|im_start|>assistant\n",
    ),
    "baichuan2-7b": ("{system}<reserved_106>{q}<reserved_107>", "A<reserved_106>{q}<reserved_107>"),
}
SAME = {
    "wizardlm": "vicuna",
    "ultracm": "ultralm",
    "qwen-14b": "qwen-7b",
    "internlm-chat": "internlm-chat-7b",
    "internlm-chat-20b": "internlm-chat-7b",
    "internlm-chat-7b-8k": "internlm-chat-7b",
}
SYSTEM = [{"role": "system", "content": "Be brief."}]
FIRST = [{"role": "user", "content": "Q 1"}]
SECOND = [{"role": "assistant", "content": "A"}, {"role": "user", "content": "Q 2"}]


def named(name: str, *, adds_bos: bool = False) -> ChatTemplate:
    source = NAMED_TEMPLATES[name].template.jinja_source(adds_bos=adds_bos)
    return ChatTemplate(source, {"bos_token": "<s>"}, where=name)


@pytest.mark.parametrize("name", [*PROMPTS, *SAME])
def test_prompts(name: str) -> None:
    first, second = PROMPTS[SAME.get(name, name)]
    given = first.format(system="Be brief.", q="Q 1")
    assert named(name).render(SYSTEM + FIRST) == given, "the user's system text stands alone"
    assert named(name).render(SYSTEM + FIRST + SECOND) == given + second.format(q="Q 2")
    default = NAMED_TEMPLATES[name].template.meta_instruction
    if default is not None:
        assert named(name).render(FIRST) == first.format(system=default, q="Q 1")
    assert named(name, adds_bos=True).render(SYSTEM + FIRST) == f"<s>{given}"
    without_prompt = named(name).render(SYSTEM + FIRST, add_generation_prompt=False)
    assert given == without_prompt + NAMED_TEMPLATES[name].template.assistant


def test_templates_without_a_default_system_text() -> None:
    chatml = "<|im_start|>user\nQ 1<|im_end|>\n<|im_start|>assistant\n"
    assert named("yi").render(FIRST) == chatml
    assert named("baichuan2-7b").render(FIRST) == "<reserved_106>Q 1<reserved_107>"
    assert named("puyu").render(SYSTEM + FIRST + SECOND) == "Be brief.Q 1AQ 2"


def test_all_named_templates_are_tested() -> None:
    completing = {name for name, known in NAMED_TEMPLATES.items() if known.template.capability == "completion"}
    assert completing == {"baichuan-7b", "base", "internlm", "internlm-20b", "llama"}
    assert {*PROMPTS, *SAME, *completing, "puyu"} == NAMED_TEMPLATES.keys()


def test_the_tutorials_prompt() -> None:
    messages = [{"role": "user", "content": "你好啊兄嘚"}]
    assert named("internlm-chat-7b").render(messages) == TUTORIAL_PROMPT
    assert named("internlm-chat-20b").render(messages) == TUTORIAL_PROMPT


def test_a_system_text_in_the_middle_and_an_unknown_role() -> None:
    later = [*FIRST, SECOND[0], *SYSTEM, SECOND[1]]
    assert named("llama2").render(later).endswith("A </s><s>[INST] <<SYS>>\n Be brief. \n<</SYS>>\n\nQ 2 [/INST] ")
    assert named("yi").render(later).count("Be brief.<|im_end|>\n<|im_start|>user\nQ 2") == 1
    with pytest.raises(InvalidRequestError, match="role critic has no place"):
        named("yi").render([{"role": "critic", "content": "x"}])


@pytest.fixture(scope="module")
def internlm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("internlm")
    train_sentencepiece(directory, symbols=INTERNLM_SYMBOLS)
    return directory


def ends(choice: TemplateChoice, *eos_token_ids: int, vocab_size: int = 400) -> tuple[int, ...]:
    model = dataclasses.replace(LLAMA_2_7B, vocab_size=vocab_size, eos_token_ids=eos_token_ids)
    return choice.end_tokens(model)


def prompt_ids(directory: Path) -> list[int]:
    tokenizer = Tokenizer.from_dir(directory)
    template = load_chat_template(directory, tokenizer.special_tokens)
    assert template is not None
    return tokenizer.encode(template.render(FIRST), add_special_tokens=False)


def test_the_template_that_model_name_names(internlm: Path, tmp_path: Path) -> None:
    """It is written beside the tokenizer, begins with one bos where the tokenizer does, and brings its end token."""
    choice = choose_template(internlm, model_name="internlm-chat-7b")
    (tmp_path / "tokenizer.model").write_bytes((internlm / "tokenizer.model").read_bytes())
    choice.write(tmp_path)
    tokenizer = Tokenizer.from_dir(tmp_path)
    eoa, user = (tokenizer.vocabulary.token_id(token) for token in ("<eoa>", "<|User|>"))
    ids = prompt_ids(tmp_path)
    assert ids[0] == 1 and ids.count(1) == 1 and user in ids
    assert ends(choice, 2) == ends(choice, 2, eoa) == (2, eoa) and not choice.warnings
    write_config(tmp_path, add_bos_token=False)
    choose_template(internlm.parent / tmp_path, model_name="x", given="internlm-chat-7b").write(tmp_path)
    assert 1 not in prompt_ids(tmp_path)


def test_the_checkpoints_own_template_comes_first(internlm: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes((internlm / "tokenizer.model").read_bytes())
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": "own"}))
    assert choose_template(tmp_path, model_name="internlm-chat-7b").source is None
    with pytest.raises(ConfigError, match="base is for models without a form for conversations, and this checkpoint"):
        choose_template(tmp_path, model_name="x", given="base")
    # The tokenizer's eos ends a turn too, wherever the configuration has another.
    write_config(tmp_path, eos_token="<eoa>")
    eoa = Tokenizer.from_dir(tmp_path).eos_token_id
    own = choose_template(tmp_path, model_name="some-model")
    assert eoa is not None and ends(own, 2) == (2, eoa) and ends(own, 2, vocab_size=eoa) == (2,)
    given = choose_template(tmp_path, model_name="internlm-chat-7b", given="internlm-chat-7b")
    assert given.source is not None
    given.write(tmp_path)
    assert len(prompt_ids(tmp_path)) > 10
    assert choose_template(internlm, model_name="InternLM-Chat-7B").source is not None
    for name in ("base", "some-model"):
        assert choose_template(internlm, model_name=name) == ((None, (), ()))


def test_a_stop_word_that_is_no_token_is_said(internlm: Path) -> None:
    choice = choose_template(internlm, model_name="qwen-7b")
    assert choice.stop_token_ids == (2,) and "'<|im_end|>', which is no token" in choice.warnings[0]


def test_template_files(internlm: Path, tmp_path: Path) -> None:
    jinja, own, over = (tmp_path / name for name in ("a.jinja", "b.json", "c.json"))
    jinja.write_text("{{ messages[0].content }}!")
    assert choose_template(internlm, model_name="x", given=str(jinja)).source == "{{ messages[0].content }}!"
    own.write_text(
        json.dumps({"user": "U:", "eoh": "'\n", "assistant": "B:", "separator": "|", "stop_words": ["<eoa>"]})
    )
    choice = choose_template(internlm, model_name="x", given=str(own))
    assert ChatTemplate(str(choice.source), {}, where="").render(FIRST + SECOND) == "U:Q 1'\nB:A|U:Q 2'\nB:"
    assert choice.stop_token_ids == (2, Tokenizer.from_dir(internlm).vocabulary.token_id("<eoa>"))
    over.write_text(json.dumps({"model_name": "Yi", "meta_instruction": "Rhyme.", "system": None}))
    source = str(choose_template(internlm, model_name="x", given=str(over)).source)
    assert ChatTemplate(source, {}, where="").render(FIRST) == (
        "<|im_start|>system\nRhyme.<|im_end|>\n<|im_start|>user\nQ 1<|im_end|>\n<|im_start|>assistant\n"
    )


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("a.json", "{", "a.json is not readable JSON"),
        ("a.json", "[]", "a.json must hold a JSON object"),
        ("a.json", '{"usr": "U:"}', "a.json: unknown key 'usr'; known keys are model_name, system"),
        ("a.json", '{"user": 1}', r"a.json: Expected `str`, got `int` - at `\$.user`"),
        ("a.jinja", "{% if %}", "a.jinja: the chat template is broken at line 1"),
        ("nothing", None, "nothing is neither a file nor one of the names"),
    ],
)
def test_wrong_template_files_are_named(
    internlm: Path, tmp_path: Path, name: str, content: str | None, problem: str
) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(ConfigError, match=problem):
        choose_template(internlm, model_name="x", given=str(tmp_path / name))


@pytest.mark.parametrize(
    ("name", "architecture", "odd"),
    [
        ("internlm-chat-7b", "InternLMForCausalLM", False),
        ("internlm-chat-7b", "InternLM2ForCausalLM", True),
        ("internlm2-chat-7b", "InternLM2ForCausalLM", False),
        ("llama2", "LlamaForCausalLM", False),
        ("llama2", "QWenLMHeadModel", True),
        ("qwen-7b", "QWenLMHeadModel", False),
        ("qwen-7b", "Qwen2ForCausalLM", True),
        ("Qwen2.5-7B", "Qwen2ForCausalLM", False),
        ("yi", "LlamaForCausalLM", False),
        ("my-model", "QWenLMHeadModel", False),
    ],
)
def test_a_name_of_another_family(name: str, architecture: str, odd: bool) -> None:
    assert (contradiction(name, architecture) is not None) == odd


def test_list_prints_names_and_prompts(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list"]) == 0
    printed = capsys.readouterr().out
    for name, known in NAMED_TEMPLATES.items():
        assert any(line.split() == [name, *known.purpose.split()] for line in printed.splitlines())
    assert main(["list", "YI"]) == 0
    assert "<|im_start|>user\nQUESTION 2<|im_end|>\n<|im_start|>assistant\n" in capsys.readouterr().out
    assert main(["list", "base"]) == 0 and "continues texts" in capsys.readouterr().out
    assert main(["list", "nothing"]) == 1 and "'nothing' is not a chat template" in capsys.readouterr().err
