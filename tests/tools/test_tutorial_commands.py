"""The tutorial's commands, in our spelling, on tiny checkpoints of its models with tokenizers of their own formats.

Converting, chatting, listing, quantising and editing config.ini; what serves is tested elsewhere. Engines run in this
process: that they do in one of their own is tests/tools/test_chat.py's.
"""

from __future__ import annotations

import io
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.models import family_cases
from tests.tools.lite_cases import write_conversations
from tests.vocabularies import INTERNLM_SYMBOLS, train_sentencepiece, train_tiktoken, write_config

from tritonmind import pipeline
from tritonmind.config import QuantPolicy, RopeScaling
from tritonmind.engine import llm
from tritonmind.engine.client import EngineClient
from tritonmind.engine.launch import start_engine
from tritonmind.sampling_params import SamplingParams
from tritonmind.tokenizer import Tokenizer
from tritonmind.workspace import Workspace
from tritonmind_tools.cli import main

QUESTION = "你好啊兄嘚"
CHAT = "--device cpu --temperature 0 --max-tokens 4 --ignore-eos --session-len 512"
VOCAB = 768  # more than either vocabulary has, as Qwen's and InternLM's are padded
Run = Callable[..., str]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders as they come from the hub, but for the sizes: no tokenizer.json, no chat template."""
    root = tmp_path_factory.mktemp("model_repos")
    with pytest.MonkeyPatch.context() as sizes:
        for name, size in {"VOCAB": VOCAB, "HIDDEN": 128, "INTER": 256, "HEAD_DIM": 32}.items():
            sizes.setattr(family_cases, name, size)
        config = {"vocab_size": VOCAB, "hidden_size": 128, "max_position_embeddings": 1024}
        family_cases.make("internlm", root / "internlm-chat-7b", intermediate_size=256, **config)
        family_cases.make("qwen", root / "Qwen-7B-Chat", kv_channels=32, intermediate_size=512, **config)
        family_cases.make("llama", root / "Llama-2-7b-chat", intermediate_size=256, head_dim=32, **config)
    for folder in root.iterdir():
        for file in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"):
            (folder / file).unlink(missing_ok=True)
    train_sentencepiece(root / "internlm-chat-7b", symbols=INTERNLM_SYMBOLS)
    train_sentencepiece(root / "Llama-2-7b-chat")
    write_config(root / "Llama-2-7b-chat", add_bos_token=True, legacy=False, bos_token="<s>", eos_token="</s>")
    train_tiktoken(root / "Qwen-7B-Chat")
    (root / "Qwen-7B-Chat" / "generation_config.json").write_text('{"eos_token_id": 500, "top_p": 0.8}')
    return root


@pytest.fixture
def run(checkpoints: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs a command line; {} is the folder of the checkpoints. Returns what it printed, errors and all."""
    monkeypatch.chdir(tmp_path)

    def start(path: str, overrides: dict[str, object], *, in_process: bool) -> EngineClient:
        return start_engine(path, {**overrides, "cache_max_entry_count": 64}, in_process=True)

    monkeypatch.setattr(llm, "start_engine", start)

    def run(command: str, text: str = "") -> str:
        monkeypatch.setattr("sys.stdin", io.StringIO(text))
        code = main(shlex.split(command.format(checkpoints)))
        printed = capsys.readouterr()
        assert code == 0, f"{command}: {printed.err}"
        return printed.out + printed.err

    return run


MODELS = {
    "internlm-chat-7b": ("internlm-chat-7b", "<|User|>:你好啊兄嘚\n<|Bot|>:", ("</s>", "<eoa>")),
    "qwen-7b": ("Qwen-7B-Chat", "<|im_start|>user\n你好啊兄嘚<|im_end|>\n<|im_start|>assistant\n", ("<|im_end|>",)),
    "llama2": ("Llama-2-7b-chat", "<</SYS>>\n\n你好啊兄嘚 [/INST] ", ("</s>",)),
}


