"""A real inference server for tests: vLLM's completions and reload, SGLang's generate and update, over transformers.

    python tests/openai_server.py MODEL_FOLDER

prints its port and serves until its stdin ends. The model is a Hugging Face folder in transformers, which shares no
code with megatron_prefix; a response is sampled token by token with the whole sequence computed anew.

POST /test/fault {"kind": ..., "times": N} makes the next N requests to sample, or to load, fail; GET /test/seen tells
what was asked, and the folders that were loaded.
"""

import json
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch
import transformers

SAMPLING_FAULTS = ("status", "hang", "garbage", "no_ids", "count", "early", "infinite", "drop", "raw", "names")


class State:
    """The model, what was asked, and what shall go wrong."""

    def __init__(self, folder: str) -> None:
        self.lock = threading.Lock()
        self.fault: dict[str, Any] = {"kind": None, "times": 0, "value": None}
        self.seen: dict[str, Any] = {"requests": [], "loaded": [], "most_at_once": 0}
        self.at_once = 0
        self.load(folder)

    def load(self, folder: str) -> None:
        self.model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.seen["loaded"].append([folder, float(sum(p.double().sum() for p in self.model.parameters()))])

    def take_fault(self, path: str) -> Any:
        """The fault of this request, once."""
        with self.lock:
            of_sampling = path in ("/v1/completions", "/generate")
            kind = self.fault["kind"]
            fits = of_sampling if kind in SAMPLING_FAULTS else not of_sampling
            if not self.fault["times"] or not fits or path.startswith("/test"):
                return None
            self.fault["times"] -= 1
            return kind

    @torch.no_grad()
    def sample(
        self, prompt: list[int], n: int, length: int, temperature: float, eos: list[int], seed: int
    ) -> list[dict[str, Any]]:
        """n responses: {"ids", "log_probs" (after temperature), "raw" (before it), "finish"}."""
        found: list[dict[str, Any]] = []
        for i in range(n):
            random = torch.Generator().manual_seed(seed + i)
            ids, log_probs, raw = list(prompt), [], []
            while len(log_probs) < length and not (log_probs and ids[-1] in eos):
                logits = self.model(torch.tensor([ids])).logits[0, -1].double()
                scaled = (logits / temperature).log_softmax(-1)
                token = int(torch.multinomial(scaled.exp(), 1, generator=random))
                log_probs.append(float(scaled[token]))
                raw.append(float(logits.log_softmax(-1)[token]))
                ids.append(token)
            ended = ids[-1] in eos
            found.append({"ids": ids[len(prompt) :], "log_probs": log_probs, "raw": raw,
                          "finish": "stop" if ended else "length"})  # fmt: skip
        return found


class Handler(BaseHTTPRequestHandler):
    """One request."""

    protocol_version = "HTTP/1.1"
    server: Any

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def answer(self, body: Any, status: int = 200) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self) -> None:
        state: State = self.server.state
        if self.path == "/v1/models":
            self.answer({"object": "list", "data": [{"id": "tiny", "object": "model"}]})
        elif self.path == "/test/seen":
            self.answer(state.seen)
        else:
            self.answer({"error": f"no {self.path}"}, 404)

    def do_POST(self) -> None:
        state: State = self.server.state
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path == "/test/fault":
            state.fault = body
            state.seen["most_at_once"] = 0
            self.answer({})
            return
        kind = state.take_fault(self.path)
        with state.lock:
            state.seen["requests"].append(self.path)
            state.at_once += kind is None
            state.seen["most_at_once"] = max(state.seen["most_at_once"], state.at_once)
        try:
            self.respond(state, body, kind)
        finally:
            with state.lock:
                state.at_once -= kind is None

    def respond(self, state: State, body: Any, kind: str | None) -> None:
        if kind == "status":
            self.answer({"error": "made to fail"}, int(state.fault["value"]))
        elif kind == "hang":
            time.sleep(float(state.fault["value"]))
            self.close_connection = True
        elif kind == "drop":
            self.close_connection = True
        elif kind == "garbage":
            self.answer(b"<html>not JSON</html>")
        elif self.path == "/v1/completions":
            self.answer(vllm_answer(state, body, kind))
        elif self.path == "/generate":
            self.answer(sglang_answer(state, body, kind))
        elif self.path == "/collective_rpc":
            assert body["method"] == "reload_weights"
            if kind != "ignore":
                state.load(body["kwargs"]["weights_path"])
            self.answer({"results": [None]})
        elif self.path == "/reset_prefix_cache":
            self.answer(b"")
        elif self.path == "/update_weights_from_disk":
            if kind == "refuse":
                self.answer({"success": False, "message": "made to fail"})
            else:
                state.load(body["model_path"])
                self.answer({"success": True, "message": "done"})
        else:
            self.answer({"error": f"no {self.path}"}, 404)


def spoilt(responses: list[dict[str, Any]], kind: str | None) -> list[dict[str, Any]]:
    first = responses[0]
    if kind == "count":
        return responses[:-1]
    if kind == "early":
        first |= {"ids": first["ids"][:1], "log_probs": first["log_probs"][:1], "finish": "abort"}
    if kind == "infinite":
        first["log_probs"][0] = None
    return responses


def vllm_answer(state: State, body: dict[str, Any], kind: str | None) -> Any:
    assert body["top_p"] == 1 and body["top_k"] == -1
    responses = state.sample(
        body["prompt"], body["n"], body["max_tokens"], body["temperature"], body["stop_token_ids"], body["seed"]
    )
    choices = []
    for i, response in enumerate(spoilt(responses, kind)):
        names = [f"token_id:{token}" if kind != "no_ids" else "a" for token in response["ids"]]
        values = response["raw"] if kind == "raw" else response["log_probs"]
        choice = {"index": i, "finish_reason": response["finish"],
                  "logprobs": {"tokens": names, "token_logprobs": values}}  # fmt: skip
        choices.append(choice if kind in ("no_ids", "names") else choice | {"token_ids": response["ids"]})
    return {"object": "text_completion", "choices": choices}


def sglang_answer(state: State, body: dict[str, Any], kind: str | None) -> Any:
    sampling = body["sampling_params"]
    assert sampling["top_p"] == 1 and sampling["top_k"] == -1 and body["return_logprob"]
    responses = state.sample(
        body["input_ids"], sampling["n"], sampling["max_new_tokens"], sampling["temperature"],
        sampling["stop_token_ids"], sum(body["input_ids"]),  # a real one draws a seed of its own
    )  # fmt: skip
    answers = []
    for response in spoilt(responses, kind):
        pairs = [[x, token, None] for x, token in zip(response["log_probs"], response["ids"], strict=True)]
        meta: dict[str, Any] = {"finish_reason": {"type": response["finish"]}}
        answers.append({"text": "", "meta_info": meta if kind == "no_ids" else meta | {"output_token_logprobs": pairs}})
    return answers if sampling["n"] > 1 else answers[0]


def main() -> None:
    torch.set_num_threads(1)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.state = State(str(Path(sys.argv[1])))  # type: ignore[attr-defined]
    sys.stdout.write(f"{server.server_address[1]}\n")
    sys.stdout.flush()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    sys.stdin.read()  # so that no server outlives the test that started it


if __name__ == "__main__":
    main()
