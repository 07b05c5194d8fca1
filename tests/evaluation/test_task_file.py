# ruff: noqa: E501, F541  each way to hide code in a line of its own
"""Task files from strangers: none of the ways to hide code in one works, and honest ones load as in lm-eval."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from finhpc.errors import ConfigError
from finhpc.evaluation.task_file import rendering
from finhpc.evaluation.tasks import load_task, prepare_tasks
from finhpc.settings.base import build
from finhpc.settings.evaluate import EvaluateConfig

HONEST = """
task: mine
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: multiple_choice
doc_to_choice: [down, up]
doc_to_target: label
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""
TEXT = 'doc_to_text: "{{text}} is"\n'
SHELL = "__init__.__globals__.os.system('touch RAN')"

# name -> what stands in the task file beside HONEST. RAN is a file that the code would make; evil.py makes it too.
HIDDEN = {
    "function": TEXT + "process_docs: !function evil.run\n",
    "function as text of a prompt": "doc_to_text: !function evil.run\n",
    "function, a letter escaped": TEXT + "process_docs: !%66unction evil.run\n",
    "function, all letters escaped": TEXT + "process_docs: !%66%75%6e%63%74%69%6f%6e evil.run\n",
    "function by a tag's short form": "%TAG !f! !func\n---\n" + TEXT + "process_docs: !f!tion evil.run\n",
    "function by another short form": "%TAG ! !fun\n---\n" + TEXT + "process_docs: !ction evil.run\n",
    "function as a verbatim tag": TEXT + "process_docs: !<!function> evil.run\n",
    "function behind a merge key": "x: &x {process_docs: !function evil.run}\n" + TEXT + "<<: *x\n",
    "function in few-shot settings": TEXT + "fewshot_config: {process_docs: !function evil.run}\n",
    "function as a metric": TEXT + "metric_list: [{metric: !function evil.run}]\n",
    "function as an aggregation": TEXT + "metric_list: [{metric: acc, aggregation: !%66unction evil.run}]\n",
    "function in an included file, in flow style": "{include: [hidden.txt]}\n",
    "function in a file included twice over": "include: more.yaml\n",
    "class": TEXT + "class: !function evil.run\n",
    "class, its key escaped": TEXT + '"cl\\x61ss": !%66unction evil.run\n',
    "class, a plain name": TEXT + "class: evil.run\n",
    "data made by a function": TEXT + '"custom\\u005fdataset": !%66unction evil.run\n',
    "results by a function": TEXT + "process_results: !<%21function> evil.run\n",
    "python object": TEXT + "metadata: !!python/object/apply:os.system ['touch RAN']\n",
    "python name by a short form": "%TAG !p! tag:yaml.org,2002:python/\n---\n" + TEXT + "metadata: !p!name:os.system ''\n",
    "binary tag": TEXT + "metadata: !!binary aGk=\n",
    "unsafe code that is declared": TEXT + "unsafe_code: yes\n",
    "prompt of another file": TEXT + "use_prompt: hidden.yaml:x\n",
    "prompt of promptsource": TEXT + "use_prompt: promptsource:x\n",
    "metric of a hub": TEXT + "metric_list: [{metric: stranger/metric}]\n",
    "metric of a folder": TEXT + "metric_list: [{metric: ./evil.py, aggregation: mean}]\n",
    "metric asked of the hub": TEXT + "metric_list: [{metric: acc, aggregation: mean, hf_evaluate: true}]\n",
    "scripted data": TEXT + "dataset_path: ./evil.py\n",
    "pickled data": TEXT + "dataset_path: pandas\n",
    "data by trust": TEXT + "dataset_kwargs: {data_files: {test: DATA}, trust_remote_code: true}\n",
    "data by a chain of file systems": TEXT + "dataset_kwargs: {data_files: {test: 'reference://::DATA'}}\n",
    "data with options of a file system": TEXT + "dataset_kwargs: {data_files: {test: DATA}, storage_options: {a: 1}}\n",
    "template that reaches a module": f'doc_to_text: "{{{{ cycler.{SHELL} }}}}"\n',
    "template by another object": f'doc_to_text: "{{{{ lipsum.__globals__[\'os\'].system(\'touch RAN\') }}}}"\n',
    "template in brackets": 'doc_to_text: "{{ cycler[\'__init__\'][\'__globals__\'].os.system(\'touch RAN\') }}"\n',
    "template with a joined name": "doc_to_text: \"{{ cycler['__in' ~ 'it__']['__glo' ~ 'bals__'].os.system('touch RAN') }}\"\n",
    "template by the filter attr": "doc_to_text: \"{{ cycler|attr('__init__')|attr('__globals__') }}\"\n",
    "template by a format": "doc_to_text: \"{{ '{0.__class__.__mro__}'.format(cycler) }}\"\n",
    "template of the target": TEXT + f'doc_to_target: "{{{{ joiner.{SHELL} }}}}"\n',
    "template of a description": TEXT + f'description: "{{{{ namespace.{SHELL} }}}}"\n',
    "template of few-shot examples": TEXT + f'fewshot_config: {{doc_to_text: "{{{{ cycler.{SHELL} }}}}"}}\n',
    "template that fills the memory": "doc_to_text: \"{{ 'a' * 10000000000 }}\"\n",
    "template that counts for ever": 'doc_to_text: "{% for i in range(10 ** 9) %}{% endfor %}"\n',
    "template of a long loop": 'doc_to_text: "{% for i in range(1000000000) %}{% endfor %}"\n',
    "template that changes a list": "doc_to_text: \"{% set l = [] %}{{ l.append(1) }}\"\n",
    "anchor that holds itself": TEXT + "metadata: &a [*a]\n",
    "aliases that multiply": TEXT + "metadata:\n  a: &a [1,1,1,1,1,1,1,1,1,1]\n"
    + "".join(f"  {y}: &{y} [{', '.join(['*' + x] * 10)}]\n" for x, y in zip("abcdef", "bcdefg", strict=True)),
    "settings given twice": TEXT + "output_type: multiple_choice\noutput_type: generate_until\n",
    "two documents": TEXT + "---\ntask: other\nprocess_docs: !function evil.run\n",
}  # fmt: skip


