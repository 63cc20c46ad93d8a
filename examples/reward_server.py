"""A small reward server: a reward function over HTTP, in the form that `reward.function: http://…` expects.

    python examples/reward_server.py my_rules:exact --port 8000
    glm-rlhf ppo ppo.yaml reward.function=http://localhost:8000

The rule is a function as PPO takes one, `(list of RewardRequest) -> list of numbers`, in a module of the
current folder. Put a model of your own behind it, or answer the same JSON from another language: the
contract is at the top of `glm_rlhf/engine/rewards/http.py`.
"""

import argparse
import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from glm_rlhf.engine.rewards.function import RewardFunction, RewardRequest, import_reward_function


def make_server(rule: RewardFunction, *, host: str = "127.0.0.1", port: int = 0) -> ThreadingHTTPServer:
    """Return a server that answers batches by `rule`; port 0 takes a free one."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"  # a connection serves many batches
        wbufsize = -1  # headers and body leave together
        timeout = 60  # of a connection without requests, in seconds

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            try:
                requests = [_request(fields) for fields in json.loads(body)["requests"]]
            except (ValueError, KeyError, TypeError) as error:
                self._answer(400, {"error": f"not a batch of requests: {type(error).__name__}: {error}"})
                return
            try:
                self._answer(200, {"rewards": list(rule(requests))})
            except Exception as error:  # the client asks again, and names it if that does not help
                self._answer(500, {"error": f"{type(error).__name__}: {error}"})

        def _answer(self, status: int, content: dict) -> None:
            body = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Keep stderr for errors."""

    return ThreadingHTTPServer((host, port), Handler)


def _request(fields: dict) -> RewardRequest:
    return RewardRequest(
        prompt_tokens=tuple(fields["prompt_tokens"]),
        response_tokens=tuple(fields["response_tokens"]),
        prompt=fields["prompt"],
        response=fields["response"],
        is_finished=fields["is_finished"],
        extra=fields["extra"],
    )


def main() -> None:
    """Serve until interrupted."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("rule", help="module:function")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at")
    parser.add_argument("--port", type=int, default=8000, help="port to listen at")
    options = parser.parse_args()
    server = make_server(import_reward_function(options.rule), host=options.host, port=options.port)
    print(f"{options.rule} at http://{options.host}:{server.server_port}", flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
