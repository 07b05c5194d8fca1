from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from finhpc.errors import ConfigError
from finhpc.evaluation.models import load_for_evaluation, subjects
from finhpc.evaluation.tasks import prepare_tasks
from finhpc.settings.base import build
from finhpc.settings.evaluate import EvaluateConfig
from tests.evaluation.tasks import write_data, write_model


def told(tmp_path: Path, **tree: object) -> str:
    with pytest.raises(ConfigError) as caught:
        prepare_tasks(build(EvaluateConfig, tree), tmp_path / "tasks")
    return str(caught.value)


def test_missing_data_says_what_to_fetch_and_where_it_was_looked_for(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    text = told(tmp_path, tasks=["fpb", "boolq"], data={"folder": str(tmp_path / "data")})
    assert "Fetch Financial PhraseBank" in text
    assert "hf:aps/super_glue:boolq" in text
    assert str(tmp_path / "data") in text


@pytest.mark.parametrize(
    ("task", "file", "content", "said"),
    [
        ("tfns", "tfns.csv", "text,mood\nup,1\n", "for label; columns: text, mood"),
        ("tfns", "tfns.csv", "text,label\nup,7\n", "'7' is not a label of template tfns"),
        ("tfns", "tfns.csv", "text,label\n", "no example"),
        ("fpb", "fpb.txt", "up@wonderful\n", "'wonderful' is not a label of"),
        ("piqa", "piqa.jsonl", '{"goal": "a", "sol1": "b", "label": 0}\n', "no column for sol2"),
        (
            "winogrande",
            "winogrande.jsonl",
            '{"sentence": "a", "option1": "b", "option2": "c", "answer": "1"}\n',
            "no _",
        ),
    ],
)
def test_files_that_do_not_fit(tmp_path: Path, task: str, file: str, content: str, said: str) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / file).write_text(content)
    assert said in told(tmp_path, tasks=[task], data={"folder": str(folder)})


def test_a_task_file_that_runs_code_is_refused_unless_trusted(tmp_path: Path) -> None:
    base = "task: mine\noutput_type: multiple_choice\ndataset_path: json\n"
    (tmp_path / "base.yaml").write_text(base + "doc_to_text: !function evil.run\n")
    (tmp_path / "mine.yaml").write_text("include: base.yaml\ntask: mine\n")
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    assert "!function" in told(tmp_path, tasks=[str(tmp_path / "mine.yaml")])
    trusting = build(EvaluateConfig, {"tasks": [str(tmp_path / "mine.yaml")], "trust_task_code": True})
    assert prepare_tasks(trusting, tmp_path / "tasks")[0].name == "mine"
    assert not (tmp_path / "ran").exists()


def test_a_mistyped_task_gets_the_nearest(tmp_path: Path) -> None:
    assert "did you mean 'winogrande" in told(tmp_path, tasks=["winogrand"])


def test_a_folder_without_tokeniser(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model")
    for file in folder.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(ConfigError, match="has no tokenizer"):
        subjects([str(folder)], [])


def test_an_adapter_of_another_base_is_refused(tmp_path: Path) -> None:
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import GPT2Config, GPT2LMHeadModel

    folder = write_model(tmp_path / "model")
    tokens = torch.arange(12)[None]
    torch.manual_seed(0)
    for width, fits in ((32, True), (64, False)):
        base = GPT2LMHeadModel(GPT2Config(vocab_size=300, n_positions=64, n_embd=width, n_layer=2, n_head=2))
        lora = LoraConfig(r=2, target_modules=["c_attn"], init_lora_weights=False, fan_in_fan_out=True)
        get_peft_model(base, lora).save_pretrained(tmp_path / str(width))
        adapter = str(tmp_path / str(width))
        if fits:
            (subject,) = subjects([str(folder)], [adapter])
            model, _ = load_for_evaluation(subject.path, subject.adapter)
            opened = PeftModel.from_pretrained(GPT2LMHeadModel.from_pretrained(folder), adapter).eval()
            torch.testing.assert_close(model(tokens).logits, opened(tokens).logits, rtol=0, atol=5e-5)
        else:
            with pytest.raises(ConfigError, match="it is of another model"):
                subjects([str(folder)], [adapter])


def test_every_problem_is_told_at_once(tmp_path: Path) -> None:
    data = write_data(tmp_path / "data")
    (data / "fpb.txt").unlink()
    shutil.copy(data / "tfns.csv", data / "tfns2.csv")
    text = told(tmp_path, tasks=["fpb", "tfns", "nerd"], data={"folder": str(data)})
    assert "no fpb" in text
    assert "several files" in text
    assert "unknown task tasks=nerd" in text
