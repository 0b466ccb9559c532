"""A separate vLLM server: the contract against a real one, and a sentence for each thing that may be wrong with it.

``Answers`` is a server of fixed answers written with http.server: what vLLM says to a request that the sampler makes,
with one thing missing or wrong.
"""

import json
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import CancelledError
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import pytest

from common.errors import RunFailure, UserError
from common.tokenizer import load_tokenizer
from common.types import AdapterSpec, Prompt, SamplerSetup, SamplingParams
from learner.model import adapters
from learner.torch_learner import TorchLearner
from learner.weight_sync import WeightSync, make_probe
from sampler.conformance import CHECKS, Harness
from sampler.server.client import RemoteSampler
from sampler.server.command import server_command, shell_line
from tests.making import GROUPS, config
from tests.test_sync import Separate
from tests.tiny import make_tiny

KEY = "sk-not-to-be-seen-4711"
LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.fixture(autouse=True, scope="module")
def _key():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOGRPO_TEST_KEY", KEY)
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_tiny(tmp_path_factory.mktemp("tied"), tied=True)


def setup_of(folder, **changed):
    adapter = AdapterSpec(4, {"target_modules": LAYERS})
    return replace(SamplerSetup(str(folder), "float32", 192, 64, adapter=adapter), **changed)


# -- a real server -----------------------------------------------------------------------------------------------------


class Server:
    """vLLM's, on loopback, as ``server_command`` says; it asks for the key."""

    def __init__(self, setup, log):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        environment, words = server_command(setup, self.url)
        outside = {name: value for name, value in os.environ.items() if not name.startswith("VLLM_")}
        environment |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_API_KEY": KEY, "VLLM_NO_USAGE_STATS": "1"}
        self.log = log.open("w+")
        self.process = subprocess.Popen(
            words, env=outside | environment, stdout=self.log, stderr=self.log, start_new_session=True
        )
        try:
            self._wait()
        except BaseException:
            self.kill()
            raise

    def _wait(self):
        for _ in range(600):
            if self.process.poll() is not None:
                break
            try:
                if httpx.get(f"{self.url}/health", trust_env=False, timeout=5).status_code == 200:
                    return
            except httpx.HTTPError:
                pass
            time.sleep(0.5)
        self.log.seek(0)
        pytest.fail(f"the server did not start: {self.log.read()[-3000:]}")

    def kill(self):
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.log.close()


def make(server, setup, **options):
    return RemoteSampler(setup, url=server.url, api_key_env="NANOGRPO_TEST_KEY", timeout_s=300, **options)


@pytest.fixture(scope="module")
def server(folder, tmp_path_factory):
    pytest.importorskip("vllm")
    running = Server(setup_of(folder), tmp_path_factory.mktemp("server") / "log")
    yield running
    running.kill()  # a test may have done so


@pytest.fixture(scope="module")
def env(server, folder):
    with Harness(lambda setup: make(server, setup), folder) as env:
        yield env


@pytest.mark.vllm
@pytest.mark.parametrize("name", CHECKS)
def test_contract(env, name):
    CHECKS[name](env)


@pytest.mark.vllm
@pytest.mark.parametrize("lora", [0, 4])
def test_the_server_follows_the_learner(server, folder, tmp_path, lora):
    spec = config(model={"name": "unused", "dtype": "float32", "lora_rank": lora}, sync={"tolerance": 0.02})
    learner = TorchLearner(spec, folder, "cpu")
    adapter = AdapterSpec(lora, adapters.adapter_config(spec.model, folder).to_dict()) if lora else None
    sampler = make(server, setup_of(folder, adapter=adapter), weights_folder=str(tmp_path))
    try:
        probe = make_probe([group.prompt for group in GROUPS], 32, 32)
        sync = WeightSync(learner, sampler, Separate(), probe, spec.sync, 60)
        assert sync.challenge()["probe_diff"] < 0.01
        for _ in range(2):
            assert sync()["probe_diff"] < 0.01
            learner.update(GROUPS)
        (answer,) = sampler.generate([GROUPS[0].prompt], SamplingParams(n=3, max_tokens=4, seed=1)).result(60)
        assert {completion.policy_version for completion in answer.completions} == {1}
    finally:
        sampler.close()
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


