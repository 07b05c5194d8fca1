"""OpenAI's own client gets the text of `finhpc generate`, from the base and three adapters, in every form."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest

from finhpc.data.examples.chat import prompt_text
from tests.serving.server import Server, config_of, folders, generated, serving
from tests.waiting import wait_until

PROMPTS = ["the bank rate", "markets wait for news of growth", "prices"]
MODELS = ["base", "base:a0", "base:a1", "base:a2"]
TURNS = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
TEMPLATE = TURNS + "{% if add_generation_prompt %}assistant: {% endif %}"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Path]]:
    base, adapters = folders(tmp_path_factory.mktemp("openai"))
    (base / "chat_template.jinja").write_text(TEMPLATE)
    return base, adapters


@pytest.fixture(scope="module")
def server(files: tuple[Path, dict[str, Path]], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(config_of(files[0], tmp_path_factory.mktemp("state"), files[1])) as server:
        yield server


@pytest.fixture(scope="module")
def texts(files: tuple[Path, dict[str, Path]]) -> dict[tuple[str, str], str]:
    """What `finhpc generate` answers, by model and prompt."""
    return {
        (model, prompt): generated(*files, prompt, model.partition(":")[2] or None, max_new_tokens=24)
        for model in MODELS
        for prompt in PROMPTS
    }


def ask(server: Server, model: str, prompt: Any, **how: Any) -> Any:
    how = {"max_tokens": 24, "temperature": 0} | how
    return server.client().completions.create(model=model, prompt=prompt, **how)


def test_all_models_at_once_give_the_texts_of_generate(server: Server, texts: dict[tuple[str, str], str]) -> None:
    assert len({texts[model, PROMPTS[0]] for model in MODELS}) == 4, "the adapters must differ"
    with ThreadPoolExecutor(12) as pool:
        asked = {key: pool.submit(ask, server, *key) for key in texts}
        for key, answer in asked.items():
            choice = answer.result().choices[0]
            assert choice.text == texts[key], key
            assert choice.finish_reason in ("length", "stop")
    server.wait_until_idle()


def test_a_stream_is_the_same_text_with_usage(server: Server, texts: dict[tuple[str, str], str]) -> None:
    lengths = []
    for model in MODELS:
        parts = list(ask(server, model, PROMPTS[0], stream=True, stream_options={"include_usage": True}))
        assert "".join(part.choices[0].text for part in parts[:-1]) == texts[model, PROMPTS[0]]
        lengths.append(len(parts))
        assert [part.choices[0].finish_reason for part in parts[:-2]] == [None] * (len(parts) - 2)
        assert parts[-1].choices == []
        assert parts[-1].usage.completion_tokens <= 24
        whole = ask(server, model, PROMPTS[0]).usage
        assert parts[-1].usage == whole
        assert whole.total_tokens == whole.prompt_tokens + whole.completion_tokens
    assert max(lengths) > 8, "it comes in parts"


def test_prompts_are_texts_or_ids_one_or_several(server: Server, texts: dict[tuple[str, str], str]) -> None:
    encode = server.served.models["base"].prompt_ids
    ids = encode(PROMPTS)
    for prompt in (PROMPTS, ids):
        answer = ask(server, "base:a1", prompt)
        assert [choice.index for choice in answer.choices] == [0, 1, 2]
        assert [choice.text for choice in answer.choices] == [texts["base:a1", one] for one in PROMPTS]
        assert answer.usage.prompt_tokens == sum(map(len, ids))
    assert ask(server, "base", ids[0]).choices[0].text == texts["base", PROMPTS[0]]


def test_a_chat_is_what_the_template_writes(server: Server, files: tuple[Path, dict[str, Path]]) -> None:
    messages = [{"role": "user", "content": "the bank"}]
    model = server.served.models["base:a2"]
    prompt = prompt_text(messages, model.tokenizer)
    assert prompt == "user: the bank\nassistant: "
    create: Any = server.client().chat.completions.create
    how = {"model": "base:a2", "messages": messages, "max_completion_tokens": 16, "temperature": 0}
    answer = create(**how, logprobs=True, top_logprobs=2)
    before = server.served.models["base:a2"].chat_ids([_message(each) for each in messages])
    assert answer.choices[0].message.content == ask(server, "base:a2", before, max_tokens=16).choices[0].text
    assert answer.choices[0].message.role == "assistant"
    entries = answer.choices[0].logprobs.content
    assert len(entries) == answer.usage.completion_tokens
    for entry in entries:
        assert entry.top_logprobs[0].token == entry.token, "greedy"
        assert entry.bytes is None or bytes(entry.bytes).decode() == entry.token
    parts = list(create(**how, stream=True))
    assert parts[0].choices[0].delta.role == "assistant"
    assert "".join(part.choices[0].delta.content or "" for part in parts) == answer.choices[0].message.content
    listed = create(**how | {"messages": [{"role": "user", "content": [{"type": "text", "text": "the bank"}]}]})
    assert listed.choices[0].message.content == answer.choices[0].message.content
    with pytest.raises(openai.BadRequestError, match=r"Message 1 holds the special token <\|endoftext\|>"):
        create(**how | {"messages": [{"role": "user", "content": "a <|endoftext|> b"}]})


def _message(tree: dict[str, str]) -> Any:
    from finhpc.serving.protocol import Message

    return Message(**tree)


def test_a_model_without_a_template_says_so(tmp_path: Path) -> None:
    base, _ = folders(tmp_path)
    with (
        serving(config_of(base, tmp_path / "state", {})) as server,
        pytest.raises(openai.BadRequestError, match="has no chat template; use /v1/completions"),
    ):
        server.client().chat.completions.create(model="base", messages=[{"role": "user", "content": "a"}])


def test_a_seed_gives_the_draws_of_generate(server: Server, files: tuple[Path, dict[str, Path]]) -> None:
    how = {"temperature": 1.0, "top_p": 0.9, "seed": 7}
    expected = generated(*files, PROMPTS[1], "a0", max_new_tokens=24, **how)
    with ThreadPoolExecutor(4) as pool:  # while others run
        others = [pool.submit(ask, server, "base:a1", PROMPTS[0], temperature=1.0) for _ in range(3)]
        assert ask(server, "base:a0", PROMPTS[1], **how).choices[0].text == expected
        assert len({other.result().choices[0].text for other in others}) > 1, "without a seed they differ"
    several = ask(server, "base:a0", PROMPTS[1], n=3, **how).choices
    assert several[0].text == expected
    assert len({choice.text for choice in several}) == 3
    again = ask(server, "base:a0", PROMPTS[1], n=3, **how).choices
    assert [choice.text for choice in several] == [choice.text for choice in again]


def test_a_stop_string_ends_the_text_before_it(server: Server, texts: dict[tuple[str, str], str]) -> None:
    text = texts["base:a1", PROMPTS[0]]
    for length in (1, 3, 6):
        stop = text[8 : 8 + length]
        expected = text[: text.index(stop)]
        answer = ask(server, "base:a1", PROMPTS[0], stop=[stop, "never there"])
        assert (answer.choices[0].text, answer.choices[0].finish_reason) == (expected, "stop")
        parts = list(ask(server, "base:a1", PROMPTS[0], stop=stop, stream=True))
        assert "".join(part.choices[0].text for part in parts) == expected
        assert parts[-1].choices[0].finish_reason == "stop"
    server.wait_until_idle()


def test_log_probabilities_are_those_of_the_model(server: Server, files: tuple[Path, dict[str, Path]]) -> None:
    import torch

    from finhpc.models.loading import load_model

    model, served = load_model(files[0]).eval(), server.served.models["base"]
    (ids,) = served.prompt_ids(PROMPTS[0])
    answer = ask(server, "base", PROMPTS[0], logprobs=2, echo=True, max_tokens=6).choices[0]
    assert answer.text.startswith(PROMPTS[0])
    whole = list(ids)
    with torch.no_grad():
        for _ in range(6):
            whole.append(int(model(torch.tensor([whole])).logits[0, -1].argmax()))
        expected = torch.log_softmax(model(torch.tensor([whole])).logits[0].float(), -1)
    values = answer.logprobs
    assert values.tokens == [served.texts(token) for token in whole]
    assert "".join(values.tokens[: len(ids)]) == PROMPTS[0]
    assert values.text_offset[: len(ids) + 1] == [len("".join(values.tokens[:i])) for i in range(len(ids) + 1)]
    assert (values.token_logprobs[0], values.top_logprobs[0]) == (None, None)
    for i, (token, value) in enumerate(zip(whole[1:], values.token_logprobs[1:], strict=True)):
        assert value == pytest.approx(float(expected[i, token]), abs=1e-4)
        top = values.top_logprobs[i + 1]
        assert max(top.values()) == pytest.approx(float(expected[i].max()), abs=1e-4)
        assert 2 <= len(top) <= 3
        assert top[values.tokens[i + 1]] == value


def test_a_prompt_is_scored_without_new_tokens(server: Server) -> None:
    """As evaluation needs it."""
    scored = ask(server, "base:a0", PROMPTS, logprobs=1, echo=True, max_tokens=0)
    longer = ask(server, "base:a0", PROMPTS, logprobs=1, echo=True, max_tokens=1)
    for one, other, prompt in zip(scored.choices, longer.choices, PROMPTS, strict=True):
        assert one.text == prompt
        assert one.finish_reason == "length"
        assert one.logprobs.token_logprobs[1:] == pytest.approx(other.logprobs.token_logprobs[1:-1], abs=1e-5)
    assert scored.usage.completion_tokens == 0
    assert ask(server, "base", "the", echo=True, max_tokens=0).choices[0].text == "the"
    with pytest.raises(openai.BadRequestError, match="only with echo"):
        ask(server, "base", "the", max_tokens=0)
    parts = list(ask(server, "base:a0", PROMPTS[0], logprobs=1, echo=True, max_tokens=4, stream=True))
    whole = ask(server, "base:a0", PROMPTS[0], logprobs=1, echo=True, max_tokens=4).choices[0]
    assert "".join(part.choices[0].text for part in parts) == whole.text
    assert [token for part in parts for token in part.choices[0].logprobs.tokens] == whole.logprobs.tokens


def test_ends_can_be_ignored(server: Server) -> None:
    answer = ask(server, "base", PROMPTS[2], max_tokens=100, extra_body={"ignore_eos": True})
    assert answer.usage.completion_tokens == 100


def test_the_models_are_listed(server: Server) -> None:
    client = server.client()
    assert [model.id for model in client.models.list()] == MODELS
    assert client.models.retrieve("base:a1").id == "base:a1"
    with pytest.raises(openai.NotFoundError, match=r"base:b does not exist; there are: base, base:a0"):
        client.models.retrieve("base:b")


def test_what_does_not_fit_is_refused(server: Server) -> None:
    for how, words in (
        ({"max_tokens": 5000}, "exceed the context of 128"),
        ({"prompt": "the " * 200}, "tokens, and the limit is 128"),
        ({"prompt": [5, 300]}, "ids that are not between 0 and 299"),
        ({"prompt": [-1]}, "ids that are not between 0 and 299"),
        ({"logprobs": 21}, "exceed the limit of 20"),
        ({"n": 129}, "exceed 128 answers"),
        ({"prompt": []}, "empty list"),
        ({"stop": ""}, "stop holds an empty text"),
        ({"stop": ["a"] * 17}, "at most 16"),
        ({"stream_options": {"include_usage": True}}, "stream_options needs stream=true"),
    ):
        with pytest.raises(openai.BadRequestError, match=words):
            ask(server, "base", **{"prompt": "the"} | how)
    server.wait_until_idle()


def test_metrics_count_what_was_done(server: Server) -> None:
    client: Any = server.client()
    before = client.get(f"{server.root}/metrics", cast_to=str)
    ask(server, "base", PROMPTS[0], max_tokens=5)
    ok = 'finhpc_requests_total{code="200",path="/v1/completions"'

    def value(text: str, name: str) -> float:
        return sum(float(line.rpartition(" ")[2]) for line in text.splitlines() if line.startswith(name))

    def counted() -> bool:  # a request counts once its answer is sent, which the client may see first
        nonlocal after
        after = client.get(f"{server.root}/metrics", cast_to=str)
        return value(after, ok) > value(before, ok)

    after = before
    wait_until(counted)
    assert value(after, "finhpc_new_tokens_total") - value(before, "finhpc_new_tokens_total") == 5
    assert value(after, ok) - value(before, ok) == 1
    assert value(after, "finhpc_first_token_seconds_count") - value(before, "finhpc_first_token_seconds_count") == 1
    assert value(after, "finhpc_token_seconds_count") - value(before, "finhpc_token_seconds_count") == 4
    assert 'finhpc_cache_blocks{replica="one"} 64.0' in after
    assert "the bank" not in after


def test_lm_evals_requests_give_the_scores_of_evaluate(server: Server, files: tuple[Path, dict[str, Path]]) -> None:
    """What its local-completions sends, and how it reads the answer."""
    from types import SimpleNamespace

    from lm_eval.api.instance import Instance
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    from finhpc.evaluation.language_model import LanguageModel
    from finhpc.models.loading import load_model

    encode = server.served.models["base"].tokenizer
    pairs = [(prompt, answer) for prompt in PROMPTS for answer in (" rises", " falls", " wait for news", " and")]
    rows = [(encode(prompt).input_ids, encode(answer).input_ids) for prompt, answer in pairs]
    payload = LocalCompletionsAPI._create_payload(SimpleNamespace(model="base"), [a + b for a, b in rows])
    client: Any = server.client()
    answer = client.post("/completions", body=payload, cast_to=object)
    scores = LocalCompletionsAPI.parse_logprobs(answer, ctxlens=[len(a) for a, _ in rows])
    own = LanguageModel(load_model(files[0]).eval(), encode, 4)
    expected = own.loglikelihood([Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)])
    assert [greedy for _, greedy in scores] == [greedy for _, greedy in expected]
    assert [score for score, _ in scores] == pytest.approx([score for score, _ in expected], abs=1e-3)
