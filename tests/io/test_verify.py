"""verify: every byte of an output is accounted for."""

import json
from dataclasses import replace

import pytest
import torch

from devec.core.contracts import TensorInfo
from devec.core.errors import GuardError, InputError
from devec.core.provenance import InputRecord, Provenance, plain
from devec.io.disk import write_file
from devec.io.records import MANIFEST, installed_versions, write_records
from devec.io.verify import verify_output
from devec.io.writer import SafetensorsWriter, save_file


@pytest.fixture
def output(tmp_path):
    folder = tmp_path / "out"
    folder.mkdir()
    save_file(folder / "model.safetensors", {"w": torch.ones(4)})
    write_file(folder / "config.json", b"{}")
    write_records(folder, Provenance("merge"))
    return folder


@pytest.fixture
def single(tmp_path):
    path = tmp_path / "x.safetensors"
    tensors = {"a": torch.ones(4), "b": torch.arange(3)}
    entries = [(n, TensorInfo(tuple(t.shape), t.dtype)) for n, t in tensors.items()]
    with SafetensorsWriter(path, entries, hashes_in_header=True) as writer:
        for n, t in tensors.items():
            writer.put(n, t)
    return path


def test_a_sound_folder(output):
    report = verify_output(output)
    assert report.ok and report.checked == 6
    assert report.to_dict() == {"ok": True, "checked": 6, "missing": [], "changed": [], "extra": []}


def test_missing_changed_and_extra_files_are_named(output):
    raw = bytearray((output / "model.safetensors").read_bytes())
    raw[-1] ^= 1
    (output / "model.safetensors").write_bytes(bytes(raw))
    (output / "config.json").unlink()
    (output / "modeling.py").write_text("x = 1")
    with pytest.raises(
        GuardError, match=r"missing = config\.json, changed = model\.safetensors, extra = modeling\.py"
    ) as error:
        verify_output(output)
    assert error.value.exit_code == 7
    report = verify_output(output, check=False)
    assert (report.missing, report.changed) == (("config.json",), ("model.safetensors",))
    assert report.extra == ("modeling.py",)


def test_a_truncated_file_and_a_changed_record_are_differences(output):
    (output / "model.safetensors").write_bytes((output / "model.safetensors").read_bytes()[:-4])
    (output / ".devec" / "recipe.yaml").write_text("command: other\n")
    assert verify_output(output, check=False).changed == (".devec/recipe.yaml", "model.safetensors")


def test_a_single_file(single):
    assert verify_output(single).checked == 2
    sound = single.read_bytes()
    for raw, names in (
        (sound[:-1] + bytes([sound[-1] ^ 1]), ("a",)),
        (sound[:-4], ("(file size)", "a")),
        (sound + b"more", ("(file size)",)),
    ):
        single.write_bytes(raw)
        with pytest.raises(GuardError):
            verify_output(single)
        assert verify_output(single, check=False).changed == names


def test_what_cannot_be_verified_is_said(tmp_path, output):
    with pytest.raises(InputError, match="no such output"):
        verify_output(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="no manifest"):
        verify_output(tmp_path / "empty")
    (tmp_path / "text").write_text("a text that is no weight file")
    with pytest.raises(InputError, match="not a safetensors file"):
        verify_output(tmp_path / "text")
    save_file(tmp_path / "plain.safetensors", {"w": torch.ones(1)})
    with pytest.raises(InputError, match="no tensor hashes"):
        verify_output(tmp_path / "plain.safetensors")
    for text in ("{", "[]", '{"files": {"../x": {"sha256": "a", "bytes": 1}}}', '{"files": {"x": 1}}'):
        (output / MANIFEST).write_text(text)
        with pytest.raises(InputError, match="manifest"):
            verify_output(output)


def test_provenance_names_no_path_and_no_time():
    record = InputRecord("a=org/x@main", "/home/someone/cache/x", {"w.safetensors": "ab"}, "peft", "0123")
    provenance = Provenance("mix", {"weights": (1.0, 2), "only": {"b", "a"}, "dtype": torch.bfloat16}, (record,),
                            installed_versions(), seed=3, out_dtype="bfloat16")
    assert provenance.to_recipe() == {
        "schema": 1, "command": "mix", "inputs": ["a=org/x@main"],
        "parameters": {"weights": [1.0, 2], "only": ["a", "b"], "dtype": "bfloat16"},
        "seed": 3, "dtype": "float32", "out_dtype": "bfloat16",
    }  # fmt: skip
    text = json.dumps(provenance.to_lock())
    assert "/home" not in text and '"file": "x"' in text and '"revision": "0123"' in text
    assert set(provenance.to_lock()["versions"]) >= {"devec", "torch", "python"}
    assert replace(provenance, recipe={"method": "average"}).to_recipe() == {"method": "average"}
    with pytest.raises(TypeError, match="cannot hold"):
        plain(object())
