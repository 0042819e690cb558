"""An MCP server that writes what the SDK's never would: `python -m tests.mcp_raw [--http PORT]`."""

from __future__ import annotations

import json
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

TEXTS = {"half": r"cut \ud83d here", "bytes": "no \xff UTF-8", "fine": "fine"}  # as they stand in the JSON


def answer(message: dict) -> bytes:
    """The whole reply; b"" where none is due."""
    if "id" not in message:
        return b""
    params = message.get("params", {})
    if message["method"] == "initialize":
        server = {"name": "raw", "version": "1"}
        result = {"protocolVersion": params["protocolVersion"], "capabilities": {"tools": {}}, "serverInfo": server}
    elif message["method"] == "tools/list":
        result = {"tools": [{"name": name, "inputSchema": {"type": "object"}} for name in (*TEXTS, "broken", "odd")]}
        promised = {"type": "object", "required": ["count"]}
        result["tools"].append({"name": "promises", "inputSchema": {"type": "object"}, "outputSchema": promised})
    elif message["method"] == "tools/call" and params["name"] == "odd":
        result = {"content": [{"type": "hologram", "data": "?"}]}
    elif message["method"] == "tools/call" and params["name"] == "promises":
        result = {"content": [{"type": "text", "text": "no count"}], "structuredContent": {"other": 1}}
    elif message["method"] == "tools/call" and params["name"] in TEXTS:
        result = {"content": [{"type": "text", "text": "HERE"}]}
    else:
        error = {"code": -32603 if message["method"] == "tools/call" else -32601, "message": "it broke"}
        return json.dumps({"jsonrpc": "2.0", "id": message["id"], "error": error}).encode()
    reply = json.dumps({"jsonrpc": "2.0", "id": message["id"], "result": result})
    return reply.replace("HERE", TEXTS.get(params.get("name"), "")).encode("latin-1")


class Posted(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        reply = answer(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        self.send_response(200 if reply else 202)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(reply)))
        self.end_headers()
        self.wfile.write(reply)

    def log_message(self, format: str, *args: object) -> None: ...


if __name__ == "__main__":
    if "--http" in sys.argv:
        ThreadingHTTPServer(("127.0.0.1", int(sys.argv[-1])), Posted).serve_forever()
    for line in sys.stdin:
        if reply := answer(json.loads(line)):
            sys.stdout.buffer.write(reply + b"\n")
            sys.stdout.buffer.flush()
