"""The workspace format: what a reader accepts, what it refuses and names, and that a writer leaves all or nothing."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.test_tensor_layout import INT4, MODEL
from tritonmind import weight_files, workspace_writer
from tritonmind.chunk_checks import num_copy_threads
from tritonmind.config import ModelConfig
from tritonmind.errors import CheckpointError, ConfigError, TritonmindError, WorkspaceError
from tritonmind.tensor_layout import TensorSpec, common_tensor_specs, tensor_specs
from tritonmind.weight_files import ShardWriter, plan_shards, torch_dtype
from tritonmind.workspace import Workspace, is_workspace
from tritonmind.workspace_writer import WorkspaceWriter

TP = 2


def random_tensor(spec: TensorSpec) -> torch.Tensor:
    dtype = torch_dtype(spec.dtype)
    if dtype == torch.int32:
        return torch.randint(-(2**31), 2**31, spec.shape, dtype=torch.int32)
    return torch.randn(spec.shape).to(dtype)


def write_workspace(
    destination: Path, model: ModelConfig = MODEL, *, tp: int = TP, force: bool = False, batch_dim: bool = False
) -> dict[str, torch.Tensor]:
    """A workspace of random weights; returns them by name."""
    specs = common_tensor_specs(model)
    for rank in range(tp):
        specs |= tensor_specs(model, tp, rank)
    tensors = {name: random_tensor(spec) for name, spec in specs.items()}
    writer = WorkspaceWriter(
        destination,
        model,
        session_len=128,
        source_config={"architectures": [model.architecture]},
        tensor_parallel_size=tp,
        triton_batch_dim=batch_dim,
        force=force,
    )
    with writer:
        (writer.tokenizer_dir / "tokenizer.json").write_text("{}")
        for name, tensor in tensors.items():
            writer.write(name, tensor)
        writer.commit()
    return tensors


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("pristine") / "workspace"
    write_workspace(root)
    return root


@pytest.fixture
def root(pristine: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(pristine, tmp_path / "workspace", symlinks=True))


def weights(root: Path) -> Path:
    return root / "model_repository/tritonmind/1/weights"


def names_in(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


def test_layout(root: Path) -> None:
    assert names_in(root) == {"service_docker_up.sh", "triton_models", "model_repository"}
    assert os.readlink(root / "triton_models") == "model_repository/tritonmind/1"
    assert (root / "triton_models/weights/config.ini").is_file()
    assert (root / "triton_models/tokenizer/tokenizer.json").is_file()
    assert os.access(root / "service_docker_up.sh", os.R_OK)
    assert names_in(weights(root)) == {
        "config.ini",
        "config.json",
        "model.json",
        "index.json",
        "common-00000.safetensors",
        "rank0-00000.safetensors",
        "rank1-00000.safetensors",
    }
    assert "max_batch_size: 0" in (root / "model_repository/tritonmind/config.pbtxt").read_text()


def test_batch_dimension(tmp_path: Path) -> None:
    write_workspace(tmp_path / "workspace", batch_dim=True)
    pbtxt = (tmp_path / "workspace/model_repository/tritonmind/config.pbtxt").read_text()
    assert "max_batch_size: 1" in pbtxt and "max_batch_size: 0" not in pbtxt


@pytest.mark.parametrize("part", [".", "model_repository/tritonmind", "model_repository/tritonmind/1", "triton_models"])
def test_opens_from_root_model_and_version_directory(root: Path, part: str) -> None:
    workspace = Workspace.open(root / part)
    assert workspace.version_dir == root / "model_repository/tritonmind/1"
    assert workspace.tokenizer_dir == workspace.version_dir / "tokenizer"
    assert workspace.model == MODEL
    assert workspace.engine_config().tensor_parallel_size == TP
    assert workspace.engine_config(max_num_seqs=2).scheduler.max_num_seqs == 2


@pytest.mark.parametrize("weight_type", ["fp16", "bf16", "fp32", "int4"])
@pytest.mark.parametrize("tied", [False, True])
def test_tensors_come_back_bit_for_bit(tmp_path: Path, weight_type: str, tied: bool) -> None:
    model = INT4 if weight_type == "int4" else dataclasses.replace(MODEL, weight_type=weight_type)  # type: ignore[arg-type]
    model = dataclasses.replace(model, tie_word_embeddings=tied)
    written = write_workspace(tmp_path / "workspace", model)
    workspace = Workspace.open(tmp_path / "workspace")
    seen: set[str] = set()
    for rank in range(TP):
        read = dict(workspace.tensors(rank))
        assert read.keys() == common_tensor_specs(model).keys() | tensor_specs(model, TP, rank).keys()
        for name, tensor in read.items():
            assert tensor.dtype == written[name].dtype and torch.equal(tensor, written[name]), name
        seen |= read.keys()
    assert seen == written.keys()
    assert ("output.weight" in seen) is not tied


def test_attention_output_bias_is_stored_once() -> None:
    assert "layers.0.attention.wo.0.bias" in tensor_specs(MODEL, 2, 0)
    assert "layers.0.attention.wo.1.bias" not in tensor_specs(MODEL, 2, 1)
    assert "layers.0.attention.w_qkv.1.bias" in tensor_specs(MODEL, 2, 1)


@pytest.mark.parametrize(
    ("tp", "named"), [(3, "head_num=4"), (4, "kv_head_num=2"), (0, "tensor_para_size=0"), (-1, "tensor_para_size=-1")]
)
def test_ranks_must_divide_the_model(tp: int, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        tensor_specs(MODEL, tp, 0)


def test_importing_and_opening_loads_no_torch(root: Path) -> None:
    code = (
        "import sys; from tritonmind.workspace import Workspace; Workspace.open(sys.argv[1]).engine_config(); "
        "print(sorted({'torch', 'numpy', 'safetensors'} & sys.modules.keys()))"
    )
    shown = subprocess.run(
        [sys.executable, "-c", code, str(root)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert shown.stdout.strip() == "[]"


@pytest.mark.parametrize("offset", [0, 5000, -1])
def test_altered_weights_are_named(root: Path, offset: int) -> None:
    path = weights(root) / "rank1-00000.safetensors"
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)
    workspace = Workspace.open(root)
    assert len(list(workspace.tensors(0))) > 0
    with pytest.raises(WorkspaceError, match=r"rank1-00000\.safetensors was altered or damaged"):
        list(workspace.tensors(1))


def test_altered_chunk_is_found_behind_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weight_files, "CHUNK_BYTES", 4096)
    monkeypatch.setattr(workspace_writer, "CHUNK_BYTES", 4096)
    root = tmp_path / "workspace"
    write_workspace(root)
    path = weights(root) / "common-00000.safetensors"
    workspace = Workspace.open(root)
    assert len(workspace.index.files[path.name].sha256) == -(-path.stat().st_size // 4096) > 2
    assert len(list(workspace.tensors(0))) > 0
    data = bytearray(path.read_bytes())
    data[2 * 4096] ^= 1
    path.write_bytes(data)
    with pytest.raises(WorkspaceError, match="at or after byte 8192"):
        list(workspace.tensors(0))


@pytest.mark.parametrize(("cores", "threads"), [(1, 1), (2, 1), (7, 1), (8, 2), (16, 4), (128, 4)])
def test_most_cores_are_left_to_the_checks(cores: int, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(cores)))
    assert num_copy_threads() == threads


def test_torch_has_its_threads_again_after_the_checks(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(4)))
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        for stop in ("never", "norm.weight"):
            tensors: Any = Workspace.open(root).tensors(0)
            for name, _ in tensors:
                assert torch.get_num_threads() == 1
                if name == stop:
                    break
            tensors.close()
            assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_truncated_and_missing_weights_are_named_on_opening(root: Path) -> None:
    path = weights(root) / "rank0-00000.safetensors"
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(WorkspaceError, match=r"rank0-00000\.safetensors has \d+ bytes, index\.json says \d+"):
        Workspace.open(root)
    path.unlink()
    with pytest.raises(WorkspaceError, match=r"rank0-00000\.safetensors cannot be read \(No such file"):
        Workspace.open(root)


def reseal(root: Path, file: str) -> None:
    """Make the index agree with a file that a test replaced, so that only its content is wrong."""
    import hashlib

    data = (weights(root) / file).read_bytes()
    index = json.loads((weights(root) / "index.json").read_text())
    index["files"][file] = {"size": len(data), "sha256": [hashlib.sha256(data).hexdigest()]}
    (weights(root) / "index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ("missing", r"tensor norm\.weight is missing"),
        ("extra", r"tensor spare is not one of this model"),
        ("shape", r"tensor norm\.weight is BF16\[33\], the model needs BF16\[32\]"),
        ("dtype", r"tensor norm\.weight is F16\[32\], the model needs BF16\[32\]"),
    ],
)
def test_tensors_must_be_those_of_the_model(root: Path, change: str, problem: str) -> None:
    file = "common-00000.safetensors"
    tensors = load_file(weights(root) / file)
    if change == "missing":
        del tensors["norm.weight"]
    elif change == "extra":
        tensors["spare"] = torch.zeros(1)
    elif change == "shape":
        tensors["norm.weight"] = torch.zeros(33, dtype=torch.bfloat16)
    else:
        tensors["norm.weight"] = tensors["norm.weight"].half()
    save_file(tensors, weights(root) / file)
    reseal(root, file)
    with pytest.raises(WorkspaceError, match=rf"common-00000\.safetensors: {problem}"):
        list(Workspace.open(root).tensors(0))


def edit_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"format_version": 99}, "format_version is 99"),
        ({"spare": 1}, "unknown field `spare`"),
        ({"files": {}}, "has no entry under files"),
        ({"tensors": {}}, "tensor .* is missing"),
        ({"tensor_parallel_size": 1}, "tensor_para_size = 2, but .*index.json says 1"),
        ({"chunk_bytes": 0}, r"index\.json: .* >= 1 .*chunk_bytes"),
        ({"chunk_bytes": -64}, r"index\.json: .* >= 1 .*chunk_bytes"),
        ({"chunk_bytes": "64"}, r"index\.json: .*`int`, got `str` .*chunk_bytes"),
        ({"chunk_bytes": 1.5}, r"index\.json: .*`int`, got `float` .*chunk_bytes"),
        ({"files": {"a": {"size": -1, "sha256": []}}}, r"index\.json: .* >= 0 .*size"),
    ],
)
def test_damaged_index(root: Path, changes: dict[str, object], problem: str) -> None:
    edit_json(weights(root) / "index.json", **changes)
    with pytest.raises(TritonmindError, match=problem):
        Workspace.open(root)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"spare": 1}, r"model\.json: unknown key 'spare'"),
        ({"num_heads": "four"}, r"model\.json: .*num_heads"),
        ({"num_layers": 3}, r"config\.ini:\d+: num_layer = 2, but .*model\.json says 3"),
        ({"eos_token_ids": []}, r"model\.json: eos_token_ids is empty"),
    ],
)
def test_damaged_model_json(root: Path, changes: dict[str, object], problem: str) -> None:
    edit_json(weights(root) / "model.json", **changes)
    with pytest.raises(TritonmindError, match=problem):
        Workspace.open(root)


@pytest.mark.parametrize("file", ["model.json", "index.json"])
def test_file_that_is_no_json(root: Path, file: str) -> None:
    (weights(root) / file).write_text("{")
    with pytest.raises(WorkspaceError, match=f"{file} cannot be read"):
        Workspace.open(root)


def test_what_is_no_workspace(tmp_path: Path) -> None:
    with pytest.raises(WorkspaceError, match="nowhere is not a directory"):
        Workspace.open(tmp_path / "nowhere")
    with pytest.raises(WorkspaceError, match=r"is no workspace: it has no .*index\.json"):
        Workspace.open(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(WorkspaceError, match="is a checkpoint, no workspace: run `tritonmind convert"):
        Workspace.open(tmp_path)


def test_destination_that_is_no_workspace_is_refused(tmp_path: Path) -> None:
    (tmp_path / "precious.txt").write_text("keep me")
    for force in (False, True):
        with pytest.raises(WorkspaceError, match="exists and is no workspace"):
            write_workspace(tmp_path, force=force)
    file = tmp_path / "precious.txt"
    with pytest.raises(WorkspaceError, match=r"precious\.txt exists and is no workspace"):
        write_workspace(file, force=True)
    link = tmp_path / "link"
    link.symlink_to(tmp_path)
    with pytest.raises(WorkspaceError, match="link is a symbolic link"):
        write_workspace(link, force=True)
    assert file.read_text() == "keep me"


def test_template_in_the_checkout_is_no_workspace() -> None:
    assert not is_workspace(Path(__file__).parent.parent)


def test_force_replaces_a_workspace_and_nothing_else_does(root: Path) -> None:
    with pytest.raises(WorkspaceError, match="is a workspace already: --force replaces it"):
        write_workspace(root)
    assert Workspace.open(root).model == MODEL
    other = dataclasses.replace(MODEL, model_name="other")
    written = write_workspace(root, other, tp=1, force=True)
    workspace = Workspace.open(root)
    assert workspace.model == other
    assert torch.equal(dict(workspace.tensors(0))["norm.weight"], written["norm.weight"])
    assert names_in(root.parent) == {"workspace"}


def test_an_empty_directory_is_a_good_destination(tmp_path: Path) -> None:
    (tmp_path / "workspace").mkdir()
    write_workspace(tmp_path / "workspace")
    assert is_workspace(tmp_path / "workspace")


def test_failed_writer_leaves_nothing(tmp_path: Path) -> None:
    writer = WorkspaceWriter(tmp_path / "workspace", MODEL, session_len=128, source_config={})
    with pytest.raises(KeyboardInterrupt), writer:
        writer.write("tok_embeddings.weight", torch.zeros(300, 32))
        raise KeyboardInterrupt
    assert names_in(tmp_path) == set()


def test_what_a_killed_writer_left_makes_room(tmp_path: Path) -> None:
    left = tmp_path / ".workspace.7.partial"
    (left / "triton_models").mkdir(parents=True)
    os.utime(left, (0, 0))
    write_workspace(tmp_path / "workspace")
    assert names_in(tmp_path) == {"workspace"}


def test_too_small_a_disk_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1))  # type: ignore[attr-defined]
    with pytest.raises(WorkspaceError, match=r"0\.0 GB free, the workspace needs 0\.0 GB"):
        write_workspace(tmp_path / "workspace")
    assert names_in(tmp_path) == set()


def test_shards_are_cut_in_order_and_read_back(tmp_path: Path) -> None:
    specs = list(common_tensor_specs(MODEL).values())
    plan = plan_shards("common", specs, max_bytes=20_000)
    assert [spec for shard in plan.values() for spec in shard] == specs
    assert list(plan) == ["common-00000.safetensors", "common-00001.safetensors"]
    for file, shard in plan.items():
        tensors = {spec.name: torch.randn(spec.shape, dtype=torch.bfloat16) for spec in shard}
        with ShardWriter(tmp_path / file, shard) as writer:
            for name, tensor in tensors.items():
                writer.write(name, [tensor])
            assert writer.finish().size == (tmp_path / file).stat().st_size
        read = load_file(tmp_path / file)
        assert read.keys() == tensors.keys() and all(torch.equal(read[name], tensors[name]) for name in read)


@pytest.fixture
def fp16_shard(tmp_path: Path) -> Iterator[ShardWriter]:
    specs = list(common_tensor_specs(dataclasses.replace(MODEL, weight_type="fp16")).values())
    with ShardWriter(tmp_path / "shard.safetensors", specs) as writer:
        yield writer


@pytest.mark.parametrize("value", [65520.0, -1e6, float("inf"), float("nan")])
def test_value_that_fp16_cannot_hold(fp16_shard: ShardWriter, value: float) -> None:
    tensor = torch.zeros(300, 32)
    tensor[299, 31] = value
    with pytest.raises(
        CheckpointError, match=r"tok_embeddings\.weight holds values that fp16 cannot.*--weight-type bf16"
    ):
        fp16_shard.write("tok_embeddings.weight", [tensor])


def test_blocks_are_converted_piece_by_piece(fp16_shard: ShardWriter, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weight_files, "_PIECE_BYTES", 1000)
    tensor = torch.randn(300, 32)
    pieces: list[int] = []
    convert = weight_files._stored_bytes
    monkeypatch.setattr(
        weight_files,
        "_stored_bytes",
        lambda spec, piece, *rest: (pieces.append(piece.nbytes), convert(spec, piece, *rest))[1],
    )
    assert fp16_shard.write("tok_embeddings.weight", [tensor[:100], tensor[100:]]) == tensor.numel() * 2
    assert max(pieces) <= 1000 and sum(pieces) == tensor.nbytes
