"""A server on the loopback address that speaks the protocol of chat completions, run by the tests as a process of its own.

    python tests/chat_server.py MODEL           # a folder: a model of transformers answers, with the likeliest tokens
    python tests/chat_server.py --plain         # no model: the answer quotes the question
    python tests/chat_server.py --misbehave     # so, but every text meets each of FAULTS before it is answered

Prints its port. GET /log returns what was asked, as JSON: {"requests": N, "most at once": N, "keys": [...],
"429": N, "early": requests that came before Retry-After had passed}.
"""

import json
import socketserver
import sys
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

FAULTS = ("slow", "500", "html", "half", "cut", "429", "hang up")
LOCK = threading.Lock()
LOG = {"requests": 0, "most at once": 0, "keys": [], "429": 0, "early": 0, "moved": 0}
TRIES, AT_ONCE, ALLOWED_AT = Counter(), [0], [0.0]


def load_model(folder: str):
    """A function from a prompt to the model's answer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder).eval()

    def answer(prompt: str, max_tokens: int) -> str:
        chat = tokenizer.apply_chat_template([{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True)
        inputs = tokenizer(chat, return_tensors="pt", add_special_tokens=False)
        with LOCK, torch.no_grad():
            out = model.generate(inputs["input_ids"], max_new_tokens=max_tokens, do_sample=False, pad_token_id=tokenizer.eos_token_id)
        return tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)

    return answer


class Handler(BaseHTTPRequestHandler):
    answer = staticmethod(lambda prompt, _: f"<think>Hm.</think> An answer to: {prompt[-40:]}")
    misbehaves = False

    def do_GET(self):
        LOG["moved"] += self.path == "/new/v1/chat/completions"
        self.send(200, json.dumps(LOG))

    def do_POST(self):
        if self.path.startswith("/moved"):
            self.send(302, "", location="/new/v1/chat/completions")
            return
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        prompt = body["messages"][0]["content"]
        self.counted = True
        with LOCK:
            AT_ONCE[0] += 1
            LOG["requests"] += 1
            LOG["most at once"] = max(LOG["most at once"], AT_ONCE[0])
            LOG["keys"] = sorted({*LOG["keys"], self.headers.get("Authorization", "")})
            LOG["early"] += time.monotonic() < ALLOWED_AT[0]
            number, TRIES[prompt] = TRIES[prompt], TRIES[prompt] + 1
        try:
            if "SLEEP" in prompt:
                time.sleep(60)
            elif "POISON" in prompt:
                self.send(500, "always")
            elif "TOO LONG" in prompt:
                self.send(400, json.dumps({"error": {"message": "context length exceeded"}}))
            elif self.misbehaves and number < len(FAULTS):
                self.fail(FAULTS[number])
            else:
                time.sleep(0.02)
                self.send(200, self.completion(self.answer(prompt, body["max_tokens"])))
        finally:
            self.count_out()

    counted = False

    def count_out(self) -> None:
        """The request is no longer at work: before the client can read the answer, and ask for more."""
        with LOCK:
            AT_ONCE[0] -= self.counted
            self.counted = False

    def fail(self, how: str) -> None:
        good = self.completion("good")
        if how == "slow":
            time.sleep(0.6)
        elif how == "500":
            self.send(500, "oh")
        elif how == "html":
            self.send(200, "<html><body>Bad gateway</body></html>")
        elif how == "half":
            self.send(200, good[: len(good) // 2])
        elif how == "cut":
            self.send(200, good[: len(good) // 2], length=len(good))
        elif how == "429":
            with LOCK:
                LOG["429"] += 1
                ALLOWED_AT[0] = max(ALLOWED_AT[0], time.monotonic() + 0.25)
            self.send(429, "slow down", retry_after="0.3")
        self.close_connection = True  # and "hang up": nothing at all

    @staticmethod
    def completion(text: str) -> str:
        return json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}]})

    def send(self, status: int, content: str, length: int | None = None, retry_after: str = "", location: str = "") -> None:
        self.count_out()
        self.send_response(status)
        self.send_header("Content-Length", str(length or len(content.encode())))
        for name, value in (("Retry-After", retry_after), ("Location", location)):
            if value:
                self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content.encode())

    def log_message(self, *_):
        pass


class Server(ThreadingHTTPServer):
    daemon_threads, request_queue_size = True, 64

    def handle_error(self, *_):
        """The client may have gone; that is not news."""


if __name__ == "__main__":
    socketserver.TCPServer.allow_reuse_address = True
    if sys.argv[1] == "--misbehave":
        Handler.misbehaves = True
    elif sys.argv[1] != "--plain":
        Handler.answer = staticmethod(load_model(sys.argv[1]))
    server = Server(("127.0.0.1", 0), Handler)
    print(server.server_address[1], flush=True)
    server.serve_forever()
