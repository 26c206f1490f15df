"""A file that does not hold one readable JSON object is refused in one sentence that names it."""

import pytest

from deepseek_latent.json_files import MAX_DEPTH, read_json

REFUSED = {
    "nothing": (b"", "expected JSON"),
    "half of it": (b'{"a": ', "expected JSON"),
    "a list": (b"[1]", "expected a JSON object .* got list"),
    "other bytes": (b"\xff\xfe{", "expected JSON"),
    "a byte order mark": (b"\xef\xbb\xbf{}", "BOM"),
    "a name twice": (b'{"a": 1, "b": {"x": 1, "x": 1}}', "'x' is given twice"),
    "NaN": (b'{"a": NaN}', "NaN is not a number of JSON"),
    "infinity": (b'{"a": [-Infinity]}', "-Infinity is not a number of JSON"),
    "half a character": (b'{"a": "\\ud83d"}', "surrogates not allowed"),
    "too deep": (b'{"a":' + b"[" * MAX_DEPTH + b"]" * MAX_DEPTH + b"}", "nested more than 64 deep"),
    "much too deep": (b"[" * 10**5 + b"]" * 10**5, "nested too deeply"),
    "a number of 10,000 digits": (b'{"a": ' + b"1" * 10_000 + b"}", "expected JSON"),
}


@pytest.mark.parametrize(("content", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_a_file_without_one_json_object_is_refused_by_name(content, message, tmp_path):
    file = tmp_path / "config.json"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=message) as refused:
        read_json(file)
    assert str(file) in str(refused.value)
    assert len(str(refused.value)) < 400


def test_a_file_that_is_absent_or_a_folder_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"expected a folder with config\.json"):
        read_json(tmp_path / "config.json")
    (tmp_path / "config.json").mkdir()
    with pytest.raises(ValueError, match=r"expected a folder with config\.json"):
        read_json(tmp_path / "config.json")


def test_an_object_is_read_as_it_is_written(tmp_path):
    (tmp_path / "a.json").write_text('{"a": {"b": [1, 2.5, null, true]}, "ü": "\\ud83d\\ude00"}', encoding="utf-8")
    assert read_json(tmp_path / "a.json") == {"a": {"b": [1, 2.5, None, True]}, "ü": "\N{GRINNING FACE}"}


def test_a_folder_of_an_adapter_and_one_of_a_checkpoint_are_told_apart(tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "some/base"}')
    with pytest.raises(ValueError, match="which is a LoRA adapter of some/base; merge it"):
        read_json(tmp_path / "config.json")
    (tmp_path / "adapter_config.json").rename(tmp_path / "config.json")
    with pytest.raises(ValueError, match="which is a checkpoint; name a folder that save_pretrained of peft's model"):
        read_json(tmp_path / "adapter_config.json")