@pytest.mark.vllm
def test_one_sampler_at_a_time(server, folder):
    sampler = make(server, setup_of(folder, adapter=None))
    try:
        with pytest.raises(UserError, match="another sampler gives its weights"):
            make(server, setup_of(folder, adapter=None))
    finally:
        sampler.close()
    make(server, setup_of(folder, adapter=None)).close()


@pytest.mark.vllm
def test_what_the_server_was_started_with(server, folder):
    """Found out at the start, from the server's own account of itself."""
    rank = AdapterSpec(32, {"target_modules": LAYERS})
    for changed, sentence in (
        ({"max_model_tokens": 300}, "takes 193 tokens, fewer than the 300.*--max-model-len 301"),
        ({"dtype": "bfloat16"}, "computes in float32.*--dtype bfloat16"),
        ({"adapter": rank}, "up to rank 8, model.lora_rank is 32.*--max-lora-rank 32"),
    ):
        with pytest.raises(UserError, match=sentence):
            make(server, setup_of(folder, **changed))


@pytest.mark.vllm
def test_another_model_is_seen_by_its_tokenizer(server, folder, tmp_path):
    other = make_tiny(tmp_path / "other", seed=5)
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    tokenizer["model"]["merges"] = tokenizer["model"]["merges"][:5]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(UserError, match="whose tokenizer is not that"):
        make(server, setup_of(other))


@pytest.mark.vllm
def test_a_wrong_key_is_named_by_its_variable(server, folder, monkeypatch):
    monkeypatch.setenv("ANOTHER_KEY", "sk-wrong")
    with pytest.raises(UserError, match=r"refuses the key \(HTTP 401\).* ANOTHER_KEY ") as caught:
        RemoteSampler(setup_of(folder), url=server.url, api_key_env="ANOTHER_KEY")
    assert "sk-wrong" not in str(caught.value)
    with pytest.raises(UserError, match="api_key_env"):
        RemoteSampler(setup_of(folder), url=server.url)


@pytest.mark.vllm
def test_the_key_is_never_shown(server, folder, caplog, capfd):
    caplog.set_level(logging.DEBUG)
    sampler = make(server, setup_of(folder, adapter=None))
    try:
        sampler.generate([GROUPS[0].prompt], SamplingParams(max_tokens=2)).result(60)
        with pytest.raises(RunFailure, match="HTTP 400") as caught:
            sampler.generate([Prompt("odd", (), token_ids=(10**6,))], SamplingParams(max_tokens=2)).result(60)
        shown = repr(sampler) + repr(caught.getrepr(showlocals=True)) + caplog.text + "".join(capfd.readouterr())
    finally:
        sampler.close()
    assert "HTTP Request" in caplog.text
    assert KEY not in shown


@pytest.mark.vllm
def test_a_servers_death_is_noticed(env, server, folder):
    """The last that this server is asked."""
    env.close()
    sampler = make(server, setup_of(folder, adapter=None))
    ids = [5, 60, 61, 70, 90]
    work = sampler.generate([Prompt("long", (), token_ids=(5, 6, 7))], SamplingParams(n=64, max_tokens=180))
    assert not work.done()
    server.kill()
    with pytest.raises(RunFailure, match=f"{server.url} broke while it was writing completions of prompt 'long'"):
        work.result(60)
    with pytest.raises(RunFailure, match=r"nothing answers at .* is started by"):
        sampler.logprobs([ids])
    sampler.close()
    sampler.close()
    with pytest.raises(RunFailure, match="after it was closed"):
        sampler.logprobs([ids])


# -- a server with something wrong -------------------------------------------------------------------------------------