def written(folder: Path, text: str) -> Path:
    """A task file of `text` and HONEST, of which `text` comes first and counts; and what it may refer to."""
    folder.mkdir(exist_ok=True)
    (folder / "rows.jsonl").write_text(
        "".join(json.dumps({"text": f"rate {i}", "label": i % 2}) + "\n" for i in range(4))
    )
    ran = folder / "ran"
    (folder / "evil.py").write_text(f"open({str(ran)!r}, 'w')\ndef run(*a, **k): open({str(ran)!r}, 'w')\n")
    (folder / "hidden.txt").write_text(TEXT + "process_docs: !%66unction evil.run\n")
    (folder / "hidden.yaml").write_text("prompts: {x: {doc_to_text: a, doc_to_target: b}}\n")
    (folder / "more.yaml").write_text("{'include': hidden.txt}\n")
    head, _, rest = text.rpartition("---\n") if text.startswith("%") else ("", "", text)
    head = head and head + "---\n"
    settings = rest if rest.startswith("{") else rest + _without(HONEST, rest)
    if rest.startswith("{"):
        (folder / "base.yaml").write_text(HONEST.replace("DATA", str(folder / "rows.jsonl")))
        settings = rest.replace("[", "[base.yaml, ", 1)
    (folder / "mine.yaml").write_text(
        (head + settings).replace("DATA", str(folder / "rows.jsonl")).replace("RAN", str(ran))
    )
    return folder / "mine.yaml"


def _without(honest: str, rest: str) -> str:
    """The lines of HONEST whose keys `rest` does not set."""
    keys = {line.partition(":")[0] for line in rest.splitlines()}
    return "".join(line + "\n" for line in honest.splitlines() if line.partition(":")[0] not in keys)


def opened(path: Path, tmp_path: Path, **other: Any) -> Any:
    config = build(EvaluateConfig, {"tasks": [str(path)], **other})
    (task,) = prepare_tasks(config, tmp_path / "tasks")
    found = load_task(task)
    with rendering(task.trusted):
        return [(found.doc_to_text(doc), found.doc_to_target(doc)) for doc in found.eval_docs], found


@pytest.mark.parametrize("name", HIDDEN)
def test_no_way_to_hide_code_in_a_task_file_works(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    path = written(tmp_path / "task", HIDDEN[name])
    with pytest.raises(ConfigError, match=r"mine\.yaml|hidden\.txt"):
        opened(path, tmp_path)
    assert not (tmp_path / "task" / "ran").exists()


HONEST_FILES = {
    "plain": TEXT,
    "byte order mark": "\ufeff" + TEXT,
    "template with methods and filters": "doc_to_text: \"{{ text.strip()|upper ~ ' '.join(['a', 'b']) ~ text[:2] ~ 3 * 2 }}\"\n",
    "anchors": "metadata: {a: &a [1, 2], b: *a}\n" + TEXT,
    "include": "include: plain.txt\n",
    "own tags of YAML": TEXT + "description: !!str 7\nnum_fewshot: !!int 0\n",
    "a long product of numbers": 'doc_to_text: "{{text}} {{ 10000000 * 10000000 }}"\n',
    "null where code could stand": TEXT + "process_docs: null\nunsafe_code: false\n",
    "few-shot settings": TEXT + "fewshot_config: {sampler: first_n, split: test}\n",
}


@pytest.mark.parametrize("name", HONEST_FILES)
def test_honest_task_files_load_as_in_lm_eval(tmp_path: Path, name: str) -> None:
    from lm_eval.tasks import TaskManager

    path = written(tmp_path / "task", HONEST_FILES[name])
    (path.parent / "plain.txt").write_text(TEXT)
    rows, _ = opened(path, tmp_path)
    theirs = TaskManager(include_defaults=False).load([str(path)])["tasks"]["mine"]
    assert rows == [(theirs.doc_to_text(doc), theirs.doc_to_target(doc)) for doc in theirs.eval_docs]
    assert rows[1][1] == 1


def test_a_trusted_file_runs_its_code_and_its_templates_as_in_lm_eval(tmp_path: Path) -> None:
    path = written(
        tmp_path / "task", "doc_to_text: !function evil.text\ndescription: \"{{ 'a' ** 0 if false else 'b' }}\"\n"
    )
    with (path.parent / "evil.py").open("a") as file:
        file.write("def text(doc): return doc['text'] + '!'\n")
    rows, _ = opened(path, tmp_path, trust_task_code=True)
    assert rows[0][0] == "rate 0!"
    assert (path.parent / "ran").exists()


def test_a_task_is_another_when_what_it_includes_or_reads_changes(tmp_path: Path) -> None:
    path = written(tmp_path / "task", "include: plain.txt\n")
    (path.parent / "plain.txt").write_text(TEXT)
    hashes = set()
    for change in (None, "plain.txt", "rows.jsonl"):
        if change:
            (path.parent / change).write_text(
                (path.parent / change).read_text().replace(" is", " was").replace("rate", "r")
            )
        hashes.add(prepare_tasks(build(EvaluateConfig, {"tasks": [str(path)]}), tmp_path / "tasks")[0].sha256)
    assert len(hashes) == 3