@pytest.mark.parametrize("name", MODELS)
def test_convert_and_chat(run: Run, checkpoints: Path, name: str) -> None:
    folder, ending, ends = MODELS[name]
    printed = run(f"convert {name} {{}}/{folder}/")
    assert "converted in" in printed and "warning" not in printed
    workspace = Workspace.open("workspace")
    tokenizer = Tokenizer.from_dir(workspace.tokenizer_dir)
    assert {tokenizer.vocabulary.token_id(end) for end in ends} <= set(workspace.model.eos_token_ids)
    offline = run(f"chat turbomind ./workspace {CHAT}", f"{QUESTION}\n")
    online = run(f"chat turbomind {{}}/{folder}/ --model-name {name} {CHAT}", f"{QUESTION}\n")
    assert "answer 4 tokens" in offline
    with pipeline(str(checkpoints / folder), model_name=name, in_process=True, device="cpu", max_num_seqs=1) as model:
        assert model.chat_template is not None
        prompt = model.chat_template.render([{"role": "user", "content": QUESTION}])
        assert prompt.endswith(ending)
        (answer,) = model.generate([prompt], SamplingParams(temperature=0, max_tokens=4, ignore_eos=True))
    for printed in (offline, online):
        assert printed.startswith(answer.text.strip()[:2])


def test_the_names_of_the_tutorials_models_are_listed(run: Run) -> None:
    printed = run("list")
    assert all(f"  {name} " in printed for name in ("internlm-chat-20b", *MODELS))


def test_a_name_of_another_kind_of_model(run: Run) -> None:
    assert "warning: MODEL_NAME qwen-7b is the name of another kind" in run("convert qwen-7b {}/Llama-2-7b-chat")


def test_quantisation(run: Run, checkpoints: Path, tmp_path: Path) -> None:
    """Sections 3.1 and 3.2: int8 KV cache, 4-bit weights, both; then the settings of 2.6.2."""
    write_conversations(tmp_path / "chats.json")
    run("convert internlm-chat-7b {}/internlm-chat-7b/ --tp 1")
    run(
        "lite calibrate --model {}/internlm-chat-7b/ --calib_dataset ./chats.json --calib_samples 4 --calib_seqlen 48 "
        "--work_dir ./quant_output"
    )
    run(
        "lite kv_qparams --work_dir ./quant_output --turbomind_dir workspace/triton_models/weights/ --kv_sym False "
        "--num_tp 1"
    )
    run("lite auto_awq --model {}/internlm-chat-7b/ --w_bits 4 --w_group_size 128 --work_dir ./quant_output")
    run("convert internlm-chat-7b ./quant_output --model-format awq --group-size 128 --dst_path ./workspace_quant")
    edit(tmp_path, quant_policy=4, rope_scaling_factor=1.0, use_logn_attn=1, max_batch_size=2, session_len=2048)
    config = Workspace.open("workspace").engine_config()
    assert config.cache.quant_policy is QuantPolicy.KV_INT8_CALIBRATED
    assert config.model.rope_scaling == RopeScaling(rope_type="dynamic", factor=1.0) and config.model.use_logn_attn
    assert (config.scheduler.max_num_seqs, config.scheduler.max_model_len) == (2, 2048)
    assert Workspace.open("workspace_quant").model.group_size == 128
    for workspace in ("workspace", "workspace_quant"):
        assert "answer 4 tokens" in run(f"chat turbomind ./{workspace} {CHAT}", f"{QUESTION}\n")


def edit(root: Path, **values: float) -> None:
    path = root / "workspace/triton_models/weights/config.ini"
    lines = path.read_text().splitlines()
    for key, value in values.items():
        (number,) = (number for number, line in enumerate(lines) if line.startswith(f"{key} = "))
        lines[number] = f"{key} = {value}"
    path.write_text("\n".join(lines) + "\n")