class Answers:
    """Answers as vLLM does, but for what ``lacks`` names and what is set wrong."""

    def __init__(self, folder):
        self.tokenizer = load_tokenizer(str(folder))
        self.lacks = set()
        self.settings = {"scheduler_config": {"enable_chunked_prefill": False}, "lora_config": None}
        self.models = [{"id": "tiny", "parent": None, "max_model_len": 193}]
        self.first_logprob = 0.0
        self.broken = {}  # path -> status and text
        self.waits = threading.Event()
        self.hangs = set()
        self.asked = []

    def answer(self, path, body):
        if path == "/v1/models":
            return 200, {"data": self.models}
        if path == "/server_info":
            return 200, {"vllm_config": self.settings}
        if path == "/tokenize":
            return 200, {"tokens": self.tokenizer.encode(body["prompt"], add_special_tokens=False)}
        if path == "/v1/completions":
            choice = {"text": "a", "token_ids": [5], "logprobs": {"token_logprobs": [self.first_logprob]}}
            prompt = [None, *({str(t): {"logprob": -1.0}} for t in body["prompt"][1:])]
            choice |= {"finish_reason": "length", "prompt_logprobs": prompt}
            return 200, {"choices": [choice | {"index": index} for index in range(body["n"])]}
        if path == "/collective_rpc":
            return (200, {"results": [None]}) if body else (400, {"error": {"message": "Missing 'method'"}})
        if path == "/reset_prefix_cache":
            return 200, {"success": True}
        return 404, {"detail": "Not Found"}


@contextmanager
def serving(answers):
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            path = self.path.partition("?")[0]
            body = json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))) or "null")
            answers.asked.append((path, body))
            if path in answers.hangs:
                answers.waits.wait(60)
            status, content = 404, {"detail": "Not Found"}
            if path in answers.broken:
                status, text = answers.broken[path]
                content = {"error": {"message": text.format(key=self.headers.get("Authorization"))}}
            elif path not in answers.lacks:
                status, content = answers.answer(path, body)
            data = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_POST = do_GET

        def log_message(self, *_):
            pass

    listening = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=listening.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listening.server_port}"
    finally:
        answers.waits.set()
        listening.shutdown()
        listening.server_close()
        thread.join()


def meet(answers, folder, setup=None, **options):
    """Makes a sampler on this server and closes it; gives the error's text."""
    with serving(answers) as url:
        try:
            RemoteSampler(setup or setup_of(folder, adapter=None), url=url, **options).close()
        except UserError as error:
            return str(error)
    return "no error"


def test_nothing_wrong(folder):
    assert meet(Answers(folder), folder) == "no error"


START = "vllm.entrypoints.openai.api_server --model"  # the whole command to start it with


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"models": []}, "is not vLLM's"),
        ({"lacks": {"/collective_rpc"}}, f"takes no weights.*VLLM_SERVER_DEV_MODE=1.*{START}"),
        ({"lacks": {"/reset_prefix_cache"}}, rf"no /reset_prefix_cache \(VLLM_SERVER_DEV_MODE=1 was not set.*{START}"),
        ({"lacks": {"/server_info"}}, "set sampler.options.seed_requests=true"),
        ({"settings": {"load_config": {"load_format": "dummy"}}}, "was started with --load-format dummy"),
        ({"first_logprob": -0.7}, "another distribution than it draws from.*--logprobs-mode processed_logprobs"),
    ],
)
def test_what_is_wrong_with_a_server_is_named_with_the_cure(folder, wrong, sentence):
    answers = Answers(folder)
    vars(answers).update(wrong)
    assert re.search(sentence, meet(answers, folder))


def test_settings_that_kill_a_server_on_a_cpu(folder):
    answers = Answers(folder)
    answers.settings = {"device_config": {"device": "cpu"}, "scheduler_config": {"enable_chunked_prefill": True}}
    assert "--no-enable-chunked-prefill" in meet(answers, folder)
    assert not [body for path, body in answers.asked if path == "/v1/completions" and "seed" in body]
    assert meet(answers, folder, seed_requests=False) == "no error"
    answers.settings |= {"lora_config": {"max_lora_rank": 8, "target_modules": None}}
    answers.asked.clear()
    said = meet(answers, folder, seed_requests=False, setup=setup_of(folder))
    assert "--lora-target-modules down_proj" in said
    assert "/v1/completions" not in [path for path, _ in answers.asked]


def test_a_server_that_does_not_show_its_settings_is_taken_at_the_users_word(folder):
    answers = Answers(folder)
    answers.lacks = {"/server_info"}
    assert meet(answers, folder, seed_requests=True) == "no error"


def test_requests_carry_a_seed_only_where_wanted(folder):
    answers = Answers(folder)
    with serving(answers) as url:
        for seeded in (True, False):
            sampler = RemoteSampler(setup_of(folder, adapter=None), url=url, seed_requests=seeded)
            answers.asked.clear()
            prompts = [Prompt(str(index), (), token_ids=(5, 6)) for index in range(3)]
            sampler.generate(prompts, SamplingParams(max_tokens=1, seed=1)).result(60)
            sampler.generate(prompts[1:], SamplingParams(max_tokens=1, seed=1, seed_offset=1)).result(60)
            sampler.close()
            seeds = [body.get("seed") for _, body in answers.asked]
            assert sampler.seeds_prompts is seeded
            assert (len(set(seeds)), set(seeds[3:]) <= set(seeds[:3])) == ((3, True) if seeded else (1, True))
            assert (None in seeds) is not seeded


def test_the_key_is_cut_out_of_what_the_server_says(folder):
    answers = Answers(folder)
    answers.broken = {"/v1/completions": (500, "cannot use {key} here")}
    said = meet(answers, folder, api_key_env="NANOGRPO_TEST_KEY")
    assert "HTTP 500, cannot use Bearer <the key> here" in said
    assert KEY not in said


@pytest.mark.slow
def test_a_server_that_hangs_is_left_after_the_limit(folder):
    answers = Answers(folder)
    with serving(answers) as url:
        sampler = RemoteSampler(setup_of(folder, adapter=None), url=url, timeout_s=1.5)
        answers.hangs = {"/v1/completions"}
        work = sampler.generate([Prompt("p", (), token_ids=(5, 6))], SamplingParams(max_tokens=1))
        assert not work.done()
        with pytest.raises(RunFailure, match=r"still writing completions of prompt 'p' after 1.5 s.*timeout_s"):
            work.result(60)
        sampler.close()


def test_closing_ends_what_is_in_flight(folder):
    answers = Answers(folder)
    with serving(answers) as url:
        sampler = RemoteSampler(setup_of(folder, adapter=None), url=url)
        answers.hangs = {"/v1/completions"}
        work = sampler.generate([Prompt("p", (), token_ids=(5, 6))], SamplingParams(max_tokens=1))
        sampler.close()
        assert work.cancelled()


def test_nothing_answers(folder):
    with socket.socket() as bound:  # bound and not listening: refused
        bound.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{bound.getsockname()[1]}"
        with pytest.raises(UserError, match=f"nothing answers at {url}.*--port {bound.getsockname()[1]}"):
            RemoteSampler(setup_of(folder), url=url)


# -- options and what surrounds the server -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({}, "url is missing"),
        ({"url": "127.0.0.1:8000"}, "not of the form http://HOST:PORT"),
        ({"url": "http://127.0.0.1:8000/v1"}, "ends with /v1"),
        ({"url": "http://127.0.0.1:8000", "ur": 1}, "did you mean 'url'"),
        ({"url": "http://127.0.0.1:8000", "weight_folder": "x"}, "did you mean 'weights_folder'"),
        ({"url": "http://127.0.0.1:8000", "weights_folder": "/nowhere"}, "weights_folder='/nowhere' is not a folder"),
        ({"url": "http://sampler.example:8000"}, "weights_folder is missing.*sampler.example"),
        ({"url": "http://127.0.0.1:8000", "api_key_env": "NOT_THERE"}, "'NOT_THERE': no such environment variable"),
        ({"url": "http://127.0.0.1:8000", "seed_requests": "yes"}, "seed_requests='yes' must be true or false"),
        ({"url": "http://127.0.0.1:8000", "timeout_s": 0}, "timeout_s=0 must be"),
    ],
)
def test_options(options, sentence):
    with pytest.raises(UserError, match=sentence):
        RemoteSampler.check_options(options)


@pytest.mark.parametrize(
    "options",
    [{"api_key": KEY}, {"api_key_env": KEY}, *({"url": f"http://me:{KEY}@127.0.0.1:{port}"} for port in (8000, 99999))],
    ids=lambda options: next(iter(options)),
)
def test_a_key_in_the_run_file_is_refused_and_not_repeated(options):
    with pytest.raises(UserError, match="api_key_env") as caught:
        RemoteSampler.check_options({"url": "http://127.0.0.1:8000"} | options)
    assert KEY not in str(caught.value)


@pytest.mark.parametrize("changed", [{"tensor_parallel": 2}, {"in_flight_updates": True}])
def test_settings_without_effect_are_refused(folder, changed):
    with pytest.raises(UserError, match=next(iter(changed))):
        RemoteSampler(setup_of(folder, **changed), url="http://127.0.0.1:8000")


def test_the_command_line():
    environment, words = server_command(setup_of(Path("my model")), "http://127.0.0.1:9000")
    line = shell_line(environment, words)
    assert "VLLM_SERVER_DEV_MODE=1 VLLM_ALLOW_RUNTIME_LORA_UPDATING=True" in line
    assert f"{sys.executable} -m vllm.entrypoints.openai.api_server --model 'my model'" in line
    assert "--port 9000" in line
    assert "--max-lora-rank 8" in line
    environment, words = server_command(setup_of("other", device="gpu", adapter=None))
    assert words[:3] == ["vllm", "serve", "other"]
    assert "--enforce-eager" not in words
    assert environment == {"VLLM_SERVER_DEV_MODE": "1"}


@pytest.mark.slow
def test_the_command_line_prints_the_servers_command(folder):
    def run(*words):
        line = [
            sys.executable,
            "-m",
            "deploy.cli",
            "server",
            "deploy/configs/demo.toml",
            f"model.name={folder}",
            *words,
        ]
        return subprocess.run(line, capture_output=True, text=True, cwd=Path(__file__).parent.parent, check=False)

    right = run("sampler.name=remote", "sampler.options.url=http://127.0.0.1:8123", "task.name=warmup")
    assert f"--model {folder} --host 127.0.0.1 --port 8123" in right.stdout
    other = run("sampler.name=hf")
    assert other.returncode == 2
    assert "sampler.name='hf' needs no server" in other.stderr


@pytest.mark.parametrize(
    ("choice", "text"),
    [
        ({"text": "<answer>18", "finish_reason": "stop", "stop_reason": "</answer>"}, "<answer>18</answer>"),
        ({"text": "<answer>18", "finish_reason": "stop", "stop_reason": 2}, "<answer>18"),
        ({"text": "<answer>18", "finish_reason": "stop", "stop_reason": None}, "<answer>18"),
        ({"text": "<answer>18", "finish_reason": "length"}, "<answer>18"),
    ],
)
def test_the_stop_string_belongs_to_the_text(folder, choice, text):
    class Ends(Answers):
        def answer(self, path, body):
            status, answered = super().answer(path, body)
            for answer in answered.get("choices", []) if path == "/v1/completions" else []:
                answer |= choice
            return status, answered

    answers = Ends(folder)
    with serving(answers) as url:
        sampler = RemoteSampler(setup_of(folder, adapter=None, end_tokens=(2,)), url=url)
        prompt = Prompt("p", (), token_ids=(5, 6))
        (group,) = sampler.generate([prompt], SamplingParams(max_tokens=4, stop=("</answer>",))).result(60)
        sampler.close()
    assert [completion.text for completion in group.completions] == [text]
    (asked,) = [body for path, body in answers.asked if path == "/v1/completions" and body["stop"]]
    assert (asked["stop"], asked["stop_token_ids"], asked["skip_special_tokens"]) == (["</answer>"], [2], False)


def test_a_prompts_group_is_reported_while_another_is_written(folder):
    reported, held = [], threading.Event()

    class Slow(Answers):
        """The first prompt is answered once the second's group has been reported."""

        def answer(self, path, body):
            if path == "/v1/completions" and body["prompt"] == [5, 6]:
                held.wait(60)
            return super().answer(path, body)

    with serving(Slow(folder)) as url:
        sampler = RemoteSampler(setup_of(folder, adapter=None), url=url)
        prompts = [Prompt("p", (), token_ids=(5, 6)), Prompt("q", (), token_ids=(7, 8))]
        future = sampler.generate(prompts, SamplingParams(n=2, max_tokens=1))
        future.on_group(lambda index, group: (reported.append((index, group, future.done())), held.set()))
        groups = future.result(120)
        assert reported == [(1, groups[1], False), (0, groups[0], False)]
        held.clear()
        given_up = sampler.generate(prompts[:1], SamplingParams(max_tokens=1))
        assert given_up.cancel()
        for work in set(sampler._pending):
            with pytest.raises(CancelledError):
                work.result(60)
        held.set()
        sampler.close()
